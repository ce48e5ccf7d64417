"""Exact resumption: which checkpoint is chosen and deleted, training killed at random moments, a full disk."""
import random
import subprocess

import mindspore as ms
import numpy as np
import pytest
from training_fixtures import (
    DROPOUT,
    SEQ,
    VOCAB,
    command,
    read_log,
    run,
    run_killed,
    run_new,
    run_on_full_disk,
    write_records,
)

from research.telechat.checkpoint import resume as resume
from research.telechat.common.errors import ConfigError

CALLBACKS = ("[{type: MFLossMonitor}, {type: TelechatTrainingLog}, {type: CheckpointMonitor, prefix: t, "
             "save_checkpoint_steps: 1, keep_checkpoint_max: 3, keep_every_n_steps: 8%s}]")
EXACT = ("step", "epoch", "loss", "lr", "global_norm")


def save(root, rank, name, step):
    (root / f"rank_{rank}").mkdir(parents=True, exist_ok=True)
    path = root / f"rank_{rank}" / name
    ms.save_checkpoint([{"name": "w", "data": ms.Tensor(np.ones(300, np.float32))}], str(path),
                       append_dict={"epoch_num": 1, "step_num": step})
    path.chmod(0o600)
    return path


def test_names_sort_from_old_to_new():
    names = ["t_rank_0-10_1.ckpt", "t_rank_0-2_10.ckpt", "t_rank_0-2_9.ckpt", "t_rank_0_1-1_1.ckpt"]
    ordered = [name.file(0) for name in sorted(resume.parse(name)[0] for name in names)]
    assert ordered == ["t_rank_0-2_9.ckpt", "t_rank_0-2_10.ckpt", "t_rank_0-10_1.ckpt", "t_rank_0_1-1_1.ckpt"]
    for other in ("meta.json", "t_rank_0-2_9.tmp", "t-2_9.ckpt", "t_rank_0-2_9.ckpt.part"):
        assert resume.parse(other) is None
    name, rank = resume.parse("my_rank_x_rank_3_2-trainable_params-4_5.safetensors")
    assert (name.prefix, rank, name.run, name.kind) == ("my_rank_x", 3, 2, "trainable_params")


