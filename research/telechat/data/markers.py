"""What a record has besides its texts: loss markers, pictures, and unused keys.

The formats (data/formats.py) say what they use. Everything else is either honoured here, makes the record unusable
because ignoring it would change the meaning, or is reported so that it can be counted.
"""
from typing import List, Optional, Tuple

from research.telechat.common.errors import RecordError
from research.telechat.common.files import JsonObject
from research.telechat.text.call_forms import CALL_ROLES
from research.telechat.text.messages import BOT, MEDIA, REASONING, ROLE_ALIASES, Message, divided

# False excludes a message from the loss: OpenAI's weight, ms-swift's loss, Axolotl's train and training, the loss_mask
# and step_loss_mask of trainers of reinforcement learning.
TRAINED = ("weight", "loss", "loss_weight", "loss_scale", "loss_mask", "step_loss_mask", "train", "training",
           "trainable", "learnable", "is_train", "train_on_turn", "compute_loss", "calculate_loss")
MASKED = ("mask", "masked", "no_loss", "ignore_loss")          # true excludes it
_PARTIAL = ("train_detail", "training_detail", "train_on_spans")         # parts of a text: not supported
_READ = frozenset(("role", "content", "tool_calls", "function_call", "tools", *TRAINED, *MASKED, *_PARTIAL, *MEDIA))
_OF_PART = ("type", "text")                  # keys of a part of a content
_BOT_KEYS = frozenset(("refusal", *REASONING))
# Per record: KTO marks bad answers by `label` or `kto_tag`, LLaMA-Factory's option masks all answers but the last.
_RECORD_FLAGS = (*TRAINED, "kto_tag", "label")
_STRICT = ("weight", "kto_tag")              # the others have other meanings if they are not booleans
_NUMBERS = ("loss", "train", "loss_scale", "loss_weight")            # those for which 0 and 1 are switches
_LAST_ONLY = "mask_history"
_ALL_TRAINED = ("train_on_prompt", "train_on_inputs", "train_on_input")
_REFUSED = ("chosen", "rejected")
_WHOLE_RECORD = frozenset((*MEDIA, *_REFUSED, *_ALL_TRAINED, *_RECORD_FLAGS))        # what record_trains looks at
_SWITCHES = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
RECORD_LEFT_OUT = "record left out of the loss by its marker"
HISTORY_LEFT_OUT = "earlier answers left out of the loss by 'mask_history'"
LEFT_OUT = "answer left out of the loss by its marker"
NO_REASONING = "reasoning of an answer dropped: the template does not support it"


def flag(value: object) -> Optional[bool]:
    """A boolean in any of its spellings; None if it is not one."""
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    return _SWITCHES.get(value.strip().lower()) if isinstance(value, str) else None


def is_empty(value: object) -> bool:
    """An empty value, as exporters write it: null, an empty text, list or object."""
    return value is None or (isinstance(value, (str, list, dict)) and not (
        value.strip() if isinstance(value, str) else value))


