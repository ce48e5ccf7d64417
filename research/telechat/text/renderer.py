"""How a conversation is written as token ids: the one renderer for preprocessing, prediction and serving.

Messages (role and content) become token ids and a loss mask for training, or the prompt of a generation. What differs
between the families is a field of a `Template` (text/templates.py). The file knows no vocabulary file (text/vocab.py
reads those), no data format (data/records.py reads those) and no sequence length of training (data/packing.py cuts
and packs).

Two steps, so that preprocessing can encode the texts of many conversations in one call: `Renderer.plan` gives the
texts, `Renderer.assemble` puts their ids between the markers. `render` and `prompt` do both for one conversation.

Text never becomes a marker: markers are placed as ids, and `Vocab.encode` takes every text as ordinary characters.
Where a family writes its markers as ordinary text (52B), a marker that somebody typed is spelt letter by letter, so
that its ids differ from those of the real one.
"""
import re
from functools import cached_property
from typing import Iterable, List, NamedTuple, Optional, Sequence, Tuple

from research.telechat.common.errors import ConfigError, ConversationError
from research.telechat.text.messages import (
    BOT,
    SYSTEM,
    TOOL,
    USER,
    Message,
    MessageLike,
    Tools,
    answer_text,
    json_text,
    to_message,
)
from research.telechat.text.spans import Plan, Prompt, Rendered, Span, marker_span
from research.telechat.text.templates import Template, detect_template, get_template
from research.telechat.text.vocab import Vocab

__all__ = ["BOT", "SYSTEM", "TOOL", "USER", "ConversationError", "Message", "Plan", "Prompt", "Rendered", "Renderer",
           "Span", "detect_template", "get_template", "to_message"]

SYSTEM_POLICIES = ("ignore", "prepend", "error")
_NO_TOOLS = "leave them out, or use a TeleChat2 model"


