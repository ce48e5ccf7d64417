"""Mutation testing of the model and its sharding: injects one error at a time and checks that a test finds it.

    python scripts/mutants.py                       # all of scripts/mutants.yaml, in a copy of the checkout
    python scripts/mutants.py 'mask' --list         # those whose name or file has the word; only show them

Each mistake is made in a temporary copy, and the test listed with it, which passes otherwise, is run: it must fail. The
exit code is 1 if a mistake survives or its text is not in the file. Not part of the tests; those check that the list
is up to date.
"""
import argparse
import ast
import compileall
import contextlib
import gc
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional

import yaml

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from research.telechat.common.command import run_command
from research.telechat.common.errors import ConfigError
from research.telechat.common.table import table
from research.telechat.native.build import SWITCH

LIST = ROOT / "scripts/mutants.yaml"
PLUGIN = "research/telechat"
TIMEOUT = 900                                            # seconds for one test
_FUSED = ("native/", "model/cpu_kernels.py", "model/native_decoder.py", "generation/native_engine.py")
_KILLED, _SURVIVED, _EQUIVALENT, _PASSED_OVER = "killed", "SURVIVED", "equivalent", "no test ran"


class Mutant(NamedTuple):
    """One mistake. file: below the plugin; test: what must fail; equivalent: why nothing can."""

    name: str
    file: str
    old: str
    new: str
    test: str = ""
    equivalent: str = ""

    @property
    def fused(self) -> bool:
        """Whether it is in the fused operators of a CPU, or what calls them."""
        return self.file.startswith(_FUSED)


def read_mutants(path: Path = LIST) -> List[Mutant]:
    """The list. Raises ConfigError."""
    try:
        mutants = [Mutant(**entry) for entry in yaml.safe_load(path.read_text(encoding="utf-8"))]
    except TypeError as err:
        raise ConfigError(f"{path}: {err}") from err
    names = [mutant.name for mutant in mutants]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"{path}: duplicate name {twice[0]}; give each mutant its own name")
    return mutants


def _defined(path: Path) -> List[str]:
    """Functions of a test file, those of classes as Class::function."""
    found = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            found.append(node.name)
        elif isinstance(node, ast.ClassDef):
            found.extend(f"{node.name}::{one.name}" for one in node.body if isinstance(one, ast.FunctionDef))
    return found


def faults(mutant: Mutant, root: Path = ROOT) -> List[str]:
    """What is wrong with an entry: its text, or its test."""
    found = []
    text = (root / PLUGIN / mutant.file).read_text(encoding="utf-8")
    if text.count(mutant.old) != 1 or mutant.old == mutant.new:
        found.append(f"{mutant.name}: `old` occurs {text.count(mutant.old)} times in {mutant.file}, expected once, and "
                     "`new` is something else")
    if bool(mutant.test) == bool(mutant.equivalent):
        found.append(f"{mutant.name}: expected a test or the reason why none can find it")
    if mutant.test:
        file, _, function = mutant.test.partition("[")[0].partition("::")
        if not (root / file).is_file() or function not in _defined(root / file):
            found.append(f"{mutant.name}: there is no test {mutant.test}")
    return found


def copy_checkout(target: Path) -> None:
    """The files of this checkout that git knows or does not ignore, and what tests need next to it."""
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                            check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    compileall.compile_dir(target / "research", quiet=2)
    shared = ROOT.parent / "shared"
    if shared.exists():
        (target.parent / "shared").symlink_to(shared.resolve())


def _in_child(work: Callable[[], int], log: Path) -> int:
    """The exit code of `work` in a fork of this process, whose output goes to `log`; -1 where it takes too long."""
    child = os.fork()
    if not child:
        code = 70
        try:
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            code = work()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    until = time.time() + TIMEOUT
    while time.time() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return -1


