"""One scheduler in several processes, for a model sharded over cards.

Every rank runs the same scheduler on its shard of the model. A step that other ranks do not take, or take differently,
would wait for ever in its first collective, so nothing is decided twice: rank 0 receives the requests, and sends the
others who enters and who leaves before each step, and the chosen tokens within it. All else follows from these. Each
rank keeps a digest of its launches, and a rank whose digest differs from rank 0's ends. No MindSpore here.

    rank 0                                                  the others
    with Leader(listener, ranks - 1) as leader:             with Follower(address, key) as follower:
        scheduler = model.scheduler(settings, leader)           scheduler = model.scheduler(settings, follower)
        scheduler.run(stop)                                      follower.run(scheduler)
"""
import contextlib
import os
import queue
import socket
import threading
import time
import zlib
from dataclasses import replace
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, wait
from typing import Callable, Hashable, List, NamedTuple, Optional, Sequence, Tuple, Union

from research.telechat.common.errors import WorkerError
from research.telechat.generation.batch import Engine, Reading, Row, StepLike
from research.telechat.generation.choice import Chosen
from research.telechat.generation.requests import Finished, Token
from research.telechat.generation.scheduler import Choose, Order, Place, Scheduler

Address = Union[str, Tuple[str, int]]          # path of a Unix socket, or host and port
_BETWEEN_TRIES = 0.1                           # seconds
_TO_END = 10.0                                 # seconds that other ranks have to read that they should
DRAIN = "drain"                                # what another rank tells rank 0: finish what runs, then end
_GONE = "rank 0 is gone; see its log"


class Tokens(NamedTuple):
    """Rank 0's choices of a step, and its launches so far."""

    chosen: List[Chosen]
    launches: int
    digest: int


class Launches:
    """An engine that counts its launches, with a digest of what they compute: see `Engine`."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self.vocab_size, self.context, self.pool = engine.vocab_size, engine.context, engine.pool
        self.pieces, self.together = engine.pieces, engine.together
        self.count = self.digest = 0

    def scaling(self, length: int) -> Hashable:
        """See `Engine`."""
        return self._engine.scaling(length)

    def stale(self, length: int) -> None:
        """See `Engine`."""
        self._engine.stale(length)

    def read(self, rows: Sequence[Row]) -> List[Reading]:
        """See `Engine`."""
        self._note("read", rows, 0)
        return self._engine.read(rows)

    def read_piece(self, row: Row, end: int, every: bool) -> StepLike:
        """See `Engine`."""
        self._note("piece and scores" if every else "piece", [row], end)
        return self._engine.read_piece(row, end, every)

    def advance(self, rows: Sequence[Row], batch: int) -> StepLike:
        """See `Engine`."""
        self._note("advance", rows, batch)
        return self._engine.advance(rows, batch)

    def _note(self, graph: str, rows: Sequence[Row], size: int) -> None:
        what = [(row.number, row.length, row.cached, int(row.tokens[row.length - 1]), row.blocks) for row in rows]
        self.digest = zlib.crc32(repr((graph, size, what)).encode(), self.digest)
        self.count += 1


class _Rank:
    """A rank's own launches."""

    def __init__(self) -> None:
        self.launches: Optional[Launches] = None

    def watch(self, engine: Engine) -> Engine:
        """See `Ranks`."""
        self.launches = Launches(engine)
        return self.launches

    def noted(self) -> Tuple[int, int]:
        """(number of launches, their digest)."""
        return (self.launches.count, self.launches.digest) if self.launches else (0, 0)


def _hang_up(connection: Connection) -> None:
    """Close a connection on which another thread is waiting; `close` alone would only do so after it."""
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        end.shutdown(socket.SHUT_RDWR)
    connection.close()