class Renderer:
    """Writes conversations for one vocabulary.

    Attributes: `template`, `vocab`; `as_text` (markers are ordinary text); ids of the markers: `start_id`, `user_id`,
    `bot_id`, `system_id` (None where there is no such marker), `end_id`, `pad_id`.
    """

    def __init__(self, template: Template, vocab: Vocab, *, start_token: Optional[str] = None,
                 user_token: Optional[str] = None, bot_token: Optional[str] = None, end_token: Optional[str] = None,
                 pad_token: Optional[str] = None, system_policy: str = "ignore"):
        """
        Args:
            template: see `get_template`.
            vocab: a `research.telechat.text.vocab.Vocab`, or what has its `encode`, `encode_batch` and `markers`.
            start_token: marker in front of every conversation (and prompt). None: none, as the official code does.
            user_token, bot_token, end_token, pad_token: other pieces than the template's.
            system_policy: what happens to a system prompt where the template has no place for one: "ignore" leaves it
                out, as the official chat code does; "prepend" puts it in front of the first question; "error" refuses.

        Raises:
            ConfigError: a marker that the vocabulary does not have as one.
        """
        if system_policy not in SYSTEM_POLICIES:
            raise ConfigError(f"system policy {system_policy!r} is unknown; known are {', '.join(SYSTEM_POLICIES)}")
        self.template, self.vocab, self.system_policy = template, vocab, system_policy
        self._text_end = template.text_end or ""
        self.as_text = template.text_end is not None and user_token in (None, template.user) and (
            bot_token in (None, template.bot)) and template.user not in vocab.markers
        self.start_id = self._marker("start", start_token) if start_token else None
        if self.as_text and end_token == template.text_end:
            end_token = None                 # in words between the turns, as the template has it anyway
        self.end_id = self._marker("end", *((end_token,) if end_token else template.end))
        self.pad_id = self._marker("pad", *((pad_token,) if pad_token else template.pad))
        self.user_id = None if self.as_text else self._marker("user", user_token or template.user)
        self.bot_id = None if self.as_text else self._marker("bot", bot_token or template.bot)
        self.system_id = self._marker("system", template.system) if template.system else None
        self._prompt_start = self._marker("start", template.prompt_start) if template.prompt_start else None
        self._separator = tuple(vocab.encode(template.separator)) if template.separator else ()
        self._opening = 1
        self._marker_spans = marker_span(self.user_id), marker_span(self.bot_id), Span((self.end_id,), loss=True)
        if self.as_text:
            self._set_up_text_markers()

    @property
    def text_markers(self) -> List[str]:
        """The markers in words that end an answer, where `as_text`."""
        return [self._text_end, self.template.user]

    # Training

    def render(self, messages: Sequence[MessageLike], tools: Tools = None) -> Tuple[List[int], List[int]]:
        """A whole conversation as (token ids, loss mask): 1 on the ids of every answer and of its end marker, else 0.

        An answer whose `Message.train` is False has 0 throughout.

        Args:
            messages: dicts with `role` and `content` (and `tool_calls`), or `Message`s: an optional system prompt, then
                user (or tool results) and bot in turn, the bot last.
            tools: descriptions of the tools, as the template's family writes them into the system prompt.

        Raises:
            ConversationError: roles out of order, content that is no text, or what the template has no place for.
        """
        plan = self.plan(messages, tools)
        rendered = self.assemble(plan, [self.vocab.encode(text) for text in plan.texts])
        return rendered.ids, rendered.mask()

    def plan(self, messages: Sequence[MessageLike], tools: Tools = None) -> Plan:
        """The first half of `render`: what to encode. Raises ConversationError."""
        turns = self._turns(messages, tools, last=BOT)
        spans = [Span((self.start_id,))] if self.start_id is not None else []
        system = turns.system
        if system is None:
            system = self.template.default_system
        if self.system_id is not None and system is not None:
            spans += self._system_spans(self._with_tools(system, tools))
        starts = []
        for number, turn in enumerate(turns.turns):
            if number and self._separator:
                spans.append(Span(self._separator))
            starts.append(len(spans))
            last = number == len(turns.turns) - 1
            spans += self._text_turn(turn, last) if self.as_text else self._turn(turn)
        return Plan(spans, starts)

    def assemble(self, plan: Plan, encoded: Iterable[Sequence[int]]) -> Rendered:
        """The second half of `render`. `encoded`: ids of each of `plan.texts`, in order."""
        encoded = iter(encoded)
        ids: List[int] = []
        loss: List[Tuple[int, bool]] = []
        positions = []
        for span in plan.spans:
            positions.append(len(ids))
            part = span.ids if span.text is None else next(encoded)[span.skip:]
            ids += part
            loss.append((len(part) - span.tail, span.loss))
            if span.tail:
                loss.append((span.tail, False))
        return Rendered(ids, loss, [positions[start] for start in plan.turns], len(self._separator),
                        self._opening)

    # Generation

    def prompt(self, messages: Sequence[MessageLike], tools: Tools = None, limit: Optional[int] = None) -> List[int]:
        """Token ids up to and including the bot marker, ready for the answer to the last message.

        `messages` end with a user message (or tool results). With `limit` at most so many ids, see `fit_prompt`.
        """
        return self.fit_prompt(messages, tools, limit).ids

    def fit_prompt(self, messages: Sequence[MessageLike], tools: Tools = None, limit: Optional[int] = None) -> Prompt:
        """The prompt within `limit` ids: the oldest turns go first, whole; the system prompt stays.

        If the last question alone is too long, it loses its beginning. Raises ConversationError where not even the
        markers and the system prompt fit, and as `render` does.
        """
        conversation = self._turns(messages, tools, last=USER)
        head, separator = self._prompt_head(conversation.system, tools)
        turns = conversation.turns
        ids = head + self._prompt_ids(turns, separator)
        if limit is None or len(ids) <= limit:
            return Prompt(ids)
        low, high = 1, len(turns) - 1            # the least number of oldest turns to drop: length falls with it
        while low < high:
            middle = (low + high) // 2
            if len(head) + len(self._prompt_ids(turns[middle:], separator)) <= limit:
                high = middle
            else:
                low = middle + 1
        dropped = min(low, len(turns) - 1)
        ids = head + self._prompt_ids(turns[dropped:], separator)
        if len(ids) <= limit:
            return Prompt(ids, dropped)
        empty = [[Message(USER, "")]]
        least = len(head) + len(self._prompt_ids(empty, separator))
        if least > limit:
            raise ConversationError(f"the prompt needs {least} tokens without any question (markers and system "
                                    f"prompt), but only {limit} fit; shorten the system prompt or allow more")
        opening = len(self._prompt_ids(empty, separator, bot=False))
        cut = len(ids) - limit
        start = len(head) + opening
        return Prompt(ids[:start] + ids[start + cut:], dropped, cut)

    # Parts of a conversation

    class _Turns(NamedTuple):
        system: Optional[str]
        turns: List[List[Message]]           # each: user or tools, then bot (none in the last turn of a prompt)

    def _turns(self, messages: Sequence[MessageLike], tools: Tools, last: str) -> "Renderer._Turns":
        """Check the order of roles and group the messages into turns."""
        if tools and self.template.tools_block is None:
            raise ConversationError(f"the template {self.template.name} has no place for tools; {_NO_TOOLS}")
        checked = [to_message(message, number) for number, message in enumerate(messages, 1)]
        system = None
        turns: List[List[Message]] = []
        for number, message in enumerate(checked, 1):
            before = checked[number - 2].role if number > 1 else None
            if message.role == SYSTEM:
                if before is not None:
                    raise ConversationError(f"message {number}: a system prompt after other messages; it must be the "
                                            "first")
                system = message.content
            elif message.role == BOT:
                if before in (None, SYSTEM, BOT):
                    raise ConversationError(f"message {number}: bot after {before or 'nothing'}; expected user")
                turns[-1].append(message)
            elif message.role == TOOL and before == TOOL:
                turns[-1].append(message)
            elif before in (USER, TOOL) or (message.role == TOOL and before != BOT):
                expected = "user" if before in (None, SYSTEM) else "bot"
                raise ConversationError(f"message {number}: {message.role} after {before or 'nothing'}; expected "
                                        f"{expected}")
            else:
                turns.append([message])
            if message.role == TOOL and self.template.tools_block is None:
                raise ConversationError(f"message {number}: the template {self.template.name} has no place for tools; "
                                        f"{_NO_TOOLS}")
        if not turns:
            raise ConversationError("there is no user message in the conversation; it needs one at least")
        ends_with_bot = checked[-1].role == BOT
        if ends_with_bot != (last == BOT):
            raise ConversationError(f"the last message is from {checked[-1].role}; expected "
                                    + ("the bot's answer" if last == BOT else "a user's question"))
        if system is not None and self.system_id is None:
            if self.system_policy == "error":
                raise ConversationError(f"the template {self.template.name} has no place for a system prompt; "
                                        "leave it out, or choose a system policy other than error")
            if self.system_policy == "prepend" and system:
                first = turns[0][0]
                turns[0][0] = first._replace(content=f"{system.rstrip()}\n{first.content}")
            system = None
        return Renderer._Turns(system, turns)

    def _with_tools(self, system: str, tools: Tools) -> str:
        if not tools or ("<tools>\n" in system and "\n</tools>" in system):     # in words already, as in official data
            return system
        lines = tools if isinstance(tools, str) else "\n".join(json_text(tool) for tool in tools)
        return system.rstrip("\n") + (self.template.tools_block or "").format(tools=lines)

    def _system_spans(self, system: str) -> List[Span]:
        return [marker_span(self.system_id), Span(text=system), Span(self._separator)]

    def _turn(self, turn: List[Message]) -> List[Span]:
        """One turn with markers as ids."""
        user, bot, end = self._marker_spans
        spans = [user, Span((), self._question(turn))]
        if turn[-1].role == BOT:
            train = turn[-1].train
            spans += [bot, Span((), answer_text(turn[-1]), train), end if train else end._replace(loss=False)]
        return spans

    def _text_turn(self, turn: List[Message], last: bool) -> List[Span]:
        """One turn with markers in words: question and markers as one text, the answer as another.

        The end of an earlier answer is written in words, too, but carries no loss: a generation ends at the single
        token, which only the last answer has, and the two must not compete for the same place.
        """
        spans = self._guarded([(self.template.user, False), (self._question(turn), True), (self.template.bot, False)])
        answer, train = answer_text(turn[-1]), turn[-1].train
        if last:
            return [*spans, *self._guarded([(answer, True)], loss=train), Span((self.end_id,), loss=train)]
        spans += self._guarded([(answer, True), (self._text_end, False)], loss=train)
        spans[-1] = spans[-1]._replace(tail=self._text_end_length)
        return spans

    def _question(self, turn: List[Message]) -> str:
        if turn[0].role == USER:
            return turn[0].content
        return "\n".join(f"<tool_response>\n{message.content}\n</tool_response>" for message in turn
                         if message.role == TOOL)

    def _prompt_head(self, system: Optional[str], tools: Tools) -> Tuple[List[int], Tuple[int, ...]]:
        """What stands in front of the turns, and the ids between them."""
        if system is None and tools:
            system = self.template.default_system
        head = [self.start_id] if self.start_id is not None else []
        if system is not None:
            return head + self._encode(self._system_spans(self._with_tools(system, tools))), self._separator
        if self._prompt_start is None:
            return head, self._separator
        return head or [self._prompt_start], ()

    def _prompt_ids(self, turns: List[List[Message]], separator: Tuple[int, ...], bot: bool = True) -> List[int]:
        """Ids of the turns and, with `bot`, of the marker that opens the answer to the last one."""
        if self.as_text:
            parts = []
            for turn in turns:
                parts += [(self.template.user, False), (self._question(turn), True)]
                if turn[-1].role == BOT:
                    parts += [(self.template.bot, False), (answer_text(turn[-1]), True),
                              (self._text_end, False)]
            return self._encode(self._guarded(parts + ([(self.template.bot, False)] if bot else [])))
        spans = []
        for number, turn in enumerate(turns):
            spans += ([Span(separator)] if number else []) + self._turn(turn)
        return self._encode(spans) + ([self.bot_id] if bot and self.bot_id is not None else [])

    def _encode(self, spans: List[Span]) -> List[int]:
        plan = Plan(spans, [])
        return self.assemble(plan, [self.vocab.encode(text) for text in plan.texts]).ids

    def _marker(self, role: str, *pieces: str) -> int:
        for piece in pieces:
            if piece in self.vocab.markers:
                return self.vocab.markers[piece]
        fault = ("is an ordinary piece of text in" if self.vocab.token_to_id(pieces[0]) is not None
                 else "is not in")
        raise ConfigError(f"the {role} token {' or '.join(map(repr, pieces))} of the template {self.template.name} "
                          f"{fault} the vocabulary {self.vocab.path}; name the right template, or another token with "
                          f"--{role}_token (markers there: {', '.join(list(self.vocab.markers)[:8])}, ...)")

    # Markers in words

    def _set_up_text_markers(self) -> None:
        template = self.template
        words = (template.user, template.bot, self._text_end)
        self._typed_marker = re.compile("(" + "|".join(map(re.escape, words)) + ")")
        self._opening = len(self.vocab.encode(template.user))
        self._text_end_length = len(self._continued(self._text_end))
        self._spelt = {word: tuple(token for char in word for token in self._continued(char)) for word in words}

    @cached_property
    def _continuation(self) -> int:
        """Number of ids in front of a text that is encoded behind a line end, where no dummy prefix is added."""
        line_end = self.vocab.encode("\n")
        return len(line_end) if self.vocab.encode("\n<")[:len(line_end)] == line_end else 0

    def _continued(self, text: str) -> List[int]:
        """Ids of a text that continues another one: without the dummy prefix of SentencePiece."""
        skip = self._continuation
        return self.vocab.encode("\n" + text)[skip:] if skip else self.vocab.encode(text)

    def _guarded(self, parts: List[Tuple[str, bool]], loss: bool = False) -> List[Span]:
        """One text of several parts, (text, typed by somebody): typed markers become spelt ids."""
        spans: List[Span] = []
        text = ""
        for part, typed in parts:
            pieces = self._typed_marker.split(part) if typed else [part]
            for index, piece in enumerate(pieces):
                if index % 2:
                    spans += [self._continued_span(text, bool(spans), loss), Span(self._spelt[piece], loss=loss)]
                    text = ""
                else:
                    text += piece
        return [*spans, self._continued_span(text, bool(spans), loss)]

    def _continued_span(self, text: str, continues: bool, loss: bool) -> Span:
        skip = self._continuation if continues else 0
        return Span(text="\n" + text if skip else text, loss=loss, skip=skip)
