"""Incremental detokenisation of an answer: whole characters, stop strings, reasoning, tool calls."""
import json
from typing import List, NamedTuple, Optional, Sequence, Tuple

from research.telechat.chat.session import parse_tool_calls
from research.telechat.chat.stream import StopFilter, ThinkFilter
from research.telechat.common.files import JsonObject
from research.telechat.text.messages import Tools
from research.telechat.text.renderer import Renderer
from research.telechat.text.vocab import IncrementalDecoder

THINK = "<think>"
CALL, CALLED = "<tool_call>", "</tool_call>"


class Part(NamedTuple):
    """New output since the last part. `calls`: complete tool calls, {name, arguments (JSON text)}."""

    content: str = ""
    reasoning: str = ""
    calls: Tuple[JsonObject, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.content or self.reasoning or self.calls)


def _held_back(text: str, tag: str) -> int:
    """How many characters at the end of `text` could be the beginning of `tag`."""
    return next((size for size in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:size])), 0)


class ReasoningFilter:
    """Splits an answer that begins with <think> into its reasoning and the rest. Any other answer passes unchanged.

    opened: the prompt ends with <think>, so the answer begins inside the reasoning.
    """

    def __init__(self, opened: bool = False):
        self._divided = ThinkFilter(True) if opened else None
        self._held: Optional[str] = ""                   # possible beginning of <think>; None: it was not

    def feed(self, text: str, last: bool = False) -> Tuple[str, str]:
        """(reasoning, content) that are certain after `text`, including everything held back if it is the last."""
        if self._divided is None:
            if self._held is None:
                return "", text
            self._held += text
            begun = self._held.lstrip()
            if not begun.startswith(THINK):
                if not last and THINK.startswith(begun):
                    return "", ""
                text, self._held = self._held, None
                return "", text
            self._divided, text = ThinkFilter(True), begun[len(THINK):]
        pieces = self._divided.feed(text) + (self._divided.flush() if last else [])
        return ("".join(piece.text for piece in pieces if piece.reasoning),
                "".join(piece.text for piece in pieces if not piece.reasoning))


class CallFilter:
    """Extracts tool calls from an answer: text from <tool_call> on is held back until the call is complete.

    tools: descriptions of the tools, which give the types of parameters written one by one (text/calls.py).
    """

    def __init__(self, tools: Tools = None, one: bool = False) -> None:
        """one: nothing comes after the first call."""
        self._tools, self._one = tools, one
        self._held = ""
        self._called = False

    def feed(self, text: str, last: bool = False) -> Tuple[str, List[JsonObject]]:
        """(content, calls) that are certain after `text`. What turns out not to be a call is content."""
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
                shown = self._held[:begin].rstrip()          # spaces before a call are not part of the text
                self._held = self._held[len(shown):]
                return content + shown, calls
            end = len(self._held) if end < 0 else end + len(CALLED)
            written, before = self._held[begin:end], self._held[:begin]
            self._held = self._held[end:]
            found = parse_tool_calls(written, tools=self._tools)
            if found.faults or not found.calls:
                content += before + written                  # as the model wrote it, not a part of it
                continue
            content += before.rstrip()
            self._called = True
            calls += [{"name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)}
                      for call in found.calls]
            if self._one:
                return content, calls[:1]


class AnswerText:
    """The text of one answer. Attributes: `stopped`, whether a stop string, or the only call, has ended it; `called`,
    whether it contains tool calls."""

    def __init__(self, renderer: Renderer, stop: Sequence[str] = (), tools: Tools = None, thinking: bool = False,
                 turn: bool = True, one_call: bool = False):
        """
        Args:
            renderer: the renderer of the prompt.
            stop: stop strings, not part of the answer; ignored in the reasoning.
            tools: descriptions of the tools that it may call; with any, calls are extracted from the text.
            thinking: separate the reasoning.
            turn: it is an answer in a conversation, not the continuation of a text.
            one_call: it ends with its first call.
        """
        self._decoder = IncrementalDecoder(renderer.vocab, skip_special_tokens=True, kept=renderer.kept_ids)
        opened = turn and renderer.thinks
        if opened:                                       # the answer continues the text that opens the reasoning
            self._decoder.feed(renderer.opening_ids)
        self._reasoning = ReasoningFilter(opened) if thinking else None
        self._stops = StopFilter(stop)
        self._calls = CallFilter(tools, one_call) if tools else None
        self._one_call, self.called = one_call, False

    @property
    def stopped(self) -> bool:
        return self._stops.stopped or (self._one_call and self.called)

    def feed(self, token: int) -> Part:
        """New certain output after the next token, which is not an end token."""
        return self._divide(self._decoder.feed(token), False)

    def end(self) -> Part:
        """Everything held back, once no more tokens come."""
        return self._divide(self._decoder.flush(), True)

    def _divide(self, text: str, last: bool) -> Part:
        if self.stopped:
            return Part()
        reasoning, content = "", text
        if self._reasoning is not None:
            reasoning, content = self._reasoning.feed(text, last)
        content = self._stops.feed(content)
        if last:
            content += self._stops.flush()
        calls: List[JsonObject] = []
        if self._calls is not None:
            content, calls = self._calls.feed(content, last or self.stopped)
        self.called = self.called or bool(calls)
        return Part(content, reasoning, tuple(calls))
