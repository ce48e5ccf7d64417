"""Write the table of what a step sends into docs/parallel.md: plans of a small model, compiled for Ascend.

    python scripts/communication_table.py           # compile the plans (20 to 60 s each) and print the table
    python scripts/communication_table.py --write   # write it into docs/parallel.md

Bytes are counted in the compiled graph of one rank and are those of ring algorithms; nothing is measured.
"""
import sys
from pathlib import Path
from typing import Any, Dict, List, NamedTuple

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "tests/support"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from plan_fixtures import small_recipe

from research.telechat.ascend_sim.account import Mesh
from research.telechat.ascend_sim.compile import compile_plan
from research.telechat.common.files import JsonObject
from research.telechat.common.table import markdown
from research.telechat.plan.cost import cost_of
from research.telechat.plan.plan import find_faults, read_plan
from scripts import generated

DOCUMENT = ROOT / "docs/parallel.md"
SLICES = "inputs of recomputed layers are kept in slices and gathered again (`recompute_slice_activation`)"
PURPOSES = ("activations", "gradients", "parameters", "pipeline")
_RING = {"context_parallel_algo": "colossalai_cp"}
_ROWS_CUT = {"use_seq_parallel": True}
_STAGES = {"mp": 8, "pp": 2, "parallel_config": {**_ROWS_CUT, "micro_batch_num": 4}}
_CHUNKS = {"loss_chunk_rows": 128}


class Row(NamedTuple):
    """A plan of the table: arguments of `small_recipe`, the rank that is compiled, and where the bytes come from that a
    plainer plan does not send."""

    name: str
    plan: Dict[str, Any]
    rank: int = 0
    reason: str = ""


ROWS = (
    Row("dp8, optimizer parallel", {"dp": 8}),
    Row("dp8, optimizer parallel, parameters in float32", {
        "dp": 8, "model": {"param_init_type": "float32"}, "optimizer": {"master_weights": "float32"}},
        reason="gradients are reduced in float32, and so is the tied table gathered; matrices are gathered in 16 bits"),
    Row("dp2 mp4", {"dp": 2, "mp": 4}, reason=SLICES),
    Row("dp2 mp4, loss in chunks", {"dp": 2, "mp": 4, "model": _CHUNKS},
        reason="as above, and the gradient behind the head is summed in both passes over the chunks"),
    Row("dp2 mp4, sequence parallel", {"dp": 2, "mp": 4, "parallel_config": _ROWS_CUT}),
    Row("dp2 mp4, sequence parallel, loss in chunks", {
        "dp": 2, "mp": 4, "parallel_config": _ROWS_CUT, "model": _CHUNKS},
        reason="rows are gathered once more for the head's second pass"),
    Row("dp2 mp4, sequence parallel, `mp_comm_recompute: False`", {
        "dp": 2, "mp": 4, "parallel_config": _ROWS_CUT, "recompute_config": {"mp_comm_recompute": False}}),
    Row("mp8 pp2, sequence parallel, 4 micro-batches, first stage", _STAGES),
    Row("mp8 pp2, sequence parallel, 4 micro-batches, last stage", _STAGES, rank=8),
    Row("dp4 cp2, keys and values gathered", {"dp": 4, "cp": 2, "parallel_config": _RING}),
    Row("dp2 mp2 cp2, ring attention", {
        "dp": 2, "mp": 2, "cp": 2, "parallel_config": _RING, "model": {"use_ring_attention": True}}, reason=SLICES),
    Row("dp2 mp2 cp2, ulysses", {
        "dp": 2, "mp": 2, "cp": 2, "parallel_config": {"context_parallel_algo": "ulysses_cp"},
        "parallel": {"enable_alltoall": True}}, reason=SLICES),
)


def sent(row: Row) -> JsonObject:
    """{"all", each purpose, "planner"}: bytes that the rank of `row` sends. Raises ValueError: it does not compile."""
    recipe = small_recipe(**row.plan)
    plan = read_plan(recipe)
    faults = find_faults(plan)
    if faults:
        raise ValueError(f"{row.name}: {faults[0]}")
    report = compile_plan(recipe, Mesh(plan.pp, plan.dp, plan.cp, plan.mp), row.rank, plan.model.seq_length + 1)
    if not report["ok"]:
        raise ValueError(f"{row.name}: {report['error']}")
    found = report["graphs"]["step"]["communication"]
    return {"all": found["bytes"], "planner": cost_of(plan, row.rank).sent, **found["by_purpose"]}


def table() -> str:
    """The compiled plans, as Markdown."""
    lines: List[List[str]] = [
        ["plan", *PURPOSES, "other", "all", "planner", "where the additional bytes come from"]]
    for row in tqdm(ROWS, unit="plan", disable=None):
        found = sent(row)
        other = found["all"] - sum(found.get(purpose, 0) for purpose in PURPOSES)
        figures = [*(found.get(purpose, 0) for purpose in PURPOSES), other, found["all"], found["planner"]]
        lines.append([row.name, *(f"{figure / 1e6:.1f}" for figure in figures), row.reason])
    return markdown(lines)


if __name__ == "__main__":
    sys.exit(generated.run("communication_table.py", DOCUMENT, table, "the table of what a step sends"))
