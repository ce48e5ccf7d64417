"""scripts/env.sh and run_tests.sh with a pretended Python, and the example conversations."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from research.telechat.common.versions import fitting_pair
from scripts import requirements
from scripts.quickstart import STEPS

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples" / "conversations.jsonl"

# Stands for a Python of the version in FAKE_VERSION: makes a pretended venv, logs what pip is asked, and fails at will.
FAKE_PYTHON = """#!/bin/bash
case "$*" in
    *"import mindspore"*) [ -z "$FAKE_BROKEN" ] && echo "2.9.0 1.9.0" || { echo "libgomp is missing" >&2; exit 1; } ;;
    *find_spec*) exit ${FAKE_FIND:-1} ;;
    *"pip.__version__"*) exit ${FAKE_OLD_PIP:-0} ;;
    *"maxsize > 2**32"*) case " 3.9 3.10 3.11 3.12 " in *" $FAKE_VERSION "*) exit 0 ;; *) exit 1 ;; esac ;;
    *"import venv"*) exit ${FAKE_NO_VENV:-0} ;;
    *requirements.py*) printf '%s' "$FAKE_MISSING" ;;
    *sys.version_info*) echo "$FAKE_VERSION" ;;
    --version) echo "Python $FAKE_VERSION" ;;
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && echo "VIRTUAL_ENV=$3" >"$3/bin/activate" &&
        touch "$3/pyvenv.cfg" ;;
    "-m pip "*)
        echo "$*" >>"$CALLS"
        echo "Collecting something"
        echo "Downloading mindspore-2.9.0.whl (800.1 MB)"
        case "$*" in *torch*) exit ${FAKE_TORCH:-0} ;; esac
        [ -z "$FAKE_PIP_ERROR" ] || { echo "$FAKE_PIP_ERROR"; exit 1; } ;;
    "-m ruff"*) echo "ran $*"; exit ${FAKE_RUFF:-0} ;;
    "-m codespell_lib"*) echo "ran $*"; exit ${FAKE_CODESPELL:-0} ;;
    "-m pytest"*) echo "ran $*" ;;
    */scripts/quickstart.py*) echo "ran $*" ;;
    *) exit 0 ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """A copy of the scripts, a folder `bin` with the pretended Pythons, and a way to run bash there."""
    root = tmp_path / "checkout"
    shutil.copytree(ROOT / "scripts", root / "scripts")
    for name in ("setup.cfg", "setup.py", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, root / name)
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("python3", "python3.11"):
        (tools / name).write_text(FAKE_PYTHON)
        (tools / name).chmod(0o755)
    return root


def run(checkout, script="set -eu; source scripts/env.sh; telechat_env dev; echo PYTHON=$PYTHON", **env):
    """Run a bash script in the checkout with the pretended Pythons first on PATH."""
    calls = checkout.parent / "calls"
    calls.touch()
    path = f"{checkout.parent / 'bin'}:/usr/bin:/bin"
    result = subprocess.run(["bash", "-c", script], cwd=checkout, text=True, capture_output=True, timeout=60, env={
        "PATH": path, "HOME": str(checkout), "CALLS": str(calls), "FAKE_VERSION": "3.11", **env})
    result.calls = calls.read_text().splitlines()
    calls.unlink()
    return result


def error_lines(result):
    """What a failed run says, and that it says it without a traceback."""
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    return result.stderr


def test_venv_is_made_once(checkout):
    first = run(checkout)
    assert first.returncode == 0, first.stderr
    assert f"PYTHON={checkout}/.venv/bin/python" in first.stdout
    assert any("install -c constraints.txt -e .[cpu,dev]" in call for call in first.calls)
    assert "800.1 MB" in first.stdout
    second = run(checkout)
    assert second.returncode == 0 and second.calls == [] and second.stdout.startswith("PYTHON=")
    # Changed pins are installed, and so is an extra that was not asked for before.
    (checkout / "setup.cfg").write_text((checkout / "setup.cfg").read_text() + "\n# changed\n")
    assert run(checkout).calls and not run(checkout).calls
    torch = run(checkout, "set -eu; source scripts/env.sh; telechat_env dev torch")
    assert any("torch" in call for call in torch.calls) and not run(checkout).calls


