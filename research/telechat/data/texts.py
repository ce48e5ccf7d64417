"""Text files (.txt) as records of documents: the whole file is one document, or each line is."""
import io
import json
from pathlib import Path
from typing import BinaryIO, Callable, Iterator, List, Optional, Tuple

from research.telechat.common.files import JsonObject
from research.telechat.data.documents import CONTINUES, TEXT_KEYS

SUFFIX = ".txt"
_PART = 1 << 20                              # characters of a document tokenised at once


def is_text(path: Path) -> bool:
    """Whether a file is a text file by its name, compressed or not."""
    return path.suffix == SUFFIX or path.suffixes[-2:-1] == [SUFFIX]


def text_records(content: BinaryIO, encoding: str, errors: str, note: Callable[[str], None],
                 lines: bool = False) -> Iterator[Tuple[int, bytes]]:
    """(line on which it begins, JSON text) of each document; line ends become "\\n".

    A document of more than `_PART` characters is split into parts at line ends or, within a longer line, at any
    character; only the last part ends the document. `lines`: each non-blank line is a document.
    """
    reader = io.TextIOWrapper(content, "utf-8-sig" if encoding == "utf-8" else encoding, errors)
    number = begin = 1
    held: List[str] = []                     # the current document, or what follows its last part
    size, in_parts, noted = 0, False, False
    while True:
        line = reader.readline(_PART)
        if line and size + len(line) > _PART and held:
            if not noted:
                note(f"text of more than {_PART:,} characters tokenised in parts")
            yield begin, _record("".join(held), True)
            held, size, in_parts, noted = [], 0, True, True
        if not held:
            begin = number
        held.append(line)
        size += len(line)
        number += line.endswith("\n")
        if not line or (lines and line.endswith("\n")):
            document = "".join(held)
            if in_parts or document.strip():
                yield begin, _record(document.rstrip("\n") or "\n" if lines else document, False if in_parts else None)
            held, size, in_parts = [], 0, False
        if not line:
            return


def _record(text: str, continues: Optional[bool]) -> bytes:
    """continues: None for a document in one piece."""
    record: JsonObject = {TEXT_KEYS[0]: text, **({} if continues is None else {CONTINUES: continues})}
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogateescape")
