"""A chat in the terminal: answers appear as they are generated, Ctrl-C stops the answer and not the program.

What the model writes is shown without characters that the terminal would obey; /save and the history keep it as it is.
Knows no model: it talks to a function that answers messages (chat.session.Session.pieces).
"""
import json
from pathlib import Path
from typing import Callable, Generator, List, Optional, TextIO, Union

from research.telechat.chat.session import History, Report, bot_message, with_question
from research.telechat.chat.stream import Piece
from research.telechat.common.errors import ConfigError, ConversationError
from research.telechat.common.files import JsonObject, refuse_foreign, write_text
from research.telechat.common.printable import printable

HELP = """/clear          forget the conversation
/system TEXT    set the system prompt; without TEXT, remove it
/retry          answer the last question again
/history        show the conversation
/save FILE      write the conversation as one JSON line, in the form that telechat_preprocess.py reads
                (/save --overwrite FILE replaces a file that /save did not write)
/help           this list
/exit           leave (Ctrl-D too); Ctrl-C stops an answer"""


class Terminal:
    """One conversation. `answer(messages, seed)` yields pieces of reasoning and answer (or texts,
    all of it answer); `report()` says what the last answer took."""

    def __init__(self, answer: Callable[[List[JsonObject], Optional[int]], Generator[Union[Piece, str], None, None]],
                 report: Callable[[], Report], output: TextIO, system: Optional[str] = None,
                 seed: Optional[int] = None, first: str = ""):
        """`first`: said before the first answer, which takes longer than others."""
        self.answer, self.report, self.output = answer, report, output
        self.system, self.seed = system, seed
        self.history = History()
        self._answers, self._first = 0, first

    def run(self, read: Callable[[str], str] = input) -> None:
        """Read questions and commands until /exit or the end of the input."""
        self._say("Ask a question; /help lists the commands.")
        while True:
            try:
                line = read("\n> ").strip()
            except EOFError:
                self._say("")
                return
            except KeyboardInterrupt:
                self._say("\n(Ctrl-D or /exit leaves)")
                continue
            if line in ("/exit", "/quit"):
                return
            try:
                self.handle(line)
            except KeyboardInterrupt:                     # before the first token: there is no answer to keep
                self._say(" (stopped)")
            except (ConfigError, ConversationError, OSError) as err:
                self._say(f"error: {err}")

    def handle(self, line: str) -> None:
        """One question or command. Raises ConfigError, ConversationError, OSError; the history is as before then."""
        if not line:
            return
        if not line.startswith("/"):
            self._ask(line)
            return
        command, _, rest = line.partition(" ")
        actions = {"/clear": self._clear, "/system": self._set_system, "/retry": self._retry, "/save": self._save,
                   "/history": self._show, "/help": lambda _: self._say(HELP)}
        if command not in actions:
            raise ConfigError(f"unknown command {command}; /help lists the commands")
        actions[command](rest.strip())

    def _ask(self, question: str) -> None:
        """Answer `question`. What came before Ctrl-C is kept as the answer."""
        messages, rendered = with_question(self.history, question, self.system)
        seed = None if self.seed is None else self.seed + self._answers
        pieces = self.answer(rendered, seed)
        self._answers += 1
        content = reasoning = ""
        if self._first:
            self._say(self._first)
            self._first = ""
        try:
            for part in pieces:
                piece = Piece(part) if isinstance(part, str) else part
                if piece.reasoning:
                    self.output.write(("" if reasoning else "(thinking) ") + printable(piece.text))
                    reasoning += piece.text
                else:
                    self.output.write(("\n(answer) " if reasoning and not content else "") +
                                      printable(piece.text))
                    content += piece.text
                self.output.flush()
        except KeyboardInterrupt:
            self.output.write(" (stopped)")
        finally:
            pieces.close()
        messages.append(bot_message(content, reasoning))
        self.history = messages
        report = self.report()
        dropped = f", {report.dropped_turns} oldest turns dropped" if report.dropped_turns else ""
        dropped += f", beginning of the question truncated by {report.cut_tokens} tokens" if report.cut_tokens else ""
        self._say(f"\n[{report.new_tokens} tokens, {report.tokens_per_second:.1f} per second{dropped}]")

    def _clear(self, _rest: str) -> None:
        self.history = History()
        self._say("The conversation is forgotten.")

    def _set_system(self, rest: str) -> None:
        self.system = rest or None
        self._say("The system prompt is set." if rest else "There is no system prompt.")

    def _retry(self, _rest: str) -> None:
        earlier = self.history
        while self.history and self.history[-1]["role"] != "user":
            self.history = History(history=self.history[:-1])
        if not self.history:
            self.history = earlier
            raise ConfigError("there is no question to retry; ask one first")
        question = self.history.pop()["content"]
        try:
            self._ask(question)
        except BaseException:
            self.history = earlier
            raise

    def _save(self, rest: str) -> None:
        if not rest:
            raise ConfigError("/save needs a file name, such as /save talk.jsonl")
        record = {**({"system": self.system} if self.system else {}), "dialog": list(self.history)}
        option, _, name = rest.partition(" ")
        path = Path(name.strip() if option == "--overwrite" and name.strip() else rest)
        refuse_foreign([path], is_conversation, path != Path(rest))
        write_text(path, json.dumps(record, ensure_ascii=False) + "\n")
        self._say(f"{len(self.history)} messages written to {path}")

    def _show(self, _rest: str) -> None:
        for message in self.history:
            self._say(f"{message['role']}: {message['content']}")

    def _say(self, text: str) -> None:
        self.output.write(printable(text) + "\n")
        self.output.flush()


def is_conversation(path: Path) -> bool:
    """Whether a file is one that /save has written."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(record, dict) and "dialog" in record and set(record) <= {"system", "dialog"}
