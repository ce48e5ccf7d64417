"""A training and its manifests: what it takes from that of its checkpoint, what it writes, what it refuses."""
import json

import numpy as np
import pytest
from training_fixtures import SEQ, VOCAB, command, read_log, run, write_records

from research.telechat.checkpoint.integrity import check_files
from research.telechat.checkpoint.manifest import find_manifest

CALLBACKS = ("[{type: MFLossMonitor}, {type: TelechatTrainingLog}, {type: CheckpointMonitor, prefix: t, "
             "save_checkpoint_steps: 2, integrated_save: false, async_save: false}]")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the data of eight records, and two epochs of four steps trained on them."""
    place = tmp_path_factory.mktemp("manifests")
    write_records(place / "data.mindrecord", np.random.default_rng(0).integers(4, VOCAB, (8, SEQ + 1)))
    run(training(place), XDG_CACHE_HOME=str(place / "cache"))
    return place


def training(place, *more, epochs=2):
    return command(place / "data.mindrecord", place / "out", "--epochs", str(epochs), "--callbacks", CALLBACKS,
                   "--lr_schedule.warmup_ratio", "0.0", *more)


def last_line(done):
    return [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("error: ")][-1]


@pytest.mark.slow
def test_checkpoints_have_manifests_that_the_next_run_is_held_against(place):
    folder = place / "out/checkpoint/rank_0"
    newest = folder / "t_rank_0-2_4.ckpt"
    manifest = find_manifest(newest)
    assert manifest.kind == "training" and manifest.model.name == "telechat_12b"
    assert manifest.model.to_variant().num_layers == 2 and manifest.model.to_variant().rms_norm_eps == 1e-5
    assert manifest.training == {"sequences_per_step": 2, "records": 8, "steps_per_epoch": 4}
    files = sorted(folder.glob("*.ckpt"))
    assert len(files) == check_files(files, remember=False) == 4

    start = ["--load_checkpoint", str(newest), "--output_dir", str(place / "next"), "--epochs", "1"]
    other = ["--model.model_config.rms_norm_eps", "1e-6"]
    cache = {"XDG_CACHE_HOME": str(place / "cache")}
    text = last_line(run(training(place, *start, *other), code=1, **cache))
    assert "rms_norm_eps is 1e-06 here and 1e-05 in the checkpoint" in text and "--checkpoint_conflict recipe" in text
    done = run(training(place, *start, *other, "--checkpoint_conflict", "checkpoint"), **cache)
    assert "rms_norm_eps is 1e-05, as the checkpoint says, not 1e-06" in done.stdout + done.stderr
    assert find_manifest(place / "next/checkpoint").model.to_variant().rms_norm_eps == 1e-5

    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 4
    newest.write_bytes(data)
    resume = training(place, "--resume_training", "True", epochs=3)
    for arguments in (training(place, *start), resume):
        text = last_line(run(arguments, code=1, **cache))
        assert "damaged or changed since" in text and "--check_hashes False" in text
    data[len(data) // 2] ^= 4
    newest.write_bytes(data)


@pytest.mark.slow
def test_resuming_with_other_steps_is_told_and_never_complete_too_early(place):
    cache = {"XDG_CACHE_HOME": str(place / "cache")}

    def resumed(*more, epochs, code=0):
        done = run(training(place, "--resume_training", "True", *more, epochs=epochs), code=code, **cache)
        return done.stdout + done.stderr

    text = resumed("--batch_size", "4", epochs=3)             # 2 of 3 epochs: steps 5 and 6 of 6 are left
    assert "(sequences per step 2 then, 4 now, steps per epoch 4 then, 2 now): its step 8 is step 4 of" in text
    assert [row["step"] for row in read_log(place / "out")] == [1, 2, 3, 4, 5, 6]
    write_records(place / "few.mindrecord", np.random.default_rng(0).integers(4, VOCAB, (4, SEQ + 1)))
    few = ["--train_dataset", str(place / "few.mindrecord"), "--batch_size", "4"]
    text = resumed(*few, epochs=6, code=1)
    assert "records 8 then, 4 now" in text and "only 3 of 6 epochs have been seen" in text
    assert json.loads((place / "out/checkpoint/rank_0/meta.json").read_text())["last_ckpt_file"] == "t_rank_0-3_2.ckpt"
