"""The engine of the conversion: moves tensors from an open checkpoint into a sink, in chunks, on several threads.

Memory is bounded: a few chunks for each thread, and whole tensors only where rows and columns must be exchanged (52B's
[in, out] weights), at most one large one at a time; rows in another order are read in that order. Knows nothing of
names, files or command lines (checkpoint/convert.py).
"""
import math
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from research.telechat.checkpoint.dtypes import ITEM_SIZE, RAW, cast, count_nonfinite
from research.telechat.checkpoint.reader import Checkpoint
from research.telechat.checkpoint.writer import OutTensor
from research.telechat.common.environment import cores

CHUNK = 16 << 20                 # bytes read at once
STREAMED = 2 << 20               # where they are written as they lie: still in the processor's cache then
WHOLE_BUDGET = 512 << 20         # bytes of whole tensors in memory, unless a single one is larger
_TILE = 256                      # rows and columns transposed at once; they stay in cache
_CAST_BLOCK = 1 << 18            # elements cast at once


class Transfer(NamedTuple):
    """One tensor of the result and where it comes from.

    Seen as [out, in], row i of the result is row order[i] of the sources, stacked (order None: the same rows), times
    `scale`. The flags say which side, at most one, is stored as [in, out]; with `transpose_in` there is one source.
    Without sources it is the constant `constant`.
    """

    out: OutTensor
    sources: Tuple[str, ...] = ()                # of equal shape and type
    dtype: str = ""                              # of the sources
    order: Optional[np.ndarray] = None
    transpose_in: bool = False
    transpose_out: bool = False
    constant: bytes = b""
    scale: float = 1.0
    whole: bool = True                           # the sources serve no other tensor of the result

    @property
    def label(self) -> str:
        """What numbers of this transfer are reported under; no other has it."""
        name = " + ".join(self.sources)
        return (name if self.whole else f"{name} (for {self.out.name})") if name else self.out.name

    @property
    def streams(self) -> bool:
        """Whether the source's elements keep their order, so that they are read as they lie."""
        return self.order is None and len(self.sources) == 1 and not self.transposes

    @property
    def transposes(self) -> bool:
        """Whether rows and columns are exchanged, for which the sources must be in memory as a whole."""
        return self.transpose_in or self.transpose_out

    @property
    def source_bytes(self) -> int:
        """Bytes to read."""
        return self.out.nbytes // ITEM_SIZE[self.out.dtype] * ITEM_SIZE[self.dtype] if self.sources else 0


# Called from several threads: Sink(tensor, first byte, bytes) takes a part of the result; Tally(transfer, counts) hears
# of NaN ("nan") and infinity ("inf") in a part of the input, of numbers that a cast made infinite ("overflow"), and of
# those that a scale rounded ("rounded").
Sink = Callable[[str, int, memoryview], None]
Tally = Callable[[Transfer, Dict[str, int]], None]


