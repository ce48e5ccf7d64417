"""Conversion end to end: what is written, both ways, for every family; what is refused, and how."""
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from checkpoint_fixtures import (
    FAMILIES,
    Raw,
    assert_same,
    from_floats,
    mindspore_tensors,
    official_tensors,
    read_safetensors,
    small_variant,
    write_official,
    write_safetensors,
)
from convert_fixtures import error_of, read_ckpt, to_ms, to_torch
from golden import SHARED, needs_shared
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from research.telechat.checkpoint import stream as stream
from research.telechat.checkpoint import writer as checkpoint_writer
from research.telechat.commands.convert import torch_to_mindspore
from research.telechat.spec.hf_config import hf_config

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = {"telechat_7b": "telechat_7b", "telechat_12b": "telechat_12b", "telechat_52b": "telechat_52b",
          "telechat2_mha": "telechat2_7b", "telechat2_gqa": "telechat2_115b"}


@pytest.fixture
def tiny_chunks(monkeypatch):
    """Chunks, tiles and slices so small that even tiny tensors are cut at every kind of border."""
    monkeypatch.setattr(stream, "CHUNK", 48)
    monkeypatch.setattr(stream, "STREAMED", 48)
    monkeypatch.setattr(stream, "_TILE", 3)
    monkeypatch.setattr(stream, "_CAST_BLOCK", 5)
    monkeypatch.setattr(checkpoint_writer, "SLICE", 100)


# --- what is written ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_becomes_what_the_layout_says(name, tmp_path, tiny_chunks):
    variant = small_variant(name)
    official = official_tensors(variant, "BF16")
    source = write_official(tmp_path / "hf", variant, official, shards=3)
    expected = mindspore_tensors(variant, official)
    assert to_ms(source, tmp_path / "one.safetensors", "--model_name", name, "--verify") == 0
    assert to_ms(source, tmp_path / "one.ckpt", "--model_name", name, "--verify") == 0
    assert to_ms(source, tmp_path / "many", "--format", "safetensors", "--max_shard_size", "2KB") == 0
    assert_same(read_safetensors(tmp_path / "one.safetensors"), expected)
    assert_same(read_ckpt(tmp_path / "one.ckpt"), expected)
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 2
    assert_same(read_safetensors(*shards), expected)
    assert not list(tmp_path.rglob("*.partial*"))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_round_trip_is_bit_exact(data, tmp_path_factory, tiny_chunks):
    name = data.draw(st.sampled_from(FAMILIES))
    heads = data.draw(st.integers(1, 4))
    variant = small_variant(name, layers=data.draw(st.integers(1, 3)), heads=heads,
                            head_dim=2 * data.draw(st.integers(1, 4)), ffn=data.draw(st.integers(1, 13)),
                            vocab=data.draw(st.integers(1, 20)),
                            kv_heads=data.draw(st.sampled_from([n for n in (1, 2, 4) if heads % n == 0])))
    dtype = data.draw(st.sampled_from(["F16", "BF16", "F32"]))
    official = official_tensors(variant, dtype, data.draw(st.integers(0, 999)), any_bits=True)
    folder = tmp_path_factory.mktemp("trip")
    source = write_official(folder / "hf", variant, official, data.draw(st.integers(1, 3)))
    kind = data.draw(st.sampled_from(["x.ckpt", "x.safetensors", "folder"]))
    shard = ["--max_shard_size", data.draw(st.sampled_from(["100B", "1KB", "1GB"]))]
    assert to_ms(source, folder / kind, "--model_name", name, "--format", "safetensors", *shard, "--verify") == 0
    config = ["--config", source] if kind == "x.ckpt" else []
    assert to_torch(folder / kind, folder / "back", "--model_name", name, *config, *shard, "--verify") == 0
    assert_same(read_safetensors(*(folder / "back").glob("*.safetensors")), official)
    assert json.loads((folder / "back" / "config.json").read_text()) == hf_config(variant)
    shutil.rmtree(folder)


