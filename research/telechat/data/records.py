"""One record of training data, in any of the usual formats, as messages for the renderer.

Knows the shapes of records, not files (data/sources.py reads those) and not tokens. A record that cannot be used
raises RecordError with a kind, under which it is counted, and what exactly is wrong with it.
"""
import json
import re
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple, Union

from research.telechat.common.errors import ConversationError, RecordError
from research.telechat.common.files import DuplicateKeyError, JsonObject, unique_keys
from research.telechat.text.messages import Tools
from research.telechat.text.renderer import BOT, SYSTEM, USER, Message, to_message

_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


class Conversation(NamedTuple):
    """Messages in order, the bot's answer last; `notes` are kinds of repairs that were made, to be counted."""

    messages: List[Message]
    tools: Tools = None
    notes: Tuple[str, ...] = ()


def parse_record(raw: bytes, data_format: str) -> Conversation:
    """A record as a conversation.

    Args:
        raw: its JSON text in UTF-8.
        data_format: a key of FORMATS.

    Raises:
        RecordError: no UTF-8, no JSON, a key twice, other keys or types, roles that do not alternate, an empty answer.
    """
    record, notes = _parse_json(raw)
    try:
        conversation = FORMATS[data_format](record)
    except ConversationError as err:
        raise RecordError("unusable message", str(err)) from None
    messages = list(conversation.messages)
    while messages and messages[-1].role not in (BOT, SYSTEM):
        messages.pop()                           # a question that nobody answered teaches nothing
        notes = (*notes, "question at the end without answer left out")
    if not any(message.role == BOT for message in messages):
        raise RecordError("no answer", "no message from the bot")
    for number, message in enumerate(messages, 1):
        if message.role == BOT and not message.calls and not message.content.strip():
            raise RecordError("empty answer", f"message {number} from the bot has no text")
    return Conversation(messages, conversation.tools, (*conversation.notes, *notes))


def detect_format(raw: bytes) -> Optional[str]:
    """The format of a record by its keys; None if it cannot be told. Never raises."""
    try:
        record, _ = _parse_json(raw)
    except RecordError:
        return None
    if not isinstance(record, dict):
        return None
    return next((name for name, keys in _SIGNATURES.items() if all(key in record for key in keys)), None)


def _parse_json(raw: bytes) -> Tuple[Any, Tuple[str, ...]]:
    if not raw:
        raise RecordError("too long", "the record is longer than a record may be")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as err:
        raise RecordError("not UTF-8", f"byte 0x{raw[err.start]:02x} at position {err.start + 1}") from None
    try:
        record = json.loads(text, object_pairs_hook=unique_keys)
    except DuplicateKeyError as err:
        raise RecordError("key twice", repr(err.key)) from None
    except json.JSONDecodeError as err:
        raise RecordError("not JSON", f"{err.msg} at character {err.pos + 1}") from None
    except (ValueError, RecursionError) as err:
        raise RecordError("not JSON", str(err)) from None
    if _SURROGATE_ESCAPE.search(raw):
        cleaned = _clean(record)
        if cleaned != record:
            return cleaned, ("lone surrogates replaced by U+FFFD",)
    return record, ()


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_clean(item) for item in value]
    if isinstance(value, dict):
        return {_clean(key): _clean(item) for key, item in value.items()}
    return value


def _get(record: JsonObject, key: str, kinds: Union[type, Tuple[type, ...]], required: bool = True) -> Any:
    """record[key], checked. A missing or null optional key gives None."""
    if not isinstance(record, dict):
        raise RecordError("wrong shape", f"the record is {type(record).__name__}; expected a JSON object")
    value = record.get(key)
    if value is None and not required:
        return None
    if not isinstance(value, kinds):
        found = "null" if key in record and value is None else type(value).__name__ if key in record else "nothing"
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        expected = " or ".join("text" if kind is str else "a list" for kind in kinds)
        raise RecordError("wrong shape", f"key {key!r} holds {found}; expected {expected}")
    return value


def _system(record: JsonObject) -> List[Message]:
    system = _get(record, "system", str, required=False)
    return [] if system is None else [Message(SYSTEM, system)]


