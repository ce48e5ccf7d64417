"""tests/support/prepared.py: what it starts behaves as a process that subprocess starts."""
import os
import signal
import subprocess
import sys
import time

import prepared
import pytest

SCRIPT = """
import json, os, signal, sys
assert __name__ == "__main__"
print("out", sys.argv[1:], os.getcwd(), os.environ.get("HERE"), "PATH" in os.environ, len(sys.stdin.read()))
print("err", file=sys.stderr)
import beside
def last():
    os.write(1, b"at exit\\n")
import atexit
atexit.register(last)
what = sys.argv[1]
if what == "kill":
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)
if what == "write":
    with open("large", "wb") as file:
        file.write(bytes(3000))
if what == "raise":
    raise ValueError("wrong")
sys.exit(int(what) if what.isdigit() else None)
"""


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """(function that starts the script with arguments, its folder)"""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "script.py").write_text(SCRIPT)
    (folder / "beside.py").write_text("")
    server = prepared.Server(("json",))

    def start(*args, limit=0):
        return server.start({"args": [str(folder / "script.py"), *args], "cwd": str(folder), "env": {"HERE": "yes"},
                             "output": str(folder / "out"), "error": str(folder / "err"), "limit": limit})
    yield start, folder
    server.stop()


@pytest.mark.parametrize(("args", "limit", "code"), [
    (["0", "a b"], 0, 0), (["3"], 0, 3), (["kill"], 0, -signal.SIGKILL), (["raise"], 0, 1), (["write"], 2000, 1),
    (["write"], 4000, 0)])
def test_same_as_a_process_of_its_own(args, limit, code, started):
    start, folder = started
    for name in ("out", "err"):
        (folder / name).unlink(missing_ok=True)
    assert start(*args, limit=limit).wait(60) == code
    found = [(folder / name).read_text() for name in ("out", "err")]
    own = subprocess.run([sys.executable, str(folder / "script.py"), *args], cwd=folder, env={"HERE": "yes"}, text=True,
                         capture_output=True, stdin=subprocess.DEVNULL, check=False)
    if not limit:
        assert own.returncode == code
    elif code:
        assert "OSError: [Errno 27] File too large" in found[1]
    assert (found[0] == own.stdout and found[1].splitlines()[0] == "err" and "at exit" in found[0]) or code < 0
    if args == ["raise"]:
        assert found[1].splitlines()[-1] == own.stderr.splitlines()[-1] == "ValueError: wrong"


def test_several_run_at_once_and_can_be_ended(started):
    start, folder = started
    (folder / "script.py").write_text("import sys, time\ntime.sleep(float(sys.argv[1]))\n")
    slow, quick = start("60"), start("0")
    assert quick.wait(60) == 0 and slow.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        slow.wait(0.1)
    slow.kill()
    assert slow.wait(60) == -signal.SIGKILL and slow.poll() == -signal.SIGKILL


@pytest.fixture
def python(tmp_path, started, monkeypatch):
    """A program `python` that the prepared process runs scripts for."""
    server = prepared.Server(("json",))
    monkeypatch.setitem(prepared._servers, False, server)
    prepared.put_python(tmp_path / "python")
    yield tmp_path / "python"
    server.stop()


def test_a_program_python_is_as_good_as_python(tmp_path, python):
    """Streams, folder, environment, arguments, exit code, and how a signal ends it."""
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "beside.py").write_text("")
    (tmp_path / "sleep.py").write_text("import time\nprint('awake', flush=True)\ntime.sleep(60)\n")
    for args in (["0", "a b"], ["3"], ["raise"], ["kill"]):
        one, two = (subprocess.run([program, "script.py", *args], cwd=tmp_path, env={**os.environ, "HERE": "yes"},
                                   input="typed", text=True, capture_output=True, check=False)
                    for program in (python, sys.executable))
        assert (one.returncode, one.stdout) == (two.returncode, two.stdout) and "5" in one.stdout
        assert one.stderr.splitlines()[:1] == two.stderr.splitlines()[:1] == ["err"]
    for number in (signal.SIGINT, signal.SIGTERM):
        with subprocess.Popen([python, "sleep.py"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              text=True) as process:
            assert process.stdout.readline() == "awake\n"
            process.send_signal(number)
            assert process.wait(60) == -number


def test_what_it_runs_ends_with_it(tmp_path, python):
    (tmp_path / "sleep.py").write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(30)\nprint(1)\n")
    with subprocess.Popen([python, "sleep.py"], cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        child = int(process.stdout.readline())
        assert child != process.pid
        process.kill()
        assert process.stdout.read() == ""           # nobody is left who could write
    with pytest.raises(ProcessLookupError):
        for _ in range(600):
            os.kill(child, 0)
            time.sleep(0.05)


def test_it_is_the_python_of_what_it_runs_unless_other_words_or_libraries_ask_for_python(tmp_path, python):
    (tmp_path / "script.py").write_text("import sys; print(sys.executable, len(sys.argv))")

    def printed(*words, **env):
        return subprocess.run([python, *words], cwd=tmp_path, env={**os.environ, **env}, text=True, capture_output=True,
                              check=True).stdout
    assert printed("script.py", "x") == f"{python} 2\n"
    assert printed("script.py", LD_LIBRARY_PATH="/elsewhere") == f"{sys.executable} 1\n"
    assert printed("-c", "import sys; print(sys.argv)", "x") == "['-c', 'x']\n"


def test_a_module_that_is_missing_is_noticed():
    with pytest.raises(AssertionError, match="cannot be imported"):
        prepared.Server(("no_such_module",))
