"""The manifest of a checkpoint: what conversion writes into it and takes from it, and what it protects."""
import hashlib
import json
import logging
import random
import time
from dataclasses import asdict, replace

import numpy as np
import pytest
from checkpoint_fixtures import assert_same, official_tensors, read_safetensors, small_variant, write_official
from convert_fixtures import error_of, to_ms, to_torch
from strategy_fixtures import layout, write_strategies

from research.telechat.checkpoint.integrity import check_files
from research.telechat.checkpoint.lora import read_adapter
from research.telechat.checkpoint.manifest import Manifest, find_manifest, load_manifest
from research.telechat.checkpoint.strategy import read_strategy
from research.telechat.commands import peft
from research.telechat.common import verified
from research.telechat.common.errors import CheckpointError
from research.telechat.spec.hf_config import hf_config
from research.telechat.training.save_manifest import ManifestWriter

GENERATION = {"do_sample": False, "temperature": 0.3, "top_k": 5, "repetition_penalty": 1.02, "eos_token_id": [2, 7]}


@pytest.fixture
def official(tmp_path):
    """(variant, tensors, folder) of a small 12B with another epsilon, dropout and generation settings."""
    variant = replace(small_variant("telechat_12b"), rms_norm_eps=2e-5)
    tensors = official_tensors(variant)
    folder = write_official(tmp_path / "hf", variant, tensors)
    (folder / "config.json").write_text(json.dumps({**hf_config(variant), "hidden_dropout": 0.25}))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    (folder / "tokenizer.model").write_bytes(b"a vocabulary")
    return variant, tensors, folder


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("kind,options", [("x.ckpt", []), ("x.safetensors", []), ("folder", []),
                                          ("folder", ["--format", "safetensors", "--max_shard_size", "3KB"])])
def test_all_that_the_source_says_goes_there_and_back(official, tmp_path, kind, options):
    variant, tensors, folder = official
    assert to_ms(folder, tmp_path / "out" / kind, *options) == 0
    manifest = find_manifest(tmp_path / "out" / kind)
    where = manifest.path.parent
    assert manifest.model.to_variant() == variant and manifest.model.generation == GENERATION
    assert manifest.model.tokenizer == {"file": "tokenizer.model", "sha256": digest(folder / "tokenizer.model")}
    assert {name: entry.sha256 for name, entry in manifest.files.items()} == {
        path.name: digest(path) for path in where.iterdir() if path != manifest.path}
    assert to_torch(tmp_path / "out" / kind, tmp_path / "back", "--verify") == 0
    back = tmp_path / "back"
    assert json.loads((back / "config.json").read_text()) == {**hf_config(variant), "hidden_dropout": 0.25}
    assert json.loads((back / "generation_config.json").read_text()) == GENERATION
    assert_same(read_safetensors(back / "model.safetensors"), tensors)
    assert load_manifest(back / "telechat_manifest.json").files.keys() == {
        "config.json", "generation_config.json", "model.safetensors"}


def test_the_same_checkpoint_has_the_same_manifest(official, tmp_path):
    for name in "ab":
        assert to_ms(official[2], tmp_path / name / "x.ckpt") == 0
    one, other = ((tmp_path / name / "x.ckpt.manifest.json").read_bytes() for name in "ab")
    assert one == other


def test_options_that_contradict_the_manifest_stop_the_conversion(official, tmp_path, capfd):
    variant, _, folder = official
    out = tmp_path / "x.ckpt"
    assert to_ms(folder, out, "--model_name", "telechat_12b") == 0
    other = tmp_path / "other.json"
    other.write_text(json.dumps(hf_config(replace(variant, rms_norm_eps=3e-6, training_seqlen=4096))))
    text = error_of(capfd, to_torch(out, tmp_path / "back", "--config", other))
    assert "rms_norm_eps is 3e-06 here and 2e-05 in the checkpoint" in text and "training_seqlen is 4096" in text
    assert not (tmp_path / "back").exists()
    text = error_of(capfd, to_torch(out, tmp_path / "back", "--model_name", "telechat_52b"))
    assert "'telechat_52b' here and 'telechat_12b' in the checkpoint" in text
    for wish, eps in (("recipe", 3e-6), ("checkpoint", 2e-5)):
        assert to_torch(out, tmp_path / wish, "--config", other, "--checkpoint_conflict", wish) == 0
        assert json.loads((tmp_path / wish / "config.json").read_text())["layer_norm_epsilon"] == eps


