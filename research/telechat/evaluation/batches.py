"""Which tokens of a text are scored, and how texts are batched into few shapes. NumPy only.

Every new shape compiles a graph. Texts are therefore padded on the right to a handful of lengths and sorted by length,
and every batch is full. Padding changes nothing: attention is causal. evaluation/score.py runs the model.
"""
from typing import Dict, Iterator, List, NamedTuple, Sequence, Tuple, Union

import numpy as np

LEAST_LENGTH = 64                # tokens of the shortest bucket; each next one is twice as long
FEW, MANY = 128, 512             # targets that go through the head at once: logits of 512 x 160,000 are 330 MB


class Scored(NamedTuple):
    """Token ids of a text (a list, or int32 [tokens]), of which the last `count` are scored, each given all before."""

    ids: Union[Sequence[int], np.ndarray]
    count: int  # type: ignore[assignment]    # hides tuple.count, which nobody calls


class Fitted(NamedTuple):
    """A request truncated to the model's context, with what was truncated."""

    scored: Scored
    lost_context: int = 0        # tokens missing at the beginning of the context
    lost_target: int = 0         # tokens at the beginning of the continuation that are not scored


def fit(context: Sequence[int], continuation: Sequence[int], limit: int) -> Fitted:
    """`continuation` given `context` (at least one token), truncated on the left to an input of `limit` tokens.

    The last token is only predicted, so that `limit` + 1 tokens fit.
    """
    ids = [*context, *continuation]
    cut = max(len(ids) - limit - 1, 0)
    lost_target = max(len(continuation) - limit, 0)
    return Fitted(Scored(ids[cut:], len(continuation) - lost_target), min(cut, len(context)), lost_target)


def rolling_windows(ids: Sequence[int], prefix: int, limit: int) -> List[Scored]:
    """Windows that score each of `ids` once, with as much context as fits into an input of `limit` tokens.

    The first window begins with the token `prefix`; the last one reaches back as far as it can.
    """
    text = [prefix, *ids]
    windows = []
    for start in range(0, len(ids), limit):                     # scores text[start + 1 .. end]
        end = min(start + limit, len(ids))
        windows.append(Scored(text[max(end - limit, 0):end + 1], end - start))
    return windows


def bucket_of(length: int, limit: int) -> int:
    """The padded length of `length` tokens: LEAST_LENGTH times a power of two, at most `limit`."""
    size = LEAST_LENGTH
    while size < length:
        size *= 2
    return min(size, limit)


class Target(NamedTuple):
    """One token to score: its row in the batch, the position before it, its id, and where its result belongs."""

    row: int
    position: int
    token: int
    request: int


class ScoreBatch(NamedTuple):
    """Input of the graph. B texts of S tokens; C x K targets, so that C times K rows of logits are computed."""

    tokens: np.ndarray           # [B, S] int32
    lengths: np.ndarray          # [B] int32, tokens without padding
    rows: np.ndarray             # [C, K] int32, index among the B S rows
    targets: np.ndarray          # [C, K] int32, ids; `ignored` behind the last one
    requests: np.ndarray         # [number of targets], the request of each
    texts: int                   # number of real texts among the B rows; the rest is padding


def score_batches(requests: Sequence[Scored], batch_size: int, limit: int, pad: int, ignored: int
                  ) -> Iterator[ScoreBatch]:
    """Batches of all requests, the longest first, so that an out-of-memory error comes at once.

    Requests with the same input are computed once: the choices A, B, C, D of a question are one token each.

    Args:
        requests: inputs (all but the last id) of at most `limit` tokens; those that score nothing are left out.
        batch_size: texts in a batch, B.
        limit: tokens of the longest input.
        pad: id behind the end of a text.
        ignored: id that marks an unused target.
    """
    same: Dict[bytes, List[int]] = {}
    for number, request in enumerate(requests):
        if request.count:
            same.setdefault(_input(request), []).append(number)
    inputs = sorted(same, key=len, reverse=True)
    start = 0
    while start < len(inputs):
        group = [np.frombuffer(ids, np.int32) for ids in inputs[start:start + batch_size]]
        size = bucket_of(len(group[0]), limit)
        group = [ids for ids in group if bucket_of(len(ids), limit) == size]
        targets = [target for row, ids in enumerate(group) for number in same[ids.tobytes()]
                   for target in _targets(row, requests[number], number)]
        start += len(group)
        yield _batch(group, targets, (batch_size, size), pad, ignored)


def count_texts(requests: Sequence[Scored]) -> int:
    """Number of different inputs among the requests: the work of `score_batches`."""
    return len({_input(request) for request in requests if request.count})


def _input(request: Scored) -> bytes:
    """The model's input for a request, as bytes: compact enough to keep fifty thousand of them."""
    return np.asarray(request.ids[:-1], np.int32).tobytes()


def _targets(row: int, request: Scored, number: int) -> List[Target]:
    first = len(request.ids) - request.count
    return [Target(row, first + place - 1, token, number) for place, token in enumerate(request.ids[first:])]


def _batch(group: List[np.ndarray], targets: List[Target], shape: Tuple[int, int], pad: int, ignored: int
           ) -> ScoreBatch:
    tokens = np.full(shape, pad, np.int32)
    lengths = np.ones(shape[0], np.int32)
    for row, ids in enumerate(group):
        tokens[row, :len(ids)] = ids
        lengths[row] = len(ids)
    width = FEW if len(targets) <= FEW else MANY
    chunks = 1
    while chunks * width < len(targets):
        chunks *= 2
    rows = np.zeros(chunks * width, np.int32)
    ids = np.full(chunks * width, ignored, np.int32)
    rows[:len(targets)] = [target.row * shape[1] + target.position for target in targets]
    ids[:len(targets)] = [target.token for target in targets]
    return ScoreBatch(tokens, lengths, rows.reshape(chunks, width), ids.reshape(chunks, width),
                      np.array([target.request for target in targets], np.int64), len(group))
