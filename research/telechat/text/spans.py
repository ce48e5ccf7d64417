"""What the renderer makes of a conversation: spans of ids and texts, and the results of training and asking."""
from typing import List, NamedTuple, Optional, Tuple


class Span(NamedTuple):
    """A stretch of a conversation: ids of markers, or a text whose first `skip` ids are not part of it."""

    ids: Tuple[int, ...] = ()
    text: Optional[str] = None
    loss: bool = False
    skip: int = 0
    tail: int = 0                            # that many ids at its end are a marker in words and carry no loss


def marker_span(token: Optional[int]) -> Span:
    """The span of a marker; an empty one where there is none."""
    return Span(() if token is None else (token,))


class Plan(NamedTuple):
    """A conversation before its texts are encoded. `turns`: index of the span with which each turn begins."""

    spans: List[Span]
    turns: List[int]
    separator: int = 0                       # number of ids between two turns

    @property
    def texts(self) -> List[str]:
        """The texts to be encoded, in order."""
        return [span.text for span in self.spans if span.text is not None]


class Rendered(NamedTuple):
    """A conversation as ids. What precedes turns[0] (start marker, system prompt) begins every part of it."""

    ids: List[int]
    loss: List[Tuple[int, bool]]             # run lengths: (number of ids, whether the loss counts there)
    turns: List[int]                         # position at which each turn begins
    separator: int = 0                       # number of ids between two turns, which belong to neither
    opening: int = 1                         # number of ids of the marker with which a turn begins

    def mask(self) -> List[int]:
        """1 where the loss counts, else 0; as long as `ids`."""
        return [int(on) for length, on in self.loss for _ in range(length)]


class Layout(NamedTuple):
    """Where the turns of a conversation are, as in `Rendered`."""

    turns: List[int]
    separator: int = 0
    opening: int = 1


class Prompt(NamedTuple):
    """A prompt that fits: what of the history had to go is said, not hidden."""

    ids: List[int]
    dropped_turns: int = 0                   # oldest turns that are not in it
    cut_tokens: int = 0                      # ids missing at the beginning of the last question