def _tools(record: JsonObject) -> Tools:
    tools = _get(record, "tools", (list, str), required=False)
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise RecordError("wrong shape", "key 'tools' is a text, but not JSON; expected a list of tools") from None
        if not isinstance(tools, list):
            raise RecordError("wrong shape", f"key 'tools' holds {type(tools).__name__}; expected a list of tools")
    return tools or None


def _input_output(record: JsonObject) -> Conversation:
    """`input` with <_user> and <_bot> between the turns, `output` is the last answer."""
    question, answer = _get(record, "input", str), _get(record, "output", str)
    messages, whole = split_inline(question)
    if answer.startswith("<_bot>"):
        answer = answer[len("<_bot>"):]
    notes = () if whole else ("marker in the input read as text",)
    return Conversation([*_system(record), *messages, Message(BOT, answer)], _tools(record), notes)


def split_inline(text: str) -> Tuple[List[Message], bool]:
    """Messages of an `input` with inline markers: user, bot, ..., user. And whether every marker opened a turn.

    <_bot> opens an answer only where a question stands before it and another question follows the answer; any other
    marker is text that somebody typed. <_end> directly before <_user> closes an answer and is left out.
    """
    if text.startswith("<_user>"):
        text = text[len("<_user>"):]
    pieces = re.split("(<_user>|<_bot>)", text)
    parts = [pieces[0]]
    whole = True
    for marker, piece in zip(pieces[1::2], pieces[2::2]):
        if marker == ("<_bot>" if len(parts) % 2 else "<_user>"):
            parts.append(piece)
        else:
            parts[-1] += marker + piece
            whole = False
    if len(parts) % 2 == 0:                      # it ends within an answer, though `output` is the answer
        parts[-2:] = [f"{parts[-2]}<_bot>{parts[-1]}"]
        whole = False
    for index in range(1, len(parts), 2):
        if parts[index].endswith("<_end>"):
            parts[index] = parts[index][:-len("<_end>")]
    return [Message(BOT if index % 2 else USER, part) for index, part in enumerate(parts)], whole


def _message_list(record: JsonObject, key: str) -> List[Message]:
    messages = [to_message(message, number) for number, message in enumerate(_get(record, key, list), 1)]
    return messages if messages and messages[0].role == SYSTEM else [*_system(record), *messages]


def _dialog(record: JsonObject) -> Conversation:
    return Conversation(_message_list(record, "dialog"), _tools(record))


def _messages(record: JsonObject) -> Conversation:
    return Conversation(_message_list(record, "messages"), _tools(record))


def _sharegpt(record: JsonObject) -> Conversation:
    """`conversations` of `from` and `value`; a function_call is an answer of the bot."""
    messages = []
    for message in _get(record, "conversations", list):
        if isinstance(message, dict) and "from" in message:
            if message["from"] == "function_call" and isinstance(message.get("value"), str):
                messages.append(Message(BOT, "", (message["value"],)))
                continue
            message = {"role": message["from"], "content": message.get("value")}
        messages.append(message)
    return Conversation(_message_list({**record, "conversations": messages}, "conversations"), _tools(record))


def _alpaca(record: JsonObject) -> Conversation:
    """`instruction` with an optional `input` below it, `output`; `history` is a list of question and answer."""
    messages = _system(record)
    for number, pair in enumerate(_get(record, "history", list, required=False) or [], 1):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise RecordError("wrong shape", f"entry {number} of 'history' is {str(pair)[:60]}; expected "
                                             "[question, answer]")
        messages += [Message(USER, pair[0]), Message(BOT, pair[1])]
    question = "\n".join(filter(None, (_get(record, "instruction", str), _get(record, "input", str, required=False))))
    return Conversation([*messages, Message(USER, question), Message(BOT, _get(record, "output", str))], None)


FORMATS: Dict[str, Callable[[JsonObject], Conversation]] = {
    "input_output": _input_output, "dialog": _dialog, "sharegpt": _sharegpt, "messages": _messages, "alpaca": _alpaca}
# Keys that tell a format, looked for in this order: Alpaca has `input` and `output`, too.
_SIGNATURES: Dict[str, Tuple[str, ...]] = {
    "dialog": ("dialog",), "messages": ("messages",), "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"), "input_output": ("input", "output")}
