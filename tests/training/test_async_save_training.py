"""Training with async_save through run_mindformer.py: whole files, kills, full disks, adapters, two processes."""
import json
import re
import subprocess

import mindspore as ms
import numpy as np
import pytest
from training_fixtures import (
    SEQ,
    VOCAB,
    command,
    read_log,
    run,
    run_killed,
    run_new,
    run_on_full_disk,
    run_two,
    write_records,
)

from research.telechat.checkpoint import resume as resume

pytestmark = pytest.mark.matrix

SLOW_SAVE = "tests/support/slow_save_driver.py"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("async")
    return write_records(folder / "data.mindrecord", np.random.default_rng(0).integers(4, VOCAB, (8, SEQ + 1)))


def training(data, output, *more, epochs=4, every=4, beside=True, extra=""):
    """16 steps, a checkpoint every fourth, the last two kept."""
    return [*command(data, output, "--train_dataset.data_loader.shuffle", "True", "--epochs", str(epochs),
                     "--callbacks", "[{type: TelechatTrainingLog}, {type: CheckpointMonitor, prefix: t, "
                     f"save_checkpoint_steps: {every}, keep_checkpoint_max: 2, async_save: {beside}{extra}}}]"), *more]


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    """Output folder of the training that saves in between its steps."""
    folder = tmp_path_factory.mktemp("unbroken")
    run_new(training(data, folder / "out", beside=False))
    return folder / "out"


def equal_results(one, two):
    """Same log, same files with the same contents."""
    logs = [[[row[key] for key in ("step", "epoch", "loss", "lr", "global_norm")] for row in read_log(folder)]
            for folder in (one, two)]
    assert logs[0] == logs[1]
    folders = [folder / "checkpoint/rank_0" for folder in (one, two)]
    names = [sorted(path.name for path in folder.iterdir()
                    if path.suffix != ".meta" and not path.name.endswith(".manifest.json")) for folder in folders]
    assert names[0] == names[1] == ["meta.json", "t_rank_0-3_4.ckpt", "t_rank_0-4_4.ckpt"]
    for name in names[0][1:]:
        first, second = (ms.load_checkpoint(str(folder / name)) for folder in folders)
        assert first.keys() == second.keys()
        for key, value in first.items():
            values = [getattr(each, "asnumpy", lambda each=each: each)() for each in (value, second[key])]
            assert np.array_equal(*values), (name, key)


@pytest.mark.slow
def test_training_goes_on_while_a_checkpoint_is_written(data, unbroken, tmp_path):
    """The weights change during the write; the file has those of its step."""
    done = run(["0.01", *training(data, tmp_path / "out")], script=SLOW_SAVE)
    assert int(re.search(r"steps begun while writing: (\d+)", done.stdout)[1]) >= 6
    equal_results(tmp_path / "out", unbroken)


@pytest.mark.slow
def test_adapters_equal_those_of_a_training_that_saves_between_its_steps(data, tmp_path):
    """The adapter is trained on while its checkpoint is written, and has the numbers of its step all the same."""
    adapters = []
    for name, seconds in (("between", None), ("beside", "0.01")):
        arguments = training(data, tmp_path / name, epochs=3, beside=bool(seconds),
                             extra=", save_trainable_params: True")
        arguments[1] = "research/telechat/finetune_telechat_tiny_lora_cpu.yaml"
        done = run([seconds, *arguments], script=SLOW_SAVE) if seconds else run_new(arguments)
        assert not seconds or int(re.search(r"steps begun while writing: (\d+)", done.stdout)[1]) >= 4
        folder = tmp_path / name / "checkpoint_trainable/rank_0"
        adapters.append({path.name: ms.load_checkpoint(str(path)) for path in folder.glob("*.ckpt")})
        assert (folder / "adapter_config.json").is_file() and len(list(folder.glob("*.ckpt"))) == 2
    one, two = adapters
    assert sorted(one) == sorted(two) == [f"t_rank_0-trainable_params-{epoch}_4.ckpt" for epoch in (2, 3)]
    for name in one:
        assert one[name].keys() == two[name].keys() and all("mindpet_delta_lora" in key for key in one[name])
        for key, value in one[name].items():
            assert np.array_equal(value.asnumpy(), two[name][key].asnumpy()), (name, key)


@pytest.mark.slow
def test_killed_while_writing_resumes_from_the_complete_one(data, unbroken, graphs, tmp_path):
    """Killed within the first, the second and the third checkpoint; what is half is never chosen."""
    start = training(data, tmp_path / "out", "--resume_training", "True")
    for number, chosen in ((20, 0), (90, 4), (90, 8)):
        run_killed("tensor", number, start, graphs)
        assert resume.choose(tmp_path / "out/checkpoint", 1).step == chosen
        assert list((tmp_path / "out/checkpoint/rank_0").glob("*.tmp"))
    run(start)
    equal_results(tmp_path / "out", unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["stop", "continue"])
def test_full_disk_while_training_continues(setting, data, unbroken, tmp_path):
    folder = tmp_path / "out"
    subprocess.run(["cp", "-r", str(unbroken), str(folder)], check=True)
    before = sorted(path.name for path in (folder / "checkpoint/rank_0").iterdir())
    limit = (folder / "checkpoint/rank_0/t_rank_0-4_4.ckpt").stat().st_size // 2
    done = run_on_full_disk(training(data, folder, "--resume_training", "True", epochs=6,
                                     extra=f", on_save_error: {setting}"), limit)
    output = done.stdout + done.stderr
    assert sorted(path.name for path in (folder / "checkpoint/rank_0").iterdir()) == before
    assert "step 20: the checkpoint could not be saved" in output and "t_rank_0-4_4.ckpt" in output
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    if setting == "stop":
        assert done.returncode == 1 and len(errors) == 1 and "--resume_training True" in errors[0]
    else:
        assert done.returncode == 0 and "step 24: the checkpoint could not be saved" in output
        assert len(read_log(folder)) == 24


@pytest.mark.slow
def test_two_processes_end_with_the_same_complete_checkpoints(data, tmp_path):
    """Each rank writes by itself; both keep three where one alone would keep two."""
    arguments = training(data, tmp_path / "out", "--use_parallel", "True", "--batch_size", "1", every=1, epochs=2)
    done = run_two(arguments, tmp_path / "logs")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    choice = resume.choose(tmp_path / "out/checkpoint", 2)
    assert choice.step == 8 and choice.notes == []
    for rank in range(2):
        folder = tmp_path / f"out/checkpoint/rank_{rank}"
        assert sorted(path.name for path in folder.iterdir()
                    if path.suffix != ".meta" and not path.name.endswith(".manifest.json")) == [
            "meta.json", *(f"t_rank_{rank}-2_{step}.ckpt" for step in (2, 3, 4))]
        assert json.loads((folder / "meta.json").read_text())["last_ckpt_file"] == f"t_rank_{rank}-2_4.ckpt"
        assert all(resume.fault_of(path) is None for path in folder.glob("*.ckpt"))
