"""Documents of continued pre-training: plain texts, trained on every token.

Reads a record as a document and splits documents that are longer than a training record. Conversations are read by
data/formats.py and split by data/packing.py.
"""
from typing import NamedTuple, Tuple

import numpy as np

from research.telechat.common.errors import RecordError
from research.telechat.common.files import JsonObject
from research.telechat.data.markers import record_trains, unused_keys
from research.telechat.data.packing import WHOLE, Cut, without_loss

TEXT = "text"                                # the name of the format
TEXT_KEYS = ("text", "content", "data")      # the first of these keys in a record is its text
CONTINUES = "document_continues"             # in parts of a long document: true if it goes on, without an end token


class Document(NamedTuple):
    """One text. `notes` and `unused` as those of data.formats.Conversation."""

    text: str
    ends: bool = True                        # whether the document ends here
    train: bool = True
    notes: Tuple[str, ...] = ()
    unused: Tuple[str, ...] = ()


def is_document(record: object) -> bool:
    """Whether a parsed record that is not a conversation is certainly a document: it has `text`."""
    return isinstance(record, dict) and isinstance(record.get(TEXT_KEYS[0]), str)


def holds_text(record: object) -> bool:
    """Whether a parsed record that is not a conversation may be a document: a text under any of the keys, without a
    speaker."""
    return isinstance(record, dict) and "role" not in record and "from" not in record and isinstance(
        next((record[key] for key in TEXT_KEYS if record.get(key) is not None), None), str)


def read_document(record: object) -> Document:
    """A parsed record as a document. Raises RecordError."""
    if not isinstance(record, dict):
        raise RecordError("wrong shape", f"the record is {type(record).__name__}; expected a JSON object")
    key = next((key for key in TEXT_KEYS if record.get(key) is not None), None)
    if key is None:
        raise RecordError("wrong shape", f"no key {', '.join(map(repr, TEXT_KEYS[:-1]))} or {TEXT_KEYS[-1]!r} with a "
                                         f"text; found {_names(record)}")
    if not isinstance(record[key], str):
        raise RecordError("wrong shape", f"key {key!r} holds {type(record[key]).__name__}; expected text")
    if not record[key].strip() and CONTINUES not in record:
        raise RecordError("empty text", f"key {key!r} contains no text")
    train = record_trains(record)
    notes = () if train else ("record left out of the loss by its marker",)
    return Document(record[key], record.get(CONTINUES) is not True, train, notes,
                    unused_keys(record, (key, CONTINUES), [], ""))


def _names(record: JsonObject) -> str:
    return f"the keys {', '.join(map(repr, list(record)[:8]))}" if record else "an empty object"


def cut_document(marked: np.ndarray, limit: int, long: str = "split", overlap: int = 1) -> Cut:
    """A document split into pieces of at most `limit` tokens.

    Args:
        marked: its ids, complemented where they carry no loss.
        limit: tokens of one record.
        long: what to do with a longer one. "split": pieces of `limit` tokens and a last one with the rest. "truncate":
            the first piece only. "drop": nothing.
        overlap: tokens at the beginning of a later piece that repeat the end of the previous one, as context without
            loss; below `limit`. With 1, the last token of a piece, which is only a label, is the first input of the
            next, so that every token but the first is predicted once. With 0, the first token of a piece is not.
    """
    if not (marked >= 0).any():
        return Cut([], 0, len(marked), 0, "nothing to train")
    if len(marked) <= limit:
        return Cut([marked], len(marked), 0, 0, WHOLE, [len(marked)])
    if long == "drop":
        return Cut([], 0, len(marked), 0, "longer than the length")
    pieces, fresh = [marked[:limit]], [limit]
    if long == "truncate":
        return Cut(pieces, limit, len(marked) - limit, 0, "truncated", fresh)
    for start in range(limit, len(marked), limit - overlap):
        part = marked[start - overlap:start - overlap + limit]
        pieces.append(without_loss(part, overlap))
        fresh.append(len(part) - overlap)
    return Cut(pieces, len(marked), 0, overlap * (len(pieces) - 1), "split", fresh)