class Stream:
    """A pool of threads that runs transfers; use as a context manager."""

    def __init__(self, workers: Optional[int] = None) -> None:
        self._workers = workers or min(4, max(2, cores()))
        self._pool = ThreadPoolExecutor(self._workers)
        self._local = threading.local()
        self._slots = threading.Semaphore(2 * self._workers)
        self._whole = _Budget(WHOLE_BUDGET)
        self._failed: List[BaseException] = []

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Drop what is queued and wait for what is running; the stream is over then."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def move(self, checkpoint: Checkpoint, transfers: Sequence[Transfer], sink: Sink,
             progress: Callable[[int], object], finished: Callable[[int], None] = lambda _: None,
             tally: Optional[Tally] = None) -> None:
        """Run `transfers`, in order. progress(bytes read) after each chunk, finished(i) when transfer i is complete;
        tally: see Tally, None: nothing is counted. The first error stops all and is raised."""
        pending = _Pending(len(transfers), finished)
        for number, transfer in enumerate(transfers):
            pending.open(number)
            for job in self._jobs(checkpoint, transfer, sink, tally):
                self._submit(pending, number, job, progress)
                del job                                            # may hold a whole matrix, which must go in time
            pending.close(number)
        self._drain()

    def scan(self, checkpoint: Checkpoint, names: Sequence[str], progress: Callable[[int], object]
             ) -> Dict[str, Dict[str, int]]:
        """{"nan": n, "inf": m} of every tensor in `names` that has any."""
        counts: Dict[str, Dict[str, int]] = {}
        lock = threading.Lock()

        def count(name: str, start: int, length: int) -> int:
            info = checkpoint.tensors[name]
            raw = self._read(checkpoint, name, start, length)
            found = count_nonfinite(raw.view(RAW[info.dtype]), info.dtype)
            if found["nan"] or found["inf"]:
                with lock:
                    entry = counts.setdefault(name, {"nan": 0, "inf": 0})
                    for key, value in found.items():
                        entry[key] += value
            return length

        for name in names:
            for start, length in _chunks(checkpoint.tensors[name].nbytes):
                self._submit(None, 0, partial(count, name, start, length), progress)
        self._drain()
        return counts

    def _submit(self, pending: Optional["_Pending"], number: int, job: Callable[[], int],
                progress: Callable[[int], object]) -> None:
        """Queue a job as soon as there is room for it."""
        self._slots.acquire()
        if self._failed:
            self._slots.release()
            raise self._failed[0]
        if pending is not None:
            pending.begin(number)

        def done(future: "Future[int]") -> None:
            self._slots.release()
            if future.cancelled():
                return
            failure = future.exception()
            if failure is not None:
                self._failed.append(failure)
                return
            progress(future.result())

        def run() -> int:
            size = job()
            if pending is not None:
                pending.end(number)
            return size

        self._pool.submit(run).add_done_callback(done)

    def _drain(self) -> None:
        """Wait for all jobs."""
        for _ in range(2 * self._workers):
            self._slots.acquire()
        for _ in range(2 * self._workers):
            self._slots.release()
        if self._failed:
            raise self._failed[0]

    def _jobs(self, checkpoint: Checkpoint, transfer: Transfer, sink: Sink, tally: Optional[Tally]
              ) -> Iterator[Callable[[], int]]:
        """The jobs of one transfer; each returns the bytes of the source that it accounts for."""
        out, item = transfer.out, ITEM_SIZE.get(transfer.dtype, 1)
        if not transfer.sources:
            def write_constant() -> int:
                sink(out.name, 0, memoryview(transfer.constant))
                return 0
            yield write_constant
        elif transfer.streams:
            for start, length in _chunks(transfer.source_bytes, STREAMED):
                def copy(start: int = start, length: int = length) -> int:
                    raw: np.ndarray = self._read(checkpoint, transfer.sources[0], start, length)
                    self._emit(transfer, raw.view(RAW[transfer.dtype]), start // item, sink, tally)
                    return length
                yield copy
        elif transfer.transposes:
            yield from self._matrix_jobs(checkpoint, transfer, sink, tally)
        else:
            yield from self._row_jobs(checkpoint, transfer, sink, tally)

    def _row_jobs(self, checkpoint: Checkpoint, transfer: Transfer, sink: Sink, tally: Optional[Tally]
                  ) -> Iterator[Callable[[], int]]:
        """One job for each band of rows of the result, which reads just these rows, run by run."""
        rows, columns = transfer.out.shape[0], math.prod(transfer.out.shape[1:])
        width = columns * ITEM_SIZE[transfer.dtype]                # bytes of a row
        each = checkpoint.tensors[transfer.sources[0]].shape[0]    # rows of one source
        count = max(1, CHUNK // width)
        for first in range(0, rows, count):
            def copy(first: int = first, last: int = min(first + count, rows)) -> int:
                buffer = self._buffer((last - first) * width)
                view = memoryview(buffer)
                for target, row, number in _runs(transfer.order, first, last - first):
                    while number:                                  # a run may continue in the next source
                        source, start = divmod(row, each)
                        part = min(number, each - start)
                        checkpoint.read_into(transfer.sources[source], start * width,
                                             view[target * width:(target + part) * width])
                        target, row, number = target + part, row + part, number - part
                self._emit(transfer, buffer.view(RAW[transfer.dtype]), first * columns, sink, tally)
                return int(buffer.nbytes)
            yield copy

    def _matrix_jobs(self, checkpoint: Checkpoint, transfer: Transfer, sink: Sink, tally: Optional[Tally]
                     ) -> Iterator[Callable[[], int]]:
        """Load a matrix, then one job for each band of rows of the result."""
        rows, columns = transfer.out.shape
        item = ITEM_SIZE[transfer.dtype]
        sizes = [checkpoint.tensors[name].nbytes for name in transfer.sources]
        self._whole.take(sum(sizes), lambda: bool(self._failed))
        loaded = np.empty(sum(sizes), np.uint8)
        begin = 0
        for name, size in zip(transfer.sources, sizes):
            for start, length in _chunks(size):
                checkpoint.read_into(name, start, memoryview(loaded)[begin + start:begin + start + length])
            begin += size
        # a source [in, out] has as many rows as the result columns, of which it may take some only
        matrix: np.ndarray = loaded.view(RAW[transfer.dtype]).reshape(columns, -1)
        count = max(1, CHUNK // (columns * item))
        bands = [(first, min(first + count, rows)) for first in range(0, rows, count)]
        left = [len(bands)]
        lock = threading.Lock()
        for first, last in bands:
            def copy(first: int = first, last: int = last) -> int:
                flat: np.ndarray = self._buffer((last - first) * columns * item).view(RAW[transfer.dtype])
                band = flat.reshape(last - first, columns)
                fill_band(band, matrix, first, transfer)
                self._emit(transfer, band.reshape(-1), first * columns, sink, tally)
                with lock:
                    left[0] -= 1
                    if not left[0]:
                        self._whole.give(sum(sizes))
                return int(band.nbytes)
            yield copy

    def _emit(self, transfer: Transfer, raw: np.ndarray, first: int, sink: Sink, tally: Optional[Tally]) -> None:
        """Count and cast `raw` (1-d) and hand it to the sink as the result's elements from `first` on."""
        out = transfer.out
        counts = count_nonfinite(raw, transfer.dtype) if tally else {}
        if out.dtype != transfer.dtype or transfer.scale != 1:
            result: np.ndarray = np.empty(raw.size, RAW[out.dtype])
            rounded = 0
            for start in range(0, raw.size, _CAST_BLOCK):
                block = raw[start:start + _CAST_BLOCK]
                if transfer.scale == 1:
                    result[start:start + _CAST_BLOCK] = cast(block, transfer.dtype, out.dtype)
                else:
                    result[start:start + _CAST_BLOCK], count = _scaled(block, transfer)
                    rounded += count
            if tally:
                counts["overflow"] = count_nonfinite(result, out.dtype)["inf"] - counts["inf"]
                counts["rounded"] = rounded
            raw = result
        if tally and any(counts.values()):
            tally(transfer, counts)
        sink(out.name, first * ITEM_SIZE[out.dtype], memoryview(raw).cast("B"))

    def _read(self, checkpoint: Checkpoint, name: str, start: int, length: int) -> np.ndarray:
        buffer = self._buffer(length)
        checkpoint.read_into(name, start, memoryview(buffer))
        return buffer

    def _buffer(self, length: int) -> np.ndarray:
        """Bytes that belong to this thread until its next call; kept, because fresh pages cost more than the copy."""
        kept = getattr(self._local, "buffer", None)
        if kept is None or kept.nbytes < length:
            kept = self._local.buffer = np.empty(max(length, CHUNK), np.uint8)
        return kept[:length]


def _scaled(raw: np.ndarray, transfer: Transfer) -> Tuple[np.ndarray, int]:
    """`raw` times the transfer's scale, as numbers of the result; and how many of them the scale rounded, so that they
    do not come back from it. Where the type changes nothing is counted: the cast rounds then."""
    values = cast(raw, transfer.dtype, "F32").view(np.float32)
    product = values * np.float32(transfer.scale)
    result = cast(product.view(np.uint32), "F32", transfer.out.dtype)
    if transfer.out.dtype != transfer.dtype:
        return result, 0
    back = cast(result, transfer.out.dtype, "F32").view(np.float32) / np.float32(transfer.scale)
    returned = cast(back.view(np.uint32), "F32", transfer.dtype)
    return result, int(np.count_nonzero((returned != raw) & np.isfinite(values)))


def fill_band(band: np.ndarray, matrix: np.ndarray, first: int, transfer: Transfer) -> None:
    """Rows first.. of the result into `band`, from the whole source `matrix`; dtypes equal."""
    rows = len(band)
    if transfer.transpose_out:                                     # the order runs along the columns of the result
        for target, source, count in _runs(transfer.order, 0, band.shape[1]):
            _transpose(band[:, target:target + count], matrix[source:source + count, first:first + rows])
        return
    for target, source, count in _runs(transfer.order, first, rows):
        if transfer.transpose_in:
            _transpose(band[target:target + count], matrix[:, source:source + count])
        else:
            band[target:target + count] = matrix[source:source + count]


def _runs(order: Optional[np.ndarray], first: int, count: int) -> List[Tuple[int, int, int]]:
    """order[first:first + count] as runs of neighbours: (offset from first, source row, number of rows)."""
    if order is None:
        return [(0, first, count)]
    part = order[first:first + count]
    starts = [0, *(np.flatnonzero(np.diff(part) != 1) + 1).tolist(), count]
    return [(a, int(part[a]), b - a) for a, b in zip(starts, starts[1:])]


def _transpose(target: np.ndarray, source: np.ndarray) -> None:
    """target[:] = source.T, tile by tile through a small buffer: rows of a wide matrix lie so far apart, often by a
    power of two, that they displace each other in the cache; those of the padded buffer do not (4 times as fast)."""
    rows, columns = target.shape
    buffer = np.empty((_TILE, _TILE + 8), source.dtype)
    for i in range(0, rows, _TILE):
        for j in range(0, columns, _TILE):
            part = source[j:j + _TILE, i:i + _TILE]
            tile = buffer[:part.shape[0], :part.shape[1]]
            np.copyto(tile, part)
            target[i:i + _TILE, j:j + _TILE] = tile.T


def _chunks(size: int, each: Optional[int] = None) -> Iterator[Tuple[int, int]]:
    """(start, length) of the chunks of `size` bytes, of `each` bytes (None: CHUNK)."""
    each = each or CHUNK
    return ((start, min(each, size - start)) for start in range(0, size, each))


class _Budget:
    """Bytes that may be held at a time; one request may exceed them all if it is alone."""

    def __init__(self, limit: int) -> None:
        self._limit, self._used = limit, 0
        self._changed = threading.Condition()

    def take(self, size: int, stop: Callable[[], bool]) -> None:
        with self._changed:
            while self._used and self._used + size > self._limit and not stop():
                self._changed.wait(0.2)
            self._used += size

    def give(self, size: int) -> None:
        with self._changed:
            self._used -= size
            self._changed.notify_all()


class _Pending:
    """Counts the open jobs of every transfer, and tells when one is complete."""

    def __init__(self, count: int, finished: Callable[[int], None]) -> None:
        self._open = [0] * count
        self._finished = finished
        self._lock = threading.Lock()

    def open(self, number: int) -> None:
        self.begin(number)               # held by the submitting thread until all jobs of the transfer are queued

    def close(self, number: int) -> None:
        self.end(number)

    def begin(self, number: int) -> None:
        with self._lock:
            self._open[number] += 1

    def end(self, number: int) -> None:
        with self._lock:
            self._open[number] -= 1
            complete = not self._open[number]
        if complete:
            self._finished(number)
