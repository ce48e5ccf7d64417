"""Writes a data set of MindRecord files, all or nothing.

Everything is written into a hidden folder next to the result and moved into place at the end, meta.json last.
Where data/mindrecord.py needs all of MindSpore, whose import takes seconds, a thread imports it while the first records
are being produced.
"""
import contextlib
import os
import re
import shutil
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Callable, Dict, List, Optional, Tuple

import numpy as np

from research.telechat.common.errors import ConfigError
from research.telechat.common.files import JsonObject, refuse_foreign, set_usual_permissions
from research.telechat.common.hashing import file_sha256
from research.telechat.common.lock import output_lock
from research.telechat.common.versions import install_line, installed_version
from research.telechat.data.meta import META_FILE, OLD_META_FILE, REPORT_FILE, UNFINISHED, is_part, reason, write_meta
from research.telechat.data.mindrecord import RecordWriter, direct_extension, open_writer

DATASET_NAME = "new_dataset.mindrecord"
EXTRA_FILES = ("lengths.png",)
_RECORDS = re.compile(r"new_dataset(_\d+)?\.mindrecord(\.db)?")
_BATCH_BYTES = 1 << 19                       # of records passed to MindRecord at once; affects the file layout
_HELD_BYTES = 32 << 20                       # buffered until the size of a small data set is known
_PAGE = (1 << 15, 1 << 22)                   # minimum and usual size of a MindRecord page
_MOST_PAGE, _MOST_HEADER = 256 << 20, 128 << 20              # MindRecord's limits
_ENTRY = 256                                 # header bytes per page and batch, a generous estimate


