"""Merging and splitting of distributed checkpoints: slicing arithmetic, refusals, and round trips through MindSpore."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import prepared
import pytest
from strategy_fixtures import layout, write_strategies

from research.telechat.checkpoint.strategy import full_shape, newest_files, read_strategy, region
from research.telechat.common.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[2]


def pieces(one, shape):
    """The slice of every rank as plain NumPy makes it, for a parameter that counts its elements."""
    whole = np.arange(int(np.prod(shape))).reshape(shape)
    return [whole[tuple(slice(*span) for span in region(one, rank, shape))] for rank in range(one.ranks)]


def test_rows_over_the_last_device_axis():
    found = pieces(layout((2, 4), (0, -1)), (8, 3))
    for rank, part in enumerate(found):
        np.testing.assert_array_equal(part, np.split(np.arange(24).reshape(8, 3), 4)[rank % 4])


def test_columns_over_the_first_device_axis():
    found = pieces(layout((2, 4), (-1, 1)), (3, 8))
    for rank, part in enumerate(found):
        np.testing.assert_array_equal(part, np.split(np.arange(24).reshape(3, 8), 2, axis=1)[rank // 4])


def test_optimizer_parallelism_cuts_each_slice_over_equal_ranks():
    found = pieces(layout((2, 4), (0, -1), optimizer=-1), (16, 3))
    whole = np.arange(48).reshape(16, 3)
    for rank, part in enumerate(found):
        np.testing.assert_array_equal(part, np.split(np.split(whole, 4)[rank % 4], 2)[rank // 4])
    assert full_shape(layout((2, 4), (0, -1), optimizer=-1), (2, 3)) == (16, 3)


def test_optimizer_parallelism_over_fewer_ranks_takes_neighbours():
    found = pieces(layout((8,), (-1,), optimizer=2), (4,))
    assert [part.tolist() for part in found] == [[0, 1], [2, 3]] * 4


def test_an_axis_cut_over_two_device_axes():
    found = pieces(layout((2, 2, 2), ((2, 0), -1)), (8, 1))
    assert [part.ravel().tolist() for part in found] == [[0, 1], [2, 3], [0, 1], [2, 3], [4, 5], [6, 7], [4, 5], [6, 7]]


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="cannot be split into 4"):
        region(layout((4,), (0,)), 0, (6,))


def test_newest_checkpoint_counts_steps_as_numbers(tmp_path):
    for rank in (0, 1):
        folder = tmp_path / f"rank_{rank}"
        folder.mkdir()
        for name in ("t_rank_0-1_9.ckpt", "t_rank_0-1_10.ckpt", "t_rank_0-1_8.ckpt"):
            (folder / name).write_bytes(b"")
    assert {path.name for path in newest_files(tmp_path).values()} == {"t_rank_0-1_10.ckpt"}
    (tmp_path / "rank_1/t_rank_0-1_10.ckpt").unlink()
    with pytest.raises(CheckpointError, match="different steps"):
        newest_files(tmp_path)


# ---- through MindSpore

SHAPES = {"model.tok_embeddings.embedding_weight": (16, 8), "model.layers.0.attention.wq.weight": (8, 8),
          "model.layers.0.attention.wo.weight": (8, 8), "model.layers.0.attention_norm.weight": (8,),
          "model.layers.1.attention.wq.weight": (8, 8), "model.layers.1.attention.wo.weight": (8, 8),
          "model.layers.1.attention_norm.weight": (8,), "model.norm_out.weight": (8,)}


def plan(dp, mp, pp, optimizer):
    """Layouts as model/sharding.py makes them, of two layers, one per stage where there are two; a tied table."""
    layouts = {}
    for name in SHAPES:
        stage = min(1, pp - 1) if "layers.1." in name or "norm_out" in name else 0
        stages = (0, pp - 1) if "embedding" in name and pp > 1 else (stage,)
        sharded = -1 if optimizer and dp > 1 else 0
        if name.endswith(("norm.weight", "norm_out.weight")):
            layouts[name] = layout((dp * mp,), (-1,), 0, stages)
        elif "wo" in name:
            layouts[name] = layout((dp, mp), (-1, 0), sharded, stages)
        else:
            layouts[name] = layout((dp, mp), (0, -1), sharded, stages)
    return layouts


def split_by_hand(name, whole, dp, mp, optimizer):
    """Slices of one parameter for the dp * mp ranks of a stage, without checkpoint/strategy.py."""
    slices = []
    for rank in range(dp * mp):
        data, model = divmod(rank, mp)
        part = whole
        if whole.ndim == 2:
            part = np.split(whole, mp, axis=1 if "wo" in name else 0)[model]
            if optimizer and dp > 1:
                part = np.split(part, dp)[data]
        slices.append(part)
    return slices


def write_ranks(folder, values, layouts, dp, mp, pp, optimizer):
    """Of what two stages hold, the tied table, the last stage's copy is an old one, as training leaves it."""
    import mindspore as ms
    for stage in range(pp):
        held = {name: split_by_hand(name, values[name] + (stage > one.stages[0]), dp, mp, optimizer)
                for name, one in layouts.items() if stage in one.stages}
        for local in range(dp * mp):
            rank = stage * dp * mp + local
            place = folder / f"rank_{rank}"
            place.mkdir(parents=True)
            content = [{"name": name, "data": ms.Tensor(np.ascontiguousarray(parts[local]))}
                       for name, parts in held.items()]
            content.append({"name": "global_step", "data": ms.Tensor(np.array([7], np.int32))})
            ms.save_checkpoint(content, str(place / f"telechat_rank_{rank}-1_10.ckpt"))
    return folder


