"""The launcher's form for several machines, on two machines in network namespaces: one worker each trains for real.

A machine that comes late, one that never comes, and one that dies. Needs root and iproute2; with CI=true they must be
there.
"""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from machines import missing, two_machines
from training_fixtures import ROOT, SEQ, VOCAB, command, read_log, write_records

pytestmark = pytest.mark.slow
MASTER, PORT = "10.99.7.1", "8118"
JOIN_ONLY = "import mindspore\nmindspore.set_device('CPU')\nmindspore.communication.init()\n"


@pytest.fixture(scope="module", autouse=True)
def namespaces():
    why = missing()
    if why and os.environ.get("CI") == "true":
        pytest.fail(f"two machines cannot be tried: {why}")
    if why:
        pytest.skip(f"two machines cannot be tried: {why}")


class Launch:
    """A launcher that runs. Its output goes to `folder`/`name`.txt, its logs to `folder`/`name`."""

    def __init__(self, folder, name, program, form, machine=None, **env):
        self.text, self.logs = folder / f"{name}.txt", folder / name
        inside = ["ip", "netns", "exec", machine] if machine else []
        form = [str(self.logs) if word == "LOGS" else word for word in form]
        with self.text.open("w") as file:
            self.process = subprocess.Popen(
                [*inside, "bash", str(ROOT / "scripts/msrun_launcher.sh"), program, *form], cwd=ROOT, stdout=file,
                stderr=subprocess.STDOUT, env={**os.environ, "GLOG_v": "3", "LOG_MF_PATH": str(folder / "log"),
                                               "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **env})

    def wait(self, seconds=300):
        """(exit code, output)"""
        code = self.process.wait(timeout=seconds)
        return code, self.text.read_text()


def node(number, time_out, workers=2):
    """The nine-argument form, without COMMAND."""
    return [str(workers), "1", MASTER, PORT, str(number), "LOGS", "True", str(time_out)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("machines")
    return write_records(folder / "data.mindrecord", np.random.default_rng(0).integers(4, VOCAB, (4, SEQ + 1)))


def training(data, output, *driver):
    """A command that trains for two steps with two workers."""
    words = ["python", *(driver or (str(ROOT / "run_mindformer.py"),)),
             *command(data, output, "--batch_size", "1", "--use_parallel", "True", "--epochs", "1", "--callbacks")]
    return " ".join(words) + " '[{type: TelechatTrainingLog}]'"


def test_two_machines_train_as_one_does_though_one_comes_late(data, tmp_path):
    with two_machines("a") as names:
        first = Launch(tmp_path, "first", training(data, tmp_path / "two"), node(0, 240), names[0])
        one = Launch(tmp_path, "one", training(data, tmp_path / "one"), ["2", PORT, "LOGS", "True", "240"],
                     names[1])                                       # alone on the other one
        assert one.wait()[0] == 0, one.text.read_text()[-3000:]
        assert first.process.poll() is None                          # all this time it has waited for the other one
        second = Launch(tmp_path, "second", training(data, tmp_path / "other"), node(1, 240), names[1])
        for launch in (second, first):
            assert launch.wait()[0] == 0, launch.text.read_text()[-3000:]
            assert "all workers ended well" in launch.text.read_text()
    assert (first.logs / "scheduler.log").exists() and not (second.logs / "scheduler.log").exists()
    assert [path.name for path in second.logs.glob("worker_*.log")] == ["worker_1.log"]
    kinds = ("step", "loss", "global_norm")
    logs = [[[row[kind] for kind in kinds] for row in read_log(tmp_path / name)] for name in ("one", "two")]
    assert len(logs[0]) == 2 and logs[0] == logs[1]


def test_a_machine_that_never_comes(tmp_path):
    """Whichever is missing: the one that came waits CLUSTER_TIME_OUT, and says what it has waited for."""
    (tmp_path / "job.py").write_text(JOIN_ONLY)
    program = f"python {tmp_path}/job.py"
    with two_machines("b") as alone, two_machines("c") as other:
        launches = [Launch(tmp_path, "first", program, node(0, 5), alone[0]),
                    Launch(tmp_path, "second", program, node(1, 5), other[1])]
        started = time.monotonic()
        for number, launch in enumerate(launches):
            code, text = launch.wait(240)
            assert code == 1, text
            lines = [line for line in text.splitlines() if "not all workers came within CLUSTER_TIME_OUT" in line]
            assert len(lines) == 1 and f"Of 2, rank {number} started here; look for rank {1 - number}" in lines[0]
        assert time.monotonic() - started < 240


def test_a_machine_that_dies(data, tmp_path):
    """Its worker is killed at the second step: both launchers end, and each names the rank that died."""
    driver = (str(ROOT / "tests/support/kill_driver.py"), "step", "2")
    with two_machines("d") as names:
        launches = [Launch(tmp_path, f"machine{number}", training(data, tmp_path / f"out{number}", *driver),
                           node(number, 240), names[number], KILL_RANK="1", MS_NODE_TIMEOUT="10")
                    for number in (0, 1)]
        code, text = launches[1].wait()
        assert code == 1 and "Rank 1 failed first: it " in text, text[-3000:]       # was killed, and wrote no error
        code, text = launches[0].wait()
        assert code == 1, text[-3000:]
        assert json.loads((launches[0].logs / "exits.json").read_text())
        assert "Rank 1 failed first, on another machine" in text, text[-3000:]
