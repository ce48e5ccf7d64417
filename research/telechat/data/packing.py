"""Splitting long conversations and packing short ones into records of one fixed length, with little loss and padding.

Pure Python and NumPy on token ids: no text, no files. A piece is an int32 array in which an id without loss is stored
as its bitwise complement (~id, negative): one array holds both tokens and mask.
"""
import random
from itertools import islice
from typing import Dict, Iterable, Iterator, List, NamedTuple, Sequence, Tuple, Union

import numpy as np

from research.telechat.text.spans import Layout, Rendered

LONG_MODES = ("split", "truncate", "drop")
WHOLE = "whole"                              # fate of a conversation or document that was not split
IGNORED = -100                               # label without loss
_ROWS = 64                                   # records made at once
HELD_TOKENS = 1 << 25                        # in the shuffle buffer and in the batch being packed: 128 MiB each
_CONTEXT_SHARE = 0.5                         # of the length, at most, repeats tokens that an earlier part trained
_LEAST_ANSWER = 16                           # a question keeps its beginning if it leaves this many answer tokens


class Cut(NamedTuple):
    """The result of splitting one conversation. kept + dropped == len(marked)."""

    pieces: List[np.ndarray]
    kept: int                                # tokens of the conversation that are in some piece
    dropped: int                             # tokens that are in none
    repeated: int                            # tokens in later pieces that repeat earlier ones, as context without loss
    fate: str                                # "whole", "split", "truncated", or why it was dropped
    fresh: Sequence[int] = ()                # per piece: tokens that are in no earlier piece


