"""The conversations of a chunk as token ids with loss masks, from the ids of their texts: all at once, in NumPy.

`Renderer.assemble` does the same for one conversation; for the many of a data set its lists of Python numbers would
take as long as the tokenizer. An id without loss is marked as in data/packing.py.
"""
from typing import Dict, Iterator, List, NamedTuple, Sequence, Tuple

import numpy as np

from research.telechat.text.spans import Layout, Plan


class Assembled(NamedTuple):
    """Conversations one behind the other."""

    plans: Sequence[Plan]
    opening: int                             # number of ids of the marker with which a turn begins
    marked: np.ndarray                       # int32, ids of all; complemented where they carry no loss
    spans: List[int]                         # of each conversation: the index of its first span among all, and a last
    places: np.ndarray                       # int64, of each span: where its ids begin, and a last one

    @property
    def bounds(self) -> np.ndarray:
        """Where the ids of each conversation begin, and the end of the last, int64."""
        bounds: np.ndarray = self.places[self.spans]
        return bounds

    @property
    def lengths(self) -> np.ndarray:
        """Ids of each conversation, int64."""
        return np.diff(self.bounds)

    @property
    def trained(self) -> np.ndarray:
        """Whether any id of each conversation carries a loss, its first aside, which nothing predicts."""
        counts = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.marked >= 0)])
        starts, ends = self.bounds[:-1], self.bounds[1:]
        trained: np.ndarray = counts[ends] > counts[np.minimum(starts + 1, ends)]
        return trained

    def layout(self, number: int) -> Layout:
        """Where the turns of a conversation begin, counted from its own beginning."""
        first, plan = self.spans[number], self.plans[number]
        turns = self.places[[first + turn for turn in plan.turns]] - self.places[first]
        return Layout(turns.tolist(), plan.separator, self.opening)


def assemble(plans: Sequence[Plan], encoded: Iterator[np.ndarray], opening: int = 1) -> Assembled:
    """The conversations of `plans`. `encoded`: int32 ids of each of their texts, in order."""
    markers: Dict[Tuple[int, ...], np.ndarray] = {}
    parts: List[np.ndarray] = []
    losses: List[bool] = []
    tails: List[Tuple[int, int]] = []                        # (index of the span behind, ids without loss before it)
    spans = [0]
    for plan in plans:
        for ids, text, loss, skip, tail in plan.spans:
            if text is None:
                if ids not in markers:
                    markers[ids] = np.array(ids, np.int32)
                parts.append(markers[ids])
            else:
                part = next(encoded)
                parts.append(part[skip:] if skip else part)
            losses.append(loss)
            if tail:
                tails.append((len(parts), tail))
        spans.append(len(parts))
    sizes = np.fromiter(map(len, parts), np.int64, len(parts))
    places = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    marked = np.concatenate([np.zeros(0, np.int32), *parts])
    flip = np.repeat(np.array(losses, np.int32) - 1, sizes)  # 0 where the loss counts, else -1: x ^ -1 == ~x
    for behind, tail in tails:
        flip[places[behind] - tail:places[behind]] = -1
    return Assembled(plans, opening, marked ^ flip, spans, places)
