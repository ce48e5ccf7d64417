"""Which checkpoint to resume from, and which to delete: decisions from names and headers of files, without MindSpore.

Files are `PREFIX_rank_R-EPOCH_STEP.ckpt`, or `PREFIX_rank_R_RUN-EPOCH_STEP.ckpt` where the folder held checkpoints of
an earlier run (MindFormers' names). With sink mode "epoch" counts returns to Python; the order is the same. Loading is
MindFormers' matter, saving training/saving.py's.
"""
import math
import re
import struct
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Tuple

from research.telechat.checkpoint.reader import DAMAGED, Checkpoint, open_ckpt, open_safetensors
from research.telechat.common.errors import CheckpointError, ConfigError

_NAME = re.compile(r"(?P<prefix>.+?)_rank_(?P<rank>\d+)(?:_(?P<run>\d+))?(?:-(?P<kind>trainable_params|network))?"
                   r"-(?P<epoch>\d+)_(?P<step>\d+)\.(?P<suffix>ckpt|safetensors)")
_COUNTERS = ("epoch_num", "step_num")                     # what resuming needs in addition to the parameters


class Name(NamedTuple):
    """A checkpoint's file name, in parts that sort from old to new."""

    run: int
    epoch: int
    step: int
    prefix: str
    suffix: str
    kind: str = ""                                        # "trainable_params", "network"; "": with optimizer state

    def file(self, rank: int) -> str:
        """The name of `rank`'s file."""
        kind = f"-{self.kind}" if self.kind else ""
        return f"{self.stem(rank)}{kind}-{self.epoch}_{self.step}.{self.suffix}"

    def stem(self, rank: int) -> str:
        """What all files of the run begin with, `telechat_rank_0`."""
        return f"{self.prefix}_rank_{rank}" + (f"_{self.run}" if self.run else "")


class Choice(NamedTuple):
    """What to resume from (None: nothing complete is there) and lines for the log, one for each rejected file."""

    name: Optional[Name]
    step: int                                             # global step of the checkpoint
    notes: List[str]


def parse(file_name: str) -> Optional[Tuple[Name, int]]:
    """(name, rank) of a checkpoint file; None for other files."""
    match = _NAME.fullmatch(file_name)
    if not match:
        return None
    return Name(int(match["run"] or 0), int(match["epoch"]), int(match["step"]), match["prefix"],
                match["suffix"], match["kind"] or ""), int(match["rank"])


def checkpoints(folder: Path, rank: int) -> List[Name]:
    """The checkpoints of `rank` in its folder, from old to new."""
    if not folder.is_dir():
        return []
    parsed = (parse(entry.name) for entry in folder.iterdir() if entry.is_file())
    return sorted(found[0] for found in parsed if found and found[1] == rank)


def fault_of(path: Path) -> Optional[str]:
    """Why `path` cannot be resumed from; None if it is complete. Reads headers only."""
    try:
        step_of(path)
    except (CheckpointError, OSError) as err:
        return str(err)
    return None


def step_of(path: Path) -> int:
    """The global step of a complete training checkpoint. Raises CheckpointError or OSError."""
    checkpoint = open_ckpt(path) if path.suffix == ".ckpt" else open_safetensors([path])
    try:
        missing = [name for name in _COUNTERS if name not in checkpoint.tensors]
        if missing:
            raise CheckpointError(f"{path} has no {' and no '.join(missing)}; it is not a training checkpoint: to "
                                  f"start from its weights, omit --resume_training")
        return int(_scalar(checkpoint, "step_num"))
    finally:
        checkpoint.close()


def sequences_of(path: Path) -> Optional[int]:
    """Sequences of one step of the training that saved a checkpoint; None where it does not say. Raises CheckpointError
    or OSError."""
    checkpoint = open_ckpt(path) if path.suffix == ".ckpt" else open_safetensors([path])
    try:
        if "global_batch_size" not in checkpoint.tensors:
            return None
        return int(_scalar(checkpoint, "global_batch_size")) or None
    finally:
        checkpoint.close()


def _scalar(checkpoint: Checkpoint, name: str) -> float:
    info = checkpoint.tensors[name]
    formats = {"Int32": "<i", "Int64": "<q", "I32": "<i", "I64": "<q", "F32": "<f", "Float64": "<d", "F64": "<d"}
    code = formats.get(info.dtype)
    if code is None or info.nbytes != struct.calcsize(code):
        raise CheckpointError(f"{info.file}: {name} is not a number, but has type {info.dtype} and {info.nbytes} "
                              f"bytes; {DAMAGED}")
    data = bytearray(info.nbytes)
    checkpoint.read_into(name, 0, memoryview(data))
    value = float(struct.unpack(code, data)[0])
    if not math.isfinite(value):
        raise CheckpointError(f"{info.file}: {name} is {value}; {DAMAGED}")
    return value


def choose(root: Path, ranks: int) -> Choice:
    """The newest checkpoint below `root` (folders rank_0 to rank_{ranks - 1}) that is complete on every rank.

    ConfigError where checkpoints are there, but folders of ranks are missing, as happens without a shared file system.
    """
    found: Dict[int, List[Name]] = {
        rank: [name for name in checkpoints(root / f"rank_{rank}", rank) if not name.kind] for rank in range(ranks)}
    absent = [rank for rank in range(ranks) if not (root / f"rank_{rank}").is_dir()]
    present = [names for rank, names in found.items() if rank not in absent]
    if absent and present and min(map(len, present)) > 1:
        raise ConfigError(f"resume_training: {root} has no folder rank_{absent[0]}, but checkpoints of other ranks; "
                          f"resuming needs the files of all {ranks} ranks in one place (shared storage). To "
                          f"start over, pass another --output_dir or --resume_training False")
    notes = []
    for name in sorted(set().union(*found.values()), reverse=True):
        without = [rank for rank in range(ranks) if name not in found[rank]]
        if without:
            notes.append(f"{name.file(0)}: skipped: rank {without[0]} has not saved it")
            continue
        faults = [fault for rank in range(ranks) for fault in [fault_of(root / f"rank_{rank}" / name.file(rank))]
                  if fault]
        if faults:
            notes.append(f"{name.file(0)}: skipped: {faults[0]}")
            continue
        return Choice(name, step_of(root / "rank_0" / name.file(0)), notes)
    return Choice(None, 0, notes)


def outdated(names: List[Name], keep: int, every: int, steps_per_epoch: int) -> List[Name]:
    """Which of one run's checkpoints to delete: all but the last `keep` and, if `every` > 0, each whose global step is
    a multiple of `every`. `keep` 0 keeps all."""
    if keep <= 0:
        return []

    def step(name: Name) -> int:
        return (name.epoch - 1) * steps_per_epoch + name.step
    return [name for name in sorted(names)[:-keep] if every <= 0 or step(name) % every]
