"""Conversion of faulty input, and with wrong options: one line each, and nothing is left behind."""
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from checkpoint_fixtures import (
    official_tensors,
    sharded_12b,
    small_variant,
    write_official,
)
from convert_fixtures import error_of, to_ms, to_torch

from research.telechat.spec.hf_config import hf_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def model(tmp_path):
    """(variant, tensors, official folder of three shards) of a small 12B."""
    return sharded_12b(tmp_path)


def edit_json(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def edit_header(path, change):
    """Change the header of a safetensors file, not its contents."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length:])


SHARD = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"
QUERY = "transformer.h.1.self_attention.query.weight"


def _first_tensor(header):
    return header[next(name for name in header if name != "__metadata__")]


FAULTS = {
    "shard missing": (lambda d: (d / SHARD).unlink(), [INDEX, "1 of which are missing", SHARD]),
    "shard missing, no index": (lambda d: ((d / SHARD).unlink(), (d / INDEX).unlink()), ["number 2 is missing"]),
    "shard truncated": (lambda d: os.truncate(d / SHARD, 2000), [SHARD, "truncated", "download it again"]),
    "shard cut in its header": (lambda d: os.truncate(d / SHARD, 40), [SHARD, "truncated"]),
    "shard empty": (lambda d: os.truncate(d / SHARD, 0), [SHARD, "it is empty"]),
    "shard of zeros": (lambda d: (d / SHARD).write_bytes(bytes(500)), [SHARD, "cannot be read"]),
    "shard of text": (lambda d: (d / SHARD).write_text("<html>not found</html>" * 9), [SHARD, "not a safetensors"]),
    "index not json": (lambda d: (d / INDEX).write_text("{"), [INDEX, "not valid JSON"]),
    "index empty": (lambda d: (d / INDEX).write_text("{}"), [INDEX, "weight_map"]),
    "index of another model": (lambda d: edit_json(d / INDEX, lambda j: j["weight_map"].update({"a.b": SHARD})),
                               ["are not in its files: a.b"]),
    "index incomplete": (lambda d: edit_json(d / INDEX, lambda j: j["weight_map"].pop(QUERY)),
                         ["lacks tensors", QUERY, "incomplete"]),
    "index leads elsewhere": (lambda d: edit_json(d / INDEX, lambda j: j["weight_map"].update({QUERY: "../x"})),
                              ["'../x'", "in the folder of the index"]),
    "tensor twice": (lambda d: (shutil.copy(d / SHARD, d / "model-00004-of-00003.safetensors"),
                                edit_json(d / INDEX, lambda j: j["weight_map"].update(
                                    {QUERY: "model-00004-of-00003.safetensors"}))), ["appears twice"]),
    "type unknown": (lambda d: edit_header(d / SHARD, lambda h: _first_tensor(h).update(dtype="F8")), ["wrongly"]),
    "type integer": (lambda d: edit_header(d / SHARD, lambda h: _first_tensor(h).update(dtype="I16")),
                     ["type I16", "expected float16, bfloat16, float32"]),
    "shape negative": (lambda d: edit_header(d / SHARD, lambda h: _first_tensor(h).update(shape=[-1])), ["wrongly"]),
    "shape against size": (lambda d: edit_header(d / SHARD, lambda h: _first_tensor(h).update(shape=[7])),
                           [SHARD, "needs 14 bytes"]),
    "offsets overlap": (lambda d: edit_header(d / SHARD, lambda h: [
        entry["data_offsets"].__setitem__(slice(None), [0, entry["data_offsets"][1] - entry["data_offsets"][0]])
        for name, entry in h.items() if name != "__metadata__"]), ["overlap"]),
    "config not json": (lambda d: (d / "config.json").write_text("x"), ["config.json", "not valid JSON"]),
    "config without sizes": (lambda d: (d / "config.json").write_text('{"tie_word_embeddings": false}'),
                             ["config.json", "is missing"]),
    "config of other sizes": (lambda d: edit_json(d / "config.json", lambda j: j.update(vocab_size=99)),
                              ["word_embeddings.weight, lm_head.weight: shape [11, 24], expected [99, 24]"]),
    "config of another depth": (lambda d: edit_json(d / "config.json", lambda j: j.update(n_layer=4)),
                                ["20 parameters are missing", "transformer.h.{2-3}.input_layernorm.weight"]),
    "config of a shallower model": (lambda d: edit_json(d / "config.json", lambda j: j.update(n_layer=1)),
                                    ["10 are unknown", "transformer.h.1.mlp.up_proj.weight"]),
    "config of another family": (lambda d: edit_json(d / "config.json", lambda j: j.update(base_seqlen=8192)),
                                 ["telechat_12b has the layout 'telechat'"]),
    "folder empty": (lambda d: [path.unlink() for path in d.iterdir()], ["contains no *.safetensors"]),
    "folder missing": (lambda d: shutil.rmtree(d), ["does not exist"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_input_is_one_line_and_leaves_nothing(fault, model, tmp_path, capfd):
    change, expected = FAULTS[fault]
    change(model[2])
    message = error_of(capfd, to_ms(model[2], tmp_path / "out" / "x.ckpt", "--model_name", "telechat_12b"))
    for text in expected:
        assert text in message
    assert not (tmp_path / "out").exists()


def test_every_missing_and_unknown_parameter_is_listed(model, tmp_path, capfd):
    variant, tensors, _ = model
    changed = {name.replace("up_proj", "upper"): raw for name, raw in tensors.items() if "ln_f" not in name}
    source = write_official(tmp_path / "other", variant, changed)
    message = error_of(capfd, to_ms(source, tmp_path / "x.ckpt"))
    assert "3 parameters are missing: transformer.h.{0-1}.mlp.up_proj.weight, transformer.ln_f.weight" in message
    assert "2 are unknown: transformer.h.{0-1}.mlp.upper.weight" in message


def test_json_bombs_and_duplicate_keys_in_headers_are_errors(model, tmp_path, capfd):
    for text in (b"[" * 100_000, b'{"a": 1, "a": 2}', b"\xff\xfe", b"[]", b'{"a": null}', b'{"a": {"dtype": "F16"}}'):
        (model[2] / SHARD).write_bytes(len(text).to_bytes(8, "little") + text)
        assert SHARD in error_of(capfd, to_ms(model[2], tmp_path / "x.ckpt"))


def test_safetensors_win_over_bin_and_that_is_said(model, tmp_path, capsys):
    (model[2] / "pytorch_model.bin").write_bytes(b"junk")
    assert to_ms(model[2], tmp_path / "x.ckpt") == 0
    assert "the safetensors are read" in capsys.readouterr().out


def test_folders_with_other_weights_are_not_mixed(model, tmp_path, capfd):
    out = tmp_path / "out"
    out.mkdir()
    (out / "model-00001-of-00009.safetensors").write_bytes(b"old")
    message = error_of(capfd, to_ms(model[2], out, "--format", "safetensors"))
    assert "already contains other weights" in message and "model-00001-of-00009.safetensors" in message
    assert to_ms(model[2], out) == 0                                        # mindspore.ckpt mixes with nothing
    message = error_of(capfd, to_torch(out / "mindspore.ckpt", out))
    assert "already contains other weights" in message


def test_input_is_never_overwritten(tmp_path, capfd):
    variant = small_variant("telechat_7b")
    source = write_official(tmp_path / "hf", variant, official_tensors(variant))
    before = (source / "model.safetensors").read_bytes()
    message = error_of(capfd, to_ms(source, source / "model.safetensors"))
    assert "would be overwritten while it is read" in message
    assert (source / "model.safetensors").read_bytes() == before


def test_a_config_of_another_model_is_not_replaced(model, tmp_path, capfd):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text(json.dumps(hf_config(small_variant("telechat_52b"))))
    assert "describes another model" in error_of(capfd, to_ms(model[2], out))


def test_wrong_options_are_refused(model, tmp_path, capfd):
    assert "must end in .ckpt or .safetensors" in error_of(capfd, to_ms(model[2], tmp_path / "x.bin"))
    for options in (["--mp", "0"], ["--mp", "x"], ["--dtype", "int8"], ["--max_shard_size", "5 apples"],
                    ["--model_name", "telechat_9b"]):
        with pytest.raises(SystemExit) as stop:
            to_ms(model[2], tmp_path / "x.ckpt", *options)
        assert stop.value.code == 2


# --- .ckpt input ------------------------------------------------------------------------------------------------------


def test_damaged_ckpt_files_are_one_line(model, tmp_path, capfd):
    good = tmp_path / "good.ckpt"
    assert to_ms(model[2], good) == 0
    data = good.read_bytes()
    (tmp_path / "config.json").write_text(json.dumps(hf_config(model[0])))
    bad = tmp_path / "bad.ckpt"
    rng = np.random.default_rng(0)
    cases = [b"", b"\x0a", data[:-1], data[:len(data) // 2], b"\xff" * 300, b"PK\x03\x04" + data, data + b"\x0a\x05abc",
             *(data[:n] + bytes([data[n] ^ 0x55]) + data[n + 1:] for n in (0, 1, 3, 5, 50, 52, 54))]
    cases += [bytes(rng.integers(0, 256, 500, np.uint8)) for _ in range(20)]
    for case in cases:
        bad.write_bytes(case)
        code = to_torch(bad, tmp_path / "back")
        assert "bad.ckpt" in error_of(capfd, code)
        assert not (tmp_path / "back").exists()


def test_slices_of_a_distributed_checkpoint_are_named(tmp_path, capfd):
    (tmp_path / "ms" / "rank_0").mkdir(parents=True)
    assert "merge them" in error_of(capfd, to_torch(tmp_path / "ms", tmp_path / "back"))
