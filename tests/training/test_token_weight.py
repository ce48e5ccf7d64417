"""Every token of a step weighs the same, in however many parts the step is computed; so does every token of a set."""
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import prepared
import pytest
from mindformers.tools.register import MindFormerConfig
from training_fixtures import RECIPE, SEQ, SIZES, VOCAB, read_log, run, write_records
from weight_driver import take_steps

from research.telechat.common.errors import ConfigError
from research.telechat.model.loss import unit
from research.telechat.run import preflight
from research.telechat.run.batches import pad_evaluation, sequences_per_step, settle_batches, steps_per_epoch

ROOT = Path(__file__).resolve().parents[2]


def assert_same(found, expected):
    """Losses, norms and moments to 1e-6, weights to 1e-5; second moments by their roots, which are gradients, too."""
    assert sorted(found) == sorted(expected)
    for name, right in expected.items():
        value, limit = found[name], 1e-6 if re.match(r"(loss|norm) |adam_", name) else 1e-5
        if name.startswith("adam_v"):
            value, right = np.sqrt(value), np.sqrt(right)
        assert np.linalg.norm(value - right) <= limit * np.linalg.norm(right), name


@pytest.fixture(scope="module")
def whole():
    """One process, the whole batch at once."""
    return take_steps()


@pytest.mark.slow
@pytest.mark.parametrize("parts", [{"interleave": 2}, {"pipelined": 2}, {"accumulation_steps": 2}],
                         ids=["interleaved", "pipelined", "accumulated"])
def test_parts_of_a_step_are_the_step(whole, parts):
    assert_same(take_steps(**parts), whole)


@pytest.mark.slow
def test_data_parallel_ranks_are_one(whole, tmp_path):
    """Two ranks, with and without accumulation, have loss, norm, moments and weights of one process."""
    port = str(20000 + os.getpid() % 20000)
    done = subprocess.run(
        ["msrun", "--worker_num", "2", "--local_worker_num", "2", "--join", "True",
         "--master_port", port, "--log_dir", str(tmp_path / "log"), str(ROOT / "tests/support/weight_driver.py"),
         str(tmp_path)], cwd=tmp_path, text=True, capture_output=True, check=False, timeout=600,
        env=prepared.with_programs())
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for rank in range(2):
        for name in ("plain", "accumulated"):
            with np.load(tmp_path / f"rank_{rank}" / f"{name}.npz") as found:
                assert_same(dict(found), whole)


@pytest.mark.slow
def test_no_token_that_counts_is_no_loss(whole):
    """A whole batch of questions: nothing to learn, and no NaN."""
    assert whole["loss of nothing"] == whole["norm of nothing"] == 0 and whole["finite"]


def test_sums_are_in_powers_of_two():
    assert [unit(tokens) for tokens in (1, 2, 3, 1024, 1025)] == [1.0, 2.0, 4.0, 1024.0, 2048.0]


def write_uneven(path, rows):
    """Four records in which 1, 31, 3 and 32 tokens count."""
    labels = rows.copy()
    labels[0, :31], labels[1, :2], labels[2, 4:] = -100, -100, -100
    return write_records(path, rows, labels)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """(folder, data set) of records with very unequal numbers of answer tokens."""
    folder = tmp_path_factory.mktemp("uneven")
    rows = np.random.default_rng(0).integers(4, VOCAB, (4, SEQ + 1))
    return folder, write_uneven(folder / "data.mindrecord", rows)


def train(data, output, *more):
    return run(["--config", RECIPE, "--register_path", "research/telechat", "--train_dataset", str(data),
                "--output_dir", str(output), *SIZES, "--lr_schedule.warmup_ratio", "0.0", *more])


