"""PyTorch's .bin files that checkpoint/plain_bin.py does not read. The only module of the conversion that needs torch.

Loaded with weights_only=True (no code runs from the file) and memory-mapped. Pages of the map that were read are given
back at once, because they count as resident memory of the process.
"""
import ctypes
import math
import mmap
import re
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Dict, Iterator, List, Sequence, Tuple

import numpy as np

from research.telechat.checkpoint.foreign import or_else
from research.telechat.checkpoint.reader import DAMAGED, Checkpoint, TensorInfo
from research.telechat.common.errors import CheckpointError
from research.telechat.common.files import JsonObject
from research.telechat.spec.parameters import summarise

if TYPE_CHECKING:
    from torch import Tensor

_MADV_DONTNEED = 4
_USUAL_NAMES = ("state_dict", "model_state_dict", "model", "module", "weights", "params", "net", "network")
_NO_WEIGHTS = ("optimizer", "optimizer_state_dict", "optimizer_states", "optim", "lr_scheduler", "lr_schedulers",
               "scheduler", "scaler", "rng_state", "callbacks", "hyper_parameters", "args", "loops")
_DEEPEST = 3                                 # dictionaries in dictionaries that are looked into
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
_GLOBAL = re.compile(r"(?:GLOBAL|[Cc]lass|instance of) (?:<class ')?([A-Za-z_][\w.]*\.\w+)")


def import_torch() -> ModuleType:
    """The module torch; CheckpointError names the extra that brings it."""
    try:
        import torch
    except ImportError as err:
        raise CheckpointError(f".bin files need PyTorch, which cannot be imported ({err}); install the extra: "
                              "pip install 'telechat-mindspore[torch]', or: pip install torch; safetensors need none"
                              ) from err
    module: ModuleType = torch
    return module


class _BinCheckpoint(Checkpoint):
    """A checkpoint whose bytes come from tensors of torch."""

    def __init__(self, files: Sequence[Path]) -> None:
        super().__init__(files)
        self._bytes: Dict[str, np.ndarray] = {}
        self._mapped: Dict[str, bool] = {}
        self._madvise = getattr(ctypes.CDLL(None), "madvise", None) if hasattr(mmap, "MADV_DONTNEED") else None

    def add_tensor(self, name: str, tensor: "Tensor", path: Path, mapped: bool) -> None:
        torch = import_torch()
        code = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}.get(tensor.dtype, str(tensor.dtype))
        mapped = mapped and tensor.is_contiguous()                       # a strided view is copied, once, here
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        self.add(name, TensorInfo(code, tuple(tensor.shape), data.nbytes, path), [])
        self._bytes[name], self._mapped[name] = data, mapped

    def rename(self, names: Dict[str, str]) -> None:
        super().rename(names)
        self._bytes = {names[name]: data for name, data in self._bytes.items()}
        self._mapped = {names[name]: mapped for name, mapped in self._mapped.items()}

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
        content, mapped = _load(torch, path)
        state, notes = _weights_in(torch, content, path)
        checkpoint.notes.extend(notes)
        for name, tensor in state.items():
            checkpoint.add_tensor(name, tensor, path, mapped)
        if not mapped:
            checkpoint.notes.append(f"{path.name} has the format of PyTorch before 1.6, which cannot be mapped: it is "
                                    "read into memory completely")
    return checkpoint


def _weights_in(torch: ModuleType, content: object, path: Path) -> Tuple[JsonObject, List[str]]:
    """(the dictionary of tensors in a .bin's content, lines for the user). Raises CheckpointError.

    It may be among other things (`{"state_dict": ..., "epoch": 3}`), or have entries that are no tensors.
    """
    found = list(_dictionaries(torch, content, ()))
    if not found:
        raise CheckpointError(f"{path} holds {_described(torch, content)}, not a dictionary of tensors; save the "
                              "weights themselves, as official checkpoints hold them: torch.save(model.state_dict(), "
                              "file)")
    if len(found) > 1:
        usual = [one for one in found if one[0][-1:] and one[0][-1] in _USUAL_NAMES]
        if len(usual) != 1:
            places = ", ".join(f"{_place(at)} with {count} tensors" for at, _, count in found)
            raise CheckpointError(f"{path} holds several dictionaries of tensors ({places}); save only the "
                                  "model's weights")
        found = usual
    at, state, _ = found[0]
    notes = []
    others = [str(name) for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if others:
        notes.append(f"{path.name}: dropped, not tensors: {summarise(others)}")
    if at and isinstance(content, dict):
        beside = [str(name) for name in content if name != at[0]]
        notes.append(f"{path.name}: the weights are in {_place(at)}"
                     + (f"; left out: {summarise(beside)}" if beside else ""))
    return {str(name): value for name, value in state.items() if isinstance(value, torch.Tensor)}, notes


def _dictionaries(torch: ModuleType, content: object, at: Tuple[str, ...]
                  ) -> Iterator[Tuple[Tuple[str, ...], JsonObject, int]]:
    """(where, dictionary, number of tensors) of all dictionaries from names to tensors in `content`."""
    if not isinstance(content, dict):
        return
    tensors = sum(isinstance(value, torch.Tensor) and isinstance(name, str) for name, value in content.items())
    dictionaries = {name: value for name, value in content.items() if isinstance(value, dict)}
    if tensors and tensors >= len(dictionaries):
        yield at, content, tensors
    elif len(at) < _DEEPEST:
        for name, value in dictionaries.items():
            if isinstance(name, str) and name not in _NO_WEIGHTS:
                yield from _dictionaries(torch, value, (*at, name))


def _place(at: Tuple[str, ...]) -> str:
    return "".join(f"[{name!r}]" for name in at) or "the file itself"


def _described(torch: ModuleType, content: object) -> str:
    """What a .bin's content is, in a few words."""
    if isinstance(content, torch.Tensor):
        return f"one tensor of shape {list(content.shape)}"
    if isinstance(content, dict):
        return f"a dictionary of {summarise([f'{name} ({type(value).__name__})' for name, value in content.items()])}"
    return f"an object of type {type(content).__name__}"


def _load(torch: ModuleType, path: Path) -> Tuple[object, bool]:
    """(contents, whether they are mapped)."""
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped), zipped
    except Exception as err:                              # torch raises many types for files that are not its own
        text = " ".join(_ESCAPES.sub("", str(err)).split())
        kind = _GLOBAL.search(text)
        if kind:
            raise CheckpointError(f"{path} holds an object of {kind[1]}, which is not loaded because it could run code "
                                  "from the file; load it where you trust it and save only the weights: "
                                  "torch.save(model.state_dict(), file)") from err
        reason = or_else(path, f"{text[:200] or type(err).__name__}; it is damaged or contains more than tensors: copy "
                               "or download it again")
        raise CheckpointError(f"{path} cannot be read as a PyTorch .bin of weights: {reason}") from err


def save_bin(path: Path, buffers: Dict[str, np.ndarray], codes: Dict[str, str], shapes: JsonObject) -> None:
    """Write one .bin file. buffers: name -> its bytes (uint8, writable, 1-d)."""
    torch = import_torch()
    dtypes = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
    state: JsonObject = {name: torch.from_numpy(data).view(dtypes[codes[name]]).reshape(shapes[name])
                             for name, data in buffers.items()}
    torch.save(state, path)
