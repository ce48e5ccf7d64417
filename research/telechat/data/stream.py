"""The records of one file as raw JSON texts, however the file arranges and encodes them.

JSON values in any arrangement: one per line, over several lines, several in a row, in arrays, or in an array within an
object. Compressed or not, in UTF-8, UTF-16, UTF-32 or GB18030. Tables are read by data/tables.py. Everything is
streamed: memory does not grow with the file.
"""
import codecs
import gzip
import io
import json
import re
from pathlib import Path
from typing import BinaryIO, Callable, Iterator, List, Optional, Tuple, cast

from research.telechat.common.errors import ConfigError
from research.telechat.data import tables, texts
from research.telechat.data.documents import is_document
from research.telechat.data.formats import told_format

MAX_RECORD_BYTES = 16 << 20                  # longer ones count as unusable: they would break the memory bound
_BLOCK = 1 << 20                             # bytes read at once
_HEAD = 1 << 16                              # bytes used to detect a file's type and encoding
_SPACE = re.compile("[ \t\r\n\x0b\x0c\x1e\ufeff,]*")         # between values; \x1e as in JSON text sequences
_VALUE_LINE = re.compile(r"\n(?=[{\[])")     # a line that begins a value, not one within a value
_NEAR_END = 16                               # characters; an error this close to the end may be a truncated value
_scan = json.JSONDecoder().raw_decode
_BOMS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
         (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_FOREIGN = (
    (b"PK\x03\x04", "a zip archive or an Excel file; unpack it, or save it as CSV"),
    (b"version https://git-lfs", "a Git LFS pointer, not the data; fetch it with git lfs pull"),
    (b"<!DOCTYPE", "a web page; download the file itself"), (b"<html", "a web page; download the file itself"),
    (b"SQLite format 3", "an SQLite database; export its table as JSON lines"),
    (b"%PDF", "a PDF"), (b"\x80\x02", "a pickle"), (b"\x80\x04", "a pickle"),
    (b"BZh", "compressed with bzip2; unpack it"),
    (b"\xfd7zXZ", "compressed with xz; unpack it"), (b"\x89PNG", "a picture"))
Record = Tuple[int, bytes, int]


def read_records(path: Path, note: Callable[[str], None] = lambda _: None, lines: bool = False) -> Iterator[Record]:
    """(number, JSON text in UTF-8, position in the file) of each record.

    The number is the line on which the record begins or, in arrays and tables, its index among all of them in the file.
    Invalid JSON is passed on unchanged; b"" is a record beyond MAX_RECORD_BYTES. `note` is called with messages about
    the file. `lines`: each line of a text file is a record, instead of the whole file. Raises ConfigError.
    """
    content, file = open_content(path)
    try:
        with file, content:
            size = path.stat().st_size
            for number, record in _values(path, content, note, lines, lambda share: file.seek(int(share * size))):
                yield number, record, file.tell()
    except EOFError as err:
        raise ConfigError(f"input file {path} is truncated: {err}; copy it again") from err
    except Exception as err:
        if isinstance(err, OSError) or type(err).__name__ == "ZstdError":
            raise ConfigError(f"input file {path} cannot be read completely: {err}; is it complete?") from err
        raise


def open_content(path: Path) -> Tuple[io.BufferedReader, io.FileIO]:
    """The file's content, decompressed, and the file itself, whose position shows how far it has been read."""
    try:
        file = open(path, "rb", buffering=0)      # noqa: SIM115 (the caller closes it)
        magic = file.read(4)
        file.seek(0)
    except OSError as err:
        raise ConfigError(f"input file {path} cannot be read: {err.strerror or err}") from err
    if path.suffix == ".gz" or magic[:3] == b"\x1f\x8b\x08":
        return io.BufferedReader(cast(io.RawIOBase, gzip.GzipFile(fileobj=file)), _BLOCK), file
    if path.suffix == ".zst" or magic == b"\x28\xb5\x2f\xfd":
        try:
            import zstandard
        except ImportError:
            file.close()
            raise ConfigError(f"{path} is compressed with zstd: install the package zstandard, or unpack the "
                              "file") from None
        stream = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
        return io.BufferedReader(cast(io.RawIOBase, stream), _BLOCK), file
    return io.BufferedReader(file, _BLOCK), file


def _values(path: Path, content: io.BufferedReader, note: Callable[[str], None],
            lines: bool, done: Callable[[float], object]) -> Iterator[Tuple[int, bytes]]:
    head = content.peek(_HEAD)[:_HEAD]
    if tables.is_columnar(path, head):
        yield from tables.columnar_records(path, head, done, note)
        return
    encoding = _encoding(head)
    if encoding not in ("utf-8", "utf-16", "utf-32"):
        note(f"file read in the encoding {encoding}")
    text = head.decode(encoding, "replace").lstrip(" \t\r\n\ufeff")
    what = next((what for magic, what in _FOREIGN if head.startswith(magic)), None)
    if what is None and (text[:1] not in ("{", "[") or texts.is_text(path)) and "\x00" in text[:1000]:
        what = "a binary file of unknown kind"
    if what:
        raise ConfigError(f"input file {path} is {what}; expected JSON lines, a JSON array, CSV, Parquet or "
                          "plain text")
    separator = None if texts.is_text(path) else tables.separator(path, text)
    if separator:
        reader = io.TextIOWrapper(content, "utf-8-sig" if encoding == "utf-8" else encoding, _errors(encoding),
                                  newline="")
        yield from tables.separated_records(path, reader, separator, MAX_RECORD_BYTES, note)
        return
    if texts.is_text(path):
        yield from texts.text_records(content, encoding, _errors(encoding), note, lines)
        return
    yield from _JsonValues(path, _Text(content, encoding), note)


def _encoding(head: bytes) -> str:
    """A text's encoding, detected by its first bytes: byte order mark, zero bytes, UTF-8, or Chinese in GB18030."""
    for mark, name in _BOMS:
        if head.startswith(mark):
            return name
    if head[:4] in (b"{\0\"\0", b"[\0{\0"):
        return "utf-16-le"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
        return "utf-8"
    except UnicodeDecodeError:
        pass
    if any(_is_utf8(line) for line in head.split(b"\n")[:-1] if not line.isascii()):
        return "utf-8"                           # with occasional errors, which the check of the records reports
    try:
        text = codecs.getincrementaldecoder("gb18030")().decode(head)
    except UnicodeDecodeError:
        return "utf-8"
    foreign = [char for char in text if char > "\x7f"]
    common = sum(_is_common(char) for char in foreign)
    return "gb18030" if common >= 0.9 * len(foreign) else "utf-8"


def _is_utf8(line: bytes) -> bool:
    """Whether a line can only be UTF-8: two-byte sequences may be Chinese in GB 2312, too."""
    try:
        return any(char >= "\u0800" for char in line.decode("utf-8"))
    except UnicodeDecodeError:
        return False


def _is_common(char: str) -> bool:
    """Whether a character is in GB 2312, which covers nearly all Chinese text."""
    try:
        return bool(char.encode("gb2312"))
    except UnicodeEncodeError:
        return False


def _errors(encoding: str) -> str:
    return "surrogateescape" if encoding in ("utf-8", "gb18030") else "replace"


class _Text:
    """A text read block by block: `text` from `position` on has been read but not consumed."""

    def __init__(self, content: BinaryIO, encoding: str):
        self._content = content
        self._decode = codecs.getincrementaldecoder(encoding)(_errors(encoding)).decode
        self.text, self.position, self.line, self.ended = "", 0, 1, False

    @property
    def rest(self) -> int:
        """Number of characters read but not consumed."""
        return len(self.text) - self.position

    @property
    def char(self) -> str:
        """The next character; "" at the end."""
        return self.text[self.position:self.position + 1]

    def more(self) -> None:
        """Read another block, as long as what is buffered, so that a long value is not rescanned too often."""
        block = self._content.read(max(_BLOCK, self.rest))
        self.text, self.position = self.text[self.position:] + self._decode(block, not block), 0
        self.ended = not block

    def move(self, end: int) -> str:
        """Advance to `end`; returns the text up to it."""
        part = self.text[self.position:end]
        self.line += part.count("\n")
        self.position = end
        return part

    def skip(self) -> bool:
        """Advance to the next value; False at the end."""
        while True:
            match = _SPACE.match(self.text, self.position)
            self.move(match.end() if match else self.position)
            if self.char or self.ended:
                return bool(self.char)
            self.more()


class _TooLongError(ValueError):
    pass


class _JsonValues:
    """The values of a JSON text, as (number, bytes)."""

    def __init__(self, path: Path, text: _Text, note: Callable[[str], None]):
        self._path, self._text, self._note = path, text, note
        self._places = 0                         # records in arrays so far
        self._begun = False                      # something precedes the current value

    def __iter__(self) -> Iterator[Tuple[int, bytes]]:
        text = self._text
        while text.skip():
            for number, record in self._array() if text.char == "[" else self._top_value():
                yield number, record if len(record) <= MAX_RECORD_BYTES else b""
            self._begun = True

    def _top_value(self) -> Iterator[Tuple[int, bytes]]:
        text, line = self._text, self._text.line
        try:
            value, end, error = self._decode()
        except _TooLongError:
            if text.char == "{" and self._wraps_at_head():
                yield from self._wrapper()
            else:
                self._drop_line()
                yield line, b""
            return
        if error:
            yield line, self._broken(end)
        elif _wraps(value):
            yield from self._wrapper()
        else:
            yield line, _encode(text.move(end))

    def _decode(self) -> Tuple[object, int, Optional[Exception]]:
        """(value, its end, None) of the value at the position, or (None, position of the error, the error)."""
        text = self._text
        while True:
            try:
                value, end = _scan(text.text, text.position)
                if end < len(text.text) or text.ended:
                    return value, end, None
            except json.JSONDecodeError as err:
                near = err.pos >= len(text.text) - _NEAR_END or err.msg.startswith("Unterminated string")
                if text.ended or not near:
                    return None, err.pos, err
            except (ValueError, RecursionError) as err:
                return None, text.position, err
            if text.rest > MAX_RECORD_BYTES:
                raise _TooLongError
            text.more()

    def _broken(self, place: int) -> bytes:
        """Consume invalid JSON: its line or, if the error is on a later line, up to a line that begins a value."""
        text = self._text
        offset = place - text.position
        while True:
            line_end = text.text.find("\n", text.position)
            if line_end >= text.position + offset or (line_end < 0 and text.ended):
                return _encode(text.move(line_end + 1 or len(text.text)))
            begin = _VALUE_LINE.search(text.text, line_end) if line_end >= 0 else None
            if begin or text.ended:
                return _encode(text.move(begin.start() + 1 if begin else len(text.text)))
            if text.rest > MAX_RECORD_BYTES:
                self._drop_line()
                return b""
            text.more()

    def _drop_line(self) -> None:
        text = self._text
        while True:
            end = text.text.find("\n", text.position)
            text.move(end + 1 or len(text.text))
            if end >= 0 or text.ended:
                return
            text.more()

    def _array(self, only_records: bool = False) -> Iterator[Tuple[int, bytes]]:
        """The records of an array. `only_records`: nothing if it does not begin with a record."""
        text, line = self._text, self._text.line
        text.move(text.position + 1)
        use: Optional[bool] = None
        while True:
            error: Optional[Exception] = None
            if not text.skip():
                raise self._fault("it ends without ]")
            if text.char == "]":
                text.move(text.position + 1)
                return
            try:
                value, end, error = self._decode()
            except _TooLongError:
                raise self._fault(f"it is longer than {MAX_RECORD_BYTES} bytes") from None
            if error and self._begun and line == text.line:
                yield line, self._broken(text.position)      # a bad line among others
                return
            if error:
                raise self._fault(str(error)) from error
            use = use if use is not None else not only_records or told_format(value) is not None
            record = text.move(end)
            if use:
                self._places += 1
                yield self._places, _encode(record)

    def _wrapper(self) -> Iterator[Tuple[int, bytes]]:
        """The records in an object's lists."""
        text = self._text
        text.move(text.position + 1)
        while True:
            key = self._member()
            if key is None:
                return
            if not text.skip() or text.char != ":":
                raise self._fault("expected ':'")
            text.move(text.position + 1)
            text.skip()
            before = self._places
            if text.char == "[":
                yield from self._array(only_records=True)
            else:
                self._value()
            self._note(f"records read from the list under {key[:40]!r}" if self._places > before else
                       f"key {key[:40]!r} next to the list of records is not used")

    def _member(self) -> Optional[str]:
        """The next key of an object; None at its end."""
        text = self._text
        if not text.skip():
            raise self._fault("it ends without }")
        if text.char == "}":
            text.move(text.position + 1)
            return None
        key = self._value()
        if not isinstance(key, str):
            raise self._fault("expected a key")
        return key

    def _value(self) -> object:
        try:
            value, end, error = self._decode()
        except _TooLongError:
            raise self._fault(f"it is longer than {MAX_RECORD_BYTES} bytes") from None
        if error:
            raise self._fault(str(error)) from error
        self._text.move(end)
        return value

    def _wraps_at_head(self) -> bool:
        """Whether a very long object has a list of records among its first members, judging by its beginning."""
        text, place = self._text.text, self._text.position + 1
        blank = re.compile(r"[ \t\r\n,:]*")
        with_key = False
        try:
            while True:
                place = blank.match(text, place).end()           # type: ignore[union-attr]
                if with_key and text[place:place + 1] == "[":
                    first = blank.match(text, place + 1).end()   # type: ignore[union-attr]
                    if text[first:first + 1] == "{" and told_format(_scan(text, first)[0]):
                        return True
                place = _scan(text, place)[1]
                with_key = not with_key
        except (ValueError, RecursionError):
            return False

    def _fault(self, fault: str) -> ConfigError:
        return ConfigError(f"input file {self._path}: the JSON array is truncated or invalid after record "
                           f"{self._places} (line {self._text.line}): {fault}; correct it there, or copy the file "
                           "again")


def _wraps(value: object) -> bool:
    """Whether a value is an object that is not a record but has a list of records."""
    return isinstance(value, dict) and any(
        isinstance(item, list) and item and told_format(item[0]) for item in value.values()) and not told_format(value)


def is_metadata(path: Path) -> bool:
    """Whether a file is a single JSON object that neither is a record nor has a list of records: it is metadata."""
    if path.stat().st_size > MAX_RECORD_BYTES:
        return False
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return False
    lists = [item for item in value.values() if isinstance(item, list)] if isinstance(value, dict) else []
    if not isinstance(value, dict) or told_format(value) or is_document(value) or _wraps(value):
        return False
    return not any(all(isinstance(entry, dict) for entry in item) for item in lists if item)


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


__all__: List[str] = ["MAX_RECORD_BYTES", "is_metadata", "open_content", "read_records"]
