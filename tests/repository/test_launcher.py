"""scripts/msrun_launcher.sh, its checks and its report: with a pretended msrun, and with the real one (slow)."""
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import launcher_check, launcher_report

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = ROOT / "scripts" / "msrun_launcher.sh"

FAKE_MSRUN = """#!/bin/bash
printf '%s\\n' "$@" >args
echo "$PYTHONPATH" >pythonpath
env >environment
for word; do case $word in --log_dir=*) logs=${word#*=} ;; esac; done
[ -z "$FAKE_LOGS" ] || cp "$FAKE_LOGS"/*.log "$logs"
exit ${FAKE_EXIT:-0}
"""


def put_python(path):
    """A program `python` that is this interpreter, with its packages."""
    path.write_text(f"#!/bin/sh\nexec {shlex.quote(sys.executable)} \"$@\"\n")
    path.chmod(0o755)


@pytest.fixture
def place(tmp_path):
    """A working folder with a script to launch and a pretended msrun first on PATH."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "msrun").write_text(FAKE_MSRUN)
    (tmp_path / "bin" / "msrun").chmod(0o755)
    put_python(tmp_path / "bin" / "python")
    (tmp_path / "job.py").write_text("print('hello')\n")
    return tmp_path


def launch(place, *arguments, timeout=60, **env):
    """Run the launcher; the result has msrun's arguments as `args`."""
    result = subprocess.run(["bash", str(LAUNCHER), *arguments], cwd=place, text=True, capture_output=True,
                            timeout=timeout, env={**os.environ, "PATH": f"{place / 'bin'}:{os.environ['PATH']}", **env})
    args, seen = place / "args", place / "environment"
    result.args = args.read_text().splitlines() if args.exists() else None
    result.seen = dict(line.partition("=")[::2] for line in seen.read_text().splitlines()) if seen.exists() else {}
    return result


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return str(sock.getsockname()[1])


def test_defaults_are_those_users_know(place):
    # One argument means port 8118, which something else on this machine may hold: then that is what must be said.
    result = launch(place, "python job.py")
    if result.returncode:
        assert "port 8118 is not free" in result.stderr
        return
    assert set(result.args) == {"--worker_num=8", "--local_worker_num=8", "--master_port=8118", "--join=False",
                                f"--log_dir={place}/output/msrun_log", "--cluster_time_out=7200", "--bind_core=True",
                                "python", "job.py"}
    assert "tail -f" in result.stdout and f"{place}/output/msrun_log/worker_7.log" in result.stdout


def test_form_with_six_arguments_and_quoting(place):
    command = "python job.py --predict_data '<reserve3>生抽 与老抽？<reserve2>' \\\n --name=\"a b\""
    result = launch(place, command, "4", free_port(), "logs", "True", "300")
    assert result.returncode == 0, result.stderr
    assert {"--worker_num=4", "--local_worker_num=4", "--join=True", "--cluster_time_out=300"} <= set(result.args)
    assert result.args[-5:] == ["python", "job.py", "--predict_data", "<reserve3>生抽 与老抽？<reserve2>", "--name=a b"]
    assert (place / "pythonpath").read_text().strip().split(":")[0] == str(ROOT)


def test_form_with_nine_arguments(place):
    result = launch(place, "python job.py", "16", "8", "10.0.0.1", "8118", "1", "logs", "False", "300",
                    MF_LOG_SUFFIX="x")
    assert result.returncode == 0, result.stderr
    assert {"--worker_num=16", "--local_worker_num=8", "--master_addr=10.0.0.1", "--node_rank=1",
            f"--log_dir={place}/logs_x"} <= set(result.args)
    assert "rank 8 to 15" in result.stdout


