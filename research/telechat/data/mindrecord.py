"""Writes one MindRecord file of int32 columns, without importing MindSpore where that is possible.

All of MindSpore takes seconds to import, but its MindRecord writer is an extension module of its own, which loads in
milliseconds. It is used directly with the releases whose files were compared, byte for byte, with those of
`mindspore.mindrecord.FileWriter`, which writes for all others. data/writer.py decides what a data set consists of.

MindRecord stores each integer of a row in as few bytes as it needs. The extension module takes as long for that as for
everything else in a file five times over, so that here NumPy does it, for many rows at once: the module is made to
write rows of bytes, and the head of the file then says what they are.
"""
import importlib.util
import json
import os
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, Dict, List, Mapping, Optional, Sequence, Union

import numpy as np

from research.telechat.common.errors import ConfigError
from research.telechat.common.versions import installed_version, release

_EXTENSION = "mindspore._c_mindrecord"
_COMPARED = ((2, 9),)                        # releases of MindSpore
_DESCRIPTION = "telechat"                    # of the schema
Columns = Mapping[str, np.ndarray]           # name to the int32 arrays of some rows [rows, length]
Schema = Dict[str, Dict[str, Any]]
_NUMBER_BYTES = 8                            # of the number of bytes of the head, little-endian, at its beginning
_IN_A_BYTE = 4                               # widths of integers, of two bits each


class _DirectWriter:
    """The extension module's writer, called as FileWriter calls it. Methods raise RuntimeError."""

    def __init__(self, extension: ModuleType, path: str, schema: Schema) -> None:
        self._extension, self._path = extension, path
        self._header, self._writer = extension.ShardHeader(), extension.ShardWriter()
        self._schema = schema
        self._opened = False
        self._head_bytes = self._saved = 0

    def set_sizes(self, page: int, header: int) -> None:
        self._check("sizes of pages and header", self._writer.set_page_size(page))
        self._check("sizes of pages and header", self._writer.set_header_size(header))
        self._head_bytes = header
        schema = self._extension.Schema.build(_DESCRIPTION, {name: {"type": "bytes"} for name in self._schema})
        if self._header.add_schema(schema) < 0:
            raise RuntimeError("MindRecord refused the schema")
        self._columns = schema.get_blob_fields()         # in MindRecord's order

    def _open(self) -> None:
        if not self._opened:
            self._check("opening", self._writer.open([self._path], False, True))
            self._check("the header", self._writer.set_shard_header(self._header))
            self._opened = True

    def write(self, columns: Columns) -> None:
        self._open()
        rows = packed_rows([columns[name] for name in self._columns])
        self._saved += sum(array.nbytes for array in columns.values()) - sum(map(len, rows))
        if len(self._columns) > 1:
            self._saved += len(rows) * len(self._columns) * _NUMBER_BYTES
        self._check("writing", self._writer.write_raw_data({}, rows, True, False))

    def commit(self) -> None:
        self._open()
        self._check("completing", self._writer.commit())
        self._describe()
        index = self._extension.ShardIndexGenerator(os.path.realpath(self._path), False)
        self._check("the index", index.build())
        self._check("the index", index.write_to_db())

    def _describe(self) -> None:
        """Say in the head of the file that its rows are packed integers."""
        try:
            with open(self._path, "r+b") as file:
                size = int.from_bytes(file.read(_NUMBER_BYTES), "little")
                head = json.loads(file.read(size))
                head["schema"][0]["schema"] = {name: dict(sorted(self._schema[name].items()))
                                               for name in sorted(self._schema)}
                head["compression_size"] = max(self._saved, 0)
                content = json.dumps(head, separators=(",", ":")).encode()
                if _NUMBER_BYTES + len(content) > self._head_bytes:
                    raise RuntimeError("MindRecord's header is too small for the pages of the file")
                file.seek(0)
                file.write(len(content).to_bytes(_NUMBER_BYTES, "little") + content)
        except OSError as err:
            raise RuntimeError(f"MindRecord's header: {err.strerror or err}") from err

    def _check(self, what: str, status: object) -> None:
        if status != self._extension.MSRStatus.SUCCESS:
            raise RuntimeError(f"MindRecord reports that {what} failed")


