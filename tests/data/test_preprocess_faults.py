"""Preprocessing that meets bad input, is interrupted, or loses a worker: one line, nothing half done."""
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from needs import require
from preprocess_fixtures import SAMPLES, SCRIPT, report, run, write_lines

from research.telechat.common.errors import ConfigError, WorkerError
from research.telechat.data import mindrecord
from research.telechat.data.workers import Aside, _guard, ordered_map


def assert_one_error(capsys, code, words, out=None):
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert code != 0 and len(errors) == 1 and words in errors[0], lines
    assert not any("Traceback" in line for line in lines)
    assert out is None or not out.exists() or not list(out.iterdir())


def test_unusable_records_are_named_and_counted(tmp_path, vocab_files, capsys):
    data = tmp_path / "data.jsonl"
    write_lines(data, SAMPLES[:4])
    with open(data, "ab") as file:
        file.write(b'{"input": 1, "output": "x"}\n{broken\n{"input": "\xff", "output": "x"}\n')
    code, out = run(tmp_path, vocab_files["12b"], data)
    err = capsys.readouterr().err
    assert code == 0
    assert f"{data}:5: wrong shape: key 'input' holds int" in err
    assert f"{data}:6: not JSON" in err and f"{data}:7: not UTF-8" in err
    assert report(out)["conversations"]["unusable_records"] == {"not JSON": 1, "not UTF-8": 1, "wrong shape": 1}
    assert report(out)["records_read"] == 7 and report(out)["conversations"]["read"] == 4


def test_too_many_unusable_records_stop_the_run(tmp_path, vocab_files, capsys):
    data = tmp_path / "data.jsonl"
    data.write_bytes(write_lines(data, SAMPLES).read_bytes() + b"{}\n" * 150)
    code, out = run(tmp_path, vocab_files["12b"], data, name="default")
    assert_one_error(capsys, code, "stopped at 100 records", out)
    code, out = run(tmp_path, vocab_files["12b"], data, "--max_errors", 0, name="none")
    assert_one_error(capsys, code, "stopped at 1 records", out)
    code, out = run(tmp_path, vocab_files["12b"], data, "--max_errors", -1, name="all")
    assert code == 0 and report(out)["conversations"]["unusable_records"] == {"wrong shape": 150}
    assert "and 50 more records" in capsys.readouterr().err


@pytest.mark.parametrize("options,words", [
    (["--vocab_file_path", "gone.model"], "vocabulary file not found: gone.model"),
    (["--input_dataset_file", "gone.jsonl"], "input file not found: gone.jsonl"),
    (["--max_length", "2"], "--max_length is 2; the least is 8"),
    (["--max_errors", "-2"], "--max_errors is -2"),
    (["--user_token", "<_usr>"], "the user token '<_usr>'"),
    (["--template", "telechat_52b"], "end token '</s>'"),
    (["--model_name", "telechat_12b", "--template", "telechat2"], "name only one of them"),
    (["--format", "alpaca"], "no usable conversation"),
    (["--output_path", "/dev/null/x"], "output folder /dev/null/x cannot be written"),
])
def test_mistakes_are_named(tmp_path, vocab_files, capsys, options, words):
    code, out = run(tmp_path, vocab_files["12b"], SAMPLES, *options)
    assert_one_error(capsys, code, words, out)


def test_empty_input_makes_no_data_set(tmp_path, vocab_files, capsys):
    code, out = run(tmp_path, vocab_files["12b"], [])
    assert_one_error(capsys, code, "the files hold no records", out)


