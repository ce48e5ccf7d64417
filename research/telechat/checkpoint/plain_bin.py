"""PyTorch's .bin files of weights alone, read without torch, whose import takes seconds.

torch.save writes a zip archive without compression: a pickle that names each tensor's storage, and the storages.
Nothing is unpickled: the standard library's disassembler lists the pickle's instructions, and the few that a state_dict
consists of are followed here. They can name three constructors and the storages' types, and call nothing else. Any
other instruction or name, views, the formats before 1.6, and damaged files are left to torch (checkpoint/torch_bin.py).

Source: torch.serialization and torch._utils of PyTorch; the instructions of pickle: pickletools.
"""
import math
import os
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import BinaryIO, Dict, List, NamedTuple, Optional, Sequence, Tuple

from research.telechat.checkpoint.dtypes import ITEM_SIZE
from research.telechat.checkpoint.reader import Checkpoint, Extent, TensorInfo

_STORAGES = {"torch HalfStorage": "F16", "torch BFloat16Storage": "BF16", "torch FloatStorage": "F32"}
_DICT, _TENSOR, _PARAMETER = ("collections OrderedDict", "torch._utils _rebuild_tensor_v2",
                              "torch._utils _rebuild_parameter")
_LONGEST_PICKLE = 64 << 20                   # bytes
_LOCAL_HEADER = struct.Struct("<4s22xHH")    # signature, length of the name, of the extra field
_Place = Tuple[int, int]                     # offset in the file, length
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_GIVEN = {"BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1"}      # whose argument is their value


class _OtherContentError(Exception):
    """Not a plain file of weights."""


class _Storage(NamedTuple):
    code: str                # type of its elements
    key: str                 # its entry in the archive


class _Tensor(NamedTuple):
    storage: _Storage
    start: int               # elements
    shape: Tuple[int, ...]


class _Global(NamedTuple):
    name: str                # "module name"


_MARK = _Global("mark")


def _tensor_of(storage: object, start: object, shape: object, strides: object, *_: object) -> _Tensor:
    if not (isinstance(storage, _Storage) and isinstance(start, int) and isinstance(shape, tuple)
            and isinstance(strides, tuple)
            and all(isinstance(number, int) and number >= 0 for number in (start, *shape, *strides))):
        raise _OtherContentError("an unknown tensor")
    contiguous, count = [], 1
    for size in reversed(shape):
        contiguous.append(count)
        count *= size
    if any(size != 1 and stride != step for size, stride, step in zip(shape, strides, reversed(contiguous))):
        raise _OtherContentError("a view")
    return _Tensor(storage, start, shape)


def _storage_of(saved: object) -> _Storage:
    if not (isinstance(saved, tuple) and len(saved) == 5 and saved[0] == "storage" and isinstance(saved[1], _Global)
            and isinstance(saved[2], str)):
        raise _OtherContentError("an unknown storage")
    return _Storage(_STORAGES[saved[1].name], saved[2])


def _called(function: object, arguments: object) -> object:
    """What one of the three constructors makes of its arguments."""
    if not isinstance(arguments, tuple) or not isinstance(function, _Global):
        raise _OtherContentError("an unknown call")
    if function.name == _DICT and not arguments:
        return {}
    if function.name == _TENSOR:
        return _tensor_of(*arguments)
    if function.name == _PARAMETER and arguments and isinstance(arguments[0], _Tensor):
        return arguments[0]
    raise _OtherContentError(function.name)


def _since_mark(stack: List[object]) -> List[object]:
    """Take what lies above the topmost mark off the stack, and the mark."""
    place = max(index for index, value in enumerate(stack) if value is _MARK)
    taken = stack[place + 1:]
    del stack[place:]
    return taken


def _content(pickled: bytes) -> object:
    """What a pickle describes, of dicts, text, numbers, tuples and tensors. Raises many exceptions for others."""
    stack: List[object] = []
    memo: Dict[object, object] = {}
    for instruction, argument, _ in pickletools.genops(pickled):
        name = instruction.name
        if name in _GIVEN:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "GLOBAL":
            stack.append(_Global(str(argument)))
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "EMPTY_TUPLE":
            stack.append(())
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif name == "TUPLE":
            stack.append(tuple(_since_mark(stack)))
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "BINPERSID":
            stack.append(_storage_of(stack.pop()))
        elif name == "REDUCE":
            arguments = stack.pop()
            stack.append(_called(stack.pop(), arguments))
        elif name in ("SETITEM", "SETITEMS"):
            items = [stack.pop(-2), stack.pop()] if name == "SETITEM" else _since_mark(stack)
            target = stack[-1]
            if not isinstance(target, dict):
                raise _OtherContentError("items of what is no dict")
            target.update(zip(items[::2], items[1::2]))
        elif name == "BUILD":
            stack.pop()                      # _metadata of modules: versions, which say nothing of weights
        elif name not in ("PROTO", "STOP"):
            raise _OtherContentError(name)
    (result,) = stack
    return result


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
        content = _content(archive.read(pickled[0]))
        if not isinstance(content, dict) or not content:
            raise _OtherContentError("not a state_dict")
        found: Dict[str, Tuple[TensorInfo, Extent]] = {}
        storages: Dict[str, _Place] = {}
        for name, tensor in content.items():
            if not isinstance(name, str) or not isinstance(tensor, _Tensor):
                raise _OtherContentError("not only tensors")
            code, key = tensor.storage
            if key not in storages:
                storages[key] = _place(file, archive.getinfo(f"{base}data/{key}"), size)
            begin, length = storages[key]
            item = ITEM_SIZE[code]
            nbytes = math.prod(tensor.shape) * item
            if tensor.start * item + nbytes > length:
                raise _OtherContentError("a tensor beyond its storage")
            found[name] = (TensorInfo(code, tensor.shape, nbytes, path),
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
