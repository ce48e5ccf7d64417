"""Programs in isolation: what passes, and hostile ones, each held at what it tries."""
import ctypes
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from isolation import require_isolation

from research.telechat.evaluation import sandbox
from research.telechat.evaluation.confined import REFUSED, filter_program
from research.telechat.evaluation.sandbox import CodeEval, Limits, pass_at, run_program

SHORT = Limits(cpu_seconds=1, seconds=2.0)


@pytest.fixture(scope="module")
def isolated():
    """Skips where the isolation cannot be had."""
    require_isolation()


@pytest.fixture(autouse=True)
def isolated_programs(request):
    """`isolated`, for all tests but the one that runs nothing."""
    if request.function is not test_calls_that_are_refused_have_numbers_on_both_machines:
        request.getfixturevalue("isolated")


@pytest.mark.parametrize(("program", "result"), [
    ("import math, json, tempfile\nwith tempfile.TemporaryFile() as file:\n    file.write(b'x' * 100000)", "passed"),
    ("assert 1 == 2, 'no'", "failed: AssertionError: no"),
    ("def f(:", "failed: SyntaxError"),
    ("exit(0)", "failed: SystemExit"),
    ("import os\nos._exit(0)", "failed: ended before its tests"),
    ("import os\nfor number in range(3, 9):\n    try:\n        os.write(number, b'passed')\n"
     "    except OSError:\n        pass", "failed: ended before its tests"),
    ("if __name__ == '__main__':\n    raise ValueError('a script')", "passed")])
def test_outcomes(program, result):
    """As code_eval sees them: a program that ends early has passed no test."""
    assert run_program(program).startswith(result)


def test_files_outside(tmp_path):
    """It sees no file but the interpreter's and the system's, of those it can write none, and its folder goes."""
    secret = tmp_path / "secret"
    secret.write_text("key")
    os.environ["TELECHAT_SECRET"] = "key"
    try:
        result = run_program(f"""
import os
found = []
for path in ({str(secret)!r}, "/etc/passwd", "/proc/1/environ", {str(Path.home() / ".ssh")!r}, {str(Path(__file__))!r}):
    if os.path.exists(path):
        found.append(path)
for path in ("/x", "/usr/x", "/etc/x", "/dev/x", {str(Path(os.__file__).parent / "x")!r}):
    try:
        open(path, "w")
        found.append(path)
    except OSError:
        pass
assert not found, found
assert "TELECHAT_SECRET" not in os.environ
open("left", "w").write("x")
""")
    finally:
        del os.environ["TELECHAT_SECRET"]
    assert result == "passed"
    assert run_program("import os\nassert os.listdir('.') == [] and os.listdir(os.environ['HOME']) == []") == "passed"


def test_no_network_no_privileges():
    """No sockets but local ones, no other processes to see or signal, no new namespaces, no root."""
    assert run_program("""
import ctypes, os, signal, socket
libc = ctypes.CDLL(None, use_errno=True)
def refused(what):
    try:
        return what() == -1
    except OSError:
        return True
for family in (socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK, socket.AF_PACKET):
    assert refused(lambda: socket.socket(family, socket.SOCK_DGRAM)), family
socket.socketpair()
assert os.getpid() == 1 and refused(lambda: os.kill(2, signal.SIGKILL))
assert refused(lambda: libc.unshare(0x10000000)) and refused(lambda: libc.ptrace(16, 1, 0, 0))
assert refused(lambda: os.setuid(0)) and refused(lambda: libc.mount(b"x", b"/box", b"tmpfs", 0, 0))
assert refused(lambda: libc.shmget(0, 1 << 20, 0o1600)) and refused(lambda: os.memfd_create("x"))
""") == "passed"


def children():
    """Numbers of our processes; those that outlive their parents become ours."""
    assert ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) == 0    # PR_SET_CHILD_SUBREAPER
    return set(subprocess.run(["pgrep", "-P", str(os.getpid())], capture_output=True, text=True).stdout.split())


def test_fork_bomb():
    """Its processes are counted, whoever runs it, and end with it."""
    started, before = time.monotonic(), children()
    most = Limits().processes
    assert run_program(f"""
import os, time
count = 1
try:
    for _ in range(1000):
        if not os.fork():
            time.sleep(600)
        count += 1
except OSError:
    assert count <= {most}, count
    raise SystemExit(count)
""").startswith(f"failed: SystemExit: {most}")
    assert run_program("import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
                       SHORT) == "timed out"
    assert time.monotonic() - started < 60
    assert children() <= before


@pytest.mark.parametrize(("program", "result"), [
    ("import time\ntime.sleep(600)", "timed out"),
    ("while True:\n    pass", "timed out"),
    ("x = bytearray(10 ** 10)", "failed: MemoryError"),
    ("import sys\nfor _ in range(40):\n    sys.stdout.write('x' * 10 ** 6)\n    sys.stderr.write('x' * 10 ** 6)",
     "passed"),
    ("import os\nfor number in range(4, 64):\n    try:\n        while True:\n"
     "            os.write(number, b'x' * 4096)\n    except OSError:\n        pass", "failed: ended"),
    ("file = open('x', 'wb')\nfor _ in range(100):\n    file.write(bytes(10 ** 6))", "failed: OSError: [Errno 27]"),
    ("for number in range(100):\n    open(str(number), 'wb').write(bytes(10 ** 7))", "failed: OSError: [Errno 28]"),
    ("for number in range(10000):\n    open(str(number), 'wb')", "failed: OSError"),
    ("raise Exception('x' * 10 ** 6)", "failed: Exception: xxx")], ids=[
        "sleep", "loop", "memory", "output", "report", "file", "folder", "many_files", "message"])
