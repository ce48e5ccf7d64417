"""What is asked of the scheduler, what it answers, and how it refuses. NumPy only.

A request is one prompt and how its answer is chosen. `Scheduler.submit` puts it into the queue; from then on the
scheduler calls the request's `on_event` from the thread that runs the steps, in this order:

    Started, [PromptScores], Token, Token, ..., Finished

`Finished` comes exactly once for every request that was accepted, also when it waits and is cancelled (then it is the
only event). `on_event` must return at once, as all other answers wait for it; if it raises, the request ends with
`Finished("error")`, for which it is not called again. The end token of an answer comes as a `Token` like all others.
"""
import threading
from dataclasses import dataclass
from typing import Callable, FrozenSet, NamedTuple, Optional, Protocol, Tuple, Union

import numpy as np

from research.telechat.common.errors import ConfigError, UserError
from research.telechat.generation.sampling import Sampling

NO_LOGPROBS = -1
Alternatives = Tuple[Tuple[int, float], ...]     # (token, natural logarithm of its probability), the likeliest first


class TokenConstraint(Protocol):
    """Which tokens may come next, for answers of a given form (JSON, a grammar). One object serves one request."""

    def allowed(self) -> np.ndarray:
        """[V] bool, True where a token may come next; the end tokens where the answer may end. Called before each
        choice. At least one token must be allowed."""

    def advance(self, token: int) -> None:
        """`token` was chosen. Not called for an end token."""


@dataclass(frozen=True)
class Request:
    """One prompt, and how its answer is chosen.

    Raises:
        ConfigError: a field that makes no sense; the message names it.
    """

    prompt: Tuple[int, ...]                      # token ids, one at least
    sampling: Sampling
    max_new_tokens: int                          # 0 only with prompt_logprobs: the prompt is scored, nothing else
    end_tokens: FrozenSet[int] = frozenset()     # any of them ends the answer, and is its last token
    seed: Optional[int] = None                   # of sampling, 0 to 2^32 - 1; None: another one each time
    top_logprobs: int = NO_LOGPROBS              # alternatives at each token; 0: only the token's own; -1: none at all
    prompt_logprobs: bool = False                # score the prompt, with as many alternatives
    constraint: Optional[TokenConstraint] = None

    def __post_init__(self) -> None:
        least = 0 if self.prompt_logprobs else 1
        checks = (("prompt", len(self.prompt) > 0, "at least one token", self.prompt),
                  ("max_new_tokens", _whole(self.max_new_tokens) and self.max_new_tokens >= least,
                   f"a whole number, {least} at least", self.max_new_tokens),
                  ("seed", self.seed is None or (_whole(self.seed) and 0 <= self.seed < 2 ** 32),
                   "a whole number from 0 to 2^32 - 1", self.seed),
                  ("top_logprobs", _whole(self.top_logprobs) and self.top_logprobs >= NO_LOGPROBS,
                   "a whole number, -1 for none", self.top_logprobs))
        for name, good, expected, found in checks:
            if not good:
                raise ConfigError(f"{name}: expected {expected}, found {found!r}")


def _whole(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


class Started(NamedTuple):
    """The request has left the queue, and its prompt is being read."""

    prompt_tokens: int
    cached_tokens: int                           # of these, so many were in the cache already


class PromptScores(NamedTuple):
    """Natural logarithms of the probabilities of the prompt's tokens, each given all before."""

    logprobs: Tuple[Optional[float], ...]        # one for each token of the prompt; the first has none
    top: Tuple[Alternatives, ...]                # likewise; the first is empty


class Token(NamedTuple):
    """The next token of the answer. Its log-probability is that of the model's own logits: before temperature,
    penalties, bias and constraint."""

    id: int
    logprob: Optional[float] = None              # None where the request asks for none
    top: Alternatives = ()


class Finished(NamedTuple):
    """The last event of a request.

    reason: stop (an end token), length (max_new_tokens, or the model's context), cancelled, or error, which `message`
    explains.
    """

    reason: str
    message: str = ""


Event = Union[Started, PromptScores, Token, Finished]
OnEvent = Callable[[Event], None]


class RequestTooLong(ConfigError):
    """A request that this model and cache can never answer. `limit`: tokens of prompt and answer together that fit."""

    def __init__(self, message: str, limit: int):
        super().__init__(message)
        self.limit = limit


class QueueFull(UserError, RuntimeError):
    """Too many requests wait already. `retry_after`: seconds until it is worth another try, estimated."""

    def __init__(self, message: str, retry_after: float):
        super().__init__(message)
        self.retry_after = retry_after


class Draining(UserError, RuntimeError):
    """No new requests are taken: those under way are finished, then the scheduler ends."""


@dataclass(frozen=True)
class Ticket:
    """Names an accepted request."""

    number: int


class Stats(NamedTuple):
    """The state of a scheduler, and what it has done since it began."""

    waiting: int                                 # requests in the queue
    running: int                                 # requests whose prompt is being read or whose answer grows
    blocks_total: int                            # of the KV cache
    blocks_used: int                             # by running requests
    blocks_cached: int                           # by nobody, but kept: their prompts may come again
    steps: int
    submitted: int
    finished: int                                # by stop or length
    cancelled: int
    failed: int
    prompt_tokens: int                           # of all requests that were started
    cached_tokens: int                           # of these, so many did not have to be read
    generated_tokens: int


class SchedulerLike(Protocol):
    """What a server sees of generation/scheduler.py. `submit`, `cancel`, `drain` and `stats` may be called from any
    thread, `step` and `run` from one only."""

    def submit(self, request: Request, on_event: OnEvent) -> Ticket:
        """Put a request into the queue. Raises RequestTooLong, ConfigError (tokens that the model does not have),
        QueueFull, Draining."""

    def cancel(self, ticket: Ticket) -> None:
        """End a request at the next step, with Finished("cancelled"). Nothing happens if it has ended already."""

    def step(self) -> bool:
        """Read prompts and bring every running answer one token further. -> whether anything is left to do."""

    def run(self, stop: threading.Event) -> None:
        """Step while there is anything to do, and wait for requests, until `stop` is set (what runs then is
        cancelled), or until all are finished after `drain`."""

    def drain(self) -> None:
        """Take no new requests from now on."""

    def stats(self) -> Stats:
        """The state now."""
