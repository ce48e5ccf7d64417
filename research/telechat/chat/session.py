"""Holding a conversation: history, what fits the context, text from a stream of tokens, stop strings, tool calls.

Works with anything that yields token ids, so that it starts without MindSpore. How messages become ids is in
text/renderer.py; `chat` for a model is in telechat_predict_utils.
"""
import ast
import contextlib
import copy
import json
import re
import time
from dataclasses import asdict, dataclass
from typing import Callable, Dict, Generator, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

from research.telechat.chat.interrupt import Tokens
from research.telechat.chat.stream import Piece, StopFilter, ThinkFilter
from research.telechat.common.errors import ConfigError
from research.telechat.common.files import JsonObject
from research.telechat.text.calls import read_parameters
from research.telechat.text.messages import ROLE_ALIASES, Tools
from research.telechat.text.renderer import BOT, SYSTEM, TOOL, USER, Renderer
from research.telechat.text.vocab import IncrementalDecoder, Vocab

_ANSWER_SHARE = 4                    # without max_new_tokens, a quarter of the context is kept for the answer


class History(list):
    """The messages of a conversation, dicts with `role` (system, user, bot, tool) and `content`, oldest first.

    A list with the methods of the official class of this name; `tokenizer` is taken as that one takes it, and not used.
    """

    def __init__(self, tokenizer: object = None, history: Optional[Iterable[JsonObject]] = None):
        if history is None and isinstance(tokenizer, (list, tuple)):
            tokenizer, history = None, tokenizer
        super().__init__(dict(message) for message in history or ())
        self.tokenizer = tokenizer

    def append_left(self, message: JsonObject) -> None:
        """Put `message` before all others."""
        self.insert(0, message)

    def pop_left(self) -> JsonObject:
        """Remove the oldest message."""
        return self.pop(0)

    def update(self, message: JsonObject) -> None:
        """Replace the newest message."""
        self[-1] = message

    def __copy__(self) -> "History":
        return History(self.tokenizer, self)

    def __deepcopy__(self, memo: dict) -> "History":
        return History(self.tokenizer, copy.deepcopy(list(self), memo))


class Budget(NamedTuple):
    """How the context is divided, in tokens."""

    prompt: int                      # upper bound for the prompt
    answer: Optional[int]            # max_new_tokens; None: what the prompt leaves of `total`
    total: int                       # prompt and answer together


def divide_context(context: int, max_new_tokens: Optional[int], max_length: Optional[int]) -> Budget:
    """Room for prompt and answer in a context of `context` tokens. Both fit, whatever the settings say.

    With max_new_tokens the answer has that much, at most three quarters of the context. With max_length alone, prompt
    and answer together have that much, at least a quarter of it for the answer.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("max_length", max_length)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value <= 0):
            raise ConfigError(f"{name}: expected a positive whole number, found {value!r}")
    if max_new_tokens is not None:
        answer = min(max_new_tokens, max(context - context // _ANSWER_SHARE, 1))
        return Budget(context - answer, answer, context)
    total = min(max_length or context, context)
    return Budget(total - max(total // _ANSWER_SHARE, 1), None, total)


@dataclass
class Report:
    """What an answer took. `finish`: end (the model ended it), stop (a stop string), length, or interrupted."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    first_token_seconds: float = 0.0
    seconds: float = 0.0
    dropped_turns: int = 0           # oldest turns of the history that did not fit
    cut_tokens: int = 0              # tokens missing at the beginning of the question
    finish: str = "interrupted"
    reasoning: str = ""              # what the model thought before it answered

    @property
    def tokens_per_second(self) -> float:
        """New tokens over the whole time."""
        return self.new_tokens / self.seconds if self.seconds else 0.0

    def as_dict(self) -> JsonObject:
        """For a JSON line, without the reasoning."""
        rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in asdict(self).items()
                   if key != "reasoning"}
        return {**rounded, "tokens_per_second": round(self.tokens_per_second, 2)}


