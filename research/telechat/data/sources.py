"""Input files of preprocessing: which ones, how often each is read, and their records as raw bytes.

data/stream.py reads one file; data/records.py parses records, in the worker processes.
"""
import heapq
import itertools
import json
import random
from pathlib import Path
from typing import Iterator, List, NamedTuple, Optional, Sequence, Tuple

from research.telechat.common.errors import ConfigError
from research.telechat.data import tables, texts
from research.telechat.data.saved import saved_files
from research.telechat.data.stream import is_metadata, open_content, read_records

SUFFIXES = (".jsonl", ".json")
COMPRESSED = (".gz", ".zst")
# Files next to data: written by the commands of this project, by data hubs and by the datasets library.
_OURS = ("meta.json", "report.json", "dataset_checks.json", "training_log.jsonl")
_HUB = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
_OPEN = 64                                   # files open at the same time
_SAMPLE_BLOCK = 64                           # block of records from which a fractional weight samples


class Source(NamedTuple):
    """One input file; `weight` 2.5 reads it twice and, a third time, half of its records."""

    path: Path
    weight: float = 1.0
    lines: bool = False                      # for a text file: each line is a document


class Chunk(NamedTuple):
    """Consecutive records of one source, the unit of work of a worker process."""

    source: int                              # index in the list of sources
    numbers: List[int]                       # of each record, from `stream.read_records`
    records: List[bytes]                     # one JSON text each; b"" for a record that is too long
    progress: int                            # bytes of the file read for it, compressed size if it is compressed
    notes: Tuple[str, ...] = ()              # messages about the file


def find_sources(names: Sequence[str], ignored: Optional[List[Path]] = None) -> List[Source]:
    """The files that the names refer to, in a reproducible order.

    A name is a file, a folder (all its data files, see `_folder_files`), or a JSON file that lists files: an array of
    names, or an object from name to weight. Names in such a list are relative to the list's folder or, if they do not
    exist there, to the working directory. Files in folders that are not data are appended to `ignored`. Raises
    ConfigError.
    """
    sources: List[Source] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            sources += map(Source, _folder_files(path, [] if ignored is None else ignored))
        elif not path.exists():
            raise ConfigError(f"input file not found: {path}; give files, folders, or a .json file that lists them")
        else:
            sources += _listed_files(path, ignored) if path.suffix == ".json" else [Source(path)]
    if not sources:
        raise ConfigError("no input file; name one with --input_dataset_file")
    return sources


def _folder_files(folder: Path, ignored: List[Path]) -> List[Path]:
    """The data files below a folder, sorted; the others, except hidden ones, go to `ignored`.

    Data are .jsonl and .json files, also compressed, or else (without any of these) .csv, .tsv, .parquet and .arrow, or
    else .txt. Not data: what this project writes next to a data set, what data hubs put next to data, and JSON objects
    that neither are nor contain records.
    """
    files = sorted(file for file in folder.rglob("*") if file.is_file()
                   and not any(part.startswith(".") for part in file.relative_to(folder).parts))
    data_sets = {file.parent for file in files if ".mindrecord" in file.name}
    found = [file for file in files if _is_data(file) and not (
        file.name in _HUB or (file.name in _OURS and (file.parent in data_sets or file.suffix == ".jsonl"))
        or (file.suffix == ".json" and is_metadata(file)))]
    found = found or saved_files(folder, [file for file in files if file.suffix in tables.SUFFIXES])
    found = found or [file for file in files if texts.is_text(file)]
    if not found:
        raise ConfigError(f"folder {folder} contains no data file (.jsonl or .json, also with .gz or .zst, .csv, "
                          ".parquet, .txt); name the folder or the files with the data")
    ignored += [file for file in files if file not in set(found)]
    return found


def read_chunks(sources: Sequence[Source], seed: int = 0, chunk_bytes: int = 1 << 20) -> Iterator[Chunk]:
    """All records of all sources, each source as often as its weight says, in chunks of about `chunk_bytes`.

    Files with a weight above 1 are read in rounds, so that the copies of a record are far apart. Blank lines are
    skipped. Raises ConfigError if a file cannot be read, is truncated, or is a JSON array broken between records.
    """
    rounds = max([int(source.weight) + 1 for source in sources], default=0)
    for number in range(rounds):
        for index, source in enumerate(sources):
            share = min(source.weight - number, 1.0)
            if share <= 0:
                continue
            yield from _round(source, index, number, seed, chunk_bytes)


def read_evenly(sources: Sequence[Source], seed: int = 0, chunk_bytes: int = 1 << 20) -> Iterator[Chunk]:
    """The chunks of `read_chunks` interleaved, so that all sources end at about the same time.

    Any part of the stream has nearly the same proportions of the sources: their sizes times their weights. More than
    `_OPEN` sources are divided into `_OPEN` groups, each of which reads its sources one after the other.
    """
    groups = [_Group(range(first, len(sources), _OPEN), sources, seed, chunk_bytes)
              for first in range(min(_OPEN, len(sources)))]
    heap = [(0.0, number) for number, group in enumerate(groups) if group.size]
    while heap:
        _, number = heap[0]
        chunk = next(groups[number].chunks, None)
        if chunk is None:
            heapq.heappop(heap)
            continue
        heapq.heapreplace(heap, (groups[number].done / groups[number].size, number))
        yield chunk


