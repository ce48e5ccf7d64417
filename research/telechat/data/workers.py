"""Maps a function over a stream in several processes, with results in the order of the stream.

Unlike the pools of the standard library it buffers only a bounded part of the stream, detects a killed worker, and
leaves no orphans if the main process is killed. `Aside` runs a single call in parallel with the main process.
"""
import contextlib
import gc
import multiprocessing
import queue
import signal
import threading
import traceback
from collections import deque
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Callable, Generic, Iterable, Iterator, List, Optional, Tuple, TypeVar, Union, cast

from research.telechat.common.errors import WorkerError

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_Outcome = Tuple[bool, object]               # whether it failed; the exception, or the result
_DEPTH = 4                                   # items queued per worker, so that it never waits for the main process


class Aside(Generic[_Item, _Result]):
    """One call in a process of its own, while this one goes on. A context manager, at whose end the process is gone.

    Enter it before threads are started. Without `fork`, or where the process fails, the call happens here.
    """

    def __init__(self, prepare: Callable[[], object], function: Callable[[_Item], _Result], apart: bool = True) -> None:
        """prepare: called there at once, such as an import that takes long. apart: False: without a process."""
        self._prepare, self._function, self._apart = prepare, function, apart
        self._process: Optional[BaseProcess] = None
        self._sent = False

    def __enter__(self) -> "Aside":
        if self._apart and "fork" in multiprocessing.get_all_start_methods():
            context = multiprocessing.get_context("fork")
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=self._work, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()
        return self

    def start(self, item: _Item) -> None:
        """Begin with function(item)."""
        if self._process is not None:
            with contextlib.suppress(OSError):
                self._connection.send(item)
                self._sent = True

    def result(self, item: _Item) -> _Result:
        """function(item), the item that was given to `start`."""
        if self._sent:
            self._sent = False
            with contextlib.suppress(EOFError, OSError):
                return cast(_Result, self._connection.recv())
        return self._function(item)

    def __exit__(self, *exception: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()

    def _work(self, connection: Connection) -> None:
        _leave_signals()
        gc.freeze()
        gc.disable()                                         # it ends soon
        self._connection.close()                             # inherited; would hide the end of the main process
        with contextlib.suppress(EOFError, OSError):
            self._prepare()
            connection.send(self._function(connection.recv()))


class _End:
    """Sentinel after the last item: the main process is gone."""


def ordered_map(make: Callable[[], Callable[[_Item], _Result]], items: Iterable[_Item], workers: int
                ) -> Iterator[_Result]:
    """`make()(item)` for each item, in order. With `workers` below 2, in this process.

    `make` is called once per worker. An exception of the function is raised here when its item is due; a worker that
    dies raises WorkerError.
    """
    if workers < 2:
        yield from map(make(), items)
        return
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("fork" if "fork" in methods else "spawn")
    pipes = [context.Pipe() for _ in range(workers)]
    mine = [pipe[0] for pipe in pipes]
    processes = []
    try:
        for number in range(workers):
            others = mine + [pipe[1] for index, pipe in enumerate(pipes) if index != number]
            process = context.Process(target=_work, args=(make, pipes[number][1], others), daemon=True)
            process.start()
            processes.append(process)
        for _, theirs in pipes:
            theirs.close()
        yield from cast(Iterator[_Result], _run(mine, processes, iter(items)))
    finally:
        for process in processes:
            process.kill()                       # they have nothing to clean up
        for process in processes:
            process.join()
        for connection in mine:
            connection.close()


def _run(connections: List[Connection], processes: List[BaseProcess], items: Iterator[_Item]) -> Iterator[object]:
    waiting: deque[int] = deque()              # the worker of each item in flight, in order
    sent = 0
    exhausted = False
    while True:
        while not exhausted and len(waiting) < _DEPTH * len(connections):
            try:
                item = next(items)
            except StopIteration:
                exhausted = True
                break
            number = sent % len(connections)
            _guard(partial(connections[number].send, item), processes[number])
            waiting.append(number)
            sent += 1
        if not waiting:
            return
        number = waiting.popleft()
        failed, result = _guard(connections[number].recv, processes[number])
        if failed:
            assert isinstance(result, Exception)
            raise result
        yield result


def _guard(call: Callable[[], _Result], process: BaseProcess) -> _Result:
    try:
        return call()
    except (EOFError, OSError):                              # OSError too: it died mid-message
        process.join(5)
        raise WorkerError(f"a worker process died (exit code {process.exitcode}; -9: killed, often for lack "
                          "of memory); try again with a smaller --num_workers") from None


def _leave_signals() -> None:
    for number in (signal.SIGINT, signal.SIGHUP):            # the main process handles interrupts
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _work(make: Callable[[], Callable[[_Item], _Result]], connection: Connection, others: List[Connection]) -> None:
    """The worker: one thread receives, one computes, one sends, so that the pipe never blocks the main process."""
    _leave_signals()
    for other in others:                                     # inherited; would hide the end of the main process
        other.close()
    gc.freeze()                                              # what was inherited stays; looking through it costs time
    gc.disable()
    arrived: queue.Queue[Union[_Item, _End]] = queue.Queue()
    finished: queue.Queue[_Outcome] = queue.Queue()
    threading.Thread(target=_receive, args=(connection, arrived), daemon=True).start()
    threading.Thread(target=_send, args=(connection, finished), daemon=True).start()
    function = None
    while True:
        item = arrived.get()
        if isinstance(item, _End):
            return
        try:
            function = function or make()
            finished.put((False, function(item)))
        except Exception as err:
            known = isinstance(err, (ValueError, OSError, MemoryError))
            finished.put((True, err if known else WorkerError(
                "a worker process hit a bug; please report this:\n" + "".join(
                    traceback.format_exception(type(err), err, err.__traceback__)))))
        gc.collect()                                         # once an item, not each few hundred objects


def _receive(connection: Connection, arrived: queue.Queue[Union[_Item, _End]]) -> None:
    try:
        while True:
            arrived.put(connection.recv())
    except (EOFError, OSError):
        arrived.put(_End())                                  # the main process is gone


def _send(connection: Connection, finished: queue.Queue[_Outcome]) -> None:
    try:
        while True:
            connection.send(finished.get())
    except OSError:
        return
