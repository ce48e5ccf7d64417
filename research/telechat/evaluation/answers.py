"""Generated answers of an evaluation: what a task's settings mean, and where an answer ends. No MindSpore here."""
from typing import Any, Container, FrozenSet, Optional, Sequence

import numpy as np

from research.telechat.chat.stream import Piece, StopFilter, ThinkFilter
from research.telechat.common.errors import ConfigError
from research.telechat.common.files import JsonObject
from research.telechat.text.vocab import IncrementalDecoder, Vocab

DEFAULT_NEW_TOKENS = 256         # lm-evaluation-harness's own default, where a task names no limit
_SETTINGS = ("temperature", "top_k", "top_p", "repetition_penalty", "min_new_tokens")
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens")


class AllStopped(Exception):
    """Every answer of a batch has reached one of its stop strings: no more tokens are needed."""


class Answers:
    """Streamer for `generate` that reads a batch of answers as text, and ends it when all have stopped.

    Attributes: `texts`, the answers so far, without stop strings and end tokens.

    Args:
        vocab: a Vocab.
        prompts: ids of each prompt.
        ends: ids that end an answer.
        stops: texts that end an answer.
        kept: ids of markers that are part of an answer's text.
        thinking: the prompts end within reasoning, which is no part of an answer: neither kept nor looked at for stops.
    """

    def __init__(self, vocab: Vocab, prompts: Sequence[Sequence[int]], ends: Container[int], stops: Sequence[str],
                 kept: FrozenSet[int] = frozenset(), thinking: bool = False):
        self.texts = [""] * len(prompts)
        self._ends = ends
        self._decoders = [IncrementalDecoder(vocab, skip_special_tokens=True, kept=kept) for _ in prompts]
        self._thoughts = [ThinkFilter(thinking) for _ in prompts]
        self._filters = [StopFilter(stops) for _ in prompts]
        self._running = [True] * len(prompts)
        self._begun = False
        for decoder, prompt in zip(self._decoders, prompts):
            decoder.feed(prompt)                          # an answer may continue a word: no dummy prefix to remove

    def put(self, tokens: Any) -> None:
        """The prompts first, then the newest token of each answer, [B] (or one). Raises AllStopped."""
        if not self._begun:
            self._begun = True
            return
        for row, token in enumerate(np.atleast_1d(tokens).tolist()):
            if not self._running[row]:
                continue
            if token in self._ends:
                self._close(row)
                continue
            self._add(row, self._thoughts[row].feed(self._decoders[row].feed(token)))
            self._running[row] = not self._filters[row].stopped
        if not any(self._running):
            raise AllStopped

    def end(self) -> None:
        """All answers are as long as they may be."""
        for row, running in enumerate(self._running):
            if running:
                self._close(row)

    def _close(self, row: int) -> None:
        self._running[row] = False
        self._add(row, self._thoughts[row].feed(self._decoders[row].flush()))
        self._add(row, self._thoughts[row].flush())
        if not self._filters[row].stopped:
            self.texts[row] += self._filters[row].flush()

    def _add(self, row: int, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            if not piece.reasoning:
                self.texts[row] += self._filters[row].feed(piece.text)


def read_settings(given: Optional[JsonObject]) -> JsonObject:
    """Settings of `generate`, and `until`, from a task's generation_kwargs. Greedy, unless do_sample is set.

    `unknown`: names of settings that mean nothing here. Raises ConfigError where a limit or stop string is none.
    """
    given = dict(given or {})
    until = given.pop("until", None) or []
    until = [until] if isinstance(until, str) else list(until)
    if not all(isinstance(stop, str) for stop in until):
        raise ConfigError(f"generation_kwargs.until: expected texts, found {until!r}")
    limits = [given.pop(name) for name in _LIMITS if name in given]
    wanted = next((limit for limit in limits if limit is not None), DEFAULT_NEW_TOKENS)
    if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1:
        raise ConfigError(f"generation_kwargs.max_gen_toks: expected a whole number over 0, found {wanted!r}")
    sample = bool(given.pop("do_sample", False)) and given.get("temperature") != 0
    settings = {"do_sample": sample, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0,
                "min_new_tokens": 0}
    for name in _SETTINGS:
        value = given.pop(name, None)
        if value is not None and (sample or name in ("repetition_penalty", "min_new_tokens")):
            settings[name] = value
    return {**settings, "until": until, "max_new_tokens": wanted, "unknown": sorted(given)}
