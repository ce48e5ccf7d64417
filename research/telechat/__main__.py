"""All commands under one name: `python -m research.telechat COMMAND ...`, or `telechat COMMAND ...` once installed.

A command's module is imported when it is used, so that this one starts in no time and needs no MindSpore.
"""
import difflib
import sys
from importlib import import_module
from typing import Dict, List, NamedTuple, Optional, Sequence

from research.telechat import __version__
from research.telechat.common.command import run_command


class Command(NamedTuple):
    """Where a command is, and what it does."""

    entry: str                        # "module:function" in research.telechat.commands; the function takes the words
    purpose: str


COMMANDS: Dict[str, Command] = {
    "doctor": Command("doctor:main", "self-test: compare this machine's kernels, models and cards with NumPy"),
    "run": Command("run:main", "fine-tune, evaluate or predict from a recipe (run_mindformer.py)"),
    "convert": Command("convert:main", "convert checkpoints between the official, MindSpore and Llama layouts"),
    "preprocess": Command("preprocess:main", "create a data set from conversations and texts"),
    "chat": Command("predict:main", "answer the questions of a file, or chat in the terminal"),
    "serve": Command("serve:main", "serve over HTTP: OpenAI's API and a chat page"),
    "plan": Command("plan:main", "check a parallel plan, estimate its cost, execute it, search for the fastest"),
    "evaluate": Command("evaluate:main", "evaluate a checkpoint on benchmarks, or by perplexity"),
    "transform": Command("transform:main", "merge and split distributed checkpoints"),
    "merge-lora": Command("merge_lora:main", "merge a LoRA adapter into its base weights"),
    "peft": Command("peft:main", "convert LoRA adapters to and from Hugging Face PEFT"),
}


def usage() -> str:
    """What --help prints."""
    width = max(map(len, COMMANDS))
    return "\n".join(["usage: telechat COMMAND [options]", "", "TeleChat on MindSpore. Commands:", "",
                      *(f"  {name:{width}}  {command.purpose}" for name, command in COMMANDS.items()), "",
                      "Options: telechat COMMAND --help; version: telechat --version"])


def _start(words: List[str]) -> int:
    if words[:1] in (["--version"], ["-V"]):
        print(f"telechat {__version__}")
        return 0
    if words[:1] in (["--help"], ["-h"], ["help"]):
        print(usage())
        return 0
    if not words:
        print(usage(), file=sys.stderr)
        return 2
    name, *rest = words
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        print(f"error: there is no command {name!r}; {hint}commands are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    module, _, function = COMMANDS[name].entry.partition(":")
    sys.argv[0] = f"telechat {name}"                       # as argparse shows it
    return int(getattr(import_module(f"research.telechat.commands.{module}"), function)(rest))


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Start a command; returns its exit code (common/command.py)."""
    return run_command(lambda: _start(list(sys.argv[1:] if argv is None else argv)))


if __name__ == "__main__":
    sys.exit(main())