def trains(message: JsonObject, number: int) -> bool:
    """Whether the markers of a message keep it in the loss. RecordError if they cannot be honoured."""
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
            raise RecordError("loss marker", f"message {number}: {key!r} marks parts of the text; only whole messages "
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
            message = reasoned(message, source, number)
            if message.reasoning:
                notes.append(NO_REASONING)               # unless the template supports it, see data/encoding.py
            message = message._replace(train=train)
        elif train and any(flag(source.get(key)) for key in TRAINED if key != "weight"):
            raise RecordError("loss marker", f"message {number} is from {message.role} but marked for training; only "
                                             "answers are trained")
        marked.append(message)
    return marked, tuple(notes)


def reasoned(message: Message, source: JsonObject, number: int) -> Message:
    """An answer with its reasoning in one place. RecordError: reasoning that would be lost, or two of them."""
    for key in REASONING:
        value = source.get(key)
        if not isinstance(value, (str, bool)) and not is_empty(value):
            raise RecordError("reasoning", f"message {number}: {key!r} holds {type(value).__name__}; expected text")
    alone = message._replace(reasoning="")
    within = divided(alone)
    if message.reasoning and within is not alone:            # an empty block says nothing and is left out
        if within.reasoning.strip() not in ("", message.reasoning.strip()):
            raise RecordError("reasoning", f"message {number}: reasoning in its own key and in the text, before "
                                           "</think>; keep one of them")
        return message._replace(content=within.content)
    return message


def record_reasoning(record: JsonObject) -> str:
    """The reasoning of a single-answer record, under any of the usual keys. RecordError if there are two."""
    if record.keys().isdisjoint(REASONING):
        return ""
    found = {record[key].strip("\n") for key in REASONING if isinstance(record.get(key), str) and record[key].strip()}
    if len(found) > 1:
        raise RecordError("reasoning", "two different reasonings; keep one of them")
    return next(iter(found), "")


def _record_switch(record: JsonObject, key: str) -> Optional[bool]:
    """The value of a record's marker; None if the key is missing or has another meaning."""
    value = record.get(key)
    switch = flag(value)
    if key in _STRICT:
        if switch is None and not is_empty(value):
            raise RecordError("loss marker", f"key {key!r} is {str(value)[:40]!r}; expected 0 or 1, true or false")
        return switch
    words = isinstance(value, str) and value.strip().lower() in ("true", "false")
    return switch if isinstance(value, bool) or words or key in _NUMBERS else None


def record_trains(record: JsonObject) -> bool:
    """Whether a whole record is trained. RecordError if it has a marker that cannot be honoured."""
    if record.keys().isdisjoint(_WHOLE_RECORD):          # as nearly always, and this is asked of each record
        return True
    for key in MEDIA:
        if not is_empty(record.get(key)):
            raise RecordError("not text alone", f"key {key!r} holds {str(record[key])[:40]!r}; a text model cannot use "
                                                "it")
    for key in _REFUSED:
        if not is_empty(record.get(key)):
            raise RecordError("preference pair", f"key {key!r} holds {str(record[key])[:40]!r}; expected an answer of "
                                                 "a preference pair, or nothing")
    for key in _ALL_TRAINED:
        if flag(record.get(key)):
            raise RecordError("loss marker", f"key {key!r}: the question is marked for training; only answers are "
                                             "trained")
    return all(_record_switch(record, key) is not False for key in _RECORD_FLAGS if key in record)


def trains_last_only(record: JsonObject) -> bool:
    """Whether a record says that only its last answer is trained."""
    return bool(flag(record.get(_LAST_ONLY)))


def unused_keys(record: JsonObject, used: Tuple[str, ...], messages: List[object], where: str) -> Tuple[str, ...]:
    """Names of unused keys, those of messages as `messages[].name`; empty values do not count."""
    names = [key for key, value in record.items() if key not in used and not is_empty(value) and not (
        _record_switch(record, key) is not None if key in _RECORD_FLAGS else
        flag(value) is not None if key in (_LAST_ONLY, *_ALL_TRAINED) else key in MEDIA)]
    inner = {key for message in messages if isinstance(message, dict) for key, value in message.items()
             if not is_empty(value) and not _is_read(message, key)}
    inner |= {f"content[].{key}" for message in messages if isinstance(message, dict)
              for part in (message["content"] if isinstance(message.get("content"), list) else [])
              if isinstance(part, dict) for key, value in part.items() if key not in _OF_PART and not is_empty(value)}
    return (*names, *(f"{where}[].{key}" for key in sorted(inner)))


def _is_read(message: JsonObject, key: str) -> bool:
    role = message.get("role")
    if key == "tool_call_id":                            # gives the order of results, see data/shapes.py
        return True
    by_bot = key in _BOT_KEYS and not isinstance(message[key], bool)
    return key in _READ or (by_bot and isinstance(role, str) and (
        role in CALL_ROLES or ROLE_ALIASES.get(role, role) == BOT))
