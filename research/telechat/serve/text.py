"""Text of an answer out of its tokens, as it grows: whole characters, stop strings, reasoning, tool calls."""
import json
from typing import List, NamedTuple, Sequence, Tuple

from research.telechat.chat.session import parse_tool_calls
from research.telechat.chat.stream import StopFilter
from research.telechat.common.files import JsonObject
from research.telechat.text.vocab import IncrementalDecoder, Vocab

THINK, THOUGHT = "<think>", "</think>"
CALL, CALLED = "<tool_call>", "</tool_call>"


class Part(NamedTuple):
    """What has come since the last part. `calls`: complete tool calls, {name, arguments (JSON text)}."""

    content: str = ""
    reasoning: str = ""
    calls: Tuple[JsonObject, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.content or self.reasoning or self.calls)


def _held_back(text: str, tag: str) -> int:
    """How many characters at the end of `text` could be the beginning of `tag`."""
    return next((size for size in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:size])), 0)


class ReasoningFilter:
    """Divides an answer that begins with <think> into its reasoning and the rest. Any other passes unchanged.

    opened: the prompt ends with <think>, so that the answer begins within the reasoning.
    """

    def __init__(self, opened: bool = False):
        self._state = "within" if opened else "before"
        self._held = ""

    def feed(self, text: str, last: bool = False) -> Tuple[str, str]:
        """(reasoning, content) that are certain after `text`; all that was held back if it is the last."""
        if self._state == "behind":
            return "", text
        if self._state == "skipping":
            return "", self._skip(text)
        self._held += text
        if self._state == "before":
            begun = self._held.lstrip()
            if begun.startswith(THINK):
                self._state, self._held = "within", begun[len(THINK):]
            elif last or (begun and not THINK.startswith(begun)):
                self._state, content, self._held = "behind", self._held, ""
                return "", content
            else:
                return "", ""
        reasoning, found, content = self._held.partition(THOUGHT)
        if found:
            self._state, self._held = "skipping", ""
            return reasoning, self._skip(content)
        keep = 0 if last else _held_back(self._held, THOUGHT)
        shown, self._held = self._held[:len(self._held) - keep], self._held[len(self._held) - keep:]
        return shown, ""

    def _skip(self, text: str) -> str:
        """Line ends between the reasoning and the content belong to neither."""
        text = text.lstrip("\n")
        if text:
            self._state = "behind"
        return text


class CallFilter:
    """Takes tool calls out of an answer: held back from <tool_call> on until they are complete."""

    def __init__(self) -> None:
        self._held = ""
        self._called = False

    def feed(self, text: str, last: bool = False) -> Tuple[str, List[JsonObject]]:
        """(content, calls) that are certain after `text`. What is no call after all comes as content."""
        self._held += text
        content = ""
        calls: List[JsonObject] = []
        while True:
            begin = self._held.find(CALL)
            end = -1 if begin < 0 else self._held.find(CALLED, begin)
            if begin < 0 and last:
                rest, self._held = self._held, ""
                return content + (rest.rstrip() if self._called else rest), calls
            if end < 0 and not last:
                if begin < 0:
                    begin = len(self._held) - _held_back(self._held, CALL)
                shown = self._held[:begin].rstrip()          # spaces before a call are no part of the text
                self._held = self._held[len(shown):]
                return content + shown, calls
            end = len(self._held) if end < 0 else end + len(CALLED)
            written, before = self._held[begin:end], self._held[:begin]
            self._held = self._held[end:]
            found = parse_tool_calls(written)
            if found.faults or not found.calls:
                content += before + written                  # as the model wrote it, rather than half of it
                continue
            content += before.rstrip()
            self._called = True
            calls += [{"name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)}
                      for call in found.calls]


class AnswerText:
    """The text of one answer. Attributes: `stopped`, whether a stop string has ended it; `called`, whether it holds
    tool calls."""

    def __init__(self, vocab: Vocab, stop: Sequence[str] = (), tools: bool = False, thinking: bool = False,
                 opened: bool = False):
        """
        Args:
            stop: texts that end the answer and are not part of it.
            tools: take tool calls out of it.
            thinking: take the reasoning out of it; opened: see `ReasoningFilter`.
        """
        self._decoder = IncrementalDecoder(vocab, skip_special_tokens=True)
        self._stops = StopFilter(stop)
        self._reasoning = ReasoningFilter(opened) if thinking else None
        self._calls = CallFilter() if tools else None
        self.called = False

    @property
    def stopped(self) -> bool:
        return self._stops.stopped

    def feed(self, token: int) -> Part:
        """What the next token, which is no end token, makes certain."""
        return self._divide(self._stops.feed(self._decoder.feed(token)), self.stopped)

    def end(self) -> Part:
        """What was held back, when no more tokens come."""
        return self._divide(self._stops.feed(self._decoder.flush()) + self._stops.flush(), True)

    def _divide(self, text: str, last: bool) -> Part:
        reasoning, content = "", text
        calls: List[JsonObject] = []
        if self._reasoning is not None:
            reasoning, content = self._reasoning.feed(text, last)
        if self._calls is not None:
            content, calls = self._calls.feed(content, last)
        self.called = self.called or bool(calls)
        return Part(content, reasoning, tuple(calls))
