"""Write the table of what a step sends into docs/parallel.md: plans of a small model, compiled for Ascend.

    python scripts/communication_table.py           # compile the plans (20 to 60 s each) and print the table
    python scripts/communication_table.py --write   # write it into docs/parallel.md

Bytes are counted in the compiled graph of one rank and are those of ring algorithms; nothing is measured.
"""
import copy
import sys
from pathlib import Path
from types import MappingProxyType
from typing import Any, Dict, List, Mapping, NamedTuple, Sequence

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from research.telechat.ascend_sim.account import Mesh
from research.telechat.ascend_sim.compile import compile_plan
from research.telechat.common.files import JsonObject
from research.telechat.plan.cost import cost_of
from research.telechat.plan.plan import find_faults, read_plan
from research.telechat.recipe.read import read_recipe
from scripts import generated

DOCUMENT = ROOT / "docs/parallel.md"
SMALL = {"num_layers": 2, "hidden_size": 512, "num_heads": 8, "intermediate_size": 1536, "vocab_size": 4096,
         "seq_length": 512, "tie_word_embeddings": True, "compute_dtype": "float16", "param_init_type": "float16"}
SEQUENCE_PARALLEL = {"use_seq_parallel": True}
SLICES = "inputs of recomputed layers are kept in slices and gathered again (`recompute_slice_activation`)"
PURPOSES = ("activations", "gradients", "parameters", "pipeline")


_NOTHING: Mapping[str, Any] = MappingProxyType({})


class Row(NamedTuple):
    """A plan of the table: degrees as (data, model, pipeline, context), sections and keys of the model that change the
    recipe, and where the bytes come from that a plainer plan does not send."""

    name: str
    degrees: Sequence[int]
    sections: Mapping[str, Dict[str, Any]] = _NOTHING
    model: Mapping[str, Any] = _NOTHING
    rank: int = 0
    reason: str = ""


_RING = {"context_parallel_algo": "colossalai_cp"}
_PIPELINE = {"parallel_config": {**SEQUENCE_PARALLEL, "micro_batch_num": 4}}
ROWS = (
    Row("dp8, optimizer parallel", (8, 1, 1, 1)),
    Row("dp8, optimizer parallel, parameters in float32", (8, 1, 1, 1), {"optimizer": {"master_weights": "float32"}},
        {"param_init_type": "float32"},
        reason="gradients are reduced in float32, and so is the tied table gathered; matrices are gathered in 16 bits"),
    Row("dp2 mp4", (2, 4, 1, 1), reason=SLICES),
    Row("dp2 mp4, loss in chunks", (2, 4, 1, 1), {}, {"loss_chunk_rows": 128},
        reason="as above, and the gradient behind the head is summed in both passes over the chunks"),
    Row("dp2 mp4, sequence parallel", (2, 4, 1, 1), {"parallel_config": SEQUENCE_PARALLEL}),
    Row("dp2 mp4, sequence parallel, loss in chunks", (2, 4, 1, 1), {"parallel_config": SEQUENCE_PARALLEL},
        {"loss_chunk_rows": 128}, reason="rows are gathered once more for the head's second pass"),
    Row("dp2 mp4, sequence parallel, `mp_comm_recompute: False`", (2, 4, 1, 1),
        {"parallel_config": SEQUENCE_PARALLEL, "recompute_config": {"mp_comm_recompute": False}}),
    Row("mp8 pp2, sequence parallel, 4 micro-batches, first stage", (1, 8, 2, 1), _PIPELINE),
    Row("mp8 pp2, sequence parallel, 4 micro-batches, last stage", (1, 8, 2, 1), _PIPELINE, rank=8),
    Row("dp4 cp2, keys and values gathered", (4, 1, 1, 2), {"parallel_config": _RING}),
    Row("dp2 mp2 cp2, ring attention", (2, 2, 1, 2), {"parallel_config": _RING}, {"use_ring_attention": True},
        reason=SLICES),
    Row("dp2 mp2 cp2, ulysses", (2, 2, 1, 2),
        {"parallel_config": {"context_parallel_algo": "ulysses_cp"}, "parallel": {"enable_alltoall": True}},
        reason=SLICES),
)


def small_recipe(row: Row) -> JsonObject:
    """The fine-tuning base with the small model and the plan of `row`: batch 4, every layer recomputed."""
    recipe = copy.deepcopy(read_recipe(ROOT / "configs/telechat/finetune.yaml"))
    dp, mp, pp, cp = row.degrees
    recipe["use_parallel"] = True
    recipe["trainer"]["model_name"] = "telechat_small"
    recipe["model"]["model_config"].update(SMALL, **row.model)
    recipe["parallel_config"].update(data_parallel=dp, model_parallel=mp, pipeline_stage=pp, context_parallel=cp)
    recipe["optimizer"]["master_weights"] = "remainder"
    for name, keys in row.sections.items():
        recipe[name] = {**recipe.get(name, {}), **keys}
    return recipe


def sent(row: Row) -> JsonObject:
    """{"all", each purpose, "planner"}: bytes that the rank of `row` sends. Raises ValueError: it does not compile."""
    recipe = small_recipe(row)
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
    head = ["plan", *PURPOSES, "other", "all", "planner", "where the additional bytes come from"]
    lines: List[List[str]] = [head, ["---"] + ["---:"] * (len(head) - 2) + ["---"]]
    for row in tqdm(ROWS, unit="plan", disable=None):
        found = sent(row)
        other = found["all"] - sum(found.get(purpose, 0) for purpose in PURPOSES)
        figures = [*(found.get(purpose, 0) for purpose in PURPOSES), other, found["all"], found["planner"]]
        lines.append([row.name, *(f"{figure / 1e6:.1f}" for figure in figures), row.reason])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    sys.exit(generated.run("communication_table.py", DOCUMENT, table, "the table of what a step sends"))
