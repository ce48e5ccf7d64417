"""LoRA: patterns, training through the Trainer, merging, and the format of PEFT, all against independent arithmetic."""
import json
from pathlib import Path

import numpy as np
import pytest
from lora_fixtures import ALPHA, RANK, command_error, random_adapter, save_adapter
from model_fixtures import HF_CONFIGS, build_model, logits_of, loss_of, random_official

from research.telechat.checkpoint import lora
from research.telechat.checkpoint.folder import open_mindspore
from research.telechat.checkpoint.manifest import load_manifest
from research.telechat.checkpoint.reader import open_safetensors
from research.telechat.commands import convert, merge_lora
from research.telechat.commands import peft as convert_lora
from research.telechat.common.errors import CheckpointError, ConfigError
from research.telechat.spec.variants import get_variant, variant_from_hf

pytestmark = pytest.mark.matrix

ROOT = Path(__file__).resolve().parents[2]


def test_patterns_are_matched_as_mindformers_does():
    dense, fused = get_variant("telechat_12b"), get_variant("telechat_52b")
    assert lora.check_target_modules(".*wq|.*wk_v|.*wo", dense) == []
    assert lora.check_target_modules("w1|w2|w3", dense) == []
    assert lora.check_target_modules(".*w_qkv|.*w_gate_hidden", fused) == []
    assert lora.check_target_modules(".*wq|.*wv", dense) == [".*wv"]


@pytest.mark.parametrize(("pattern", "name", "words"), [
    (".*q_proj", "telechat_12b", "wq, wk_v, wo, w1, w3, w2"), (".*wq", "telechat_52b", "w_qkv, wo, w_gate_hidden, w2"),
    (".*", "telechat_12b", "container 'layers'"), (".*w.*", "telechat_12b", "container 'feed_forward'"),
    ("(", "telechat_12b", "not a valid pattern"), (None, "telechat_12b", "must be a pattern")])
def test_pattern_that_matches_nothing_lists_what_could_be_matched(pattern, name, words):
    with pytest.raises(ConfigError, match="target_modules") as caught:
        lora.check_target_modules(pattern, get_variant(name))
    assert words in str(caught.value)


@pytest.mark.parametrize(("key", "value"), [("lora_rank", 0), ("lora_rank", "8"), ("lora_alpha", -1),
                                            ("lora_dropout", 1.0), ("pet_type", "ptuning")])
def test_bad_pet_config_names_the_key(key, value):
    config = {"pet_type": "lora", "target_modules": ".*wq", key: value}
    with pytest.raises(ConfigError, match=f"pet_config.{key}"):
        lora.check_pet_config(config, get_variant("telechat_12b"))


@pytest.mark.parametrize("family", HF_CONFIGS)
def test_peft_format_there_and_back_is_exact(family, tmp_path):
    variant = variant_from_hf(HF_CONFIGS[family])
    save_adapter(tmp_path / "a.ckpt", random_adapter(family))
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIGS[family]))
    sizes = ["--config", str(tmp_path / "config.json")]
    peft = ["--peft_dir", str(tmp_path / "peft")]
    assert convert_lora.main(["export", "--adapter", str(tmp_path / "a.ckpt"), *peft, *sizes]) == 0
    assert convert_lora.main(["import", "--adapter", str(tmp_path / "b.safetensors"), *peft, *sizes]) == 0
    one, two = lora.read_adapter(tmp_path / "a.ckpt"), lora.read_adapter(tmp_path / "b.safetensors")
    assert one.pairs.keys() == two.pairs.keys() == {param.ms_name for param in lora.target_params(variant)}
    assert one.alpha == two.alpha == ALPHA
    for name, pair in one.pairs.items():
        assert all(np.array_equal(*both) for both in zip(pair, two.pairs[name])), name
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["fan_in_fan_out"]) == (RANK, ALPHA, variant.fused_projections)
    names = open_safetensors([tmp_path / "peft" / "adapter_model.safetensors"]).tensors
    modules = {name.rsplit(".lora_", 1)[0][len("base_model.model.transformer."):] for name in names}
    # PEFT looks for modules whose path ends in one of target_modules: exactly the adapted ones must do so.
    official = [param.hf_name.replace("transformer.", "", 1)[:-len(".weight")]
                for param in lora.parameters(variant) if param.hf_name.endswith(".weight")]
    met = {name for name in official if any(name.endswith(f".{end}") for end in config["target_modules"])}
    assert met == modules


