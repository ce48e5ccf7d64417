"""The part of a document that a script writes: between two marks, replaced whole. Shared by the scripts of tables."""
import argparse
import sys
from pathlib import Path
from typing import Callable, List

from research.telechat.common.files import write_text

END = "<!-- end of table -->"


def begin(script: str) -> str:
    """The mark that the part of `script` starts with."""
    return f"<!-- table: scripts/{script} -->"


def with_part(text: str, script: str, part: str) -> str:
    """`text` with the part between the marks of `script` replaced by `part`. Raises ValueError without marks."""
    before, mark, rest = text.partition(begin(script))
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise ValueError(f"the marks {begin(script)} and {END} are missing")
    return f"{before}{mark}\n{part}\n{end}{after}"


def rows(text: str, script: str) -> List[List[str]]:
    """Cells of the table that `script` has written into `text`, without its head."""
    part = text.partition(begin(script))[2].partition("<!--")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines()
            if line.startswith("|")][2:]


def run(script: str, document: Path, part: Callable[[], str], what: str) -> int:
    """Command line of a script: print its part, write it (--write), or check the document (--check)."""
    parser = argparse.ArgumentParser(description=f"Make {what} in docs/{document.name}.")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--write", action="store_true", help="write it into the document")
    choice.add_argument("--check", action="store_true", help="exit code 1 if the document is not current")
    args = parser.parse_args()
    try:
        if not (args.write or args.check):
            print(part())
            return 0
        found = part()                               # may take minutes, in which the document can change
        old = document.read_text(encoding="utf-8")
        new = with_part(old, script, found)
        if args.check:
            if new != old:
                print(f"error: {document} is not current; run: python scripts/{script} --write", file=sys.stderr)
            return int(new != old)
        write_text(document, new)
    except (OSError, ValueError) as err:
        print(f"error: docs/{document.name}: {err}", file=sys.stderr)
        return 1
    return 0