class Leader(_Rank):
    """The `Ranks` of rank 0's scheduler. Waits for all other ranks to connect."""

    def __init__(self, listener: Listener, others: int, on_word: Callable[[str], None] = lambda _: None,
                 on_loss: Callable[[str], None] = lambda _: None):
        """
        Args:
            listener: where they connect; closed then. Objects are unpickled from whoever has its key.
            others: number of other ranks.
            on_word: called with what another rank tells, from a thread of its own.
            on_loss: called from there, once, when another rank has ended; a step may be waiting for it for ever.
        """
        super().__init__()
        self._on_word, self._on_loss = on_word, on_loss
        self._connections: List[Connection] = []
        with listener:
            while len(self._connections) < others:
                with contextlib.suppress(AuthenticationError, EOFError, ConnectionError):     # a stranger
                    self._connections.append(listener.accept())
        self._ending = False
        self._listener = threading.Thread(target=self._listen, name="ranks", daemon=True)
        self._listener.start()

    def orders(self, orders: List[Order]) -> List[Order]:
        """Send the orders of a step. Raises WorkerError: a rank is gone."""
        # Constraints are for the choice of tokens, which is rank 0's.
        self._send([order if order.request is None else order._replace(request=replace(order.request, constraint=None))
                    for order in orders])
        return orders

    def chosen(self, places: List[Place], choose: Choose) -> Sequence[Chosen]:
        """Choose the tokens and send them. Raises WorkerError: a rank is gone."""
        chosen = choose(places)
        self._send(Tokens([Token(one.id) if isinstance(one, Token) else one for one in chosen], *self.noted()))
        return chosen

    def _send(self, what: object) -> None:
        for connection in self._connections:
            try:
                connection.send(what)
            except OSError as error:
                raise WorkerError(f"a rank stopped responding ({error}); see its log") from error

    def _listen(self) -> None:
        open_ones = list(self._connections)
        while open_ones:
            for connection in wait(open_ones):
                assert isinstance(connection, Connection)
                try:
                    self._on_word(connection.recv())
                except (EOFError, OSError):
                    open_ones.remove(connection)
                    if not self._ending:
                        self._on_loss(f"another rank of the model (number {self._connections.index(connection) + 1} "
                                      "to connect) is gone; see its log")
                        return

    def __enter__(self) -> "Leader":
        return self

    def __exit__(self, kind: Optional[type], *_exception: object) -> None:
        """Ends the other ranks, too: after an exception with an error."""
        self.close(kind is None)

    def close(self, well: bool = True) -> None:
        """End the other ranks, well or with an error."""
        self._ending = True
        if well:
            for connection in self._connections:
                with contextlib.suppress(OSError):                    # already ended
                    connection.send(None)
            self._listener.join(_TO_END)
        for connection in self._connections:
            with contextlib.suppress(OSError):
                _hang_up(connection)


class Follower(_Rank):
    """The `Ranks` of another rank's scheduler."""

    def __init__(self, address: Address, key: bytes, timeout: float = 600.0,
                 on_loss: Callable[[], None] = lambda: None):
        """
        Args:
            address: rank 0's, tried for `timeout` seconds.
            key: that of its listener.
            on_loss: called from a thread of its own when rank 0 has disappeared; a step may wait for it for ever.

        Raises:
            WorkerError: rank 0 does not answer.
        """
        super().__init__()
        end = time.monotonic() + timeout
        while True:
            try:
                self._connection = Client(address, authkey=key)
                break
            except (ConnectionError, FileNotFoundError) as error:
                if time.monotonic() > end:
                    raise WorkerError(f"rank 0 did not answer at {address} within {timeout:.0f} s; "
                                      "see its log") from error
                time.sleep(_BETWEEN_TRIES)
        self._on_loss = on_loss
        self._ended = False
        self._arrived: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self._listen, name="rank 0", daemon=True).start()
        self._orders: List[Order] = []

    def say(self, word: str) -> None:
        """Tell rank 0."""
        with contextlib.suppress(OSError):                            # it has ended
            self._connection.send(word)

    def orders(self, _own: List[Order]) -> List[Order]:
        """The orders of this step."""
        orders, self._orders = self._orders, []
        return orders

    def chosen(self, places: List[Place], _choose: Choose) -> Sequence[Chosen]:
        """Rank 0's choices. Raises WorkerError: it is gone, or has computed something else than this rank."""
        found = self._next()
        if not isinstance(found, Tokens) or len(found.chosen) != len(places) or found[1:] != self.noted():
            raise WorkerError(f"this rank diverged from rank 0: {self.noted()[0]} launches with digest "
                              f"{self.noted()[1]:08x} for {len(places)} sequences, but rank 0 has {found!r:.200}; all "
                              "ranks need the same options and the same version")
        return found.chosen

    def run(self, scheduler: Scheduler) -> None:
        """Step whenever rank 0 does, until it ends. Raises WorkerError: rank 0 disappeared without ending properly."""
        while True:
            orders = self._next()
            if orders is None:
                return
            assert not isinstance(orders, Tokens)
            self._orders = orders
            scheduler.step()

    def _next(self) -> Union[List[Order], Tokens, None]:
        found = self._arrived.get()
        if isinstance(found, Finished):
            raise WorkerError(found.message)
        what: Union[List[Order], Tokens, None] = found
        return what

    def _listen(self) -> None:
        try:
            while True:
                found = self._connection.recv()
                self._arrived.put(found)
                if found is None:
                    return
        except (EOFError, OSError):
            if not self._ended:
                self._arrived.put(Finished("error", _GONE))
                self._on_loss()

    def __enter__(self) -> "Follower":
        return self

    def __exit__(self, *_exception: object) -> None:
        self._ended = True
        with contextlib.suppress(OSError):
            _hang_up(self._connection)
