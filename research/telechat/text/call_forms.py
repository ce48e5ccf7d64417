"""Tool calls as exporters write them, read into the one form that the renderer has: JSON texts of name and arguments.

OpenAI's `tool_calls` and `function_call`, bare objects, LangChain's and Anthropic's names for the arguments, lists,
several in a row; each as an object or as its JSON text. In training data, where `notes` collects what was repaired,
texts of Python objects are read as well.
"""
import json
import re
from typing import Any, List, Optional, Tuple

from research.telechat.common.errors import ConversationError
from research.telechat.common.files import unique_keys
from research.telechat.text.literals import clean, read_json, read_literal

CALL_ROLES = ("function_call", "tool_call")          # a bot's message that is nothing but calls, as JSON
REPAIRED = "tool call written as a Python object, read as JSON"
UNUSED = "key of a tool call other than name and arguments not used"
_ARGUMENTS = ("arguments", "parameters", "args", "input", "kwargs")
_BESIDE = frozenset(("name", "function", "type", "id", "call_id", "tool_call_id", "index", *_ARGUMENTS))
_BETWEEN = re.compile(r"(?:[\s,;]|</?tool_call>)*")   # two calls in a text
Notes = Optional[List[str]]


def is_void(value: object) -> bool:
    """Nothing, as exporters write it: null, an empty text or list, an object whose values are nothing."""
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, dict):
        return all(is_void(item) for item in value.values())
    return value is None or value == []


def calls_of(value: object, number: int, notes: Notes = None) -> Tuple[str, ...]:
    """The calls in what is nothing but calls: an object, a list of them, several in a row, or the text of these.

    Args:
        number: of the message, for a ConversationError.
        notes: repairs are appended; None: nothing is repaired.
    """
    values: List[object] = [value]
    if isinstance(value, str):
        try:
            values = _values(value.strip(), notes)
        except (ValueError, RecursionError):
            values = [_literal(value, notes)]
            if values == [None]:
                raise ConversationError(f"message {number}: a tool call is not JSON ({value[:40]!r}); expected an "
                                        "object with name and arguments") from None
    calls = [call for item in values for call in (item if isinstance(item, list) else [item])]
    if not calls:
        raise ConversationError(f"message {number}: it should call a tool, but contains no call")
    return tuple(text for call in calls for text in (
        calls_of(call, number, notes) if isinstance(call, str) else (call_text(call, number, notes),)))


def call_text(call: object, number: int, notes: Notes = None) -> str:
    """A call as the JSON text that TeleChat2 writes, the arguments as they were where they are a JSON text.

    Raises ConversationError: no name, arguments that are not an object, or further keys that would be lost.
    """
    given = call if isinstance(call, dict) else {}
    inner = given.get("function")
    function = inner if isinstance(inner, dict) else given
    names = {name for name in (function.get("name"), given.get("name"), inner)
             if isinstance(name, str) and name.strip()}
    if len(names) != 1:
        raise ConversationError(f"message {number}: a tool call has {'two names' if names else 'no name'}; expected "
                                "name and arguments")
    name = names.pop()
    found = [place[key] for place in ([given] if function is given else [function, given]) for key in _ARGUMENTS
             if place.get(key) is not None and not (isinstance(place[key], str) and not place[key].strip())]
    found = [value for value in found if value != {}] or found[:1]
    lost = [key for key, item in (*given.items(), *function.items()) if key not in _BESIDE and not is_void(item)]
    if len(found) > 1 or (lost and not found):
        what = f"key {lost[0]!r}" if lost else "arguments twice"
        raise ConversationError(f"message {number}: the call of {name[:40]!r} has {what}; expected its arguments, an "
                                "object, under 'arguments'")
    if lost and notes is not None:
        notes.append(UNUSED)
    arguments = _arguments(found[0] if found else None, name, number, notes)
    return f'{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": {arguments}}}'


def call_ids(calls: object) -> List[str]:
    """The ids of OpenAI's tool_calls; empty unless each has one of its own."""
    ids = [call.get("id") for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    whole = isinstance(calls, list) and len(ids) == len(calls) == len(set(map(str, ids)))
    return [name for name in ids if isinstance(name, str) and name] if whole and all(ids) else []


def _values(text: str, notes: Notes) -> List[Any]:
    """The JSON values that follow each other in a text."""
    decoder, values = json.JSONDecoder(object_pairs_hook=unique_keys), []
    position = _after(text, 0)
    while position < len(text):
        value, end = decoder.raw_decode(text, position)
        values.append(clean(value, notes))
        position = _after(text, end)
    return values


def _after(text: str, position: int) -> int:
    between = _BETWEEN.match(text, position)
    return between.end() if between else position


def _literal(text: str, notes: Notes) -> Any:
    """The value of a text of a Python object, noted; None where it is none or nothing is repaired."""
    if notes is None:
        return None
    try:
        value = read_literal(text)
    except ValueError:
        return None
    if isinstance(value, (dict, list)):
        notes.append(REPAIRED)
        return value
    return None


def _arguments(value: object, name: str, number: int, notes: Notes) -> str:
    """Arguments as the text of a JSON object. OpenAI's form has them as JSON text already, which stays as it is."""
    text = value.strip() if isinstance(value, str) else None
    if value is None or text == "":
        return "{}"
    try:
        repairs: List[str] = []
        read = value if text is None else read_json(text, repairs)
        if isinstance(read, str) and read.strip():           # exported twice: a JSON text within a JSON text
            text, read = read.strip(), read_json(read, repairs)
        if notes is not None:
            notes.extend(repairs)
        if isinstance(read, dict):
            return text if text is not None and not repairs else json.dumps(read, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError):
        read = _literal(text or "", notes)
        if isinstance(read, dict):
            return json.dumps(read, ensure_ascii=False, allow_nan=False)
    raise ConversationError(f"message {number}: the arguments of the call of {name[:40]!r} are "
                            f"{str(value)[:40]!r}; expected a JSON object")
