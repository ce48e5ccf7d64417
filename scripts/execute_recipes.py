"""Execute a small model of every recipe's plan and write the table of docs/parallel.md: what was compared, and how far
the plan is from one rank.

    python scripts/execute_recipes.py --jobs 4                         # all recipes for several cards, 8 ranks each
    python scripts/execute_recipes.py 'finetune_telechat2_*' --write   # some; the table keeps the rows of the others
    python scripts/execute_recipes.py --further --write                # kinds of plans that no recipe has

A recipe takes minutes: each of its ranks is compiled, in a process forked from one that has imported MindSpore.
research/telechat/interpret/graphs.py keeps the graphs, and recipes whose small models are equal are executed once. The
exit code is 1 if a plan computes something else than one rank, or cannot be executed.
"""
import argparse
import copy
import fnmatch
import sys
from pathlib import Path
from typing import Dict, List, NamedTuple, Tuple, Union

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "tests/support"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import prepared

from research.telechat.common.command import run_command
from research.telechat.common.errors import UserError
from research.telechat.common.files import JsonObject, write_text
from research.telechat.common.table import markdown
from research.telechat.interpret import attention, prediction, training
from research.telechat.interpret.features import features
from research.telechat.interpret.graphs import compiled, content
from research.telechat.interpret.operators import OPERATORS
from research.telechat.interpret.shrink import shrink, uncut
from research.telechat.plan.plan import read_plan
from research.telechat.recipe.legacy import translate
from research.telechat.recipe.read import read_recipe, set_key
from scripts import generated

DOCUMENT = ROOT / "docs/parallel.md"
SCRIPT = "execute_recipes.py"
HEAD = ["recipe", "ranks", "layers", "data x model x pipeline x context", "with", "loss and norm, or logits",
        "parameters and moments"]
_DEGREES = {"data parallelism", "model parallelism", "pipeline"}     # which the degrees show


_ONE = {"parallel_config.data_parallel": 1, "parallel_config.model_parallel": 1, "parallel_config.pipeline_stage": 1,
        "parallel_config.use_seq_parallel": False}
_STAGES = {**_ONE, "parallel_config.pipeline_stage": 2}
_HYBRID = {**_ONE, "parallel_config.context_parallel": 4, "parallel_config.context_parallel_algo": "hybrid_cp",
           "parallel_config.ulysses_degree_in_cp": 2, "parallel.enable_alltoall": True}


class Further(NamedTuple):
    """A plan that no recipe has: a recipe with other keys. layers: of the small model."""

    recipe: str
    ranks: int
    layers: int
    keys: JsonObject


FURTHER: Dict[str, Further] = {
    "gradients accumulated": Further("finetune_telechat_7b", 2, 1, {"runner_config.gradient_accumulation_steps": 2}),
    "nothing recomputed": Further("finetune_telechat2_7b", 2, 2, {"recompute_config.recompute": False}),
    "documents back to back, loss in chunks": Further("finetune_telechat2_7b", 4, 1, {
        "model.model_config.document_boundaries": True, "model.model_config.loss_chunk_rows": 24}),
    "hybrid context parallelism": Further("finetune_telechat2_7b", 4, 1, _HYBRID),
    "hybrid context parallelism, ring attention": Further("finetune_telechat2_7b", 4, 1, {
        **_HYBRID, "model.model_config.use_ring_attention": True}),
    "tied embeddings on two stages": Further("finetune_telechat_7b", 2, 2, _STAGES),
    "virtual stages": Further("finetune_telechat2_7b", 2, 4, {
        **_STAGES, "model.model_config.pp_interleave_num": 2,
        "parallel.pipeline_config": {"pipeline_interleave": True, "pipeline_scheduler": "1f1b"}}),
    "batches interleaved": Further("finetune_telechat2_7b", 2, 1, {
        **_ONE, "parallel_config.model_parallel": 2, "micro_batch_interleave_num": 2}),
    "remainders": Further("finetune_telechat_7b", 2, 1, {"optimizer.master_weights": "remainder"}),
    "vocabulary whole": Further("finetune_telechat_7b", 2, 1, {
        **_ONE, "parallel_config.model_parallel": 2, "parallel_config.vocab_emb_dp": True})}