def test_full_disk_is_one_error(tmp_path, vocab_files, capsys):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 15, before[1]))      # a write beyond it fails, as on a full disk
    try:
        code, out = run(tmp_path, vocab_files["12b"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_one_error(capsys, code, "is the disk full?): ", out)


def test_full_disk_under_the_writer_of_other_releases(tmp_path, vocab_files, capsys, monkeypatch):
    from mindspore.mindrecord import FileWriter

    def full(*_):
        raise RuntimeError("Exception thrown.\n\n[ERROR] Failed to write file: No space left\n\nC++ stack")

    monkeypatch.setattr(mindrecord, "_COMPARED", ())
    monkeypatch.setattr(FileWriter, "write_raw_data", full)
    code, out = run(tmp_path, vocab_files["12b"])
    assert_one_error(capsys, code, "is the disk full?): [ERROR] Failed to write file: No space left", out)


def start_slow_run(tmp_path, vocab, *options):
    """The command as a process of its own, on input that takes a while; returns when it is at work."""
    data = write_lines(tmp_path / "data.jsonl", SAMPLES * 3000)
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--input_dataset_file", str(data), "--output_path", str(out), "--vocab_file_path",
         str(vocab), "--max_length", "64", "--num_workers", "2", *options],
        stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(out.glob(".unfinished-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    assert process.poll() is None, process.stderr.read()
    return process, out


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_interruption_leaves_nothing(tmp_path, vocab_files, kind):
    process, out = start_slow_run(tmp_path, vocab_files["12b"])
    if kind == signal.SIGINT:
        os.killpg(process.pid, kind)                              # as Ctrl-C does: to the workers, too
    else:
        process.send_signal(kind)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "interrupted; nothing was written" in err and "Traceback" not in err
    assert not out.exists() or not list(out.iterdir())


def test_rerun_after_a_kill_is_clean(tmp_path, vocab_files):
    process, out = start_slow_run(tmp_path, vocab_files["12b"])
    workers = children(process.pid)
    process.kill()
    process.communicate(timeout=60)
    assert workers and not [path for path in out.iterdir() if not path.name.startswith(".")]
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)      # they notice that nobody needs them
    code, _ = run(tmp_path, vocab_files["12b"], SAMPLES, name="out")
    assert code == 0
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []


def test_killed_worker_is_an_error(tmp_path, vocab_files):
    process, out = start_slow_run(tmp_path, vocab_files["12b"])
    os.kill(children(process.pid)[-1], signal.SIGKILL)         # the first one only draws
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and "a worker process died (exit code -9" in err and "Traceback" not in err
    assert not out.exists() or not list(out.iterdir())


def test_worker_killed_in_the_middle_of_a_message():
    receiving, sending = multiprocessing.Pipe(duplex=False)
    os.write(sending.fileno(), (100).to_bytes(4, "big") + b"half")       # a message of 100 bytes that never ends
    sending.close()
    process = multiprocessing.get_context("spawn").Process(target=int)
    process.start()
    with pytest.raises(WorkerError, match="a worker process died"):
        _guard(receiving.recv, process)


def children(pid):
    tasks = Path(f"/proc/{pid}/task")
    require(tasks.exists(), "needs /proc to see the worker processes")
    return [int(child) for task in tasks.iterdir() for child in (task / "children").read_text().split()]


def _fail(item):
    if item == 5:
        raise ConfigError("item 5")
    return item * item


def _break(item):
    return 1 // (item - 5)


@pytest.mark.parametrize("workers", [0, 3])
def test_ordered_map(workers):
    assert list(ordered_map(partial(partial, pow, 2), iter(range(50)), workers)) == [2 ** n for n in range(50)]
    results = ordered_map(partial(partial, _fail), iter(range(50)), workers)
    assert [next(results) for _ in range(5)] == [0, 1, 4, 9, 16]
    with pytest.raises(ConfigError, match="item 5"):
        next(results)


def test_fault_in_a_worker_comes_with_its_traceback():
    with pytest.raises(WorkerError, match="ZeroDivisionError"):
        list(ordered_map(partial(partial, _break), iter(range(50)), 2))


def only_there(item):
    if os.getpid() == item["here"]:
        raise AssertionError("called in this process")
    return item["value"] * 2


def only_here(item):
    if os.getpid() != item["here"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return item["value"] * 2


@pytest.mark.parametrize("function, apart", [(only_there, True), (only_here, True), (only_here, False)])
def test_a_call_aside_has_its_result_whatever_happens_to_the_process(function, apart):
    item = {"here": os.getpid(), "value": 3}
    with Aside(time.time, function, apart) as aside:
        aside.start(item)
        assert aside.result(item) == 6
    assert not multiprocessing.active_children()


def test_a_call_aside_that_was_never_started_happens_here():
    with Aside(time.time, only_here) as aside:
        assert aside.result({"here": os.getpid(), "value": 4}) == 8