@pytest.mark.slow
@pytest.mark.parametrize("family", ["7b", "52b", "telechat2_gqa"])
def test_adapter_merged_and_exported_gives_the_same_logits(family, tmp_path):
    """Four ways to the same logits: LoRA cells, merged checkpoint, PEFT's formula on the official weights."""
    import mindspore as ms
    import reference
    from mindformers.pet import get_pet_model

    from research.telechat.bridge.compat import set_output_path
    set_output_path(str(tmp_path))
    hf, weights, adapter = HF_CONFIGS[family], random_official(HF_CONFIGS[family]), random_adapter(family)
    ids = np.random.default_rng(2).integers(4, hf["vocab_size"], (2, 12))
    model = build_model(hf, weights)
    ms.save_checkpoint(model, str(tmp_path / "base.ckpt"))
    plain = logits_of(model, ids)
    tuned = get_pet_model(model, {"pet_type": "lora", "lora_rank": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0,
                                  "target_modules": "w"})
    assert {param.name for param in tuned.trainable_params()} == set(lora.mindspore_tensors(adapter))
    for param in tuned.trainable_params():
        param.set_data(ms.Tensor(lora.mindspore_tensors(adapter)[param.name]))
    tuned.set_train(False)
    with_cells = logits_of(tuned, ids)
    assert np.abs(with_cells - plain).max() > 0.1
    save_adapter(tmp_path / "a.ckpt", adapter)
    assert merge_lora.main(["--base", str(tmp_path / "base.ckpt"), "--adapter", str(tmp_path / "a.ckpt"),
                            "--output", str(tmp_path / "merged.ckpt")]) == 0
    merged = build_model(hf, weights)
    assert ms.load_param_into_net(merged, ms.load_checkpoint(str(tmp_path / "merged.ckpt"))) == ([], [])
    np.testing.assert_allclose(logits_of(merged, ids), with_cells, atol=2e-4)
    tensors, config = lora.to_peft(adapter, variant_from_hf(hf), tmp_path)
    official = dict(weights)
    for param in lora.target_params(variant_from_hf(hf)):
        stem = "base_model.model.transformer." + param.hf_name.replace("transformer.", "", 1)[:-len(".weight")]
        delta = config["lora_alpha"] / config["r"] * tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]
        official[param.hf_name] = official[param.hf_name] + (delta.T if config["fan_in_fan_out"] else delta)
    expected, _ = reference.forward(hf, official, ids)
    np.testing.assert_allclose(with_cells, expected, atol=2e-3)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_merging_keeps_the_type_and_streams_blocks(dtype, tmp_path, monkeypatch):
    from research.telechat.checkpoint.dtypes import cast
    from research.telechat.checkpoint.writer import OutputFile, OutTensor, publish, safetensors_layout
    rng = np.random.default_rng(0)
    values = {"model.layers.0.attention.wq.weight": rng.normal(size=(40, 16)).astype(np.float32),
              "model.norm_out.weight": rng.normal(size=16).astype(np.float32)}
    raw = {name: cast(value.view(np.uint32), "F32", dtype) for name, value in values.items()}
    layout = safetensors_layout(tmp_path / "base.safetensors",
                                [OutTensor(name, dtype, value.shape) for name, value in values.items()],
                                {"format": "ms", "telechat_groups": "per_head"})
    file = OutputFile(layout, 0)
    for name, value in raw.items():
        file.write(name, 0, memoryview(value.tobytes()))
    file.finish()
    publish([layout])
    a, b = rng.normal(size=(2, 16)).astype(np.float32), rng.normal(size=(40, 2)).astype(np.float32)
    save_adapter(tmp_path / "a.ckpt", lora.Adapter({"model.layers.0.attention.wq.weight": (a, b)}, 4.0))
    monkeypatch.setattr(merge_lora, "BLOCK", 3 * 16 * 2)                      # three rows at a time
    assert merge_lora.main(["--base", str(tmp_path / "base.safetensors"), "--adapter", str(tmp_path / "a.ckpt"),
                            "--output", str(tmp_path / "out.safetensors")]) == 0
    merged = open_mindspore(tmp_path / "out.safetensors")
    assert merged.metadata["telechat_groups"] == "per_head"
    assert {info.dtype for info in merged.tensors.values()} == {dtype}
    base = cast(raw["model.layers.0.attention.wq.weight"], dtype, "F32").view(np.float32)
    expected = cast((base + np.float32(2.0) * (b @ a)).view(np.uint32), "F32", dtype)
    found = lora.read_float32(merged, "model.layers.0.attention.wq.weight")
    np.testing.assert_allclose(found, cast(expected, dtype, "F32").view(np.float32), rtol=1e-2)
    norm = lora.read_float32(merged, "model.norm_out.weight")
    assert np.array_equal(norm, cast(raw["model.norm_out.weight"], dtype, "F32").view(np.float32))


def test_mistakes_are_one_line_and_leave_nothing(capsys, tmp_path):
    adapter = random_adapter("12b")
    save_adapter(tmp_path / "a.ckpt", adapter)
    convert_lora.write_tensors(tmp_path / "base.ckpt", {"model.norm_out.weight": np.ones(32, np.float32)}, {})
    out = ["--output", tmp_path / "out.ckpt"]
    line = command_error(capsys, merge_lora, ["--base", tmp_path / "base.ckpt", "--adapter", tmp_path / "a.ckpt", *out])
    assert "model.layers.0.attention.wq.weight" in line and "lacks" in line
    line = command_error(capsys, merge_lora, ["--base", tmp_path / "a.ckpt", "--adapter", tmp_path / "base.ckpt", *out])
    assert "has no LoRA adapter" in line
    (tmp_path / "adapter_config.json").unlink()
    line = command_error(capsys, merge_lora, ["--base", tmp_path / "base.ckpt", "--adapter", tmp_path / "a.ckpt", *out])
    assert "--lora_alpha" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.ckpt", "base.ckpt"]


