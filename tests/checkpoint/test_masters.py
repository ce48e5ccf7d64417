"""Checkpoints with remainders: conversion takes the float32 values, and a resumed run says what it makes of others."""
import numpy as np
import pytest
from checkpoint_fixtures import mindspore_tensors, official_tensors, read_safetensors, small_variant
from convert_fixtures import to_torch

from research.telechat.checkpoint.masters import precision_note
from research.telechat.common.bfloat16 import round_bfloat16, to_bfloat16
from research.telechat.common.files import write_json
from research.telechat.spec.hf_config import hf_config


def write_ckpt(path, tensors):
    """A .ckpt file of {name: (code, array of its bits)}."""
    import mindspore as ms
    params = []
    for name, (code, bits) in tensors.items():
        if code == "BF16":
            data = ms.Tensor((bits.astype(np.uint32) << 16).view(np.float32)).astype(ms.bfloat16)
        else:
            data = ms.Tensor(bits.view(np.float16 if code == "F16" else np.float32))
        params.append({"name": name, "data": data})
    ms.save_checkpoint(params, str(path))


@pytest.fixture(scope="module", params=["telechat_12b", "telechat_52b"])
def trained(request, tmp_path_factory):
    """(folder with x.ckpt and config.json, official float32 values): matrices with remainders, vectors in float32."""
    folder = tmp_path_factory.mktemp("masters")
    variant = small_variant(request.param)
    official = official_tensors(variant, "F32")
    content = {}
    for name, raw in mindspore_tensors(variant, official).items():
        master = np.ascontiguousarray(raw.bits).view(np.float32) * np.float32(0.02)
        if master.ndim == 1:
            content[name] = ("F32", master.view(np.uint32))
            continue
        stored = round_bfloat16(master)
        content[name] = ("BF16", to_bfloat16(np.ascontiguousarray(stored).view(np.uint32)))
        content[f"adam_m.{name}"] = ("F32", np.zeros(master.shape, np.uint32))
        content[f"adam_r.{name}"] = ("F16", ((master - stored) * 4096).astype(np.float16).view(np.uint16))
    write_ckpt(folder / "x.ckpt", content)
    write_json(folder / "config.json", hf_config(variant))
    return folder, {name: raw.bits.view(np.float32) * np.float32(0.02) for name, raw in official.items()
                    if "masked_bias" not in name}


def test_conversion_takes_the_master_values(trained, tmp_path, capsys):
    folder, official = trained
    assert to_torch(folder / "x.ckpt", tmp_path) == 0
    assert "plus a remainder: their float32 values are used" in capsys.readouterr().out
    found = read_safetensors(tmp_path / "model.safetensors")
    for name, value in official.items():
        assert found[name].dtype == "F32"
        error = np.abs(found[name].bits.view(np.float32).astype(np.float64) - value)
        assert (error <= 2.0 ** -20 * np.abs(value) + 2.0 ** -37).all(), name
        assert np.abs(round_bfloat16(value) - value).max() > 100 * error.max() or value.ndim == 1


def test_conversion_to_bfloat16_gives_the_stored_parameters(trained, tmp_path):
    folder, official = trained
    assert to_torch(folder / "x.ckpt", tmp_path, "--dtype", "bfloat16", "--verify") == 0
    found = read_safetensors(tmp_path / "model.safetensors")
    for name, value in official.items():
        stored = to_bfloat16(np.ascontiguousarray(value, np.float32).view(np.uint32))
        assert found[name].dtype == "BF16" and (found[name].bits != stored).mean() < 0.01, name


@pytest.mark.parametrize(("dtype", "remainder", "words"), [
    ("bfloat16", True, None), ("bfloat16", False, "the remainders are dropped"),
    ("float32", False, "float32 without: the remainders are dropped"),
    ("float16", True, "bfloat16 with remainders, this run in float16 with: the parameters are rounded once")])
def test_precision_of_a_checkpoint_with_remainders(dtype, remainder, words, trained):
    note = precision_note(trained[0] / "x.ckpt", dtype, remainder)
    assert note is None if words is None else words in note and "\n" not in note


@pytest.mark.parametrize(("stored", "dtype", "remainder", "words"), [
    ("F32", "float32", False, None), ("BF16", "bfloat16", False, None),
    ("F32", "bfloat16", True, "the parameters are rounded once, remainders start at zero"),
    ("BF16", "bfloat16", True, "the parameters are used as they are, remainders start at zero"),
    ("BF16", "float32", False, "the parameters are used as they are")])
def test_precision_of_a_checkpoint_without(stored, dtype, remainder, words, tmp_path):
    bits = np.zeros((2, 3), np.uint32 if stored == "F32" else np.uint16)
    write_ckpt(tmp_path / "x.ckpt", {"model.layers.0.attention.wq.weight": (stored, bits)})
    note = precision_note(tmp_path / "x.ckpt", dtype, remainder)
    assert note is None if words is None else note.endswith(words)
