"""Checks of recipe, checkpoint and data before a model is built: each error is one clear line within seconds.

Nothing is loaded: only headers of checkpoints and the description of a data set are read; a data set without one is
read once (data/scan.py).
"""
import os
import re
from pathlib import Path
from typing import Dict, List, Optional, Tuple, Union

from mindformers.tools.logger import logger
from mindformers.tools.register import MindFormerConfig

from research.telechat.bridge.compat import chip_name
from research.telechat.checkpoint.folder import open_mindspore
from research.telechat.common.errors import CheckpointError, ConfigError
from research.telechat.data.meta import data_files
from research.telechat.data.scan import check_dataset as check_files
from research.telechat.model import kernels
from research.telechat.recipe.fields import FIELDS
from research.telechat.recipe.settings import dtype_name
from research.telechat.run import megatron
from research.telechat.run.batches import sequences_per_step, steps_per_epoch
from research.telechat.spec.parameters import parameters
from research.telechat.telechat_config import TelechatConfig

DATASET_CHECKS = "dataset_checks.json"     # in the output folder: what was read of data sets without meta.json
_SHIFTING_HANDLERS = ("PackingHandler", "AlpacaInstructDataHandler")       # of MindFormers' HFDataLoader
WITHOUT_BFLOAT16 = re.compile(r"Ascend910(A|Pro[A-C]?|Premium[A-C]?)?")   # MindSpore's names of the first 910
_SHOWN = 8                                 # errors listed in full; the rest are counted


def model_config(config: MindFormerConfig) -> TelechatConfig:
    """The model config of a recipe, checked; ConfigError names the invalid key."""
    section = (config.get("model") or {}).get("model_config")
    if not section:
        raise ConfigError("the recipe has no section model.model_config; begin from a recipe in research/telechat")
    keys = {key: value for key, value in section.items() if key not in ("type", "auto_register", "auto_map")}
    return TelechatConfig(**keys)


def check_ring_attention(config: MindFormerConfig) -> None:
    """Refuse ring attention on a device whose attention kernel lets tokens see those of later cards (docs/parallel.md).

    Needs the device; nothing can be asked where it is simulated. Raises ConfigError.
    """
    model = config.model.model_config
    cards = (config.get("parallel_config") or {}).get("context_parallel", 1) if config.get("use_parallel") else 1
    if not model.get("use_ring_attention") or cards == 1 or os.environ.get("MS_SIMULATION_LEVEL"):
        return
    if kernels.narrow_band_sees_keys():
        raise ConfigError("model_config.use_ring_attention: this device's attention kernel sees keys in a zero-width "
                          "band, so tokens would see those of later cards; set it to False (keys are "
                          "gathered), or parallel_config.context_parallel_algo to ulysses_cp")


def check_bfloat16(config: MindFormerConfig) -> None:
    """Refuse bfloat16 on Ascend 910A, which has none. Needs the device. Raises ConfigError."""
    name = chip_name()
    keys = [key for key in FIELDS if key.endswith(("_dtype", "_type"))
            and dtype_name(config.model.model_config.get(key)) == "bfloat16"]
    if keys and WITHOUT_BFLOAT16.fullmatch(name):
        raise ConfigError(f"{name} has no bfloat16: set model_config.{', '.join(keys)} to float16, and in training "
                          "runner_wrapper.scale_sense to a DynamicLossScaleUpdateCell (docs/cluster.md)")


def _listed(lines: List[str]) -> str:
    rest = len(lines) - _SHOWN
    return "; ".join(lines[:_SHOWN]) + (f"; and {rest} more" if rest > 0 else "")


def checkpoint_faults(expected: Dict[str, Tuple[int, ...]], found: Dict[str, Tuple[int, ...]]) -> List[str]:
    """What differs between the shapes of the model's parameters and those of a checkpoint, one text each."""
    other = [f"{name}: the recipe has {list(shape)}, the checkpoint {list(found[name])}"
             for name, shape in expected.items() if name in found and tuple(found[name]) != tuple(shape)]
    missing = [f"{name}: missing in the checkpoint" for name in expected if name not in found]
    return other + missing


def check_checkpoint(config: MindFormerConfig) -> None:
    """Compare the complete checkpoint that `load_checkpoint` names with the recipe's sizes, by its headers.

    Checkpoints that are already sharded (folders rank_N) are left to MindFormers. Raises ConfigError.
    """
    path = Path(str(config.load_checkpoint))
    if not path.exists():
        raise ConfigError(f"load_checkpoint: {path} does not exist; pass a checkpoint's file or folder with "
                          "--load_checkpoint")
    if path.is_dir() and any(re.match(r"rank_\d+$", entry.name) for entry in path.iterdir()):
        return
    try:
        checkpoint = open_mindspore(path)
    except CheckpointError as err:
        raise ConfigError(f"load_checkpoint: {err}") from err
    found = {name: info.shape for name, info in checkpoint.tensors.items()}
    checkpoint.close()
    expected = {param.ms_name: param.shape for param in parameters(model_config(config).to_variant())}
    faults = checkpoint_faults(expected, found)
    if faults:
        raise ConfigError(f"load_checkpoint: {path} is not a checkpoint of this recipe's model ({len(faults)} of "
                          f"{len(expected)} parameters differ): {_listed(faults)}. Use the recipe of the model that "
                          "the checkpoint was made for")
    extra = [name for name in found if re.match(r"(model\.|lm_head\.)", name) and name not in expected]
    if extra:
        logger.warning("load_checkpoint: %s holds %d parameters that the model does not have; they are not loaded: %s",
                       path, len(extra), _listed(extra))


