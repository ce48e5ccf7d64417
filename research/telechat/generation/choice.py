"""Chooses the next token of one sequence as its request says, with the requested log-probabilities. NumPy only."""
from typing import List, Optional, Sequence, Tuple, Union

import numpy as np

from research.telechat.generation.batch import Row
from research.telechat.generation.requests import NO_LOGPROBS, Alternatives, Finished, PromptScores, Token
from research.telechat.generation.sampling import adjust, choose

Chosen = Union[Token, Finished]
CONSTRAINT = "the constraint of the answer"     # begins the message of an error that is the request's


def pick(row: Row, logits: np.ndarray) -> Chosen:
    """The next token from `logits` [V] float32; Finished("error") if the request's constraint allows none."""
    request = row.request
    scores = adjust(logits, row.sequence, row.length - row.prompt_length, row.ends, request.sampling)
    if request.constraint is not None:
        try:
            allowed = request.constraint.allowed()
        except Exception as error:                 # from the constraint's code: the other requests continue
            return Finished("error", f"{CONSTRAINT} failed: {type(error).__name__}: {error}")
        scores[~allowed] = -np.inf
        if scores.max() == -np.inf:
            return Finished("error", f"{CONSTRAINT} allows no token")
    token = choose(scores, request.sampling, row.rng)
    if request.top_logprobs == NO_LOGPROBS:
        return Token(token)
    return Token(token, *log_probabilities(logits, token, request.top_logprobs))


def log_probabilities(logits: np.ndarray, token: int, top: int) -> Tuple[float, Alternatives]:
    """(log-probability of `token`, the `top` most likely tokens with theirs) under softmax of `logits` [V] float32."""
    highest = float(logits.max())
    total = highest + float(np.log(np.exp(logits - np.float32(highest)).sum(dtype=np.float64)))
    if not top:
        return float(logits[token]) - total, ()
    top = min(top, len(logits))
    ids = np.argpartition(-logits, top - 1)[:top]
    ids = ids[np.lexsort((ids, -logits[ids]))]
    return float(logits[token]) - total, tuple((int(i), float(logits[i]) - total) for i in ids)


class Scores:
    """Scores of a prompt that is prefilled piece by piece."""

    def __init__(self, top: int):
        self._top = max(top, 0)
        self._logprobs: List[Optional[float]] = [None]
        self._alternatives: List[Alternatives] = [()]

    def add(self, logits: np.ndarray, targets: Sequence[int]) -> None:
        """logits: [S, V] or more rows; targets: the S next tokens."""
        for row, token in zip(logits, targets):
            logprob, top = log_probabilities(row, int(token), self._top)
            self._logprobs.append(logprob)
            self._alternatives.append(top)

    def event(self) -> PromptScores:
        """The scores of all tokens of the prompt."""
        return PromptScores(tuple(self._logprobs), tuple(self._alternatives))