@pytest.mark.slow
def test_accumulation_through_the_command_line_and_resumption(uneven):
    """The log has the loss of the whole step, MFLossMonitor the same, and a resumed run goes on to its end."""
    folder, data = uneven
    saving = ["--callbacks", "[{type: MFLossMonitor}, {type: TelechatTrainingLog}, {type: CheckpointMonitor, "
              "prefix: t, save_checkpoint_steps: 2, integrated_save: false, async_save: false}]"]
    train(data, folder / "whole", "--epochs", "2", "--batch_size", "4")
    parts = ["--batch_size", "2", "--gradient_accumulation_steps", "2", "--micro_batch_interleave_num", "2",
             "--calculate_per_token_loss", "True", *saving]
    done = train(data, folder / "parts", "--epochs", "2", *parts)
    expected, found = read_log(folder / "whole"), read_log(folder / "parts")
    assert [row["step"] for row in found] == [row["step"] for row in expected] == [1, 2]
    for row, right in zip(found, expected):
        assert row["loss"] == pytest.approx(right["loss"], rel=2e-6)
        assert row["global_norm"] == pytest.approx(right["global_norm"], rel=2e-6)
        assert row["tokens_per_second_per_card"] == pytest.approx(4 * SEQ / row["seconds"], rel=1e-2, abs=0.06)
    shown = [float(loss) for loss in re.findall(r"loss:\[([0-9.]+)/", done.stdout + done.stderr)]
    assert shown and shown[0] == pytest.approx(expected[0]["loss"], abs=1e-5)
    train(data, folder / "parts", "--epochs", "4", *parts, "--resume_training", "True")
    assert [row["step"] for row in read_log(folder / "parts")] == [1, 2, 3, 4]


@pytest.mark.slow
def test_perplexity_does_not_depend_on_the_batches():
    """By MindFormers' interface, against arithmetic in NumPy."""
    import mindspore as ms

    from research.telechat.training.perplexity import PerplexityMetric
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(4, 9, 11)).astype(np.float32)
    labels = rng.integers(0, 11, (4, 9)).astype(np.int32)
    mask = np.ones((4, 9), np.float32)
    mask[0, :8], mask[2], mask[3, 5:] = 0, 0, 0
    log_softmax = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    losses = -np.take_along_axis(log_softmax[:, :-1], labels[:, 1:, None], -1)[..., 0] * mask[:, 1:]
    expected = losses.sum() / mask[:, 1:].sum()
    metric = PerplexityMetric()
    for size in (1, 2, 3, 4):
        metric.clear()
        for start in range(0, 4, size):
            metric.update(*(ms.Tensor(each[start:start + size]) for each in (logits, labels, mask)))
        assert metric.eval() == pytest.approx({"loss": expected, "PPL": np.exp(expected)}, rel=1e-6)


# ---- what a recipe asks for

def recipe(device="CPU", plan=None, **keys):
    keys.setdefault("runner_config", {})
    keys["runner_config"] = {"batch_size": 2, **keys["runner_config"]}
    return MindFormerConfig(**{
        "run_mode": "finetune", "context": {"device_target": device}, "runner_wrapper": {"type": "MFTrainOneStepCell"},
        "use_parallel": plan is not None, "parallel": {"parallel_mode": 1}, "parallel_config": plan or {}, **keys})


def test_accumulation_on_a_cpu():
    config = recipe(runner_config={"gradient_accumulation_steps": 3})
    settle_batches(config)
    assert config.runner_config == {"batch_size": 6, "gradient_accumulation_steps": 1}
    assert config.runner_wrapper == {"type": "TelechatTrainOneStepCell", "calculate_per_token_loss": True,
                                     "accumulation_steps": 3}
    assert sequences_per_step(config) == 6


def test_accumulation_in_a_pipeline_is_more_micro_batches():
    config = recipe("Ascend", {"data_parallel": 2, "pipeline_stage": 2, "micro_batch_num": 4},
                    runner_config={"gradient_accumulation_steps": 3})
    settle_batches(config)
    assert config.parallel_config.micro_batch_num == 12 and config.runner_config.gradient_accumulation_steps == 1
    assert sequences_per_step(config) == 2 * 2 * 12


def test_accumulation_by_a_plan_is_mindformers():
    config = recipe("Ascend", {"data_parallel": 2}, runner_config={"gradient_accumulation_steps": 3},
                    micro_batch_interleave_num=2)
    settle_batches(config)
    assert config.runner_config == {"batch_size": 2, "gradient_accumulation_steps": 3}
    assert config.calculate_per_token_loss and sequences_per_step(config) == 2 * 2 * 3 * 2


def test_micro_batches_without_a_plan_do_not_make_a_step_larger():
    config = recipe(micro_batch_interleave_num=2)
    settle_batches(config)
    assert sequences_per_step(config) == 2


