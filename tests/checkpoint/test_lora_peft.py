"""Adapters in the format of Hugging Face PEFT, loaded and saved by PEFT itself. Skipped where it is not installed."""
import json

import numpy as np
import pytest
from lora_fixtures import random_adapter, save_adapter
from model_fixtures import HF_CONFIGS, random_official, to_mindspore
from safetensors.numpy import load_file, save_file

from research.telechat.checkpoint import lora as lora
from research.telechat.commands import peft as convert_lora
from research.telechat.commands.convert import main as convert
from research.telechat.spec.parameters import row_order
from research.telechat.spec.variants import variant_from_hf

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")


def module_name(param):
    """Path of the module in the official model, whose decoder is `transformer` even where the files leave that out."""
    name = param.hf_name[:-len(".weight")]
    return name if name.startswith(("transformer.", "lm_head")) else f"transformer.{name}"


def official_modules(family):
    """A PyTorch module with the linear layers of the official model under their official names; no forward pass."""
    from transformers.pytorch_utils import Conv1D
    model = torch.nn.Module()
    model.config = {"model_type": "telechat"}
    model.prepare_inputs_for_generation = None                       # PEFT looks for it in causal language models
    weights = random_official(HF_CONFIGS[family])
    for param in lora.parameters(variant_from_hf(HF_CONFIGS[family])):
        value = torch.from_numpy(weights[param.hf_name].copy())
        if value.ndim != 2 or not param.hf_name.endswith(".weight"):
            continue
        *path, name = module_name(param).split(".")
        place = model
        for part in path:
            if not hasattr(place, part):
                place.add_module(part, torch.nn.Module())
            place = getattr(place, part)
        rows, columns = value.shape
        layer = Conv1D(columns, rows) if param.transposed else torch.nn.Linear(columns, rows, bias=False)
        layer.weight = torch.nn.Parameter(value)
        place.add_module(name, layer)
    return model, weights


@pytest.mark.parametrize("family", HF_CONFIGS)
def test_peft_loads_an_exported_adapter_and_its_own_comes_back(family, tmp_path):
    hf, adapter = HF_CONFIGS[family], random_adapter(family)
    variant = variant_from_hf(hf)
    (tmp_path / "config.json").write_text(json.dumps(hf))
    save_adapter(tmp_path / "a.ckpt", adapter)
    sizes = ["--config", str(tmp_path / "config.json")]
    assert convert_lora.main(["export", "--adapter", str(tmp_path / "a.ckpt"), "--peft_dir", str(tmp_path / "peft"),
                              *sizes]) == 0
    model, weights = official_modules(family)
    tuned = peft.PeftModel.from_pretrained(model, str(tmp_path / "peft"))
    tuned.save_pretrained(str(tmp_path / "saved"))
    tensors, config = lora.to_peft(adapter, variant, tmp_path)
    merged = {name: value.numpy() for name, value in tuned.merge_and_unload().state_dict().items()}
    targets = lora.target_params(variant)
    assert len(targets) == len(adapter.pairs)
    for param in targets:
        stem = f"base_model.model.{module_name(param)}"
        delta = config["lora_alpha"] / config["r"] * tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]
        expected = weights[param.hf_name] + (delta.T if param.transposed else delta)
        np.testing.assert_allclose(merged[f"{module_name(param)}.weight"], expected, atol=1e-5)
    assert convert_lora.main(["import", "--adapter", str(tmp_path / "b.ckpt"), "--peft_dir", str(tmp_path / "saved"),
                              *sizes]) == 0
    back = lora.read_adapter(tmp_path / "b.ckpt")
    assert back.alpha == adapter.alpha and back.pairs.keys() == adapter.pairs.keys()
    for name, pair in adapter.pairs.items():
        assert all(np.array_equal(*both) for both in zip(pair, back.pairs[name])), name


