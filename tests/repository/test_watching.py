"""Faults of the numbers and what is written about a run: overflow, NaN, spikes of the norm, evaluation, figures."""
import json
import math
import re

import numpy as np
import pytest
from model_fixtures import loss_of
from training_fixtures import ROOT, SEQ, VOCAB, command, read_log, run, run_new, write_records

from research.telechat.spec import flops
from research.telechat.training import report

QUIET = ["--callbacks", "[{type: TelechatTrainingLog}, {type: CheckpointMonitor, prefix: t, save_checkpoint_steps: 1, "
         "keep_checkpoint_max: 99}]"]


def test_flops_of_a_token():
    assert flops.flops_per_token(1000, 2, 8, 16) == 6 * 1000 + 12 * 2 * 8 * 16
    assert flops.flops_per_token(1000, 2, 8, 16, frozen=True) == 4 * 1000 + 12 * 2 * 8 * 16


def test_only_known_chips_have_a_peak():
    assert flops.peak_flops("Ascend910B3") == 313e12
    assert flops.peak_flops("Ascend1234") is None and flops.peak_flops("") is None
    assert flops.peak_flops("Ascend1234", 100) == 100e12


def test_time_left_does_not_count_the_first_step():
    rows = [{"seconds": 60.0}, {"seconds": 2.0}, {"seconds": 2.0}, {"seconds": 9.0}]
    assert report.seconds_left(rows[:1], 1, 10) is None
    assert report.seconds_left(rows, 4, 10) == 12.0


def test_log_survives_a_broken_last_line_and_keeps_strict_json(tmp_path):
    row = report.row_text({"step": 1, "loss": math.nan, "lr": 0.5})
    assert json.loads(row) == {"step": 1, "loss": None, "lr": 0.5}
    (tmp_path / "log").write_text(f'{row}\n{{"step": 2, "loss": 1.0}}\n{{"step": 3}}\n{{"step": 4, "lo')
    assert [each["step"] for each in report.read_rows(tmp_path / "log", 2)] == [1, 2]
    assert report.read_rows(tmp_path / "none", 2) == []


def test_digest_sees_every_change(tmp_path, monkeypatch):
    files = [tmp_path / "a", tmp_path / "b"]
    for path in files:
        path.write_bytes(b"x" * 1000)
    first = report.data_digest(files)
    assert first["whole"] and first == report.data_digest(files[::-1])
    files[1].write_bytes(b"x" * 999 + b"y")
    assert report.data_digest(files)["sha256"] != first["sha256"]
    monkeypatch.setattr(report, "_WHOLE", 10)
    assert not report.data_digest(files)["whole"]


def test_every_fault_of_the_document_has_its_test():
    rows = re.findall(r"^\| .* \| (test_\w+) \|$", (ROOT / "docs/training.md").read_text(encoding="utf-8"), re.M)
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(rows) > 10
    assert [name for name in rows if f"def {name}(" not in tests] == []


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watching")
    rows = np.random.default_rng(0).integers(4, VOCAB, (8, SEQ + 1))
    return write_records(folder / "data.mindrecord", rows), rows


@pytest.mark.slow
def test_overflow_in_float16_skips_the_step_and_recovers(data, tmp_path):
    scale = ("{type: DynamicLossScaleUpdateCell, loss_scale_value: 16777216, scale_factor: 16, scale_window: 1000}")
    run(command(data[0], tmp_path / "out", "--epochs", "3", "--model.model_config.amp_level", "O1",
                "--model.model_config.compute_dtype", "float16", "--runner_wrapper.scale_sense", scale, *QUIET))
    log = read_log(tmp_path / "out")
    skipped = [row["step"] for row in log if row.get("skipped") == "overflow"]
    assert skipped and skipped == list(range(1, len(skipped) + 1)) and len(skipped) < 8
    scales = [row["loss_scale"] for row in log]
    assert scales[len(skipped)] == 16777216 / 16 ** len(skipped)
    assert all(row["loss"] is not None for row in log)
    assert np.mean([row["loss"] for row in log[-4:]]) < np.mean([row["loss"] for row in log[:4]])
    assert json.loads((tmp_path / "out/training_report.json").read_text())["skipped_steps"] == skipped


