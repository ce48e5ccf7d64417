"""One scheduler in several processes, for a model sharded over cards.

Every rank runs the same scheduler on its shard of the model, and every step must compute the same sequences on all
ranks. Only arrivals and cancellations come from outside: rank 0 receives them and sends them to the others before each
step; the tokens follow from the seeds. No MindSpore here.

    rank 0                                                  the others
    with Leader(address, key, ranks - 1) as leader:         with Follower(address, key) as follower:
        scheduler = model.scheduler(settings, leader)           scheduler = model.scheduler(settings, follower)
        scheduler.run(stop)                                      follower.run(scheduler)
"""
import contextlib
import time
from multiprocessing.connection import Client, Connection, Listener
from typing import List, Optional, Tuple, Union

from research.telechat.common.errors import WorkerError
from research.telechat.generation.scheduler import Order, Scheduler

Address = Union[str, Tuple[str, int]]          # path of a Unix socket, or host and port
_BETWEEN_TRIES = 0.1                           # seconds


class Leader:
    """The `exchange` of rank 0's scheduler. Waits for all other ranks to connect.

    Args:
        address: where they connect.
        key: shared secret; objects are unpickled from whoever has it.
        others: number of other ranks.
    """

    def __init__(self, address: Address, key: bytes, others: int):
        with Listener(address, authkey=key) as listener:
            self._connections: List[Connection] = [listener.accept() for _ in range(others)]

    def __call__(self, orders: List[Order]) -> List[Order]:
        """Send the orders of a step. Raises WorkerError: a rank is gone."""
        for connection in self._connections:
            try:
                connection.send(orders)
            except OSError as error:
                raise WorkerError(f"a rank does not take orders any longer ({error}); its own log says why") from error
        return orders

    def __enter__(self) -> "Leader":
        return self

    def __exit__(self, *_exception: object) -> None:
        """Ends the other ranks, too."""
        for connection in self._connections:
            with contextlib.suppress(OSError):             # already ended
                connection.send(None)
            connection.close()


class Follower:
    """The `exchange` of the other ranks. Tries to reach rank 0 for `timeout` seconds; raises WorkerError."""

    def __init__(self, address: Address, key: bytes, timeout: float = 600.0):
        end = time.monotonic() + timeout
        while True:
            try:
                self._connection = Client(address, authkey=key)
                break
            except (ConnectionError, FileNotFoundError) as error:
                if time.monotonic() > end:
                    raise WorkerError(f"rank 0 does not answer at {address} within {timeout:.0f} s; "
                                      "its own log says why") from error
                time.sleep(_BETWEEN_TRIES)
        self._orders: Optional[List[Order]] = None

    def __call__(self, _own: List[Order]) -> List[Order]:
        """The orders of this step."""
        orders, self._orders = self._orders or [], None
        return orders

    def run(self, scheduler: Scheduler) -> None:
        """Step whenever rank 0 does, until it ends. Raises WorkerError: rank 0 disappeared without ending properly."""
        while True:
            try:
                self._orders = self._connection.recv()
            except (EOFError, OSError) as error:
                raise WorkerError("rank 0 is gone; its own log says why") from error
            if self._orders is None:
                return
            scheduler.step()

    def __enter__(self) -> "Follower":
        return self

    def __exit__(self, *_exception: object) -> None:
        self._connection.close()