@needs_shared
@pytest.mark.parametrize("golden", GOLDEN)
def test_golden_checkpoints_come_back_as_they_were(golden, tmp_path):
    folder, name = SHARED / "golden" / golden, GOLDEN[golden]
    assert to_ms(folder, tmp_path / "a.ckpt", "--model_name", name, "--verify", "--source_format", "safetensors") == 0
    assert to_torch(tmp_path / "a.ckpt", tmp_path / "back", "--model_name", name, "--config", folder) == 0
    official = read_safetensors(folder / "model.safetensors")
    assert_same(read_safetensors(tmp_path / "back" / "model.safetensors"), official)
    configs = [json.loads((place / "config.json").read_text()) for place in (tmp_path / "back", folder)]
    assert configs[0] == configs[1]
    pytest.importorskip("torch")
    assert to_ms(folder, tmp_path / "b.ckpt", "--model_name", name, "--source_format", "bin") == 0
    assert (tmp_path / "a.ckpt").read_bytes() == (tmp_path / "b.ckpt").read_bytes()


def test_dtype_is_kept_for_each_tensor_unless_told(tmp_path):
    variant = small_variant("telechat_12b")
    official = official_tensors(variant, "F32")
    mixed = {name: from_floats("BF16", raw.bits.view(np.float32)) if raw.bits.ndim == 2 else raw
             for name, raw in official.items()}
    source = write_official(tmp_path / "hf", variant, mixed)
    assert to_ms(source, tmp_path / "kept.safetensors") == 0
    assert_same(read_safetensors(tmp_path / "kept.safetensors"), mindspore_tensors(variant, mixed))
    assert to_ms(source, tmp_path / "wide.ckpt", "--dtype", "fp32") == 0
    wide = {name: Raw("F32", raw.bits.astype(np.uint32) << 16) if raw.dtype == "BF16" else raw
            for name, raw in mixed.items()}
    assert_same(read_ckpt(tmp_path / "wide.ckpt"), mindspore_tensors(variant, wide))


def test_numbers_beyond_float16_are_counted(tmp_path, capsys):
    variant = small_variant("telechat_12b")
    official = official_tensors(variant, "F32")
    official["lm_head.weight"].bits.view(np.float32)[0, :3] = [7e4, -7e4, np.inf]
    source = write_official(tmp_path / "hf", variant, official)
    assert to_ms(source, tmp_path / "x.ckpt", "--dtype", "float16") == 0
    out = capsys.readouterr().out
    assert "2 values were too large for float16 and became infinite, in lm_head.weight" in out
    assert "0 NaN and 1 infinite values in 1 tensors of the input: lm_head.weight" in out


def test_nan_and_infinity_are_counted_and_can_stop_it(tmp_path, capfd):
    variant = small_variant("telechat_7b")
    official = official_tensors(variant, "BF16")
    official["h.1.mlp.up_proj.weight"].bits[2, :3] = 0x7FC1
    official["ln_f.weight"].bits[5] = 0xFF80
    source = write_official(tmp_path / "hf", variant, official)
    assert to_ms(source, tmp_path / "x.ckpt") == 0
    assert ("WARNING: 3 NaN and 1 infinite values in 2 tensors of the input: h.1.mlp.up_proj.weight "
            "(3 NaN, 0 infinite), ln_f.weight (0 NaN, 1 infinite)") in capfd.readouterr().out
    message = error_of(capfd, to_ms(source, tmp_path / "out" / "y.ckpt", "--strict"))
    assert "3 NaN" in message and not (tmp_path / "out").exists()


def test_a_folder_gets_mindspore_ckpt_and_the_config(tmp_path):
    variant = small_variant("telechat_12b")
    source = write_official(tmp_path / "hf", variant, official_tensors(variant))
    assert to_ms(source, tmp_path / "out") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "mindspore.ckpt",
                                                                      "telechat_manifest.json"]
    assert to_torch(tmp_path / "out", tmp_path / "back") == 0               # finds sizes and model in config.json
    before = (source / "config.json").read_bytes()
    assert to_ms(source, source) == 0                                       # next to the input, as was common
    assert (source / "mindspore.ckpt").is_file() and (source / "config.json").read_bytes() == before


