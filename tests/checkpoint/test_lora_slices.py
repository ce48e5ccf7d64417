"""Adapters of trainings with model parallelism: one slice per rank, put together for merging and for PEFT."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from lora_fixtures import ALPHA, command_error, save_adapter
from model_fixtures import HF_CONFIGS, build_model, logits_of, random_official
from strategy_fixtures import layout, write_strategies

from research.telechat.checkpoint import lora as lora
from research.telechat.checkpoint.folder import open_mindspore
from research.telechat.commands import merge_lora
from research.telechat.commands import peft as convert_lora
from research.telechat.spec.variants import variant_from_hf

ROOT = Path(__file__).resolve().parents[2]
RANK = 4
PLANS = {"mp2": (1, 2, 1, False), "mp4": (1, 4, 1, False), "dp2 mp2": (2, 2, 1, False),
         "dp2 mp2, optimizer": (2, 2, 1, True), "mp2 pp2": (1, 2, 2, False), "dp2": (2, 1, 1, False)}


def random_adapter(variant, seed=1):
    """An adapter of every linear layer, large enough to change the logits."""
    rng = np.random.default_rng(seed)
    return lora.Adapter({param.ms_name: (rng.normal(0, 0.2, (RANK, param.shape[1])).astype(np.float32),
                                         rng.normal(0, 0.2, (param.shape[0], RANK)).astype(np.float32))
                         for param in lora.target_params(variant)}, ALPHA)


def cut_axis(name):
    """Which axis model parallelism cuts: outputs (rows of B) of most layers, inputs (columns of A) of wo and w2."""
    by_input = any(f".{layer}." in name for layer in ("wo", "w2"))
    return {"a": 1 if by_input else None, "b": None if by_input else 0}[name[-1]]


def slices(adapter, dp, mp, pp, optimizer):
    """What each rank holds, sharded with NumPy: {rank: {name: part}}. Two layers, with two stages one each."""
    ranks = {}
    for rank in range(dp * mp * pp):
        stage, data, model = rank // (dp * mp), rank // mp % dp, rank % mp
        ranks[rank] = {}
        for name, part in lora.mindspore_tensors(adapter).items():
            if pp > 1 and f"layers.{stage}." not in name:
                continue
            equal, number = dp * mp, data * mp + model             # ranks that would hold the same
            if cut_axis(name) is not None:
                part = np.split(part, mp, axis=cut_axis(name))[model]
                equal, number = dp, data
            ranks[rank][name] = np.split(part, equal)[number] if optimizer else part
    return ranks


def layouts_of(adapter, dp, mp, pp, optimizer):
    """The same sharding as MindSpore's strategies express it."""
    found = {}
    for name in lora.mindspore_tensors(adapter):
        axes = [-1, -1]
        if cut_axis(name) is not None:
            axes[cut_axis(name)] = 0
        stage = int("layers.1." in name) if pp > 1 else 0
        found[name] = layout((dp, mp), axes, -1 if optimizer and dp > 1 else 0, (stage,))
    return found


def write_ranks(folder, ranks, suffix="ckpt", step="2_3"):
    """The folder checkpoint_trainable of a run."""
    for rank, tensors in ranks.items():
        place = folder / f"rank_{rank}"
        place.mkdir(parents=True, exist_ok=True)
        convert_lora.write_tensors(place / f"t_rank_{rank}-trainable_params-{step}.{suffix}", {
            name: np.ascontiguousarray(part) for name, part in tensors.items()}, {"format": "ms"})
        (place / lora.CONFIG_NAME).write_text(json.dumps({"lora_alpha": ALPHA}))
    return folder


def equal_adapters(one, two):
    assert one.pairs.keys() == two.pairs.keys() and one.alpha == two.alpha
    for name, pair in one.pairs.items():
        assert all(np.array_equal(*both) for both in zip(pair, two.pairs[name])), name


@pytest.fixture
def run_folder(tmp_path):
    """(function that lays out the output folder of a run with a plan, the whole adapter)."""
    adapter = random_adapter(variant_from_hf(HF_CONFIGS["12b"]))

    def make(plan="dp2 mp2", suffix="ckpt"):
        write_strategies(tmp_path / "strategy", layouts_of(adapter, *PLANS[plan]), PLANS[plan][2])
        return write_ranks(tmp_path / "checkpoint_trainable", slices(adapter, *PLANS[plan]), suffix)
    return make, adapter


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_slices_make_the_whole_adapter(plan, suffix, run_folder):
    make, adapter = run_folder
    folder = make(plan, suffix)
    equal_adapters(lora.read_adapter(folder), adapter)
    one = folder / "rank_1" / f"t_rank_1-trainable_params-2_3.{suffix}"
    equal_adapters(lora.read_adapter(one, strategy=folder.parent / "strategy"), adapter)