@pytest.mark.slow
def test_nan_stops_with_step_records_and_last_good_checkpoint(data, tmp_path):
    path, _ = data
    done = run(command(path, tmp_path / "out", "--epochs", "9", "--lr_schedule.learning_rate", "1e36",
                       "--lr_schedule.warmup_ratio", "0.0", *QUIET), code=1)
    line, = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    log = read_log(tmp_path / "out")
    step = log[-1]["step"]
    assert f"error: step {step}: the loss is" in line and log[-1]["loss"] is None
    first = 2 * (step - 1) % 8
    assert f"(records {first}, {first + 1} of the training data" in line
    good = sorted((tmp_path / "out/checkpoint/rank_0").glob("*.ckpt"))
    assert len(good) == step - 1 and str(good[-1]) in line
    assert json.loads((tmp_path / "out/training_report.json").read_text())["ending"].startswith("stopped")


@pytest.mark.slow
def test_spikes_of_the_norm_are_skipped_by_setting(data, tmp_path):
    run(command(data[0], tmp_path / "out", "--epochs", "2", "--use_skip_data_by_global_norm", "True",
                "--monitor_config.global_norm_spike_threshold", "0.5", *QUIET))
    log = read_log(tmp_path / "out")
    assert all(row["skipped"] == "norm" and row["global_norm"] > 0.5 for row in log)
    assert [row["loss"] for row in log[:4]] == [row["loss"] for row in log[4:]]       # nothing was learned


@pytest.mark.slow
def test_evaluation_while_training_and_equal_seeds(data, tmp_path):
    """Perplexity against the loss of the saved weights on the same records; the second run repeats the first."""
    import mindspore as ms

    from research.telechat.telechat import TelechatForCausalLM
    from research.telechat.telechat_config import TelechatConfig
    path, rows = data
    for name, start in (("one", run_new), ("two", run)):
        start(command(path, tmp_path / name, "--epochs", "2", "--do_eval", "True", "--eval_dataset", str(path),
                      "--eval_step_interval", "4", "--train_dataset.data_loader.shuffle", "True", *QUIET))
    one, two = read_log(tmp_path / "one"), read_log(tmp_path / "two")
    keys = ("step", "loss", "lr", "global_norm", "perplexity")
    assert [[row.get(key) for key in keys] for row in one] == [[row.get(key) for key in keys] for row in two]
    assert [row["step"] for row in one if "perplexity" in row] == [4, 8]
    model = TelechatForCausalLM(TelechatConfig(net_name="telechat_12b", amp_level="O0", seq_length=SEQ,
                                               vocab_size=VOCAB, num_layers=2, hidden_size=64, intermediate_size=96,
                                               num_heads=4))
    ms.load_param_into_net(model, ms.load_checkpoint(str(tmp_path / "one/checkpoint/rank_0/t_rank_0-1_4.ckpt")))
    model.set_train(True)
    batches = [ms.Tensor(rows[first:first + 2], ms.int32) for first in range(0, 8, 2)]
    mean = np.mean([loss_of(model, batch, batch) for batch in batches])
    assert one[3]["perplexity"] == pytest.approx(math.exp(mean), rel=1e-4)
    summary = json.loads((tmp_path / "one/training_report.json").read_text())
    assert summary["ending"] == "complete" and summary["seed"] == 0 and summary["data"]["whole"]
    assert summary["recipe"]["model"]["model_config"]["net_name"] == "telechat_12b"
    assert summary["perplexity"].keys() == {"4", "8"}
    assert (tmp_path / "one/training_curve.png").read_bytes().startswith(b"\x89PNG")