@pytest.mark.parametrize("command, assigned, given", [
    ("python job.py 'a b'", {}, ["python", "job.py", "a b"]),
    ("python3 -u job.py", {}, ["python3", "-u", "job.py"]),
    ("job.py x", {}, ["job.py", "x"]),
    ("GLOG_v=3 X='a b' python job.py", {"GLOG_v": "3", "X": "a b"}, ["python", "job.py"]),
    ("X=$PWD/y  {python} job.py", {"X": "{place}/y"}, ["{python}", "job.py"]),
    ("{python} -u job.py --name=\"a b\"", {}, ["{python}", "-u", "job.py", "--name=a b"]),
    ("env Y=1 python job.py", {}, ["env", "Y=1", "python", "job.py"]),
])
def test_first_words_of_the_command(place, command, assigned, given):
    """msrun starts `python` by that name only: other programs reach it as arguments of one, variables not at all."""
    def fill(text):
        return text.replace("{python}", str(place / "bin/python")).replace("{place}", str(place))
    result = launch(place, fill(command), "2", free_port(), "logs", "True", "60")
    assert result.returncode == 0, result.stderr
    given = [fill(word) for word in given]
    assert result.args[-len(given):] == given
    before = result.args[-len(given) - 1]
    if given[0] in ("python", "python3", "job.py"):
        assert before.startswith("--")
    else:                                                    # msrun's own way: python, and this as its program
        assert result.args[-len(given) - 3:-len(given) - 1] == ["python", "-c"]
        (place / "job.py").write_text("import sys\nopen('ran', 'w').write(' '.join(sys.argv))\n")
        subprocess.run([sys.executable, *result.args[-len(given) - 2:]], cwd=place, check=True)
        assert (place / "ran").read_text().startswith("job.py")
    assert {name: result.seen.get(name) for name in assigned} == {name: fill(text) for name, text in assigned.items()}


def test_variables_of_the_command_count_for_the_checks(place):
    (place / "recipe.yaml").write_text("context:\n  device_target: Ascend\n")
    command = "python job.py --config recipe.yaml"
    result = launch(place, f"ASCEND_RT_VISIBLE_DEVICES=0,1 {command}", "2", free_port(), "logs", "True", "60")
    assert result.returncode == 0, result.stderr
    result = launch(place, f"ASCEND_RT_VISIBLE_DEVICES=0 {command}", "2", free_port(), "logs", "True", "60")
    assert result.returncode == 1 and "1 are visible" in result.stderr


def test_interpreter_with_a_path_brings_its_msrun(place):
    (place / "other").mkdir()
    for name in ("msrun", "python"):
        (place / "bin" / name).rename(place / "other" / name)
    result = launch(place, f"{place}/other/python job.py", "2", free_port(), "logs", "True", "60")
    assert result.returncode == 0, result.stderr
    assert result.seen["PATH"].startswith(f"{place}/other:")


def test_log_folders(place):
    """Names as MindFormers' launcher has them; both spellings of the variable for Ascend's logs."""
    def variables(**env):
        result = launch(place, "python job.py", "2", free_port(), "logs", "True", "60", **env)
        assert result.returncode == 0, result.stderr
        return result.seen.get("LOG_MF_PATH"), result.seen.get("ASCEND_PROCESS_LOG_PATH")
    assert variables() == (f"{place}/output/log", None)
    assert variables(LOG_MF_PATH="/a/b", PLOG_REDIRECT_TO_OUTPUT="False") == ("/a/b", None)
    assert variables(MF_LOG_SUFFIX="x", PLOG_REDIRECT_TO_OUTPUT="True") == (
        f"{place}/output/log_x", f"{place}/output/plog_x")
    assert variables(PLOG_REDICT_TO_OUTPUT="True") == (f"{place}/output/log", f"{place}/output/plog")


def test_one_worker_and_unbound_cores(place):
    result = launch(place, "python job.py", "1", free_port(), "logs", "True", "60", TELECHAT_BIND_CORE="False")
    assert result.returncode == 0 and "asks for plain python" in result.stdout
    assert "--worker_num=1" in result.args and "--bind_core=True" not in result.args


