"""Checkpoints as people have them: names with wrappers, other files under the name of weights, nested .bin files."""
import argparse
import gzip
import io
import json
import random
import re
import zipfile

import pytest
from checkpoint_fixtures import (
    assert_same,
    mindspore_tensors,
    official_tensors,
    small_variant,
    write_official,
    write_safetensors,
)
from convert_fixtures import error_of, read_ckpt, to_ms
from hypothesis import given, settings
from hypothesis import strategies as st

from research.telechat.checkpoint.foreign import unwrapped, what_it_is
from research.telechat.spec.hf_config import hf_config
from research.telechat.spec.parameters import parameters

WORDS = st.sampled_from(["module", "_orig_mod", "base_model", "model", "_forward_module", "net", "student", "llm",
                         "_fsdp_wrapped_module", "transformer", "encoder_0", "policy"])
INSIDE = st.sampled_from(["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])


@pytest.fixture(scope="module")
def model():
    """(variant, tensors) of a small 12B."""
    variant = small_variant("telechat_12b", layers=1)
    return variant, official_tensors(variant)


def names_of(layout):
    """All names of a small model in one layout."""
    if layout == "llama":
        return [name for param in parameters(small_variant("telechat2_7b", layers=1)) for name in param.llama_names]
    variant = small_variant({"official": "telechat_12b", "tied": "telechat_7b", "mup": "telechat_52b",
                             "mindspore": "telechat_12b"}[layout], layers=1)
    params = parameters(variant)
    return [param.ms_name if layout == "mindspore" else param.hf_name for param in params]


@settings(max_examples=60, deadline=None)
@given(layout=st.sampled_from(["official", "tied", "mup", "llama", "mindspore"]),
       before=st.lists(WORDS, max_size=4), inside=st.lists(INSIDE, max_size=2), data=st.data())
def test_names_lose_what_any_wrappers_have_added(layout, before, inside, data):
    names = names_of(layout)
    given_names = []
    for name in names:
        parts = name.split(".")
        place = data.draw(st.integers(0, len(parts) - 1)) if inside else 0
        given_names.append(".".join([*before, *parts[:place], *inside, *parts[place:]]))
    found = [unwrapped(given_names).get(name, name) for name in given_names]
    if layout in ("official", "tied", "mup"):                 # whose names count with and without it
        found, names = ([re.sub(r"^transformer\.", "", name) for name in some] for some in (found, names))
    assert found == names
    assert unwrapped(names) == {}


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model.", "model.module._orig_mod."])
def test_wrapped_checkpoints_convert(model, tmp_path, prefix, capfd):
    folder = write_official(tmp_path / "hf", model[0], {prefix + name: raw for name, raw in model[1].items()}, 2)
    assert to_ms(folder, tmp_path / "x.ckpt") == 0
    assert_same(read_ckpt(tmp_path / "x.ckpt"), mindspore_tensors(*model))
    assert f"prefixes added by a wrapper are ignored: {prefix}" in capfd.readouterr().out


def test_two_tensors_of_one_name_are_an_error(model, tmp_path, capfd):
    tensors = {**model[1], "transformer._orig_mod.ln_f.weight": model[1]["transformer.ln_f.weight"]}
    assert "both become transformer.ln_f.weight" in error_of(
        capfd, to_ms(write_official(tmp_path / "hf", model[0], tensors), tmp_path / "x.ckpt"))


def of_zip(*names):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in names:
            archive.writestr(name, b"x" * 99)
    return stream.getvalue()


STRANGERS = {
    b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32 + b"\nsize 17750000\n":
        "a Git LFS pointer for 17,750,000 bytes",
    b"/annex/objects/SHA256E-s123--abc.safetensors\n": "a git-annex or Xet pointer",
    b"\n <!DOCTYPE html><html><body>Sign in</body></html>": "a web page",
    b"<html>404</html>": "a web page",
    b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>': "an XML text",
    b'{"error": "Repository not found"}': "a JSON text",
    b"": "empty",
    bytes(9000): "filled with zeros",
    gzip.compress(b"x" * 999): "compressed with gzip",
    b"\xfd7zXZ\0" + b"x" * 99: "compressed with xz",
    b"\x28\xb5\x2f\xfd" + b"x" * 99: "compressed with zstd",
    b"GGUF\x03\0\0\0" + b"x" * 99: "a GGUF file",
    b"\x89HDF\r\n\x1a\n" + b"x" * 99: "an HDF5 file",
    b"\x93NUMPY\x01\0" + b"x" * 99: "a NumPy array",
    of_zip("a.txt"): "a zip archive",
    of_zip("archive/data.pkl", "archive/data/0"): "a .bin file under another name",
    b"\x80\x02}q\x00." + b"x" * 99: "a .bin file under another name",
}


@pytest.mark.parametrize("content", STRANGERS, ids=[meaning.replace(" ", "_") for meaning in STRANGERS.values()])
def test_what_is_no_checkpoint_is_named(content, model, tmp_path, capfd):
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf_config(model[0])))
    (folder / "model.safetensors").write_bytes(content)
    text = error_of(capfd, to_ms(folder, tmp_path / "x.ckpt"))
    assert f"it is {STRANGERS[content]}" in text and str(folder / "model.safetensors") in text
    (tmp_path / "y.ckpt").write_bytes(content)
    assert STRANGERS[content] in error_of(capfd, to_ms_from(tmp_path / "y.ckpt", tmp_path / "x.ckpt", folder))