@pytest.mark.parametrize(("keys", "words"), [
    ({"runner_config": {"gradient_accumulation_steps": 0}}, "expected a positive whole number, found 0"),
    ({"runner_config": {"gradient_accumulation_steps": True}}, "expected a positive whole number, found True"),
    ({"device": "Ascend", "runner_config": {"gradient_accumulation_steps": 2}}, "on Ascend, accumulation needs"),
    ({"runner_wrapper": {"type": "Other"}}, "expected MFTrainOneStepCell, TelechatTrainOneStepCell, found Other"),
    ({"runner_wrapper": None}, "found None"),
    ({"device": "Ascend", "plan": {"pipeline_stage": 2, "seq_split_num": 2}}, "seq_split_num is 2: MindFormers cannot"),
    ({"micro_batch_interleave_num": 3}, "does not divide runner_config.batch_size (2)"),
])
def test_parts_that_cannot_be(keys, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        settle_batches(recipe(**keys))


def test_gradients_are_never_averaged():
    config = recipe("Ascend", {"data_parallel": 2}, parallel={"parallel_mode": 1, "gradients_mean": True})
    settle_batches(config)
    assert config.parallel.gradients_mean is False


def test_steps_of_an_epoch(monkeypatch):
    """Processes read equal shares, the last records of which repeat the first; a plan's cards read whole batches."""
    plan = recipe("Ascend", {"data_parallel": 2})
    assert steps_per_epoch(plan, 10) == 2 and steps_per_epoch(plan, 10, 7) == 1
    monkeypatch.setenv("MS_WORKER_NUM", "2")
    cpu = recipe(use_parallel=True, parallel={"parallel_mode": 0, "full_batch": False})
    assert sequences_per_step(cpu) == 4 and steps_per_epoch(cpu, 11) == 3 and steps_per_epoch(cpu, 11, 9) == 2


def test_ranks_that_share_the_evaluation_read_no_record_twice(tmp_path, monkeypatch):
    """Three records for two ranks: the fourth has no label that counts."""
    path = write_records(tmp_path / "data.mindrecord", np.arange(3 * 5).reshape(3, 5))
    monkeypatch.setenv("MS_WORKER_NUM", "2")
    config = recipe(use_parallel=True, parallel={"parallel_mode": 0, "full_batch": False}, run_mode="eval",
                    model={"model_config": {"ignore_token_id": -1}},
                    eval_dataset={"data_loader": {"type": "MindDataset", "dataset_dir": str(path)}})
    pad_evaluation(config)
    loader = config.eval_dataset.data_loader
    assert loader.num_padded == 1 and (loader.padded_sample["labels"] == -1).all()
    assert loader.padded_sample["labels"].shape == loader.padded_sample["input_ids"].shape == (5,)
    monkeypatch.setenv("MS_WORKER_NUM", "3")
    del loader["num_padded"], loader["padded_sample"]
    pad_evaluation(config)
    assert "num_padded" not in loader


@pytest.mark.parametrize(("loader", "found"), [
    ({"type": "HFDataLoader", "handler": [{"type": "Other"}, {"type": "PackingHandler"}]},
     "HFDataLoader with PackingHandler shifts"),
    ({"type": "CommonDataLoader", "handler": {"type": "AlpacaInstructDataHandler"}},
     "AlpacaInstructDataHandler shifts"),
    ({"type": "MultiSourceDataLoader", "sub_data_loader": [{"type": "MindDataset"}, {"type": "MockBlendedMegatron"}]},
     "MockBlendedMegatron shifts"),
])
def test_labels_that_are_shifted_already_are_refused(loader, found):
    with pytest.raises(ConfigError, match=f"train_dataset.data_loader: .*{found} the labels by one token"):
        preflight.check_dataset({"train_dataset": {"data_loader": loader}}, "train_dataset")


def test_labels_of_unknown_loaders_are_spoken_of(monkeypatch):
    said = []
    monkeypatch.setattr(preflight.logger, "warning", lambda *words: said.append(words))
    preflight.check_dataset({"train_dataset": {"data_loader": {"type": "CommonDataLoader"}}}, "train_dataset")
    assert len(said) == 1 and "the model shifts them" in said[0][0]
