"""Nothing that a terminal obeys gets through, whatever the text; everything else stays."""
import io
import logging
import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from research.telechat.chat.session import Report
from research.telechat.chat.terminal import Terminal
from research.telechat.common.command import run_command
from research.telechat.common.errors import ConfigError
from research.telechat.common.printable import PrintableFilter, one_line, printable

ATTACKS = ("\x1b]0;title\x07", "\x1b]52;c;Y2xpcA==\x07", "\x1b[2J\x1b[H", "\x9b31m", "good\rbad!", "\x08\x08", "\x7f",
           "\u202egpj.exe", "\u2066x\u2069", "a\u2028b", "\udc80", "\U000e0041")
texts = st.text(st.one_of(st.characters(), st.characters(max_codepoint=0x9F), st.sampled_from("\u202e\u2067\udcff")))


def harmless(text):
    return all(char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cs", "Zl", "Zp") for char in text) and (
        not set(text) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"))


@given(texts)
def test_every_text(text):
    shown = printable(text)
    shown.encode("utf-8")
    assert harmless(shown)
    assert harmless(one_line(text)) and "\n" not in one_line(text)
    assert printable(shown) == shown
    assert "".join(char if harmless(char) else printable(char) for char in text) == shown


@given(texts, st.integers(0, 20))
def test_pieces_of_a_stream_are_shown_as_the_whole(text, cut):
    assert printable(text[:cut]) + printable(text[cut:]) == printable(text)


def test_ordinary_text_is_untouched():
    for text in ("你好，世界！\n\tok", "👨‍👩‍👧 é ﷼ שלום", "a\u200db", "<tool_call>"):
        assert printable(text) == text


def test_the_terminal_shows_and_the_history_keeps():
    output = io.StringIO()
    answer = "".join(ATTACKS)

    def pieces(_messages, _seed):
        yield from answer
    terminal = Terminal(pieces, Report, output)
    terminal.handle("hello")
    terminal.handle("/history")
    assert harmless(output.getvalue()) and "␛]0;title␇" in output.getvalue()
    assert terminal.history[-1]["content"] == answer


def test_errors_of_commands(capsys):
    def body():
        raise ConfigError(f"data.jsonl:3: found {''.join(ATTACKS)}\nerror: forged")
    assert run_command(body) == 1
    err = capsys.readouterr().err
    assert harmless(err) and err.count("\n") == 1

    def missing():
        raise FileNotFoundError(2, "No such file", "x\x1b[2J\n")
    assert run_command(missing) == 1
    err = capsys.readouterr().err
    assert harmless(err) and err.count("\n") == 1


def test_logs():
    log = logging.Logger("test")
    log.addFilter(PrintableFilter())
    output = io.StringIO()
    log.addHandler(logging.StreamHandler(output))
    log.warning("prompt %s of %d", "\x1b[2J", 3)
    log.warning("plain %d%%", 5)
    assert output.getvalue() == "prompt ␛[2J of 3\nplain 5%\n"
