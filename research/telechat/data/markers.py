"""What stands beside the texts of a record: markers of what is trained, pictures, and keys that nobody reads.

The formats (data/formats.py) say what they use. Everything else is either honoured here, makes the record unusable
because it would change the meaning, or is named so that it can be counted.
"""
from typing import List, Optional, Tuple

from research.telechat.common.errors import RecordError
from research.telechat.common.files import JsonObject
from research.telechat.text.messages import BOT, MEDIA, REASONING, Message

# A message with a false one is left out of the loss: OpenAI's weight, ms-swift's loss, Axolotl's train and training.
TRAINED = ("weight", "loss", "loss_weight", "loss_scale", "train", "training", "trainable")
MASKED = ("mask", "masked")                  # a true one leaves it out
_PARTIAL = ("train_detail", "training_detail", "train_on_spans")         # parts of a text: cannot be honoured
_MESSAGE_KEYS = frozenset(("role", "content", "from", "value", "tool_calls", "function_call", "refusal", "tools",
                           *TRAINED, *MASKED, *_PARTIAL, *REASONING, *MEDIA))
# Of a record: KTO marks bad answers by `label` or `kto_tag`.
_RECORD_FLAGS = ("weight", "loss", "train", "training", "kto_tag", "label")
_STRICT = ("weight", "kto_tag")              # the others have other meanings, too, where they are no truth values
_REFUSED = ("chosen", "rejected")
_SWITCHES = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
LEFT_OUT = "answer left out of the loss by its marker"
NO_REASONING = "reasoning of an answer left out: the template has no place for it"


def flag(value: object) -> Optional[bool]:
    """A truth value in any of its spellings; None where it is none."""
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    return _SWITCHES.get(value.strip().lower()) if isinstance(value, str) else None


def is_empty(value: object) -> bool:
    """No value, as exporters write it: null, an empty text, list or object."""
    return value is None or (isinstance(value, (str, list, dict)) and not (
        value.strip() if isinstance(value, str) else value))


def trains(message: JsonObject, number: int) -> bool:
    """Whether the markers of a message leave it in the loss. RecordError where they say what cannot be honoured."""
    train = True
    for key in (*TRAINED, *MASKED):
        value = message.get(key)
        if is_empty(value):
            continue
        switch = flag(value)
        if switch is None:
            raise RecordError("loss marker", f"message {number}: {key!r} is {str(value)[:40]!r}; expected 0 or 1, "
                                             "true or false")
        train = train and switch != (key in MASKED)
    for key in _PARTIAL:
        if not is_empty(message.get(key)):
            raise RecordError("loss marker", f"message {number}: {key!r} marks parts of a text; only whole messages "
                                             "can be left out of the loss")
    return train


def mark(messages: List[Message], sources: List[object]) -> Tuple[List[Message], Tuple[str, ...]]:
    """The messages with their markers honoured, and notes. `sources`: the object from which each was read."""
    notes: List[str] = []
    marked = []
    for number, (message, source) in enumerate(zip(messages, sources), 1):
        source = source if isinstance(source, dict) else {}
        train = trains(source, number)
        if message.role == BOT:
            if not train:
                notes.append(LEFT_OUT)
            if any(not is_empty(source.get(key)) for key in REASONING):
                notes.append(NO_REASONING)               # unless the template has one, see data/encoding.py
            message = message._replace(train=train)
        elif train and any(flag(source.get(key)) for key in ("loss", "train", "training")):
            raise RecordError("loss marker", f"message {number} is from {message.role} and marked for training; only "
                                             "answers are trained")
        marked.append(message)
    return marked, tuple(notes)


def record_trains(record: JsonObject) -> bool:
    """Whether a whole record is trained. RecordError where it holds what cannot be honoured."""
    for key in MEDIA:
        if not is_empty(record.get(key)):
            raise RecordError("not text alone", f"key {key!r} holds {str(record[key])[:40]!r}; a text model cannot use "
                                                "it")
    for key in _REFUSED:
        if not is_empty(record.get(key)):
            raise RecordError("preference pair", f"key {key!r}: a record with chosen and rejected answers; write the "
                                                 "chosen one as the answer")
    train = True
    for key in _RECORD_FLAGS:
        value = record.get(key)
        switch = flag(value) if isinstance(value, bool) or key in _STRICT or key in ("loss", "train") else None
        if switch is None and key in _STRICT and not is_empty(value):
            raise RecordError("loss marker", f"key {key!r} is {str(value)[:40]!r}; expected 0 or 1, true or false")
        train = train and switch is not False
    return train


def unused_keys(record: JsonObject, used: Tuple[str, ...], messages: List[object], where: str) -> Tuple[str, ...]:
    """Names of the keys that are not used, those of messages as `messages[].name`; empty values do not count."""
    skip = (*used, *_RECORD_FLAGS, *MEDIA)
    names = [key for key, value in record.items() if key not in skip and not is_empty(value)]
    inner = {key for message in messages if isinstance(message, dict) for key, value in message.items()
             if key not in _MESSAGE_KEYS and not is_empty(value)}
    return (*names, *(f"{where}[].{key}" for key in sorted(inner)))
