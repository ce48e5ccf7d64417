"""The shards of a distributed checkpoint as files: opened together, checked against their strategy, reassembled.

Which part a rank holds is the arithmetic of checkpoint/strategy.py; cutting for another plan is commands/transform.py.
No MindSpore here.
"""
import os
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Set

import numpy as np

from research.telechat.checkpoint.folder import open_files
from research.telechat.checkpoint.reader import Checkpoint
from research.telechat.checkpoint.resume import parse
from research.telechat.checkpoint.strategy import Strategy, full_shape, layout_of, newest_files, region
from research.telechat.common.errors import CheckpointError
from research.telechat.spec.parameters import summarise


class Side(NamedTuple):
    """A distributed checkpoint: its strategy (None: complete) and, where they exist, its files by rank."""

    strategy: Optional[Strategy]
    files: Dict[int, Path]

    @property
    def ranks(self) -> int:
        """Ranks of the plan."""
        return self.strategy.ranks if self.strategy else 1


def open_ranks(files: Dict[int, Path]) -> Dict[int, Checkpoint]:
    """The checkpoints of all ranks, headers read."""
    return {rank: open_files([path], path.suffix[1:]) for rank, path in files.items()}


def rank_files(path: Path, strategy: Strategy) -> Dict[int, Path]:
    """The file of every rank: the newest below the folder `path`, or those that belong to the file `path` of one rank.

    Raises CheckpointError: the file of a rank is missing.
    """
    if path.is_file():
        path = Path(os.path.abspath(path))             # of a relative one too; a link's own name is what counts
        parsed = parse(path.name)
        if parsed is None or path.parent.name != f"rank_{parsed[1]}":
            raise CheckpointError(f"{path}: the files of the other ranks cannot be derived from this name; expected "
                                  "rank_0/NAME_rank_0-EPOCH_STEP.ckpt; or pass the folder that contains rank_0 and the "
                                  "others")
        name, folder = parsed[0], path.parent.parent
        files = {rank: folder / f"rank_{rank}" / name.file(rank) for rank in range(strategy.ranks)}
    else:
        files = newest_files(path)
        known = next((parse(file.name) for file in files.values() if parse(file.name)), None)
        for rank in range(strategy.ranks):
            files.setdefault(rank, path / f"rank_{rank}" / (known[0].file(rank) if known else "*"))
    absent = sorted(rank for rank, file in files.items() if not file.is_file())
    if absent:
        more = f" (and those of {len(absent) - 1} more ranks)" if len(absent) > 1 else ""
        raise CheckpointError(f"{files[absent[0]]} does not exist{more}; the strategy has {strategy.ranks} ranks: "
                              "copy the files of all of them into one place")
    return files


def check_ranks(side: Side, option: str) -> None:
    """CheckpointError where files and ranks of the strategy differ. option: how the user names the strategy."""
    if side.strategy:
        absent = sorted(set(range(side.ranks)) - side.files.keys())
        extra = sorted(side.files.keys() - set(range(side.ranks)))
        if absent or extra:
            what = f"no folder rank_{absent[0]}" if absent else f"a folder rank_{extra[0]}"
            raise CheckpointError(f"the strategy is for {side.ranks} ranks, but there is {what} "
                                  f"({len(side.files)} folders); they belong to different runs")
    elif len(side.files) > 1:
        raise CheckpointError(f"{len(side.files)} ranks have shards, but {option} is missing; pass "
                              f"the folder output/strategy of the run that saved them")


def check_named(side: Side, opened: Dict[int, Checkpoint], names: Set[str]) -> None:
    """CheckpointError where the strategy does not say how one of `names` is sharded (scalars need not be)."""
    if side.strategy is None:
        return
    unnamed = sorted(name for name in names - side.strategy.layouts.keys()
                     if any(len(checkpoint.tensors[name].shape) > 1 or np.prod(checkpoint.tensors[name].shape) > 1
                            for checkpoint in opened.values() if name in checkpoint.tensors))
    if unnamed:
        raise CheckpointError(f"the strategy has no layout for {summarise(unnamed)}; it belongs to another "
                              f"run, or files of pipeline stages are missing")


def first_slices(side: Side, opened: Dict[int, Checkpoint], name: str) -> Dict[tuple, int]:
    """One rank for each distinct region of a parameter. Raises CheckpointError if shards contradict the strategy."""
    holders = [rank for rank, checkpoint in opened.items() if name in checkpoint.tensors]
    shape = opened[holders[0]].tensors[name].shape
    layout = layout_of(side.strategy, name, len(shape))
    whole = full_shape(layout, shape)
    stage_ranks = side.strategy.stage_ranks if side.strategy else 1
    if side.strategy and name in side.strategy.layouts:
        missing = [rank for rank in side.strategy.holders(name) if rank not in holders]
        if missing and len({rank // stage_ranks for rank in holders}) < 1 + len(missing) // stage_ranks:
            raise CheckpointError(f"{name}: rank {missing[0]} should have a shard of it, but does not "
                                  f"({len(missing)} such ranks); files and strategy belong to different runs")
    regions: Dict[tuple, int] = {}
    for rank in holders:
        found = opened[rank].tensors[name].shape
        try:
            area = region(layout, rank % stage_ranks, whole)
        except ValueError as err:
            raise CheckpointError(f"{name}: {err} (shape {list(whole)}); the strategy is for another model") from err
        if tuple(stop - start for start, stop in area) != tuple(found):
            raise CheckpointError(f"{name}: rank {rank} has shape {list(found)}, the strategy expects "
                                  f"{[stop - start for start, stop in area]}; they belong to different runs")
        regions.setdefault(area, rank)
    if sum(int(np.prod([stop - start for start, stop in area])) for area in regions) != int(np.prod(whole)):
        raise CheckpointError(f"{name}: the shards of ranks {sorted(regions.values())} do not make up the whole "
                              f"{list(whole)}; a rank's file is missing: copy it there")
    return regions


def whole_shape(regions: Dict[tuple, int]) -> tuple:
    """Shape of a parameter from the regions of its shards."""
    return tuple(max(area[axis][1] for area in regions) for axis in range(len(next(iter(regions)))))


def read_bytes(checkpoint: Checkpoint, name: str) -> np.ndarray:
    """A tensor as raw items, in its shape."""
    info = checkpoint.tensors[name]
    count = int(np.prod(info.shape)) if info.shape else 1
    item = info.nbytes // count if count else 1
    raw = np.empty(count, f"V{item}")
    checkpoint.read_into(name, 0, memoryview(raw.view(np.uint8)))
    return raw.reshape(info.shape)


def read_whole(side: Side, opened: Dict[int, Checkpoint], name: str) -> np.ndarray:
    """A parameter reassembled from its shards, as raw items."""
    regions = first_slices(side, opened, name)
    parts = {area: read_bytes(opened[rank], name) for area, rank in regions.items()}
    whole = np.empty(whole_shape(regions), next(iter(parts.values())).dtype)
    for area, part in parts.items():
        whole[tuple(slice(*span) for span in area)] = part
    return whole


def tensor_names(opened: Dict[int, Checkpoint]) -> List[str]:
    """Names of all parameters of all ranks, in their order."""
    return list(dict.fromkeys(name for checkpoint in opened.values() for name in checkpoint.tensors))
