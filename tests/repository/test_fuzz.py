"""Thousands of damaged inputs of every kind: each is read, or refused with one clear error of the reader's own kind.

The damage is random but the same at every run. A crash, another exception, a file that appears, or a case that takes
longer than a second fails. Command lines of damaged files run in the other tests of faults.
"""
import json
import os
import random
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from vocab_fixtures import train_byte_level_bpe, train_sentencepiece

from research.telechat.checkpoint import lora as checkpoint_lora
from research.telechat.checkpoint import resume as checkpoint_resume
from research.telechat.checkpoint.reader import open_ckpt, open_safetensors
from research.telechat.checkpoint.writer import (
    OutputFile,
    OutTensor,
    ckpt_layout,
    partial_path,
    safetensors_layout,
)
from research.telechat.common.errors import CheckpointError, ConfigError, RecordError
from research.telechat.data.records import detect_format, parse_record
from research.telechat.recipe.read import parse_overrides, parse_value, read_recipe
from research.telechat.spec.variants import read_hf_config, variant_from_hf
from research.telechat.text.vocab import Vocab

ROOT = Path(__file__).resolve().parents[2]
SLOWEST = 30.0                     # seconds for one case before it counts as a hang; healthy ones take milliseconds
SPICE = [b"\x00", b"\xff" * 8, b"\x80" * 12, b"-1", b"1e999", b"NaN", b"null", b"{}", b"[]", b"[" * 3000, b"{\"a\":",
         b"\"", b"\\ud800", b"\xed\xa0\x80", b"!!python/object/apply:os.system ['touch hacked']", b"&a *a", b": ",
         b"\n", b"2001-99-99", b"../../etc", b"%s%n", b"9" * 400, b"2147483648",
         b"18446744073709551616", b"\xf0\x9f\x98\x80"]


def damaged(data: bytes, chance: random.Random) -> bytes:
    """`data` with one to four changes: bits, cuts, repetitions, spice."""
    data = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(len(data) + 1) if chance.random() < 0.5 else chance.randrange(min(len(data), 64) + 1)
        kind = chance.randrange(5)
        if kind == 0 and data:
            data[min(place, len(data) - 1)] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del data[place:place + chance.randint(1, max(len(data) // 2, 1))]
        elif kind == 2:
            data[place:place] = data[place:place + chance.randint(1, 50)]
        elif kind == 3:
            data[place:place] = chance.choice(SPICE)
        else:
            spice = chance.choice(SPICE)
            data[place:place + len(spice)] = spice
    return bytes(data)


def fuzz(seeds, read, allowed, cases, folder):
    """Run `read(bytes)` on damaged seeds; (cases that were read, cases refused)."""
    chance = random.Random(20240607)
    before, counts = sorted(os.listdir(folder)), [0, 0]
    for number in range(cases):
        data = damaged(chance.choice(seeds), chance)
        started = time.monotonic()
        try:
            read(data)
            counts[0] += 1
        except allowed as err:
            counts[1] += 1
            assert str(err).strip() and len(str(err)) < 20000, (number, data[:200])
        except Exception as err:
            raise AssertionError(f"case {number}: {type(err).__name__}: {err}; input {data[:300]!r}") from err
        assert time.monotonic() - started < SLOWEST, (number, data[:200])
    assert sorted(os.listdir(folder)) == before, "a file appeared"
    assert sum(counts) == cases and counts[1] > cases // 50, counts
    return counts


def at(path, data):
    path.write_bytes(data)
    return path


@pytest.fixture()
def work(tmp_path, monkeypatch):
    """A working folder whose listing must not change; the damaged file lies elsewhere."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path


def test_yaml_recipes(work):
    seeds = [path.read_bytes() for path in (ROOT / "configs/telechat/finetune_cpu.yaml",
                                            ROOT / "research/telechat/finetune_telechat_7b_lora.yaml")]
    fuzz(seeds, lambda data: read_recipe(at(work / "r.yaml", data)), ConfigError, 600, work / "cwd")


def test_command_line_values(work):
    def read(data):
        text = data.decode("utf-8", "replace")
        parse_overrides([text], ["--a", text])
    fuzz([b"a.b=1", b"callbacks=[{type: X, n: 1e-5}]"], read, ConfigError, 1000, work / "cwd")


def test_records_of_conversations(work):
    seeds = [line.encode() for line in (ROOT / "examples/conversations.jsonl").read_text("utf-8").splitlines()[:20]]
    seeds.append(json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
                            ).encode())

    def read(data):
        parse_record(data, detect_format(data) or "messages")
    fuzz(seeds, read, RecordError, 2000, work / "cwd")


def file_of(layout, values):
    file = OutputFile(layout, 0)
    for name, value in values.items():
        file.write(name, 0, memoryview(value.tobytes()))
    file.finish()
    return partial_path(layout.path).read_bytes()


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_checkpoints(suffix, work):
    parts = {"weight": (4, 4), "mindpet_delta_lora_a": (2, 4), "mindpet_delta_lora_b": (4, 2)}
    values = {f"model.layers.{number}.attention.wq.{part}": np.ones(shape, np.float32) for number in range(2)
              for part, shape in parts.items()}
    tensors = [OutTensor(name, "F32", value.shape) for name, value in values.items()]
    path = work / f"x{suffix}"
    seed = file_of(ckpt_layout(path, tensors) if suffix == ".ckpt" else safetensors_layout(path, tensors, {}), values)

    def read(data):
        at(path, data)
        checkpoint = open_ckpt(path) if suffix == ".ckpt" else open_safetensors([path])
        try:
            for name, info in checkpoint.tensors.items():
                checkpoint.read_into(name, 0, memoryview(bytearray(min(info.nbytes, 1000))))
        finally:
            checkpoint.close()
        checkpoint_resume.fault_of(path)
        checkpoint_lora.read_adapter(path, 4.0)
    fuzz([seed], read, CheckpointError, 1000, work / "cwd")


def test_adapter_configs(work):
    seed = json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 16, "bias": "none", "target_modules": ["query"]})
    fuzz([seed.encode()], lambda data: checkpoint_lora.read_adapter_config(at(work / "a.json", data)), CheckpointError,
         500, work / "cwd")


def test_official_configs(work):
    from model_fixtures import HF_CONFIGS
    seeds = [json.dumps(config).encode() for config in HF_CONFIGS.values()]
    fuzz(seeds, lambda data: variant_from_hf(read_hf_config(at(work / "config.json", data))), ConfigError, 500,
         work / "cwd")


def test_tokenizers(work):
    for train, name in ((train_sentencepiece, "tokenizer.model"), (train_byte_level_bpe, "tokenizer.json")):
        seed = train(work / name).read_bytes()
        fuzz([seed], lambda data, name=name: Vocab.load(at(work / name, data)), ConfigError, 150, work / "cwd")


def test_code_in_yaml_is_not_executed(work):
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_recipe(at(work / "r.yaml", b"a: !!python/object/apply:os.system ['touch hacked']"))
    assert parse_value("!!python/object/apply:os.system ['touch hacked']").startswith("!!python")
    assert list((work / "cwd").iterdir()) == []
    assert yaml.safe_load("a: 1") == {"a": 1}