def cut(layout: Union[Layout, Rendered], marked: np.ndarray, limit: int, long: str = "split") -> Cut:
    """A conversation split into pieces of at most `limit` tokens.

    Args:
        layout: where its turns are.
        marked: its ids, complemented where they carry no loss.
        limit: tokens of one record.
        long: what to do with a longer one. "split": parts at turn boundaries. Every part starts with what precedes the
            first turn (start marker, system prompt), then earlier turns as context without loss (up to half of the
            length, and what the new turns leave free), then as many new turns as fit. A single turn that is too long
            continues in the next part with the preceding tokens as context. "truncate": the first part only. "drop":
            nothing.
    """
    if not (marked[1:] >= 0).any():
        return Cut([], 0, len(marked), 0, "nothing to train")
    if len(marked) <= limit:
        return Cut([marked], len(marked), 0, 0, WHOLE, [len(marked)])
    if long == "drop":
        return Cut([], 0, len(marked), 0, "longer than the length")
    head = layout.turns[0]
    if limit - head < min(2 * _LEAST_ANSWER, limit // 2):
        return Cut([], 0, len(marked), 0, "system prompt fills the length")
    spans = _spans(layout, len(marked))
    windows = _windows(spans, marked, limit - head, layout.opening)
    bodies = [np.concatenate([without_loss(marked[start:end], max(new - start, 0)) for start, end in parts])
              for parts, new in windows]
    chosen = [number for number, body in enumerate(bodies) if (body >= 0).any()]     # the others have no loss
    if not chosen:
        return Cut([], 0, len(marked), 0, "nothing to train")
    if long == "truncate":
        chosen = chosen[:1]
    pieces, fresh, covered = [], [], np.zeros(len(marked), bool)
    covered[:head] = True
    known = 0                                                # tokens of the conversation in the pieces so far
    for parts, body in ((windows[number][0], bodies[number]) for number in chosen):
        pieces.append(np.concatenate([marked[:head], body]))
        for start, end in parts:
            covered[start:end] = True
        fresh.append(int(covered.sum()) - known)
        known += fresh[-1]
    repeated = sum(map(len, pieces)) - known
    return Cut(pieces, known, len(marked) - known, repeated, "truncated" if long == "truncate" else "split", fresh)


def without_loss(marked: np.ndarray, count: int) -> np.ndarray:
    """The same piece with the loss of the first `count` tokens masked."""
    if count <= 0:
        return marked
    front = marked[:count]
    return np.concatenate([np.where(front >= 0, ~front, front), marked[count:]])


def _spans(layout: Union[Layout, Rendered], size: int) -> List[Tuple[int, int]]:
    """(start, end) of each turn, without the separators between them."""
    ends = [start - layout.separator for start in layout.turns[1:]] + [size]
    return list(zip(layout.turns, ends))


Window = Tuple[List[Tuple[int, int]], int]       # parts (start, end) to be joined; position from which tokens are new


def _windows(spans: List[Tuple[int, int]], marked: np.ndarray, room: int, opening: int) -> List[Window]:
    """Which tokens go into which piece, not counting the head; `room`: tokens of a piece without the head."""
    windows: List[Window] = []
    starts, ends = zip(*spans)
    number = 0
    while number < len(spans):
        if ends[number] - starts[number] > room:
            windows += _turn_windows(*spans[number], marked, room, opening)
            number += 1
            continue
        first = last = number
        budget = min(int(room * _CONTEXT_SHARE), room - (ends[number] - starts[number]))
        while first > 0 and starts[number] - starts[first - 1] <= budget:
            first -= 1
        while last + 1 < len(spans) and ends[last + 1] - starts[first] <= room:
            last += 1
        while first > 0 and ends[last] - starts[first - 1] <= room:
            first -= 1
        windows.append(([(starts[first], ends[last])], starts[number]))
        number = last + 1
    return windows


def _turn_windows(start: int, end: int, marked: np.ndarray, room: int, opening: int) -> Iterator[Window]:
    """A single turn that is too long: windows over its tokens, each beginning with some tokens of the previous one.

    Only if the question alone fills a window does it lose its beginning (after the marker), as in a chat.
    """
    answer = start + int(np.argmax(marked[start:end] >= 0))
    least = min(_LEAST_ANSWER, room // 2, end - answer)
    if answer - start + least > room:
        front = min(opening, room // 4)
        tail = answer - max(room // 2, room - (end - answer)) + front       # half of it, or what the answer leaves free
        done = min(tail + room - front, end)
        yield [(start, start + front), (tail, done)], start
    else:
        done = start + room
        yield [(start, done)], start
    context = int(room * _CONTEXT_SHARE)
    while done < end:
        first = done - context
        new, done = done, min(first + room, end)
        yield [(first, done)], new


class ShuffleBuffer:
    """Shuffles a stream of pieces within a bounded window, reproducibly.

    The next piece is drawn from `size` pieces, or fewer if these exceed `max_tokens`; 0 keeps the order.
    """

    def __init__(self, size: int, seed: int, max_tokens: int = HELD_TOKENS):
        self._size, self._max_tokens, self._rng = size, max_tokens, random.Random(seed)
        self._items: List[np.ndarray] = []
        self._tokens = 0

    def add(self, item: np.ndarray) -> Iterator[np.ndarray]:
        """Add a piece; yields those that leave the buffer."""
        self._items.append(item)
        self._tokens += len(item)
        while len(self._items) > self._size or self._tokens > self._max_tokens:
            index = self._rng.randrange(len(self._items))
            self._items[index], self._items[-1] = self._items[-1], self._items[index]
            self._tokens -= len(self._items[-1])
            yield self._items.pop()

    def flush(self) -> Iterator[np.ndarray]:
        """The remaining pieces, shuffled."""
        self._rng.shuffle(self._items)
        yield from self._items
        self._items, self._tokens = [], 0


class FirstFitPacker:
    """Packs pieces into packs of at most `capacity` tokens: first-fit decreasing per batch.

    Pieces are processed in batches of 4 * `window`, or of `max_tokens`; after a batch the `window` emptiest packs stay
    open for the next one. So memory is bounded, and padding is small as long as some pieces are short. The packs of a
    batch are returned in shuffled order, as they would otherwise go from long to short pieces.
    """

    def __init__(self, capacity: int, window: int = 256, max_pieces: int = 1 << 30, seed: int = 0,
                 max_tokens: int = HELD_TOKENS):
        self._capacity, self._max_pieces, self._max_tokens = capacity, max_pieces, max_tokens
        self._window = max(min(window, max_tokens // capacity), 1)
        self._batch_size = 4 * window
        self._batch: List[np.ndarray] = []
        self._tokens = 0
        self._packs: List[List[np.ndarray]] = []             # the open ones
        self._room = np.zeros(self._batch_size + window, np.int64)
        self._rng = random.Random(seed)

    def add(self, piece: np.ndarray) -> Iterator[List[np.ndarray]]:
        """Add a piece; yields the packs that this completes."""
        self._batch.append(piece)
        self._tokens += len(piece)
        if len(self._batch) == self._batch_size or self._tokens >= self._max_tokens:
            yield from self._pack_batch(self._window)

    def flush(self) -> Iterator[List[np.ndarray]]:
        """The packs that are still open."""
        yield from self._pack_batch(0)

    def _pack_batch(self, keep: int) -> List[List[np.ndarray]]:
        for piece in sorted(self._batch, key=len, reverse=True):
            count = len(self._packs)
            index = int(np.argmax(self._room[:count] >= len(piece))) if count else 0
            if not count or self._room[index] < len(piece):
                index = count
                self._packs.append([])
                self._room[index] = self._capacity
            self._packs[index].append(piece)
            self._room[index] -= len(piece)
            if len(self._packs[index]) >= self._max_pieces:
                self._room[index] = 0
        self._batch.clear()
        self._tokens = 0
        order = np.argsort(-self._room[:len(self._packs)], kind="stable").tolist()
        open_packs = [index for index in order[:keep] if self._room[index] > 0]
        finished = [self._packs[index] for index in order[len(open_packs):]]
        self._room[:len(open_packs)] = self._room[open_packs]
        self._packs = [self._packs[index] for index in open_packs]
        self._rng.shuffle(finished)
        return finished


def to_records(packs: Iterable[List[np.ndarray]], length: int, pad_id: int, padding_side: str = "right",
               slots: int = 0) -> Iterator[Dict[str, np.ndarray]]:
    """The columns of one record for each pack. Vectorised over `_ROWS` of them for speed.

    Args:
        packs: each of pieces, together at most `length` tokens.
        length: N + 1, as the model is trained on input_ids[:-1] with labels[1:].
        pad_id: fills input_ids.
        padding_side: "left" or "right".
        slots: length of the column actual_seq_len; 0: no such column. At least len(pack) + 1.

    Returns:
        int32 arrays: input_ids [length]; labels [length], the id where the loss counts, else -100; with `slots`
        actual_seq_len [slots]: the end position of each piece (padding counts as one) among the N training positions,
        ascending, the rest filled with N.
    """
    packs = iter(packs)
    for block in iter(lambda: list(islice(packs, _ROWS)), []):
        marked = np.full((len(block), length), ~pad_id, np.int32)
        offsets = []
        for row, pack in zip(marked, block):
            size = sum(map(len, pack))
            offsets.append(length - size if padding_side == "left" else 0)
            np.concatenate(pack, out=row[offsets[-1]:offsets[-1] + size])
        columns = [marked ^ (marked >> 31), np.where(marked < 0, IGNORED, marked).astype(np.int32, copy=False)]
        for input_ids, labels, pack, offset in zip(*columns, block, offsets):
            ends = {"actual_seq_len": _ends(pack, length, offset, slots)} if slots else {}
            yield {"input_ids": input_ids, "labels": labels, **ends}


def _ends(pack: List[np.ndarray], length: int, offset: int, slots: int) -> np.ndarray:
    sizes = ([offset] if offset else []) + [len(piece) for piece in pack]
    ends = np.full(slots, length - 1, np.int32)
    ends[:len(sizes)] = np.minimum(np.cumsum(sizes), length - 1)
    return ends


def pack_all(pieces: Iterable[np.ndarray], shuffle: ShuffleBuffer,
             packer: FirstFitPacker) -> Iterator[List[np.ndarray]]:
    """Packs from a stream of pieces, shuffled; flushes both at the end."""
    for piece in pieces:
        for shuffled in shuffle.add(piece):
            yield from packer.add(shuffled)
    for shuffled in shuffle.flush():
        yield from packer.add(shuffled)
    yield from packer.flush()