def test_master_on_the_wrong_machine_is_told(place):
    """msrun starts the scheduler where MASTER_ADDR is, whatever NODE_RANK says."""
    form = ["python job.py", "2", "1", "127.0.0.1", free_port(), "1", "l", "True", "3"]
    second = launch(place, *form)
    assert second.returncode == 0 and "starts a scheduler here too" in second.stderr
    form[3], form[5] = "192.0.2.1", "0"
    assert "starts no scheduler here" in launch(place, *form).stderr
    form[3], form[5] = "192.0.2.1", "1"
    assert launch(place, *form).stderr == ""


@pytest.mark.parametrize("arguments, words", [
    ([], "found 0 arguments"),
    (["python job.py", "2", "8118"], "found 3 arguments"),
    (["python", "job.py", "--config", "x", "4", "5", "6"], "one quoted argument"),
    (["python job.py", "two"], "WORKER_NUM must be a whole number, found 'two'"),
    (["python job.py", "0"], "WORKER_NUM must lie between 1 and"),
    (["python job.py", "08"], "WORKER_NUM must be a whole number"),
    (["python job.py", "2", "80", "l", "True", "3"], "MASTER_PORT must lie between 1024 and 65535, found 80"),
    (["python job.py", "2", "8118", "l", "Maybe", "3"], "JOIN must be True or False, found 'Maybe'"),
    (["python job.py", "2", "8118", "l", "True", "soon"], "CLUSTER_TIME_OUT must be a whole number"),
    (["python job.py", "4", "8", "127.0.0.1", "8118", "0", "l", "False", "3"], "LOCAL_WORKER 8"),
    (["python job.py", "4", "3", "127.0.0.1", "8118", "0", "l", "False", "3"], "no multiple"),
    (["python job.py", "4", "2", "127.0.0.1", "8118", "2", "l", "False", "3"], "NODE_RANK 2 does not exist"),
    (["python nowhere.py", "2"], "script not found: nowhere.py"),
    (["python job.py --config telechat2/finetune_telechat_12b.yaml", "2"], "research/telechat/finetune_telechat_12b.y"),
    (["python job.py --predict_data <_user>hi<_bot>", "2"], "'<' outside of quotes"),
    (["python job.py --name 'open", "2"], "cannot be read"),
    (["", "2"], "it is empty"),
    (["X=1", "2"], "sets variables and starts nothing"),
    (["/no/such/python job.py", "2"], "begins with '/no/such/python'"),
    (["python job.py", "4", "2", "no-such-host.invalid", "8247", "1", "l", "True", "3"],
     "MASTER_ADDR no-such-host.invalid cannot be resolved here"),
])
def test_bad_input(place, arguments, words):
    result = launch(place, *arguments)
    assert result.returncode == 1 and result.args is None
    assert words in result.stderr and "Traceback" not in result.stderr
    faults = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len([line for line in faults if "port 8118" not in line]) == 1   # other jobs of this machine may have that


def test_plan_is_checked_and_the_recipe_named(place):
    """A plan for other cards stops the launch; a recipe below research/ is found as run_mindformer.py finds it."""
    (place / "run_mindformer.py").write_text("print('hello')\n")
    recipe = place / "recipe.yaml"
    recipe.write_text(f"base_config: {ROOT}/research/telechat/finetune_telechat_tiny_cpu.yaml\n")
    command = f"python run_mindformer.py --config {recipe} --use_parallel True"
    result = launch(place, f"{command} --parallel_config.model_parallel 3", "2", free_port(), "logs", "True", "60")
    assert result.returncode == 1 and result.args is None
    assert "there are 2 ranks" in result.stderr or "model_parallel" in result.stderr
    result = launch(place, command, "2", free_port(), "logs", "True", "60")
    assert result.returncode == 0, result.stderr
    assert re.search(r"sha256 [0-9a-f]{12}, the same on every machine", result.stdout)