class Session:
    """Answers to conversations, from a function that yields tokens.

    Attributes: `report`, of the last answer.
    """

    def __init__(self, renderer: Renderer, next_tokens: Callable[[List[int], JsonObject], Tokens],
                 context: int, max_new_tokens: Optional[int] = None, max_length: Optional[int] = None,
                 stop: Sequence[str] = ()):
        """
        Args:
            renderer: writes conversations for the model's vocabulary.
            next_tokens: (prompt ids, {max_new_tokens, eos_token_id, seed}) -> ids of the answer, one by one, the end
                token included.
            context: tokens that the model takes.
            max_new_tokens, max_length: as generation_config.json means them, see `divide_context`.
            stop: texts that end an answer and are not part of it.
        """
        self.renderer, self.next_tokens = renderer, next_tokens
        self.budget = divide_context(context, max_new_tokens, max_length)
        self.stop = [*([stop] if isinstance(stop, str) else stop)]
        if renderer.as_text:             # these markers come as ordinary text
            self.stop += renderer.text_markers
        self.ends = {renderer.end_id, *([renderer.user_id] if renderer.user_id is not None else [])}
        self.report = Report()

    def answer(self, messages: Sequence[JsonObject], tools: Tools = None,
               seed: Optional[int] = None) -> Generator[str, None, None]:
        """The answer to the last of `messages`, piece by piece, in whole characters; without reasoning, which is in
        `report`.

        Raises ConversationError: roles out of order, or a system prompt that leaves no room.
        """
        return _answers(self.pieces(messages, tools, seed))

    def pieces(self, messages: Sequence[JsonObject], tools: Tools = None,
               seed: Optional[int] = None) -> Generator[Piece, None, None]:
        """As `answer`, with the pieces of the reasoning before those of the answer."""
        prompt = self.renderer.fit_prompt(messages, tools, self.budget.prompt)
        room = self.budget.answer or self.budget.total - len(prompt.ids)
        settings = {"max_new_tokens": room, "eos_token_id": sorted(self.ends), "seed": seed}
        self.report = Report(len(prompt.ids), dropped_turns=prompt.dropped_turns, cut_tokens=prompt.cut_tokens)
        return self._pieces(prompt.ids, settings, self.report)

    def _pieces(self, ids: List[int], settings: JsonObject, report: Report) -> Generator[Piece, None, None]:
        text = _Text(self.renderer, self.stop, report)
        started = time.perf_counter()
        tokens = self.next_tokens(ids, settings)
        try:
            for token in tokens:
                report.new_tokens += 1
                report.seconds = time.perf_counter() - started
                report.first_token_seconds = report.first_token_seconds or report.seconds
                if token in self.ends:
                    report.finish = "end"
                    break
                yield from text.feed(token)
                if text.stopped:
                    report.finish = "stop"
                    break
            else:
                report.finish = "length"
            yield from text.flush()
        finally:
            close = getattr(tokens, "close", None)
            if close is not None:
                close()


class _Text:
    """The tokens of an answer as text: reasoning apart, the rest up to a stop string."""

    def __init__(self, renderer: Renderer, stops: Sequence[str], report: Report):
        self._decoder = IncrementalDecoder(renderer.vocab, skip_special_tokens=True, kept=renderer.kept_ids)
        self._thoughts = ThinkFilter(renderer.thinks)
        self._stops = StopFilter(stops)
        self._report = report
        if renderer.thinks:                      # the answer continues the text that opens the reasoning
            self._decoder.feed(renderer.opening_ids)

    @property
    def stopped(self) -> bool:
        """Whether a stop string is complete."""
        return self._stops.stopped

    def feed(self, token: int) -> Iterator[Piece]:
        """What may be shown after `token`."""
        yield from self._shown(self._thoughts.feed(self._decoder.feed(token)))

    def flush(self) -> Iterator[Piece]:
        """What was held back, when no more tokens come."""
        yield from self._shown(self._thoughts.feed(self._decoder.flush()) + self._thoughts.flush())
        rest = self._stops.flush()
        if rest:
            yield Piece(rest)

    def _shown(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        for piece in pieces:
            text = piece.text if piece.reasoning else self._stops.feed(piece.text)
            if piece.reasoning:
                self._report.reasoning += text
            if text:
                yield Piece(text, piece.reasoning)


def _answers(pieces: Generator[Piece, None, None]) -> Generator[str, None, None]:
    try:
        for piece in pieces:
            if not piece.reasoning:
                yield piece.text
    finally:
        pieces.close()


_TOOL_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)


