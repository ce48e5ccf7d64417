"""One record of training data, in any of the usual formats, as messages for the renderer.

Handles records, not files (data/sources.py reads those) or tokens. An unusable record raises RecordError with a kind,
under which it is counted, and what exactly is wrong with it.
"""
import json
import re
from typing import List, Optional, Tuple, Union

from research.telechat.common.errors import ConversationError, RecordError
from research.telechat.common.files import DuplicateKeyError, unique_keys
from research.telechat.data.documents import TEXT, Document, holds_text, is_document, read_document
from research.telechat.data.formats import FORMATS, Conversation, read_format, split_inline, told_format
from research.telechat.text.literals import clean
from research.telechat.text.renderer import BOT, SYSTEM

__all__ = ["DATA_FORMATS", "FORMATS", "Conversation", "Document", "detect_format", "parse_any", "parse_record",
           "split_inline"]

DATA_FORMATS = (*FORMATS, TEXT)

_decode = json.JSONDecoder(object_pairs_hook=unique_keys).decode
_BOM = "\ufeff"                              # json.loads names it, the decoder does not
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_record(raw: bytes, data_format: str, named: bool = True) -> Conversation:
    """A record as a conversation: `parse_any` for a format of conversations. RecordError if it is a document."""
    parsed = parse_any(raw, data_format, named)
    if isinstance(parsed, Document):
        raise RecordError("no conversation", "the record is a text without roles")
    return parsed


def parse_any(raw: bytes, data_format: str, named: bool = True) -> Union[Conversation, Document]:
    """A record as a conversation or, in the format "text", as a document.

    Args:
        raw: its JSON text in UTF-8.
        data_format: one of DATA_FORMATS.
        named: the user chose the format. If not, the record's own keys take precedence if they identify one.

    Raises:
        RecordError: invalid UTF-8 or JSON, a duplicate key, other keys or types, roles that do not alternate, no text,
            anything that matters and is not supported (pictures, two system prompts, odd loss markers).
    """
    record, notes = _parse_json(raw)
    own = None if named else told_format(record) or (TEXT if is_document(record) else None)
    if own and own != data_format:
        notes = (*notes, f"record in the format {own!r} in a file of {data_format!r}")
    if (own or data_format) == TEXT:
        document = read_document(record)
        return document._replace(notes=(*document.notes, *notes))
    return _conversation(record, own or data_format, notes)


def _conversation(record: object, data_format: str, notes: Tuple[str, ...]) -> Conversation:
    try:
        conversation = read_format(record, data_format)
    except ConversationError as err:
        raise RecordError("unusable message", str(err)) from None
    messages = list(conversation.messages)
    while messages and messages[-1].role not in (BOT, SYSTEM):
        messages.pop()                           # an unanswered question carries no training signal
        notes = (*notes, "unanswered question at the end dropped")
    if not any(message.role == BOT for message in messages):
        raise RecordError("no answer", "no message from the bot")
    for number, message in enumerate(messages, 1):
        if message.role == BOT and message.train and not message.calls and not message.content.strip():
            raise RecordError("empty answer", f"message {number} from the bot has no text")
    if not notes:
        return conversation
    return conversation._replace(messages=messages, notes=(*conversation.notes, *notes))


def detect_format(raw: bytes) -> Optional[str]:
    """The format of a record, detected by its keys; None if unknown. Raises RecordError for invalid JSON."""
    record = _parse_json(raw)[0]
    return told_format(record) or (TEXT if holds_text(record) else None)


def _parse_json(raw: bytes) -> Tuple[object, Tuple[str, ...]]:
    if not raw:
        raise RecordError("too long", "the record exceeds the length limit")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as err:
        raise RecordError("not UTF-8", f"byte 0x{raw[err.start]:02x} at position {err.start + 1}") from None
    try:
        record = json.loads(text) if text.startswith(_BOM) else _decode(text)
        notes: List[str] = []
        if b"\\u" in raw and _SURROGATE_ESCAPE.search(raw):
            record = clean(record, notes)
    except DuplicateKeyError as err:
        raise RecordError("key twice", repr(err.key)) from None
    except json.JSONDecodeError as err:
        raise RecordError("not JSON", f"{err.msg} at character {err.pos + 1}") from None
    except (ValueError, RecursionError) as err:
        raise RecordError("not JSON", str(err)) from None
    return record, tuple(notes)
