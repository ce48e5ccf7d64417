"""Runs tests under several versions of MindFormers, MindSpore and Python, and keeps the table of results in the docs.

Started by test_matrix.sh, whose head has examples. An environment is made once per pair and Python, with pip, and used
again. Standard library only, as it runs before anything is installed. Exit code: 0 all passed, 1 a test failed or an
environment could not be made, 2 wrong arguments.
"""
import argparse
import datetime
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(ROOT)]

from research.telechat.common.table import markdown
from research.telechat.common.versions import TESTED
from scripts.requirements import requirements

DOCUMENT = ROOT / "docs" / "compatibility.md"
BEGIN, END = "<!-- results: scripts/test_matrix.sh --write -->", "<!-- end of results -->"
# What touches MindFormers, without the longest: files that are marked so. None needs files outside the checkout.
MARK = re.compile(r"^pytestmark = .*\bpytest\.mark\.matrix\b", re.MULTILINE)
TESTS = tuple(str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests").rglob("test_*.py"))
              if MARK.search(path.read_text(encoding="utf-8")))
COLUMNS = ("mindformers", "mindspore", "Python", "result", "passed", "failed", "skipped", "minutes", "date")


class Pair(NamedTuple):
    """Versions that are tested together."""
    mindformers: str
    mindspore: str
    python: str

    @property
    def folder(self) -> str:
        """Name of its environment."""
        return f"mindformers-{self.mindformers}-mindspore-{self.mindspore}-python{self.python}"


def parse_pairs(words: Sequence[str], python: str) -> List[Pair]:
    """The pairs of `VERSION` (all tested mindspore versions) and `VERSION:MINDSPORE`. Raises ValueError."""
    pairs = []
    for word in words or TESTED:
        mindformers, _, mindspore = word.partition(":")
        if not mindspore and mindformers not in TESTED:
            raise ValueError(f"mindformers {mindformers} is not in the matrix ({', '.join(TESTED)}); name its "
                             f"mindspore to try it: {mindformers}:2.9.0")
        pairs += [Pair(mindformers, each, python) for each in ([mindspore] if mindspore else TESTED[mindformers])]
    return pairs


def make_environment(pair: Pair, interpreter: str, folder: Path) -> Path:
    """The interpreter of the pair's environment, which is made where it is not there. CalledProcessError of pip."""
    environment = folder / pair.folder
    if not (environment / ".complete").exists():
        print(f"== {pair.folder}: installing", flush=True)
        subprocess.run([interpreter, "-m", "venv", "--clear", str(environment)], check=True)
        left_out = ("ruff", "mypy", "codespell")
        others = [line for line in requirements(["dev"]) if not line.startswith(left_out)]
        subprocess.run([str(environment / "bin" / "python"), "-m", "pip", "install", "--quiet",
                        f"mindspore=={pair.mindspore}", f"mindformers=={pair.mindformers}", *others], check=True)
        (environment / ".complete").touch()
    return environment / "bin" / "python"


def count_results(report: Path) -> Tuple[int, int, int]:
    """(passed, failed, skipped) of a JUnit file that pytest wrote; errors count as failed."""
    if not report.is_file():
        return 0, 1, 0
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    total, failures, errors, skipped = (sum(int(suite.get(key, 0)) for suite in suites)
                                        for key in ("tests", "failures", "errors", "skipped"))
    return total - failures - errors - skipped, failures + errors, skipped


def run_tests(pair: Pair, python: Path, tests: Sequence[str]) -> Dict[str, str]:
    """Run pytest; the row of the table."""
    print(f"== {pair.folder}: testing", flush=True)
    report = python.parents[1] / "results.xml"
    report.unlink(missing_ok=True)
    started = time.monotonic()
    done = subprocess.run([str(python), "-m", "pytest", "-q", f"--junitxml={report}", *tests], cwd=ROOT, check=False,
                          stdin=subprocess.DEVNULL)
    passed, failed, skipped = count_results(report)
    good = done.returncode == 0 and passed and not failed
    return dict(zip(COLUMNS, (*pair, "passed" if good else "FAILED", str(passed), str(failed), str(skipped),
                               f"{(time.monotonic() - started) / 60:.1f}", datetime.date.today().isoformat())))


def table(rows: Sequence[Dict[str, str]]) -> str:
    """The rows in Markdown, sorted by versions."""
    def key(row: Dict[str, str]) -> List[List[int]]:
        return [[int(part) for part in row[column].split(".") if part.isdigit()] for column in COLUMNS[:3]]
    return markdown([COLUMNS, *([row[column] for column in COLUMNS] for row in sorted(rows, key=key))])


def read_table(text: str) -> List[Dict[str, str]]:
    """The rows between the marks of a document. ValueError without marks."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"expected one line {BEGIN!r} and one {END!r}")
    lines = text.split(BEGIN)[1].split(END)[0].strip().splitlines()
    return [dict(zip(COLUMNS, [cell.strip() for cell in line.strip("| ").split("|")])) for line in lines[2:]]


def update_table(text: str, rows: Sequence[Dict[str, str]]) -> str:
    """The document with `rows` in place of those of the same versions."""
    merged = {tuple(row[column] for column in COLUMNS[:3]): row for row in (*read_table(text), *rows)}
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f"{before}{BEGIN}\n{table(list(merged.values()))}\n{END}{after}"


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="scripts/test_matrix.sh", description=__doc__.splitlines()[0])
    parser.add_argument("pairs", nargs="*", metavar="VERSION[:MINDSPORE]", help="of MindFormers; default: all tested")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the environments")
    parser.add_argument("--write", action="store_true", help=f"put the results into {DOCUMENT.relative_to(ROOT)}")
    parser.add_argument("--dir", type=Path, default=os.environ.get("TELECHAT_MATRIX_DIR") or ROOT / ".venv-matrix",
                        help="where the environments go (default: TELECHAT_MATRIX_DIR, or .venv-matrix)")
    args = parser.parse_args(argv)
    tests = shlex.split(os.environ.get("TELECHAT_MATRIX_TESTS", "")) or list(TESTS)
    if args.write and tests != list(TESTS):
        parser.error("--write is for the default tests only; unset TELECHAT_MATRIX_TESTS")
    interpreter = shutil.which(args.python)
    if not interpreter:
        parser.error(f"--python: {args.python} is not found")
    version = subprocess.run([interpreter, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], text=True,
                             stdout=subprocess.PIPE, check=True).stdout.strip()
    try:
        pairs = parse_pairs(args.pairs, version)
    except ValueError as err:
        parser.error(str(err))
    rows, broken = [], []
    for pair in pairs:
        try:
            rows.append(run_tests(pair, make_environment(pair, interpreter, args.dir.resolve()), tests))
        except (subprocess.CalledProcessError, OSError) as err:
            print(f"error: {pair.folder}: the environment cannot be made: {err}", file=sys.stderr, flush=True)
            broken.append(pair)
        if args.write and rows:
            beside = DOCUMENT.with_suffix(".part")
            beside.write_text(update_table(DOCUMENT.read_text(encoding="utf-8"), rows[-1:]), encoding="utf-8")
            os.replace(beside, DOCUMENT)
    print(table(rows))
    return 1 if broken or any(row["result"] != "passed" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