def test_file_may_be_named_from_inside_its_folder(run_folder, tmp_path, monkeypatch):
    """A folder of a rank may also be a link, as long as the link has the rank's name."""
    make, adapter = run_folder
    folder = make()
    (folder / "rank_1").rename(tmp_path / "elsewhere")
    (folder / "rank_1").symlink_to(tmp_path / "elsewhere")
    name = "t_rank_{}-trainable_params-2_3.ckpt"
    for place, given in ((folder / "rank_0", name.format(0)), (folder / "rank_0", f"../rank_1/{name.format(1)}"),
                         (folder, f"rank_3/../rank_0/{name.format(0)}"), (folder, f"rank_1/{name.format(1)}")):
        monkeypatch.chdir(place)
        equal_adapters(lora.read_adapter(Path(given), strategy=tmp_path / "strategy"), adapter)


def test_newest_counts_unless_one_is_named(run_folder, tmp_path):
    make, adapter = run_folder
    folder = make("mp2")
    newer = random_adapter(variant_from_hf(HF_CONFIGS["12b"]), seed=2)
    write_ranks(folder, slices(newer, *PLANS["mp2"]), step="2_10")
    equal_adapters(lora.read_adapter(folder), newer)
    equal_adapters(lora.read_adapter(folder / "rank_0/t_rank_0-trainable_params-2_3.ckpt",
                                     strategy=tmp_path / "strategy"), adapter)


def test_optimizer_state_beside_the_adapter_is_left_out(run_folder, tmp_path):
    """Of checkpoint/, which holds everything for resuming, the adapter is taken."""
    make, adapter = run_folder
    make("mp2")
    ranks = slices(adapter, *PLANS["mp2"])
    for tensors in ranks.values():
        tensors.update({f"adam_m.{name}": part + 1 for name, part in list(tensors.items())},
                       **{"model.norm_out.weight": np.ones(32, np.float32)})
    equal_adapters(lora.read_adapter(write_ranks(tmp_path / "checkpoint", ranks)), adapter)


@pytest.mark.parametrize("fault", ["rank", "folder", "strategy", "other plan", "one slice", "name", "pieces"])
def test_what_is_missing_is_named_in_one_line(fault, run_folder, tmp_path, capsys):
    make, adapter = run_folder
    folder = make("dp2 mp2")
    base = tmp_path / "base.ckpt"
    convert_lora.write_tensors(base, {param.ms_name: np.zeros(param.shape, np.float32) for param in lora.target_params(
        variant_from_hf(HF_CONFIGS["12b"]))}, {})
    given, more = folder, []
    lost = folder / "rank_2/t_rank_2-trainable_params-2_3.ckpt"
    if fault == "rank":
        lost.unlink()
        given, more = folder / "rank_0/t_rank_0-trainable_params-2_3.ckpt", ["--adapter_strategy",
                                                                              tmp_path / "strategy"]
        expected = [f"{lost} does not exist; the strategy has 4 ranks"]
    elif fault == "folder":
        for rank in (2, 3):
            (folder / f"rank_{rank}").rename(tmp_path / f"away_{rank}")
        expected = [f"{lost} does not exist (and those of 1 more ranks)"]
    elif fault == "strategy":
        (tmp_path / "strategy").rename(tmp_path / "away")
        expected = [f"there is no {tmp_path / 'strategy'}", "--adapter_strategy"]
    elif fault == "other plan":
        more = ["--adapter_strategy", write_strategies(tmp_path / "other", layouts_of(adapter, 1, 2, 1, False), 1)]
        expected = ["the strategy is for 2 ranks, but there is a folder rank_2"]
    elif fault == "one slice":
        given = folder / "rank_0/t_rank_0-trainable_params-2_3.ckpt"
        expected = ["the adapter is for [", "the folder that contains rank_0, rank_1"]
    elif fault == "name":
        given = folder / "rank_0/mine.ckpt"
        (folder / "rank_0/t_rank_0-trainable_params-2_3.ckpt").rename(given)
        more = ["--adapter_strategy", tmp_path / "strategy"]
        expected = [f"{given}: the files of the other ranks cannot be derived from this name"]
    else:
        ranks = slices(adapter, *PLANS["dp2 mp2"])
        write_ranks(folder, {1: {name: part[:-1] for name, part in ranks[1].items()}})
        expected = ["rank 1 has shape [", "the strategy expects ["]
    arguments = ["--adapter", given, *more]
    line = command_error(capsys, merge_lora, ["--base", base, *arguments, "--output", tmp_path / "out.ckpt"])
    assert all(part in line for part in expected), line
    assert not list(tmp_path.glob("out.ckpt*"))
    if fault != "one slice":
        line = command_error(capsys, convert_lora, ["export", *arguments, "--peft_dir", tmp_path / "peft",
                                                    "--model_name", "telechat_12b"])
        assert all(part in line for part in expected), line


