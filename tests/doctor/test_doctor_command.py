"""telechat doctor on the CPU: real kernels and a small model, its table and file, several processes, a training."""
import json
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import prepared
import pytest
from doctor_fixtures import NumpyDevice

from research.telechat.commands import doctor
from research.telechat.common.errors import OverwriteError
from research.telechat.doctor import checks as checks_module
from research.telechat.doctor import model_checks, report
from research.telechat.doctor.checks import Finding, examine_all
from research.telechat.doctor.model_checks import PLAIN, gradient_gap, job_of

ROOT = Path(__file__).resolve().parents[2]
SIZES = model_checks.Sizes(hidden=64, inner=96, vocabulary=64, seq=12)
FAMILY = "grouped heads"


@pytest.fixture(scope="module")
def hardware():
    from research.telechat.doctor.hardware import Hardware
    return Hardware()


@pytest.fixture(scope="module")
def computed(hardware):
    """What the CPU computes for one architecture."""
    return hardware.model(job_of(FAMILY, SIZES)._replace(keys=PLAIN.keys))


def verdicts(run):
    device = NumpyDevice()
    device.model = lambda job: run
    rows = [check for check in model_checks.checks(False, SIZES) if FAMILY in check.name]
    return {finding.name.rsplit(": ", 1)[1] for finding in examine_all(rows, device) if finding.verdict == "wrong"}


def test_the_real_model_passes_and_each_fault_fails_one_check(computed):
    assert verdicts(computed) == set()
    assert verdicts(computed._replace(logits=computed.logits * 1.01)) == {"logits"}
    assert verdicts(computed._replace(loss=computed.loss * 1.001)) == {"loss"}
    other = [*computed.tokens[:-1], (computed.tokens[-1] + 1) % SIZES.vocabulary]
    assert verdicts(computed._replace(tokens=other)) == {"greedy tokens"}
    assert verdicts(computed._replace(tokens=other[:-1])) == {"greedy tokens"}


def test_each_gradient_counts(computed):
    """Of every parameter: too large, with noise, or missing."""
    job = job_of(FAMILY, SIZES)
    assert gradient_gap(job, computed.gradients)[0] < PLAIN.gradients
    rng = np.random.default_rng(0)
    names = ("model.layers.1.attention.wk_v.weight", "model.tok_embeddings.embedding_weight", "model.norm_out.weight")
    for name in names:
        gradient = computed.gradients[name]
        noise = rng.normal(size=gradient.shape) * np.sqrt(np.mean(np.square(gradient)))
        for spoiled in (1.02 * gradient, gradient + 0.2 * noise, gradient * np.nan):
            gap, found = gradient_gap(job, {**computed.gradients, name: spoiled})
            assert gap > PLAIN.gradients and found == name
    assert verdicts(computed._replace(gradients={})) == {"gradients"}


def test_an_error_of_a_model_fails_its_checks_and_is_met_once():
    calls = []

    def fail(job):
        calls.append(job)
        raise RuntimeError("out of memory")
    device = NumpyDevice()
    device.model = fail
    rows = [check for check in model_checks.checks(False, SIZES) if FAMILY in check.name]
    assert [finding.found for finding in examine_all(rows, device)] == ["RuntimeError: out of memory"] * 4
    assert len(calls) == 1


def test_a_file_to_attach_to_an_issue(tmp_path, capsys, monkeypatch):
    """Real kernels of the CPU; the second run replaces the file of the first, and no other one."""
    file = tmp_path / "doctor.json"
    words = ["--only", "RMS norm", "band", "--json", str(file)]
    assert doctor.main(words) == 0
    printed = capsys.readouterr()
    assert re.search(r"^ok +RMS norm, epsilon 1e-5 \(float32\) +result and gradients within", printed.out, re.M)
    assert "[1/3] RMS norm" in printed.err and "2 ok, 1 skipped" in printed.out
    found = json.loads(file.read_text())
    assert found["complete"] and found["device"] == "CPU" and found["versions"]["mindspore"]
    assert [one["verdict"] for one in found["findings"]] == ["ok", "ok", "skipped"]
    monkeypatch.setitem(checks_module.LIMITS, "float32", 0.0)             # nothing is as good as that
    assert doctor.main(words) == 1
    assert "is wrong: do not use model_config.layernorm_compute_type: float32" in capsys.readouterr().out
    assert json.loads(file.read_text())["findings"][0]["verdict"] == "wrong"
    file.write_text("{}")
    assert doctor.main(words) == 1 and "--overwrite" in capsys.readouterr().err
    assert file.read_text() == "{}"


