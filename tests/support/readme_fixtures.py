"""The commands of README.md, read from it and taken apart. What runs them is test_readme_commands.py."""
import contextlib
import functools
import io
import re
import runpy
import shlex
import sys
from importlib import import_module
from pathlib import Path
from typing import List, Optional, Tuple
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
READMES = ["README.md", "README_CN.md"]
BLOCK = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
INLINE = re.compile(r"`((?:python|bash|pip) [^`]+)`")


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def commands_of(name: str) -> List[str]:
    """Every command of a README, each once: of the bash blocks, continued lines joined and comments left out, then of
    the sentences."""
    found = []
    for language, block in BLOCK.findall(text_of(name)):
        assert language == "bash", f"{name}: a block is marked {language!r}, and blocks hold commands only"
        block = "\n".join(line for line in block.splitlines() if not line.startswith("#"))
        found += [line for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    found += INLINE.findall(BLOCK.sub("", text_of(name)))
    return list(dict.fromkeys(re.sub(r"\s+", " ", command).strip() for command in found))


def watched(command: str) -> Tuple[List[str], List[str]]:
    """(words of supervise.py with its own options, or none; words of the command that it watches, or of all)."""
    words = shlex.split(command)
    if words[:2] != ["python", "scripts/supervise.py"]:
        return [], words
    at = words.index("--")
    return words[:at], words[at + 1:]


def launched(command: str) -> Tuple[List[str], Optional[List[str]]]:
    """(the Python command itself, the launcher's arguments behind it; None without the launcher) of a command."""
    words = watched(command)[1]
    if words[:2] == ["bash", "scripts/msrun_launcher.sh"]:
        return shlex.split(words[2]), words[3:]
    return words, None


@functools.cache
def help_of(program: str, *words: str) -> str:
    """What --help prints, in this process: of a script of the repository, or of `telechat` with a subcommand."""
    said = io.StringIO()
    with (mock.patch.object(sys, "argv", [program, *words, "--help"]), mock.patch.object(sys, "path", [*sys.path]),
          contextlib.redirect_stdout(said), contextlib.suppress(SystemExit)):
        if program == "telechat":
            import_module(".__main__", "research.telechat").main([*words, "--help"])
        else:
            runpy.run_path(str(ROOT / program), run_name="__main__")
    return said.getvalue()


ALL = commands_of("README.md")
