"""PyTorch's .bin files of weights alone, read without torch, whose import takes seconds.

torch.save writes a zip archive without compression: a pickle that names each tensor's storage, and the storages. The
pickle is read here with nothing but the few names that a state_dict needs, so that no code runs from the file. Anything
else - other objects, views, the formats before 1.6, damaged files - is left to torch (checkpoint/torch_bin.py).

Source: torch.serialization and torch._utils of PyTorch.
"""
import math
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import BinaryIO, Dict, List, NamedTuple, Optional, Sequence, Tuple

from research.telechat.checkpoint.dtypes import ITEM_SIZE
from research.telechat.checkpoint.reader import Checkpoint, Extent, TensorInfo

_STORAGES = {"HalfStorage": "F16", "BFloat16Storage": "BF16", "FloatStorage": "F32"}
_LONGEST_PICKLE = 64 << 20                   # bytes
_LOCAL_HEADER = struct.Struct("<4s22xHH")    # signature, length of the name, of the extra field
_Place = Tuple[int, int]                     # offset in the file, length


class _OtherContentError(Exception):
    """Not a plain file of weights."""


class _Tensor(NamedTuple):
    code: str
    storage: str
    start: int               # elements
    shape: Tuple[int, ...]


def _rebuild_tensor(storage: Tuple[str, str], start: int, shape: Tuple[int, ...], strides: Tuple[int, ...],
                    *_: object) -> _Tensor:
    expected, count = [], 1
    for size in reversed(shape):
        expected.append(count)
        count *= size
    if any(size != 1 and stride != contiguous for size, stride, contiguous in zip(shape, strides, reversed(expected))):
        raise _OtherContentError("a view")
    return _Tensor(*storage, start, tuple(shape))


def _rebuild_parameter(data: _Tensor, *_: object) -> _Tensor:
    return data


class _Unpickler(pickle.Unpickler):
    """Knows what a state_dict is made of, and no other name."""

    def find_class(self, module: str, name: str) -> object:
        known = {("collections", "OrderedDict"): OrderedDict, ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
                 ("torch._utils", "_rebuild_parameter"): _rebuild_parameter}
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) not in known:
            raise _OtherContentError(f"{module}.{name}")
        return known[module, name]

    def persistent_load(self, saved: object) -> Tuple[str, str]:
        if not (isinstance(saved, tuple) and len(saved) == 5 and saved[0] == "storage"):
            raise _OtherContentError("an unknown storage")
        return saved[1], saved[2]


def open_plain_bin(paths: Sequence[Path]) -> Optional[Checkpoint]:
    """A checkpoint of .bin files; None where torch has to read them. Raises CheckpointError: a tensor in two files."""
    checkpoint = Checkpoint(paths)
    for number, path in enumerate(paths):
        try:
            tensors = _tensors(path)
        except Exception:                    # torch reads it, or says what is wrong with it
            return None
        for name, (info, extent) in tensors.items():
            checkpoint.add(name, info, [extent._replace(file=number)])
    return checkpoint


def _tensors(path: Path) -> Dict[str, Tuple[TensorInfo, Extent]]:
    """The tensors of one file. Raises many exceptions where it is not plain."""
    with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        size = os.fstat(file.fileno()).st_size
        pickled = [info for info in archive.infolist() if info.filename.endswith("/data.pkl")]
        if len(pickled) != 1 or pickled[0].file_size > _LONGEST_PICKLE:
            raise _OtherContentError("not one pickle")
        base = pickled[0].filename[:-len("data.pkl")]
        if f"{base}byteorder" in archive.namelist() and archive.read(f"{base}byteorder") != b"little":
            raise _OtherContentError("another byte order")
        with archive.open(pickled[0]) as stream:
            content = _Unpickler(stream).load()
        if not isinstance(content, dict) or not content:
            raise _OtherContentError("not a state_dict")
        found: Dict[str, Tuple[TensorInfo, Extent]] = {}
        storages: Dict[str, _Place] = {}
        for name, tensor in content.items():
            if not isinstance(name, str) or not isinstance(tensor, _Tensor):
                raise _OtherContentError("not only tensors")
            if tensor.storage not in storages:
                storages[tensor.storage] = _place(file, archive.getinfo(f"{base}data/{tensor.storage}"), size)
            begin, length = storages[tensor.storage]
            item = ITEM_SIZE[tensor.code]
            nbytes = math.prod(tensor.shape) * item
            if tensor.start < 0 or tensor.start * item + nbytes > length:
                raise _OtherContentError("a tensor beyond its storage")
            found[name] = (TensorInfo(tensor.code, tensor.shape, nbytes, path),
                           Extent(0, begin + tensor.start * item, nbytes))
    return found


def _place(file: BinaryIO, info: zipfile.ZipInfo, size: int) -> _Place:
    """Where the content of an entry lies in the archive."""
    file.seek(info.header_offset)
    signature, name, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    begin = info.header_offset + _LOCAL_HEADER.size + name + extra
    if (signature != b"PK\x03\x04" or info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1
            or info.compress_size != info.file_size or begin + info.file_size > size):
        raise _OtherContentError("an entry that is not stored as it is")
    return begin, info.file_size


__all__: List[str] = ["open_plain_bin"]
