"""Commands that write, killed at any moment: what has its name is whole, and the same command then does the rest."""
import os
import random
import re
import signal
import time

import numpy as np
import pytest
from checkpoint_fixtures import official_tensors, small_variant, write_official
from convert_fixtures import to_ms, to_torch

from research.telechat.checkpoint import convert as checkpoint_convert
from research.telechat.checkpoint import writer
from research.telechat.checkpoint.folder import open_official
from research.telechat.checkpoint.integrity import check_files
from research.telechat.checkpoint.manifest import Manifest, find_manifest
from research.telechat.commands import merge_lora, peft

KILLS = 30
SIGNALS = (signal.SIGKILL, signal.SIGHUP, signal.SIGTERM)


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """{output: command that writes it}, each of the size that ten kills interrupt in different places."""
    place, variant = tmp_path_factory.mktemp("kills"), small_variant("telechat_12b", layers=2)
    source = write_official(place / "hf", variant, official_tensors(variant))
    base, adapter, out = place / "base.ckpt", place / "adapter.ckpt", place / "out"
    assert to_ms(source, base) == 0
    name, hidden = "model.layers.0.attention.wq", variant.hidden_size
    tensors = {f"{name}.mindpet_delta_lora_{part}": np.ones(shape, np.float32)
               for part, shape in (("a", (2, hidden)), ("b", (hidden, 2)))}
    peft.write_result(tensors, {"format": "ms"}, {"r": 2, "lora_alpha": 16}, adapter, Manifest("adapter"),
                      place / "adapter.ckpt.manifest.json", False)
    return {
        out / "x.ckpt": lambda: to_ms(source, out / "x.ckpt"),
        out / "shards": lambda: to_ms(source, out / "shards", "--format", "safetensors", "--max_shard_size", "3KB"),
        out / "hf": lambda: to_torch(base, out / "hf", "--max_shard_size", "3KB"),
        out / "merged.safetensors": lambda: merge_lora.main(
            ["--base", str(base), "--adapter", str(adapter), "--output", str(out / "merged.safetensors")]),
        out / "peft": lambda: peft.main(["export", "--adapter", str(adapter), "--peft_dir", str(out / "peft"),
                                         "--config", str(source / "config.json")]),
    }


def start(command):
    """The command in a process of its own that pauses between two writes; its number."""
    child = os.fork()
    if child:
        return child
    real_write, real_replace = writer.OutputFile._pwrite, os.replace
    checkpoint_convert.JOURNAL_BYTES = 1
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)

    def slow_write(self, offset, view):
        real_write(self, offset, view)
        time.sleep(0.001)

    def slow_replace(*names):
        real_replace(*names)
        time.sleep(0.004)

    writer.OutputFile._pwrite, os.replace = slow_write, slow_replace
    code = 99
    try:
        code = command()
    finally:
        os._exit(code)


def is_whole(output):
    """Whether everything that has its final name is as its manifest says; what has none yet is not there."""
    manifest = find_manifest(output) if output.exists() else None
    if manifest is None:
        return False
    return check_files([manifest.path.parent / name for name in manifest.files], remember=False) == len(manifest.files)


def test_kills_at_random_moments(commands):
    chance, codes = random.Random(0), []
    for number in range(KILLS):
        output = list(commands)[number % len(commands)]
        child = start(commands[output])
        time.sleep(chance.random() ** 2 * 0.3)
        os.kill(child, chance.choice(SIGNALS))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        codes.append(code)
        assert code in (0, 130, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGHUP), code
        if code == 0:
            assert is_whole(output)
    assert len([code for code in codes if code]) >= KILLS / 4
    for output, command in commands.items():
        assert command() == 0 and is_whole(output), output
    place = next(iter(commands)).parent
    assert not [path for path in place.rglob("*") if re.search(r"\.(partial|lock|next)", path.name)]
    assert len(open_official(list(commands)[2]).tensors) > 10
