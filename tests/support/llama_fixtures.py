"""Small official folders of every member, with tokenizer, and what the commands make of them in the Llama layout."""
import json
import shutil
from pathlib import Path
from typing import Any, Dict, NamedTuple

import numpy as np
from model_fixtures import HF_CONFIGS, random_official
from safetensors.numpy import save_file

from research.telechat.commands.convert import main as convert

_SIZES = {"vocab_size": 600, "training_seqlen": 64}
# base_seqlen below training_seqlen makes alpha > 1; without, Llama's base of the rotation is 10000.
MEMBERS: Dict[str, Dict[str, Any]] = {
    "7b": {**HF_CONFIGS["7b"], **_SIZES, "training_seqlen": 8192, "seq_length": 8192},
    "12b": {**HF_CONFIGS["12b"], **_SIZES},
    "52b": {**HF_CONFIGS["52b"], "vocab_size": 600},
    "telechat2": {**HF_CONFIGS["telechat2_mha"], **_SIZES, "base_seqlen": 64},
    "telechat2_alpha_7": {**HF_CONFIGS["telechat2_mha"], **_SIZES, "base_seqlen": 16},
    "telechat2_gqa": {**HF_CONFIGS["telechat2_gqa"], **_SIZES, "base_seqlen": 64},
}


class Member(NamedTuple):
    """A small model: its official config and weights, the official folder, and the Llama folder made from it."""

    config: Dict[str, Any]
    weights: Dict[str, np.ndarray]
    official: Path
    llama: Path


def vocab_of(name: str) -> str:
    """The vocabulary of conftest's `vocab_files` that a member has."""
    return name.split("_")[0]


def make_member(folder: Path, name: str, vocab_files: Dict[str, Path]) -> Member:
    """Write the official folder of a member, and export it."""
    config = MEMBERS[name]
    weights = {key: value if "norm" in key or "ln_" in key else value * np.float32(0.5)
               for key, value in random_official(config, seed=7).items()}
    official = folder / "official"
    official.mkdir(parents=True)
    save_file({key: np.ascontiguousarray(value) for key, value in weights.items()}, official / "model.safetensors")
    (official / "config.json").write_text(json.dumps(config))
    vocab = vocab_files[vocab_of(name)]
    shutil.copyfile(vocab, official / f"tokenizer{vocab.suffix}")
    assert convert(["--from", str(official), "--to", "llama", str(folder / "llama"), "--verify"]) == 0
    return Member(config, weights, official, folder / "llama")