def test_list_and_mistakes(tmp_path, capsys):
    assert doctor.main(["--list"]) == 0
    names = capsys.readouterr().out.splitlines()
    assert "attention, documents back to back (float32)" in names and "plan, data parallel" in names
    assert doctor.main(["--only", "no such check"]) == 1 and "telechat doctor --list" in capsys.readouterr().err
    assert doctor.main(["--json", str(tmp_path)]) == 1 and "is a folder" in capsys.readouterr().err
    assert doctor.main(["--timeout", "0"]) == 1 and "--timeout: expected seconds" in capsys.readouterr().err


def test_foreign_files_are_refused_and_own_ones_are_not(tmp_path):
    report.check_target(tmp_path / "new.json", False)
    (tmp_path / "other.json").write_text('{"form": 1}')
    with pytest.raises(OverwriteError, match="--overwrite"):
        report.check_target(tmp_path / "other.json", False)
    report.check_target(tmp_path / "other.json", True)
    finding = Finding("check", "1", "2", "wrong", "key: True", 0.1)
    report.save(tmp_path / "own.json", report.as_json([finding], NumpyDevice(), True))
    report.check_target(tmp_path / "own.json", False)


HANGS = """
import contextlib, io, sys, time
from research.telechat.commands import doctor
from research.telechat.doctor.checks import Check, Outcome, examine_all
sys.path.insert(0, "tests/support")
from doctor_fixtures import NumpyDevice
args = doctor.build_parser().parse_args(["--timeout", "0.5", "--json", sys.argv[1]])
def slow(_):
    with contextlib.redirect_stdout(io.StringIO()):          # as checks do around the Trainer
        time.sleep(60)
checks = [Check("quick", lambda _: Outcome("1", "1", True), "quick: True"), Check("slow", slow, "slow: True")]
findings = []
watch = doctor.Watch(args.timeout, findings, args, NumpyDevice())
examine_all(checks, NumpyDevice(), watch.progress, findings)
"""


def test_a_check_that_hangs_ends_the_command_with_what_is_known(tmp_path):
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", HANGS, str(tmp_path / "hung.json")], cwd=ROOT, text=True,
                          capture_output=True, check=False, timeout=60)
    assert done.returncode == 1 and time.monotonic() - began < 50
    assert "slow is wrong: do not use slow: True" in done.stdout
    found = json.loads((tmp_path / "hung.json").read_text())
    assert not found["complete"] and [one["verdict"] for one in found["findings"]] == ["ok", "wrong"]
    assert found["findings"][1]["found"] == "none within 0.5 s"


@pytest.mark.slow
def test_a_training_overflows_resumes_and_its_checkpoint_is_cut(tmp_path):
    """Through the Trainer, on the CPU."""
    done = prepared.run([ROOT / "scripts/doctor.py", "--only", "training", "checkpoint"], cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "3 ok" in done.stdout and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_processes_under_the_launcher(tmp_path):
    """Collectives of the CPU, and data parallelism against one process."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    command = f"{sys.executable} {ROOT}/scripts/doctor.py --only collective plan --json {tmp_path}/doctor.json"
    done = subprocess.run(["bash", str(ROOT / "scripts/msrun_launcher.sh"), command, "2", str(port),
                           str(tmp_path / "logs"), "True", "300"], cwd=tmp_path, text=True, capture_output=True,
                          check=False, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "doctor.json").read_text())
    verdicts = {one["name"]: one["verdict"] for one in found["findings"]}
    assert found["ranks"] == 2 and verdicts["plan, data parallel"] == "ok"
    assert verdicts["collective, all-reduce, sum (float32)"] == "ok"
    assert verdicts["collective, all-to-all (float32)"] == "skipped"
