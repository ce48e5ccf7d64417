"""Input files of preprocessing: which ones, how often each is read, and their records as raw bytes.

Reads JSON lines and JSON arrays, plain or compressed (.gz, .zst), as a stream: the memory needed does not grow with the
files. It does not look into a record (data/records.py does that, in the worker processes).
"""
import codecs
import gzip
import io
import itertools
import json
import random
from pathlib import Path
from typing import BinaryIO, Iterator, List, NamedTuple, Sequence, Tuple, cast

from research.telechat.common.errors import ConfigError

SUFFIXES = (".jsonl", ".json")
COMPRESSED = (".gz", ".zst")
MAX_RECORD_BYTES = 16 << 20                  # longer ones are counted as unusable: they would break the memory bound
_BLOCK = 1 << 20                             # bytes read at once
_SAMPLE_BLOCK = 64                           # records among which a fractional weight chooses


class Source(NamedTuple):
    """One input file; `weight` 2.5 reads it twice and, a third time, every second record of it."""

    path: Path
    weight: float = 1.0


class Chunk(NamedTuple):
    """Consecutive records of one source, the unit of work of a worker process."""

    source: int                              # index in the list of sources
    numbers: List[int]                       # line of each record in its file (or its place in a JSON array), from 1
    records: List[bytes]                     # one JSON text each; b"" for a line beyond MAX_RECORD_BYTES
    progress: int                            # bytes of the file read for it, compressed ones where it is compressed


def find_sources(names: Sequence[str]) -> List[Source]:
    """The files that the names mean, in a reproducible order.

    A name is a file, a folder (all its .jsonl and .json files, also compressed, sorted), or a JSON file that lists
    files: an array of names, or an object from name to weight. Names in such a list are relative to the list's folder
    or, if they do not exist there, to the working directory. Raises ConfigError.
    """
    sources: List[Source] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.is_file() and _is_data(file)
                           and not any(part.startswith(".") for part in file.relative_to(path).parts))
            if not found:
                raise ConfigError(f"folder {path} holds no data file (.jsonl or .json, also with .gz or .zst); "
                                  "name the folder or the files with the data")
            sources += map(Source, found)
        elif not path.exists():
            raise ConfigError(f"input file not found: {path}; give files, folders, or a .json file that lists them")
        else:
            sources += _listed_files(path) if path.suffix == ".json" else [Source(path)]
    if not sources:
        raise ConfigError("no input file; name one with --input_dataset_file")
    return sources


def read_chunks(sources: Sequence[Source], seed: int = 0, chunk_bytes: int = 1 << 20) -> Iterator[Chunk]:
    """All records of all sources, each source as often as its weight says, in chunks of about `chunk_bytes`.

    Files with a weight above 1 are read in rounds, so that the copies of a record are far apart. Blank lines are left
    out. Raises ConfigError where a file cannot be read, is cut off, or is a JSON array with a fault between records.
    """
    rounds = max([int(source.weight) + 1 for source in sources], default=0)
    for number in range(rounds):
        for index, source in enumerate(sources):
            share = min(source.weight - number, 1.0)
            if share <= 0:
                continue
            records = _records(source.path)
            if share < 1.0:
                records = _sample(records, share, f"{seed}/{index}/{number}")
            yield from _chunks(index, records, chunk_bytes)