def to_ms_from(source, target, config):
    from research.telechat.commands.convert import torch_to_mindspore
    return torch_to_mindspore(["--from_mindspore", str(source), "--mindspore_path", str(target), "--config",
                               str(config)])


def test_checkpoints_under_another_name(model, tmp_path):
    write_safetensors(tmp_path / "x.ckpt", model[1])
    assert what_it_is(tmp_path / "x.ckpt") == "a .safetensors file under another name; rename it to x.safetensors"
    assert to_ms(write_official(tmp_path / "hf", *model), tmp_path / "y.ckpt") == 0
    (tmp_path / "y.ckpt").rename(tmp_path / "z.safetensors")
    assert what_it_is(tmp_path / "z.safetensors") == "a .ckpt file under another name; rename it to z.ckpt"


@settings(max_examples=60, deadline=None)
@given(content=st.binary(max_size=300))
def test_any_bytes_are_one_line(content, model, tmp_path_factory):
    """Whatever a file holds: an error of ours, and no traceback."""
    from research.telechat.checkpoint.reader import open_ckpt, open_safetensors
    from research.telechat.common.errors import CheckpointError
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(content)
    for reader in (open_ckpt, lambda path: open_safetensors([path])):
        try:
            reader(path).close()
        except CheckpointError as err:
            assert str(path) in str(err)


def odd_header(header, rng):
    """A safetensors header in another legal spelling: order of keys, blanks, escapes, metadata of any kind."""
    entries = list(header.items())
    rng.shuffle(entries)
    entries = [(name, dict(rng.sample(list(entry.items()), len(entry)))) for name, entry in entries]
    extra = rng.choice([{}, *({"__metadata__": value} for value in (None, {}, {"format": "pt", "键": "值"}))])
    text = json.dumps({**extra, **dict(entries)}, indent=rng.choice([None, 1]), ensure_ascii=rng.random() < 0.5,
                      separators=rng.choice([None, (",", ":"), (" ,", " : ")]))
    if rng.random() < 0.5:
        text = text.replace("weight", "\\u0077eight")
    return (text + " " * rng.randrange(20)).encode()


def test_odd_but_legal_headers_are_read(model, tmp_path):
    folder = write_official(tmp_path / "hf", *model)
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + length])
    header.pop("__metadata__")
    for seed in range(12):
        text = odd_header(header, random.Random(seed))
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length:])
        config = json.dumps(hf_config(model[0]), indent=seed % 3 or None)
        (folder / "config.json").write_bytes(b"\xef\xbb\xbf" * (seed % 2) + config.encode())
        assert to_ms(folder, tmp_path / f"{seed}.ckpt") == 0
        assert_same(read_ckpt(tmp_path / f"{seed}.ckpt"), mindspore_tensors(*model))


def test_nested_bin_files_are_read_or_say_what_they_hold(model, tmp_path, capfd):
    torch = pytest.importorskip("torch")
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf_config(model[0])))
    weights = {name: torch.from_numpy(raw.bits.astype("int32").astype("uint16").view("float16").copy())
               for name, raw in model[1].items()}
    moments = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1.0}]}
    read = {
        "['state_dict']; left out: epoch": {"state_dict": weights, "epoch": 3},
        "['model']; left out: optimizer, step": {"model": weights, "optimizer": moments, "step": 3},
        "['a']['module']": {"a": {"module": weights}},
        "['model']; left out: ema": {"model": weights, "ema": {"shadow": {"x": torch.ones(2)}}},
        "dropped, not tensors: step": {**weights, "step": 3},
        "prefixes added by a wrapper": {"state_dict": {f"module.{name}": value for name, value in weights.items()}},
    }
    for number, (words, content) in enumerate(read.items()):
        torch.save(content, folder / "pytorch_model.bin")
        assert to_ms(folder, tmp_path / f"{number}.ckpt") == 0, words
        assert words in capfd.readouterr().out
        assert_same(read_ckpt(tmp_path / f"{number}.ckpt"), mindspore_tensors(*model))
    refused = {
        "an object of argparse.Namespace": {"model": weights, "args": argparse.Namespace(lr=1)},
        "several dictionaries of tensors (['g'] with": {"g": weights, "d": weights},
        "a dictionary of epoch (int)": {"epoch": 3},
        "one tensor of shape [2]": torch.ones(2),
        "an object of type list": [torch.ones(2)],
    }
    for words, content in refused.items():
        torch.save(content, folder / "pytorch_model.bin")
        text = error_of(capfd, to_ms(folder, tmp_path / "no.ckpt"))
        assert words in text and "\x1b" not in text, text
