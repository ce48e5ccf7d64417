"""From a request to the parts of its answers: submits to the scheduler, follows its events in the web server's loop.

The engine's thread only appends to a list; detokenisation and everything else happens here. A slow reader gets fewer,
longer parts and blocks nobody else.
"""
import asyncio
import time
from collections import deque
from dataclasses import dataclass, field
from typing import AsyncIterator, Callable, Deque, Dict, FrozenSet, List, NamedTuple, Optional, Sequence, Tuple

from research.telechat.common.errors import ConfigError
from research.telechat.generation.choice import CONSTRAINT
from research.telechat.generation.requests import (
    Draining,
    Event,
    Finished,
    PromptScores,
    QueueFull,
    Request,
    RequestTooLong,
    SchedulerLike,
    Started,
    Ticket,
    Token,
)
from research.telechat.generation.sampling import Sampling
from research.telechat.serve.errors import ApiError
from research.telechat.serve.metrics import Metrics
from research.telechat.serve.text import AnswerText, Part
from research.telechat.text.renderer import Renderer

_GREEDY = Sampling()


@dataclass(frozen=True)
class Engine:
    """The scheduler of a loaded model, with what is needed to submit requests.

    `context`: tokens of prompt and answer together; `vocab_size`: of the model; `sampling`, `max_new_tokens`: defaults
    of a request; `ends`: tokens that end an answer.
    """

    scheduler: SchedulerLike
    renderer: Renderer
    context: int
    vocab_size: int
    sampling: Sampling = _GREEDY
    max_new_tokens: Optional[int] = None
    ends: FrozenSet[int] = field(default_factory=frozenset)


class Choice(NamedTuple):
    """One requested answer: its request, and how its tokens become text."""

    request: Request
    text: AnswerText


class Update(NamedTuple):
    """New output of answer number `answer`. `tokens`: those of `part`, with their log-probabilities; `finish`: empty
    while it grows, then stop, length or tool_calls."""

    answer: int
    part: Part
    tokens: Tuple[Token, ...] = ()
    scores: Optional[PromptScores] = None
    finish: str = ""


@dataclass
class Usage:
    """Token counts of all answers to one request. A prompt with several answers counts once."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


class Mailbox:
    """Passes events from the engine's thread to the event loop in which it is created."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._ready = asyncio.Event()
        self._woken = False
        self.closed = False                              # there is no reader any more
        self._events: Deque[Tuple[float, int, Event]] = deque()

    def put(self, index: int) -> Callable[[Event], None]:
        """A callback for events of answer `index`; may be called from any thread."""
        def put(event: Event) -> None:
            if self.closed:
                return
            self._events.append((time.perf_counter(), index, event))
            if not self._woken:
                self._woken = True
                self._loop.call_soon_threadsafe(self._ready.set)
        return put

    async def take(self) -> List[Tuple[float, int, Event]]:
        """All pending events with their times; waits for the first one."""
        await self._ready.wait()
        self._ready.clear()
        self._woken = False
        return [self._events.popleft() for _ in range(len(self._events))]


@dataclass
class _State:
    """An answer in progress."""

    text: AnswerText
    started: bool = False
    done: bool = False
    last_token: float = 0.0
    pending: List[Token] = field(default_factory=list)    # tokens whose text is held back