def test_failed_installation_is_not_taken_for_done(checkout):
    failed = run(checkout, FAKE_PIP_ERROR="ERROR: No matching distribution found for mindspore==2.9.0")
    assert "No matching distribution" in error_lines(failed) and "install.log" in failed.stderr
    full = run(checkout, FAKE_PIP_ERROR="OSError: [Errno 28] No space left on device")
    assert "The disk is full" in error_lines(full)
    broken = run(checkout, FAKE_BROKEN="1")
    assert "libgomp is missing" in error_lines(broken)
    assert run(checkout).calls, "the installation must be tried again"


def test_torch_is_optional(checkout):
    result = run(checkout, "set -eu; source scripts/env.sh; telechat_env dev torch", FAKE_TORCH="1")
    assert result.returncode == 0 and "will skip" in result.stdout


def test_venv_that_was_moved_is_created_again(checkout):
    run(checkout)
    moved = checkout.with_name("moved")
    checkout.rename(moved)
    result = run(moved)
    assert result.returncode == 0 and "creating it again" in result.stdout
    assert str(moved) in (moved / ".venv/bin/activate").read_text()


@pytest.mark.parametrize("env, words", [
    ({"FAKE_VERSION": "3.8"}, ["no Python 3.9 to 3.12 found", "(3.8)", "python3.11"]),
    ({"FAKE_VERSION": "3.13"}, ["no Python 3.9 to 3.12 found", "(3.13)"]),
    ({"FAKE_NO_VENV": "1"}, ["no venv module", "python3.11-venv"]),
    ({"TELECHAT_PYTHON": "/no/such/python"}, ["TELECHAT_PYTHON=/no/such/python"]),
])
def test_no_usable_python(checkout, env, words):
    path = checkout.parent / "bin"
    if "FAKE_VERSION" in env or "FAKE_NO_VENV" in env:      # hide the machine's own Pythons
        for name in ("python3.9", "python3.10", "python3.12", "python"):
            shutil.copy(path / "python3", path / name)
    result = run(checkout, **env)
    assert all(word in error_lines(result) for word in words), result.stderr
    assert not (checkout / ".venv").exists()


def test_too_little_disk(checkout):
    df = checkout.parent / "bin" / "df"
    df.write_text("#!/bin/bash\necho header\necho '/dev/x 100 50 2048000 50% /'\n")
    df.chmod(0o755)
    result = run(checkout)
    assert "needs about 5 GB" in error_lines(result) and "2000 MB are free" in result.stderr
    assert not (checkout / ".venv").exists()


def test_foreign_folder_called_venv_is_left_alone(checkout):
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / "thesis.txt").write_text("mine")
    assert "no virtual environment" in error_lines(run(checkout))
    assert (checkout / ".venv" / "thesis.txt").exists()


def test_own_interpreter_gets_only_what_it_lacks(checkout):
    own = str(checkout.parent / "bin" / "python3")
    for env in ({"TELECHAT_PYTHON": own}, {"FAKE_FIND": "0"}):
        result = run(checkout, **env)
        assert result.returncode == 0 and result.calls == [] and f"PYTHON={own}" in result.stdout
        result = run(checkout, FAKE_MISSING="matplotlib>=3.7\n", **env)
        assert [call for call in result.calls if call.endswith("install matplotlib>=3.7")] and len(result.calls) == 1
    broken = run(checkout, FAKE_FIND="0", FAKE_BROKEN="1")
    assert "do not import" in broken.stdout + broken.stderr
    assert not any("uninstall" in call for call in broken.calls)


def test_quickstart_starts_in_the_environment(checkout):
    first = run(checkout, "cd / && bash $HOME/scripts/quickstart.sh --from finetune")
    assert first.returncode == 0 and any("-e .[cpu]" in call for call in first.calls), first.stderr
    assert first.stdout.splitlines()[-1] == f"ran {checkout}/scripts/quickstart.py --from finetune"
    assert "unknown argument --fast" in error_lines(run(checkout, "bash scripts/quickstart.sh --fast"))
    shown = run(checkout, "bash scripts/quickstart.sh --help").stdout
    assert "--from finetune" in shown and "set -eu" not in shown
    for step in STEPS:
        assert step in shown and run(checkout, f"bash scripts/quickstart.sh --from {step}").returncode == 0


