"""Writing checkpoints piece by piece: layouts of safetensors and .ckpt files, shards, partial files, resume journal.

The place of every byte is known before the first is written, so that any thread can write any part of any tensor.
Everything is written to `<name>.partial` next to its final place and renamed when all of it is complete and on disk; a
journal records the progress, so that an interrupted run can resume. checkpoint/convert.py decides what is written.
"""
import contextlib
import hashlib
import json
import math
import os
import shutil
import threading
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from research.telechat.checkpoint.dtypes import ITEM_SIZE
from research.telechat.checkpoint.manifest import (
    FileEntry,
    Manifest,
    announced,
    manifest_path,
    with_files,
    write_manifest,
)
from research.telechat.common.errors import CheckpointError
from research.telechat.common.files import JsonObject, write_text
from research.telechat.common.hashing import FollowingHash

SLICE = 512 << 20                        # bytes of a tensor in one message of a .ckpt, as save_checkpoint splits
_CKPT_TYPES = {"F16": "Float16", "BF16": "BFloat16", "F32": "Float32"}


class OutTensor(NamedTuple):
    """A tensor of the result; dtype is a safetensors code."""

    name: str
    dtype: str
    shape: Tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * ITEM_SIZE[self.dtype]


class Layout(NamedTuple):
    """Layout of one file of the result. `places`: name -> runs (offset in the file, length), in order."""

    path: Path
    kind: str                                        # "safetensors", "ckpt" or "bin"
    tensors: List[OutTensor]
    size: int                                        # bytes of the file; for .bin those of the tensors
    literals: List[Tuple[int, bytes]]                # headers: offset, bytes
    places: Dict[str, List[Tuple[int, int]]]


def safetensors_layout(path: Path, tensors: Sequence[OutTensor], metadata: Dict[str, str]) -> Layout:
    """Layout of a safetensors file. Wider types come first, so that every tensor is aligned; the header names them in
    the order of their offsets, which MindSpore's reader demands."""
    ordered = sorted(tensors, key=lambda tensor: -ITEM_SIZE[tensor.dtype])
    header: JsonObject = {"__metadata__": metadata}
    position = 0
    for tensor in ordered:
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape),
                               "data_offsets": [position, position + tensor.nbytes]}
        position += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    places = {name: [(base + entry["data_offsets"][0], entry["data_offsets"][1] - entry["data_offsets"][0])]
              for name, entry in header.items() if name != "__metadata__"}
    return Layout(path, "safetensors", ordered, base + position, [(0, len(text).to_bytes(8, "little") + text)], places)


def ckpt_layout(path: Path, tensors: Sequence[OutTensor]) -> Layout:
    """Layout of a MindSpore .ckpt file: protobuf messages Checkpoint with one value each, contents split into
    slices."""
    literals, places, position = [], {}, 0
    for tensor in tensors:
        name, dtype = tensor.name.encode(), _CKPT_TYPES[tensor.dtype].encode()
        fields = b"".join(b"\x08" + _varint(size) for size in tensor.shape) + b"\x12" + _varint(len(dtype)) + dtype
        runs = []
        for start in range(0, tensor.nbytes, SLICE):
            length = min(SLICE, tensor.nbytes - start)
            proto = fields + b"\x1a" + _varint(length)                               # TensorProto, but for the contents
            value = b"\x0a" + _varint(len(name)) + name + b"\x12" + _varint(len(proto) + length) + proto
            head = b"\x0a" + _varint(len(value) + length) + value
            literals.append((position, head))
            runs.append((position + len(head), length))
            position += len(head) + length
        places[tensor.name] = runs
    return Layout(path, "ckpt", list(tensors), position, literals, places)


def _varint(value: int) -> bytes:
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)


def bin_layout(path: Path, tensors: Sequence[OutTensor]) -> Layout:
    """Layout of a .bin file, which torch writes: only its tensors are known."""
    return Layout(path, "bin", list(tensors), sum(tensor.nbytes for tensor in tensors), [], {})


