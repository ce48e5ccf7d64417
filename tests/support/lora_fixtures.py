"""Random adapters, and the error line of the commands that take them."""
import json

import numpy as np
from model_fixtures import HF_CONFIGS

from research.telechat.checkpoint import lora
from research.telechat.commands import peft as convert_lora
from research.telechat.spec.variants import variant_from_hf

RANK, ALPHA = 3, 6.0


def random_adapter(family, seed=1):
    """An adapter of every linear layer, large enough to change the logits."""
    rng = np.random.default_rng(seed)
    pairs = {param.ms_name: (rng.normal(0, 0.2, (RANK, param.shape[1])).astype(np.float32),
                             rng.normal(0, 0.2, (param.shape[0], RANK)).astype(np.float32))
             for param in lora.target_params(variant_from_hf(HF_CONFIGS[family]))}
    return lora.Adapter(pairs, ALPHA)


def save_adapter(path, adapter):
    convert_lora.write_tensors(path, lora.mindspore_tensors(adapter), {"format": "ms"})
    (path.parent / lora.CONFIG_NAME).write_text(json.dumps({"lora_alpha": adapter.alpha}))


def command_error(capsys, module, arguments):
    assert module.main([str(argument) for argument in arguments]) == 1
    text = capsys.readouterr().err.strip()
    assert text.startswith("error: ") and "Traceback" not in text
    return text.splitlines()[-1]
