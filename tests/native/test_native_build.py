"""Compiling the fused operators: once, only by and for the user, and never an error where it cannot be done."""
import os
import subprocess
import sys

import pytest

from research.telechat.native import build


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """`library` without its remembered result, and with an empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(build.SWITCH, raising=False)
    return build._library.__wrapped__


def compiler(folder, text):
    """An executable script in place of the compiler."""
    path = folder / "cxx"
    path.write_text(f"#!/bin/sh\n[ \"$1\" = --version ] && echo 1 && exit\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def test_the_library_is_compiled_here():
    """On the machines that run the tests there is a compiler, and what it makes can be loaded."""
    found = build.library()
    assert found.path is not None, found.reason
    assert found.path.is_file()


def test_compiled_once(fresh, monkeypatch, tmp_path):
    """The second time the library is there; other sources, options or compilers get one of their own."""
    monkeypatch.setenv("CXX", compiler(tmp_path, f"while [ $1 != -o ]; do shift; done; echo x >> {tmp_path}/calls; "
                                                 f"cp {build.library().path} $2"))
    stale = tmp_path / "cache" / "telechat" / "compiling-1"
    stale.mkdir(parents=True, mode=0o700)
    stale.parent.chmod(0o700)
    os.utime(stale, (0, 0))
    first, second = fresh(), fresh()
    assert first.path == second.path and first.seconds > 0 and second.seconds == 0
    assert (tmp_path / "calls").read_text(encoding="utf-8").count("x") == len(build.sources()) + 1
    assert os.listdir(first.path.parent) == [first.path.name]
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-g"))
    assert fresh().path != first.path


@pytest.mark.parametrize("text, reason", [
    ("echo 'layer.cc:1: error: no' >&2; exit 1", r"cxx failed: layer.cc:1: error: no"),
    ("while [ $1 != -o ]; do shift; done; echo no library > $2", "kernels-"),
])
def test_what_fails_is_a_reason(fresh, monkeypatch, tmp_path, text, reason):
    monkeypatch.setenv("CXX", compiler(tmp_path, text))
    found = fresh()
    assert found.path is None and reason in found.reason


def test_without_compiler_or_switched_off(fresh, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no C++ compiler was found (looked for no-such-compiler)" in fresh().reason
    monkeypatch.setenv(build.SWITCH, "0")
    assert fresh().reason == "TELECHAT_CPU_KERNELS is 0"


def test_what_mindspore_would_refuse_is_a_reason(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("MS_CUSTOM_AOT_WHITE_LIST", str(tmp_path / "elsewhere"))
    assert "allows libraries in " in fresh().reason
    monkeypatch.setattr(sys, "platform", "darwin")
    assert fresh().reason == "MindSpore takes them on Linux only"


def test_a_folder_that_others_can_write_is_refused(fresh, tmp_path):
    """What lies there is executed."""
    folder = tmp_path / "cache" / "telechat"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert "can be written by others; set XDG_CACHE_HOME" in fresh().reason
    folder.rmdir()
    folder.write_text("", encoding="utf-8")
    assert "cannot be made" in fresh().reason


def test_lines_of_the_source_fit():
    """As in Python, which the linter checks."""
    for path in [*build._HERE.glob("*.cc"), *build._HERE.glob("*.h")]:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert max(map(len, lines)) <= 120 and len(lines) <= 400, path.name


def test_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert build.threads() == 3
    for unclear in ("", "0", "many"):
        monkeypatch.setenv("OMP_NUM_THREADS", unclear)
        assert build.threads() == min(len(os.sched_getaffinity(0)), 16)


def test_threads_after_a_fork():
    """A forked process has no threads but its own: operators start new ones there."""
    code = ("import ctypes, os, numpy as np\n"
            "from research.telechat.native.build import library\n"
            "from native_fixtures import call\n"
            "x, w = np.ones((40, 64), np.float32), np.ones((900, 64), np.float32)\n"
            "def run():\n"
            "    one = np.ones(1, np.float32)\n"
            "    shapes = [(40, 900), ((40,), np.int32)]\n"
            "    return call('Head', [x, np.ones(64, np.float32), w, 0 * one, one], shapes, 2)[0]\n"
            "assert (run() == 64).all()\n"
            "child = os.fork()\n"
            "if not child:\n"
            "    os._exit(0 if (run() == 64).all() else 1)\n"
            "assert os.waitpid(child, 0)[1] == 0 and (run() == 64).all()\n")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60,
                   env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
