"""The float32 values of a checkpoint whose 16-bit parameters have remainders (training/remainder.py). No MindSpore.

Conversion reads a checkpoint through `with_masters` and finds float32 parameters. What a resumed run makes
of a checkpoint in another precision says `precision_note`.
"""
from pathlib import Path
from typing import Dict, Optional

import numpy as np

from research.telechat.checkpoint.dtypes import ITEM_SIZE, NAMES, RAW, cast
from research.telechat.checkpoint.reader import Checkpoint, open_ckpt, open_safetensors
from research.telechat.spec.precision import REMAINDER_PREFIX, REMAINDER_SCALE

_F32 = ITEM_SIZE["F32"]


class Masters(Checkpoint):
    """A checkpoint in which each parameter with a remainder is float32, and the remainders are not seen."""

    def __init__(self, under: Checkpoint, dtypes: Dict[str, str]) -> None:
        """dtypes: the parameters that have a remainder in `under`, with their stored type."""
        super().__init__(under.files)
        self._under, self._dtypes = under, dtypes
        self.metadata, self.notes = under.metadata, under.notes
        remainders = {REMAINDER_PREFIX + name for name in dtypes}
        for name, info in under.tensors.items():
            if name in dtypes:
                info = info._replace(dtype="F32", nbytes=info.nbytes // ITEM_SIZE[info.dtype] * _F32)
            if name not in remainders:
                self.tensors[name] = info

    def read_into(self, name: str, start: int, view: memoryview) -> None:
        """As Checkpoint.read_into; of float32 values whole ones: `start` and the view are multiples of 4."""
        dtype = self._dtypes.get(name)
        if dtype is None:
            self._under.read_into(name, start, view)
            return
        first, count = start // _F32, view.nbytes // _F32
        stored: np.ndarray = np.empty(count, RAW[dtype])
        remainder = np.empty(count, np.float16)
        for key, values in ((name, stored), (REMAINDER_PREFIX + name, remainder)):
            self._under.read_into(key, first * values.itemsize, memoryview(values).cast("B"))
        masters = np.frombuffer(view, np.float32)
        np.multiply(remainder.astype(np.float32), np.float32(1 / REMAINDER_SCALE), out=masters)
        masters += cast(stored, dtype, "F32").view(np.float32)

    def close(self) -> None:
        """Close the files."""
        self._under.close()


def with_masters(checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint`, its parameters joined with their remainders where it has any."""
    tensors = checkpoint.tensors
    dtypes = {}
    for name, info in tensors.items():
        remainder = tensors.get(REMAINDER_PREFIX + name)
        if remainder and remainder.dtype == "F16" and remainder.shape == info.shape and info.dtype in ("F16", "BF16"):
            dtypes[name] = info.dtype
    if not dtypes:
        return checkpoint
    stored = " and ".join(sorted({NAMES[code] for code in dtypes.values()}))
    checkpoint.notes.append(f"{len(dtypes)} parameters are stored as {stored} plus a remainder: their float32 values "
                            "are used")
    return Masters(checkpoint, dtypes)


def precision_note(path: Path, dtype: str, remainder: bool) -> Optional[str]:
    """What a run with parameters of `dtype`, with remainders or without, makes of the training checkpoint `path`: a
    line without full stop where its precision is another one, else None. Raises CheckpointError."""
    checkpoint = open_ckpt(path) if path.suffix == ".ckpt" else open_safetensors([path])
    try:
        matrices = {name: info.dtype for name, info in checkpoint.tensors.items()
                    if name.startswith("model.") and len(info.shape) == 2 and info.dtype in NAMES}
        kept = any(name.startswith(REMAINDER_PREFIX) for name in checkpoint.tensors)
    finally:
        checkpoint.close()
    others = sorted({NAMES[code] for code in matrices.values()} - {dtype})
    if not matrices or (not others and kept == remainder):
        return None
    found = (f"{path} has parameters in {' and '.join(others or [dtype])} {'with' if kept else 'without'} remainders, "
             f"this run in {dtype} {'with' if remainder else 'without'}: ")
    if kept and not remainder:
        return found + "the remainders are dropped, and training continues from the rounded parameters"
    taken = "the parameters are used as they are" if dtype == "float32" or not others else (
        "the parameters are rounded once")
    return found + taken + (", remainders start at zero" if remainder and not kept else "")
