"""Read-only access to checkpoints on disk, tensor by tensor and in byte ranges: safetensors, MindSpore .ckpt, .bin.

A checkpoint is opened by reading the headers of its files; `read_into` then reads any part of any tensor into a buffer
of the caller, from any thread, so that memory use is the caller's choice (files are not mapped: touched pages of a map
count as resident memory). Writing is checkpoint/writer.py, the meaning of names spec/parameters.py. Needs neither
MindSpore nor PyTorch. `.bin` files are read by plain_bin.py, or by torch_bin.py if they hold more than weights.

Sources: the safetensors format description; the .ckpt format is the protobuf message Checkpoint of MindSpore's
checkpoint.proto, as mindspore.save_checkpoint writes it: one message for each slice of at most 512 MB of a tensor.
"""
import json
import math
import os
import threading
from collections import Counter
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

from research.telechat.checkpoint.foreign import or_else
from research.telechat.common.errors import CheckpointError
from research.telechat.common.files import JsonObject, unique_keys
from research.telechat.common.protobuf import BYTES, VARINT, Data, FileBytes, fields, varint

INDEX_NAMES = ("model.safetensors.index.json", "param_name_map.json")     # the second is MindSpore's name for it
BIN_INDEX_NAME = "pytorch_model.bin.index.json"
DAMAGED = "it is damaged: copy or download it again"
_SAFETENSORS_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "I16": 16, "U16": 16, "F16": 16,
                     "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64}
_CKPT_CODES = {"Float16": "F16", "BFloat16": "BF16", "Float32": "F32"}
_LONGEST_TEXT = 10_000                                                    # bytes; longer is no name or type
_CRC_BYTES = 17                                                           # of a trailer: "crc_num" and ten more
_HEADER_LIMIT = 100_000_000                                               # bytes, as in the safetensors library


class Extent(NamedTuple):
    """A run of bytes of a tensor: where in its file."""

    file: int                # number in Checkpoint.files
    offset: int              # bytes
    length: int              # bytes


class TensorInfo(NamedTuple):
    """What the headers say about a tensor."""

    dtype: str               # safetensors code: F16, BF16, F32, ...; "str" and the like for what is no tensor
    shape: Tuple[int, ...]
    nbytes: int
    file: Path


class Checkpoint:
    """An open checkpoint. `tensors`: name -> TensorInfo; `files`: what it consists of; `notes`: lines for the user."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = list(files)
        self.tensors: Dict[str, TensorInfo] = {}
        self.metadata: Dict[str, str] = {}                                # of safetensors files
        self.notes: List[str] = []
        self._extents: Dict[str, List[Extent]] = {}
        self._descriptors: Dict[int, int] = {}
        self._lock = threading.Lock()

    def add(self, name: str, info: TensorInfo, extents: List[Extent]) -> None:
        """Register a tensor; CheckpointError if there is one of that name."""
        if name in self.tensors:
            raise CheckpointError(f"tensor {name} appears twice: in {self.tensors[name].file} and in {info.file}; "
                                  "remove one of the two files or repair the folder")
        self.tensors[name] = info
        self._extents[name] = extents

    def rename(self, names: Dict[str, str]) -> None:
        """Give tensors other names: {name now: name then}, all of them. CheckpointError where two would have one."""
        twice = [name for name, count in Counter(names.values()).items() if count > 1]
        if twice:
            both = " and ".join([old for old, new in names.items() if new == twice[0]][:2])
            raise CheckpointError(f"{self.files[0]}: {both} both become {twice[0]} without their wrappers' prefixes; "
                                  "save the model itself, not its wrapper")
        self.tensors = {names[name]: info for name, info in self.tensors.items()}
        self._extents = {names[name]: extents for name, extents in self._extents.items()}

    def read_into(self, name: str, start: int, view: memoryview) -> None:
        """Fill `view` (bytes, writable) with the tensor's bytes from `start` on. Thread-safe."""
        position = start
        for extent in self._extents[name]:
            if not view.nbytes:
                return
            if position < extent.length:
                count = min(extent.length - position, view.nbytes)
                self._read(extent.file, extent.offset + position, view[:count])
                view, position = view[count:], 0
            else:
                position -= extent.length
        if view.nbytes:
            raise CheckpointError(f"{self.tensors[name].file}: tensor {name} ends {view.nbytes} bytes early; {DAMAGED}")

    def close(self) -> None:
        """Close the files."""
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    def _read(self, file: int, offset: int, view: memoryview) -> None:
        with self._lock:
            descriptor = self._descriptors.get(file)
            if descriptor is None:
                descriptor = os.open(self.files[file], os.O_RDONLY | getattr(os, "O_BINARY", 0))
                self._descriptors[file] = descriptor
        while view.nbytes:
            count = self._read_some(descriptor, offset, view)
            if count <= 0:
                raise CheckpointError(f"{self.files[file]} ends at byte {offset}, before the end of its tensors; it is "
                                      "truncated: copy or download it again")
            offset, view = offset + count, view[count:]

    def _read_some(self, descriptor: int, offset: int, view: memoryview) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(descriptor, [view], offset)
        with self._lock:                                                  # systems without positioned reads
            os.lseek(descriptor, offset, os.SEEK_SET)
            data = os.read(descriptor, view.nbytes)
        view[:len(data)] = data
        return len(data)


