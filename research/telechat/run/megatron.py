"""Training on Megatron's data sets (NAME.bin, NAME.idx), read by MindFormers' BlendedMegatronDatasetDataLoader.

Its samples have shifted labels, and TeleChat shifts them itself; here they become records of the form that is trained
on otherwise (data/megatron.py), so that labels are shifted once and losses are those of the same tokens as text.
"""
import hashlib
import importlib
import re
import sys
import types
from pathlib import Path
from typing import List, Optional, Sequence, Tuple, Union

import numpy as np
from mindformers.tools.logger import logger
from mindformers.tools.register import MindFormerConfig, MindFormerModuleType, MindFormerRegister

from research.telechat.common.errors import ConfigError
from research.telechat.common.files import JsonObject
from research.telechat.data import megatron
from research.telechat.telechat_config import TelechatConfig

THEIRS, OURS = "BlendedMegatronDatasetDataLoader", "TelechatMegatronDataLoader"
DOCUMENTS = 128                                        # document ends of a sample, as preprocessing has them
_PHASES = ("train", "valid", "test")
_HELPERS = "mindformers.dataset.blended_datasets.helpers"
_COMPILED = ("build_sample_idx", "build_blending_indices", "build_exhaustive_blending_indices")


def settle(config: MindFormerConfig, section: str, model: TelechatConfig) -> None:
    """Turn MindFormers' loader in `section` (train_dataset, eval_dataset) into the one below, in place.

    Raises ConfigError: settings with which losses would not be those of the same tokens as text, files that are
    missing or broken, ids outside the vocabulary, fewer tokens than one sample.
    """
    loader = config[section]["data_loader"]
    place = f"{section}.data_loader"
    keys = loader.get("config")
    if loader.get("datasets_type") != "GPTDataset" or not isinstance(keys, dict):
        raise ConfigError(f"{place}: expected datasets_type: GPTDataset and a section config with data_path, found "
                          f"{loader.get('datasets_type')!r} and {keys!r} (docs/data.md)")
    phase = loader.get("phase", "train")
    if phase not in _PHASES:
        raise ConfigError(f"{place}.phase: expected {', '.join(_PHASES)}, found {phase!r}")
    sizes = loader.get("sizes")
    if (not isinstance(sizes, (list, tuple)) or len(sizes) != len(_PHASES)
            or any(not isinstance(size, int) or isinstance(size, bool) or size < 0 for size in sizes)
            or not sizes[_PHASES.index(phase)]):
        raise ConfigError(f"{place}.sizes: expected the numbers of samples for training, validation and test, such as "
                          f"[1000, 0, 0], with one above 0 for {phase}, found {sizes!r}")
    if keys.get("seq_length", model.seq_length) != model.seq_length:
        raise ConfigError(f"{place}.config.seq_length is {keys['seq_length']}, and model.model_config.seq_length is "
                          f"{model.seq_length}; make them equal")
    keys["seq_length"] = model.seq_length
    given = loader.get("dataset_dir") or loader.get("dataset_files")       # what --train_dataset sets
    if given and (keys.get("data_path") or keys.get(f"{phase}_data_path")):
        raise ConfigError(f"{section}: both {given} and {place}.config name data sets; leave one of them out")
    if given:
        keys["data_path"] = given
    _settle_documents(keys, place, model)
    chosen, split = _sets(keys, place, phase)
    for prefix in chosen:
        _check_set(prefix, split, _PHASES.index(phase), keys, place, model)
    if keys.get("pad", -1) != -1:
        logger.warning("%s.config.pad is left out: samples are pieces of one stream of tokens, nothing is padded.",
                       place)
    # Not cached: MindFormers keeps one loss mask for all samples and changes it.
    keys.update(pad=-1, create_attention_mask=False, create_compressed_eod_mask=False, reset_position_ids=True,
                reset_attention_mask=False)
    if not keys.get("path_to_cache"):
        names = "\n".join(f"{prefix} {file.stat().st_size} {file.stat().st_mtime_ns}" for prefix in chosen
                          for file in megatron.files_of(prefix))
        digest = hashlib.sha256(names.encode()).hexdigest()[:16]
        keys["path_to_cache"] = str(Path(str(config.get("output_dir") or "output")) / "megatron_index" / digest)
    loader["type"] = OURS
    loader["document_end"] = keys.get("eod") if model.document_boundaries else None


def samples(loader: JsonObject) -> int:
    """Records that a settled loader gives."""
    return int(loader["sizes"][_PHASES.index(loader.get("phase", "train"))])


def _settle_documents(keys: JsonObject, place: str, model: TelechatConfig) -> None:
    """Document boundaries are the model's (model_config.document_boundaries) or there are none."""
    masks = bool(keys.get("reset_attention_mask") or keys.get("create_compressed_eod_mask"))
    if masks and not model.document_boundaries:
        raise ConfigError(f"{place}.config asks for attention within documents (reset_attention_mask or "
                          "create_compressed_eod_mask), and model.model_config.document_boundaries is False; set it "
                          "to True, or leave these keys out")
    if keys.get("reset_position_ids") and not model.document_boundaries:
        raise ConfigError(f"{place}.config.reset_position_ids: positions begin again with each document where "
                          "model.model_config.document_boundaries is True; set it to True, or leave the key out")
    needed = [name for name, on in (("model.model_config.document_boundaries", model.document_boundaries),
                                    (f"{place}.config.eod_mask_loss", keys.get("eod_mask_loss"))) if on]
    end = keys.get("eod", -1)
    if needed and (not isinstance(end, int) or not 0 <= end < model.vocab_size):
        raise ConfigError(f"{place}.config.eod: expected the id of the token that ends a document, below "
                          f"{model.vocab_size}, as {needed[0]} is True; found {end!r}")