def run_command(*arguments, expect=0):
    """What the command says. It must end with `expect`; a mistake it must find without MindSpore."""
    command = [str(ROOT / "scripts/transform_checkpoint.py"), *map(str, arguments)]
    if expect:
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, timeout=600,
                              env={**os.environ, "PYTHONPATH": f"{ROOT / 'tests/support/without_torch'}:{ROOT}"})
    else:
        done = prepared.run(command, env={"GLOG_v": "3"})
    assert done.returncode == expect, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def load(path):
    import mindspore as ms
    return {name: value.asnumpy() for name, value in ms.load_checkpoint(str(path)).items()}


@pytest.fixture(scope="module")
def eight_ranks(tmp_path_factory):
    """A checkpoint of dp2 mp2 pp2 with optimizer parallelism: (folder, strategies, the whole parameters)."""
    base = tmp_path_factory.mktemp("eight")
    rng = np.random.default_rng(1)
    values = {name: rng.standard_normal(shape).astype(np.float16) for name, shape in SHAPES.items()}
    layouts = plan(2, 2, 2, True)
    slices = write_ranks(base / "slices", values, layouts, 2, 2, 2, True)
    return slices, write_strategies(base / "strategy", layouts, 2), values


@pytest.mark.slow
def test_eight_ranks_to_one_to_four(eight_ranks, tmp_path):
    slices, strategy, values = eight_ranks
    said = run_command("--source", slices, "--source_strategy", strategy, "--target", tmp_path / "one")
    assert "every element compared" in said
    merged = load(next((tmp_path / "one/rank_0").iterdir()))
    for name, whole in values.items():
        np.testing.assert_array_equal(merged[name], whole, err_msg=name)
    assert merged["global_step"] == 7
    four = plan(1, 4, 1, False)
    target = write_strategies(tmp_path / "strategy4", four, 1)
    run_command("--source", tmp_path / "one", "--target", tmp_path / "four", "--target_strategy", target)
    for rank in range(4):
        found = load(next((tmp_path / f"four/rank_{rank}").iterdir()))
        for name, whole in values.items():
            np.testing.assert_array_equal(found[name], split_by_hand(name, whole, 1, 4, False)[rank], err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["Float16", "BFloat16", "Float32"])