def open_safetensors(paths: Sequence[Path]) -> Checkpoint:
    """A checkpoint of one or more safetensors files."""
    checkpoint = Checkpoint(paths)
    for number, path in enumerate(paths):
        base, header = _safetensors_header(path)
        metadata = header.pop("__metadata__", {})
        if isinstance(metadata, dict):
            checkpoint.metadata.update({str(key): str(value) for key, value in metadata.items()})
        for name, entry in header.items():
            dtype, shape, begin, end = _safetensors_entry(path, name, entry)
            size = end - begin
            checkpoint.add(name, TensorInfo(dtype, shape, size, path), [Extent(number, base + begin, size)])
        _check_safetensors_size(path, base, header)
    return checkpoint


def _safetensors_header(path: Path) -> Tuple[int, JsonObject]:
    """(offset of the data, header) of a safetensors file."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _HEADER_LIMIT):
            announced = f"it has {size} bytes, and its first 8 announce a header of {length}"
            raise CheckpointError(f"{path} is not a safetensors file, or truncated: "
                                  + or_else(path, f"{announced}; copy or download it again"))
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as err:
        raise CheckpointError(f"{path}: its safetensors header cannot be read: {or_else(path, f'{err}; {DAMAGED}')}"
                              ) from err
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: its safetensors header must be a JSON object, found {type(header).__name__}; "
                              f"{DAMAGED}")
    return 8 + length, header


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _safetensors_entry(path: Path, name: str, entry: JsonObject) -> Tuple[str, Tuple[int, ...], int, int]:
    """(dtype, shape, begin, end) of one header entry, checked against each other."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if not all(map(_is_count, (*shape, begin, end))) or end < begin:
            raise ValueError
        bits = _SAFETENSORS_BITS[dtype]
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{path}: its header describes {name!r} wrongly: {str(entry)[:200]}; expected "
                              f"dtype, shape and data_offsets; {DAMAGED}") from None
    if math.prod(shape) * bits != 8 * (end - begin):
        raise CheckpointError(f"{path}: tensor {name} of shape {list(shape)} and type {dtype} needs "
                              f"{math.prod(shape) * bits // 8} bytes, but its header assigns {end - begin}; {DAMAGED}")
    return dtype, shape, begin, end


def _check_safetensors_size(path: Path, base: int, header: JsonObject) -> None:
    """The tensors must fill the file without gap or overlap."""
    position = 0
    for begin, end in sorted(tuple(entry["data_offsets"]) for entry in header.values()):
        if begin != position:
            raise CheckpointError(f"{path}: tensors overlap or leave a gap at byte {base + position}; {DAMAGED}")
        position = end
    size = path.stat().st_size
    if size != base + position:
        raise CheckpointError(f"{path} has {size} bytes, but its header needs {base + position}; it is truncated or "
                              "damaged: copy or download it again")