class Answers:
    """The answers to one request. Use as `async with`: unfinished answers are cancelled at the end.

    Attributes: `usage`, so far.
    """

    def __init__(self, engine: Engine, choices: Sequence[Choice], metrics: Metrics, queue_timeout: float = 0,
                 prompts: int = 1):
        """
        Args:
            queue_timeout: seconds that it may wait in the queue; 0: no limit.
            prompts: number of different prompts, each with the same number of answers.

        Raises:
            ApiError: too many requests wait, a request that can never fit, a server that is stopping.
        """
        self.usage = Usage()
        self._scheduler, self._metrics, self._timeout = engine.scheduler, metrics, queue_timeout
        self._ends = [choice.request.end_tokens for choice in choices]
        self._states = [_State(choice.text) for choice in choices]
        self._each = max(len(choices) // prompts, 1)
        self._mailbox = Mailbox()
        self._tickets: List[Ticket] = []
        self._begun = time.perf_counter()
        try:
            for index, choice in enumerate(choices):
                self._tickets.append(engine.scheduler.submit(choice.request, self._mailbox.put(index)))
        except BaseException as err:
            self.close()
            raise _refusal(err, engine.context) from err

    async def __aenter__(self) -> "Answers":
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def fail(self, message: str) -> None:
        """End all answers with an error; may be called from any thread."""
        for index in range(len(self._states)):
            self._mailbox.put(index)(Finished("error", message))

    def close(self) -> None:
        """Cancel unfinished answers."""
        self._mailbox.closed = True
        for ticket, state in zip(self._tickets, self._states):
            if not state.done:
                state.done = True
                self._scheduler.cancel(ticket)

    async def updates(self) -> AsyncIterator[Update]:
        """All answers as they grow. Raises ApiError if one cannot be finished."""
        while not all(state.done for state in self._states):
            for index, events in _by_index(await self._take()).items():
                update = self._follow(index, events)
                if update is not None:
                    yield update

    async def _take(self) -> List[Tuple[float, int, Event]]:
        waiting = self._timeout and not any(state.started for state in self._states)
        if not waiting:
            return await self._mailbox.take()
        left = self._timeout - (time.perf_counter() - self._begun)
        try:
            return await asyncio.wait_for(self._mailbox.take(), max(left, 0.001))
        except asyncio.TimeoutError:
            raise ApiError(429, f"the request timed out after {self._timeout:g} s in the queue; try again later",
                           code="queue_timeout", retry_after=self._timeout) from None

    def _follow(self, index: int, events: List[Tuple[float, Event]]) -> Optional[Update]:
        """Apply `events` to answer `index`; None if there is nothing to show yet."""
        state = self._states[index]
        part, scores, finish = Part(), None, ""
        for moment, event in events:
            if state.done:
                break                                    # tokens after a stop string
            if isinstance(event, Started):
                self._start(index, moment, event)
            elif isinstance(event, PromptScores):
                scores = event
            elif isinstance(event, Token):
                self._time(state, moment)
                self.usage.completion_tokens += 1
                state.pending.append(event)
                if event.id in self._ends[index]:
                    continue
                part = _joined(part, state.text.feed(event.id))
                if state.text.stopped:
                    finish = "stop"
                    self._scheduler.cancel(self._tickets[index])
            elif isinstance(event, Finished):
                finish = _finish(event)
                part = _joined(part, state.text.end())
            if finish:
                state.done = True
        if not (part or scores or finish):
            return None
        if state.text.called and finish == "stop":
            finish = "tool_calls"
        tokens, state.pending = tuple(state.pending), []
        return Update(index, part, tokens, scores, finish)

    def _start(self, index: int, moment: float, event: Started) -> None:
        state = self._states[index]
        state.started = True
        self._metrics.queue_seconds.observe(moment - self._begun)
        if index % self._each == 0:
            self.usage.prompt_tokens += event.prompt_tokens
            self.usage.cached_tokens += event.cached_tokens

    def _time(self, state: _State, moment: float) -> None:
        if state.last_token:
            self._metrics.between_tokens_seconds.observe(moment - state.last_token)
        else:
            self._metrics.first_token_seconds.observe(moment - self._begun)
        state.last_token = moment


def _by_index(events: List[Tuple[float, int, Event]]) -> Dict[int, List[Tuple[float, Event]]]:
    """Events of each answer, in order."""
    found: Dict[int, List[Tuple[float, Event]]] = {}
    for moment, index, event in events:
        found.setdefault(index, []).append((moment, event))
    return found


def _joined(one: Part, other: Part) -> Part:
    return Part(one.content + other.content, one.reasoning + other.reasoning, one.calls + other.calls)


def _finish(event: Finished) -> str:
    """The finish reason of an answer that ended normally. Raises ApiError for any other."""
    if event.reason == "error" and event.message.startswith(CONSTRAINT):
        raise ApiError(400, f"the schema cannot be used for this answer: {event.message}", code="constraint_failed")
    if event.reason == "error":
        raise ApiError(500, f"the answer could not be completed: {event.message}", code="engine_error")
    if event.reason == "cancelled":
        raise ApiError(503, "the server is stopping, the answer was not completed", code="server_stopping",
                       retry_after=5)
    return event.reason


def _refusal(err: BaseException, context: int) -> BaseException:
    """The scheduler's refusal as an error for the client."""
    if isinstance(err, QueueFull):
        return ApiError(429, str(err), code="queue_full", retry_after=err.retry_after)
    if isinstance(err, Draining):
        return ApiError(503, "the server is stopping and takes no new requests", code="server_stopping", retry_after=5)
    if isinstance(err, RequestTooLong):
        return ApiError(400, f"{err} (prompt and answer together: at most {err.limit} tokens)", "messages",
                        "context_length_exceeded")
    if isinstance(err, ConfigError):
        return ApiError(400, str(err))
    return err
