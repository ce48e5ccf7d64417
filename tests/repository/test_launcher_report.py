"""scripts/launcher_report.py and launcher_watch.py: what a failed job has died of, from logs and exit codes."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import launcher_report

ROOT = Path(__file__).resolve().parents[2]

LOGS = {
    # Rank 0 and 2 only notice that rank 1 is gone: rank 1 is the cause, though rank 0 has an earlier, harmless line.
    0: """[WARNING] ME(1,MainProcess):2026-01-02-10:00:00.100.000 [x.py:1] a warning
2026-01-02 10:00:09,000 - mindformers - INFO - step 5
Traceback (most recent call last):
  File "run.py", line 9, in step
RuntimeError: Connection to peer rank 1 is lost
""",
    1: """2026-01-02 10:00:05,000 - mindformers - INFO - step 4
Traceback (most recent call last):
  File "data.py", line 3, in read
KeyError: 'labels'

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "run.py", line 7, in main
    read()
ValueError: the record has no column labels
2026-01-02 10:00:06,000 - mindformers - INFO - leaving
""",
    2: """[ERROR] DISTRIBUTED(3,python):2026-01-02-10:00:08.000.001 [tcp.cc:1] Heartbeat timed out
""",
    10: "2026-01-02 10:00:07,000 - mindformers - INFO - step 5\nerror: recipe x.yaml: no such key\n",
}


def write_logs(folder, ranks):
    folder.mkdir(exist_ok=True)
    for rank in ranks:
        (folder / f"worker_{rank}.log").write_text(LOGS[rank])
    return folder


def test_report_names_the_first_failing_rank(tmp_path):
    text = launcher_report.report(write_logs(tmp_path / "all", LOGS))
    first = text.splitlines()[0]
    assert first.startswith("Rank 1 failed first") and first.endswith("ValueError: the record has no column labels")
    assert "KeyError" in text and "INFO" not in text
    assert "Rank 10 failed first" in launcher_report.report(write_logs(tmp_path / "b", [0, 2, 10]))
    # With nothing but aftermath, the earliest of it.
    assert launcher_report.report(write_logs(tmp_path / "c", [0, 2])).startswith("Rank 0 failed first")


def test_report_without_an_error(tmp_path):
    assert "no worker was started" in launcher_report.report(tmp_path)
    (tmp_path / "worker_0.log").write_text("2026-01-02 10:00:05,000 - mindformers - INFO - step 4\n")
    text = launcher_report.report(tmp_path)
    assert "killed" in text and "step 4" in text
    # Logs of an earlier job do not count.
    assert "no worker was started" in launcher_report.report(tmp_path, since=2e10)


HARMLESS = "[ERROR] DEVICE(1,7f,python):2026-01-02-10:00:01.000.000 [a/b.cc:9] Init] CPU device is not supported\n"
SECOND_SCHEDULER = """2026-01-02 10:00:01,000 - mindformers - INFO - set output path
[ERROR] DISTRIBUTED(5,7f,python):2026-01-02-10:00:02.210.675 [a/meta_server.cc:1] I] Failed to init the tcp server.
[ERROR] DISTRIBUTED(5,7f,python):2026-01-02-10:00:02.210.706 [a/meta_server.cc:7] I] Failed to create the TCP server.
2026-01-02 10:00:02,211 - mindformers - ERROR - Notice: if you are trying to run with a single device, please set ...
Traceback (most recent call last):
  File "run.py", line 9, in init
RuntimeError: Failed to initialize distributed job cluster because some processes in the cluster are not successfully sp
"""


def test_report_reads_the_scheduler_and_knows_harmless_lines(tmp_path):
    """Two launchers on one host: the ranks train to their end, and the second scheduler fails."""
    (tmp_path / "worker_0.log").write_text(HARMLESS + "2026-01-02 10:00:09,000 - mindformers - INFO - step 5\n")
    assert "holds an error" in launcher_report.report(tmp_path).splitlines()[0]
    (tmp_path / "scheduler.log").write_text(SECOND_SCHEDULER)
    text = launcher_report.report(tmp_path)
    assert text.startswith("The scheduler failed first") and "Failed to create the TCP server" in text.splitlines()[0]
    assert "One launcher per machine" in text or "one launcher per machine" in text
    assert "Rank 0" not in text and "CPU device" not in text


def test_report_never_blames_a_rank_that_ended_well(tmp_path):
    write_logs(tmp_path, [0, 1])
    exits = tmp_path / "exits.json"
    exits.write_text('[["1", 0], ["scheduler", 0], ["0", 1]]')       # rank 1 has caught what it logs
    assert launcher_report.report(tmp_path).startswith("Rank 0 failed first")
    exits.write_text('[["0", -9], ["1", -9]]')                       # msrun kills the others
    (tmp_path / "worker_1.log").write_text(LOGS[2])
    text = launcher_report.report(tmp_path)
    assert text.startswith("Rank 0 failed first: it was killed by signal 9") and "worker_0.log" in text
    exits.write_text('[["0", null], ["1", -9]]')                     # msrun was quicker than the look at it
    assert launcher_report.report(tmp_path).splitlines()[0].endswith("Connection to peer rank 1 is lost")
    (tmp_path / "worker_0.log").write_text("2026-01-02 10:00:09,000 - mindformers - INFO - step 5\n")
    assert launcher_report.report(tmp_path).startswith("Rank 0 failed first: it ended without writing an error")
    write_logs(tmp_path, [1])                                        # an error of its own comes before a signal
    assert launcher_report.report(tmp_path).startswith("Rank 1 failed first")
    os.utime(exits, (1, 1))                                          # of an earlier job
    assert launcher_report.read_exits(tmp_path, since=10.0) == {}


def test_report_of_a_job_that_was_never_complete(tmp_path):
    last = "RuntimeError: Failed to initialize distributed job cluster because some processes in the cluster are not " \
           "successfully spawned. You can run\n"
    for name in ("worker_2.log", "worker_3.log", "scheduler.log"):
        (tmp_path / name).write_text(f"Traceback (most recent call last):\n  File x\n{last}")
    text = launcher_report.report(tmp_path, workers=8)
    assert "No rank failed" in text and "Of 8, rank 2-3 started here; look for rank 0-1, 4-7" in text
    assert "\n" not in text


LOST = """[ERROR] DISTRIBUTED(5,7f,python):2026-01-02-10:00:30.357.852 [a/meta_server.cc:5] U] The node: 1 is timed out.
Traceback (most recent call last):
  File "run.py", line 9, in init