class _CkptEntry(NamedTuple):
    name: str
    dtype: str
    shape: Tuple[int, ...]


def open_ckpt(path: Path) -> Checkpoint:
    """A checkpoint of one MindSpore .ckpt file."""
    checkpoint, size = Checkpoint([path]), path.stat().st_size
    pending: Optional[_CkptEntry] = None                                  # slices of a tensor follow each other
    extents: List[Extent] = []
    position = 0
    try:
        with open(path, "rb", buffering=4096) as file:
            data = FileBytes(file)
            for field, wire, begin, end in fields(data, 0, size - (0 if crc_trailer(path) is None else _CRC_BYTES)):
                position = begin
                if (field, wire) != (1, BYTES):
                    raise ValueError("no entry")
                entry, extent = _ckpt_entry(data, begin, end)
                if pending is not None and entry != pending:
                    _add_ckpt_tensor(checkpoint, path, pending, extents)
                    extents = []
                pending = entry
                extents.append(extent)
        if pending is None:
            raise ValueError("no entry")
    except (IndexError, ValueError) as err:
        reason = or_else(path, f"no valid entry after byte {position} of {size}; copy or save it again")
        raise CheckpointError(f"{path} is not a MindSpore .ckpt file, or truncated or encrypted: {reason}") from err
    _add_ckpt_tensor(checkpoint, path, pending, extents)
    return checkpoint


def crc_trailer(path: Path) -> Optional[int]:
    """The checksum that save_checkpoint(crc_check=True) appends, the CRC-32 of all bytes before its own 17; None where
    there is none. checkpoint/integrity.py verifies it."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - _CRC_BYTES))
        tail = file.read(_CRC_BYTES)
    return int.from_bytes(tail[7:], "big") if tail[:7] == b"crc_num" else None


def _ckpt_entry(data: Data, begin: int, end: int) -> Tuple[_CkptEntry, Extent]:
    """(the tensor, the position of its bytes) of a message Checkpoint.Value; ValueError, IndexError where it is
    none."""
    name, dtype, content = None, "map", (begin, begin)
    dims: List[int] = []
    for field, _, first, last in fields(data, begin, end):
        if field == 1:
            name = _text(data, first, last)
        elif field == 2:                                                  # TensorProto
            for inner, wire, left, right in fields(data, first, last):
                if inner == 1:                                            # dims, one by one or packed
                    while left < right:
                        value, left = varint(data, left)
                        dims.append(value)
                elif inner == 2:
                    dtype = _text(data, left, right)
                elif inner == 3:
                    content = (left, right)
                if wire not in (VARINT, BYTES):
                    raise ValueError("no tensor")
    if name is None:
        raise ValueError("no name")
    return _CkptEntry(name, dtype, tuple(dims)), Extent(0, content[0], content[1] - content[0])


def _text(data: Data, begin: int, end: int) -> str:
    if end - begin > _LONGEST_TEXT:
        raise ValueError("no text")
    return data[begin:end].decode("utf-8")                                # UnicodeDecodeError is a ValueError


def _add_ckpt_tensor(checkpoint: Checkpoint, path: Path, entry: _CkptEntry, extents: List[Extent]) -> None:
    name, dtype, shape = entry
    nbytes = sum(extent.length for extent in extents)
    code = _CKPT_CODES.get(dtype, dtype)
    if code != dtype:
        shape = () if shape == (0,) and nbytes else shape                 # how MindSpore writes a scalar
        expected = math.prod(shape) * _SAFETENSORS_BITS[code] // 8
        if nbytes != expected:
            raise CheckpointError(f"{path}: tensor {name} of shape {list(shape)} and type {dtype} needs {expected} "
                                  f"bytes, but the file has {nbytes}; {DAMAGED}")
    checkpoint.add(name, TensorInfo(code, shape, nbytes, path), extents)
