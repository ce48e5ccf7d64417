"""Text from a model, from data or from file names, made safe to print or to log.

A terminal obeys control characters: escape sequences retitle the window, write the clipboard, clear the screen or
repaint lines that were printed before, and bidirectional overrides make text read differently from what it is. None of
them means anything in an answer, so each is replaced by a visible placeholder. Files keep the text as it is.
"""
import logging
import re

# C0 but tab and line feed, DEL, C1, line and paragraph separators, bidirectional overrides and isolates (UAX #9),
# tag characters, interlinear annotation, and surrogates, which no encoding takes.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufff9-\ufffb"
                     "\ud800-\udfff\U000e0000-\U000e007f]")


def _stand_in(match: "re.Match[str]") -> str:
    code = ord(match.group())
    if code < 0x20:
        return chr(0x2400 + code)                # the control pictures of Unicode: ESC is shown as ␛
    if code == 0x7F:
        return "\u2421"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def printable(text: str) -> str:
    """`text` without characters that a terminal obeys; line feeds and tabs stay.

    Each character is replaced by itself, so that a stream of pieces gives the same text as the whole.
    """
    return _UNSAFE.sub(_stand_in, text)


def one_line(text: object) -> str:
    """`printable` text of anything, in one line."""
    return printable(" ".join(str(text).split("\n")))


class PrintableFilter(logging.Filter):
    """Makes what a logger writes `printable`, arguments included. An exception's traceback is left to its handler."""

    def filter(self, record: logging.LogRecord) -> bool:
        """True always; the record's message is final afterwards."""
        message = record.getMessage()
        safe = printable(message)
        if safe != message:
            record.msg, record.args = safe, None
        return True