def test_slices_in_safetensors(dtype, tmp_path):
    """Four ranks in safetensors to one; what was copied on the way is gone."""
    import mindspore as ms

    from research.telechat.checkpoint.reader import open_ckpt, open_safetensors
    from research.telechat.checkpoint.slices import read_bytes
    rng = np.random.default_rng(2)
    whole = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    layouts = plan(2, 2, 1, True)
    slices = write_ranks(tmp_path / "slices", whole, layouts, 2, 2, 1, True)
    kind = {"Float16": ms.float16, "BFloat16": ms.bfloat16, "Float32": ms.float32}[dtype]
    for path in slices.glob("rank_*/*.ckpt"):
        content = [{"name": name, "data": value if name == "global_step" else ms.Tensor(value.asnumpy(), kind)}
                   for name, value in ms.load_checkpoint(str(path)).items()]
        ms.save_checkpoint(content, str(path.with_suffix(".safetensors")), format="safetensors")
        path.unlink()
    said = run_command("--source", slices, "--source_strategy", write_strategies(tmp_path / "strategy", layouts, 1),
                       "--target", tmp_path / "one")
    assert "every element compared" in said
    merged = open_ckpt(next((tmp_path / "one/rank_0").iterdir()))
    assert merged.tensors.keys() == {*SHAPES, "global_step"}
    ms.save_checkpoint([{"name": name, "data": ms.Tensor(value, kind)} for name, value in whole.items()],
                       str(tmp_path / "whole.safetensors"), format="safetensors")
    expected = open_safetensors([tmp_path / "whole.safetensors"])
    for name, info in expected.tensors.items():
        assert merged.tensors[name].dtype == info.dtype, name
        assert read_bytes(merged, name).tobytes() == read_bytes(expected, name).tobytes(), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "slices", "strategy", "whole.safetensors"]


@pytest.mark.slow
def test_pipeline_stages_straight_to_another_plan(eight_ranks, tmp_path):
    slices, strategy, values = eight_ranks
    other = plan(4, 1, 1, True)
    target = write_strategies(tmp_path / "strategy", other, 1)
    run_command("--source", slices, "--source_strategy", strategy, "--target", tmp_path / "out", "--target_strategy",
                target)
    for rank in range(4):
        found = load(next((tmp_path / f"out/rank_{rank}").iterdir()))
        for name, whole in values.items():
            np.testing.assert_array_equal(found[name], split_by_hand(name, whole, 4, 1, True)[rank], err_msg=name)


def test_strategies_of_stages_are_merged(eight_ranks, tmp_path):
    _, strategy, _ = eight_ranks
    merged = read_strategy(strategy)
    assert (merged.ranks, merged.stages) == (8, 2)
    assert merged.layouts["model.tok_embeddings.embedding_weight"].stages == (0, 1)
    assert merged.holders("model.layers.1.attention.wq.weight") == [4, 5, 6, 7]
    one = tmp_path / "part"
    one.mkdir()
    (one / "a.ckpt").write_bytes(sorted(strategy.iterdir())[1].read_bytes())
    with pytest.raises(CheckpointError, match="no strategy of pipeline stage 0"):
        read_strategy(one)


@pytest.mark.parametrize("fault", ["missing rank", "fewer ranks", "wrong shapes", "no strategy", "not a strategy",
                                   "target exists"])
def test_refuses_before_it_starts(eight_ranks, tmp_path, fault):
    slices, strategy, _ = eight_ranks
    target = tmp_path / "out"
    arguments = ["--source", slices, "--source_strategy", strategy, "--target", target]
    expected = ""
    if fault == "missing rank":
        part = tmp_path / "slices"
        part.mkdir()
        for rank in range(7):
            (part / f"rank_{rank}").symlink_to(slices / f"rank_{rank}")
        arguments[1], expected = part, "no folder rank_7"
    elif fault == "fewer ranks":
        arguments[3] = write_strategies(tmp_path / "other", plan(1, 4, 1, False), 1)
        expected = "is for 4 ranks, but there is a folder rank_4"
    elif fault == "wrong shapes":          # of as many ranks, but sharded otherwise
        arguments[3] = write_strategies(tmp_path / "other", plan(1, 4, 2, False), 2)
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text("run_mode: finetune\nmodel: {model_config: {num_layers: 2, hidden_size: 8, num_heads: 2, "
                          "vocab_size: 16, intermediate_size: 16, tie_word_embeddings: True}}\n")
        arguments += ["--config", recipe]
        expected = "the strategy belongs to another run"
    elif fault == "no strategy":
        del arguments[2:4]
        expected = "--source_strategy is missing"
    elif fault == "not a strategy":
        arguments[3] = next((slices / "rank_0").iterdir())
        expected = "not a strategy file"
    else:
        target.mkdir()
        (target / "mine").write_text("keep")
        expected = "is not empty"
    said = run_command(*arguments, expect=1)
    assert expected in said and said.count("error:") == 1
    assert not target.exists() or [path.name for path in target.iterdir()] == ["mine"]
