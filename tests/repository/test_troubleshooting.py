"""docs/troubleshooting.md quotes messages as the code raises them. What the rows advise is not tested here."""
import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
OURS, _, OTHERS = TEXT.partition("\n## Errors of CANN")
GAP = "\0"                                             # the place of a value in a message
FEWEST = 8                                             # characters of a quoted message besides its gaps


def table_rows(text):
    """The cells of every row of every table, without heads and rules."""
    rows = []
    for table in re.findall(r"(?:^\|.*\n)+", text + "\n", flags=re.MULTILINE):
        rows += [re.split(r"(?<!\\)\|", line.strip().strip("|")) for line in table.splitlines()[2:]]
    return [[cell.strip() for cell in row] for row in rows]


def quotes(cell):
    """The messages quoted in a cell."""
    return re.findall(r"`([^`]+)`", cell)


def parts_of(message):
    """The literal parts of a quoted message."""
    return [part.strip() for part in message.split("...") if part.strip()]


def text_of(node):
    """The text that an expression makes, with GAP for values and every branch of a choice; None: it is not text."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(GAP if text_of(value) is None else text_of(value) for value in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        sides = [text_of(node.left), text_of(node.right)]
        return None if sides == [None, None] else "".join(GAP if side is None else side for side in sides)
    if isinstance(node, ast.IfExp):
        sides = [text_of(node.body), text_of(node.orelse)]
        return None if sides == [None, None] else GAP + GAP.join(side or "" for side in sides) + GAP
    return None


class Texts(ast.NodeVisitor):
    """Collects the outermost texts of a module; docstrings, which nobody sees, are left out."""

    def __init__(self):
        self.found = []

    def visit_Expr(self, node):
        if not isinstance(node.value, ast.Constant):
            self.generic_visit(node)

    def generic_visit(self, node):
        text = text_of(node)
        if text is not None:
            self.found.append(text)
        else:
            super().generic_visit(node)


@functools.cache
def messages():
    """Every text of the code that users start, of shell scripts every line without comment."""
    found = []
    sources = [ROOT / "run_mindformer.py", *sorted((ROOT / "research/telechat").rglob("*.py")),
               *sorted((ROOT / "scripts").rglob("*.py"))]
    for path in sources:
        texts = Texts()
        texts.visit(ast.parse(path.read_text(encoding="utf-8")))
        found += texts.found
    for path in sorted((ROOT / "scripts").glob("*.sh")):
        found += [line for line in path.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    return found


def occurs(message):
    """Whether one message of the code has the parts of `message` in their order."""
    parts = parts_of(message)

    def holds(text):
        position = 0
        for part in parts:
            position = text.find(part, position)
            if position < 0:
                return False
            position += len(part)
        return True
    return any(holds(text) for text in messages())


ROWS = table_rows(OURS)
QUOTED = [message for row in ROWS for message in quotes(row[0])]


@pytest.mark.parametrize("message", QUOTED)
def test_quoted_message_is_in_the_code(message):
    assert sum(map(len, parts_of(message))) >= FEWEST, f"too short to say anything: {message}"
    assert occurs(message), f"no code says: {message}; correct the first column of docs/troubleshooting.md"


@pytest.mark.parametrize("wrong", ["recipe ... is perhaps not valid YAML", "port ... is not free, sorry",
                                   "is not a folder ... --include_path"])
def test_a_message_that_is_not_in_the_code_is_found_out(wrong):
    assert not occurs(wrong)


def test_there_are_rows_and_all_are_complete():
    assert len(ROWS) >= 30
    assert len(QUOTED) == len(set(QUOTED))
    for row in ROWS:
        assert len(row) == 3 and quotes(row[0]) and row[1] and row[2], row


def test_every_foreign_fault_names_its_source():
    rows = table_rows(OTHERS)
    assert len(rows) >= 8
    for row in rows:
        assert len(row) == 4 and quotes(row[0]) and all(row), row
        assert re.search(r"\]\(https://", row[3]), row


def test_links_lead_to_files_that_exist():
    for target in re.findall(r"\]\((?!https?://)([^)#]*)", TEXT):
        assert (ROOT / "docs" / target).exists(), target


def test_options_that_are_advised_exist():
    """Every `--option` of the page is in the code as well."""
    code = "\n".join(messages())
    unknown = set(re.findall(r"--[a-z_]+", OURS)) - set(re.findall(r"--[a-z_]+", code))
    assert not unknown