class DatasetWriter:
    """Writes records of int32 columns as `new_dataset.mindrecord`, `new_dataset_1.mindrecord`, ... in `folder`.

    Use it as a context manager: without `finish`, everything it wrote is removed.
    """

    def __init__(self, folder: Path, columns: Dict[str, int], file_bytes: int = 2 << 30, overwrite: bool = False):
        """
        Args:
            folder: target folder; created if missing.
            columns: name and length of each column.
            file_bytes: bytes of tokens after which a new file is started.
            overwrite: replace conflicting files that are not part of such a data set; otherwise they are an error.
        """
        self.folder = Path(folder)
        self.columns = dict(columns)
        self.records = 0
        self.max_id = 0
        self._record_bytes = 4 * sum(columns.values())
        self._batch = max(_BATCH_BYTES // self._record_bytes, 1)
        self._file_records = max(file_bytes // self._record_bytes // self._batch, 1) * self._batch
        if self._record_bytes > _MOST_PAGE // 2:
            raise ConfigError(f"records of {self._record_bytes} bytes exceed MindRecord's limit "
                              f"({_MOST_PAGE // 2}); choose a smaller length")
        self._held: List[Dict[str, np.ndarray]] = []
        self._writer: Optional[RecordWriter] = None
        self._layout: Optional[Tuple[int, int]] = None
        self._names: List[str] = []
        self._import: Optional[threading.Thread] = None
        self._temporary = self.folder / f"{UNFINISHED}{os.getpid()}"
        self._overwrite = overwrite
        self._lock = contextlib.ExitStack()
        self._hashes: Dict[str, Future[str]] = {}
        self._hasher = ThreadPoolExecutor(1)             # SHA-256 of a file while the next one is written

    def __enter__(self) -> "DatasetWriter":
        if installed_version("mindspore") is None:         # fail now rather than at the first write
            raise ConfigError(f"mindspore, which writes the data set, is not installed in {sys.executable}; activate "
                              f"the environment that has it, or {install_line()}")
        try:
            self._lock.enter_context(output_lock(self.folder, folder=True))
            refuse_foreign(self._in_the_way(), is_part, self._overwrite)
            for left in self.folder.glob(f"{UNFINISHED}*"):
                if not _alive(left.name[len(UNFINISHED):]):
                    shutil.rmtree(left, ignore_errors=True)          # left by a killed run
            self._temporary.mkdir()
        except OSError as err:
            self._lock.close()
            raise ConfigError(f"output folder {self.folder} cannot be written: {err.strerror or err}; name another "
                              "--output_path, or change its permissions") from err
        except ConfigError:
            self._lock.close()
            raise
        return self

    def _in_the_way(self) -> List[Path]:
        """Files that `finish` will replace or delete, by name."""
        return [path for path in self.folder.iterdir() if path.name in (META_FILE, REPORT_FILE, *EXTRA_FILES)
                or _RECORDS.fullmatch(path.name)]

    def __exit__(self, *exception: object) -> None:
        self._writer = None
        if self._import is not None:
            self._import.join()                  # an interpreter that exits during an import may crash
        self._hasher.shutdown(wait=True, cancel_futures=True)
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._lock.close()

    def add(self, record: Dict[str, np.ndarray]) -> None:
        """Append one record."""
        if not self.records and direct_extension() is None:
            self._import = threading.Thread(target=_import_mindrecord, daemon=True)
            self._import.start()
        self._held.append(record)
        self.records += 1
        if self._writer is None and len(self._held) * self._record_bytes < _HELD_BYTES:
            return
        if len(self._held) >= self._batch:
            self._write_held(whole_batches=True)

    def finish(self, meta: JsonObject, extra: Optional[Dict[str, Optional[bytes]]] = None) -> List[Path]:
        """Complete the files, move the data set into place, and return the files' paths.

        Args:
            meta: goes into meta.json, together with the columns, the number of records and the sizes of the files.
            extra: other files next to them, name to content (None: no such file).
        """
        self._write_held(whole_batches=False)
        self._close_file()
        others = {name: content for name, content in (extra or {}).items() if content is not None}
        for name, content in others.items():
            (self._temporary / name).write_bytes(content)
        names = [part for name in self._names for part in (name, f"{name}.db")]
        sizes = {name: (self._temporary / name).stat().st_size for name in names}
        hashes = {name: self._hashes[name].result() for name in names}
        hashes.update({name: file_sha256(self._temporary / name) for name in others})
        write_meta(self._temporary, {**meta, "columns": list(self.columns), "records": self.records,
                                     "max_token_id": self.max_id, "files": sizes, "sha256": hashes})
        for name in names:
            set_usual_permissions(self._temporary / name)
        with contextlib.suppress(FileNotFoundError):
            os.replace(self.folder / META_FILE, self._temporary / OLD_META_FILE)
        for old in self.folder.iterdir():
            if _RECORDS.fullmatch(old.name):
                old.unlink()
        for name in [*others, *names, META_FILE]:
            os.replace(self._temporary / name, self.folder / name)
        return [self.folder / name for name in self._names]

    def _write_held(self, whole_batches: bool) -> None:
        while self._held:
            writer = self._writer or self._open_file()
            count = min(self._batch, len(self._held))
            if count < self._batch and whole_batches:
                return
            batch, self._held = self._held[:count], self._held[count:]
            columns = {name: np.stack([record[name] for record in batch]).astype(np.int32, copy=False)
                       for name in self.columns}
            self.max_id = max(self.max_id, int(columns["input_ids"].max()))
            self._call(writer.write, columns)
            self._room -= count
            if self._room <= 0:
                self._close_file()

    def _open_file(self) -> RecordWriter:
        """Start the next file; returns its writer."""
        if self._import is not None:
            self._import.join()
        stem, suffix = DATASET_NAME.split(".")
        name = f"{stem}_{len(self._names)}.{suffix}" if self._names else DATASET_NAME
        if self._layout is None:
            self._layout = self._page_and_header()
        writer = self._writer = open_writer(self._temporary / name, list(self.columns), *self._layout)
        self._names.append(name)
        self._room = self._file_records
        return writer

    def _page_and_header(self) -> Tuple[int, int]:
        """Bytes of a page and of the header, the same for all files: MindDataset rejects files that differ in them."""
        # Each page is written in full, however little it contains: small data sets get small pages.
        known = len(self._held) * self._record_bytes
        large = known >= _HELD_BYTES
        page = _power_of_two(max(_PAGE[0], self._record_bytes + 4096, _PAGE[1] if large else known // 16))
        size = self._file_records * self._record_bytes if large else known
        entries = size // page + size // (self._batch * self._record_bytes) + 16
        return page, min(_power_of_two((1 << 15) + _ENTRY * entries), _MOST_HEADER)

    def _close_file(self) -> None:
        if self._writer is not None:
            self._call(self._writer.commit)
            self._writer = None
            for name in (self._names[-1], f"{self._names[-1]}.db"):
                self._hashes[name] = self._hasher.submit(file_sha256, self._temporary / name)

    def _call(self, method: Callable[..., object], *arguments: object) -> None:
        try:
            method(*arguments)
        except RuntimeError as err:
            raise ConfigError(f"MindRecord file {self.folder / self._names[-1]} cannot be written (is the disk full?): "
                              f"{reason(err)}; free some space, or name another --output_path") from err


def _import_mindrecord() -> None:
    os.environ.setdefault("GLOG_v", "4")         # as in data/mindrecord.py
    with contextlib.suppress(ImportError):       # reported when it is needed
        import mindspore.mindrecord  # noqa: F401


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return int(pid) != os.getpid()