def test_a_manifest_that_cannot_be_used_is_named(official, tmp_path, capfd):
    assert to_ms(official[2], tmp_path / "x.ckpt") == 0
    path = tmp_path / "x.ckpt.manifest.json"
    good = json.loads(path.read_text())
    for change, words in (({"format_version": 2}, "has format version 2"), ({"format": "other"}, "not a checkpoint"),
                          ({"files": {"x.ckpt": {}}}, "is damaged (KeyError"),
                          ({"model": {"variant": 3}}, "is damaged"),
                          ({"model": {"variant": {}}}, "lacks sizes")):
        path.write_text(json.dumps({**good, **change}))
        assert words in error_of(capfd, to_torch(tmp_path / "x.ckpt", tmp_path / "back"))
    path.unlink()                                             # a checkpoint without one still converts
    assert to_torch(tmp_path / "x.ckpt", tmp_path / "back", "--config", official[2] / "config.json") == 0


def test_fields_of_a_later_version_do_no_harm(official, tmp_path):
    assert to_ms(official[2], tmp_path / "x.ckpt") == 0
    path = tmp_path / "x.ckpt.manifest.json"
    data = json.loads(path.read_text())
    data["model"]["variant"]["from_tomorrow"] = data["model"]["more"] = 1
    path.write_text(json.dumps(data))
    assert find_manifest(tmp_path / "x.ckpt").model.to_variant() == official[0]
    assert asdict(official[0]).keys() < data["model"]["variant"].keys()


def test_exporting_never_destroys_what_others_wrote(official, tmp_path, capfd):
    folder = official[2]
    assert to_ms(folder, tmp_path / "x.ckpt") == 0
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert "would be replaced" in error_of(capfd, to_torch(tmp_path / "x.ckpt", folder))
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    back = tmp_path / "back"
    assert to_torch(tmp_path / "x.ckpt", back) == 0
    assert to_torch(tmp_path / "x.ckpt", back) == 0           # its own files it does replace
    (back / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes() + b"x")
    assert "would be replaced" in error_of(capfd, to_torch(tmp_path / "x.ckpt", back))
    assert to_torch(tmp_path / "x.ckpt", back, "--overwrite") == 0
    for name in ("x.ckpt", "x.ckpt.manifest.json"):
        foreign = tmp_path / "foreign" / name
        foreign.parent.mkdir(exist_ok=True)
        foreign.write_text("{}")
        assert "would be replaced" in error_of(capfd, to_ms(folder, foreign.parent / "x.ckpt"))
        assert foreign.read_text() == "{}"
        foreign.unlink()


def flip(path, rng):
    """Flip one bit of a file in place; the bytes before."""
    data = path.read_bytes()
    place = rng.randrange(len(data))
    path.write_bytes(data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1:])
    return data


