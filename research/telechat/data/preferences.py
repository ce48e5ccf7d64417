"""Preference sets: records with a chosen and a rejected answer, read as a conversation that ends with the chosen one.

The forms of TRL (prompt, chosen, rejected; with and without a prompt, texts and messages), LLaMA-Factory (Alpaca and
ShareGPT with chosen and rejected), ms-swift (messages with rejected_response or rejected_messages) and OpenAI (input,
preferred_output, non_preferred_output). The prompt, and whatever precedes the last message of a user, is context and is
not trained.
"""
import re
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

from research.telechat.common.errors import RecordError
from research.telechat.common.files import JsonObject
from research.telechat.data.markers import flag, is_empty
from research.telechat.data.shapes import canonical, texts_of
from research.telechat.text.messages import BOT, SYSTEM, USER

PAIR = "preference pair: only the chosen answer is trained"
CHOSEN = ("chosen", "preferred_output")
REJECTED = ("rejected", "non_preferred_output", "rejected_response", "rejected_messages")
_OF_PAIRS = (*CHOSEN, *REJECTED)
LISTS = ("messages", "dialog", "conversations")
QUESTIONS = ("prompt", "query", "question")
ANSWERS = ("completion", "response", "answer")
_KIND = "preference pair"
_DIALOGUE = re.compile(r"\s*Human:.*\n\s*Assistant:", re.DOTALL)


class Parts(NamedTuple):
    """The messages of a record, the first `context` of them without loss; `rest`: its other keys."""

    messages: List[Any]
    context: int
    rest: JsonObject


def is_pair(record: JsonObject) -> bool:
    """Whether a record has a chosen or a rejected answer.

    A text such as "False" or "no" alone under `chosen` or `rejected` is a label; two of them may be answers if the
    record has no other one.
    """
    if record.keys().isdisjoint(_OF_PAIRS):
        return False
    given = [(key, record[key]) for key in _OF_PAIRS
             if isinstance(record.get(key), (str, list, dict)) and not is_empty(record[key])]
    labels = [key for key, value in given if key in ("chosen", "rejected") and isinstance(value, str) and (
        flag(value) is not None or value.strip().lower() in ("yes", "no"))]
    answered = any(not is_empty(record.get(key)) for key in (*ANSWERS, "output"))
    return len(given) > len(labels) or (len(labels) == 2 and not answered)


def read_pair(record: JsonObject) -> Parts:
    """A preference pair as a conversation of which only the chosen answer is trained.

    Raises RecordError: no question, no chosen answer, or two answers without a way to know which one is chosen.
    """
    chosen, rejected = _one(record, CHOSEN), _one(record, REJECTED)
    rest = {key: value for key, value in record.items() if key not in (*CHOSEN, *REJECTED)}
    base, rest = _question(rest)
    if is_empty(chosen):                                     # ms-swift: the conversation ends with it
        end = _last_question(base)
        base, rest = (base, rest) if base[end:] else _answered(base, rest)
        if texts_of(base[end:]) and texts_of(base[end:])[-1:] == texts_of(rejected)[-1:]:
            raise RecordError(_KIND, "its answer is the rejected one; expected the chosen answer")
        return Parts(base, end, rest)
    answer = _answer(chosen)
    if _role(answer[0]) in (USER, SYSTEM):                   # the whole conversation, including the question
        return _whole(base, answer, rest)
    if not base:
        raise RecordError(_KIND, "the chosen answer has no question; expected a prompt, an instruction or messages")
    if _role(base[-1]) == BOT:
        end = _last_question(base)
        if texts_of(base[end:]) != texts_of(answer) or not _holds(base[end:], answer):
            raise RecordError(_KIND, "the conversation ends with another answer than the chosen one; remove it")
        return Parts(base, end, rest)
    return Parts([*base, *answer], max(len(base), _last_question([*base, *answer])), rest)


def _whole(base: List[Any], answer: List[Any], rest: JsonObject) -> Parts:
    """A pair whose chosen conversation brings its question, or `base` does as well."""
    lead, own = ([message for message in messages if _role(message) == SYSTEM] for messages in (base, answer))
    if lead and own and not (texts_of(lead) == texts_of(own) and _holds(own, lead)):
        raise RecordError("two system prompts", "the prompt's and the chosen conversation's differ; keep one")
    turns = [message for message in base if _role(message) != SYSTEM]
    same = [message for message in answer if _role(message) != SYSTEM][:len(turns)]
    if not _begins_with(answer, base) or not _holds(same, turns):
        raise RecordError(_KIND, "the chosen conversation does not start with the record's question")
    messages = answer if own else [*lead, *answer]
    return Parts(messages, max(len(messages) - len(answer) + len(turns), _last_question(messages)), rest)


def _holds(kept: List[Any], left: List[Any]) -> bool:
    """Whether messages `kept` have all keys of the messages `left` that say the same and are not read."""
    return len(kept) >= len(left) and all(
        isinstance(ours, dict) and isinstance(theirs, dict) and all(
            is_empty(value) or ours.get(key) == value for key, value in theirs.items()
            if key not in ("role", "from", "content", "value")) for ours, theirs in zip(kept, left))


