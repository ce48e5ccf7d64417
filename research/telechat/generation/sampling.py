"""From logits to the next token: penalties, bias, temperature, top-k, top-p, minimum length. NumPy only.

Semantics and order are those of the official code, which uses transformers' processors: repetition penalty over prompt
and answer (Keskar et al., 2019), then, when sampling, temperature, top-k and top-p (Holtzman et al., 2020). Presence
penalty, frequency penalty and bias, which the official code does not have, follow the repetition penalty and are
defined as in OpenAI's API: logit - frequency * (times in the answer) - presence * (1 if in the answer) + bias.
"""
from dataclasses import dataclass
from typing import Iterable, Optional, Protocol, Tuple

import numpy as np

from research.telechat.common.errors import ConfigError

CANDIDATES = 1024            # tokens sorted for top-p before falling back to all of them


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Raises:
        ConfigError: an invalid value; the message names it.
    """

    do_sample: bool = False              # sample; else greedy
    temperature: float = 1.0             # divides the logits; only when sampling
    top_k: Optional[int] = None          # only the k most likely; None, 0: all; only when sampling
    top_p: Optional[float] = None        # only the most likely with this total probability; None, 1: all
    repetition_penalty: float = 1.0      # over 1: already seen tokens become less likely
    min_new_tokens: int = 0              # tokens before an answer may end
    presence_penalty: float = 0.0        # subtracted from the logit of each token in the answer
    frequency_penalty: float = 0.0       # subtracted once per occurrence in the answer
    logit_bias: Tuple[Tuple[int, float], ...] = ()     # (token, value added to its logit)

    def __post_init__(self) -> None:
        # Published settings combine temperature 0 with do_sample False.
        checks = (("do_sample", self.do_sample, "True or False", isinstance(self.do_sample, (bool, np.bool_))),
                  ("min_new_tokens", self.min_new_tokens, "a whole number from 0",
                   _whole(self.min_new_tokens) and self.min_new_tokens >= 0),
                  ("temperature", self.temperature, "a number above 0 (for greedy decoding, set do_sample to False)",
                   _number(self.temperature) and self.temperature >= (0 if not self.do_sample else 1e-9)),
                  ("top_k", self.top_k, "a whole number, 0 for all tokens",
                   self.top_k is None or (_whole(self.top_k) and self.top_k >= 0)),
                  ("top_p", self.top_p, "a number above 0, at most 1",
                   self.top_p is None or (_number(self.top_p) and 0 < self.top_p <= 1)),
                  ("repetition_penalty", self.repetition_penalty, "a number above 0 (1: none)",
                   _number(self.repetition_penalty) and self.repetition_penalty > 0),
                  ("presence_penalty", self.presence_penalty, "a number", _number(self.presence_penalty)),
                  ("frequency_penalty", self.frequency_penalty, "a number", _number(self.frequency_penalty)),
                  ("logit_bias", self.logit_bias, "pairs of token and number",
                   all(token >= 0 and _number(bias) for token, bias in self.logit_bias)))
        for name, value, expected, good in checks:
            if not good:
                raise ConfigError(f"{name}: expected {expected}, found {value!r}")

    @property
    def greedy(self) -> bool:
        """Whether the choice is the argmax of the unmodified logits."""
        return (not self.do_sample and self.repetition_penalty == 1.0 and self.min_new_tokens == 0
                and not self.presence_penalty and not self.frequency_penalty and not self.logit_bias)


def _whole(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _number(value: object) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and np.isfinite(value)


def adjust(logits: np.ndarray, seen: np.ndarray, new_tokens: int, eos: Iterable[int], sampling: Sampling) -> np.ndarray:
    """Apply penalties, bias and minimum length, for both greedy and sampled choice.

    logits: [V] float32; seen: ids of prompt and answer so far, `new_tokens` of them the answer's -> new array [V].
    Raises ConfigError: a bias for a token outside the vocabulary.
    """
    logits = logits.astype(np.float32)
    if sampling.repetition_penalty != 1.0:
        ids = np.unique(seen)
        scores = logits[ids]
        penalty = np.float32(sampling.repetition_penalty)
        logits[ids] = np.where(scores < 0, scores * penalty, scores / penalty)
    if (sampling.presence_penalty or sampling.frequency_penalty) and new_tokens:
        ids, counts = np.unique(seen[len(seen) - new_tokens:], return_counts=True)
        logits[ids] -= np.float32(sampling.frequency_penalty) * counts.astype(np.float32)
        logits[ids] -= np.float32(sampling.presence_penalty)
    for token, bias in sampling.logit_bias:
        if token >= len(logits):
            raise ConfigError(f"logit_bias: token {token} is outside the model's vocabulary of {len(logits)}")
        logits[token] += np.float32(bias)
    if new_tokens < sampling.min_new_tokens:
        logits[[token for token in eos if 0 <= token < len(logits)]] = -np.inf
    return logits


def candidates(logits: np.ndarray, sampling: Sampling) -> Tuple[np.ndarray, np.ndarray]:
    """Tokens that may be sampled, in order of their id, and their probabilities, which sum to 1.

    logits: [V] float32, after `adjust`. The token that crosses top_p is included; so are all ties at the k-th place.
    """
    ids = np.arange(len(logits))
    if sampling.top_k and sampling.top_k < len(logits):
        kth = np.partition(logits, -sampling.top_k)[-sampling.top_k]               # first, to save work on the others
        ids = np.flatnonzero(logits >= kth)
        logits = logits[ids]
    scores = logits.astype(np.float64) / sampling.temperature
    weights = np.exp(scores - scores.max())
    weights /= weights.sum()
    if sampling.top_p is not None and sampling.top_p < 1:
        chosen = np.sort(_nucleus(weights, sampling.top_p))
        ids, weights = ids[chosen], weights[chosen]
        weights = weights / weights.sum()
    return ids, weights


def _nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """Indices of the smallest set of the largest weights (which sum to 1) with a sum of at least top_p."""
    order = None
    if len(weights) > 2 * CANDIDATES:
        order = np.argpartition(-weights, CANDIDATES)[:CANDIDATES]
        if weights[order].sum() < top_p:
            order = None
    if order is None:
        order = np.arange(len(weights))
    order = order[np.argsort(-weights[order], kind="stable")]
    return order[:int(np.searchsorted(np.cumsum(weights[order]), top_p)) + 1]


class Random(Protocol):
    """A source of random numbers, as NumPy's `RandomState` or its module `random`."""

    def random_sample(self, size: None = None) -> float: ...


def choose(logits: np.ndarray, sampling: Sampling, rng: Random) -> int:
    """The next token for logits [V] after `adjust`. rng: has NumPy's `random_sample`; called once when sampling."""
    if not sampling.do_sample:
        return int(np.argmax(logits))
    ids, weights = candidates(logits, sampling)
    place = int(np.searchsorted(np.cumsum(weights), rng.random_sample(), side="right"))
    return int(ids[min(place, len(ids) - 1)])