RuntimeError: The total number of timed out node is 1. Timed out node list is: 1, worker 1 is the first one timed out.
"""


KERNEL = """2026-01-02 10:00:09,000 - mindformers - INFO - step 5
Traceback (most recent call last):
  File "api.py", line 8, in run
RuntimeError:{space}
----------------------------------------------------
- Kernel error:
----------------------------------------------------
Launch kernel failed: Default/network-Net/{operator}-op0
"""


@pytest.mark.parametrize(("operator", "blamed"), [("AllReduce", "Rank 1 failed first, on another machine"),
                                                  ("MatMul", "Rank 0 failed first")])
def test_a_collective_that_fails_is_not_the_cause(tmp_path, operator, blamed):
    """MindSpore's exception has no message of its own; what failed stands below it."""
    (tmp_path / "worker_0.log").write_text(KERNEL.format(operator=operator, space=" "))
    (tmp_path / "scheduler.log").write_text(LOST)
    (tmp_path / "exits.json").write_text('[["scheduler", 1], ["0", -15]]')
    text = launcher_report.report(tmp_path, workers=2)
    assert text.startswith(blamed) and ("Launch kernel failed" in text) == (operator == "MatMul")


def test_report_names_the_rank_that_is_lost(tmp_path):
    """Of two machines, the other one dies: MindSpore ends the worker here with signal 15."""
    (tmp_path / "worker_0.log").write_text("2026-01-02 10:00:09,000 - mindformers - INFO - step 5\n")
    (tmp_path / "scheduler.log").write_text(LOST)
    (tmp_path / "exits.json").write_text('[["0", -15], ["scheduler", 1]]')
    text = launcher_report.report(tmp_path, workers=2)
    assert text.startswith("Rank 1 failed first, on another machine") and "scheduler.log, line 1" in text
    (tmp_path / "worker_1.log").write_text("2026-01-02 10:00:09,000 - mindformers - INFO - step 5\n")
    assert launcher_report.report(tmp_path, workers=2).startswith("Rank 1 failed first: the scheduler has lost it, and")
    other = write_logs(tmp_path / "other", [2])                      # the machine without the scheduler
    assert launcher_report.report(other, workers=3).startswith("No process of this machine (rank 2) failed by itself")


def test_how_workers_ended_is_noted(tmp_path):
    """launcher_watch.py on a stand-in for msrun, whose first worker to end is killed."""
    program = """
import os, subprocess, sys, time
def start(role, rank, code):
    return subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "MS_ROLE": role, "RANK_ID": rank})
children = [start("MS_SCHED", "0", "import time; time.sleep(3.5)"),
            start("MS_WORKER", "4", "import time; time.sleep(2.5); raise SystemExit(3)"),
            start("MS_WORKER", "5", "import os, time; time.sleep(1.5); os.kill(os.getpid(), 9)")]
for _ in range(5):
    time.sleep(1)
    [child.poll() for child in children]
"""
    msrun = subprocess.Popen([sys.executable, "-c", program])
    watcher = [sys.executable, str(ROOT / "scripts/launcher_watch.py"), str(msrun.pid), str(tmp_path), "--workers", "2"]
    subprocess.run(watcher, check=True, timeout=60)
    msrun.wait()
    exits = launcher_report.read_exits(tmp_path)
    assert list(exits) == [5, 4, launcher_report.SCHEDULER]
    assert exits[5] in (-9, None) and exits[4] in (3, None) and exits[launcher_report.SCHEDULER] in (0, None)
    assert list(exits.values()) != [None] * 3
