"""PyTorch's .bin files: the one place of the conversion that needs torch.

Loaded with weights_only=True (no code runs from the file) and memory-mapped. Pages of the map that were read are given
back at once, because they count as resident memory of the process.
"""
import ctypes
import math
import mmap
from pathlib import Path
from typing import Any, Dict, Sequence

import numpy as np

from research.telechat.checkpoint.reader import DAMAGED, Checkpoint, TensorInfo
from research.telechat.common.errors import CheckpointError
from research.telechat.common.files import JsonObject

_MADV_DONTNEED = 4


def import_torch() -> Any:
    """The module torch; CheckpointError names the extra that brings it."""
    try:
        import torch
    except ImportError as err:
        raise CheckpointError(f".bin files need PyTorch, which cannot be imported ({err}); install the extra: "
                              "pip install 'telechat-mindspore[torch]', or: pip install torch; safetensors need none"
                              ) from err
    return torch


class _BinCheckpoint(Checkpoint):
    """A checkpoint whose bytes come from tensors of torch."""

    def __init__(self, files: Sequence[Path]) -> None:
        super().__init__(files)
        self._bytes: Dict[str, np.ndarray] = {}
        self._mapped: Dict[str, bool] = {}
        self._madvise = getattr(ctypes.CDLL(None), "madvise", None) if hasattr(mmap, "MADV_DONTNEED") else None

    def add_tensor(self, name: str, tensor: Any, path: Path, mapped: bool) -> None:
        torch = import_torch()
        code = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}.get(tensor.dtype, str(tensor.dtype))
        mapped = mapped and tensor.is_contiguous()                       # a strided view is copied, once, here
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        self.add(name, TensorInfo(code, tuple(tensor.shape), data.nbytes, path), [])
        self._bytes[name], self._mapped[name] = data, mapped

    def read_into(self, name: str, start: int, view: memoryview) -> None:
        part = self._bytes[name][start:start + view.nbytes]
        if part.nbytes != view.nbytes:
            raise CheckpointError(f"{self.tensors[name].file}: tensor {name} ends {view.nbytes - part.nbytes} bytes "
                                  f"early; {DAMAGED}")
        np.copyto(np.frombuffer(view, np.uint8), part)
        if self._madvise is not None and self._mapped[name]:
            self._give_back(part)

    def _give_back(self, part: np.ndarray) -> None:
        """Drop the whole pages of a mapped range; never called for memory that is not a map of a file, which this
        would erase."""
        page = mmap.PAGESIZE
        begin = math.ceil(part.ctypes.data / page) * page
        end = (part.ctypes.data + part.nbytes) // page * page
        if end > begin and self._madvise is not None:
            self._madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_DONTNEED)

    def close(self) -> None:
        self._bytes.clear()
        super().close()


def open_bin(paths: Sequence[Path]) -> Checkpoint:
    """A checkpoint of one or more .bin files."""
    torch = import_torch()
    checkpoint = _BinCheckpoint(paths)
    for path in paths:
        state, mapped = _load(torch, path)
        if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise CheckpointError(f"{path} holds {type(state).__name__}, not a dictionary of tensors; give the weights "
                                  "themselves, as official checkpoints hold them")
        for name, tensor in state.items():
            checkpoint.add_tensor(str(name), tensor, path, mapped)
        if not mapped:
            checkpoint.notes.append(f"{path.name} has the format of PyTorch before 1.6, which cannot be mapped: it is "
                                    "held in memory as a whole")
    return checkpoint


def _load(torch: Any, path: Path) -> Any:
    """(contents, whether they are mapped)."""
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped), zipped
    except Exception as err:                              # torch raises many types for files that are not its own
        reason = " ".join(str(err).split())[:200] or type(err).__name__
        raise CheckpointError(f"{path} cannot be read as a PyTorch .bin of weights: {reason}; it is damaged, or holds "
                              "more than tensors: copy or download it again") from err


def save_bin(path: Path, buffers: Dict[str, np.ndarray], codes: Dict[str, str], shapes: JsonObject) -> None:
    """Write one .bin file. buffers: name -> its bytes (uint8, writable, 1-d)."""
    torch = import_torch()
    dtypes = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
    state: JsonObject = {name: torch.from_numpy(data).view(dtypes[codes[name]]).reshape(shapes[name])
                             for name, data in buffers.items()}
    torch.save(state, path)
