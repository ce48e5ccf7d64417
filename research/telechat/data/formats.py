"""The formats of records: the keys that identify each, and how it becomes messages.

One function per format. data/markers.py handles whatever else is in a record.
"""
import re
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple, Union

from research.telechat.common.errors import RecordError
from research.telechat.common.files import JsonObject
from research.telechat.data.markers import (
    HISTORY_LEFT_OUT,
    NO_REASONING,
    RECORD_LEFT_OUT,
    is_empty,
    mark,
    record_reasoning,
    record_trains,
    trains_last_only,
    unused_keys,
)
from research.telechat.data.preferences import (
    ANSWERS,
    LISTS,
    PAIR,
    QUESTIONS,
    earlier_turns,
    is_pair,
    read_pair,
    read_prompt,
)
from research.telechat.data.shapes import ordered, shaped, texts_of
from research.telechat.text.literals import read_json, read_literal
from research.telechat.text.messages import REASONING, TOOL, Tools, join_calls
from research.telechat.text.renderer import BOT, SYSTEM, USER, Message, to_message

_SYSTEMS = ("system", "system_prompt")
_TOOLS = ("tools", "functions")
_INLINE = re.compile("(<_user>|<_bot>)")


class Conversation(NamedTuple):
    """Messages in order, the bot's answer last.

    `notes` are kinds of repairs that were made, to be counted; `unused` the keys of the record that were not used.
    """

    messages: List[Message]
    tools: Tools = None
    notes: Tuple[str, ...] = ()
    unused: Tuple[str, ...] = ()


def read_format(record: object, data_format: str) -> Conversation:
    """A parsed record of a format. Raises RecordError and ConversationError."""
    if not isinstance(record, dict):
        raise RecordError("wrong shape", f"the record is {type(record).__name__}; expected a JSON object")
    if is_pair(record):
        parts = read_pair(record)
        record = {**parts.rest, "messages": parts.messages}
        conversation = _message_list(record, "messages", parts.context)
        conversation = conversation._replace(notes=(*conversation.notes, PAIR))
    else:
        conversation = FORMATS[data_format](record)
    answers = [number for number, message in enumerate(conversation.messages) if message.role == BOT]
    if not record_trains(record):
        return _untrained(conversation, answers, RECORD_LEFT_OUT)
    if trains_last_only(record) and answers[1:]:
        return _untrained(conversation, answers[:-1], HISTORY_LEFT_OUT)
    return conversation


def _untrained(conversation: Conversation, numbers: List[int], note: str) -> Conversation:
    messages = [message._replace(train=False) if number in numbers else message
                for number, message in enumerate(conversation.messages)]
    return conversation._replace(messages=messages, notes=(*conversation.notes, note))


def told_format(record: object) -> Optional[str]:
    """The format of a parsed record, detected by its keys; None if unknown."""
    if not isinstance(record, dict):
        return None
    if is_pair(record):
        return "messages"
    given = {key for key, value in record.items() if value is not None and not (key in LISTS and is_empty(value))}
    told = next((name for name, keys in _SIGNATURES.items() if given.issuperset(keys)), None)
    if told:
        return told
    if any(not is_empty(record.get(key)) for key in QUESTIONS) and any(
            not is_empty(record.get(key)) for key in ANSWERS) and is_empty(record.get("output")):
        return "prompt"
    return next((key for key in _SIGNATURES if _SIGNATURES[key][0] in record and len(_SIGNATURES[key]) == 1), None)


def _get(record: JsonObject, key: str, kinds: Union[type, Tuple[type, ...]], required: bool = True) -> Any:
    """record[key], checked. A missing or null optional key gives None."""
    value = record.get(key)
    if value is None and not required:
        return None
    if not isinstance(value, kinds):
        found = "null" if key in record and value is None else type(value).__name__ if key in record else "nothing"
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        expected = " or ".join("text" if kind is str else "a list" for kind in kinds)
        raise RecordError("wrong shape", f"key {key!r} holds {found}; expected {expected}")
    return value


def _system(record: JsonObject, messages: Tuple[Message, ...] = ()) -> List[Message]:
    """The record's system prompt as a message; none if `messages` already have the same one."""
    texts = [text for text in (_get(record, key, str, required=False) for key in _SYSTEMS) if text is not None]
    given = messages[0].content if messages and messages[0].role == SYSTEM else None
    if given is not None:
        texts = [text for text in (*texts, given) if text.strip()]
    if any(text != texts[0] for text in texts):
        raise RecordError("two system prompts", f"{texts[0][:30]!r} and {texts[-1][:30]!r}; keep only one")
    return [Message(SYSTEM, texts[0])] if texts and (given is None or not given.strip()) else []


