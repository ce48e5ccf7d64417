"""What saving and loading checkpoints of a plan take: bytes on disk and in the host's memory. Pure Python."""
import dataclasses
import math

from research.telechat.plan.cost import memory_of
from research.telechat.plan.plan import Plan, stage_of


def weight_bytes(plan: Plan, rank: int) -> int:
    """Bytes of the parameters that a rank holds: its slice of a checkpoint of weights."""
    return memory_of(plan, stage_of(plan, rank)).parameters


def saved_bytes(plan: Plan, rank: int, once: bool = False) -> int:
    """Bytes of the checkpoint that a rank writes: what it holds of parameters, optimizer state and remainders.

    once: what several ranks hold alike is written by one of them (`remove_redundancy`); the rank's mean share then.
    """
    if once:
        plan = dataclasses.replace(plan, optimizer_sharded=True, threshold=0)
    memory = memory_of(plan, stage_of(plan, rank))
    return memory.parameters + memory.optimizer + memory.remainder


def checkpoints_at_once(keep: int, every: int, interval: int, steps: int) -> int:
    """Checkpoints that lie on the disk together at most, with the one that is being written before an old one goes.

    Args:
        keep: the last so many stay.
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