def test_recipe_below_research_is_found():
    assert launcher_check.check_files(["--config", "telechat/finetune_telechat_52b.yaml"]) == []
    assert launcher_check.check_files(["--config", "telechat/none.yaml"]) != []


def test_port_in_use(place):
    with socket.socket() as sock:
        sock.bind(("", 0))
        sock.listen()
        port = str(sock.getsockname()[1])
        result = launch(place, "python job.py", "2", port, "l", "True", "3")
        assert result.returncode == 1 and f"port {port} is not free" in result.stderr
        other_node = launch(place, "python job.py", "4", "2", "10.0.0.1", port, "1", "l", "False", "3")
        assert other_node.returncode == 0, "only the first machine listens on the port"


def test_devices(monkeypatch, tmp_path):
    base, recipe = tmp_path / "base.yaml", tmp_path / "recipe.yaml"
    base.write_text("context:\n  device_target: 'Ascend'\n")
    recipe.write_text("base_config: base.yaml\n")
    command = ["python", "run_mindformer.py", "--config", str(recipe)]
    monkeypatch.delenv("MS_SIMULATION_LEVEL", raising=False)
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "0,1")
    assert launcher_check.check_devices(command, 2) == []
    assert "need 8 Ascend cards on this machine, 2 are visible" in launcher_check.check_devices(command, 8)[0]
    assert launcher_check.check_devices([*command, "--device_target", "CPU"], 8) == []
    recipe.write_text("base_config: base.yaml\ncontext:\n  device_target: CPU\n")
    assert launcher_check.check_devices(command, 8) == []
    assert launcher_check.device_target(str(ROOT / "research/telechat/finetune_telechat_12b.yaml")) == "Ascend"
    assert launcher_check.device_target(str(ROOT / "research/telechat/finetune_telechat_tiny_cpu.yaml")) == "CPU"


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


def test_failed_job_is_reported(place):
    logs = write_logs(place / "made", LOGS)
    result = launch(place, "python job.py", "2", free_port(), "logs", "True", "3", FAKE_EXIT="1", FAKE_LOGS=str(logs))
    assert result.returncode == 1
    assert "Rank 1 failed first" in result.stdout and "the job failed" in result.stderr.splitlines()[-1]


TWO_RANKS = """
import sys
import numpy as np
import mindspore
from mindspore.communication import get_rank, init
mindspore.set_device("CPU")
init()
if sys.argv[1] == "fail" and get_rank() == 1:
    raise ValueError("rank one has no data")
total = mindspore.ops.AllReduce()(mindspore.Tensor(np.array([get_rank() + 1.0], np.float32)))
open(f"sum_{get_rank()}", "w").write(f"{total.asnumpy()[0]} {sys.argv[2]}")
"""


@pytest.mark.slow
def test_two_real_workers(tmp_path):
    (tmp_path / "bin").mkdir()
    put_python(tmp_path / "bin" / "python")
    msrun = tmp_path / "bin" / "msrun"      # the one of this interpreter, wherever its scripts are
    msrun.write_text(f"#!/bin/sh\nexec {shlex.quote(sys.executable)} -m mindspore.parallel.cluster.run \"$@\"\n")
    msrun.chmod(0o755)
    (tmp_path / "job.py").write_text(TWO_RANKS)
    good = launch(tmp_path, "python job.py run '<_user> 你好'", "2", free_port(), "logs", "True", "120", timeout=300)
    assert good.returncode == 0, good.stdout + good.stderr
    assert [(tmp_path / f"sum_{rank}").read_text() for rank in (0, 1)] == ["3.0 <_user> 你好"] * 2
    bad = launch(tmp_path, "python job.py fail x", "2", free_port(), "logs", "True", "120", timeout=300)
    assert bad.returncode == 1
    assert "Rank 1 failed first" in bad.stdout and "ValueError: rank one has no data" in bad.stdout
