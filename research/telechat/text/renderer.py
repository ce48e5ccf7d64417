"""How a conversation is written as token ids: the one renderer for preprocessing, prediction and serving.

Messages (role and content) become token ids and a loss mask for training, or the prompt of a generation. What differs
between the families is a field of a `Template` (text/templates.py). The file knows no vocabulary file (text/vocab.py
reads those), no data format (data/records.py reads those) and no sequence length of training (data/packing.py splits
and packs).

Two steps, so that preprocessing can encode the texts of many conversations in one call: `Renderer.plan` gives the
texts, `Renderer.assemble` puts their ids between the markers. `render` and `prompt` do both for one conversation.

Text never becomes a marker: markers are placed as ids, and `Vocab.encode` takes every text as ordinary characters.
Where a family writes its markers as ordinary text (52B), a marker that somebody typed is spelt letter by letter, so
that its ids differ from those of the real one.
"""
import re
from functools import cached_property
from typing import FrozenSet, Iterable, List, Optional, Sequence, Tuple

from research.telechat.common.errors import ConfigError, ConversationError
from research.telechat.text.calls import JSON, answer_parts, answer_text, result_parts
from research.telechat.text.messages import (
    BOT,
    SYSTEM,
    TOOL,
    USER,
    Message,
    MessageLike,
    Tools,
    json_text,
    response_parts,
    to_message,
)
from research.telechat.text.spans import Plan, Prompt, Rendered, Span, marker_span
from research.telechat.text.templates import (
    THINK_MARKERS,
    TOOL_MARKERS,
    Template,
    choose_template,
    detect_template,
    get_template,
)
from research.telechat.text.text_markers import TextMarkers
from research.telechat.text.turns import Turns, last_question, read_turns
from research.telechat.text.vocab import Vocab

__all__ = ["BOT", "SYSTEM", "TOOL", "USER", "ConversationError", "Message", "Plan", "Prompt", "Rendered", "Renderer",
           "Span", "choose_template", "detect_template", "get_template", "to_message"]

SYSTEM_POLICIES = ("ignore", "prepend", "error")