def total_bytes(sources: Sequence[Source]) -> int:
    """What the `progress` of all chunks adds up to, nearly: the sizes of the files times their weights."""
    return int(sum(source.path.stat().st_size * -(-source.weight // 1) for source in sources))


def peek_records(source: Source, count: int = 100) -> Iterator[bytes]:
    """The first records of a source. Raises ConfigError as `read_chunks` does."""
    return (record for _, record, _ in itertools.islice(_records(source.path), count))


def _is_data(path: Path) -> bool:
    return path.suffix in SUFFIXES or (path.suffix in COMPRESSED and Path(path.stem).suffix in SUFFIXES)


def _listed_files(path: Path) -> List[Source]:
    """The files listed in a .json file, or the file itself where it holds records."""
    content, file = _open(path)
    with file, content:
        head = content.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
    names_first = head[:1] == b"[" and head[1:].lstrip()[:1] == b'"'
    if not (names_first or head[:1] == b"{") or path.stat().st_size > 1 << 24:      # a list of files is small
        return [Source(path)]
    try:
        listed = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError):
        return [Source(path)]                    # JSON lines under the name .json
    if isinstance(listed, list):
        listed = dict.fromkeys(listed, 1.0) if all(isinstance(name, str) for name in listed) else {}
    if not listed or not all(_is_number(weight) for weight in listed.values()):
        return [Source(path)]
    sources = []
    for name, weight in listed.items():
        if not 0 <= weight < 1e6:
            raise ConfigError(f"{path}: the weight of {name} is {weight}; expected a number from 0 on")
        found = next((file for file in (path.parent / name, Path(name)) if file.exists()), None)
        if found is None:
            raise ConfigError(f"{path} lists {name}, which is neither in the folder {path.parent} nor in the working "
                              "directory; correct the list")
        sources += [source._replace(weight=float(weight)) for source in find_sources([str(found)])]
    return [source for source in sources if source.weight > 0]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _open(path: Path) -> Tuple[io.BufferedReader, io.FileIO]:
    """The file's content, decompressed, and the file itself, whose position tells how far it has been read."""
    try:
        file = open(path, "rb", buffering=0)      # noqa: SIM115 (the caller closes it)
    except OSError as err:
        raise ConfigError(f"input file {path} cannot be read: {err.strerror or err}") from err
    if path.suffix == ".gz":
        return io.BufferedReader(cast(io.RawIOBase, gzip.GzipFile(fileobj=file)), _BLOCK), file
    if path.suffix == ".zst":
        try:
            import zstandard
        except ImportError:
            file.close()
            raise ConfigError(f"{path} is compressed with zstd: install the package zstandard, or unpack the "
                              "file") from None
        stream = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
        return io.BufferedReader(cast(io.RawIOBase, stream), _BLOCK), file
    return io.BufferedReader(file, _BLOCK), file


def _records(path: Path) -> Iterator[Tuple[int, bytes, int]]:
    """(number, JSON text, position in the file) of each record."""
    content, file = _open(path)
    try:
        with file, content:
            head = content.peek(4096)[:4096].lstrip(b"\xef\xbb\xbf \t\r\n")
            for number, record in _array_records(path, content) if head[:1] == b"[" else _line_records(content):
                yield number, record, file.tell()
    except EOFError as err:
        raise ConfigError(f"input file {path} is cut off: {err}; copy it again") from err
    except Exception as err:
        if isinstance(err, OSError) or type(err).__name__ == "ZstdError":
            raise ConfigError(f"input file {path} cannot be read to its end: {err}; is it complete?") from err
        raise


def _line_records(content: BinaryIO) -> Iterator[Tuple[int, bytes]]:
    number = 0
    while True:
        line = content.readline(MAX_RECORD_BYTES + 1)
        if not line:
            return
        number += 1
        if len(line) > MAX_RECORD_BYTES:
            while line and not line.endswith(b"\n"):
                line = content.readline(_BLOCK)
            yield number, b""
            continue
        if number == 1 and line.startswith(codecs.BOM_UTF8):
            line = line[len(codecs.BOM_UTF8):]
        if line and not line.isspace():
            yield number, line


def _array_records(path: Path, content: BinaryIO) -> Iterator[Tuple[int, bytes]]:
    """Records of a JSON array. Bytes that are no UTF-8 pass through, for the record's own check to find."""
    decode = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape").decode
    scan = json.JSONDecoder().raw_decode
    text = decode(content.read(_BLOCK)).lstrip("\ufeff")
    position = text.index("[") + 1
    number = 0
    while True:
        while position < len(text) and text[position] in " \t\r\n,":
            position += 1
        if text[position:position + 1] == "]":
            return
        try:
            _, end = scan(text, position)
        except (ValueError, RecursionError) as err:
            block = content.read(max(_BLOCK, len(text) - position))
            if not block or len(text) - position > MAX_RECORD_BYTES:
                raise ConfigError(f"input file {path}: the JSON array breaks off or has a fault behind record "
                                  f"{number}: {err}; correct it there, or copy the file again") from err
            text, position = text[position:] + decode(block), 0
            continue
        number += 1
        yield number, text[position:end].encode("utf-8", "surrogateescape")
        position = end
        if position > _BLOCK:
            text, position = text[position:], 0


def _sample(records: Iterator[Tuple[int, bytes, int]], share: float,
            seed: str) -> Iterator[Tuple[int, bytes, int]]:
    """`share` of the records: of every block of neighbours the same number, chosen at random but reproducibly."""
    block: List[Tuple[int, bytes, int]] = []
    rng = random.Random(seed)
    read = taken = 0

    def chosen() -> Iterator[Tuple[int, bytes, int]]:
        nonlocal read, taken
        read += len(block)
        count = int(read * share + 1e-9) - taken
        taken += count
        for index in sorted(rng.sample(range(len(block)), count)):
            yield block[index]

    for record in records:
        block.append(record)
        if len(block) == _SAMPLE_BLOCK:
            yield from chosen()
            block.clear()
    yield from chosen()


def _chunks(source: int, records: Iterator[Tuple[int, bytes, int]], chunk_bytes: int) -> Iterator[Chunk]:
    numbers: List[int] = []
    texts: List[bytes] = []
    size = reported = position = 0
    for number, record, position in records:
        numbers.append(number)
        texts.append(record)
        size += len(record)
        if size >= chunk_bytes:
            yield Chunk(source, numbers, texts, position - reported)
            numbers, texts, size, reported = [], [], 0, position
    if numbers:
        yield Chunk(source, numbers, texts, position - reported)