def test_shards_have_an_index_that_both_worlds_read(tmp_path):
    variant = small_variant("telechat_12b")
    source = write_official(tmp_path / "hf", variant, official_tensors(variant))
    assert to_ms(source, tmp_path / "ms", "--format", "safetensors", "--max_shard_size", "3KB") == 0
    assert to_torch(tmp_path / "ms", tmp_path / "back", "--max_shard_size", "3KB") == 0
    for folder, names in ((tmp_path / "ms", ("param_name_map.json", "model.safetensors.index.json")),
                          (tmp_path / "back", ("model.safetensors.index.json",))):
        shards = sorted(path.name for path in folder.glob("*.safetensors"))
        assert shards == [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
        for name in names:
            index = json.loads((folder / name).read_text())
            held = {key: path.name for path in folder.glob("*.safetensors") for key in read_safetensors(path)}
            assert index["weight_map"] == held
            assert index["metadata"]["total_size"] == sum(
                raw.bits.nbytes for raw in read_safetensors(*folder.glob("*.safetensors")).values())


def test_sizes_come_from_shapes_where_nothing_else_tells(tmp_path, capfd, monkeypatch):
    variant = small_variant("telechat_12b")
    official = official_tensors(variant)
    source = write_official(tmp_path / "hf", variant, official)
    (source / "config.json").unlink()
    assert "--model_name is needed" in error_of(capfd, to_ms(source, tmp_path / "x.ckpt"))
    message = error_of(capfd, to_ms(source, tmp_path / "x.ckpt", "--model_name", "telechat_12b"))
    assert "expected [120000, 5120]" in message
    write_safetensors(tmp_path / "x.safetensors", mindspore_tensors(variant, official))
    message = error_of(capfd, to_torch(tmp_path / "x.safetensors", tmp_path / "back", "--model_name", "telechat_12b"))
    assert "hidden size 24, telechat_12b has 5120" in message and "--config" in message
    from research.telechat.spec import variants as spec_variants
    monkeypatch.setitem(spec_variants.VARIANTS, "telechat_12b", replace(variant, num_layers=9, vocab_size=7))
    assert to_torch(tmp_path / "x.safetensors", tmp_path / "back", "--model_name", "telechat_12b") == 0
    assert_same(read_safetensors(tmp_path / "back" / "model.safetensors"), official)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["n_layer"] == 2


def test_a_copied_tied_head_is_dropped_and_another_one_refused(tmp_path, capfd):
    variant = small_variant("telechat_7b")
    official = official_tensors(variant)
    official["lm_head.weight"] = official["word_embeddings.weight"]
    source = write_official(tmp_path / "hf", variant, official)
    assert to_ms(source, tmp_path / "x.safetensors") == 0
    assert "left out: lm_head.weight, equal to word_embeddings.weight" in capfd.readouterr().out
    assert "lm_head.weight" not in read_safetensors(tmp_path / "x.safetensors")
    official["lm_head.weight"] = Raw("F16", official["word_embeddings.weight"].bits ^ 1)
    write_official(source, variant, official)
    assert "differs from word_embeddings.weight" in error_of(capfd, to_ms(source, tmp_path / "y.ckpt"))


def test_buffers_are_left_out_and_counted(tmp_path, capsys):
    variant = small_variant("telechat_52b")
    source = write_official(tmp_path / "hf", variant, official_tensors(variant))
    assert to_ms(source, tmp_path / "x.ckpt") == 0
    assert "2 entries, transformer.h.{0-1}.attn.masked_bias" in capsys.readouterr().out


def test_mp_is_accepted_and_explained(tmp_path, capsys):
    variant = small_variant("telechat_52b")
    source = write_official(tmp_path / "hf", variant, official_tensors(variant))
    assert to_ms(source, tmp_path / "a.ckpt", "--mp", 4) == 0
    assert "--mp 4: accepted and not needed" in capsys.readouterr().out
    assert to_ms(source, tmp_path / "b.ckpt") == 0
    assert (tmp_path / "a.ckpt").read_bytes() == (tmp_path / "b.ckpt").read_bytes()


# --- 52B checkpoints of earlier converters ----------------------------------------------------------------------------


def trained_52b(heads=8, head_dim=16, ffn=64):
    """A small 52B whose q, k and v rows differ in size, as those of trained models do."""
    variant = small_variant("telechat_52b", heads=heads, head_dim=head_dim, ffn=ffn)
    official = official_tensors(variant, "F32")
    for name, raw in official.items():
        if "c_attn" in name:
            scale = np.repeat([1.0, 1.3, 0.4], variant.hidden_size)
            official[name] = from_floats("F32", raw.bits.view(np.float32) * scale)
    return variant, official


@pytest.mark.parametrize("degree", [1, 2, 4, 8])
def test_baked_checkpoints_are_imported_with_their_degree(degree, tmp_path):
    variant, official = trained_52b()
    old = tmp_path / "old.safetensors"
    write_safetensors(old, mindspore_tensors(variant, official, mp=degree), {"format": "ms"})
    config = tmp_path / "config.json"
    config.write_text(json.dumps(hf_config(variant)))
    assert to_torch(old, tmp_path / "back", "--source_mp", degree, "--verify") == 0
    assert_same(read_safetensors(tmp_path / "back" / "model.safetensors"), official)
    assert torch_to_mindspore(["--from_mindspore", str(old), "--source_mp", str(degree), "--verify",
                                            "--mindspore_path", str(tmp_path / "new.safetensors")]) == 0
    assert_same(read_safetensors(tmp_path / "new.safetensors"), mindspore_tensors(variant, official))


def test_a_wrong_degree_is_detected(tmp_path, capfd):
    variant, official = trained_52b()
    (tmp_path / "config.json").write_text(json.dumps(hf_config(variant)))
    old, new = tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    write_safetensors(old, mindspore_tensors(variant, official, mp=2))
    for options in ([], ["--source_mp", 4], ["--source_mp", 1]):
        message = error_of(capfd, to_torch(old, tmp_path / "back", *options))
        assert "ordered as for --source_mp 2" in message and not (tmp_path / "back").exists()
    assert "--source_mp 3 does not divide" in error_of(capfd, to_torch(old, tmp_path / "back", "--source_mp", 3))
    assert to_torch(old, tmp_path / "hf", "--source_mp", 2) == 0
    assert to_ms(tmp_path / "hf", new) == 0
    assert "written by this converter" in error_of(capfd, to_torch(new, tmp_path / "back", "--source_mp", 2))
    ours = tmp_path / "ours.ckpt"
    assert to_ms(tmp_path / "hf", ours) == 0
    assert "this project's order" in error_of(capfd, to_torch(ours, tmp_path / "back", "--source_mp", 2))
    message = error_of(capfd, to_ms(tmp_path / "hf", ours, "--source_mp", 2))
    assert "--source_mp belongs to --from_mindspore" in message


def test_an_untrained_model_shows_no_degree_and_that_is_said(tmp_path, capfd):
    variant = small_variant("telechat_52b", heads=8, head_dim=16, ffn=64)
    official = official_tensors(variant, "F32")
    (tmp_path / "config.json").write_text(json.dumps(hf_config(variant)))
    write_safetensors(tmp_path / "old.safetensors", mindspore_tensors(variant, official, mp=2))
    assert to_torch(tmp_path / "old.safetensors", tmp_path / "back", "--source_mp", 2) == 0
    assert "--source_mp 2 could not be confirmed" in capfd.readouterr().out


def test_source_mp_is_refused_for_models_without_fused_weights(tmp_path, capfd):
    variant = small_variant("telechat_12b")
    (tmp_path / "config.json").write_text(json.dumps(hf_config(variant)))
    write_safetensors(tmp_path / "x.safetensors", mindspore_tensors(variant, official_tensors(variant)))
    message = error_of(capfd, to_torch(tmp_path / "x.safetensors", tmp_path / "back", "--source_mp", 2))
    assert "for models with fused projections" in message


# --- as a user starts them --------------------------------------------------------------------------------------------


def test_commands_start_from_anywhere_without_mindspore_or_torch(tmp_path):
    variant = small_variant("telechat_7b")
    write_official(tmp_path / "hf", variant, official_tensors(variant))
    code = ("import sys, runpy\nsys.argv = sys.argv[1:]\n"
            "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
            "except SystemExit as err:\n    assert not err.code, err.code\n"
            "assert not {'torch', 'mindspore', 'mindformers', 'transformers'} & set(sys.modules)\n")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    for script, options in (("torch_to_ms", ["--torch_path", "hf", "--mindspore_path", "x.ckpt"]),
                            ("ms_to_torch", ["--mindspore_path", "x.ckpt", "--torch_path", "back", "--config", "hf"])):
        done = subprocess.run([sys.executable, "-c", code, str(ROOT / f"research/telechat/convert_weight_{script}.py"),
                               "--model_name", "telechat_7b", *options], cwd=tmp_path, env=environment,
                              capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "back" / "model.safetensors").is_file()
