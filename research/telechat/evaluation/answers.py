"""Generated answers of an evaluation: what a task's settings mean, and where an answer ends. No MindSpore here."""
from typing import Container, FrozenSet, Optional, Sequence

from research.telechat.chat.stream import Piece, StopFilter, ThinkFilter
from research.telechat.common.errors import ConfigError
from research.telechat.common.files import JsonObject
from research.telechat.text.vocab import IncrementalDecoder, Vocab

DEFAULT_NEW_TOKENS = 256         # lm-evaluation-harness's own default, if a task sets no limit
DEFAULT_THINKING = 4096          # tokens of reasoning before an answer, for reasoning models
_SETTINGS = ("temperature", "top_k", "top_p", "repetition_penalty", "min_new_tokens")
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens")


class Answer:
    """The text of one answer, token by token.

    Attributes: `text` so far, without stop strings and end tokens; `stopped`, whether a stop string is complete, so
    that no more tokens are needed.

    Args:
        vocab: a Vocab.
        prompt: its ids; an answer may continue a word of it.
        ends: ids that end an answer.
        stops: texts that end an answer.
        kept: ids of markers that are part of an answer's text.
        thinking: the prompt ends within reasoning, which is no part of an answer: neither kept nor looked at for stops.
    """

    def __init__(self, vocab: Vocab, prompt: Sequence[int], ends: Container[int], stops: Sequence[str],
                 kept: FrozenSet[int] = frozenset(), thinking: bool = False):
        self.text = ""
        self._ends = ends
        self._decoder = IncrementalDecoder(vocab, skip_special_tokens=True, kept=kept)
        self._thoughts = ThinkFilter(thinking)
        self._filter = StopFilter(stops)
        self._decoder.feed(prompt)                        # no dummy prefix to remove from what comes

    @property
    def stopped(self) -> bool:
        """Whether a stop string is complete."""
        return self._filter.stopped

    @property
    def reasoning(self) -> bool:
        """Whether the next token still belongs to the reasoning."""
        return self._thoughts.thinking

    def add(self, token: int) -> None:
        """Append the next token."""
        if token not in self._ends:
            self._add(self._thoughts.feed(self._decoder.feed(token)))

    def close(self) -> None:
        """Flush what was held back: no more tokens come."""
        self._add(self._thoughts.feed(self._decoder.flush()))
        self._add(self._thoughts.flush())
        self.text += self._filter.flush() if not self.stopped else ""

    def _add(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            if not piece.reasoning:
                self.text += self._filter.feed(piece.text)


def read_settings(given: Optional[JsonObject]) -> JsonObject:
    """Settings of `generate`, and `until`, from a task's generation_kwargs. Greedy, unless do_sample is set.

    `unknown`: names of unsupported settings. Raises ConfigError for an invalid limit or stop string.
    """
    given = dict(given or {})
    until = given.pop("until", None) or []
    until = [until] if isinstance(until, str) else list(until)
    if not all(isinstance(stop, str) for stop in until):
        raise ConfigError(f"generation_kwargs.until: expected strings, found {until!r}")
    limits = [given.pop(name) for name in _LIMITS if name in given]
    wanted = next((limit for limit in limits if limit is not None), DEFAULT_NEW_TOKENS)
    if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1:
        raise ConfigError(f"generation_kwargs.max_gen_toks: expected a positive whole number, found {wanted!r}")
    sample = given.pop("do_sample", None) or False
    if not isinstance(sample, bool):
        raise ConfigError(f"generation_kwargs.do_sample: expected true or false, found {sample!r}")
    sample = sample and given.get("temperature") != 0
    settings = {"do_sample": sample, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0,
                "min_new_tokens": 0}
    for name in _SETTINGS:
        value = given.pop(name, None)
        if value is not None and (sample or name in ("repetition_penalty", "min_new_tokens")):
            settings[name] = value
    return {**settings, "until": until, "max_new_tokens": wanted, "unknown": sorted(given)}
