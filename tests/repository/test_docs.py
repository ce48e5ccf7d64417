"""Generated parts of the documents are current, and what they name exists."""
import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

from research.telechat.plan.plan import read_plan
from research.telechat.recipe.read import read_recipe
from scripts import communication_table, generated, model_table, plan_table, time_table

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("*.md")])


def test_table_of_models_is_current():
    text = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    assert generated.with_part(text, "model_table.py", model_table.table()) == text, (
        "run: python scripts/model_table.py --write")


def test_table_of_estimated_times_is_current():
    text = (ROOT / "docs/parallel.md").read_text(encoding="utf-8")
    assert generated.with_part(text, "time_table.py", time_table.table()) == text, (
        "run: python scripts/time_table.py --write")


def test_table_of_plans_is_current():
    text = (ROOT / "docs/parallel.md").read_text(encoding="utf-8")
    assert generated.with_part(text, "plan_table.py", plan_table.table()) == text, (
        "run: python scripts/plan_table.py --write")


def test_table_of_communication_has_all_its_plans():
    """Compiling them takes minutes; that planner and compiler agree is for tests/plan/test_sharding_compile.py."""
    text = (ROOT / "docs/parallel.md").read_text(encoding="utf-8")
    assert [row[0] for row in generated.rows(text, "communication_table.py")] == [
        row.name for row in communication_table.ROWS]


def test_every_plan_of_several_cards_was_executed():
    text = (ROOT / "docs/parallel.md").read_text(encoding="utf-8")
    executed = {row[0] for row in generated.rows(text, "execute_recipes.py")}
    recipes = (ROOT / "research/telechat").glob("*.yaml")
    several = {path.stem for path in recipes if read_plan(read_recipe(path)).ranks > 1}
    assert several and not several - executed, "run: python scripts/execute_recipes.py NAME --write"


def test_counts_equal_the_official_totals():
    """Bytes of the official checkpoints, from the total_size of their indexes (52B without its mask scalars)."""
    counts = {name: model_table.count_parameters(variant) for name, variant in model_table.VARIANTS.items()}
    assert 2 * counts["telechat_7b"] == 14400036864
    assert 2 * counts["telechat_12b"] == 24772864000
    assert 0 <= 105665020032 - 2 * counts["telechat_52b"] <= 64 * 4
    assert 4 * counts["telechat2_115b"] == 453131665408


# A file that a text names: "docs/data.md", "spec/rope.py" for one in a room, "writer.py" for one that its reader knows.
MENTION = re.compile(r"(?<![\w/.}<*{-])([A-Za-z_][\w./-]*\.(?:py|yaml|sh|md|jsonl?))\b")
PYTHON = ("research", "scripts", "benchmarks", "tests")
FOLDERS = {*PYTHON, "configs", "docs", "examples",
           *(path.name for path in (ROOT / "research/telechat").iterdir() if path.is_dir())}
CODE = sorted(path for folder in PYTHON for path in (ROOT / folder).rglob("*.py"))
NAMES = {path.name for path in [*CODE, *ROOT.glob("*.*"), *(ROOT / "docs").iterdir(), *(ROOT / "scripts").iterdir()]}


def missing(text, bare):
    """Files in `text` that do not exist. `bare`: those named without a folder too."""
    found = []
    for name in MENTION.findall(text):
        folder, _, rest = name.partition("/")
        if rest and folder in FOLDERS:
            there = (ROOT / name).exists() or (ROOT / "research/telechat" / name).exists()
        else:
            there = bool(rest) or not bare or not name.endswith((".py", ".sh", ".md")) or name in NAMES
        found += [] if there else [name]
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_files_that_documents_name_exist(path):
    assert not missing(path.read_text(encoding="utf-8"), bare=False)


def anchors(path):
    """Anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    return {re.sub(r"[^\w -]", "", line.lstrip("# ")).strip().lower().replace(" ", "-")
            for line in text.splitlines() if line.startswith("#")}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_links_between_documents_lead_somewhere(path):
    for file, anchor in re.findall(r"\]\(([\w./-]*)(?:#([\w-]+))?\)", path.read_text(encoding="utf-8")):
        target = path.parent / file if file else path
        assert target.exists(), f"{path.name} links to {file}, which does not exist"
        assert not anchor or anchor in anchors(target), f"{path.name} links to {file}#{anchor}, which is no heading"


def prose(path):
    """(line, text) of the docstrings and comments of a Python file."""
    source = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node, clean=False)
            if text:
                yield node.body[0].lineno, text
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def test_files_that_docstrings_and_comments_name_exist():
    stale = [f"{path.relative_to(ROOT)}:{line} names {name}" for path in CODE for line, text in prose(path)
             for name in missing(text, bare="research" in path.parts)]
    assert not stale, "a file was moved or renamed; say where it is now, or leave the mention out"
