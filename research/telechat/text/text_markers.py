"""Markers that are ordinary text, as 52B writes them: encoded as words where the renderer puts them, spelt letter by
letter where somebody typed them, so that their ids differ."""
import re
from functools import cached_property
from typing import List, Sequence, Tuple

from research.telechat.text.spans import Span
from research.telechat.text.vocab import Vocab


class TextMarkers:
    """The `words` that are markers in text of one vocabulary, and texts that continue others."""

    def __init__(self, vocab: Vocab, words: Sequence[str]):
        self.vocab = vocab
        self._typed = re.compile("(" + "|".join(map(re.escape, words)) + ")")
        self._spelt = {word: tuple(token for char in word for token in self.continued(char)) for word in words}

    @cached_property
    def _continuation(self) -> int:
        """Number of ids in front of a text that is encoded behind a line end, where no dummy prefix is added."""
        line_end = self.vocab.encode("\n")
        return len(line_end) if self.vocab.encode("\n<")[:len(line_end)] == line_end else 0

    def continued(self, text: str) -> List[int]:
        """Ids of a text that continues another one: without the dummy prefix of SentencePiece."""
        skip = self._continuation
        return self.vocab.encode("\n" + text)[skip:] if skip else self.vocab.encode(text)

    def continued_span(self, text: str, continues: bool, loss: bool) -> Span:
        """A text to encode, as `continued` does where it `continues` another one."""
        skip = self._continuation if continues else 0
        return Span(text="\n" + text if skip else text, loss=loss, skip=skip)

    def guarded(self, parts: List[Tuple[str, bool]], loss: bool = False) -> List[Span]:
        """One text of several parts, (text, typed by somebody): typed markers become spelt ids."""
        spans: List[Span] = []
        text = ""
        for part, typed in parts:
            pieces = self._typed.split(part) if typed else [part]
            for index, piece in enumerate(pieces):
                if index % 2:
                    spans += [self.continued_span(text, bool(spans), loss), Span(self._spelt[piece], loss=loss)]
                    text = ""
                else:
                    text += piece
        return [*spans, self.continued_span(text, bool(spans), loss)]