def test_run_tests_reports_lint_and_tests(checkout):
    passed = run(checkout, "bash scripts/run_tests.sh -k some")
    assert passed.returncode == 0 and "ran -m ruff check ." in passed.stdout and "ran -m codespell_lib" in passed.stdout
    assert passed.stdout.splitlines()[-1] == "ran -m pytest -k some"
    everything = run(checkout, "bash scripts/run_tests.sh -m 'not slow'", TELECHAT_TEST_WORKERS="3")
    assert everything.stdout.splitlines()[-1] == "ran -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m not slow"
    assert "ran -m pytest -n 2 --dist loadfile" in run(checkout, "bash scripts/run_tests.sh").stdout
    for check in ("FAKE_RUFF", "FAKE_CODESPELL"):
        lint = run(checkout, "bash scripts/run_tests.sh", **{check: "1"})
        assert lint.returncode == 1 and "ran -m pytest" in lint.stdout
        assert "ruff or codespell found errors" in error_lines(lint)


def test_requirements_lists_what_is_missing(monkeypatch):
    result = subprocess.run([sys.executable, str(ROOT / "scripts" / "requirements.py"), "cpu"], text=True,
                            capture_output=True, check=True)
    assert not any(line.startswith(("numpy", "mindspore", "mindformers")) for line in result.stdout.splitlines())
    assert any(line.startswith("pytest==") for line in requirements.requirements(["dev"]))
    assert requirements.is_installed("numpy>=1.20") and not requirements.is_installed("no-such-distribution==1.0")
    # MindFormers is chosen for the MindSpore that is there, as it would replace another one.
    monkeypatch.setattr(requirements, "is_installed", lambda line: line != "mindformers")
    monkeypatch.setattr(requirements, "installed_version", {"mindspore": "2.7.1", "mindformers": None}.get)
    assert requirements.missing(["cpu"]) == ["mindformers==1.7.0"]


def test_constraints_pin_the_newest_tested_pair_and_agree_with_setup():
    lines = [line.split(";")[0].strip() for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()
             if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9.-]+==[0-9][0-9a-z.]*", line) for line in lines)
    assert lines[:2] == ["{}=={}".format(*pair) for pair in zip(("mindspore", "mindformers"), fitting_pair())]
    pinned = {line.split("==")[0] for line in lines}                # names in lower case
    extras = ["cpu", "torch", "evaluation", "peft", "dev", "serve", "constrained", "clients"]
    for line in requirements.requirements(extras):
        requirement = line.split(";")[0].strip().lower()
        assert re.match("[A-Za-z0-9.-]+", requirement).group() in pinned
        assert "==" not in requirement or requirement in lines


def test_ci_passes_arguments_on():
    text = (ROOT / ".ci" / "run").read_text()
    assert "scripts/run_tests.sh" in text and "TELECHAT_TEST_TORCH" in text
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "scripts").glob("*.sh")))
def test_shell_scripts_parse(name):
    subprocess.run(["bash", "-n", str(ROOT / "scripts" / name)], check=True)


def read_examples():
    """The example conversations as lists of turns, user first."""
    for line in EXAMPLES.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        assert set(record) == {"input", "output"} and record["input"].startswith("<_user>")
        yield [*re.split("<_user>|<_bot>", record["input"])[1:], record["output"]], record


def test_examples():
    records = list(read_examples())
    assert len(records) >= 60
    answers = {}
    for turns, record in records:
        assert len(turns) % 2 == 0 and all(turn.strip() == turn and turn for turn in turns)
        assert re.fullmatch("(<_user>[^<]+<_bot>[^<]+)*<_user>[^<]+", record["input"])
        for end in range(1, len(turns), 2):       # the same history must have the same answer, or none can be learnt
            assert answers.setdefault(tuple(turns[:end]), turns[end]) == turns[end]
            assert 8 <= len(turns[end]) <= 90
    assert ("生抽与老抽的区别？",) in answers
    assert sum(len(turns) > 2 for turns, _ in records) >= 10
    chinese = sum(bool(re.search("[一-鿿]", turns[0])) for turns, _ in records)
    assert chinese >= 30 and len(records) - chinese >= 20


def test_example_input_file():
    lines = [json.loads(line) for line in (ROOT / "examples" / "input.json").read_text("utf-8").splitlines()]
    assert lines[0] == {"input": "生抽与老抽的区别？"} and len(lines) > 1
    learnt = [turns for turns, _ in read_examples()]
    assert any(turns[0] == lines[0]["input"] and turns[2:3] == [lines[1]["input"]] for turns in learnt)
