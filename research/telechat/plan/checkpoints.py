"""Cost of saving and loading checkpoints of a plan: bytes on disk and in host memory. Pure Python."""
import dataclasses
import math
from typing import List

from research.telechat.plan.cost import CARDS_PER_MACHINE, memory_of
from research.telechat.plan.plan import Plan, stage_of

DISK_GB_PER_SECOND = 2.0               # an assumption: what the cards of one machine write or read together


def weight_bytes(plan: Plan, rank: int) -> int:
    """Bytes of the parameters that a rank holds: its shard of a checkpoint of weights."""
    return memory_of(plan, stage_of(plan, rank)).parameters


def saved_bytes(plan: Plan, rank: int, once: bool = False) -> int:
    """Bytes of the checkpoint that a rank writes: what it holds of parameters, optimizer state and remainders.

    once: what several ranks hold alike is written by one of them (`remove_redundancy`); the rank's mean share then.
    """
    if once:
        plan = dataclasses.replace(plan, optimizer_sharded=True, threshold=0)
    memory = memory_of(plan, stage_of(plan, rank))
    return memory.parameters + memory.optimizer + memory.remainder


def disk_seconds(plan: Plan, weights_only: bool = False) -> float:
    """Seconds in which the machine with most to do writes its part of a checkpoint, or reads it, at DISK_GB_PER_SECOND.

    Sharded as the plan. weights_only: without optimizer state and remainders, as when training begins.
    """
    size, alike = weight_bytes if weights_only else saved_bytes, plan.ranks // plan.pp
    each = [held for stage in range(plan.pp) for held in [size(plan, stage * alike)] * alike]
    machines = [sum(each[first:first + CARDS_PER_MACHINE]) for first in range(0, plan.ranks, CARDS_PER_MACHINE)]
    return max(machines) / 1e9 / DISK_GB_PER_SECOND


def lines(plan: Plan) -> List[str]:
    """Size and time of checkpoints, in one line."""
    assumed = f"at {DISK_GB_PER_SECOND:g} GB/s per machine (assumed)"
    stages = range(0, plan.ranks, plan.ranks // plan.pp)                # a rank of each
    weights = max(weight_bytes(plan, rank) for rank in stages) / 1e9
    start = f"weights {weights:.1f} GB per rank, loaded in {disk_seconds(plan, True):.0f} s"
    if not plan.training:
        return [f"checkpoint: {start} {assumed}"]
    most = max(saved_bytes(plan, rank) for rank in stages) / 1e9
    return [f"checkpoint: {most:.1f} GB per rank, saved or resumed in {disk_seconds(plan):.0f} s; {start}; {assumed}"]


def checkpoints_at_once(keep: int, every: int, interval: int, steps: int) -> int:
    """Maximum number of checkpoints on the disk at once, including the one being written before an old one is deleted.

    Args:
        keep: how many of the last ones are kept.
        every: those whose step is a multiple stay for good; 0: none.
        interval: steps between two.
        steps: of the whole training, whose last step is saved too; 0: not known.
    """
    most = keep + 1
    if not steps:
        return most
    if every:
        most += steps // math.lcm(every, interval)
    return min(most, -(-steps // interval))