def test_an_adapter_is_merged_once(capsys, tmp_path):
    """Onto the merged checkpoint, and onto what is converted from it."""
    from safetensors.numpy import save_file
    adapter = random_adapter("12b")
    save_adapter(tmp_path / "a.ckpt", adapter)
    (tmp_path / "official").mkdir()
    save_file(random_official(HF_CONFIGS["12b"]), tmp_path / "official" / "model.safetensors")
    (tmp_path / "official" / "config.json").write_text(json.dumps(HF_CONFIGS["12b"]))

    def merge(base, output, *more):
        return merge_lora.main(["--base", str(tmp_path / base), "--adapter", str(tmp_path / "a.ckpt"),
                                "--output", str(tmp_path / output), *more])

    def change(source, layout, output):
        assert convert.main(["--from", str(tmp_path / source), "--to", layout, str(tmp_path / output)]) == 0
    change("official", "mindspore", "base.ckpt")
    assert merge("base.ckpt", "once.ckpt") == 0
    change("once.ckpt", "official", "exported")
    change("exported", "mindspore", "back.safetensors")
    for base in ("once.ckpt", "back.safetensors"):
        capsys.readouterr()
        assert merge(base, "twice.ckpt") == 1
        assert "already has the adapter" in capsys.readouterr().err and not (tmp_path / "twice.ckpt").exists()
    assert merge("once.ckpt", "twice.ckpt", "--again") == 0
    assert load_manifest(tmp_path / "twice.ckpt.manifest.json").model.merged == [adapter.digest] * 2
    assert adapter.digest != lora.Adapter(adapter.pairs, adapter.alpha / 2).digest


def test_peft_adapters_that_are_not_plain_lora_are_refused(tmp_path):
    for key, value in (("use_dora", True), ("use_rslora", True), ("bias", "all"), ("modules_to_save", ["lm_head"])):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8, key: value}))
        with pytest.raises(CheckpointError, match=key):
            lora.read_adapter_config(tmp_path / "adapter_config.json")


@pytest.mark.slow
def test_training_changes_the_adapter_alone(tmp_path):
    """Through the recipe: base weights bit for bit as loaded, the adapter saved alone, the loss of the merged model."""
    import mindspore as ms
    from training_fixtures import SEQ, VOCAB, command, read_log, run, write_records

    from research.telechat.telechat import TelechatForCausalLM
    from research.telechat.telechat_config import TelechatConfig
    rows = np.random.default_rng(0).integers(4, VOCAB, (8, SEQ + 1))
    write_records(tmp_path / "data.mindrecord", rows)
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
    model = TelechatForCausalLM(TelechatConfig(
        net_name="telechat_12b", amp_level="O0", seq_length=SEQ, vocab_size=VOCAB, num_layers=2, hidden_size=64,
        intermediate_size=96, num_heads=4))
    ms.save_checkpoint(model, str(tmp_path / "base.ckpt"))
    arguments = command(tmp_path / "data.mindrecord", tmp_path / "out", "--epochs", "2", "--load_checkpoint",
                        str(tmp_path / "base.ckpt"), "--callbacks", "[{type: TelechatTrainingLog}, {type: "
                        "CheckpointMonitor, prefix: t, save_checkpoint_steps: 7, save_trainable_params: true}]")
    arguments[1] = "research/telechat/finetune_telechat_tiny_lora_cpu.yaml"
    run(arguments)
    before = {param.name: param.asnumpy() for param in model.get_parameters()}
    after = ms.load_checkpoint(str(tmp_path / "out/checkpoint/rank_0/t_rank_0-2_3.ckpt"))
    for name, value in before.items():
        assert np.array_equal(after[name].asnumpy(), value), name
    adapter_file = tmp_path / "out/checkpoint_trainable/rank_0/t_rank_0-trainable_params-2_3.ckpt"
    saved = ms.load_checkpoint(str(adapter_file))
    assert len(saved) == 2 * 2 * 6 and all("lora" in name for name in saved)
    assert all(np.abs(value.asnumpy()).max() > 0 for name, value in saved.items() if name.endswith("_b"))
    assert merge_lora.main(["--base", str(tmp_path / "base.ckpt"), "--adapter", str(adapter_file),
                            "--output", str(tmp_path / "merged.ckpt")]) == 0
    ms.load_param_into_net(model, ms.load_checkpoint(str(tmp_path / "merged.ckpt")))
    model.set_train(True)
    batch = ms.Tensor(rows[6:8], ms.int32)
    log = read_log(tmp_path / "out")
    assert loss_of(model, batch, batch) == pytest.approx(log[7]["loss"], abs=2e-5)
