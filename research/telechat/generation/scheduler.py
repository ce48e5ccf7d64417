"""One loop for all requests: sequences enter and leave between steps (continuous batching: Yu et al., 2022).

A step takes cancellations and new requests, admits requests in order of arrival while there are slots and blocks for
their maximum length (so whatever starts can finish without preemption), prefills up to `prefill_tokens` prompt tokens
so that a long prompt does not stall the others, decodes the next token of every running answer, and emits the tokens.

Answers do not depend on what else is computed, except for rounding: kernels sum in a different order in another batch,
and if two tokens are that close, the other one may be chosen. With `Settings.deterministic` each sequence is computed
separately and without cached prefixes, so its answer is that of the request alone, bit by bit. No MindSpore here.
"""
import threading
import time
from collections import deque
from dataclasses import replace
from typing import Callable, Deque, Dict, List, NamedTuple, Optional, Protocol, Sequence, Tuple

import numpy as np

from research.telechat.common.errors import ConfigError
from research.telechat.generation.batch import Engine, Reading, Row, StepLike, check_tokens
from research.telechat.generation.choice import Chosen, pick
from research.telechat.generation.passes import Passes, Settings
from research.telechat.generation.requests import (
    Draining,
    Event,
    Finished,
    OnEvent,
    QueueFull,
    Request,
    RequestTooLong,
    Started,
    Stats,
    Ticket,
    Token,
)
from research.telechat.generation.sampling import Random, Sampling

_RECENT = 32                           # finished requests used to estimate the waiting time
_IDLE = 0.1                            # seconds between checks of `stop` while idle
_GREEDY = Sampling()
_OUTCOMES = {"stop": "finished", "length": "finished", "cancelled": "cancelled", "error": "failed"}


class Order(NamedTuple):
    """An order from outside: a request, or (None) the end of one for a reason."""

    number: int
    request: Optional[Request] = None
    reason: str = "cancelled"
    message: str = ""


class Place(NamedTuple):
    """Where the logits of a sequence are."""

    row: Row
    step: StepLike
    at: int


Choose = Callable[[List[Place]], Sequence[Chosen]]


class Ranks(Protocol):
    """The other processes of a sharded model, generation/ranks.py."""

    def watch(self, engine: Engine) -> Engine:
        """The engine, its launches compared with those of the other ranks."""

    def orders(self, orders: List[Order]) -> List[Order]:
        """Those that all ranks follow in this step. `orders`: received by this one."""

    def chosen(self, places: List[Place], choose: Choose) -> Sequence[Chosen]:
        """The tokens of this step on all ranks."""


def choose_each(places: List[Place]) -> List[Chosen]:
    """The next token of each sequence, with its own request's settings."""
    return [Token(place.step.tokens()[place.at]) if place.row.plain else
            pick(place.row, place.step.logits()[place.at]) for place in places]