def recipes(pattern: str) -> List[Path]:
    """The recipes for several cards whose names match."""
    found = []
    for path in sorted((ROOT / "research/telechat").glob("*.yaml")):
        if fnmatch.fnmatch(path.stem, pattern) and "_cpu" not in path.stem and read_plan(read_recipe(path)).ranks > 1:
            found.append(path)
    return found


def small_recipe(path: Path, ranks: int, layers: int, name: str = "") -> JsonObject:
    """The recipe, or the further plan `name` made of it, shrunk. Raises ConfigError."""
    recipe = copy.deepcopy(read_recipe(path))
    for key, value in FURTHER[name].keys.items() if name else ():
        set_key(recipe, key, value)
    translate(recipe)
    return shrink(recipe, min(ranks, read_plan(recipe).ranks), {"num_layers": layers} if layers else {})


def start(words: List[str], folder: Path, env: Dict[str, str], log: Path) -> prepared.Started:
    """What compiles a rank, forked from a process that has imported MindSpore already."""
    log.write_bytes(b"")
    return prepared.start(words, folder, env, str(log), ascend=True)


def execute(small: JsonObject, jobs: int) -> Tuple[str, str]:
    """The largest differences to one rank: of loss and norm, or logits; of parameters and moments. Raises UserError: it
    cannot be executed, or computes something else than one rank."""
    plan, whole = compiled(small, jobs, start=start), compiled(uncut(small), jobs, start=start)
    first, others = "", "-"
    if plan.plan.training:
        ring = "ring attention" in features(plan.plan)               # read as MindSpore means it (docs/parallel.md)
        operators = {**OPERATORS, **attention.operators(empty_band=True)} if ring else OPERATORS
        steps = training.compare(plan, whole, operators=operators)
        fault, first, others = steps.fault(), f"{steps.loss_gap:.1e}", f"{max(steps.differences.values()):.1e}"
    else:
        tokens = prediction.compare(plan, whole)
        fault, first = tokens.fault(), f"{tokens.worst:.1e}"
    if fault:
        raise UserError(fault)
    return first, others


def row_of(name: str, small: JsonObject, found: Tuple[str, str]) -> List[str]:
    """The row of the table."""
    its = read_plan(small)
    return [name, str(its.ranks), str(its.model.num_layers), f"{its.dp} x {its.mp} x {its.pp} x {its.cp}",
            ", ".join(sorted(features(its) - _DEGREES)), *found]


def known_rows(text: str) -> Dict[str, List[str]]:
    """The rows that the document has, by recipe."""
    return {row[0]: row for row in generated.rows(text, SCRIPT)}


def run() -> int:
    """Carry out the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="?", default="*", help="pattern of their names")
    parser.add_argument("--ranks", type=int, default=8, help="at most this number; degrees are halved")
    parser.add_argument("--further", action="store_true", help="the kinds that no recipe is of; `recipes` is a pattern "
                                                               "of their names, ranks and layers are given")
    parser.add_argument("--layers", type=int, default=0, help="of the small models; default: two, or one per stage")
    parser.add_argument("--jobs", type=int, default=1, help="ranks compiled at the same time")
    parser.add_argument("--write", action="store_true", help="write the rows into docs/parallel.md")
    args = parser.parse_args()
    tasks = [(path, args.ranks, args.layers, "") for path in recipes(args.recipes)]
    if args.further:
        tasks = [(ROOT / f"research/telechat/{one.recipe}.yaml", one.ranks, one.layers, name)
                 for name, one in FURTHER.items() if fnmatch.fnmatch(name, args.recipes)]
    failed = 0
    results: Dict[str, Union[Tuple[str, str], UserError]] = {}
    for path, ranks, layers, name in tasks:
        try:
            small = small_recipe(path, ranks, layers, name)
            key = content(small)
            if key not in results:
                try:
                    results[key] = execute(small, args.jobs)
                except UserError as err:
                    results[key] = err
            found = results[key]
            if isinstance(found, UserError):
                raise found
        except UserError as err:
            print(f"error: {name or path.stem}: {err}", file=sys.stderr, flush=True)
            failed += 1
            continue
        row = row_of(f"{path.stem}, {name}" if name else path.stem, small, found)
        print(" | ".join(row), flush=True)
        if args.write:
            text = DOCUMENT.read_text(encoding="utf-8")
            rows = {**known_rows(text), row[0]: row}
            part = markdown([HEAD, *(rows[name] for name in sorted(rows))])
            write_text(DOCUMENT, generated.with_part(text, SCRIPT, part))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run_command(run))
