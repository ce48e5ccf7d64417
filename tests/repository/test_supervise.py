"""Workers that die or hang: the job ends, the rank is named, restarts go on. With stand-ins, and with real training."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from training_fixtures import DROPOUT, ROOT, SEQ, VOCAB, command, read_log, run_two, write_records

SUPERVISE = [sys.executable, str(ROOT / "scripts" / "supervise.py")]
# A stand-in for msrun: two workers with logs; what they do is in the arguments, by rank.
STANDIN = """
import os, subprocess, sys, time
folder, *programs = sys.argv[1:]
children = [subprocess.Popen([sys.executable, "-u", "-c", program], stdout=open(f"{folder}/worker_{rank}.log", "a"),
                             env={**os.environ, "MS_ROLE": "MS_WORKER", "RANK_ID": str(rank)})
            for rank, program in enumerate(programs)]
while all(child.poll() is None for child in children) or not any(child.poll() for child in children):
    if all(child.poll() == 0 for child in children):
        sys.exit(0)
    time.sleep(0.5)
for child in children:                 # as msrun does: one failed, so end the others
    child.kill()
sys.exit(1)
"""
WORK = "import time\nprint('working', flush=True)\ntime.sleep(%s)"
BUSY = "import time\nfor _ in range(200): print('working', flush=True); time.sleep(0.1)"


def supervise(folder, programs, *options):
    return subprocess.run([*SUPERVISE, "--log_dir", str(folder), *options, "--", sys.executable, "-c", STANDIN,
                           str(folder), *programs], text=True, capture_output=True, check=False, timeout=120)


def alive(marker):
    """Processes whose command line holds `marker`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if marker in path.read_bytes().decode(errors="replace") and int(path.parent.name) != os.getpid():
                found.append(path.parent.name)
        except OSError:
            continue
    return found


def test_job_that_ends_well(tmp_path):
    done = supervise(tmp_path, [WORK % 0, WORK % 0])
    assert done.returncode == 0 and done.stderr == ""


def test_dead_rank_is_named_and_the_others_are_ended(tmp_path):
    dies = "import os, time\nprint('about to die', flush=True)\ntime.sleep(2)\nos.kill(os.getpid(), 9)"
    marker = f"# {tmp_path}"
    done = supervise(tmp_path, [f"{BUSY} {marker}", f"{dies} {marker}"])
    assert done.returncode == 1
    assert "rank 1 died" in done.stderr and "about to die" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: the job failed")
    time.sleep(0.5)
    assert not alive(marker)


def test_stopped_and_silent_ranks_are_named(tmp_path):
    stops = "import os, signal, time\nprint('stopping', flush=True)\nos.kill(os.getpid(), signal.SIGSTOP)"
    done = supervise(tmp_path, [WORK % 60, stops], "--hang_timeout", "3")
    assert done.returncode == 1 and "no worker has written for 3 s; rank 1 is stopped" in done.stderr
    later = "import time\ntime.sleep(1.5)\nprint('last', flush=True)\ntime.sleep(60)"
    done = supervise(tmp_path, [later, WORK % 60], "--hang_timeout", "3")
    assert done.returncode == 1 and "rank 1 was the first to fall silent" in done.stderr


def test_a_stopped_rank_that_the_others_gave_up_waiting_for_is_named(tmp_path):
    stops = "import os, signal, time\nprint('stopping', flush=True)\nos.kill(os.getpid(), signal.SIGSTOP)"
    gives_up = "import sys, time\ntime.sleep(3)\nsys.exit('no answer')"
    done = supervise(tmp_path, [gives_up, stops])
    assert done.returncode == 1 and "rank 1 is stopped, and the others failed waiting for it" in done.stderr
    assert "stopping" in done.stderr


def test_ranks_may_end_at_different_times(tmp_path):
    done = supervise(tmp_path, [WORK % 3, WORK % 0])
    assert done.returncode == 0 and done.stderr == ""
    late = "import sys, time\nprint('late fault', flush=True)\ntime.sleep(2)\nsys.exit(5)"
    done = supervise(tmp_path, [late, WORK % 0])
    assert done.returncode == 1 and "rank 0 died with exit code 5" in done.stderr and "late fault" in done.stderr


def test_restarts_are_counted(tmp_path):
    tried = str(tmp_path / "tried")
    once = f"import os, sys\nn = os.path.exists({tried!r})\nopen({tried!r}, 'w')\nsys.exit(0 if n else 3)"
    done = supervise(tmp_path, [once, "# --resume_training True"], "--max_restarts", "2")
    assert done.returncode == 0 and done.stderr.count("starting again (2 restarts left)") == 1
    done = supervise(tmp_path, ["import sys\nsys.exit(3)", "# --resume_training True"], "--max_restarts", "1")
    assert done.returncode == 1 and "the job failed 2 times" in done.stderr


def test_mistakes_on_the_command_line(tmp_path):
    for options, words in ((["--max_restarts", "1"], "--resume_training"), (["--hang_timeout", "0"], "hang_timeout")):
        done = supervise(tmp_path, ["", ""], *options)
        assert done.returncode == 2 and words in done.stderr
    done = subprocess.run([*SUPERVISE, "--", "/no/such/program"], text=True, capture_output=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: /no/such/program cannot be started")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    return write_records(folder / "data.mindrecord", np.random.default_rng(0).integers(4, VOCAB, (8, SEQ + 1)))


def two_workers(data, output, kill, *options, **env):
    """Supervised training with two processes; `kill`: arguments of kill_driver.py, or none."""
    callbacks = "[{type: TelechatTrainingLog}, {type: CheckpointMonitor, prefix: t, save_checkpoint_steps: 2}]"
    arguments = command(data, output, *DROPOUT, "--batch_size", "1", "--use_parallel", "True", "--epochs", "4",
                        "--train_dataset.data_loader.shuffle", "True", "--resume_training", "True", "--callbacks",
                        callbacks)
    logs = f"{output}.logs"
    return run_two([*kill, *arguments], logs, "tests/support/kill_driver.py" if kill else "run_mindformer.py",
                   [*SUPERVISE, "--log_dir", logs, *options, "--"], **env)


@pytest.mark.slow
@pytest.mark.long
def test_killed_worker_restarts_resume_exactly(data, tmp_path):
    assert two_workers(data, tmp_path / "unbroken", []).returncode == 0
    # Every start kills rank 1 at its 11th step; the second one, from step 11 on, has 6 steps left.
    done = two_workers(data, tmp_path / "killed", ["step", "11"], "--max_restarts", "2", KILL_RANK="1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stderr.count("supervise: rank 1 died") == 1 and done.stderr.count("starting again") == 1
    keys = ("step", "epoch", "loss", "lr", "global_norm")
    one, two = ([[row[key] for key in keys] for row in read_log(tmp_path / name)] for name in ("unbroken", "killed"))
    assert len(one) == 16 and one == two


def test_interrupt_ends_the_job(tmp_path):
    marker = f"# {tmp_path}"
    process = subprocess.Popen([*SUPERVISE, "--log_dir", str(tmp_path), "--", sys.executable, "-c", STANDIN,
                                str(tmp_path), f"{BUSY} {marker}", f"{BUSY} {marker}"], stderr=subprocess.PIPE,
                               text=True)
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130 and "the job is ended" in error
    time.sleep(0.5)
    assert not alive(marker)
