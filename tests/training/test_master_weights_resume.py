"""Training in bfloat16 with remainders through run_mindformer.py: saved, resumed exactly and from another precision."""
import shutil

import mindspore as ms
import numpy as np
import pytest
from training_fixtures import SEQ, VOCAB, command, read_log, run, run_killed, write_records

CALLBACKS = ("[{type: MFLossMonitor}, {type: TelechatTrainingLog}, {type: CheckpointMonitor, prefix: t, "
             "save_checkpoint_steps: 2, keep_checkpoint_max: 9, integrated_save: false, async_save: false}]")
REMAINDER = ("--optimizer.master_weights", "remainder", "--optimizer.weight_decay", "0.1")
EXACT = ("step", "epoch", "loss", "lr", "global_norm")
LAST = "checkpoint/rank_0/t_rank_0-2_4.ckpt"


def arguments(data, output, *more):
    return [*command(data, output, "--epochs", "2", "--callbacks", CALLBACKS), *more]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masters")
    return write_records(folder / "data.mindrecord", np.random.default_rng(0).integers(4, VOCAB, (8, SEQ + 1)))


@pytest.fixture(scope="module")
def unbroken(data, graphs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    run(arguments(data, folder / "out", *REMAINDER), graphs=graphs)
    return folder / "out"


def values(path):
    """{name: (type, array)} of a checkpoint."""
    return {name: (str(value.dtype), value.astype(ms.float32).asnumpy() if value.dtype == ms.bfloat16
                   else value.asnumpy()) for name, value in ms.load_checkpoint(str(path)).items()
            if hasattr(value, "asnumpy")}


@pytest.mark.slow
def test_resuming_with_remainders_changes_nothing(data, unbroken, graphs, tmp_path):
    again = arguments(data, tmp_path / "out", *REMAINDER, "--resume_training", "True")
    run_killed("step", 6, again, graphs)
    done = run(again)
    assert "the newest complete checkpoint (step 4)" in done.stdout + done.stderr
    assert "has parameters in" not in done.stdout + done.stderr
    expected, found = read_log(unbroken), read_log(tmp_path / "out")
    assert len(expected) == 8 and expected[-1]["loss"] < expected[0]["loss"]
    assert [[row[key] for key in EXACT] for row in found] == [[row[key] for key in EXACT] for row in expected]
    one, two = values(unbroken / LAST), values(tmp_path / "out" / LAST)
    assert one.keys() == two.keys()
    for name, (dtype, value) in one.items():
        assert two[name][0] == dtype
        np.testing.assert_array_equal(two[name][1], value, err_msg=name)
    remainders = {name: value for name, (dtype, value) in one.items() if name.startswith("adam_r.")}
    assert remainders and all(value.dtype == np.float16 and value.any() for value in remainders.values())
    assert one["model.layers.0.attention.wq.weight"][0] == "BFloat16"
    assert one["model.norm_out.weight"][0] == one["model.layers.0.attention.wo.bias"][0] == "Float32"


@pytest.mark.slow
@pytest.mark.parametrize("start", ["without remainders", "float32"])
def test_resuming_from_another_precision_says_so_and_goes_on(start, data, unbroken, tmp_path):
    shutil.copytree(unbroken, tmp_path / "out")
    folder = tmp_path / "out" / "checkpoint" / "rank_0"
    for path in folder.glob("*.ckpt"):
        if path.name != "t_rank_0-1_4.ckpt":
            path.unlink()
    widened = ("model.", "lm_head.") if start == "float32" else ()
    kept = [{"name": name, "data": value.astype(ms.float32) if name.startswith(widened) else value}
            for name, value in ms.load_checkpoint(str(folder / "t_rank_0-1_4.ckpt")).items()
            if not name.startswith("adam_r.")]
    for path in folder.glob("t_rank_0-1_4.ckpt*"):               # the manifest too: its hash is of the other file
        path.unlink()
    ms.save_checkpoint(kept, str(folder / "t_rank_0-1_4.ckpt"))
    named = folder / "t_rank_0-1_4.ckpt"                         # with float32, the file itself is named
    resume = [*REMAINDER, "--resume_training", "True"]
    if start == "float32":
        shutil.copyfile(named, tmp_path / "elsewhere.ckpt")
        done = run([*arguments(data, tmp_path / "out", *resume), "--load_checkpoint", str(tmp_path / "elsewhere.ckpt")],
                   code=1)
        assert "found the file" in done.stderr
        resume += ["--load_checkpoint", str(named)]
    done = run(arguments(data, tmp_path / "out", *resume))
    text = done.stdout + done.stderr
    assert "this run in bfloat16 with: the parameters are" in text and "remainders start at zero" in text
    expected, found = read_log(unbroken), read_log(tmp_path / "out")
    assert len(found) == 8
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected], rel=2e-3)
