"""Locks of outputs: who holds one is named, a dead holder is followed, and of two writers one waits for nobody."""
import json
import os
import signal
import socket
import sys
import time

import pytest

from research.telechat.common.errors import OutputBusyError
from research.telechat.common.lock import lock_path, output_lock


def holder(output, seconds=30):
    """A process that holds the lock of `output`; its number, once it does."""
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        with output_lock(output):
            os.write(tell, b"x")
            time.sleep(seconds)
        os._exit(0)
    os.close(tell)
    assert os.read(ready, 1) == b"x"
    os.close(ready)
    return child


def test_the_message_names_who_writes(tmp_path):
    child = holder(tmp_path / "x.ckpt")
    try:
        with pytest.raises(OutputBusyError) as caught, output_lock(tmp_path / "x.ckpt"):
            pass
        text = str(caught.value)
        assert f"process {child} on {socket.gethostname()}, since 20" in text and os.path.basename(sys.argv[0]) in text
        assert "\n" not in text
        with output_lock(tmp_path / "y.ckpt"):                # another output is free
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert lock_path(tmp_path / "x.ckpt").is_file()           # a dead process leaves it
    with output_lock(tmp_path / "x.ckpt"):
        assert json.loads(lock_path(tmp_path / "x.ckpt").read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_a_lock_of_another_machine_is_left_alone(tmp_path):
    path = lock_path(tmp_path / "out", folder=True)
    path.parent.mkdir()
    path.write_text(json.dumps({"pid": 1, "host": "elsewhere", "since": "2026-01-01 00:00:00", "command": "convert"}))
    with pytest.raises(OutputBusyError, match=r"process 1 on elsewhere.*if that process is gone, remove .*lock"), \
            output_lock(tmp_path / "out", folder=True):
        pass
    path.unlink()
    with output_lock(tmp_path / "out", folder=True):
        (tmp_path / "out" / "file").write_text("x")
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["file"]


def test_a_number_that_was_given_to_another_process_is_no_holder(tmp_path):
    other = {"pid": os.getppid(), "started": "1", "host": socket.gethostname()}
    lock_path(tmp_path / "x").write_text(json.dumps(other))
    with output_lock(tmp_path / "x"):
        pass
    lock_path(tmp_path / "x").write_text("half a na")         # killed while it wrote its name
    with output_lock(tmp_path / "x"):
        pass


def test_folders_that_were_made_for_nothing_go_again(tmp_path):
    with output_lock(tmp_path / "a" / "b" / "x"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not (tmp_path / "a").exists()


def test_never_two_at_a_time(tmp_path):
    """Eight processes want the lock again and again, and each adds one to a number that only its holder touches."""
    counter = tmp_path / "counter"
    counter.write_text("0")
    children = []
    for _ in range(8):
        child = os.fork()
        if child == 0:
            done = 0
            while done < 12:
                try:
                    with output_lock(tmp_path / "out" / "x"):
                        value = int(counter.read_text())
                        time.sleep(0.0005)
                        counter.write_text(str(value + 1))
                        done += 1
                except OutputBusyError:
                    time.sleep(0.001)
            os._exit(0)
        children.append(child)
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)
    assert counter.read_text() == str(8 * 12)
    assert not list(tmp_path.glob(".*")) and not list(tmp_path.glob("out/*"))