class Scheduler:
    """See the module docstring and `SchedulerLike`.

    Args:
        engine: computes the steps; several schedulers may share the cache blocks of its `pool`.
        settings: see `Settings`.
        choose: chooses the tokens of a step.
        ranks: the other processes of a sharded model; None: single process.
    """

    def __init__(self, engine: Engine, settings: Optional[Settings] = None, choose: Choose = choose_each,
                 ranks: Optional[Ranks] = None):
        settings = settings or Settings()
        if engine.together and not settings.together:
            settings = replace(settings, slots=1, buckets=(1,))            # others could not join
        if settings.deterministic:
            settings = replace(settings, buckets=(1,), reuse=False)
        self.engine, self.settings = ranks.watch(engine) if ranks is not None else engine, settings
        self._passes = Passes(self.engine, settings)
        self._choose, self._ranks = choose, ranks
        self._lock = threading.Lock()              # for _inbox, _number, _listeners, _draining, which all threads touch
        self._wake = threading.Event()
        self._inbox: List[Order] = []
        self._listeners: Dict[int, Tuple[Optional[OnEvent], Optional[Random], Optional[np.ndarray]]] = {}
        self._number = 0
        self._draining = False
        self._waiting: Deque[Row] = deque()
        self._running: List[Row] = []              # in order of arrival; with settings.together, finished ones too
        self._rows: Dict[int, Row] = {}            # unfinished ones by number
        self._counts = dict.fromkeys(("steps", "submitted", "finished", "cancelled", "failed", "prompt_tokens",
                                      "cached_tokens", "generated_tokens"), 0)
        self._seconds: Deque[float] = deque(maxlen=_RECENT)

    # From any thread

    def submit(self, request: Request, on_event: Optional[OnEvent] = None, rng: Optional[Random] = None,
               tokens: Optional[np.ndarray] = None) -> Ticket:
        """Put a request into the queue.

        Args:
            request: the request.
            on_event: called with each event, see generation/requests.py.
            rng: samples the tokens instead of the request's seed.
            tokens: array to write prompt and answer to, int32.

        Raises:
            RequestTooLong: prompt and answer do not fit the context or the whole cache.
            ConfigError: a token outside the vocabulary.
            QueueFull, Draining: retry later or elsewhere.
        """
        self._check(request)
        with self._lock:
            if self._draining:
                raise Draining("no new requests: running ones are completed, then the service stops")
            waiting = len(self._waiting) + sum(order.request is not None for order in self._inbox)
            if waiting >= self.settings.max_queue and not self.settings.together:
                seconds = self._estimate(waiting)
                raise QueueFull(f"the queue is full ({waiting} requests); try again in {seconds:.0f} s",
                                seconds)
            self._number += 1
            number = self._number
            self._listeners[number] = on_event, rng, tokens
            self._counts["submitted"] += 1
            self._inbox.append(Order(number, request))
        self._wake.set()
        return Ticket(number)

    def cancel(self, ticket: Ticket) -> None:
        """End a request at the next step; no effect if it has already ended."""
        self._end(Order(ticket.number))

    def drain(self) -> None:
        """Accept no new requests from now on."""
        with self._lock:
            self._draining = True
        self._wake.set()

    def stats(self) -> Stats:
        """The current state; while a step runs, that of some moment within it."""
        pool = self.engine.pool
        with self._lock:
            waiting = len(self._waiting) + sum(order.request is not None for order in self._inbox)
            running = sum(not row.finished for row in self._running)
            total, free, kept = (pool.total, pool.available, pool.kept) if pool else (0, 0, 0)
            return Stats(waiting, running, total, total - free, kept, **self._counts)

    # From the thread that runs the steps

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._running or self._waiting or self._inbox)

    @property
    def running(self) -> bool:
        """Whether any request has left the queue and not ended."""
        return bool(self._running)

    def put_aside(self) -> None:
        """Preempt all answers and release their blocks. They resume, recomputed, as soon as there is room."""
        for row in reversed(self._running):
            self._passes.leave(row)
            row.use([])
            row.cached, row.root = 0, None
            self._waiting.appendleft(row)
        self._running = []

    def step(self) -> bool:
        """Prefill prompts and decode one token of every running answer -> whether anything is left to do.

        An error of the engine ends all requests with Finished("error") and is raised.
        """
        try:
            self._receive()
            self._admit()
            self._hand_out(self._passes.compute(self._running))
            self._leave()
        except BaseException as error:
            self._fail(f"{type(error).__name__}: {error}")
            raise
        self._counts["steps"] += 1
        return self.busy

    def run(self, stop: threading.Event) -> None:
        """Step while there is anything to do, and wait for requests, until `stop` is set (running requests are then
        cancelled) or until all are finished after `drain`."""
        try:
            while not stop.is_set():
                if self.busy:
                    self.step()
                elif self._draining:
                    return
                else:
                    self._wake.wait(_IDLE)
                    self._wake.clear()
        finally:
            self.close()

    def close(self) -> None:
        """Cancel all unfinished requests."""
        with self._lock:
            orders, self._inbox = self._inbox, []
        self._follow(orders)
        for row in list(self._rows.values()):
            self._finish(row, "cancelled")
        self._leave()

    def warm_up(self) -> None:
        """Compile the graphs of all buckets up front, by decoding for one-token prompts and discarding the tokens."""
        request = Request((0,), _GREEDY, 2)
        pool = self.engine.pool
        for bucket in self.settings.buckets:
            rows = [Row(0, request) for _ in range(1 if self.engine.pieces else bucket)]
            blocks = pool.take(len(rows)) if pool else []
            if blocks is None:
                continue
            for row, block in zip(rows, blocks):
                row.use([block])
            self.engine.read(rows)
            for row in rows:
                row.append(0)
            self.engine.advance(rows, bucket).tokens()
            if self.engine.pieces:
                rows[0].cached = 0
                self.engine.read_piece(rows[0], 2, False).tokens()
            if pool:
                pool.give(blocks)

    # Within a step

    def _check(self, request: Request) -> None:
        """Raises the errors of `submit` for a request that can never be answered."""
        engine = self.engine
        check_tokens(np.asarray(request.prompt), engine.vocab_size, "the prompt")
        for token, _ in request.sampling.logit_bias:
            if token >= engine.vocab_size:
                raise ConfigError(f"logit_bias: token {token} is outside the model's vocabulary of "
                                  f"{engine.vocab_size}")
        if request.prompt_logprobs and not engine.pieces:
            raise ConfigError("prompt_logprobs: this engine does not compute log-probabilities of prompts")
        total = len(request.prompt) + request.max_new_tokens
        pool = engine.pool
        limit = min(engine.context, pool.total * pool.block_size) if pool else engine.context
        if total > limit:
            what = ("the model's seq_length is" if limit == engine.context else
                    "the KV cache (num_blocks times block_size) holds")
            raise RequestTooLong(f"the prompt has {len(request.prompt)} tokens and the answer up to "
                                 f"{request.max_new_tokens}, but {what} {limit}: shorten the prompt, or request fewer "
                                 "tokens", limit)

    def _estimate(self, waiting: int) -> float:
        """Estimated seconds until a place in the queue is free, from the duration of recent requests."""
        mean = sum(self._seconds) / len(self._seconds) if self._seconds else 1.0
        return max(mean * (waiting + 1) / self.settings.slots, 1.0)

    def _end(self, order: Order) -> None:
        with self._lock:
            self._inbox.append(order)
        self._wake.set()

    def _receive(self) -> None:
        """Follow the orders received since the last step."""
        with self._lock:
            orders, self._inbox = self._inbox, []
        if self._ranks is not None:
            try:
                orders = self._ranks.orders(orders)
            except BaseException:
                self._follow(orders)                               # registers them, so that they end with an error
                raise
        self._follow(orders)

    def _follow(self, orders: List[Order]) -> None:
        for order in orders:
            if order.request is not None:
                with self._lock:
                    listener = self._listeners.pop(order.number, (None, None, None))
                row = self._rows[order.number] = Row(order.number, order.request, *listener)
                self._waiting.append(row)
            elif order.number in self._rows:
                self._finish(self._rows[order.number], order.reason, order.message)
        self._leave()

    def _admit(self) -> None:
        """Admit requests in order of arrival while there are slots and blocks for their maximum length."""
        places = self.settings.slots - len(self._running)
        if self.settings.together and self._running:               # they finish together
            places = 0
        while self._waiting and places > 0 and self._passes.place(self._waiting[0]):
            row = self._waiting.popleft()
            self._running.append(row)
            places -= 1
            if row.started:                                        # it was preempted
                continue
            row.started = time.monotonic()
            self._counts["prompt_tokens"] += row.prompt_length
            self._counts["cached_tokens"] += row.cached
            self._emit(row, Started(row.prompt_length, row.cached))

    def _hand_out(self, readings: List[Reading]) -> None:
        """Choose the tokens, in order of arrival, and emit the events."""
        places = [Place(row, step, index) for rows, step in readings for index, row in enumerate(rows)
                  if not row.finished]
        places.sort(key=lambda place: place.row.number)
        for place in places:
            row = place.row
            if row.scores is not None:
                self._emit(row, row.scores.event())
                row.scores = None
                if row.length == row.limit:
                    self._finish(row, "length")
        places = [place for place in places if not place.row.finished]
        if not places:
            return
        choices = self._ranks.chosen(places, self._choose) if self._ranks is not None else self._choose(places)
        for place, chosen in zip(places, choices):
            row = place.row
            if isinstance(chosen, Finished):
                self._finish(row, *chosen)
                continue
            row.append(chosen.id)
            self._counts["generated_tokens"] += 1
            ended = chosen.id in row.ends
            if row.request.constraint is not None and not ended:
                row.request.constraint.advance(chosen.id)
            self._emit(row, chosen)
            if row.finished:
                self._finish(row, "stop" if ended else "length")

    def _finish(self, row: Row, reason: str, message: str = "") -> None:
        """End a sequence in any state; its slot and blocks are free after `_leave`."""
        if self._rows.pop(row.number, None) is None:
            return
        row.finished = True
        self._counts[_OUTCOMES[reason]] += 1
        if row.started:
            self._seconds.append(time.monotonic() - row.started)
        self._emit(row, Finished(reason, message))

    def _leave(self) -> None:
        """Remove finished sequences and release their blocks."""
        if any(row.finished for row in self._waiting):
            self._waiting = deque(row for row in self._waiting if not row.finished)
        if self.settings.together and not all(row.finished for row in self._running):
            return                                                 # each keeps its slot in the batch
        for row in self._running:
            if row.finished:
                self._passes.leave(row)
        self._running = [row for row in self._running if not row.finished]

    def _fail(self, message: str) -> None:
        """Handle a failed step: the cache contents cannot be trusted, and no more requests are accepted."""
        self.drain()
        if self.engine.pool is not None:
            self.engine.pool.forget()
        for row in list(self._rows.values()):
            row.root = None
            self._finish(row, "error", message)
        self._leave()

    def _emit(self, row: Row, event: Event) -> None:
        if row.on_event is None:
            return
        try:
            row.on_event(event)
        except Exception as error:                                 # its request ends, the others continue
            row.on_event = None
            self._end(Order(row.number, None, "error", f"{type(error).__name__}: {error}"))
