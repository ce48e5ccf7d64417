"""Maps a function over a stream in several processes, with results in the order of the stream.

Unlike the pools of the standard library it buffers only a bounded part of the stream, detects a killed worker, and
leaves no orphans if the main process is killed.
"""
import multiprocessing
import queue
import signal
import threading
import traceback
from collections import deque
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Callable, Iterable, Iterator, List, Tuple, TypeVar, Union, cast

from research.telechat.common.errors import WorkerError

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_Outcome = Tuple[bool, object]               # whether it failed; the exception, or the result
_DEPTH = 4                                   # items queued per worker, so that it never waits for the main process


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


def _work(make: Callable[[], Callable[[_Item], _Result]], connection: Connection, others: List[Connection]) -> None:
    """The worker: one thread receives, one computes, one sends, so that the pipe never blocks the main process."""
    for number in (signal.SIGINT, signal.SIGHUP):            # the main process handles interrupts
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for other in others:                                     # inherited; would hide the end of the main process
        other.close()
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