class _Group:
    """Sources that are read one after the other; `done` of their `size` (bytes times weight) has been read."""

    def __init__(self, members: Sequence[int], sources: Sequence[Source], seed: int, chunk_bytes: int):
        self.size = sum(sources[index].weight * (sources[index].path.stat().st_size or 1) for index in members)
        self.done = 0.0
        self.chunks = self._read(members, sources, seed, chunk_bytes)

    def _read(self, members: Sequence[int], sources: Sequence[Source], seed: int, chunk_bytes: int) -> Iterator[Chunk]:
        for number in range(max(int(sources[index].weight) + 1 for index in members)):
            for index in members:
                share = min(sources[index].weight - number, 1.0)
                if share <= 0:
                    continue
                path, before = sources[index].path, self.done
                exact = path.suffix in (*COMPRESSED, *tables.COLUMNAR)       # other files are read in larger blocks
                for chunk in _round(sources[index], index, number, seed, chunk_bytes):
                    self.done += share * chunk.progress if exact else sum(map(len, chunk.records))
                    yield chunk
                self.done = before + share * path.stat().st_size


def _round(source: Source, index: int, number: int, seed: int, chunk_bytes: int) -> Iterator[Chunk]:
    """The chunks of one pass over a source, the `number`-th, counted from 0."""
    notes: List[str] = []
    records = read_records(source.path, notes.append, source.lines)
    share = min(source.weight - number, 1.0)
    if share < 1.0:
        records = _sample(records, share, f"{seed}/{index}/{number}")
    return _chunks(index, records, chunk_bytes, notes)


def total_bytes(sources: Sequence[Source]) -> int:
    """Approximate sum of the `progress` of all chunks: the sizes of the files times their weights."""
    return int(sum(source.path.stat().st_size * -(-source.weight // 1) for source in sources))


def peek_records(source: Source, count: int = 100) -> Iterator[bytes]:
    """The first records of a source. Raises ConfigError as `read_chunks` does."""
    return (record for _, record, _ in itertools.islice(read_records(source.path, lines=source.lines),
                                                           count))


def _is_data(path: Path) -> bool:
    return path.suffix in SUFFIXES or (path.suffix in COMPRESSED and Path(path.stem).suffix in SUFFIXES)


def _listed_files(path: Path, ignored: Optional[List[Path]] = None) -> List[Source]:
    """The files listed in a .json file, or the file itself if it contains records."""
    content, file = open_content(path)
    with file, content:
        head = content.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
    names_first = head[:1] == b"[" and head[1:].lstrip()[:1] == b'"'
    if not (names_first or head[:1] == b"{") or path.stat().st_size > 1 << 24:      # a list of files is small
        return [Source(path)]
    try:
        listed = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError):
        return [Source(path)]                    # JSON lines named .json
    if isinstance(listed, list):
        listed = dict.fromkeys(listed, 1.0) if all(isinstance(name, str) for name in listed) else {}
    if not listed or not all(_is_number(weight) for weight in listed.values()):
        return [Source(path)]
    sources = []
    for name, weight in listed.items():
        if not 0 <= weight < 1e6:
            raise ConfigError(f"{path}: the weight of {name} is {weight}; expected a number of at least 0")
        found = next((file for file in (path.parent / name, Path(name)) if file.exists()), None)
        if found is None:
            raise ConfigError(f"{path} lists {name}, which is neither in the folder {path.parent} nor in the working "
                              "directory; correct the list")
        sources += [source._replace(weight=float(weight)) for source in find_sources([str(found)], ignored)]
    return [source for source in sources if source.weight > 0]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _sample(records: Iterator[Tuple[int, bytes, int]], share: float,
            seed: str) -> Iterator[Tuple[int, bytes, int]]:
    """`share` of the records: the same number from every block of neighbours, chosen at random but reproducibly."""
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


def _chunks(source: int, records: Iterator[Tuple[int, bytes, int]], chunk_bytes: int,
            notes: List[str]) -> Iterator[Chunk]:
    numbers: List[int] = []
    texts: List[bytes] = []
    size = reported = position = 0
    for number, record, position in records:
        numbers.append(number)
        texts.append(record)
        size += len(record)
        if size >= chunk_bytes:
            yield Chunk(source, numbers, texts, position - reported, tuple(notes))
            notes.clear()
            numbers, texts, size, reported = [], [], 0, position
    if numbers or notes:
        yield Chunk(source, numbers, texts, position - reported, tuple(notes))
