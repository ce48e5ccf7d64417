"""Write the table of the recipes' plans into docs/parallel.md: degrees, recomputation, memory and time by estimate.

    python scripts/plan_table.py           # print it
    python scripts/plan_table.py --write   # write it into docs/parallel.md
    python scripts/plan_table.py --check   # exit code 1 if the document is not current

Memory is that of the fullest card (plan/cost.py), times are estimates (plan/timing.py); nothing was measured.
"""
import sys
from pathlib import Path
from typing import List

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from research.telechat.plan.cost import memory_of
from research.telechat.plan.plan import Plan, read_plan
from research.telechat.plan.timing import step_time
from research.telechat.recipe.read import read_recipe
from scripts import generated

DOCUMENT = ROOT / "docs/parallel.md"
HEAD = ["recipe", "cards", "data x model x pipeline x context", "layers recomputed", "parameters", "GB", "s/step",
        "tokens/s/card"]


def recomputed(plan: Plan) -> str:
    """How many layers each stage recomputes, of how many."""
    if plan.recompute is True:
        return "all"
    counts = plan.recompute if isinstance(plan.recompute, list) else [0]
    again = "some operators of the others" if plan.select_recompute else ""
    if not any(counts):
        return "some operators" if again else "none"
    return ", ".join(filter(None, [f"{sum(counts)} of {plan.model.num_layers}", again]))


def parameters(plan: Plan) -> str:
    """What holds the weights that are trained."""
    kind: str = plan.model.param_init_type
    return kind + (" and remainder" if plan.remainder else "") + (", frozen" if plan.lora_rank else "")


def table() -> str:
    """The plans of the recipes of training for Ascend, as Markdown."""
    rows: List[List[str]] = [HEAD, ["---"] * len(HEAD)]
    for path in sorted((ROOT / "research/telechat").glob("*.yaml")):
        plan = read_plan(read_recipe(path))
        if plan.device == "CPU" or not plan.training:
            continue
        degrees = f"{plan.dp} x {plan.mp} x {plan.pp} x {plan.cp}"
        if plan.virtual_stages > 1:
            degrees += f", {plan.virtual_stages} virtual stages"
        memory = max(memory_of(plan, stage).total for stage in range(plan.pp)) / 1e9
        seconds = step_time(plan).seconds
        rows.append([path.stem, str(plan.ranks), degrees, recomputed(plan), parameters(plan), f"{memory:.0f}",
                     f"{seconds:.3g}", f"{plan.step_tokens / plan.ranks / seconds:,.0f}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    sys.exit(generated.run("plan_table.py", DOCUMENT, table, "the table of the recipes' plans"))