def test_resources(program, result):
    found = run_program(program, SHORT if result == "timed out" else Limits())
    assert found.startswith(result) and len(found) < 2000


def test_without_isolation_nothing_runs():
    """Within the isolation another one cannot be set up: the guard refuses, and the program has not run."""
    order = {**Limits()._asdict(), "token": "t", "root": "/box", "paths": [], "python": sys.executable, "libraries": ""}
    source = sandbox.GUARD.read_text(encoding="utf-8").replace('if __name__ == "__main__":', "if False:")
    assert run_program(f"""
import sys
namespace = {{"__name__": "confined"}}
exec(compile({source!r}, "confined", "exec"), namespace)
sys.argv = ["confined", {json.dumps(json.dumps(order))}]
try:
    namespace["main"]()
except namespace["Refused"] as error:
    assert "unshare" in str(error), error
else:
    raise AssertionError("it ran")
""") == "passed"


def test_as_another_user():
    """Where the tests run as root: the other way, namespaces of users."""
    python = "/usr/bin/python3"
    if os.geteuid() != 0 or not os.access(python, os.X_OK):
        pytest.skip("needs root and the system's Python")
    order = {**Limits()._asdict(), "token": "t", "paths": [path for path in sandbox._SHOWN if os.path.exists(path)],
             "python": python, "libraries": ""}
    script = f"""
import json, os, subprocess, sys, tempfile
os.setgid(65534); os.setuid(65534)
with tempfile.TemporaryDirectory() as root:
    order = {order!r}
    order["root"] = root
    program = b"t\\nimport os\\nassert os.getuid() == 1000 and os.listdir('.') == []"
    done = subprocess.run([{python!r}, "-I", "-c", sys.stdin.read(), json.dumps(order)], input=program, stdout=-1)
print(done.stdout.decode())
"""
    done = subprocess.run([python, "-I", "-c", script], input=sandbox.GUARD.read_text(encoding="utf-8"), text=True,
                          capture_output=True)
    outcome = json.loads(done.stdout)
    if "refused" in outcome:
        pytest.skip(outcome["refused"])
    assert outcome == {"result": "passed"}, done.stderr


def test_mounts_below_what_is_shown(tmp_path):
    """A file system mounted below a shown folder is read-only too, and a strict umask of the caller closes nothing."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount")
    below = tmp_path / "shown" / "a place"
    below.mkdir(parents=True)
    program = f"import os\nassert os.path.exists({str(below / 'here')!r})\nopen({str(below / 'x')!r}, 'w')"
    script = f"""
import os
from research.telechat.evaluation import confined, sandbox
os.umask(0o077)
confined.call("unshare", confined.CLONE_NEWNS)
confined.call("mount", "none", "/", None, confined.MS_REC | confined.MS_PRIVATE, None)
confined.call("mount", "tmpfs", {str(below)!r}, "tmpfs", 0, "size=1m,mode=777")
open({str(below / "here")!r}, "w").close()
sandbox._SHOWN += ({str(below.parent)!r},)
print(sandbox.run_program({program!r}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.startswith("failed: OSError: [Errno 30] Read-only file system"), done.stdout + done.stderr


def test_environment_behind_links(tmp_path, monkeypatch):
    """The folder of an environment may be a link to a link: what it leads to is shown as well."""
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "here").touch()
    (tmp_path / "real").chmod(0o755)
    (tmp_path / "second").symlink_to("real")
    (tmp_path / "first").symlink_to(tmp_path / "second")
    monkeypatch.setattr(sys, "exec_prefix", str(tmp_path / "first"))
    assert run_program(f"open({str(tmp_path / 'first' / 'here')!r})") == "passed"


def test_calls_that_are_refused_have_numbers_on_both_machines():
    for machine, numbers in REFUSED.items():
        assert len(set(numbers.values())) == len(numbers)
        steps = filter_program(machine)
        assert all(at + 1 + max(true, false) < len(steps) for at, (code, true, false, _) in enumerate(steps)
                   if code not in (0x20, 0x06))
    assert REFUSED["x86_64"].keys() - {"mknod"} == REFUSED["aarch64"].keys()


def test_pass_at_k(monkeypatch):
    """Of n programs c pass: one less the share of draws of k without any that passes."""
    assert pass_at(1, 4, 1) == 0.25 and pass_at(2, 4, 2) == pytest.approx(1 - 1 / 6) and pass_at(2, 4, 3) == 1.0
    metric = CodeEval()
    assert metric.compute(["assert True"], [["x = 1"]], [1]) == ({"pass@1": 0.0}, {0: ["failed: not run"]})
    metric.allowed = True
    found, outcomes = metric.compute(["assert f() == 1"], [["def f(): return 1", "def f(): return 2"]], [1, 2, 3])
    assert found == {"pass@1": 0.5, "pass@2": 1.0} and outcomes[0][0] == "passed"
    monkeypatch.setenv("RANK_ID", "1")
    monkeypatch.setattr(sandbox, "rank", lambda: 1)
    assert metric.compute(["assert True"], [["x = 1"]], [1])[0] == {"pass@1": 0.0}
