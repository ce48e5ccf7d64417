"""Constrained answers with the library llguidance: JSON objects, JSON of a schema, calls of given tools.

A grammar says which bytes may come next; the library turns it into a mask over the vocabulary. Without the library
none of this is available (`available`), and the APIs refuse requests that need it.
"""
import importlib.util
import json
from functools import cached_property
from typing import TYPE_CHECKING, FrozenSet, List, Sequence

import numpy as np

from research.telechat.common.files import JsonObject
from research.telechat.serve.errors import ApiError
from research.telechat.serve.text import CALL, CALLED
from research.telechat.text.vocab import Vocab

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer


def available() -> bool:
    """Whether llguidance is installed."""
    return importlib.util.find_spec("llguidance") is not None


# A leading space may be the encoder's dummy prefix, which is not part of the text: see IncrementalDecoder.
_START = 'start: " "? answer\n'
# Only the spaces that Python and TeleChat2 write: otherwise a model can emit newlines forever.
_SPACES = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def _json(schema: JsonObject) -> str:
    return "%json " + json.dumps({"x-guidance": _SPACES, **schema}, ensure_ascii=False)


def json_grammar(schema: JsonObject) -> str:
    """A JSON value that fits `schema`."""
    return _START + f"answer: {_json(schema)}\n"


def calls_grammar(tools: Sequence[JsonObject], several: bool) -> str:
    """One call of one of `tools` ({name, parameters}), or several in a row, as TeleChat2 writes them."""
    options = [{"type": "object", "properties": {"name": {"const": tool["name"]},
                                                 "arguments": tool.get("parameters") or {"type": "object"}},
                "required": ["name", "arguments"], "additionalProperties": False} for tool in tools]
    schema = options[0] if len(options) == 1 else {"anyOf": options}
    many = ' ("\\n" call)*' if several else ""
    return _START + (f"answer: call{many}\n"
                     f"call: {json.dumps(CALL + chr(10))} body {json.dumps(chr(10) + CALLED)}\n"
                     f"body: {_json(schema)}\n")


class Grammars:
    """Creates constraints for one vocabulary."""

    def __init__(self, vocab: Vocab, vocab_size: int, ends: Sequence[int], kept: FrozenSet[int] = frozenset()):
        """vocab_size: of the model, which may be larger; ends: tokens that end an answer; kept: special tokens that are
        part of a text (see IncrementalDecoder)."""
        self._vocab, self._size, self._ends, self._kept = vocab, vocab_size, sorted(set(ends)), kept

    @cached_property
    def _tokenizer(self) -> "LLTokenizer":
        from llguidance import LLTokenizer, TokenizerWrapper
        return LLTokenizer(TokenizerWrapper(_Table(self._vocab, self._ends, self._kept)), n_vocab=self._vocab.size)

    def constraint(self, grammar: str, param: str) -> "Grammar":
        """A constraint for one answer. Raises ApiError: the library is missing or does not support the schema."""
        if not available():
            raise ApiError(400, f"{param}: this server cannot constrain answers: its environment lacks the library "
                                "llguidance (pip install 'telechat-mindspore[constrained]')", param)
        from llguidance import LLMatcher
        matcher = LLMatcher(self._tokenizer, LLMatcher.grammar_from_lark(grammar), log_level=0)
        if matcher.is_error():
            raise _useless(param, matcher.get_error())
        found = Grammar(matcher, self._vocab.size, self._size, self._ends)
        try:
            found.allowed()                      # some schemas fail at the first token; the mask is kept
        except ValueError as err:
            raise _useless(param, str(err)) from err
        return found


def _useless(param: str, reason: str) -> ApiError:
    """The error for a schema that the library does not take."""
    return ApiError(400, f"{param}: the schema cannot be used: {_words(reason)}", param)


def _words(reason: str) -> str:
    """The library's reason, without what follows it: our grammar, the state of its parser."""
    reason = " ".join(reason.split()).partition(" 1 | ")[0].partition(" <state>")[0]
    return "no value fits it" if reason == "NoExtensionBias" else reason[:300]


class _Table:
    """The vocabulary in llguidance's form. Markers that are part of texts, such as <tool_call>, count as their bytes;
    those that are skipped in texts are never allowed."""

    bos_token_id = None

    def __init__(self, vocab: Vocab, ends: Sequence[int], kept: FrozenSet[int]):
        self._vocab = vocab
        self.eos_token_id = ends[0]
        hidden = {*(vocab.special_ids - kept), *ends}
        self.special_token_ids = sorted(token for token in hidden if token < vocab.size)
        self.tokens = [b"\xff" + str(token).encode() if token in hidden else vocab.token_bytes(token)
                       for token in range(vocab.size)]

        line_end = vocab.encode("\n")
        self._behind = len(line_end) if vocab.encode("\n<")[:len(line_end)] == line_end else 0

    def __call__(self, text: str) -> List[int]:
        """Ids of a text that continues another one: without SentencePiece's dummy prefix."""
        return self._vocab.encode("\n" + text)[self._behind:] if self._behind else self._vocab.encode(text)


class Grammar:
    """A `TokenConstraint` (generation/requests.py)."""

    def __init__(self, matcher: "LLMatcher", tokens: int, vocab_size: int, ends: Sequence[int]):
        self._matcher, self._tokens = matcher, tokens
        self._ends = np.array([end for end in ends if end < vocab_size], np.int64)
        self._bits = np.zeros((tokens + 31) // 32, np.int32)
        self._mask = np.zeros(vocab_size, bool)

    def allowed(self) -> np.ndarray:
        """[V] bool, see `TokenConstraint`. Raises ValueError: the schema is beyond the library's limits, or it allows
        nothing here."""
        if not self._matcher.is_stopped():
            self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
            bits = np.unpackbits(self._bits.view(np.uint8), bitorder="little")[:self._tokens]
            self._mask[:self._tokens] = bits[:len(self._mask)]
            self._mask[self._ends] = self._matcher.is_accepting()
        if self._matcher.is_error():
            raise ValueError(_words(self._matcher.get_error()))
        if self._matcher.is_stopped() or not self._mask.any():
            if not self._matcher.is_accepting():
                raise ValueError("no value fits it")
            self._mask[:] = False
            self._mask[self._ends] = True
        return self._mask

    def advance(self, token: int) -> None:
        """See `TokenConstraint`."""
        self._matcher.consume_token(token)
