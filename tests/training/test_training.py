"""Training through run_mindformer.py and the real Trainer on a CPU: loss, checkpoint, data parallelism, mistakes."""
import json
import os
import subprocess
import sys

import mindspore as ms
import numpy as np
import pytest
from model_fixtures import loss_of
from training_fixtures import RECIPE, ROOT, SEQ, VOCAB, command, read_log, run, run_new, run_two, write_records

from research.telechat.commands.run import main
from research.telechat.common import environment
from research.telechat.recipe.read import parse_overrides

pytestmark = pytest.mark.matrix


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder, records): eight steps of training over eight records, checkpoints after steps 7 and 8."""
    folder = tmp_path_factory.mktemp("training")
    rows = np.random.default_rng(0).integers(4, VOCAB, (8, SEQ + 1))
    write_records(folder / "data.mindrecord", rows)
    work = folder / "cwd"
    work.mkdir()
    run_new(command(folder / "data.mindrecord", folder / "out", "--epochs", "2", "--callbacks",
                "[{type: MFLossMonitor}, {type: TelechatTrainingLog}, {type: CheckpointMonitor, prefix: t, "
                "save_checkpoint_steps: 7, integrated_save: false, async_save: false}]"), cwd=work)
    return folder, rows


@pytest.mark.slow
def test_loss_falls_and_everything_lies_in_the_output_folder(trained):
    folder, _ = trained
    log = read_log(folder / "out")
    assert [row["step"] for row in log] == list(range(1, 9))
    assert log[-1]["loss"] < log[0]["loss"] - 0.2
    assert all(np.isfinite(row["loss"]) and row["global_norm"] > 0 for row in log)
    assert (folder / "out" / "training_curve.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "cwd").iterdir()) == []          # nothing is written to the working directory


@pytest.mark.slow
def test_checkpoint_holds_the_trained_weights(trained):
    """The loss of step 8 comes from the weights after step 7: the loaded checkpoint must give the same."""
    from research.telechat.telechat import TelechatForCausalLM
    from research.telechat.telechat_config import TelechatConfig
    folder, rows = trained
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
    config = TelechatConfig(net_name="telechat_12b", amp_level="O0", seq_length=SEQ, vocab_size=VOCAB, num_layers=2,
                            hidden_size=64, intermediate_size=96, num_heads=4)
    model = TelechatForCausalLM(config)
    path = folder / "out" / "checkpoint" / "rank_0" / "t_rank_0-2_3.ckpt"
    not_loaded, _ = ms.load_param_into_net(model, ms.load_checkpoint(str(path)), strict_load=False)
    assert not not_loaded
    model.set_train(True)
    batch = ms.Tensor(rows[6:8], ms.int32)
    assert loss_of(model, batch, batch) == pytest.approx(read_log(folder / "out")[7]["loss"], abs=2e-5)


@pytest.mark.slow
def test_two_processes_have_the_norms_of_one(trained, tmp_path):
    """Data parallelism over two processes, one record each, against one process with both records per step."""
    from mindspore.dataset import MindDataset
    folder, rows = trained
    data = folder / "data.mindrecord"
    shares = [[record["input_ids"] for record in MindDataset(
        str(data), shuffle=False, num_shards=2, shard_id=rank).create_dict_iterator(num_epochs=1, output_numpy=True)]
        for rank in range(2)]
    paired = np.array([row for pair in zip(*shares) for row in pair])
    assert sorted(map(tuple, paired)) == sorted(map(tuple, rows))
    write_records(tmp_path / "paired.mindrecord", paired)
    start = ["--load_checkpoint", str(folder / "out" / "checkpoint" / "rank_0" / "t_rank_0-2_3.ckpt"), "--epochs", "1"]
    run(command(tmp_path / "paired.mindrecord", tmp_path / "one", *start))
    done = run_two(command(data, tmp_path / "two", *start, "--batch_size", "1", "--use_parallel", "True"),
                   tmp_path / "logs")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    one, two = read_log(tmp_path / "one"), read_log(tmp_path / "two")
    assert len(one) == len(two) == 4
    for single, double in zip(one, two):
        assert double["global_norm"] == pytest.approx(single["global_norm"], rel=2e-4)
        assert double["loss"] == pytest.approx(single["loss"], rel=2e-5)                # of both, not rank 0's


@pytest.mark.slow
def test_serves_mindformers_own_script(trained, tmp_path):
    """What MindFormers' run_mindformer.py does with --register_path, on a recipe of this project."""
    script = """
import sys
from mindformers.core.context import build_context
from mindformers.tools.register import MindFormerConfig
from mindformers.trainer import Trainer
config = MindFormerConfig(sys.argv[1])
config.output_dir, config.runner_config.epochs, config.runner_config.batch_size = sys.argv[3], 1, 4
config.train_dataset.data_loader.dataset_dir = sys.argv[2]
config.model.model_config.update(seq_length=32, vocab_size=200, num_layers=1, hidden_size=64, intermediate_size=96,
                                 num_heads=4)
build_context(config)
Trainer(config).train()
"""
    folder, _ = trained
    env = {**os.environ, "PYTHONPATH": str(ROOT), "REGISTER_PATH": str(ROOT / "research/telechat"), "GLOG_v": "3",
           "LOG_MF_PATH": str(tmp_path / "log"), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script, str(ROOT / RECIPE), str(folder / "data.mindrecord"),
                           str(tmp_path / "out")], cwd=tmp_path, env=env, text=True, capture_output=True, check=False,
                          timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert len(read_log(tmp_path / "out")) == 2