class Renderer:
    """Writes conversations for one vocabulary.

    Attributes: `template`, `vocab`; `as_text` (markers are ordinary text); `opening`, number of ids of the marker with
    which a turn begins; ids of the markers: `start_id`, `user_id`, `bot_id`, `system_id` (None where there is no such
    marker), `end_id`, `pad_id`.
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
            system_policy: what happens to a system prompt if the template does not support one: "ignore" leaves it
                out, as the official chat code does; "prepend" puts it in front of the first question; "error" refuses.

        Raises:
            ConfigError: a marker that the vocabulary does not have as one.
        """
        if system_policy not in SYSTEM_POLICIES:
            raise ConfigError(f"unknown system policy {system_policy!r}; expected one of {', '.join(SYSTEM_POLICIES)}")
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
        self._inner = {piece: vocab.markers[piece] for piece in (*TOOL_MARKERS, *THINK_MARKERS)
                       if piece in vocab.markers}
        self._inner_pattern = re.compile("(" + "|".join(map(re.escape, self._inner)) + ")")
        self._plain = not self._inner and template.think_start is None
        self._observation = marker_span(self._marker("observation", template.observation)
                                        if template.observation else self.user_id)
        self._opening_spans = self._stretches([(template.think_start, True)]) if template.think_start else []
        self.opening = 1
        self._marker_spans = marker_span(self.user_id), marker_span(self.bot_id), Span((self.end_id,), loss=True)
        self._words = TextMarkers(vocab, (template.user, template.bot, self._text_end) if self.as_text else ())
        if self.as_text:
            self.opening = len(vocab.encode(template.user))
            self._text_end_length = len(self._words.continued(self._text_end))

    @property
    def text_markers(self) -> List[str]:
        """The markers in words that end an answer, where `as_text`."""
        return [self._text_end, self.template.user]

    @property
    def thinks(self) -> bool:
        """Whether answers begin with reasoning, which the template's `think_end` closes."""
        return self.template.think_start is not None

    @property
    def kept_ids(self) -> FrozenSet[int]:
        """Ids of the markers of tools and reasoning, which are part of the text of an answer; empty where they are
        ordinary text."""
        return frozenset(self._inner.values())

    @cached_property
    def unnamed_tool_markers(self) -> bool:
        """Whether the markers of tools are ordinary text only because no tokenizer_config.json says whether they are
        tokens."""
        template = self.template
        settled = template.needs_settings or TOOL_MARKERS[0] in self.vocab.markers or bool(
            getattr(self.vocab, "settings", None) or getattr(self.vocab, "names", None))
        return template.tools_block is not None and template.name != "telechat2_before" and not settled

    @cached_property
    def opening_ids(self) -> List[int]:
        """Ids with which every prompt ends: the bot marker, and what opens the reasoning."""
        return self._encode([marker_span(self.bot_id), *self._opening_spans])

    # Training

    def render(self, messages: Sequence[MessageLike], tools: Tools = None) -> Tuple[List[int], List[int]]:
        """A whole conversation as (token ids, loss mask): 1 on the ids of every answer and of its end marker, else 0.

        An answer whose `Message.train` is False has 0 throughout.

        Args:
            messages: dicts with `role` and `content` (and `tool_calls`), or `Message`s: an optional system prompt, then
                user (or tool results) and bot in turn, the bot last.
            tools: descriptions of the tools, as the template's family writes them into the system prompt.

        Raises:
            ConversationError: roles out of order, content that is not text, or what the template does not support.
        """
        plan = self.plan(messages, tools)
        rendered = self.assemble(plan, [self.vocab.encode(text) for text in plan.texts])
        return rendered.ids, rendered.mask()

    def plan(self, messages: Sequence[MessageLike], tools: Tools = None) -> Plan:
        """The first half of `render`: what to encode. Raises ConversationError."""
        turns = self._turns(messages, tools, BOT)
        spans, separator = self._head(turns.system, tools, training=True)
        starts = []
        asked, ending = last_question(turns.turns), len(turns.turns) - 1
        for number, turn in enumerate(turns.turns):
            if number and separator:
                spans.append(Span(separator))
            starts.append(len(spans))
            spans += self._text_turn(turn, number == ending) if self.as_text else self._turn(
                turn, True, number == ending, number >= asked)
        return Plan(spans, starts, len(separator))

    def conversations(self, messages: Sequence[Message]) -> List[List[Message]]:
        """What to train of a conversation: itself, or, where answers begin with reasoning, each answer on its own.

        Reasoning of earlier answers is not part of a prompt, so that every answer needs a context of its own.
        """
        if self.template.think_start is None:
            return [list(messages)]
        ends = [place for place, message in enumerate(messages, 1) if message.role == BOT and message.train]
        return [[message._replace(train=False) if message.role == BOT else message for message in messages[:end - 1]]
                + [messages[end - 1]] for end in ends] or [list(messages)]

    def document(self, text: str, ends: bool = True, train: bool = True) -> Plan:
        """What to encode of a text without roles, which is trained on every token: it and, where it `ends`, the end
        marker. No marker precedes it."""
        spans = self._words.guarded([(text, True)], loss=train) if self.as_text else [Span(text=text, loss=train)]
        return Plan([*spans, Span((self.end_id,), loss=train)] if ends else spans, [0])

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
        return Rendered(ids, loss, [positions[start] for start in plan.turns], plan.separator, self.opening)

    # Generation

    def prompt(self, messages: Sequence[MessageLike], tools: Tools = None, limit: Optional[int] = None) -> List[int]:
        """Token ids up to and including the bot marker (and what opens the reasoning), ready for the answer.

        `messages` end with a user message (or tool results). With `limit` at most that many ids, see `fit_prompt`.
        """
        return self.fit_prompt(messages, tools, limit).ids

    def fit_prompt(self, messages: Sequence[MessageLike], tools: Tools = None, limit: Optional[int] = None) -> Prompt:
        """The prompt within `limit` ids: the oldest turns go first, whole; the system prompt stays.

        If the last question alone is too long, it loses its beginning. Raises ConversationError where not even the
        markers and the system prompt fit, and as `render` does.
        """
        conversation = self._turns(messages, tools, USER)
        spans, separator = self._head(conversation.system, tools, training=False)
        head = self._encode(spans)
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

    def _turns(self, messages: Sequence[MessageLike], tools: Tools, last: str) -> Turns:
        return read_turns(messages, tools, last, self.template, self.system_id is not None, self.system_policy)

    def _head(self, system: Optional[str], tools: Tools, training: bool) -> Tuple[List[Span], Tuple[int, ...]]:
        """What precedes the turns, and the ids between them."""
        template = self.template
        if system is None and (tools or template.default_for == "always" or (
                training and template.default_for == "training")):
            system = template.default_system
        head = [Span((self.start_id,))] if self.start_id is not None else []
        if system is not None and self.system_id is not None:
            return head + self._system_spans(system, tools), self._separator
        if template.bare_system:
            return [*head, marker_span(self.system_id)], self._separator
        if self._prompt_start is None:
            return head, self._separator
        return head or [Span((self._prompt_start,))], ()

    def _system_spans(self, system: str, tools: Tools) -> List[Span]:
        parts = [(system, False)]
        block = self.template.tools_block or ""
        written = "<tools>\n" in system and "\n</tools>" in system          # in words already, as in official data
        if written:
            ending = block.partition("{tools}")[2].format()
            if ending and system.endswith(ending):
                parts = [(system[:-len(ending)], False), (ending, True)]
        elif tools:
            lines = tools if isinstance(tools, str) else "\n".join(json_text(tool) for tool in tools)
            before, _, after = block.partition("{tools}")
            kept = self.template.default_for == "always" or self.template.bare_system
            text = system if kept else system.rstrip("\n")
            parts = [(text, False), (before.format(), True), (lines, False), (after.format(), True)]
        else:
            parts.append((self.template.system_end, False))
        spans = [marker_span(self.system_id), *self._stretches(parts)]
        return [*spans, Span(self._separator)] if self.template.system_separator else spans

    def _turn(self, turn: List[Message], training: bool = False, last: bool = False, current: bool = False
              ) -> List[Span]:
        """One turn with markers as ids. last: of a conversation to be trained, whose answer begins with reasoning.
        current: no other question comes behind it."""
        user, bot, end = self._marker_spans
        if self._plain and training and len(turn) == 2 and turn[0].role == USER and not turn[1].calls:
            train = turn[1].train                # what follows, in short, for nearly all turns of a data set
            return [user, Span((), turn[0].content), bot, Span((), self.template.answer_start + turn[1].content, train),
                    end if train else end._replace(loss=False)]
        opening = user if turn[0].role == USER else self._observation
        asked = turn[0].role != BOT
        spans = [opening, *self._stretches(self._question_parts(turn, training))] if asked else []
        if turn[-1].role == BOT:
            thinks = self.template.think_start is not None
            train = turn[-1].train and training and (last or not thinks)
            reasoned = last or (current and self.template.keeps_reasoning and bool(turn[-1].reasoning))
            start = "" if thinks and reasoned else self.template.answer_start
            parts = answer_parts(turn[-1], self.template.call_separator, bool(self._inner), self.template.call_form)
            answer = self._stretches([(start, True), *parts], train)
            if thinks and reasoned:
                answer = self._reasoned(turn[-1], answer, train)
            spans += [bot, *answer, end if train else end._replace(loss=False)]
        return spans

    def _reasoned(self, message: Message, answer: List[Span], train: bool) -> List[Span]:
        """An answer behind its reasoning. Without reasoning what opens and closes it is context."""
        before = self._stretches([(self.template.think_first + message.reasoning, False),
                                  (self.template.think_end, True)], train and bool(message.reasoning))
        if self._opening_spans[-1].text is not None:
            before[0] = self._words.continued_span(before[0].text or "", True, before[0].loss)
        if before[-1].text is not None and answer and answer[0].text is not None:
            answer = [self._words.continued_span(answer[0].text, True, answer[0].loss), *answer[1:]]
        return [*self._opening_spans, *before, *answer]

    def _stretches(self, parts: Iterable[Tuple[str, bool]], loss: bool = False) -> List[Span]:
        """Texts as spans. (text, ours): in our own texts, the markers of tools and reasoning are tokens, where the
        vocabulary has them; the text between two of them is encoded as one."""
        if not self._inner:
            return [Span((), "".join([part for part, _ in parts]), loss)]
        spans: List[Span] = []
        text = ""
        for part, ours in parts:
            pieces = self._inner_pattern.split(part) if ours else [part]
            for index, piece in enumerate(pieces):
                if index % 2:
                    spans += [Span(text=text, loss=loss)] if text else []
                    spans.append(Span((self._inner[piece],), loss=loss))
                    text = ""
                else:
                    text += piece
        return [*spans, Span(text=text, loss=loss)] if text or not spans else spans

    def _text_turn(self, turn: List[Message], last: bool) -> List[Span]:
        """One turn with markers in words: question and markers as one text, the answer as another.

        The end of an earlier answer is written in words, too, but carries no loss: a generation ends at the single
        token, which only the last answer has, and the two must not compete for the same place.
        """
        asked = [(self.template.user, False), (self._question(turn), True), (self.template.bot, False)]
        spans = self._words.guarded(asked)
        answer, train = answer_text(turn[-1]), turn[-1].train
        if last:
            return [*spans, *self._words.guarded([(answer, True)], loss=train), Span((self.end_id,), loss=train)]
        spans += self._words.guarded([(answer, True), (self._text_end, False)], loss=train)
        spans[-1] = spans[-1]._replace(tail=self._text_end_length)
        return spans

    def _question_parts(self, turn: List[Message], training: bool = False) -> List[Tuple[str, bool]]:
        """The question or the results of tools. Official training data has results as a user's text."""
        if turn[0].role == USER:
            text = turn[0].content
            written = training and bool(self._inner) and self.template.call_form == JSON
            return response_parts(text) if written else [(text, False)]
        return result_parts([message for message in turn if message.role == TOOL], self.template.call_form)

    def _question(self, turn: List[Message]) -> str:
        return "".join(text for text, _ in self._question_parts(turn))

    def _prompt_ids(self, turns: List[List[Message]], separator: Tuple[int, ...], bot: bool = True) -> List[int]:
        """Ids of the turns and, with `bot`, of the marker that opens the answer to the last one."""
        if self.as_text:
            parts = []
            for turn in turns:
                if turn[0].role != BOT:
                    parts += [(self.template.user, False), (self._question(turn), True)]
                if turn[-1].role == BOT:
                    parts += [(self.template.bot, False), (answer_text(turn[-1]), True),
                              (self._text_end, False)]
            return self._encode(self._words.guarded(parts + ([(self.template.bot, False)] if bot else [])))
        spans = []
        asked = last_question(turns)
        for number, turn in enumerate(turns):
            answered = number and turns[number - 1][-1].role == BOT
            spans += [Span(separator)] if answered and separator else []
            spans += self._turn(turn, current=number >= asked)
        return self._encode(spans + ([marker_span(self.bot_id), *self._opening_spans] if bot else []))

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
