"""scripts/msrun_launcher.sh and its checks: with a pretended msrun, and with the real one (slow)."""
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import prepared
import pytest

from scripts import launcher_check

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


# One worker, which ends when SIGTERM asks it to.
SERVING_MSRUN = """#!/bin/bash
for word; do case $word in --master_port=*) port=${word#*=} ;; esac; done
MS_SCHED_PORT=$port MS_ROLE=MS_WORKER RANK_ID=0 bash -c '
    trap "echo >drained; exit 0" TERM
    echo >up
    while :; do sleep 0.05; done' &
wait $!
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


def test_ranks_wait_for_each_other_longer_than_hccl_does(place):
    result = launch(place, "python job.py", "2", free_port(), "logs", "True", "60")
    assert 120 < int(result.seen["HCCL_CONNECT_TIMEOUT"]) <= 7200
    result = launch(place, "python job.py", "2", free_port(), "logs", "True", "60", HCCL_CONNECT_TIMEOUT="300")
    assert result.seen["HCCL_CONNECT_TIMEOUT"] == "300"


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
    (["python job.py", "4", "3", "127.0.0.1", "8118", "0", "l", "False", "3"], "not a multiple"),
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


def test_a_server_may_finish_its_answers(place):
    (place / "bin" / "msrun").write_text(SERVING_MSRUN)
    (place / "serve.py").write_text("")
    process = subprocess.Popen(["bash", str(LAUNCHER), "serve.py --port 0", "1", free_port(), "logs", "True", "60"],
                               cwd=place, stdout=subprocess.PIPE, text=True,
                               env={**os.environ, "PATH": f"{place / 'bin'}:{os.environ['PATH']}"})
    until = time.monotonic() + 300
    while not (place / "up").exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and (place / "drained").exists(), output
    assert "finishes the answers under way" in output


def test_failed_job_is_reported(place):
    logs = place / "made"
    logs.mkdir()
    (logs / "worker_0.log").write_text("2026-01-02 10:00:05,000 - mindformers - INFO - step 4\n")
    (logs / "worker_1.log").write_text("Traceback (most recent call last):\n  File x\nKeyError: 'labels'\n")
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
    prepared.put_python(tmp_path / "bin" / "python")             # MindSpore is imported already
    bad = launch(tmp_path, "python job.py fail x", "2", free_port(), "logs", "True", "120", timeout=300)
    assert bad.returncode == 1
    assert "Rank 1 failed first" in bad.stdout and "ValueError: rank one has no data" in bad.stdout
