"""Records of tables: CSV and TSV with a line of column names, Parquet, and Arrow as the datasets library stores it."""
import csv
import json
from pathlib import Path
from typing import Callable, Iterator, Optional, TextIO, Tuple

from research.telechat.common.errors import ConfigError
from research.telechat.common.files import JsonObject
from research.telechat.data.formats import SIGNATURE_KEYS

COLUMNAR = (".parquet", ".arrow")
SUFFIXES = (".csv", ".tsv", *COLUMNAR)
_LISTS = ("messages", "dialog", "conversations", "history", "tools", "functions")       # JSON in a cell
_ROWS = 256                                  # rows of a columnar file in memory


def is_columnar(path: Path, head: bytes) -> bool:
    """Whether a file is Parquet or Arrow."""
    return head[:4] == b"PAR1" or head[:6] == b"ARROW1" or path.suffix in COLUMNAR


def columnar_records(path: Path, head: bytes, done: Callable[[float], object]) -> Iterator[Tuple[int, bytes]]:
    """(row, JSON text) of each row. `done` is called with the share of the file that has been read.

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
    try:
        if kind == "Parquet":
            with pyarrow.parquet.ParquetFile(path) as file:
                rows = max(file.metadata.num_rows, 1)
                for batch in file.iter_batches(batch_size=_ROWS):
                    done((number + batch.num_rows) / rows)
                    for row in batch.to_pylist():
                        number += 1
                        yield number, _row(row)
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
                        yield number, _row(row)
    except (pyarrow.ArrowException, OSError) as err:
        reason = str(err).split("\n")[0]
        raise ConfigError(f"input file {path} is a {kind} file that cannot be read behind row {number}: {reason}; "
                          "copy it again") from err


def _row(row: JsonObject) -> bytes:
    return json.dumps(row, ensure_ascii=False, default=str).encode("utf-8", "replace")


def separator(path: Path, text: str) -> Optional[str]:
    """What separates the cells of a file that is a table; None for another one. `text`: how it begins."""
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


def separated_records(path: Path, reader: TextIO, found: str, most: int) -> Iterator[Tuple[int, bytes]]:
    """(row, JSON text) of each row below the column names. A row of another length comes as what it is: unusable.

    Raises ConfigError: no CSV.
    """
    csv.field_size_limit(most)
    rows = csv.reader(reader, delimiter=found)
    number = 0
    try:
        names = next(rows, [])
        for row in rows:
            if not row:
                continue
            number += 1
            if len(row) != len(names):
                fault = f"a row of {len(row)} cells, {len(names)} columns have a name"
                yield number, fault.encode()
                continue
            cells = {name.strip(): _cell(name.strip(), cell) for name, cell in zip(names, row)}
            yield number, json.dumps(cells, ensure_ascii=False).encode("utf-8", "surrogateescape")
    except csv.Error as err:
        raise ConfigError(f"input file {path} is no readable CSV behind row {number}: {err}; correct it there, or "
                          "save it as JSON lines") from err


def _cell(name: str, cell: str) -> object:
    if name in _LISTS:
        if not cell.strip():
            return None
        try:
            return json.loads(cell)
        except (ValueError, RecursionError):
            return cell                          # the record's own check names it
    return cell
