"""A plan and its costs as tables, a JSON object and a picture. The figures come from plan/cost.py."""
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

from research.telechat.common.files import JsonObject
from research.telechat.common.picture import drawing, save
from research.telechat.common.table import table
from research.telechat.plan import checkpoints, hccl
from research.telechat.plan.cost import (
    Cost,
    Memory,
    cost_of,
    flops_per_token,
    link_of,
    memory_of,
    parameter_count,
    tokens_per_second,
)
from research.telechat.plan.plan import Plan, bubble, find_notes

GB = 1e9
_PARTS = (("parameters", "parameters"), ("optimizer", "optimizer"), ("remainder", "remainder"),
          ("gradients", "gradients"), ("kv_cache", "KV cache"), ("gathered", "gathered*"),
          ("gradients_passing", "passing*"), ("activations", "activations*"), ("masks", "masks*"), ("loss", "loss*"))
_LINKS = {"machine": "within a machine", "network": "between machines"}


def stages(plan: Plan) -> List[Memory]:
    """Memory of a rank of each pipeline stage."""
    return [memory_of(plan, stage) for stage in range(plan.pp)]


def memory_notes(plan: Plan, memories: Sequence[Memory]) -> List[str]:
    """A line for stages that do not fit; exact figures (parameters, states, buffers) are separate from estimates."""
    worst = max(range(len(memories)), key=lambda stage: memories[stage].total)
    memory = memories[worst]
    exact = memory.parameters + memory.optimizer + memory.remainder + memory.gradients + memory.kv_cache
    if exact > plan.limit_gb * GB:
        return [f"stage {worst} does not fit: parameters, optimizer state, gradients and cache alone take "
                f"{exact / GB:.1f} GB of {plan.limit_gb:g} GB (context.max_device_memory); raise model_parallel or "
                "pipeline_stage"]
    if memory.total > plan.limit_gb * GB:
        return [f"stage {worst} is estimated at {memory.total / GB:.1f} GB of {plan.limit_gb:g} GB "
                "(context.max_device_memory): lower runner_config.batch_size, recompute more layers, or raise "
                "model_parallel or context_parallel"]
    return []


def headline(plan: Plan) -> str:
    """Sizes and degrees in two lines."""
    degrees = [f"data {plan.dp}", f"model {plan.mp}" + (" with sequence parallelism" if plan.sequence_parallel else ""),
               f"pipeline {plan.pp}", f"context {plan.cp}"]
    name = plan.model.net_name or "model"
    lines = [f"{name}: {parameter_count(plan) / GB:.2f} G parameters, {plan.model.num_layers} layers, "
             f"{plan.model.seq_length} tokens per sequence",
             f"{plan.ranks} cards: {' x '.join(degrees)}"]
    if plan.training:
        lines.append(f"a step: {plan.dp} x {plan.micro_batches} x {plan.batch} sequences = {plan.step_tokens} tokens")
    return "\n".join(lines)


def memory_table(plan: Plan, memories: Sequence[Memory], layers: Sequence[Sequence[int]]) -> str:
    """GB per card and stage, at the fullest moment of each."""
    shown = [(key, name) for key, name in _PARTS if any(getattr(memory, key) for memory in memories)]
    rows: List[List[object]] = [["stage", "layers", *(name for _, name in shown), "total*", f"of {plan.limit_gb:g} GB",
                                  *(["fullest in"] if plan.training else [])]]
    for stage, memory in enumerate(memories):
        counts = "+".join(map(str, layers[stage]))
        rows.append([stage, counts, *(getattr(memory, key) / GB for key, _ in shown), memory.total / GB,
                     f"{memory.total / GB / plan.limit_gb:.0%}", *([memory.peak] if plan.training else [])])
    return table(rows)


def traffic_table(plan: Plan, cost: Cost) -> str:
    """MB that a rank sends in a step, by purpose, axis and link."""
    sums: Dict[Tuple[str, str, str], float] = {}
    for item in cost.traffic:
        key = (item.purpose, item.axis, link_of(plan, item.axis))
        sums[key] = sums.get(key, 0) + item.bytes
    rows: List[List[object]] = [["for", "over", "link", "MB"]]
    rows += [[purpose, axis, _LINKS[link], size / 1e6] for (purpose, axis, link), size in
             sorted(sums.items(), key=lambda entry: -entry[1])]
    rows.append(["all", "", "", cost.sent / 1e6])
    return table(rows)