def cut_shards(tensors: Sequence[OutTensor], limit: int) -> List[List[OutTensor]]:
    """Tensors in order, as few files as possible without exceeding `limit` bytes (a larger tensor has its own)."""
    shards: List[List[OutTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def partial_path(path: Path) -> Path:
    """Path of a file until it is complete."""
    return path.with_name(path.name + ".partial")


class OutputFile:
    """A file of the result while it is written. `done` tensors of it are kept from an interrupted run.

    Its SHA-256 is computed behind the writing (common/hashing.py).
    """

    def __init__(self, layout: Layout, done: int) -> None:
        self.layout = layout
        self._hash: Optional[FollowingHash] = None
        self._buffers: Dict[str, np.ndarray] = {}
        self._descriptor = -1
        self._lock = threading.Lock()
        if layout.kind == "bin":
            if not done:
                self._buffers = {tensor.name: np.empty(tensor.nbytes, np.uint8) for tensor in layout.tensors}
            return
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0) | (0 if done else os.O_TRUNC)
        self._descriptor = os.open(partial_path(layout.path), flags, 0o666)
        os.ftruncate(self._descriptor, layout.size)
        self._hash = FollowingHash(partial_path(layout.path), layout.size)
        for offset, data in layout.literals:
            if done:
                self._hash.written(offset, len(data))
            else:
                self._pwrite(offset, memoryview(data))
        for tensor in layout.tensors[:done]:
            for offset, length in layout.places[tensor.name]:
                self._hash.written(offset, length)

    def write(self, name: str, start: int, view: memoryview) -> None:
        """Write bytes of a tensor from byte `start` of it on. Thread-safe."""
        if self._buffers:
            self._buffers[name][start:start + view.nbytes] = np.frombuffer(view, np.uint8)
            return
        for offset, length in self.layout.places[name]:
            if not view.nbytes:
                return
            if start < length:
                count = min(length - start, view.nbytes)
                self._pwrite(offset + start, view[:count])
                view, start = view[count:], 0
            else:
                start -= length

    def _pwrite(self, offset: int, view: memoryview) -> None:
        first, size = offset, view.nbytes
        while view.nbytes:
            if hasattr(os, "pwrite"):
                count = os.pwrite(self._descriptor, view, offset)
            else:
                with self._lock:
                    os.lseek(self._descriptor, offset, os.SEEK_SET)
                    count = os.write(self._descriptor, view)
            offset, view = offset + count, view[count:]
        if self._hash is not None:
            self._hash.written(first, size)

    def sync(self) -> None:
        """Wait until what was written is on disk."""
        if self._descriptor >= 0:
            os.fsync(self._descriptor)

    def finish(self) -> None:
        """All tensors are written: sync the file to disk and close it."""
        if self._buffers:
            from research.telechat.checkpoint.torch_bin import save_bin
            tensors = self.layout.tensors
            save_bin(partial_path(self.layout.path), self._buffers, {tensor.name: tensor.dtype for tensor in tensors},
                     {tensor.name: tensor.shape for tensor in tensors})
            self._buffers = {}
            partial = partial_path(self.layout.path)
            self._descriptor = os.open(partial, os.O_RDWR | getattr(os, "O_BINARY", 0))
            self._hash = FollowingHash(partial, partial.stat().st_size)
            self._hash.written(0, partial.stat().st_size)
        self.sync()
        os.close(self._descriptor)
        self._descriptor = -1

    def entry(self) -> FileEntry:
        """Size and SHA-256 of the finished file, for the manifest; waits for the rest of the hash. Raises OSError."""
        if self._hash is None:
            raise ValueError(f"{self.layout.path} is not finished")
        return FileEntry(self._hash.size, self._hash.result())

    def close(self) -> None:
        """Close the file, which will not be completed now."""
        if self._hash is not None:
            self._hash.stop()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class Journal:
    """Progress of a conversion: for every file of the result the number of its tensors that are on disk, and what was
    `found` in them (any JSON object).

    It belongs to one plan (a digest of inputs and options); a run with another plan starts over.
    """

    def __init__(self, path: Path, digest: str, layouts: Sequence[Layout]) -> None:
        self.path, self._digest = path, digest
        self._lock = threading.Lock()
        self.done: Dict[str, int] = {layout.path.name: 0 for layout in layouts}
        self.found: JsonObject = {}
        self.publishing = False                  # an earlier run was giving the complete files their names
        old = self._read()
        if old.get("plan") == digest:
            self.found = old["found"]
            self.publishing = bool(old.get("publishing"))
            for layout in layouts:
                partial = partial_path(layout.path)
                if partial.is_file() and (layout.kind == "bin" or partial.stat().st_size == layout.size):
                    self.done[layout.path.name] = min(old["done"].get(layout.path.name, 0), len(layout.tensors))
        else:
            for name in old.get("done", {}):
                if Path(name).name == name:
                    remove(partial_path(path.with_name(name)))

    def _read(self) -> JsonObject:
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        sound = (isinstance(data, dict) and isinstance(data.get("done"), dict) and isinstance(data.get("found"), dict)
                 and all(isinstance(count, int) for count in data["done"].values()))
        return data if sound else {}

    def record(self, name: str, tensors: int, found: JsonObject) -> None:
        """`tensors` tensors of the file `name` are on disk."""
        with self._lock:
            self.done[name] = max(tensors, self.done[name])
            self.found = found
            self._save()

    def publish(self) -> None:
        """All files are complete and get their names now: what has one of them is ours, even where this is the last
        word of the run."""
        self.publishing = True
        with self._lock:
            self._save()

    def _save(self) -> None:
        write_text(self.path, json.dumps({"plan": self._digest, "done": self.done, "found": self.found,
                                          "publishing": self.publishing}))

    def remove(self) -> None:
        """The conversion is complete."""
        remove(self.path)


def publish(layouts: Sequence[Layout]) -> None:
    """Give complete files their names."""
    for layout in layouts:
        os.replace(partial_path(layout.path), layout.path)


@contextlib.contextmanager
def new_file(path: Path, tensors: Sequence[OutTensor], metadata: Dict[str, str], manifest: Optional[Manifest] = None,
             place: Optional[Path] = None, texts: Optional[Dict[Path, str]] = None) -> Iterator[OutputFile]:
    """A checkpoint to write into, .ckpt or .safetensors; it gets its name when the block ends, and is gone if it fails.

    manifest: what is written with it, but for the files; None: nothing. place: where; None: as a single file's.
    texts: small files that belong to it, path to content.

    Raises CheckpointError: another suffix, or no room for it.
    """
    if path.suffix not in (".ckpt", ".safetensors"):
        raise CheckpointError(f"{path} must end in .ckpt or .safetensors; rename the result")
    layout = ckpt_layout(path, tensors) if path.suffix == ".ckpt" else safetensors_layout(path, tensors, metadata)
    check_free_space(path.parent, layout.size, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = OutputFile(layout, 0)
    try:
        yield file
        file.finish()
        entries = {path.name: file.entry()}
        for text_path, text in (texts or {}).items():
            entries[text_path.name] = FileEntry(len(text.encode()), hashlib.sha256(text.encode()).hexdigest())
        place = place or manifest_path(path, False)
        if manifest is not None:
            write_manifest(announced(place), with_files(manifest, entries))
        publish([layout])
        for text_path, text in (texts or {}).items():
            write_text(text_path, text)
        if manifest is not None:
            os.replace(announced(place), place)
    except BaseException:
        file.close()
        remove(partial_path(path))
        raise


def remove(path: Path) -> None:
    """Delete a file if it is there."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()


def index_text(layouts: Sequence[Layout]) -> str:
    """The index of a sharded checkpoint, as transformers and MindSpore read it."""
    weight_map = {tensor.name: layout.path.name for layout in layouts for tensor in layout.tensors}
    total = sum(tensor.nbytes for layout in layouts for tensor in layout.tensors)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"


def check_free_space(folder: Path, needed: int, kept: int) -> None:
    """CheckpointError if `folder`, which need not exist, cannot take `needed` bytes, of which `kept` are there."""
    existing = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    if needed - kept > free:
        raise CheckpointError(f"{folder} has {free / 1e9:.2f} GB free, the result needs {(needed - kept) / 1e9:.2f} "
                              "GB; free some space or write elsewhere")