def read_prompt(record: JsonObject) -> Parts:
    """A record of a prompt and its answer, each a text or a list of messages. RecordError: other types."""
    question, rest = _question(record)
    messages, rest = _answered(question, rest)
    if len(messages) == len(question):
        raise RecordError("wrong shape", f"no answer under {', '.join(map(repr, ANSWERS[:-1]))} or {ANSWERS[-1]!r}; "
                                         "expected text or a list of messages")
    return Parts(messages, len(question) if isinstance(_one(record, QUESTIONS), list) else 0, rest)


def _one(record: JsonObject, keys: Tuple[str, ...]) -> Any:
    """The value under one of the keys. RecordError if two of them differ."""
    found = [record[key] for key in keys if not is_empty(record.get(key))]
    if any(value != found[0] for value in found):
        names = " and ".join(repr(key) for key in keys if not is_empty(record.get(key)))
        raise RecordError("two values", f"keys {names} differ; keep one of them")
    return found[0] if found else None


def _question(record: JsonObject) -> Tuple[List[Any], JsonObject]:
    """The messages of a record without its chosen answer, and the remaining keys."""
    rest: Dict[str, Any] = dict(record)
    inner = rest.get("input")
    if isinstance(inner, dict) and isinstance(inner.get("messages"), list):              # OpenAI
        del rest["input"]
        return list(inner["messages"]), {**{key: value for key, value in inner.items() if key != "messages"}, **rest}
    for key in LISTS:
        if isinstance(rest.get(key), list) and rest[key]:
            return list(rest.pop(key)), rest
    prompt = _one(rest, QUESTIONS)
    if isinstance(prompt, list):
        return list(prompt), {key: value for key, value in rest.items() if key not in QUESTIONS}
    if is_empty(prompt) and is_empty(rest.get("instruction")) and is_empty(rest.get("input")):
        return [], rest
    inline = is_empty(prompt) and is_empty(rest.get("instruction"))      # `input` alone: it may have turns within
    if is_empty(prompt):
        texts = [rest.pop("instruction", None), rest.pop("input", None)]
    else:
        texts = [prompt]
        rest = {key: value for key, value in rest.items() if key not in QUESTIONS}
    if not all(text is None or isinstance(text, str) for text in texts):
        kind = next(type(text).__name__ for text in texts if not (text is None or isinstance(text, str)))
        raise RecordError("wrong shape", f"the question is {kind}; expected text or a list of messages")
    text = "\n".join(filter(None, texts))
    if inline and ("<_user>" in text or "<_bot>" in text):
        raise RecordError(_KIND, "the question contains turn markers; write it as a list of messages")
    return [*earlier_turns(rest.pop("history", None)), {"role": USER, "content": text}], rest


def _answered(messages: List[Any], rest: JsonObject) -> Tuple[List[Any], JsonObject]:
    """The messages with the answer from the record's other keys, and the remaining keys."""
    keys = (*ANSWERS, "output")
    found = _one(rest, keys)
    if is_empty(found):
        return messages, rest
    return [*messages, *_answer(found)], {key: value for key, value in rest.items() if key not in keys}


def earlier_turns(history: Any) -> List[JsonObject]:
    """The messages of a `history`: earlier questions and answers, pairs of texts. RecordError: anything else."""
    messages: List[JsonObject] = []
    for number, pair in enumerate([] if is_empty(history) else history if isinstance(history, list) else [history], 1):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise RecordError("wrong shape", f"entry {number} of 'history' is {str(pair)[:60]}; expected "
                                             "[question, answer]")
        messages += [{"role": USER, "content": pair[0]}, {"role": BOT, "content": pair[1]}]
    return messages


def _answer(value: Any) -> List[Any]:
    """An answer as messages: a text, a message, or a list of messages."""
    if isinstance(value, str):
        if _DIALOGUE.match(value):
            raise RecordError(_KIND, "the chosen answer is a whole dialogue in one text (Human: ... Assistant: ...); "
                                     "write it as a list of messages")
        return [{"role": BOT, "content": value}]
    messages = value if isinstance(value, list) else [value]
    if not all(isinstance(message, dict) for message in messages):
        raise RecordError("wrong shape", f"an answer is {str(value)[:40]!r}; expected text, a message or a list of "
                                         "messages")
    return list(messages)


def _role(message: Any) -> Optional[object]:
    if not isinstance(message, dict):
        return None
    role = message.get("role")
    return canonical(message.get("from") if role is None else role)


def _last_question(messages: List[Any]) -> int:
    """The index after the last user message."""
    return max((place for place, message in enumerate(messages, 1) if _role(message) == USER), default=0)


def _begins_with(whole: List[Any], base: List[Any]) -> bool:
    def texts(messages: List[Any]) -> List[str]:
        return [text for message in messages if _role(message) != SYSTEM for text in texts_of(message)]
    return texts(whole)[:len(texts(base))] == texts(base)


__all__ = ["ANSWERS", "CHOSEN", "LISTS", "PAIR", "QUESTIONS", "REJECTED", "Parts", "earlier_turns", "is_pair",
           "read_pair", "read_prompt"]