class ToolCalls(NamedTuple):
    """What an answer of TeleChat2 asks for."""

    text: str                        # the answer without its calls
    calls: List[JsonObject]      # name and arguments of each, in order
    faults: List[str]                # calls that are no JSON object with name and arguments, and why


def parse_tool_calls(answer: Union[str, Sequence[int]], vocab: Optional[Vocab] = None, tools: Tools = None
                     ) -> ToolCalls:
    """The calls in an answer: objects with name and arguments between <tool_call> and </tool_call>.

    The answer is text, or token ids of `vocab`, in which the two markers are single tokens or text.

    They are JSON or, as in a sixth of the official examples, Python literals; arguments may be text that holds either.
    Coder's form is read as well (text/calls.py), where `tools` tell which values are texts.
    """
    if not isinstance(answer, str):
        if vocab is None:
            raise ConfigError("an answer given as token ids needs its vocabulary")
        answer = vocab.decode(answer)
        for marker in vocab.own_tokens.values():
            answer = answer.replace(marker, "")
    calls, faults = [], []
    for number, match in enumerate(_TOOL_CALL.finditer(answer), 1):
        body = match.group(1).strip()
        if not match.group(0).endswith("</tool_call>"):
            faults.append(f"call {number} has no </tool_call>: the answer was truncated")
            continue
        call = _literal(body)
        if call is None:
            call = read_parameters(body, tools)
        if not isinstance(call, dict):
            faults.append(f"call {number} is not a JSON object: {body[:80]}")
            continue
        if not isinstance(call.get("name"), str):
            faults.append(f"call {number} has no name: {body[:80]}")
            continue
        arguments = call.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _literal(arguments)
        if not isinstance(arguments, dict):
            faults.append(f"call {number}: its arguments are not a JSON object: {body[:80]}")
            continue
        calls.append({"name": call["name"].strip(), "arguments": arguments})
    return ToolCalls(_TOOL_CALL.sub("", answer).strip(), calls, faults)


def _literal(text: str) -> object:
    """The value of a JSON text or of a Python literal; None for anything else. Nothing is executed."""
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            return read(text)
    return None


def tool_result(result: object) -> Dict[str, str]:
    """The message that brings the result of a call back: text as it is, anything else as JSON."""
    return {"role": TOOL, "content": result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)}


def with_question(history: Optional[Iterable[JsonObject]], question: Optional[str],
                  system: Optional[str] = None) -> Tuple[History, List[JsonObject]]:
    """The history with `question` at its end, as a new History, and the messages to render (with `system` first).

    Without a question the history must end with a question or the results of tools.
    """
    messages = History(getattr(history, "tokenizer", None), history)
    if question:
        messages.append({"role": USER, "content": question})
    roles = [ROLE_ALIASES.get(role, role) for role in (str(message.get("role")) for message in messages)]
    if not roles or roles[-1] not in (USER, TOOL):
        raise ConfigError("the question is empty; pass text, or a history that ends with a question or the results "
                          "of tools")
    rendered = [dict(message) for message in messages]
    if system is not None:
        rendered = [{"role": SYSTEM, "content": system}] + [
            message for message, role in zip(rendered, roles) if role != SYSTEM]
    return messages, rendered


def bot_message(content: str, reasoning: str = "") -> Dict[str, str]:
    """The message of an answer, with the reasoning before it, if there was any."""
    return {"role": BOT, "content": content, **({"reasoning_content": reasoning} if reasoning else {})}
