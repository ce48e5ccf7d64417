"""The scheduler's requests, events and errors. NumPy only.

A request is one prompt with the settings of its answer. `Scheduler.submit` puts it into the queue; from then on the
scheduler calls the request's `on_event` from the thread that runs the steps, in this order:

    Started, [PromptScores], Token, Token, ..., Finished

`Finished` comes exactly once for every accepted request, even if it is cancelled in the queue (then it is the only
event). `on_event` must return at once, as all other answers wait for it; if it raises, the request ends with
`Finished("error")`, without calling it again. The end token of an answer comes as a `Token` like all others.
"""
import threading
from dataclasses import dataclass
from typing import Callable, FrozenSet, NamedTuple, Optional, Protocol, Tuple, Union

import numpy as np

from research.telechat.common.errors import ConfigError, UserError
from research.telechat.generation.sampling import Sampling

NO_LOGPROBS = -1
Alternatives = Tuple[Tuple[int, float], ...]     # (token, natural logarithm of its probability), most likely first


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
        ConfigError: an invalid field; the message names it.
    """

    prompt: Tuple[int, ...]                      # token ids, at least one
    sampling: Sampling
    max_new_tokens: int                          # 0 only with prompt_logprobs: just score the prompt
    end_tokens: FrozenSet[int] = frozenset()     # any of them ends the answer and is its last token
    seed: Optional[int] = None                   # for sampling, 0 to 2^32 - 1; None: a new one each time
    top_logprobs: int = NO_LOGPROBS              # alternatives per token; 0: only the token's own; -1: none at all
    prompt_logprobs: bool = False                # score the prompt, with the same number of alternatives
    constraint: Optional[TokenConstraint] = None

    def __post_init__(self) -> None:
        least = 0 if self.prompt_logprobs else 1
        checks = (("prompt", len(self.prompt) > 0, "at least one token", self.prompt),
                  ("max_new_tokens", _whole(self.max_new_tokens) and self.max_new_tokens >= least,
                   f"a whole number, at least {least}", self.max_new_tokens),
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
    """The request has left the queue; its prompt is being prefilled."""

    prompt_tokens: int
    cached_tokens: int                           # of these, tokens that were already cached


class PromptScores(NamedTuple):
    """Natural logarithms of the probabilities of the prompt's tokens, each given all previous ones."""

    logprobs: Tuple[Optional[float], ...]        # one per token of the prompt; None for the first
    top: Tuple[Alternatives, ...]                # likewise; the first is empty


class Token(NamedTuple):
    """The next token of the answer. Its log-probability is that of the model's own logits: before temperature,
    penalties, bias and constraint."""

    id: int
    logprob: Optional[float] = None              # None if not requested
    top: Alternatives = ()


class Finished(NamedTuple):
    """The last event of a request.

    reason: stop (an end token), length (max_new_tokens or the model's context), cancelled, or error, explained by
    `message`.
    """

    reason: str
    message: str = ""


Event = Union[Started, PromptScores, Token, Finished]
OnEvent = Callable[[Event], None]


class RequestTooLong(ConfigError):
    """A request that can never fit this model and cache. `limit`: tokens of prompt and answer together that fit."""

    def __init__(self, message: str, limit: int):
        super().__init__(message)
        self.limit = limit


class QueueFull(UserError, RuntimeError):
    """Too many requests are waiting. `retry_after`: estimated seconds until a retry makes sense."""

    def __init__(self, message: str, retry_after: float):
        super().__init__(message)
        self.retry_after = retry_after


class Draining(UserError, RuntimeError):
    """No new requests are accepted: running ones are finished, then the scheduler ends."""


@dataclass(frozen=True)
class Ticket:
    """Identifies an accepted request."""

    number: int


class Stats(NamedTuple):
    """The state of a scheduler and its totals since the start."""

    waiting: int                                 # requests in the queue
    running: int                                 # requests in prefill or decoding
    blocks_total: int                            # of the KV cache
    blocks_used: int                             # by running requests
    blocks_cached: int                           # unused, but kept for reuse by later prompts
    steps: int
    submitted: int
    finished: int                                # by stop or length
    cancelled: int
    failed: int
    prompt_tokens: int                           # of all started requests
    cached_tokens: int                           # of these, tokens that did not have to be prefilled
    generated_tokens: int


class SchedulerLike(Protocol):
    """The interface of generation/scheduler.py to a server. `submit`, `cancel`, `drain` and `stats` may be called from
    any thread, `step` and `run` from one only."""

    def submit(self, request: Request, on_event: OnEvent) -> Ticket:
        """Put a request into the queue. Raises RequestTooLong, ConfigError (tokens outside the vocabulary), QueueFull,
        Draining."""

    def cancel(self, ticket: Ticket) -> None:
        """End a request at the next step, with Finished("cancelled"). No effect if it has already ended."""

    def step(self) -> bool:
        """Prefill prompts and decode one token of every running answer. -> whether anything is left to do."""

    def run(self, stop: threading.Event) -> None:
        """Step while there is anything to do, and wait for requests, until `stop` is set (running requests are then
        cancelled) or until all are finished after `drain`."""

    def drain(self) -> None:
        """Accept no new requests from now on."""

    def stats(self) -> Stats:
        """The current state."""