def test_newest_complete_checkpoint_is_chosen(tmp_path):
    assert resume.choose(tmp_path, 1) == resume.Choice(None, 0, [])
    save(tmp_path, 0, "t_rank_0-1_9.ckpt", 9)
    newest = save(tmp_path, 0, "t_rank_0-1_10.ckpt", 10)
    (tmp_path / "rank_0" / "t_rank_0-1_11.tmp").write_bytes(b"half")
    assert resume.choose(tmp_path, 1).step == 10
    whole = newest.read_bytes()
    for size in (0, 5, len(whole) // 2, len(whole) - 1):
        newest.write_bytes(whole[:size])
        choice = resume.choose(tmp_path, 1)
        assert choice.step == 9 and "t_rank_0-1_10.ckpt: skipped" in choice.notes[0]
    newest.write_bytes(bytes(len(whole)))
    assert resume.choose(tmp_path, 1).step == 9
    ms.save_checkpoint([{"name": "w", "data": ms.Tensor(np.ones(3, np.float32))}], str(newest))
    assert "no epoch_num and no step_num" in resume.choose(tmp_path, 1).notes[0]


def test_all_ranks_must_have_the_checkpoint(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, 0, f"t_rank_0-1_{step}.ckpt", step)
    with pytest.raises(ConfigError, match="no folder rank_1"):
        resume.choose(tmp_path, 2)
    save(tmp_path, 1, "t_rank_1-1_1.ckpt", 1)
    save(tmp_path, 1, "t_rank_1-1_2.ckpt", 2)
    choice = resume.choose(tmp_path, 2)
    assert choice.step == 2 and "rank 1 has not saved it" in choice.notes[0]
    (tmp_path / "rank_1" / "t_rank_1-1_2.ckpt").write_bytes(b"half")
    assert resume.choose(tmp_path, 2).step == 1


def test_outdated_checkpoints():
    names = [resume.parse(f"t_rank_0-{epoch}_{step}.ckpt")[0] for epoch in (1, 2) for step in (2, 4)]    # 4 per epoch
    assert [name.file(0) for name in resume.outdated(names, 2, 0, 4)] == ["t_rank_0-1_2.ckpt", "t_rank_0-1_4.ckpt"]
    assert [name.file(0) for name in resume.outdated(names, 1, 4, 4)] == ["t_rank_0-1_2.ckpt", "t_rank_0-2_2.ckpt"]
    assert resume.outdated(names, 0, 0, 4) == []


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    return write_records(folder / "data.mindrecord", np.random.default_rng(0).integers(4, VOCAB, (8, SEQ + 1)))


def shuffled(data, output, *more, epochs=8, extra=""):
    return [*command(data, output, "--train_dataset.data_loader.shuffle", "True", "--epochs", str(epochs),
                     "--callbacks", CALLBACKS % extra), *DROPOUT, *more]


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    """Output folder of 32 steps in 8 shuffled epochs without a kill."""
    folder = tmp_path_factory.mktemp("unbroken")
    run_new(shuffled(data, folder / "out"))
    return folder / "out"


def files(folder):
    """Names of the checkpoint's files but for manifests; mindspore 2.7.0 also writes the graph."""
    return sorted(path.name for path in (folder / "checkpoint" / "rank_0").iterdir()
                  if path.suffix != ".meta" and not path.name.endswith(".manifest.json"))


@pytest.mark.slow
@pytest.mark.long
def test_ten_kills_at_random_moments_change_nothing(data, unbroken, graphs, tmp_path):
    """Among the moments are those while a checkpoint is written, before it is named, and before meta.json changes. The
    last run and the one that it is compared with compile their own graphs."""
    chance = random.Random(20240607)
    ranges = {"step": (1, 4), "tensor": (1, 240), "rename": (1, 3), "replace": (2, 4)}
    killed = []
    for _ in range(10):
        what = chance.choice(list(ranges))
        number = chance.randint(*ranges[what])
        run_killed(what, number, shuffled(data, tmp_path / "out", "--resume_training", "True"), graphs)
        killed.append((what, number))
    last = run(shuffled(data, tmp_path / "out", "--resume_training", "True"))
    assert "the newest complete checkpoint (step" in last.stdout + last.stderr
    expected, found = read_log(unbroken), read_log(tmp_path / "out")
    assert [[row[key] for key in EXACT] for row in found] == [[row[key] for key in EXACT] for row in expected], killed
    assert files(tmp_path / "out") == files(unbroken) == [
        "meta.json", "t_rank_0-2_4.ckpt", "t_rank_0-4_4.ckpt", "t_rank_0-6_4.ckpt", "t_rank_0-8_2.ckpt",
        "t_rank_0-8_3.ckpt", "t_rank_0-8_4.ckpt"]
    name = "checkpoint/rank_0/t_rank_0-8_4.ckpt"
    one, two = ms.load_checkpoint(str(unbroken / name)), ms.load_checkpoint(str(tmp_path / "out" / name))
    assert one.keys() == two.keys()
    for key, value in one.items():
        value, other = (getattr(v, "asnumpy", lambda v=v: v)() for v in (value, two[key]))
        assert np.array_equal(value, other), key
    again = run(shuffled(data, tmp_path / "out", "--resume_training", "True"))
    assert "already complete" in again.stdout + again.stderr
    assert read_log(tmp_path / "out") == found


@pytest.mark.slow
@pytest.mark.parametrize("by_layer", ["False", "True"])
def test_adapter_with_dropout_resumes_exactly(by_layer, data, tmp_path):
    """LoRA with the lora_dropout of the recipes for Ascend, killed at its sixth step of eight."""
    def lora(output, *more):
        arguments = shuffled(data, output, "--model.model_config.pet_config.lora_dropout", "0.05",
                             "--model.model_config.train_layer_by_layer", by_layer, *more, epochs=2)
        arguments[1] = "research/telechat/finetune_telechat_tiny_lora_cpu.yaml"
        return arguments
    done = run(lora(tmp_path / "unbroken"))
    assert ("Training goes layer by layer" in done.stdout + done.stderr) == (by_layer == "True")
    again = lora(tmp_path / "killed", "--resume_training", "True")
    run_killed("step", 6, again)
    run(again)
    expected, found = read_log(tmp_path / "unbroken"), read_log(tmp_path / "killed")
    assert len(expected) == 8
    assert [[row[key] for key in EXACT] for row in found] == [[row[key] for key in EXACT] for row in expected]


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["stop", "continue"])
def test_full_disk(setting, data, unbroken, graphs, tmp_path):
    """A limit on the size of files simulates the full disk: writing fails in the middle of the checkpoint."""
    folder = tmp_path / "out"
    subprocess.run(["cp", "-r", str(unbroken), str(folder)], check=True)
    before = files(folder)
    limit = (folder / "checkpoint/rank_0/t_rank_0-8_4.ckpt").stat().st_size // 2
    done = run_on_full_disk(shuffled(data, folder, "--resume_training", "True", epochs=9,
                                     extra=f", on_save_error: {setting}"), limit, graphs)
    output = done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert files(folder) == before
    assert all(resume.fault_of(path) is None for path in (folder / "checkpoint/rank_0").glob("*.ckpt"))
    assert "step 33: the checkpoint could not be saved" in output and "t_rank_0-8_4.ckpt" in output
    if setting == "stop":
        assert done.returncode == 1 and len(errors) == 1 and "--resume_training True" in errors[0]
        assert len(read_log(folder)) == 33                     # the step itself was done and logged
    else:
        assert done.returncode == 0, output[-3000:]
        assert len(read_log(folder)) == 36


def test_resuming_from_a_name_that_is_not_there(capsys, data, tmp_path):
    from research.telechat.commands import run
    save(tmp_path / "checkpoint", 0, "t_rank_0-1_1.ckpt", 1)
    assert run.main(command(data, tmp_path, "--resume_training", "t_rank_0-7_7")) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: resume_training: there is no checkpoint t_rank_0-7_7")