def _tools(record: JsonObject, notes: List[str], messages: Tuple[object, ...] = ()) -> Tools:
    """The tools of a record: under `tools`, the older `functions`, or in its system message."""
    if not messages and record.keys().isdisjoint(_TOOLS):
        return None
    found = [_tool_list(record, "tools", notes), _functions(record, notes)]
    found += [_tool_list(message, "tools", notes) for message in messages if isinstance(message, dict)]
    lists = [tools for tools in found if tools]
    if any(tools != lists[0] for tools in lists):
        raise RecordError("two lists of tools", "tools are listed in two places and differ; keep one list")
    return lists[0] if lists else None


def _functions(record: JsonObject, notes: List[str]) -> Optional[List[Any]]:
    functions = _tool_list(record, "functions", notes)
    return functions and [function if isinstance(function.get("function"), dict) else
                          {"type": "function", "function": function} for function in functions]


def _tool_list(record: JsonObject, key: str, notes: List[str]) -> Optional[List[Any]]:
    """The descriptions under a key: a list, one object, or either as JSON text."""
    tools = _tool_value(_get(record, key, (list, dict, str), required=False), key, notes)
    tools = [tools] if isinstance(tools, dict) and tools else tools
    if tools is None or tools == "" or tools == [] or tools == {}:
        return None
    if not isinstance(tools, list):
        raise RecordError("wrong shape", f"key {key!r} holds {type(tools).__name__}; expected a list of tools")
    tools = [_tool_value(tool, key, notes) for tool in tools]
    for number, tool in enumerate(tools, 1):
        if not isinstance(tool, dict):
            raise RecordError("wrong shape", f"entry {number} of {key!r} is {type(tool).__name__}; expected an object "
                                             "that describes a tool")
    return tools


def _tool_value(value: Any, key: str, notes: List[str]) -> Any:
    if not isinstance(value, str) or not value.strip():
        return value.strip() if isinstance(value, str) else value
    for read in (lambda text: read_json(text, notes), read_literal):
        try:
            return read(value)
        except ValueError:
            continue
    raise RecordError("wrong shape", f"key {key!r} is a string but not JSON; expected a list of tools")


# Keys that bring turns. A templated or gold text of another key is counted as not used.
_CARRIES = ("instruction", "input", "output", "history", *LISTS)


def _refuse(record: JsonObject, used: Tuple[str, ...], messages: List[Message], data_format: str) -> None:
    """RecordError if a key of another format has texts that the messages lack: they would be lost."""
    contents = [message.content for message in messages]
    for key in (*_CARRIES, "context") if data_format == "prompt" else _CARRIES:
        if key in record and key not in used and not all(
                any(text in content for content in contents) for text in texts_of(record[key])):
            raise RecordError("key of another format", f"key {key!r} in a record of the format {data_format!r} has "
                                                       "text that its messages lack; remove it, or move it there")


def _input_output(record: JsonObject) -> Conversation:
    """`input` with <_user> and <_bot> between the turns; `output` is the last answer."""
    question, answer = _get(record, "input", str), _get(record, "output", str)
    messages, whole = split_inline(question)
    if answer.startswith("<_bot>"):
        answer = answer[len("<_bot>"):]
    notes = () if whole else ("marker in the input read as text",)
    return _of_keys(record, ("input", "output"), [*_system(record), *messages, Message(BOT, answer)], "input_output",
                    notes)


def _of_keys(record: JsonObject, used: Tuple[str, ...], messages: List[Message], data_format: str,
             notes: Tuple[str, ...] = ()) -> Conversation:
    """A conversation from a record with its last answer, and possibly its reasoning, under keys of their own."""
    used = (*used, *_TOOLS, *_SYSTEMS)
    _refuse(record, used, messages, data_format)
    reasoning = record_reasoning(record)
    if reasoning:
        notes += (NO_REASONING,)
        messages = [*messages[:-1], messages[-1]._replace(reasoning=reasoning)]
        used += REASONING
    repairs: List[str] = []
    tools = _tools(record, repairs)
    return Conversation(messages, tools, (*notes, *repairs), unused_keys(record, used, [], ""))


