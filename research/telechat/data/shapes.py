"""Normalises the messages of a record to the form that text/messages.py reads, whichever library wrote them.

ShareGPT's `from` and `value`, Anthropic's blocks (thinking, tool_use, tool_result), and results of parallel calls in
the order of the calls.
"""
from typing import Any, Dict, List, Optional, Tuple

from research.telechat.common.errors import RecordError
from research.telechat.common.files import JsonObject
from research.telechat.data.markers import is_empty
from research.telechat.text.call_forms import call_ids
from research.telechat.text.messages import BOT, ROLE_ALIASES, TOOL, USER

REORDERED = "results of parallel tool calls reordered to match the calls"
_THOUGHTS = ("thinking", "reasoning")            # types of blocks, and keys of their texts
_BLOCKS = (*_THOUGHTS, "tool_use", "tool_result")


def canonical(role: object) -> object:
    """TeleChat's name of the role; unknown names are returned unchanged."""
    return ROLE_ALIASES.get(role, role) if isinstance(role, str) else role


def shaped(sources: List[Any]) -> List[Any]:
    """The messages with role and content. Invalid ones are returned unchanged: reading them reports the error.

    Raises RecordError: two speakers or two texts in one message, blocks that would be lost.
    """
    messages: List[Any] = []
    for number, source in enumerate(sources, 1):
        if not isinstance(source, dict):
            messages.append(source)
            continue
        message = _unnamed(source, number)
        content = message.get("content")
        blocks = isinstance(content, list) and any(_kind(part) in _BLOCKS for part in content)
        messages += _spread(message, number) if blocks else [message]
    return messages


def _kind(part: Any) -> Optional[str]:
    """The type of a part of a content; None if it has none."""
    kind = part.get("type") if isinstance(part, dict) else None
    return kind if isinstance(kind, str) else None


def _unnamed(source: JsonObject, number: int) -> JsonObject:
    """A message with `from` and `value` renamed to `role` and `content`."""
    message = dict(source)
    for theirs, ours, what in (("from", "role", "speakers"), ("value", "content", "texts")):
        if theirs not in source:
            continue
        value = message.pop(theirs)
        if is_empty(message.get(ours)):
            message[ours] = value
        elif not is_empty(value) and canonical(value) != canonical(message[ours]):
            raise RecordError(f"two {what}", f"message {number}: {ours!r} is {str(message[ours])[:30]!r} and "
                                             f"{theirs!r} is {str(value)[:30]!r}; leave one of them")
    return message


def _spread(message: JsonObject, number: int) -> List[JsonObject]:
    """A message of blocks: thoughts and calls become keys next to the content, results messages before it."""
    role = canonical(message.get("role"))
    rest: List[Any] = []
    lost: JsonObject = {}
    found: Dict[str, List[Any]] = {"thoughts": [], "tool_use": [], "tool_result": []}
    for part in message["content"]:
        kind = _kind(part)
        if kind not in _BLOCKS:
            rest.append(part)
            continue
        if role != (USER if kind == "tool_result" else BOT) and not (kind == "tool_result" and role == TOOL):
            raise RecordError("unusable message", f"message {number}: a part of type {kind!r} in a message from "
                                                  f"{message.get('role')!r}")
        if kind in _THOUGHTS:
            read = next((key for key in (*_THOUGHTS, "text") if isinstance(part.get(key), str)), None)
            if read is None:
                raise RecordError("unusable message", f"message {number}: a part of type {kind!r} without a text")
            found["thoughts"].append(part[read])
            lost.update(_others(part, ("type", read)))
        else:
            found[str(kind)].append(part)
    results = [{"role": TOOL, "content": part.get("content", ""), "tool_call_id": part.get("tool_use_id"),
                **_others(part, ("type", "content", "tool_use_id"))} for part in found["tool_result"]]
    if results and not rest:                                 # the first result has the other keys of the message
        return [{**message, **results[0]}, *results[1:]]
    main = {**message, **lost, "content": rest}
    for key, parts in (("reasoning_content", ["\n".join(found["thoughts"])] if found["thoughts"] else []),
                       ("tool_calls", found["tool_use"])):
        if parts and not is_empty(message.get(key)):
            raise RecordError("unusable message", f"message {number}: {key!r} accompanies parts of the same kind")
        if parts:
            main[key] = parts[0] if key == "reasoning_content" else parts
    return [*results, main]


def _others(part: JsonObject, read: Tuple[str, ...]) -> JsonObject:
    """The keys of a block that are not read, named as keys of its message, so that they are counted."""
    return {f"content[].{key}": value for key, value in part.items() if key not in read}


def ordered(messages: List[Any]) -> Tuple[List[Any], Tuple[str, ...]]:
    """The messages with the results of each round of calls in the order of the calls, and notes.

    Rendered conversations have no call ids: only the order says which result belongs to which call. Raises RecordError
    if the ids of a round do not match its calls.
    """
    result: List[Any] = []
    notes: Tuple[str, ...] = ()
    place = 0
    while place < len(messages):
        result.append(messages[place])
        ids = _ids(messages[place])
        place += 1
        end = place
        while end < len(messages) and _role(messages[end]) == TOOL:
            end += 1
        answers = messages[place:end]
        names = [answer.get("tool_call_id") for answer in answers]
        if len(ids) > 1 and len(names) > 1 and all(isinstance(name, str) and name for name in names):
            if len(set(names)) != len(names) or not set(names) <= set(ids):
                raise RecordError("result of another call", f"message {place + 1}: results for the calls "
                                  f"{', '.join(map(repr, names))[:80]}, expected {', '.join(map(repr, ids))[:80]}")
            sorted_answers = sorted(answers, key=lambda answer: ids.index(answer["tool_call_id"]))
            notes += (REORDERED,) if sorted_answers != answers else ()
            answers = sorted_answers
        result += answers
        place = end
    return result, notes


def _role(message: Any) -> Optional[object]:
    return canonical(message.get("role")) if isinstance(message, dict) else None


def _ids(message: Any) -> List[str]:
    return call_ids(message.get("tool_calls")) if _role(message) == BOT else []


def texts_of(value: Any, depth: int = 0) -> List[str]:
    """The texts in a value that may be a text, a message, or lists of these."""
    if isinstance(value, str):
        return [value.strip()] if value.strip() else []
    if isinstance(value, list) and depth < 4:
        return [text for item in value for text in texts_of(item, depth + 1)]
    if isinstance(value, dict) and depth < 4:
        return [text for key in ("content", "value", "text") for text in texts_of(value.get(key), depth + 1)]
    return []