def check_dataset(config: MindFormerConfig, section: str) -> None:
    """Check that the data set of `section` (train_dataset, eval_dataset) exists and fits the recipe's model.

    Raises ConfigError: no path, nothing there, records of another length, token ids beyond the vocabulary, no record.
    """
    loader = (config.get(section) or {}).get("data_loader")
    if not loader:
        raise ConfigError(f"the recipe has no section {section}.data_loader; inherit it (base_config: "
                          "../../configs/telechat/finetune.yaml)")
    if loader.get("type") == megatron.THEIRS:
        model = model_config(config)
        megatron.settle(config, section, model)
        _settle_columns(config, section, model)
        if section == "train_dataset":
            _check_enough_records(config, "the Megatron data set")
        return
    _check_labels(loader, section)
    if loader.get("type") != "MindDataset":
        return
    path = loader.get("dataset_dir") or loader.get("dataset_files")
    if not path:
        raise ConfigError(f"{section}: no data set given; pass --{section} FILE_OR_FOLDER (made by "
                          "research/telechat/telechat_preprocess.py)")
    model = model_config(config)
    _settle_columns(config, section, model)
    for each in path if isinstance(path, (list, tuple)) else [path]:
        note = check_files(each, vocab_size=model.vocab_size, seq_length=model.seq_length,
                           pad_token_id=model.pad_token_id, document_boundaries=model.document_boundaries,
                           template=model.chat_template,
                           remember=Path(str(config.get("output_dir") or "output")) / DATASET_CHECKS)
        if note:
            logger.warning("%s: %s", section, note)
    if section == "train_dataset":
        _check_enough_records(config, path)


def _settle_columns(config: MindFormerConfig, section: str, model: TelechatConfig) -> None:
    """The columns that this model reads."""
    columns = ["input_ids", "labels", *(["actual_seq_len"] if model.document_boundaries else [])]
    if config[section].get("input_columns") != columns:
        logger.info("%s.input_columns: %s, as model_config.document_boundaries is %s.", section, columns,
                    model.document_boundaries)
        config[section]["input_columns"] = columns
    if model.document_boundaries:            # MindFormers passes columns by name; the model calls the third so
        config[section]["construct_args_key"] = ["input_ids", "labels", "input_position"]


def _check_labels(loader: MindFormerConfig, section: str) -> None:
    """The model shifts labels itself: ConfigError for loaders that have shifted them, a warning for unknown ones."""
    kind = str(loader.get("type"))
    inner = loader.get("sub_data_loader") or []
    for each in inner if isinstance(inner, (list, tuple)) else [inner]:
        _check_labels(each, section)
    handlers = loader.get("handler") or []
    handlers = handlers if isinstance(handlers, (list, tuple)) else [handlers]
    shifting = [str(handler.get("type")) for handler in handlers if handler.get("type") in _SHIFTING_HANDLERS]
    if shifting or "Megatron" in kind:
        found = f"{kind} with {', '.join(shifting)}" if shifting else kind
        raise ConfigError(f"{section}.data_loader: {found} shifts the labels by one token, but TeleChat shifts them "
                          "itself: training would predict the token after next; use MindDataset with data made by "
                          "research/telechat/telechat_preprocess.py")
    if kind != "MindDataset" and not inner:
        logger.warning("%s.data_loader: data read by %s is not checked; its labels must be the tokens themselves, not "
                       "shifted by one: the model shifts them.", section, kind)


def training_files(config: MindFormerConfig) -> List[str]:
    """The MindRecord files that the recipe trains on; none where it reads another kind of data."""
    loader = (config.get("train_dataset") or {}).get("data_loader") or {}
    paths = loader.get("dataset_dir") or loader.get("dataset_files")
    if loader.get("type") != "MindDataset" or not paths:
        return []
    return [str(file) for path in (paths if isinstance(paths, (list, tuple)) else [paths])
            for file in data_files(Path(path))]


def record_count(files: List[str]) -> int:
    """Records in MindRecord files."""
    from mindspore.dataset import MindDataset
    return MindDataset(files, shuffle=False).get_dataset_size()


def training_records(config: MindFormerConfig) -> Optional[int]:
    """Records of the training set; None where the plugin does not know the loader."""
    loader = (config.get("train_dataset") or {}).get("data_loader") or {}
    if loader.get("type") == megatron.OURS:
        return megatron.samples(loader)
    files = training_files(config)
    return record_count(files) if files else None


def _check_enough_records(config: MindFormerConfig, path: Union[str, Path]) -> None:
    """ConfigError where the data set holds less than one batch: training would end at once without a step."""
    records, batch = training_records(config) or 0, sequences_per_step(config)
    if not steps_per_epoch(config, records):
        raise ConfigError(f"train_dataset: {path} has {records} records, fewer than one step's batch of {batch} "
                          "(batch_size * data_parallel * micro-batches * accumulation); lower runner_config.batch_size "
                          "or use more data")
