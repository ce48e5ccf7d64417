"""Execute a small model of every recipe's plan and write the table of docs/parallel.md: what was compared, and how far
the plan is from one rank.

    python scripts/execute_recipes.py --jobs 4                         # all recipes for several cards, 8 ranks each
    python scripts/execute_recipes.py 'finetune_telechat2_*' --write   # some; the table keeps the rows of the others

A recipe takes minutes: each of its ranks is compiled (research/telechat/interpret/graphs.py keeps the graphs). The exit
code is 1 if a plan computes something else than one rank, or cannot be executed.
"""
import argparse
import copy
import fnmatch
import sys
from pathlib import Path
from typing import Dict, List

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from research.telechat.common.command import run_command
from research.telechat.common.errors import UserError
from research.telechat.common.files import write_text
from research.telechat.common.table import markdown
from research.telechat.interpret import prediction, training
from research.telechat.interpret.features import features
from research.telechat.interpret.graphs import compiled
from research.telechat.interpret.shrink import shrink, uncut
from research.telechat.plan.plan import read_plan
from research.telechat.recipe.legacy import translate
from research.telechat.recipe.read import read_recipe
from scripts.generated import begin, with_part

DOCUMENT = ROOT / "docs/parallel.md"
SCRIPT = "execute_recipes.py"
HEAD = ["recipe", "ranks", "layers", "data x model x pipeline x context", "with", "loss and norm, or logits",
        "parameters and moments"]
_DEGREES = {"data parallelism", "model parallelism", "pipeline"}     # which the degrees show


def recipes(pattern: str) -> List[Path]:
    """The recipes for several cards whose names match."""
    found = []
    for path in sorted((ROOT / "research/telechat").glob("*.yaml")):
        if fnmatch.fnmatch(path.stem, pattern) and "_cpu" not in path.stem and read_plan(read_recipe(path)).ranks > 1:
            found.append(path)
    return found


def execute(path: Path, ranks: int, layers: int, jobs: int) -> List[str]:
    """The row of a recipe. Raises UserError: it cannot be executed, or computes something else than one rank."""
    recipe = copy.deepcopy(read_recipe(path))
    translate(recipe)
    small = shrink(recipe, min(ranks, read_plan(recipe).ranks), {"num_layers": layers} if layers else {})
    plan, whole = compiled(small, jobs), compiled(uncut(small), jobs)
    its = plan.plan
    first, others = "", "-"
    if its.training:
        steps = training.compare(plan, whole)
        fault, first, others = steps.fault(), f"{steps.loss_gap:.1e}", f"{max(steps.differences.values()):.1e}"
    else:
        tokens = prediction.compare(plan, whole)
        fault, first = tokens.fault(), f"{tokens.worst:.1e}"
    if fault:
        raise UserError(f"{path.stem}: {fault}")
    return [path.stem, str(its.ranks), str(its.model.num_layers), f"{its.dp} x {its.mp} x {its.pp} x {its.cp}",
            ", ".join(sorted(features(its) - _DEGREES)), first, others]


def known_rows(text: str) -> Dict[str, List[str]]:
    """The rows that the document has, by recipe."""
    part = text.partition(begin(SCRIPT))[2].partition("<!--")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("|")]
    return {row[0]: row for row in rows[2:]}


def run() -> int:
    """Carry out the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="?", default="*", help="pattern of their names")
    parser.add_argument("--ranks", type=int, default=8, help="at most so many; degrees are halved")
    parser.add_argument("--layers", type=int, default=0, help="of the small models; default: two, or one per stage")
    parser.add_argument("--jobs", type=int, default=1, help="ranks compiled at the same time")
    parser.add_argument("--write", action="store_true", help="write the rows into docs/parallel.md")
    args = parser.parse_args()
    failed = 0
    for path in recipes(args.recipes):
        try:
            row = execute(path, args.ranks, args.layers, args.jobs)
        except UserError as err:
            print(f"error: {err}", file=sys.stderr, flush=True)
            failed += 1
            continue
        print(" | ".join(row), flush=True)
        if args.write:
            text = DOCUMENT.read_text(encoding="utf-8")
            rows = {**known_rows(text), row[0]: row}
            write_text(DOCUMENT, with_part(text, SCRIPT, markdown([HEAD, *(rows[name] for name in sorted(rows))])))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run_command(run))