def packed_rows(columns: Sequence[np.ndarray]) -> List[bytes]:
    """Rows of int32 columns [rows, length each] as MindRecord stores them.

    Of each column: the number of integers in 4 bytes, big-endian; the width of each integer in two bits, the first in
    the highest ones; and each integer in 1, 2 or 4 bytes, little-endian. If there are several columns, each has its
    number of bytes in front, in 8 bytes, big-endian.
    """
    packed = [_packed(column) for column in columns]
    if len(packed) == 1:
        return packed[0]
    return [b"".join([part for content in row for part in (len(content).to_bytes(_NUMBER_BYTES, "big"), content)])
            for row in zip(*packed)]


def _packed(values: np.ndarray) -> List[bytes]:
    rows, length = values.shape
    values = np.ascontiguousarray(values, "<i4")
    kept = np.empty((rows, length, 4), bool)             # which bytes of each integer are stored
    kept[..., 0] = True
    kept[..., 1] = values != values.astype(np.int8)
    kept[..., 2] = kept[..., 3] = values != values.astype(np.int16)
    widths = np.zeros((rows, -(-length // _IN_A_BYTE) * _IN_A_BYTE), np.uint8)
    widths[:, :length] = kept[..., 1].view(np.uint8) + kept[..., 2].view(np.uint8)
    heads = widths[:, 0::4] << 6 | widths[:, 1::4] << 4 | widths[:, 2::4] << 2 | widths[:, 3::4]
    places = np.flatnonzero(kept)                        # faster than to index by `kept`
    numbers = values.view(np.uint8).reshape(-1).take(places).tobytes()
    ends = np.searchsorted(places, np.arange(1, rows + 1) * (4 * length)).tolist()
    count = length.to_bytes(4, "big")
    return [count + head.tobytes() + numbers[start:end] for head, start, end in zip(heads, [0, *ends], ends)]


class _PublicWriter:
    """mindspore.mindrecord.FileWriter. Methods raise RuntimeError."""

    def __init__(self, path: str, schema: Schema) -> None:
        try:
            from mindspore.mindrecord import FileWriter
        except ImportError as err:
            raise ConfigError(f"MindSpore, which writes the data set, cannot be imported: {err}; activate the "
                              "environment that has it") from err
        self._schema, self._writer = schema, FileWriter(path, 1, overwrite=True)

    def set_sizes(self, page: int, header: int) -> None:
        self._writer.set_page_size(page)
        self._writer.set_header_size(header)
        self._writer.add_schema(self._schema, _DESCRIPTION)

    def write(self, columns: Columns) -> None:
        self._writer.write_raw_data([dict(zip(columns, arrays)) for arrays in zip(*columns.values())])

    def commit(self) -> None:
        self._writer.commit()


RecordWriter = Union[_DirectWriter, _PublicWriter]


def open_writer(path: Path, columns: Sequence[str], page: int, header: int) -> RecordWriter:
    """A writer of `path` with the methods write(columns) and commit(), which raise RuntimeError.

    Args:
        path: is replaced; its index will be `path`.db.
        columns: names; each holds one-dimensional int32 arrays.
        page, header: bytes of a page and of the header.

    Raises:
        ConfigError: MindSpore cannot be imported.
        RuntimeError: MindRecord refuses the sizes.
    """
    schema = {name: {"type": "int32", "shape": [-1]} for name in columns}
    extension = direct_extension()
    writer = _PublicWriter(str(path), schema) if extension is None else _DirectWriter(extension, str(path), schema)
    writer.set_sizes(page, header)
    return writer


def direct_extension() -> Optional[ModuleType]:
    """MindSpore's extension module of MindRecord; None where FileWriter has to be used."""
    if not _compared():
        return None
    if _EXTENSION in sys.modules:
        return sys.modules[_EXTENSION]
    os.environ.setdefault("GLOG_v", "4")         # its errors are raised as exceptions anyway
    package = importlib.util.find_spec("mindspore")
    places = list(package.submodule_search_locations or ()) if package else []
    spec = PathFinder.find_spec(_EXTENSION, places)
    if spec is None or spec.loader is None:
        return None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError:                          # a library that MindSpore loads first; FileWriter reports the rest
        return None
    return module


def _compared() -> bool:
    return release(installed_version("mindspore") or "") in _COMPARED
