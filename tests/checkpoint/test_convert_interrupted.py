"""Conversion that is interrupted: full disks, kills in the middle, results that do not read back, little memory."""
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from checkpoint_fixtures import (
    Raw,
    assert_same,
    mindspore_tensors,
    read_safetensors,
    sharded_12b,
    small_variant,
    write_official,
    write_safetensors,
)
from convert_fixtures import error_of, read_ckpt, to_ms, to_torch

from research.telechat.checkpoint import convert as checkpoint_convert
from research.telechat.checkpoint import writer as checkpoint_writer
from research.telechat.spec.hf_config import hf_config

ROOT = Path(__file__).resolve().parents[2]
SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture
def model(tmp_path):
    """(variant, tensors, official folder of three shards) of a small 12B."""
    return sharded_12b(tmp_path)


def test_a_disk_without_room_is_noticed_before_writing(model, tmp_path, capfd, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint_writer.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert "0.00 GB free" in error_of(capfd, to_ms(model[2], tmp_path / "out" / "x.ckpt"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["x.ckpt", "x.safetensors", "folder"])
def test_a_disk_that_fills_up_leaves_the_old_file_and_the_rerun_continues(kind, model, tmp_path, capfd, monkeypatch):
    options = ["--format", "safetensors", "--max_shard_size", "2KB", "--overwrite"]
    assert to_ms(model[2], tmp_path / "whole" / kind, *options) == 0
    target = tmp_path / "out" / kind
    if kind != "folder":
        target.parent.mkdir()
        target.write_bytes(b"the older checkpoint")
    monkeypatch.setattr(checkpoint_convert, "JOURNAL_BYTES", 1)
    real, written = os.pwrite, [0]

    def full(descriptor, data, offset):
        if written[0] + len(data) > 9000:
            raise OSError(errno.ENOSPC, "No space left on device")
        written[0] += len(data)
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    assert "the disk is full" in error_of(capfd, to_ms(model[2], target, *options))
    assert not list(tmp_path.glob("out/folder/*.safetensors")) and not list(tmp_path.glob("out/folder/*index*"))
    if kind != "folder":
        assert target.read_bytes() == b"the older checkpoint"
    monkeypatch.setattr(os, "pwrite", real)
    assert to_ms(model[2], target, *options, "--verify") == 0
    assert "continuing an interrupted conversion" in capfd.readouterr().out
    result = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").rglob("*") if path.is_file()}
    assert {path.name: path.read_bytes() for path in result} == whole


# Runs the command with slow writes and a journal entry for every tensor, so that there is time to interrupt it.
_SLOW = """
import os, sys, time
sys.path.insert(0, {root!r})
from research.telechat.commands.convert import torch_to_mindspore
from research.telechat.checkpoint import convert as checkpoint_convert
checkpoint_convert.JOURNAL_BYTES = 1
real = os.pwrite
def slow(*args):
    time.sleep(0.05)
    return real(*args)
os.pwrite = slow
sys.exit(torch_to_mindspore(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_killed_conversion_leaves_no_finished_file_and_resumes(number, model, tmp_path, capfd):
    target = tmp_path / "out" / "x.ckpt"
    process = subprocess.Popen([sys.executable, "-c", _SLOW.format(root=str(ROOT)), "--torch_path", str(model[2]),
                                "--mindspore_path", str(target), "--workers", "1"], stderr=subprocess.PIPE, text=True)
    journal = target.with_name("x.ckpt.partial.json")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if journal.exists() and json.loads(journal.read_text())["done"]["x.ckpt"] >= 2:
            break
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (-9 if number == signal.SIGKILL else 130)
    if number != signal.SIGKILL:
        assert "interrupted" in err and "Traceback" not in err
    assert not target.exists() and target.with_name("x.ckpt.partial").exists()
    assert to_ms(model[2], target, "--verify") == 0
    assert "continuing an interrupted conversion" in capfd.readouterr().out
    assert_same(read_ckpt(target), mindspore_tensors(model[0], model[1]))
    assert sorted(path.name for path in target.parent.iterdir()) == ["x.ckpt", "x.ckpt.manifest.json"]


def test_a_rerun_with_other_options_or_input_starts_anew(model, tmp_path, capfd, monkeypatch):
    target = tmp_path / "out" / "x.safetensors"
    monkeypatch.setattr(checkpoint_convert, "JOURNAL_BYTES", 1)

    def interrupted(*options):
        real, count = os.pwrite, [0]

        def stop(*args):
            count[0] += 1
            if count[0] > 8:
                raise KeyboardInterrupt
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", stop)
            assert to_ms(model[2], target, *options) == 130
        assert target.with_name("x.safetensors.partial").exists()

    interrupted()
    assert to_ms(model[2], target, "--dtype", "float32", "--verify") == 0
    interrupted()
    tensors = {name: Raw(raw.dtype, raw.bits ^ 1) for name, raw in model[1].items()}
    write_official(model[2], model[0], tensors, shards=3)
    assert to_ms(model[2], target, "--verify") == 0
    assert "continuing" not in capfd.readouterr().out
    assert_same(read_safetensors(target), mindspore_tensors(model[0], tensors))
    assert sorted(path.name for path in target.parent.iterdir()) == ["x.safetensors", "x.safetensors.manifest.json"]


def test_counts_survive_an_interruption(model, tmp_path, capfd, monkeypatch):
    variant, tensors, _ = model
    tensors["transformer.word_embeddings.weight"].bits[0, :2] = 0x7E01
    tensors["lm_head.weight"].bits[0, 0] = 0x7C00
    source = write_official(tmp_path / "nan", variant, tensors)
    monkeypatch.setattr(checkpoint_convert, "JOURNAL_BYTES", 1)
    real = os.pwrite
    seen = []

    def stop(*args):
        seen.append(args)
        if len(seen) > 40:                          # after the 23 headers and some tensors, the embeddings first
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", stop)
        assert to_ms(source, tmp_path / "x.ckpt") == 130
    for _ in range(2):                              # resumed, and then from the start
        assert to_ms(source, tmp_path / "x.ckpt") == 0
        assert ("2 NaN and 1 infinite values in 2 tensors of the input: lm_head.weight (0 NaN, 1 infinite), "
                "transformer.word_embeddings.weight (2 NaN, 0 infinite)") in capfd.readouterr().out


@pytest.mark.parametrize("text", ["", "{", "[]", '{"plan": 1}', '{"done": {"x.ckpt": "a"}, "found": {}}'])
def test_a_broken_journal_means_starting_anew(text, model, tmp_path, capfd):
    (tmp_path / "x.ckpt.partial.json").write_text(text)
    (tmp_path / "x.ckpt.partial").write_bytes(b"old")
    assert to_ms(model[2], tmp_path / "x.ckpt", "--verify") == 0
    assert "continuing" not in capfd.readouterr().out
    assert not list(tmp_path.glob("*.partial*"))


def test_verification_finds_a_flipped_bit(model, tmp_path, capfd, monkeypatch):
    real = checkpoint_writer.OutputFile.write

    def faulty(self, name, start, view):
        if name == "lm_head.weight":
            view = memoryview(bytes([view[0] ^ 1]) + bytes(view[1:]))
        real(self, name, start, view)

    monkeypatch.setattr(checkpoint_writer.OutputFile, "write", faulty)
    message = error_of(capfd, to_ms(model[2], tmp_path / "out" / "x.ckpt", "--verify"))
    assert "1 tensors read back" in message and "lm_head.weight" in message
    assert not (tmp_path / "out").exists()


def test_input_that_shrinks_while_it_is_read_is_noticed(model, tmp_path, capfd, monkeypatch):
    real = checkpoint_convert.check_free_space

    def truncate(*args):
        os.truncate(model[2] / SHARD, 3000)
        return real(*args)

    monkeypatch.setattr(checkpoint_convert, "check_free_space", truncate)
    message = error_of(capfd, to_ms(model[2], tmp_path / "out" / "x.ckpt"))
    assert SHARD in message and "truncated" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_memory_stays_below_the_largest_tensor(tmp_path):
    """A .safetensors input needs a few chunks of memory, whatever the size of its tensors."""
    variant = small_variant("telechat_12b", layers=1, heads=8, head_dim=128, ffn=1024, vocab=200_000)
    from research.telechat.checkpoint.writer import OutputFile, OutTensor, publish, safetensors_layout
    from research.telechat.spec.parameters import parameters
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf_config(variant)))
    layout = safetensors_layout(folder / "model.safetensors", [OutTensor(param.hf_name, "BF16", param.hf_shape)
                                                               for param in parameters(variant)], {"format": "pt"})
    OutputFile(layout, 0).finish()                                          # zeros, without blocks on the disk
    publish([layout])
    code = ("import sys\nsys.path.insert(0, sys.argv.pop(1))\n"
            "from research.telechat.commands.convert import torch_to_mindspore\n"
            "assert torch_to_mindspore(sys.argv[1:]) == 0\n"
            "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))\n")
    done = subprocess.run([sys.executable, "-c", code, str(ROOT), "--torch_path", str(folder), "--mindspore_path",
                           str(tmp_path / "x.ckpt")], capture_output=True, text=True, check=True)
    peak = int(done.stdout.split()[-1]) * 1024
    assert peak < variant.vocab_size * variant.hidden_size * 2, f"{peak / 1e6:.0f} MB"


def test_training_checkpoints_convert_without_their_optimizer(model, tmp_path, capfd):
    variant, tensors, _ = model
    weights = mindspore_tensors(variant, tensors)
    extra = {"adam_m.model.norm_out.weight": weights["model.norm_out.weight"],
             "global_step": Raw("F32", np.zeros(1, np.uint32))}
    (tmp_path / "config.json").write_text(json.dumps(hf_config(variant)))
    write_safetensors(tmp_path / "x.safetensors", {**weights, **extra}, {"format": "ms"})
    assert to_torch(tmp_path / "x.safetensors", tmp_path / "back") == 0
    assert "dropped, because they are not weights: 2 entries" in capfd.readouterr().out
    assert_same(read_safetensors(tmp_path / "back" / "model.safetensors"), tensors)
    lora = {"model.layers.0.attention.wq.mindpet_delta_lora_a": weights["model.norm_out.weight"]}
    write_safetensors(tmp_path / "x.safetensors", {**weights, **lora}, {"format": "ms"})
    assert "merge LoRA adapters first" in error_of(capfd, to_torch(tmp_path / "x.safetensors", tmp_path / "b"))
