"""How commands end: exit codes, the one line on stderr, signals, a reader that has gone."""
import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from research.telechat.common import command
from research.telechat.common.errors import (
    CheckpointError,
    ConfigError,
    ConversationError,
    SimulationError,
    TrainingStopped,
    UserError,
    VocabError,
    WorkerError,
)

ROOT = Path(__file__).resolve().parents[2]


def raising(err):
    def body():
        raise err
    return body


@pytest.mark.parametrize("kind", [UserError, ConfigError, CheckpointError, ConversationError, SimulationError,
                                  TrainingStopped, VocabError, WorkerError])
def test_errors_of_the_user_are_one_line(kind, capsys):
    assert command.run_command(raising(kind("the fault\nin two lines"))) == 1
    assert capsys.readouterr() == ("", "error: the fault in two lines\n")


@pytest.mark.parametrize(("err", "line"), [
    (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.ckpt"), "a.ckpt: No such file or directory"),
    (PermissionError(errno.EACCES, "Permission denied", "out"), "out: Permission denied"),
    (OSError(errno.ENOSPC, "No space left on device"), "the disk is full; free some space; nothing was written"),
    (OSError(errno.EDQUOT, "Quota exceeded", "x"), "the disk is full (x); free some space; nothing was written"),
    (MemoryError(), "not enough memory; use fewer threads"),
    (BrokenPipeError(errno.EPIPE, "Broken pipe"), "[Errno 32] Broken pipe"),          # not that of stdout
])
def test_faults_of_the_machine_are_one_line(err, line, capsys):
    assert command.run_command(raising(err), "nothing was written", "use fewer threads") == 1
    assert capsys.readouterr() == ("", f"error: {line}\n")


def test_other_endings(capsys):
    assert command.run_command(lambda: None) == 0
    assert command.run_command(lambda: 3) == 3
    assert command.run_command(raising(KeyboardInterrupt()), "what is done is kept") == 130
    assert command.run_command(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "interrupted; what is done is kept\ninterrupted\n"
    for err in (ZeroDivisionError(), SystemExit(2)):                   # an error of the program; argparse
        with pytest.raises(type(err)):
            command.run_command(raising(err))


BODY = """
import signal, sys, time
from research.telechat.common.command import run_command

def body():
    try:
        print("ready", flush=True)
        time.sleep(30)
    finally:
        time.sleep(0.3)                     # a second signal comes here
        print("cleaned up", flush=True)

sys.exit(run_command(body, "nothing was written"))
"""


def started(code=BODY, prefix=(), **env):
    process = subprocess.Popen([*prefix, sys.executable, "-c", code], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT), **env})
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_clean_up(number):
    process = started()
    process.send_signal(number)
    if number != signal.SIGINT:
        time.sleep(0.1)
        process.send_signal(number)
    out, err = process.communicate(timeout=20)
    sender = "" if number == signal.SIGINT else f"{number.name}: "
    assert (process.returncode, out, err) == (130, "cleaned up\n", f"{sender}interrupted; nothing was written\n")


def test_an_ignored_hangup_stays_ignored():
    process = started(prefix=("nohup",))
    process.send_signal(signal.SIGHUP)
    time.sleep(1)                                          # longer than the clean-up would take
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 130


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_rank_among_several_ends_at_once(number):
    """It may be waiting for another rank, where no Python runs."""
    process = started(MS_WORKER_NUM="2")
    process.send_signal(number)
    out, _ = process.communicate(timeout=20)
    assert (process.returncode, out) == (-number, "")


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    during = []
    command.run_command(lambda: during.append(signal.getsignal(signal.SIGTERM)))
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == before
    assert during and during[0] not in before


@pytest.mark.parametrize("count", [1, 100000])                         # noticed at the last flush, or on the way
@pytest.mark.parametrize("options", [[], ["-u"]])
def test_a_reader_that_has_gone_ends_it_quietly(count, options):
    code = textwrap.dedent(f"""
        import sys
        from research.telechat.common.command import run_command
        sys.stdin.read()
        sys.exit(run_command(lambda: print('x\\n' * {count})))
    """)
    process = subprocess.Popen([sys.executable, *options, "-c", code], cwd=ROOT, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""})
    process.stdout.close()
    process.stdin.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=20) == command.READER_GONE
    process.stderr.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_output_to_a_full_disk_is_one_error():
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "research.telechat", "--help"], cwd=ROOT, stdout=full, text=True,
                              stderr=subprocess.PIPE, timeout=60, check=False,
                              env={**os.environ, "PYTHONUNBUFFERED": ""})
    assert (done.returncode, done.stderr) == (1, "error: the disk is full; free some space\n")


def test_leaving_loses_nothing_but_time():
    script = textwrap.dedent("""
        import atexit, threading, time
        from concurrent.futures import ThreadPoolExecutor
        from research.telechat.common.command import leave

        class Late:
            def __del__(self):
                print("taken apart")

        late = Late()
        atexit.register(print, "at the exit")
        pool = ThreadPoolExecutor(1)
        pool.submit(lambda: (time.sleep(0.2), print("the pool's work")))
        threading.Thread(target=lambda: (time.sleep(0.1), print("the thread's work"))).start()
        print("the end", end=" ")
        leave(3)
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 3 and done.stderr == ""
    assert done.stdout.splitlines() == ["the end the thread's work", "the pool's work", "at the exit"]