@pytest.mark.parametrize("family", ["12b", "52b", "telechat2_gqa"])
def test_an_adapter_of_the_llama_layout(family, tmp_path):
    """Merged by PEFT into the exported model it is the adapter merged here; PEFT's own copy comes back the same."""
    from transformers import LlamaForCausalLM
    hf, adapter = HF_CONFIGS[family], random_adapter(family)
    (tmp_path / "config.json").write_text(json.dumps(hf))
    save_file({name: np.ascontiguousarray(value) for name, value in random_official(hf).items()},
              tmp_path / "model.safetensors")
    assert convert(["--from", str(tmp_path), "--to", "llama", str(tmp_path / "llama")]) == 0
    save_adapter(tmp_path / "a.ckpt", adapter)
    sizes = ["--config", str(tmp_path / "llama" / "config.json")]
    assert convert_lora.main(["export", "--adapter", str(tmp_path / "a.ckpt"), "--peft_dir", str(tmp_path / "peft"),
                              "--layout", "llama", *sizes]) == 0
    tuned = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "llama"), str(tmp_path / "peft"))
    tuned.save_pretrained(str(tmp_path / "saved"))
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert convert(["--from", str(tmp_path / "merged"), "--to", "mindspore", str(tmp_path / "ms.safetensors")]) == 0
    merged, base = load_file(tmp_path / "ms.safetensors"), to_mindspore(hf, random_official(hf))
    for name, (a, b) in adapter.pairs.items():
        np.testing.assert_allclose(merged[name], base[name] + adapter.alpha / adapter.rank * b @ a, atol=1e-5)
    assert convert_lora.main(["import", "--adapter", str(tmp_path / "b.ckpt"), "--peft_dir", str(tmp_path / "saved"),
                              *sizes]) == 0
    back = lora.read_adapter(tmp_path / "b.ckpt")
    assert back.alpha == adapter.alpha and back.pairs.keys() == adapter.pairs.keys()
    for name, pair in adapter.pairs.items():
        assert all(np.array_equal(*both) for both in zip(pair, back.pairs[name])), name


@pytest.mark.parametrize("family, modules", [
    ("telechat2_gqa", ("q_proj", "k_proj", "v_proj")), ("52b", ("q_proj", "v_proj", "up_proj"))])
def test_an_adapter_trained_on_the_llama_layout(family, modules, tmp_path):
    """Each projection has an A of its own, or none: the products are the same, at a higher rank."""
    variant = variant_from_hf(HF_CONFIGS[family])
    rng = np.random.default_rng(0)
    tensors, deltas = {}, {}
    for param in lora.target_params(variant):
        parts = []
        for name in param.llama_names:
            module, rows = name[:-len(".weight")], param.shape[0] // len(param.llama_names)
            a, b = rng.normal(size=(4, param.shape[1])), rng.normal(size=(rows, 4))
            adapted = module.rpartition(".")[2] in modules
            if adapted:
                tensors[f"base_model.model.{module}.lora_A.weight"] = a.astype(np.float32)
                tensors[f"base_model.model.{module}.lora_B.weight"] = b.astype(np.float32)
            parts.append(2.0 * b @ a * adapted)
        order = row_order(param, 1, param.groups_in("mindspore"))
        delta = np.concatenate(parts)
        deltas[param.ms_name] = delta if order is None else delta[order]
    adapter = lora.from_peft(tensors, 8.0, variant, tmp_path)
    assert adapter.rank == 8 and adapter.alpha == 16.0
    for name, delta in deltas.items():
        found = np.zeros_like(delta)
        if name in adapter.pairs:
            a, b = adapter.pairs[name]
            found = adapter.alpha / adapter.rank * b @ a
        np.testing.assert_allclose(found, delta, atol=1e-4)


def test_an_adapter_of_telechat3_has_the_names_of_llama(tmp_path):
    variant = variant_from_hf({"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 24, "vocab_size": 97,
                               "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
                               "rms_norm_eps": 1e-5, "rope_theta": 1e4})
    rng = np.random.default_rng(0)
    pairs = {param.ms_name: (rng.normal(size=(2, param.shape[1])), rng.normal(size=(param.shape[0], 2)))
             for param in lora.target_params(variant)}
    adapter = lora.Adapter(pairs, 4.0)
    tensors, config = lora.to_peft(adapter, variant, tmp_path)
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    back = lora.from_peft(tensors, 4.0, variant, tmp_path)
    assert back.alpha == 4.0 and all(np.array_equal(*both) for name, pair in pairs.items()
                                     for both in zip(pair, back.pairs[name]))
