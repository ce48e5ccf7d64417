"""Each collective over all ranks, on numbers small enough to be summed exactly in every type."""
from functools import partial
from typing import Callable, Dict, List, Sequence, Tuple

import numpy as np

from research.telechat.doctor.checks import Check, Outcome, gap
from research.telechat.doctor.device import Array, Device

_ROWS, _COLUMNS = 4, 64                      # of each rank, rows per rank


def content(rank: int, ranks: int) -> Array:
    """The input of a rank: [4 * ranks, 64], integers from 0 to 7."""
    return np.random.default_rng(100 + rank).integers(0, 8, (_ROWS * ranks, _COLUMNS)).astype(np.float32)


def _blocks(rank: int, every: Sequence[Array]) -> Array:
    """all-to-all: this rank's rows of every rank, concatenated."""
    return np.concatenate([np.split(one, len(every))[rank] for one in every], 1)


def _passed(rank: int, every: Sequence[Array]) -> Array:
    return every[rank - 1] if rank % 2 else every[rank]


_PARALLEL = "parallel_config."
EXPECTED: Dict[str, Tuple[Callable[[int, Sequence[Array]], Array], str]] = {
    "all-reduce, sum": (lambda rank, every: np.sum(every, 0),
                        f"{_PARALLEL}data_parallel and model_parallel over 1"),
    "all-reduce, largest": (lambda rank, every: np.max(every, 0), f"{_PARALLEL}model_parallel over 1"),
    "all-gather": (lambda rank, every: np.concatenate(every),
                   f"parallel.enable_parallel_optimizer, {_PARALLEL}use_seq_parallel and context_parallel"),
    "reduce-scatter": (lambda rank, every: np.split(np.sum(every, 0), len(every))[rank],
                       f"parallel.enable_parallel_optimizer and {_PARALLEL}use_seq_parallel"),
    "broadcast": (lambda rank, every: every[-1], f"{_PARALLEL}data_parallel over 1"),
    "all-to-all": (_blocks, f"{_PARALLEL}context_parallel_algo: ulysses_cp"),
    "send and receive": (_passed, f"{_PARALLEL}pipeline_stage over 1"),
}


def _collective(device: Device, name: str, dtype: str) -> Outcome:
    every = [content(rank, device.ranks) for rank in range(device.ranks)]
    found = device.collective(name, dtype, every[device.rank])
    worst = gap(found, EXPECTED[name][0](device.rank, every))
    return Outcome("the sum or the pieces of all ranks, exactly", "equal" if worst == 0 else f"differs by {worst:.1e}",
                   worst == 0)


def checks(dtypes: Sequence[str]) -> List[Check]:
    """All of them, in float32 too, the type in which gradients are communicated."""
    return [Check(f"collective, {name} ({dtype})", partial(_collective, name=name, dtype=dtype), avoid,
                  cards=2)
        for dtype in dict.fromkeys(("float32", dtypes[0])) for name, (_, avoid) in EXPECTED.items()]
