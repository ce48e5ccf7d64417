"""Conversion from and to PyTorch's .bin files: both formats of them, shards, odd tensors, code in them, no torch."""
import json
import os
import pickle
import sys

import numpy as np
import pytest
from checkpoint_fixtures import (
    Raw,
    assert_same,
    mindspore_tensors,
    official_tensors,
    read_safetensors,
    small_variant,
    write_official,
)
from convert_fixtures import error_of, to_ms, to_torch

from research.telechat.checkpoint import torch_bin as checkpoint_torch_bin
from research.telechat.checkpoint.plain_bin import open_plain_bin
from research.telechat.spec.hf_config import hf_config


@pytest.fixture
def model(tmp_path):
    """(variant, tensors, official folder of three shards) of a small 12B."""
    variant = small_variant("telechat_12b")
    tensors = official_tensors(variant)
    return variant, tensors, write_official(tmp_path / "hf", variant, tensors, shards=3)


def write_bin(folder, variant, tensors, **options):
    torch = pytest.importorskip("torch")
    dtypes = {"F16": (torch.float16, np.int16), "BF16": (torch.bfloat16, np.int16), "F32": (torch.float32, np.int32)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config(variant)))
    torch.save({name: torch.from_numpy(np.array(raw.bits).view(dtypes[raw.dtype][1])).view(dtypes[raw.dtype][0])
                for name, raw in tensors.items()}, folder / "pytorch_model.bin", **options)
    return folder


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_bin_files_of_both_formats_convert(zipped, dtype, tmp_path, capsys):
    variant = small_variant("telechat_52b")
    tensors = official_tensors(variant, dtype, any_bits=True)
    source = write_bin(tmp_path / "hf", variant, tensors, _use_new_zipfile_serialization=zipped)
    assert to_ms(source, tmp_path / "x.safetensors", "--verify") == 0
    assert_same(read_safetensors(tmp_path / "x.safetensors"), mindspore_tensors(variant, tensors))
    assert ("before 1.6" in capsys.readouterr().out) is not zipped


def test_bin_is_written_in_shards_that_torch_reads(tmp_path):
    torch = pytest.importorskip("torch")
    variant = small_variant("telechat_52b")
    tensors = official_tensors(variant, "BF16", any_bits=True)
    source = write_official(tmp_path / "hf", variant, tensors)
    assert to_ms(source, tmp_path / "x.safetensors") == 0
    assert to_torch(tmp_path / "x.safetensors", tmp_path / "back", "--format", "bin", "--max_shard_size", "3KB",
                    "--verify") == 0
    index = json.loads((tmp_path / "back" / "pytorch_model.bin.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2 and shards[0] == f"pytorch_model-00001-of-{len(shards):05d}.bin"
    found = {}
    for shard in shards:
        state = torch.load(tmp_path / "back" / shard, weights_only=True)
        assert all(index["weight_map"][name] == shard for name in state)
        found.update({name: Raw("BF16", t.view(torch.int16).numpy().view(np.uint16)) for name, t in state.items()})
    assert_same(found, tensors)
    assert to_ms(tmp_path / "back", tmp_path / "again.safetensors") == 0
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "x.safetensors").read_bytes()


def test_strided_and_shared_tensors_of_a_bin_are_read_right(tmp_path):
    torch = pytest.importorskip("torch")
    variant = small_variant("telechat_7b")
    tensors = official_tensors(variant)
    folder = write_bin(tmp_path / "hf", variant, tensors)
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    name = "h.0.mlp.gate_proj.weight"
    state[name] = state[name].t().contiguous().t()
    state["lm_head.weight"] = state["word_embeddings.weight"]
    torch.save(state, folder / "pytorch_model.bin")
    assert to_ms(folder, tmp_path / "x.safetensors") == 0
    assert_same(read_safetensors(tmp_path / "x.safetensors"), mindspore_tensors(variant, tensors))


class _Attack:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_code_in_a_bin_is_not_run(model, tmp_path, capfd, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    for path in model[2].glob("*.safetensors*"):
        path.unlink()
    file = model[2] / "pytorch_model.bin"
    for content in (pickle.dumps({"x": _Attack()}), b"PK\x03\x04junk", b"", b"junk"):
        file.write_bytes(content)
        assert "pytorch_model.bin" in error_of(capfd, to_ms(model[2], tmp_path / "x.ckpt"))
    import torch
    torch.save([1, 2], file)
    assert "not a dictionary of tensors" in error_of(capfd, to_ms(model[2], tmp_path / "x.ckpt"))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_weights_alone_are_read_without_torch(dtype, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    variant = small_variant("telechat_52b")
    tensors = official_tensors(variant, dtype, any_bits=True)
    folder = write_bin(tmp_path / "hf", variant, tensors)
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    name = "transformer.ln_f.weight" if "transformer.ln_f.weight" in state else next(iter(state))
    state[name] = torch.nn.Parameter(torch.cat([state[name], state[name]])[len(state[name]):])   # behind others
    torch.save(state, folder / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert to_ms(folder, tmp_path / "x.safetensors") == 0
    assert_same(read_safetensors(tmp_path / "x.safetensors"), mindspore_tensors(variant, tensors))


def test_all_but_weights_is_left_to_torch(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    file, weight = tmp_path / "x.bin", torch.arange(6.0).reshape(2, 3)
    torch.save({"weight": weight}, file)
    whole = file.read_bytes()
    assert open_plain_bin([file]).tensors["weight"].shape == (2, 3)
    for content in ({"weight": weight.t()}, {"weight": weight.double()}, {"weight": weight, "epoch": 3}, [weight],
                    {"state_dict": {"weight": weight}}, {"weight": weight, "x": _Attack()}, {}):
        torch.save(content, file)
        assert open_plain_bin([file]) is None, content
    torch.save({"weight": weight}, file, _use_new_zipfile_serialization=False)
    assert open_plain_bin([file]) is None
    for damaged in (whole[:-30], whole[:len(whole) // 2], whole.replace(b"little", b"bigbig"), b""):
        file.write_bytes(damaged)
        assert open_plain_bin([file]) is None
    assert not (tmp_path / "executed").exists()


def test_without_torch_the_extra_is_named(model, tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    for path in model[2].glob("*.safetensors*"):
        path.unlink()
    (model[2] / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    assert "pip install 'telechat-mindspore[torch]'" in error_of(capfd, to_ms(model[2], tmp_path / "x.ckpt"))
    with pytest.raises(ValueError, match=r"\[torch\]"):
        checkpoint_torch_bin.import_torch()
