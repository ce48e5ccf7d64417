"""What stands beside the weights in a folder that other programs load: config.json, generation_config.json."""
from pathlib import Path
from typing import Dict, Optional

from research.telechat.checkpoint import manifest
from research.telechat.checkpoint.targets import Sizes, official_config
from research.telechat.common.errors import ConfigError
from research.telechat.common.files import json_text, read_json_object
from research.telechat.spec.llama_config import llama_config


def _unless_equal(path: Path, text: str) -> Dict[Path, str]:
    """The text of a file to write; none where the file that is there says the same."""
    return {} if path.is_file() and path.read_text(encoding="utf-8", errors="replace") == text else {path: text}


def official_texts(folder: Path, sizes: Sizes) -> Dict[Path, str]:
    """The texts of an official folder. ConfigError where another model is there."""
    texts = official_config(folder, sizes)
    for name, text in manifest.official_texts(sizes.facts).items():
        texts.update(_unless_equal(folder / name, text))
    return texts


def llama_texts(folder: Path, sizes: Sizes, dtype: str, max_length: Optional[int]) -> Dict[Path, str]:
    """The texts of a Llama folder. ConfigError where another model is there, or the length has no config.

    dtype: of the weights; max_length: see `llama_config`.
    """
    path = folder / "config.json"
    config = llama_config(sizes.variant, dtype, max_length, sizes.config)
    if path.is_file() and read_json_object(path, "model config") != config:
        raise ConfigError(f"{path} describes another model; remove it or give another folder")
    generation = (sizes.facts.generation if sizes.facts else None) or {
        key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {**_unless_equal(path, json_text(config)),
            **_unless_equal(folder / manifest.GENERATION_CONFIG, json_text(generation))}