def test_no_flipped_bit_is_accepted(official, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    outputs = [tmp_path / "x.ckpt", tmp_path / "x.safetensors", tmp_path / "folder"]
    for output in outputs:
        assert to_ms(official[2], output, "--format", "safetensors", "--max_shard_size", "3KB") == 0
    files = [path for output in outputs for path in ([output] if output.is_file() else sorted(output.iterdir()))
             if path.name != "telechat_manifest.json"]
    assert check_files(files, remember=True) == len(files)
    rng = random.Random(0)
    for turn in range(200):
        path = rng.choice(files)
        before = flip(path, rng)
        with pytest.raises(CheckpointError, match=f"{path.name} has the SHA-256 .* damaged or changed since"):
            check_files([path], remember=bool(turn % 2))
        path.write_bytes(before)


def test_no_flipped_bit_of_an_adapter_or_strategy_is_accepted(tmp_path):
    rng, numbers = random.Random(1), np.random.default_rng(0)
    adapter, place = tmp_path / "a.ckpt", tmp_path / "a.ckpt.manifest.json"
    name = "model.layers.0.attention.wq"
    tensors = {f"{name}.mindpet_delta_lora_{part}": numbers.standard_normal(shape).astype(np.float32)
               for part, shape in (("a", (2, 8)), ("b", (8, 2)))}
    peft.write_result(tensors, {"format": "ms"}, {"r": 2, "lora_alpha": 16}, adapter, Manifest("adapter"), place, False)
    assert read_adapter(adapter, verify=True).alpha == 16
    strategy = next(write_strategies(tmp_path / "strategy", {f"{name}.weight": layout((2, 2), (1, 0))}, 1).iterdir())
    ManifestWriter(None, logging.getLogger()).add(strategy, "strategy")
    deadline = time.monotonic() + 30
    while find_manifest(strategy) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert read_strategy(strategy).ranks == 4
    reads = {adapter: lambda: read_adapter(adapter, verify=True), strategy: lambda: read_strategy(strategy),
             tmp_path / "adapter_config.json": lambda: read_adapter(adapter, verify=True)}
    for _ in range(100):
        path = rng.choice(list(reads))
        before = flip(path, rng)
        with pytest.raises(CheckpointError):
            reads[path]()
        path.write_bytes(before)
        reads[path]()


def test_a_result_is_remembered_until_the_file_changes(official, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert to_ms(official[2], tmp_path / "x.ckpt") == 0
    read = []
    real = verified.file_sha256
    monkeypatch.setattr(verified, "file_sha256", lambda path, progress: read.append(path) or real(path, progress))
    for _ in range(3):
        assert check_files([tmp_path / "x.ckpt"], remember=True) == 1
    assert len(read) == 1
    assert check_files([tmp_path / "x.ckpt"], remember=False) == 1 and len(read) == 2
    content = (tmp_path / "x.ckpt").read_bytes()
    (tmp_path / "x.ckpt").write_bytes(content)                # the same bytes, but who can know
    assert check_files([tmp_path / "x.ckpt"], remember=True) == 1 and len(read) == 3


def test_a_changed_input_is_found_with_verify(official, tmp_path, capfd):
    assert to_ms(official[2], tmp_path / "x.ckpt") == 0
    data = bytearray((tmp_path / "x.ckpt").read_bytes())
    data[-5] ^= 1
    (tmp_path / "x.ckpt").write_bytes(data)
    assert "damaged or changed since" in error_of(capfd, to_torch(tmp_path / "x.ckpt", tmp_path / "b", "--verify"))
    assert to_torch(tmp_path / "x.ckpt", tmp_path / "b") == 0


def test_mindspores_own_checksum_is_checked_wherever_there_is_one(official, tmp_path, capfd):
    import zlib
    assert to_ms(official[2], tmp_path / "x.ckpt") == 0
    (tmp_path / "x.ckpt.manifest.json").unlink()
    data = (tmp_path / "x.ckpt").read_bytes()
    trailer = b"crc_num" + zlib.crc32(data).to_bytes(10, "big")      # as mindspore.save_checkpoint(crc_check=True)
    (tmp_path / "x.ckpt").write_bytes(data + trailer)
    config = ["--config", official[2] / "config.json"]
    assert to_torch(tmp_path / "x.ckpt", tmp_path / "b", *config) == 0
    (tmp_path / "x.ckpt").write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:] + trailer)
    text = error_of(capfd, to_torch(tmp_path / "x.ckpt", tmp_path / "c", *config))
    assert "has the CRC-32" in text and "its own last bytes say" in text