def text(plan: Plan, rank: int, mfu: float) -> str:
    """Everything about the plan, seen from `rank`."""
    memories, cost = stages(plan), cost_of(plan, rank)
    layers = [cost_of(plan, stage * (plan.ranks // plan.pp)).layers for stage in range(plan.pp)]
    parts = [headline(plan), "Memory of a card in GB (* estimated):", memory_table(plan, memories, layers)]
    if cost.traffic:
        when = "in a step" if plan.training else f"while processing a prompt of {plan.model.seq_length} tokens"
        parts += [f"Sent by rank {rank} (pipeline stage {cost.stage}) {when}:", traffic_table(plan, cost)]
    speed = tokens_per_second(plan, mfu)
    lines = [f"{flops_per_token(plan) / GB:.2f} GFLOP per token" + (
        f", {flops_per_token(plan) * plan.step_tokens / 1e15:.3g} PFLOP per step" if plan.training else "")]
    if plan.training:
        lines.append(f"at {mfu:.0%} MFU of {plan.chip.teraflops:g} TFLOP/s per card ({plan.chip.name}, published): "
                     f"{speed:,.0f} tokens/s, {speed / plan.ranks:,.0f} per card, "
                     f"{plan.step_tokens / speed:.2f} s per step")
    if plan.pp > 1 and plan.training:
        lines.append(f"pipeline bubble {bubble(plan):.1%}")
    lines += hccl.lines(plan, rank) + checkpoints.lines(plan)
    notes = find_notes(plan) + memory_notes(plan, memories) + hccl.notes(plan, rank)
    return "\n\n".join([*parts, "\n".join(lines), *(["\n".join(f"note: {note}" for note in notes)] if notes else [])])


def as_json(plan: Plan, rank: int, mfu: float) -> JsonObject:
    """The same as an object: bytes and counts."""
    cost = cost_of(plan, rank)
    return {
        "ranks": plan.ranks, "data_parallel": plan.dp, "model_parallel": plan.mp, "pipeline_stage": plan.pp,
        "context_parallel": plan.cp, "sequence_parallel": plan.sequence_parallel, "parameters": parameter_count(plan),
        "tokens_per_step": plan.step_tokens, "flops_per_token": flops_per_token(plan),
        "bubble": bubble(plan) if plan.training else 0.0,
        "speed": {"mfu": mfu, "chip": plan.chip._asdict(), "tokens_per_second": tokens_per_second(plan, mfu)},
        "limit_bytes": plan.limit_gb * GB,
        "stages": [{**vars(memory), "total": memory.total} for memory in stages(plan)],
        "rank": {"rank": rank, "stage": cost.stage, "layers": cost.layers, "sent_bytes": cost.sent,
                 "by_purpose": cost.sent_by("purpose"), "by_axis": cost.sent_by("axis"),
                 "traffic": [{**item._asdict(), "link": link_of(plan, item.axis)} for item in cost.traffic]},
        "hccl": {"communicators": hccl.communicators(plan, rank), "buffer_mb": hccl.buffer_mb(),
                 "bytes": hccl.buffer_bytes(plan, rank, hccl.buffer_mb()), "recommended_mb": hccl.recommended_mb(plan),
                 "spare_bytes": hccl.spare_bytes(plan)},
        "checkpoint": {"disk_gb_per_second": checkpoints.DISK_GB_PER_SECOND,
                       "bytes": checkpoints.saved_bytes(plan, rank),
                       "weight_bytes": checkpoints.weight_bytes(plan, rank),
                       "save_seconds": checkpoints.disk_seconds(plan),
                       "load_seconds": checkpoints.disk_seconds(plan, weights_only=True)},
        "notes": find_notes(plan) + memory_notes(plan, stages(plan)) + hccl.notes(plan, rank),
    }


def draw(plan: Plan, path: Path) -> None:
    """A PNG: memory of a card per pipeline stage as stacked bars, with the limit. Raises ImportError."""
    memories = stages(plan)
    bottom = [0.0] * plan.pp
    with drawing((max(6.5, 3.0 + 0.55 * plan.pp), 4.2), {}) as (figure, _):
        axes = figure.subplots()
        for key, name in _PARTS:
            heights = [getattr(memory, key) / GB for memory in memories]
            if any(heights):
                axes.bar(range(plan.pp), heights, bottom=bottom, width=0.7, label=name.replace("*", " (estimated)"))
                bottom = [low + height for low, height in zip(bottom, heights)]
        axes.axhline(plan.limit_gb, color="black", linestyle="--", linewidth=1, label=f"limit {plan.limit_gb:g} GB")
        axes.set_xticks(range(plan.pp))
        axes.set_xlabel("pipeline stage")
        axes.set_ylabel("GB per card")
        axes.set_title(headline(plan).splitlines()[1], fontsize=9)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        save(figure, path)


def compared(cost: Cost, compiled: JsonObject) -> List[List[object]]:
    """Arithmetic compared with the compiled graph, rows of (what, arithmetic, compiled, difference in percent)."""
    communication, memory = compiled["communication"], compiled["memory"]
    rows: List[List[object]] = []

    def add(what: str, mine: float, theirs: float) -> None:
        apart: Optional[float] = 100 * (mine - theirs) / theirs if theirs else None
        rows.append([what, mine / 1e6, theirs / 1e6, "-" if apart is None else f"{apart:+.1f} %"])

    for key in ("parameters", "optimizer", "remainder", "gradients", "kv_cache"):
        theirs = memory.get(key, {}).get("bytes", 0)
        if theirs or getattr(cost.memory, key):
            add(f"memory: {key}", getattr(cost.memory, key), theirs)
    if "step" in compiled.get("name", "step"):
        mine = cost.sent_by("purpose")
        for purpose in sorted(mine.keys() | communication["by_purpose"].keys()):
            add(f"sent for {purpose}", mine.get(purpose, 0), communication["by_purpose"].get(purpose, 0))
        add("total sent", cost.sent, communication["bytes"])
    return rows
