"""A tiny model that shares its vocabulary with the small tokenizer of vocab_fixtures, and its checkpoint."""
from pathlib import Path
from typing import Any, Dict, List, Tuple

import numpy as np
from model_fixtures import HF_CONFIGS, random_official, to_mindspore

TINY_SIZES = {"vocab_size": 600, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 48}


def tiny_weights() -> Tuple[Dict[str, Any], Dict[str, np.ndarray]]:
    """Official config and random official weights of 12B's shape."""
    hf_config = {**HF_CONFIGS["12b"], "vocab_size": 600, "seq_length": 128}
    return hf_config, random_official(hf_config)


def save_tiny(path: Path) -> List[str]:
    """Write the checkpoint; returns the options that fit the tiny recipe to it."""
    import mindspore as ms
    ms.save_checkpoint([{"name": name, "data": ms.Tensor(value)}
                        for name, value in to_mindspore(*tiny_weights()).items()], str(path))
    return [word for key, value in TINY_SIZES.items() for word in (f"--model.model_config.{key}", str(value))]