@pytest.mark.parametrize("family", HF_CONFIGS)
def test_merged_and_exported_slices_equal_the_uncut_adapter(family, tmp_path):
    """Files of the merged checkpoint and of PEFT, byte for byte."""
    variant = variant_from_hf(HF_CONFIGS[family])
    adapter, plan = random_adapter(variant), PLANS["dp2 mp2"]
    (tmp_path / "whole").mkdir()
    save_adapter(tmp_path / "whole/a.ckpt", adapter)
    write_strategies(tmp_path / "strategy", layouts_of(adapter, *plan), 1)
    folder = write_ranks(tmp_path / "checkpoint_trainable", slices(adapter, *plan))
    rng = np.random.default_rng(5)
    convert_lora.write_tensors(tmp_path / "base.ckpt", {
        param.ms_name: rng.normal(size=param.shape).astype(np.float32) for param in lora.parameters(variant)}, {})
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIGS[family]))
    for given, name in ((tmp_path / "whole/a.ckpt", "one"), (folder, "two")):
        assert merge_lora.main(["--base", str(tmp_path / "base.ckpt"), "--adapter", str(given), "--output",
                                str(tmp_path / f"{name}.ckpt")]) == 0
        assert convert_lora.main(["export", "--adapter", str(given), "--peft_dir", str(tmp_path / name), "--config",
                                  str(tmp_path / "config.json")]) == 0
    assert (tmp_path / "one.ckpt").read_bytes() == (tmp_path / "two.ckpt").read_bytes()
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["7b", "52b", "telechat2_gqa"])
def test_merged_slices_give_the_logits_of_the_lora_cells(family, tmp_path):
    """The uncut adapter in MindFormers' cells against the checkpoint merged from slices over four ranks."""
    import mindspore as ms
    from mindformers.pet import get_pet_model

    from research.telechat.bridge.compat import set_output_path
    set_output_path(str(tmp_path))
    hf = HF_CONFIGS[family]
    weights, adapter = random_official(hf), random_adapter(variant_from_hf(hf))
    ids = np.random.default_rng(2).integers(4, hf["vocab_size"], (2, 12))
    model = build_model(hf, weights)
    ms.save_checkpoint(model, str(tmp_path / "base.ckpt"))
    tuned = get_pet_model(model, {"pet_type": "lora", "lora_rank": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0,
                                  "target_modules": "w"})
    for param in tuned.trainable_params():
        param.set_data(ms.Tensor(lora.mindspore_tensors(adapter)[param.name]))
    tuned.set_train(False)
    write_strategies(tmp_path / "strategy", layouts_of(adapter, *PLANS["dp2 mp2, optimizer"]), 1)
    folder = write_ranks(tmp_path / "checkpoint_trainable", slices(adapter, *PLANS["dp2 mp2, optimizer"]))
    assert merge_lora.main(["--base", str(tmp_path / "base.ckpt"), "--adapter", str(folder), "--output",
                            str(tmp_path / "merged.ckpt")]) == 0
    merged = build_model(hf, weights)
    assert ms.load_param_into_net(merged, ms.load_checkpoint(str(tmp_path / "merged.ckpt"))) == ([], [])
    np.testing.assert_allclose(logits_of(merged, ids), logits_of(tuned, ids), atol=2e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("ascend_plugin")
@pytest.mark.parametrize("fused", [False, True])
def test_the_compiler_cuts_adapters_like_this(fused, tmp_path):
    """The strategy that MindSpore's compiler writes for a LoRA recipe, dp2 mp2 with a sharded optimizer."""
    from compile_fixtures import compiled
    from plan_fixtures import small_recipe
    more = {"fused_projections": True, "out_proj_has_bias": False} if fused else {}
    pet = {"pet_type": "lora", "lora_rank": 64, "lora_alpha": ALPHA, "lora_dropout": 0.0, "param_init_type": "float32",
           "target_modules": ".*w_qkv|.*w_gate_hidden|.*wo|.*w2" if fused else ".*wq|.*wk_v|.*wo|.*w1|.*w2|.*w3"}
    plan, _ = compiled(small_recipe(dp=2, mp=2, model={"tie_word_embeddings": False, "pet_config": pet, **more}),
                       keep=tmp_path)
    rng = np.random.default_rng(6)
    pairs = {}
    for layer in range(2):
        for weight in plan.layer_weights():
            if weight.columns > 1 and "norm" not in weight.name:
                pairs[f"model.layers.{layer}.{weight.name}"] = (
                    rng.normal(size=(64, weight.columns)).astype(np.float32),
                    rng.normal(size=(weight.rows, 64)).astype(np.float32))
    adapter = lora.Adapter(pairs, ALPHA)
    folder = write_ranks(tmp_path / "checkpoint_trainable", slices(adapter, 2, 2, 1, True))
    equal_adapters(lora.read_adapter(folder, strategy=tmp_path / "output/strategy"), adapter)


def test_commands_without_mindspore(run_folder, tmp_path):
    """Reading strategies imports no MindSpore."""
    make, _ = run_folder
    folder = make("mp2")
    code = ("import sys; from pathlib import Path; from research.telechat.checkpoint.lora import read_adapter; "
            f"read_adapter(Path({str(folder)!r})); assert 'mindspore' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
    assert open_mindspore(folder / "rank_0/t_rank_0-trainable_params-2_3.ckpt").tensors