def mistake(capsys, arguments):
    """The one line that run_mindformer.py prints for a mistake; no traceback, exit code 1."""
    assert main(arguments) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture(scope="module")
def small_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return write_records(folder / "data.mindrecord", np.full((4, SEQ + 1), VOCAB - 1))


def test_missing_recipe(capsys):
    line = mistake(capsys, ["--config", "research/telechat/finetune_telechat_8b.yaml"])
    assert "finetune_telechat_8b.yaml does not exist" in line


@pytest.mark.parametrize(("text", "words"), [
    ("a: [1", "not valid YAML"), ("- 1", "must hold keys"), ("base_config: no.yaml", "no.yaml does not exist"),
    ("base_config: self.yaml", "inherits itself")])
def test_broken_recipe(capsys, tmp_path, text, words):
    (tmp_path / "self.yaml").write_text(text)
    assert words in mistake(capsys, ["--config", str(tmp_path / "self.yaml")])


def test_unknown_key(capsys, small_data, tmp_path):
    line = mistake(capsys, command(small_data, tmp_path, "--model.model_config.hiden_size", "3"))
    assert "hiden_size" in line and "hidden_size" in line
    assert "runer_config" in mistake(capsys, command(small_data, tmp_path, "--runer_config.epochs", "3"))
    assert "sinc_mode" in mistake(capsys, command(small_data, tmp_path, "--runner_config.sinc_mode", "3"))


def test_missing_checkpoint(capsys, small_data, tmp_path):
    line = mistake(capsys, command(small_data, tmp_path, "--load_checkpoint", str(tmp_path / "none.ckpt")))
    assert "none.ckpt does not exist" in line


def test_checkpoint_of_other_sizes(capsys, small_data, tmp_path):
    ms.save_checkpoint([{"name": "model.norm_out.weight", "data": ms.Tensor(np.ones(128, np.float32))}],
                       str(tmp_path / "other.ckpt"))
    line = mistake(capsys, command(small_data, tmp_path, "--load_checkpoint", str(tmp_path / "other.ckpt")))
    assert "model.norm_out.weight: the recipe has [64], the checkpoint [128]" in line
    assert "lm_head.weight" in line or "more" in line
    assert "model.tok_embeddings.embedding_weight: missing" in line


def test_no_data_set(capsys, tmp_path):
    assert "--train_dataset" in mistake(capsys, command("", tmp_path))
    assert "nowhere" in mistake(capsys, command(tmp_path / "nowhere", tmp_path))
    assert ".mindrecord" in mistake(capsys, command(tmp_path, tmp_path))