def split_inline(text: str) -> Tuple[List[Message], bool]:
    """Messages of an `input` with inline markers: user, bot, ..., user; and whether every marker opened a turn.

    <_bot> opens an answer only after a question and if another question follows the answer; any other marker is text
    that a user typed. <_end> directly before <_user> closes an answer and is left out.
    """
    if text.startswith("<_user>"):
        text = text[len("<_user>"):]
    pieces = _INLINE.split(text)
    parts = [pieces[0]]
    whole = True
    for marker, piece in zip(pieces[1::2], pieces[2::2]):
        if marker == ("<_bot>" if len(parts) % 2 else "<_user>"):
            parts.append(piece)
        else:
            parts[-1] += marker + piece
            whole = False
    if len(parts) % 2 == 0:                      # it ends in an answer, although `output` is the answer
        parts[-2:] = [f"{parts[-2]}<_bot>{parts[-1]}"]
        whole = False
    for index in range(1, len(parts), 2):
        if parts[index].endswith("<_end>"):
            parts[index] = parts[index][:-len("<_end>")]
    return [Message(BOT if index % 2 else USER, part) for index, part in enumerate(parts)], whole


def _message_list(record: JsonObject, key: str, context: int = 0, data_format: str = "") -> Conversation:
    """A conversation from the list of messages under `key`, the first `context` of which are not trained."""
    given = _get(record, key, list)
    before = len(shaped(given[:context]))
    sources, notes = ordered(shaped(given))
    repairs: List[str] = []
    messages, marked = mark([to_message(source, number, repairs) for number, source in enumerate(sources, 1)], sources)
    messages = [message._replace(train=False) if number < before else message
                for number, message in enumerate(messages)]
    messages = join_calls(messages, [isinstance(source, dict) and source.get("role") for source in sources])
    if _uncalled(messages):
        repairs.append("tool result without a preceding call")
    used = (key, *_TOOLS, *_SYSTEMS)
    _refuse(record, used, messages, data_format or key)
    tools = _tools(record, repairs, tuple(sources))
    system = _system(record, tuple(messages))
    blank = system and messages and messages[0].role == SYSTEM           # the record has the text that it lacks
    return Conversation([*system, *(messages[1:] if blank else messages)], tools, (*notes, *marked, *repairs),
                        unused_keys(record, used, sources, key))


def _uncalled(messages: List[Message]) -> bool:
    """Whether there is a tool result without a call, in words or otherwise."""
    return any(message.role == TOOL and before.role == BOT and not before.calls and "<tool_call>" not in before.content
               for before, message in zip(messages, messages[1:]))


def _dialog(record: JsonObject) -> Conversation:
    return _message_list(record, "dialog")


def _messages(record: JsonObject) -> Conversation:
    return _message_list(record, "messages")


def _sharegpt(record: JsonObject) -> Conversation:
    """`conversations` of `from` and `value`; a function_call is a bot answer or follows one."""
    return _message_list(record, "conversations")


def _prompt(record: JsonObject) -> Conversation:
    """A prompt and its answer, each a text or a list of messages; the prompt carries no loss."""
    parts = read_prompt(record)
    if parts.messages and isinstance(parts.messages[-1], dict) and record_reasoning(parts.rest):
        last = {"reasoning_content": record_reasoning(parts.rest), **parts.messages[-1]}
        rest = {key: value for key, value in parts.rest.items() if key not in REASONING}
        parts = parts._replace(messages=[*parts.messages[:-1], last], rest=rest)
    return _message_list({**parts.rest, "messages": parts.messages}, "messages", parts.context, "prompt")


def _alpaca(record: JsonObject) -> Conversation:
    """`instruction` with an optional `input` below it, `output`; `history` is a list of question and answer."""
    messages = [*_system(record), *(to_message(turn, 0) for turn in earlier_turns(record.get("history")))]
    question = "\n".join(filter(None, (_get(record, "instruction", str), _get(record, "input", str, required=False))))
    messages += [Message(USER, question), Message(BOT, _get(record, "output", str))]
    return _of_keys(record, ("instruction", "input", "output", "history"), messages, "alpaca")


FORMATS: Dict[str, Callable[[JsonObject], Conversation]] = {
    "input_output": _input_output, "dialog": _dialog, "sharegpt": _sharegpt, "messages": _messages, "alpaca": _alpaca,
    "prompt": _prompt}
# Keys that identify a format, checked in this order: Alpaca has `input` and `output`, too.
_SIGNATURES: Dict[str, Tuple[str, ...]] = {
    "dialog": ("dialog",), "messages": ("messages",), "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"), "input_output": ("input", "output")}
SIGNATURE_KEYS = tuple(_SIGNATURES.values())
