"""Memory of HCCL, the library that cards communicate by, and how to size it. Pure Python.

Every communicator takes two buffers, one to send and one to receive, of HCCL_BUFFSIZE MB each (200 where the
environment does not say; the reference of CANN's environment variables). They are not part of what MindSpore manages:
they are in the card's memory outside context.max_device_memory.
"""
import math
import os
from typing import List, Mapping, Optional

from research.telechat.common.errors import ConfigError
from research.telechat.plan.cost import cost_of
from research.telechat.plan.plan import BYTES, Plan

DEFAULT_MB = 200
MB = 2 ** 20
WORLD = "world"
SUBSTANTIAL = 0.25                     # of the memory outside max_device_memory; above it a size is recommended


def buffer_mb(environment: Optional[Mapping[str, str]] = None) -> int:
    """MB of one buffer, from the environment (os.environ). Raises ConfigError if it is no whole number from 1 on."""
    found = (os.environ if environment is None else environment).get("HCCL_BUFFSIZE", "").strip()
    if not found:
        return DEFAULT_MB
    if not found.isdigit() or int(found) < 1:
        raise ConfigError(f"HCCL_BUFFSIZE is {found!r} in the environment: expected a whole number of MB, at least 1; "
                          f"set it to {DEFAULT_MB}, or unset it")
    return int(found)


def communicators(plan: Plan, rank: int) -> List[str]:
    """The communicators of a rank: that of all ranks, and one for each set of axes that it sends over.

    A set is dp, cp, mp, pp or a combination such as dp+cp. One that all ranks lie on needs no communicator of its own.
    """
    if plan.ranks == 1:
        return []
    degrees = {"dp": plan.dp, "cp": plan.cp, "mp": plan.mp, "pp": plan.pp}
    axes = sorted({item.axis for item in cost_of(plan, rank).traffic if item.bytes})
    return [WORLD, *(axis for axis in axes if math.prod(degrees[name] for name in axis.split("+")) < plan.ranks)]


def buffer_bytes(plan: Plan, rank: int, size_mb: int) -> int:
    """Bytes of all buffers of a rank, of `size_mb` MB each."""
    return 2 * len(communicators(plan, rank)) * size_mb * MB


def recommended_mb(plan: Plan) -> int:
    """What CANN recommends for language models, in MB: sequences of a micro-batch * tokens * hidden size * bytes of the
    type that travels, rounded up. With context parallelism a card has its part of the tokens."""
    size = plan.tokens * plan.model.hidden_size * BYTES[plan.model.compute_dtype]
    return math.ceil(size / MB)


def spare_bytes(plan: Plan) -> float:
    """Bytes of a card outside context.max_device_memory."""
    return max(0.0, plan.chip.memory_gb - plan.limit_gb) * 1e9


def lines(plan: Plan, rank: int) -> List[str]:
    """What the buffers take, and a better size where that is much of what there is. Raises ConfigError."""
    size, names = buffer_mb(), communicators(plan, rank)
    if not names or plan.device != "Ascend":
        return []
    taken, spare, advised = buffer_bytes(plan, rank, size), spare_bytes(plan), recommended_mb(plan)
    count = f"{len(names)} communicator{'s' if len(names) > 1 else ''} ({', '.join(names)})"
    text = (f"HCCL buffers: {count} x 2 x {size} MB = {taken / 1e9:.1f} GB, of the "
            f"{spare / 1e9:.1f} GB that max_device_memory leaves free of a card's {plan.chip.memory_gb:g}")
    if taken > SUBSTANTIAL * spare and advised < size:
        text += f"; HCCL_BUFFSIZE={advised} is recommended: {buffer_bytes(plan, rank, advised) / 1e9:.1f} GB"
    return [text]


def notes(plan: Plan, rank: int) -> List[str]:
    """A line if the buffers do not fit outside context.max_device_memory. Raises ConfigError."""
    size, advised = buffer_mb(), recommended_mb(plan)
    taken, spare = buffer_bytes(plan, rank, size), spare_bytes(plan)
    if plan.device != "Ascend" or taken <= spare:
        return []
    other = f", or HCCL_BUFFSIZE to {advised}" if advised < size else ""
    return [f"HCCL's buffers take {taken / 1e9:.1f} GB, but context.max_device_memory ({plan.limit_gb:g} GB) leaves "
            f"{spare / 1e9:.1f} GB of the card for them: set it to at most "
            f"{math.floor(plan.chip.memory_gb - taken / 1e9)}GB{other}"]


__all__ = ["buffer_bytes", "buffer_mb", "communicators", "lines", "notes", "recommended_mb", "spare_bytes"]
