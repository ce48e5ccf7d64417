"""Writes one MindRecord file of int32 columns, without importing MindSpore where that is possible.

All of MindSpore takes seconds to import, but its MindRecord writer is an extension module of its own, which loads in
milliseconds. It is used directly with the releases whose files were compared, byte for byte, with those of
`mindspore.mindrecord.FileWriter`, which writes for all others. data/writer.py decides what a data set consists of.
"""
import importlib.util
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
Records = List[Dict[str, np.ndarray]]


class _DirectWriter:
    """The extension module's writer, called as FileWriter calls it. Methods raise RuntimeError."""

    def __init__(self, extension: ModuleType, path: str, schema: Dict[str, Any]) -> None:
        self._extension, self._path = extension, path
        self._header, self._writer = extension.ShardHeader(), extension.ShardWriter()
        self._schema = schema
        self._opened = False

    def set_sizes(self, page: int, header: int) -> None:
        self._check("sizes of pages and header", self._writer.set_page_size(page))
        self._check("sizes of pages and header", self._writer.set_header_size(header))
        schema = self._extension.Schema.build(_DESCRIPTION, self._schema)
        if self._header.add_schema(schema) < 0:
            raise RuntimeError("MindRecord refused the schema")
        self._columns = schema.get_blob_fields()         # in MindRecord's order

    def _open(self) -> None:
        if not self._opened:
            self._check("opening", self._writer.open([self._path], False, True))
            self._check("the header", self._writer.set_shard_header(self._header))
            self._opened = True

    def write(self, records: Sequence[Mapping[str, np.ndarray]]) -> None:
        self._open()
        rows = [self._merged([record[column] for column in self._columns]) for record in records]
        self._check("writing", self._writer.write_raw_data({}, rows, True, False))

    @staticmethod
    def _merged(arrays: List[np.ndarray]) -> bytes:
        """A row as MindRecord stores it: of several columns each has its bytes in front, in 8 bytes, big-endian."""
        if len(arrays) == 1:
            return arrays[0].astype(np.int32, copy=False).tobytes()
        contents = [array.astype(np.int32, copy=False).tobytes() for array in arrays]
        return b"".join([part for content in contents for part in (len(content).to_bytes(8, "big"), content)])

    def commit(self) -> None:
        self._open()
        self._check("completing", self._writer.commit())
        index = self._extension.ShardIndexGenerator(os.path.realpath(self._path), False)
        self._check("the index", index.build())
        self._check("the index", index.write_to_db())

    def _check(self, what: str, status: object) -> None:
        if status != self._extension.MSRStatus.SUCCESS:
            raise RuntimeError(f"MindRecord reports that {what} failed")


class _PublicWriter:
    """mindspore.mindrecord.FileWriter. Methods raise RuntimeError."""

    def __init__(self, path: str, schema: Dict[str, Any]) -> None:
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

    def write(self, records: Records) -> None:
        self._writer.write_raw_data(records)

    def commit(self) -> None:
        self._writer.commit()


RecordWriter = Union[_DirectWriter, _PublicWriter]


def open_writer(path: Path, columns: Sequence[str], page: int, header: int) -> RecordWriter:
    """A writer of `path` with the methods write(records) and commit(), which raise RuntimeError.

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
