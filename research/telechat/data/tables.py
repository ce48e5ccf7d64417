"""Records of tables: CSV and TSV with a header line, Parquet, and Arrow as the datasets library stores it."""
import csv
import json
from pathlib import Path
from typing import Any, Callable, Iterator, List, Optional, TextIO, Tuple

from research.telechat.common.errors import ConfigError
from research.telechat.common.files import JsonObject
from research.telechat.data.formats import SIGNATURE_KEYS
from research.telechat.data.preferences import CHOSEN, LISTS, REJECTED
from research.telechat.text.literals import read_json, read_literal

COLUMNAR = (".parquet", ".arrow")
SUFFIXES = (".csv", ".tsv", *COLUMNAR)
_LISTS = (*LISTS, "history", "tools", "functions", "rejected_messages")                  # JSON in a cell
_ANSWERS = (*CHOSEN, *REJECTED, "prompt", "completion")              # JSON where it is messages, else a text
FILLED = "file with nulls inside objects: keys that only other rows have, dropped"
REPAIRED = "file with cells written as Python objects, read as JSON"
_ROWS = 256                                  # rows of a columnar file in memory


def is_columnar(path: Path, head: bytes) -> bool:
    """Whether a file is Parquet or Arrow."""
    return head[:4] == b"PAR1" or head[:6] == b"ARROW1" or path.suffix in COLUMNAR


def columnar_records(path: Path, head: bytes, done: Callable[[float], object],
                     note: Callable[[str], None] = lambda _: None) -> Iterator[Tuple[int, bytes]]:
    """(row, JSON text) of each row. `done` is called with the fraction of the file that has been read, `note` with
    messages about it.

    Objects of a column have the keys of all its rows, null where a row lacks one: null in objects is left out.

    Raises ConfigError: pyarrow is missing, or the file is damaged.
    """
    kind = "Parquet" if head[:4] == b"PAR1" or path.suffix == ".parquet" else "Arrow"
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(f"input file {path} is a {kind} file: install the package pyarrow, or save it as JSON "
                          "lines") from None
    number = 0
    filled = _Filled(note)
    try:
        if kind == "Parquet":
            with pyarrow.parquet.ParquetFile(path) as file:
                rows = max(file.metadata.num_rows, 1)
                for batch in file.iter_batches(batch_size=_ROWS):
                    done((number + batch.num_rows) / rows)
                    for row in batch.to_pylist():
                        number += 1
                        yield number, filled.row(row)
            return
        with pyarrow.memory_map(str(path)) as source:
            reader = (pyarrow.ipc.open_file(source) if head[:6] == b"ARROW1" else pyarrow.ipc.open_stream(source))
            batches = (reader.get_batch(index) for index in range(reader.num_record_batches)) if (
                head[:6] == b"ARROW1") else reader
            for index, batch in enumerate(batches, 1):
                done(index / reader.num_record_batches if head[:6] == b"ARROW1" else source.tell() / source.size())
                for start in range(0, batch.num_rows, _ROWS):
                    for row in batch.slice(start, _ROWS).to_pylist():
                        number += 1
                        yield number, filled.row(row)
    except (pyarrow.ArrowException, OSError) as err:
        reason = str(err).split("\n")[0]
        raise ConfigError(f"input file {path} is a {kind} file that cannot be read after row {number}: {reason}; "
                          "copy it again") from err


class _Filled:
    """Rows as JSON, without nulls of keys that only other rows have; notes once that it left some out."""

    def __init__(self, note: Callable[[str], None]):
        self._note, self._noted = note, False

    def row(self, row: JsonObject) -> bytes:
        cells = {name: self._without(cell) for name, cell in row.items()}
        return json.dumps(cells, ensure_ascii=False, default=str).encode("utf-8", "replace")

    def _without(self, value: object) -> object:
        if isinstance(value, list):
            return [self._without(item) for item in value]
        if not isinstance(value, dict):
            return value
        kept = {key: self._without(item) for key, item in value.items() if item is not None}
        if len(kept) < len(value) and not self._noted:
            self._note(FILLED)
            self._noted = True
        return kept


def separator(path: Path, text: str) -> Optional[str]:
    """The cell separator of a table file; None for other files. `text`: its beginning."""
    if path.suffixes[-2:-1] == [".tsv"] or path.suffix == ".tsv":
        return "\t"
    if path.suffixes[-2:-1] == [".csv"] or path.suffix == ".csv":
        first = text.split("\n", 1)[0]
        return max(",;\t", key=first.count)
    if text[:1] in ("{", "["):
        return None
    names = text.split("\n", 1)[0]
    for found in ",;\t":
        columns = [name.strip().strip('"') for name in names.split(found)]
        if any(all(key in columns for key in keys) for keys in SIGNATURE_KEYS if len(keys) > 1):
            return found
    return None


def separated_records(path: Path, reader: TextIO, found: str, most: int,
                      note: Callable[[str], None] = lambda _: None) -> Iterator[Tuple[int, bytes]]:
    """(row, JSON text) of each row below the header. A row of another length is passed on as an unusable record.

    Cells with lists are JSON or, as pandas writes them, a Python repr, which `note` reports once. A prompt or an answer
    is read as JSON only if it is messages: any other JSON is its text.

    Raises ConfigError: not a CSV file.
    """
    csv.field_size_limit(most)
    rows = csv.reader(reader, delimiter=found)
    number = 0
    noted: List[str] = []
    try:
        names = next(rows, [])
        for row in rows:
            if not row:
                continue
            number += 1
            if len(row) != len(names):
                fault = f"a row of {len(row)} cells, but {len(names)} column names"
                yield number, fault.encode()
                continue
            notes: List[str] = []
            cells = {name.strip(): _cell(name.strip(), cell, notes) for name, cell in zip(names, row)}
            for said in dict.fromkeys(notes):
                if said not in noted:
                    note(said)
                    noted.append(said)
            yield number, json.dumps(cells, ensure_ascii=False).encode("utf-8", "surrogateescape")
    except csv.Error as err:
        raise ConfigError(f"input file {path} is not readable CSV after row {number}: {err}; correct it there, or "
                          "save it as JSON lines") from err


def _cell(name: str, cell: str, notes: List[str]) -> object:
    """The value of a cell; what was repaired is appended to `notes`."""
    if name not in _LISTS and not (name in _ANSWERS and cell.lstrip()[:1] in ("[", "{")):
        return cell
    if not cell.strip():
        return None
    repairs: List[str] = []
    try:
        cell.encode("utf-8")                     # bytes that are no UTF-8: the check of the record reports them
        value = read_json(cell, repairs)
    except ValueError:
        try:
            value = read_literal(cell)
            repairs = [REPAIRED]
        except ValueError:
            return cell                          # the check of the record reports it
    if name not in _LISTS and not _is_messages(value):
        return cell
    notes += repairs
    return value


def _is_messages(value: Any) -> bool:
    messages = value if isinstance(value, list) else [value]
    return bool(messages) and all(isinstance(message, dict) and ("role" in message or "from" in message)
                                  for message in messages)