def test_records_of_another_length(capsys, small_data, tmp_path):
    line = mistake(capsys, command(small_data, tmp_path, "--model.model_config.seq_length", "64"))
    assert "64" in line and str(SEQ) in line


def test_fewer_records_than_a_batch(capsys, small_data, tmp_path):
    line = mistake(capsys, command(small_data, tmp_path, "--batch_size", "5"))
    assert "has 4 records, fewer than one step's batch of 5" in line


def test_token_ids_beyond_the_vocabulary(capsys, small_data, tmp_path):
    line = mistake(capsys, command(small_data, tmp_path, "--model.model_config.vocab_size", str(VOCAB - 1)))
    assert str(VOCAB - 1) in line


def test_no_more_readers_than_cores(monkeypatch):
    from research.telechat.run import job as run_job
    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda _: {0, 1, 2})
    config = {"train_dataset": {"num_parallel_workers": 8}, "eval_dataset": {"num_parallel_workers": 2}}
    run_job.limit_readers(config)
    assert [section["num_parallel_workers"] for section in config.values()] == [3, 2]


def test_plan_that_a_cpu_cannot_run(capsys, small_data, tmp_path):
    line = mistake(capsys, command(small_data, tmp_path, "--parallel_config.model_parallel", "2"))
    assert "model_parallel" in line and "CPU" in line


def test_override_syntax(capsys, small_data, tmp_path):
    assert "KEY=VALUE" in mistake(capsys, command(small_data, tmp_path, "--options", "a"))
    assert parse_overrides(["a.b=true"], ["--c.d", "1e-5", "--e=[1, 2]"]) == {
        "a.b": True, "c.d": 1e-5, "e": [1, 2]}


@pytest.mark.slow
def test_a_profile_of_named_steps_is_written(small_data, tmp_path):
    run(command(small_data, tmp_path / "out", "--epochs", "1", "--profile", "True", "--profile_start_step", "1",
                "--profile_stop_step", "2", "--profile_level", "0"))
    traces = list((tmp_path / "out/profile/rank_0").rglob("trace_view.json"))
    assert len(traces) == 1 and len(json.loads(traces[0].read_text())) > 10


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    from vocab_fixtures import train_sentencepiece
    return train_sentencepiece(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


def predict_command(tokenizer, *more):
    return ["--config", "research/telechat/predict_telechat_tiny_cpu.yaml", "--register_path", "research/telechat",
            "--processor.tokenizer.vocab_file", str(tokenizer), "--model.model_config.vocab_size", "600", *more]


def test_prediction_mistakes(capsys, tokenizer_file, tmp_path):
    assert "--predict_data is missing" in mistake(capsys, predict_command(tokenizer_file))
    line = mistake(capsys, predict_command(tokenizer_file, "--predict_data", "你好 " * 200))
    assert "prompt 1" in line and "seq_length is 128" in line
    line = mistake(capsys, predict_command(tokenizer_file, "--predict_data", "a", "--model.model_config.vocab_size",
                                           "500"))
    assert "it has 600 tokens, the model 500 (vocab_size)" in line
    assert "none.model" in mistake(capsys, predict_command(tmp_path / "none.model", "--predict_data", "a"))
    (tmp_path / "empty.txt").write_text("\n\n")
    line = mistake(capsys, predict_command(tokenizer_file, "--predict_data", str(tmp_path / "empty.txt")))
    assert "empty.txt contains no text" in line


def test_plain_questions_get_the_template(tokenizer_file):
    from research.telechat.run.prompts import to_prompts
    from research.telechat.telechat_tokenizer import TelechatTokenizer
    tokenizer = TelechatTokenizer(str(tokenizer_file))
    texts = ["你是谁？", "<_user>你是谁？<_bot>"]
    assert to_prompts(texts, tokenizer) == ["<_user>你是谁？<_bot>", "<_user>你是谁？<_bot>"]
    assert to_prompts(texts, tokenizer, raw=True) == texts
