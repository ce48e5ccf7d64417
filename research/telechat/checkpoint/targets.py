"""The files of a conversion's result: which there are, how they are called, and what each holds.

A MindSpore result is one file or a folder with an index; an official or Llama one a folder that other programs load.
"""
import json
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

from research.telechat import __version__
from research.telechat.checkpoint.conversion import Target
from research.telechat.checkpoint.manifest import Manifest, ModelFacts, facts_of, manifest_path
from research.telechat.checkpoint.reader import BIN_INDEX_NAME, INDEX_NAMES
from research.telechat.checkpoint.writer import (
    Layout,
    OutTensor,
    bin_layout,
    ckpt_layout,
    cut_shards,
    index_text,
    partial_path,
    safetensors_layout,
)
from research.telechat.common.errors import CheckpointError, ConfigError
from research.telechat.common.files import JsonObject
from research.telechat.spec.hf_config import hf_config
from research.telechat.spec.llama_config import is_llama_config
from research.telechat.spec.parameters import LLAMA, MINDSPORE
from research.telechat.spec.variants import Variant, read_hf_config, variant_from_hf

_BIN_SHARD = 10**9               # bytes; torch writes a .bin from memory, so that its size is memory


class Sizes(NamedTuple):
    """Sizes of a model, the official config they come from (None: from the table of variants), and all else that the
    checkpoint says (None: nothing is known)."""

    variant: Variant
    config: Optional[JsonObject]
    facts: Optional[ModelFacts] = None


def mindspore_target(path: Path, kind: str, tensors: Sequence[OutTensor], sizes: Sizes, shard: Optional[int]) -> Target:
    """Names of a MindSpore result: one file, or, in a folder, mindspore.ckpt or shards with an index."""
    metadata = {"format": "ms", "telechat_version": __version__}
    if sizes.variant.fused_projections:
        metadata["telechat_groups"] = "per_head"
    if sizes.config is not None:
        metadata["telechat_config"] = json.dumps(sizes.config, separators=(",", ":"))
    if path.suffix in (".ckpt", ".safetensors") and not path.is_dir():
        layout = (ckpt_layout(path, tensors) if path.suffix == ".ckpt"
                  else safetensors_layout(path, tensors, metadata))
        return Target([layout], {}, _journal(path), MINDSPORE, False, *_manifest(MINDSPORE, sizes, path, False))
    if path.suffix in (".bin", ".pt", ".pth") and not path.is_dir():
        raise CheckpointError(f"--mindspore_path {path} must end in .ckpt or .safetensors, or be a folder")
    texts = official_config(path, sizes) if sizes.config is not None else {}
    if kind == "ckpt":
        return Target([ckpt_layout(path / "mindspore.ckpt", tensors)], texts, _journal(path / "mindspore.ckpt"),
                      MINDSPORE, False, *_manifest(MINDSPORE, sizes, path, True))
    layouts = _shards(path, "model", ".safetensors", tensors, shard or 5 * 10**9,
                      lambda file, part: safetensors_layout(file, part, metadata))
    for name in INDEX_NAMES:
        texts[path / name] = index_text(layouts)
    return Target(layouts, texts, _journal(path / "conversion"), MINDSPORE, True,
                  *_manifest(MINDSPORE, sizes, path, True))


def torch_target(path: Path, kind: str, tensors: Sequence[OutTensor], sizes: Sizes, layout: str, shard: Optional[int]
                 ) -> Target:
    """Names of an official or Llama result: a folder with shards and index, or one official file alone. What else the
    folder holds is decided in checkpoint/export.py."""
    if path.suffix in (".bin", ".pth", ".pt", ".safetensors") and not path.is_dir():
        if layout == LLAMA:
            raise CheckpointError(f"{path}: the Llama layout is a folder with config.json and tokenizer; pass a folder")
        single = (safetensors_layout(path, tensors, {"format": "pt"}) if path.suffix == ".safetensors"
                  else bin_layout(path, tensors))
        return Target([single], {}, _journal(path), layout, False, *_manifest(layout, sizes, path, False))
    if kind == "bin":
        layouts = _shards(path, "pytorch_model", ".bin", tensors, shard or _BIN_SHARD, bin_layout)
        index = BIN_INDEX_NAME
    else:
        layouts = _shards(path, "model", ".safetensors", tensors, shard or 5 * 10**9,
                          lambda file, part: safetensors_layout(file, part, {"format": "pt"}))
        index = INDEX_NAMES[0]
    texts = {path / index: index_text(layouts)} if len(layouts) > 1 else {}
    return Target(layouts, texts, _journal(path / "conversion"), layout, True, *_manifest(layout, sizes, path, True))


def _manifest(kind: str, sizes: Sizes, path: Path, folder: bool) -> Tuple[Manifest, Path]:
    """The manifest of a result, but for its files, and where it goes."""
    facts = sizes.facts or facts_of(sizes.variant, config=sizes.config)
    return Manifest(kind, model=facts), manifest_path(path, folder)


def official_config(folder: Path, sizes: Sizes) -> Dict[Path, str]:
    """The config.json to write into `folder`; none where the one that is there says the same."""
    path = folder / "config.json"
    if path.is_file():
        there = read_hf_config(path)
        if not is_llama_config(there) and variant_from_hf(there) == variant_from_hf(
                sizes.config or hf_config(sizes.variant)):
            return {}
        raise ConfigError(f"{path} describes another model; remove it or use another folder")
    return {path: json.dumps(sizes.config or hf_config(sizes.variant), indent=2) + "\n"}


def _journal(path: Path) -> Path:
    return partial_path(path).with_name(partial_path(path).name + ".json")


def _shards(folder: Path, stem: str, suffix: str, tensors: Sequence[OutTensor], limit: int,
            layout: Callable[[Path, List[OutTensor]], Layout]) -> List[Layout]:
    shards = cut_shards(tensors, limit)
    names = ([f"{stem}{suffix}"] if len(shards) == 1 else
             [f"{stem}-{number:05d}-of-{len(shards):05d}{suffix}" for number in range(1, len(shards) + 1)])
    return [layout(folder / name, part) for name, part in zip(names, shards)]
