"""A checkpoint sharded for several cards by MindSpore, and merged again."""
import contextlib
import io
import tempfile
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple

import numpy as np

from research.telechat.checkpoint.slices import Side, open_ranks, read_whole
from research.telechat.checkpoint.strategy import Layout, newest_files, read_strategy, write_strategy
from research.telechat.doctor.checks import Check, Outcome, gap
from research.telechat.doctor.device import Array, Device


class Transform(NamedTuple):
    """save: arrays as a complete MindSpore checkpoint; cut: shard it from one folder into another by a strategy; merge:
    back, by that strategy."""

    save: Callable[[Dict[str, Array], Path], object]
    cut: Callable[[Path, Path, Path], object]
    merge: Callable[[Path, Path, Path], object]


# Four cards, 2 x data and 2 x model parallel: split by rows, by columns, by the optimizer, and replicated.
LAYOUTS = {"model.layers.0.attention.wq.weight": Layout((2, 2), ((0,), ()), 0, (0,)),
           "model.layers.0.attention.wo.weight": Layout((2, 2), ((), (0,)), 0, (0,)),
           "model.layers.0.feed_forward.w1.weight": Layout((2, 2), ((0,), ()), -1, (0,)),
           "model.norm_out.weight": Layout((2, 2), ((),), 0, (0,))}


def values() -> Dict[str, Array]:
    """The complete checkpoint."""
    rng = np.random.default_rng(9)
    return {name: rng.normal(size=(16, 8)[:len(layout.tensor_map)]).astype(np.float32)
            for name, layout in LAYOUTS.items()}


def _round_trip(transform: Transform) -> Outcome:
    whole = values()
    with tempfile.TemporaryDirectory(prefix="telechat-doctor-") as name, contextlib.redirect_stdout(
            io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        folder = Path(name)
        strategy, source, cut, merged = (folder / part for part in ("strategy.ckpt", "whole", "cut", "merged"))
        source.mkdir()
        write_strategy(strategy, LAYOUTS)
        transform.save(whole, source / "doctor_rank_0-1_1.ckpt")
        transform.cut(source, cut, strategy)
        files = newest_files(cut)
        side, opened = Side(read_strategy(strategy), files), open_ranks(files)
        pieces = max(gap(read_whole(side, opened, one).view(np.float32), value) for one, value in whole.items())
        parts = [opened[rank].tensors["model.layers.0.attention.wq.weight"].shape for rank in opened]
        for checkpoint in opened.values():
            checkpoint.close()
        transform.merge(cut, merged, strategy)
        files = newest_files(merged)
        opened = open_ranks(files)
        again = max(gap(read_whole(Side(None, files), opened, one).view(np.float32), value)
                    for one, value in whole.items())
        for checkpoint in opened.values():
            checkpoint.close()
    fine = pieces == again == 0 and parts == [(8, 8)] * 4
    return Outcome("4 shards of half the rows, exactly; merged, the original",
                   f"{len(parts)} shards of {parts[0]}, off by {pieces:.1e}; merged off by {again:.1e}", fine)


def checks(transform: Transform) -> List[Check]:
    """The round trip."""
    def run(_device: Device) -> Outcome:
        return _round_trip(transform)
    return [Check("checkpoint, sharded and merged", run, "telechat transform, auto_trans_ckpt: True")]
