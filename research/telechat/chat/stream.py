"""Text that comes piece by piece: up to a stop string, and reasoning apart from the answer."""
from typing import List, NamedTuple, Sequence


class Piece(NamedTuple):
    """A piece of what a model writes: of its answer, or of the reasoning before it."""

    text: str
    reasoning: bool = False


class StopFilter:
    """Lets text through up to the stop string that is complete first, however the text is divided into pieces."""

    def __init__(self, stops: Sequence[str]):
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """What may be shown now. What could be the beginning of a stop string is held back."""
        if self.stopped:
            return ""
        self._held += text
        found = [(self._held.find(stop) + len(stop), -len(stop)) for stop in self._stops if stop in self._held]
        if found:
            end, size = min(found)
            self.stopped = True
            shown, self._held = self._held[:end + size], ""
            return shown
        keep = max((size for stop in self._stops for size in range(1, len(stop))
                    if self._held.endswith(stop[:size])), default=0)
        shown, self._held = self._held[:len(self._held) - keep], self._held[len(self._held) - keep:]
        return shown

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        shown, self._held = self._held, ""
        return shown


_CLOSE = "</think>"


class ThinkFilter:
    """Tells reasoning from the answer behind it, however the text is divided into pieces.

    Args:
        thinking: the text begins within the reasoning, as the prompt has opened it. It ends at </think>; line ends
            around it and around that marker belong to neither.
    """

    def __init__(self, thinking: bool):
        self.thinking = thinking
        self._strip = thinking
        self._held = ""

    def feed(self, text: str) -> List[Piece]:
        """What may be shown now. What could be the beginning of the end is held back."""
        pieces: List[Piece] = []
        if self.thinking:
            self._held += text
            end = self._held.find(_CLOSE)
            if end < 0:
                keep = max((size for size in range(1, len(_CLOSE)) if self._held.endswith(_CLOSE[:size])), default=0)
                shown = self._held[:len(self._held) - keep].rstrip("\n")
                self._held = self._held[len(shown):]
                return self._shown(shown, True)
            pieces = self._shown(self._held[:end].rstrip("\n"), True)
            text, self._held = self._held[end + len(_CLOSE):], ""
            self.thinking, self._strip = False, True
        return pieces + self._shown(text, False)

    def flush(self) -> List[Piece]:
        """What was held back, when no more text comes: the model was still thinking."""
        shown, self._held = self._held, ""
        return self._shown(shown.rstrip("\n"), True)

    def _shown(self, text: str, reasoning: bool) -> List[Piece]:
        if self._strip:
            text = text.lstrip("\n")
            self._strip = not text
        return [Piece(text, reasoning)] if text else []
