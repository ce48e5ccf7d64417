"""What the manifest of a checkpoint says, and a recipe that says otherwise; files that are not as they were written.

Called before a model is built, by training, prediction and evaluation. What a manifest is, see checkpoint/manifest.py.
Without one, the recipe alone decides.
"""
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import List, Optional

from mindformers.tools.logger import logger
from mindformers.tools.register import MindFormerConfig

from research.telechat.checkpoint.agreement import disagreements_of
from research.telechat.checkpoint.folder import open_mindspore
from research.telechat.checkpoint.integrity import check_files
from research.telechat.checkpoint.manifest import ModelFacts, facts_beside, facts_of
from research.telechat.checkpoint.strategy import newest_files
from research.telechat.common.environment import rank
from research.telechat.common.errors import CheckpointError, ConfigError
from research.telechat.data.meta import check_hashes as check_data_hashes
from research.telechat.recipe.fields import FIELDS
from research.telechat.run.preflight import model_config
from research.telechat.run.published import CONFLICT, MEANING, settle
from research.telechat.spec.variants import VARIANTS

# Keys of an official config.json for those of the model that a training may change.
_OFFICIAL_KEYS = {"rms_norm_eps": "layer_norm_epsilon", "theta": "rope_theta", "training_seqlen": "training_seqlen",
                  "base_seqlen": "base_seqlen"}


def checkpoint_facts(config: MindFormerConfig) -> Optional[ModelFacts]:
    """What the manifest of the checkpoint to load says of its model; None where there is none. Raises ConfigError."""
    path = Path(str(config.get("load_checkpoint") or ""))
    if not config.get("load_checkpoint") or not path.exists():
        return None
    try:
        return facts_beside(path)
    except CheckpointError as err:
        raise ConfigError(f"load_checkpoint: {err}") from err


def settle_with_checkpoint(config: MindFormerConfig) -> Optional[ModelFacts]:
    """Complete the recipe by what the checkpoint to load says, and compare them (run/published.py).

    Returns what the checkpoint says. Raises ConfigError.
    """
    facts = checkpoint_facts(config)
    settle(config, facts)
    return facts


def facts_of_run(config: MindFormerConfig, base: Optional[ModelFacts]) -> ModelFacts:
    """What the checkpoints of a training say of their model: the recipe's values, and what else the `base` says."""
    recipe = model_config(config).to_variant()
    values = {key: value for key, value in asdict(recipe).items() if key in FIELDS}
    if base is None:
        name = config.model.model_config.get("net_name")
        variant = VARIANTS.get(str(name), recipe)
        return facts_of(replace(variant, **values), name if name in VARIANTS else None)
    official = base.config
    if official is not None:
        before = base.to_variant()
        official = {**official, **{_OFFICIAL_KEYS[one.key]: one.recipe
                                   for one in disagreements_of(recipe, before, only=list(FIELDS))
                                   if one.key in _OFFICIAL_KEYS}}
    name = config.model.model_config.get("net_name")
    return replace(base, name=name if name in VARIANTS else base.name, variant={**base.variant, **values},
                   config=official)


def _files_to_load(config: MindFormerConfig) -> List[Path]:
    """The files that this process, or another of this machine, reads of the checkpoint; raises CheckpointError."""
    path = Path(str(config.load_checkpoint))
    if not path.is_dir() or not any(re.match(r"rank_\d+$", entry.name) for entry in path.iterdir()):
        checkpoint = open_mindspore(path)
        checkpoint.close()
        return checkpoint.files
    if isinstance(config.get("resume_training"), str):
        name = re.sub(r"_rank_\d+", f"_rank_{rank()}", config.resume_training)
        return [path / f"rank_{rank()}" / name]
    files = newest_files(path)
    return list(files.values()) if config.get("auto_trans_ckpt") else [files[rank()]] if rank() in files else []


def check_hashes(config: MindFormerConfig) -> None:
    """Verify checkpoint and data sets against their hashes, once for each machine, unless `check_hashes` is False.

    This key and those of run/published.py are taken out of `config`. Raises ConfigError: a file has changed since it
    was written.
    """
    for key in (CONFLICT, MEANING):
        config.pop(key, None)
    if not config.pop("check_hashes", True):
        return
    count = 0
    if config.get("load_checkpoint") and Path(str(config.load_checkpoint)).exists():
        try:
            count = check_files(_files_to_load(config), remember=True)
        except CheckpointError as err:
            raise ConfigError(f"load_checkpoint: {err}. --check_hashes False loads it anyway") from err
    for section in _data_sections(config):
        loader = (config.get(section) or {}).get("data_loader") or {}
        paths = loader.get("dataset_dir") or loader.get("dataset_files") or []
        if loader.get("type") == "MindDataset":
            for path in paths if isinstance(paths, (list, tuple)) else [paths]:
                count += check_data_hashes(path)
    if count:
        logger.info("%d files of checkpoint and data match their recorded hashes (SHA-256).", count)


def _data_sections(config: MindFormerConfig) -> List[str]:
    training = config.run_mode in ("train", "finetune")
    evaluation = config.run_mode == "eval" or (training and config.get("do_eval"))
    return [*(["train_dataset"] if training else []), *(["eval_dataset"] if evaluation else [])]