def run_test(copy: Path, mutant: Mutant, log: Path) -> int:
    """pytest's exit code for a mutant's test in the copy: 0 passed, 1 failed, others where no test ran.

    The fused operators of a CPU compute only where the mutant is in them: elsewhere it would often not be executed.
    """
    def work() -> int:
        import pytest
        os.chdir(copy)
        sys.dont_write_bytecode = True                   # of a mutant
        os.environ["PYTHONPATH"] = str(copy)
        os.environ[SWITCH] = "1" if mutant.fused else "0"
        sys.path[:] = [str(copy), *(path for path in sys.path if Path(path or ".").resolve() not in (
            ROOT, ROOT / "scripts"))]
        for name in [name for name in sys.modules if name.partition(".")[0] in ("research", "scripts", "tests")]:
            del sys.modules[name]
        return int(pytest.main([mutant.test, "-q", "-x", "-p", "no:cacheprovider", "--no-header"]))
    return _in_child(work, log)


def try_mutant(mutant: Mutant, copy: Path) -> str:
    """What became of it."""
    path = copy / PLUGIN / mutant.file
    right, written = path.read_text(encoding="utf-8"), path.stat().st_mtime
    path.write_text(right.replace(mutant.old, mutant.new), encoding="utf-8")
    os.utime(path, (written, written + 60))              # another time, so that no bytecode of the right file is taken
    try:
        code = run_test(copy, mutant, copy.parent / "log.txt")
    finally:
        path.write_text(right, encoding="utf-8")
        os.utime(path, (written, written))
    return {0: _SURVIVED, 1: _KILLED}.get(code, _PASSED_OVER)


def prepare(logs: Path) -> None:
    """Import what every test imports, so that forks need not; nothing of this project. logs: folder for MindFormers."""
    import importlib
    os.environ.setdefault("GLOG_v", "3")
    os.environ["LOG_MF_PATH"] = str(logs)
    logs.mkdir(exist_ok=True)
    for module in ("mindspore.dataset", "mindspore.mindrecord", "mindformers.trainer", "pytest"):
        importlib.import_module(module)
    import pytest
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", str(logs)])           # its plugins
    gc.collect()
    gc.freeze()


def run(argv: Optional[List[str]] = None) -> int:
    """Carry out the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("word", nargs="?", default="", help="only mutants whose name or file has it")
    parser.add_argument("--list", action="store_true", help="show them and their tests")
    args = parser.parse_args(argv)
    mutants = [mutant for mutant in read_mutants() if args.word in mutant.name or args.word in mutant.file]
    wrong = [fault for mutant in mutants for fault in faults(mutant)]
    if wrong:
        raise ConfigError(f"scripts/mutants.yaml: {wrong[0]}" + (f" (and {len(wrong) - 1} more)" if wrong[1:] else ""))
    if args.list:
        print(table([["mutant", "file", "found by"], *([one.name, one.file, one.test or f"nothing: {one.equivalent}"]
                                                       for one in mutants)]))
        return 0
    counts: Dict[str, int] = {}
    rows = [["mutant", "file", "result", "seconds"]]
    with tempfile.TemporaryDirectory(prefix="telechat-mutants-") as name:
        copy = Path(name) / "checkout"
        copy_checkout(copy)
        prepare(Path(name) / "log")
        for mutant in {(one.test, one.fused): one for one in mutants if one.test}.values():
            if run_test(copy, mutant, copy.parent / "log.txt"):
                said = (copy.parent / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()[-1:]
                raise ConfigError(f"{mutant.test} does not pass without a mutant ({''.join(said)}); run it alone")
        for mutant in mutants:
            started = time.time()
            result = _EQUIVALENT if mutant.equivalent else try_mutant(mutant, copy)
            counts[result] = counts.get(result, 0) + 1
            rows.append([mutant.name, mutant.file, result, f"{time.time() - started:.0f}"])
            print(f"{result}: {mutant.name}" + (f" ({mutant.test})" if result not in (_KILLED, _EQUIVALENT) else ""),
                  flush=True)
    print(table(rows))
    print(", ".join(f"{count} {result}" for result, count in counts.items()))
    return 1 if counts.get(_SURVIVED) or counts.get(_PASSED_OVER) else 0


if __name__ == "__main__":
    sys.exit(run_command(run))