def _sets(keys: JsonObject, place: str, phase: str) -> Tuple[List[str], List[float]]:
    """(the sets of `phase`, the shares of each for training, validation and test)."""
    own = keys.get(f"{phase}_data_path")
    names = own if own is not None else keys.get("data_path")
    if not names:
        raise ConfigError(f"{place}.config.data_path: no data set is named; pass the list of the files' names without "
                          ".bin and .idx, or of weights and names in turn (docs/data.md)")
    shares = [1.0 if name == phase else 0.0 for name in _PHASES]
    if own is None:
        shares = [float(number) for number in re.findall(r"\d*\.?\d+", str(keys.get("split") or ""))]
        if sum(shares) <= 0 or len(shares) > len(_PHASES):
            raise ConfigError(f"{place}.config.split: expected the shares for training, validation and test, such as "
                              f"'1,0,0', found {keys.get('split')!r}")
        keys["split"] = ",".join(str(share) for share in shares)
        shares += [0.0] * (len(_PHASES) - len(shares))
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, (list, tuple)):
        raise ConfigError(f"{place}.config.data_path: expected a list, found {names!r}")
    texts = [str(name) for name in names]
    keys["data_path" if own is None else f"{phase}_data_path"] = texts
    weighted = len(texts) % 2 == 0 and all(_number(text) for text in texts[::2])
    return [text.strip() for text in (texts[1::2] if weighted else texts)], shares


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _check_set(prefix: str, shares: List[float], phase: int, keys: JsonObject, place: str, model: TelechatConfig
               ) -> None:
    """ConfigError for a set that is broken, has other ids than the model, or too few tokens in a part that is read."""
    index = megatron.read_index(prefix)
    ends = np.round(np.cumsum([0.0, *shares]) / sum(shares) * len(index.lengths)).astype(int)
    least = model.seq_length + int(bool(keys.get("add_extra_token_to_sequence", True)))
    for number, name in enumerate(_PHASES):
        tokens = int(index.lengths[ends[number]:ends[number + 1]].sum())
        if shares[number] and tokens < (least if number == phase else 1):
            raise ConfigError(f"{place}: the part of {prefix} for {name} holds {tokens} tokens in "
                              f"{ends[number + 1] - ends[number]} documents, fewer than one sample ({least}); change "
                              "config.split, or use more data")
    logger.info("%s: %s.", place, megatron.check_tokens(prefix, index, model.vocab_size))


class _Records:
    """The samples of a GPTDataset or a blend of several as records, for MindSpore's GeneratorDataset."""

    def __init__(self, source: Sequence[Tuple[np.ndarray, ...]], most: int, document_end: Optional[int], ends: int,
                 multiple: int):
        self.source, self.document_end, self.ends, self.multiple = source, document_end, ends, multiple
        self.count = min(len(source), most)

    def __len__(self) -> int:
        return -(-self.count // self.multiple) * self.multiple

    def __getitem__(self, number: int) -> Tuple[np.ndarray, ...]:
        tokens, labels, counts = self.source[min(int(number), self.count - 1)][:3]
        ids, targets = megatron.record_of(tokens, labels, counts if number < self.count else np.zeros_like(counts))
        if self.document_end is None:
            return ids, targets
        return ids, targets, megatron.document_ends(tokens, self.document_end, self.ends)


def provide_helpers() -> None:
    """MindFormers' compiled functions, from NumPy where they are not compiled: then no compiler is needed, and nothing
    is written into the installed package."""
    try:
        importlib.import_module(_HELPERS)
    except ImportError:
        module = types.ModuleType(_HELPERS)
        for name in _COMPILED:
            setattr(module, name, getattr(megatron, name))
        sys.modules[_HELPERS] = module
        package, _, own = _HELPERS.rpartition(".")
        vars(importlib.import_module(package))[own] = module


@MindFormerRegister.register(MindFormerModuleType.DATASET_LOADER)
class TelechatMegatronDataLoader:
    """What `settle` puts in the place of MindFormers' loader; recipes name theirs."""

    def __new__(cls, sizes: List[int], config: JsonObject, column_names: Optional[List[str]] = None,
                shuffle: bool = False, num_shards: Optional[int] = None, shard_id: Optional[int] = None,
                phase: str = "train", document_end: Optional[int] = None,
                **others: Union[str, int, bool, None]) -> "TelechatMegatronDataLoader":
        """A GeneratorDataset of the columns input_ids [N + 1], labels [N + 1] and, with `document_end`, actual_seq_len
        [eod_pad_length], all int32. Arguments as those of MindFormers' loader."""
        del others                                     # of other loaders
        from mindformers.dataset.blended_datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
        from mindformers.dataset.blended_datasets.gpt_dataset import GPTDataset
        from mindformers.dataset.dataloader.blended_megatron_dataloader import MegatronDatasetBuilder
        from mindspore.dataset import GeneratorDataset
        provide_helpers()
        settings = MegatronDatasetBuilder("GPTDataset", config).init_gpt_dataset_config()
        built = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, settings).build()
        number = _PHASES.index(phase)
        padded = 1 if phase == "train" else num_shards or 1          # each sample of an evaluation once
        records = _Records(built[number], sizes[number], document_end, config.get("eod_pad_length", DOCUMENTS), padded)
        return GeneratorDataset(records, column_names=column_names, shuffle=shuffle, num_shards=num_shards,
                                shard_id=shard_id, num_parallel_workers=1)
