"""LoRA adapters as data: which layers a pattern meets, reading adapters, adding them to weights, the format of PEFT.

The adapter of a linear layer y = x W^T is A [r, in] and B [out, r]; trained, the weight is W + s B A with
s = lora_alpha / r (Hu et al., 2021). MindFormers trains it (`pet_config`); this module needs neither
MindSpore nor PyTorch. Commands: scripts/merge_lora.py, scripts/convert_lora.py.
"""
import hashlib
import json
import re
from pathlib import Path
from typing import Dict, Iterable, List, NamedTuple, Optional, Tuple

import numpy as np

from research.telechat.checkpoint.dtypes import RAW, cast
from research.telechat.checkpoint.folder import open_mindspore
from research.telechat.checkpoint.integrity import check_files
from research.telechat.checkpoint.reader import Checkpoint, TensorInfo
from research.telechat.checkpoint.slices import (
    Side,
    check_named,
    check_ranks,
    open_ranks,
    rank_files,
    read_bytes,
    read_whole,
    tensor_names,
)
from research.telechat.checkpoint.strategy import read_strategy
from research.telechat.common.errors import CheckpointError, ConfigError
from research.telechat.common.files import JsonObject
from research.telechat.spec.parameters import LLAMA, MINDSPORE, OFFICIAL, Param, official_layout, parameters, row_order
from research.telechat.spec.variants import Variant

CONFIG_NAME = "adapter_config.json"                  # of an adapter; as PEFT calls it
PEFT_NAMES = ("adapter_model.safetensors",)
_TARGET = re.compile(r"model\.layers\.\d+\.[a-z_]+\.(\w+)\.weight$")
_CONTAINERS = ("layers", "attention", "feed_forward", *map(str, range(10)))    # cells on the way to a linear layer
_PART = re.compile(r"(.+)\.(?:mindpet|tk)_delta_lora_([abAB])$")
_PEFT_PREFIX, _LLAMA_PREFIX = "base_model.model.transformer.", "base_model.model."
_CHOOSE = "use the model that the adapter was trained on (--model_name or --config)"


class Adapter(NamedTuple):
    """A: [r, in] and B: [out, r], float32, by the name of the weight that they belong to."""

    pairs: Dict[str, Tuple[np.ndarray, np.ndarray]]
    alpha: float

    @property
    def rank(self) -> int:
        """r of the first layer; `check_adapter` demands the same of all."""
        return len(next(iter(self.pairs.values()))[0])

    @property
    def digest(self) -> str:
        """SHA-256 of what it adds to the weights: names, A, B and the scale; the file format does not matter."""
        found = hashlib.sha256(repr(self.alpha / self.rank).encode())
        for name, pair in sorted(self.pairs.items()):
            found.update(f"{name} {pair[0].shape} {pair[1].shape}".encode())
            for part in pair:
                found.update(np.ascontiguousarray(part, "<f4").tobytes())
        return found.hexdigest()


def target_params(variant: Variant) -> List[Param]:
    """The weights that LoRA can adapt: the matrices of the decoder layers."""
    return [param for param in parameters(variant) if len(param.shape) == 2 and _TARGET.match(param.ms_name)]


def check_target_modules(pattern: object, variant: Variant) -> List[str]:
    """The names of linear layers that `pet_config.target_modules` meets, and those of its alternatives that meet none.

    MindFormers matches the pattern against the beginning of the layer's own name (`wq`), not of its path. Returns the
    alternatives (parts between |) without a match; ConfigError where nothing matches at all.
    """
    found = (_TARGET.match(param.ms_name) for param in target_params(variant))
    names = list(dict.fromkeys(match[1] for match in found if match))
    known = f"this model has {', '.join(names)} (for example '.*{names[0]}|.*wo')"
    if not isinstance(pattern, str) or not pattern:
        raise ConfigError(f"pet_config.target_modules must be a pattern, found {pattern!r}; {known}")
    try:
        swallowed = next((name for name in _CONTAINERS if re.match(pattern, name)), None)
        if swallowed:
            raise ConfigError(f"pet_config.target_modules {pattern!r} also matches the container {swallowed!r}, inside "
                              f"which MindFormers would adapt nothing; {known}")
        if not any(re.match(pattern, name) for name in names):
            raise ConfigError(f"pet_config.target_modules {pattern!r} matches no linear layer; {known}")
        return [part for part in pattern.split("|") if not any(re.match(part, name) for name in names)]
    except re.error as err:
        raise ConfigError(f"pet_config.target_modules {pattern!r} is not a valid pattern: {err}; {known}") from err


def check_pet_config(pet_config: JsonObject, variant: Variant) -> List[str]:
    """Check the keys that LoRA needs; returns warnings. ConfigError names the key at fault."""
    kind = pet_config.get("pet_type")
    if kind != "lora":
        raise ConfigError(f"pet_config.pet_type: expected lora (the only supported type), found {kind!r}")
    rank, alpha = pet_config.get("lora_rank", 8), pet_config.get("lora_alpha", 16)
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ConfigError(f"pet_config.lora_rank: expected a positive number, found {rank!r}")
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or alpha <= 0:
        raise ConfigError(f"pet_config.lora_alpha: expected a positive number, found {alpha!r}")
    dropout = pet_config.get("lora_dropout", 0.01)
    if not isinstance(dropout, (int, float)) or isinstance(dropout, bool) or not 0 <= dropout < 1:
        raise ConfigError(f"pet_config.lora_dropout: expected a probability in [0, 1), found {dropout!r}")
    return [f"pet_config.target_modules: {part!r} matches no linear layer of this model"
            for part in check_target_modules(pet_config.get("target_modules"), variant)]


def read_float32(checkpoint: Checkpoint, name: str) -> np.ndarray:
    """A whole tensor in float32."""
    return _as_float32(read_bytes(checkpoint, name), name, checkpoint.tensors[name])


def _as_float32(raw: np.ndarray, name: str, info: TensorInfo) -> np.ndarray:
    """Raw items of the tensor `name`, of which `info` has the type, in float32."""
    if info.dtype not in RAW:
        raise CheckpointError(f"{info.file}: tensor {name} is of type {info.dtype}; expected {', '.join(RAW)}")
    return cast(raw.reshape(-1).view(RAW[info.dtype]), info.dtype, "F32").view(np.float32).reshape(raw.shape)


def read_adapter(path: Path, alpha: Optional[float] = None, strategy: Optional[Path] = None, verify: bool = False
                 ) -> Adapter:
    """The adapter in a MindSpore checkpoint, which may hold other parameters as well.

    path: a file; or, for an adapter sharded over several ranks, the folder that contains rank_0, rank_1, ...
    (of which the newest files count), or one rank's file.
    alpha: lora_alpha; None: from the file's adapter_config.json.
    strategy: how it is sharded, a file or folder; None: the folder `strategy` next to that of the ranks, if path is
    such a folder.
    verify: first check the files against the hashes in their manifests.

    Raises CheckpointError where something is missing or damaged.
    """
    cut = path.is_dir() and any(re.fullmatch(r"rank_\d+", entry.name) for entry in path.iterdir())
    if cut and strategy is None:
        strategy = path.resolve().parent / "strategy"
        if not strategy.is_dir():
            raise CheckpointError(f"{path} contains files of several ranks, but there is no {strategy} to say how "
                                  f"the adapter is sharded; pass --adapter_strategy, the folder output/strategy of the "
                                  f"run. With data parallelism only, pass one rank's file: each has the whole adapter")
    side = Side(None, {})
    if strategy is not None:
        plan = read_strategy(strategy)
        side = Side(plan, rank_files(path, plan))
    opened = open_ranks(side.files) if side.strategy else {0: open_mindspore(path, "--adapter")}
    try:
        files = [file for checkpoint in opened.values() for file in checkpoint.files]
        check_files([*files, *(one for one in [files[0].with_name(CONFIG_NAME)] if one.is_file())], False, verify)
        parts: Dict[str, Dict[str, np.ndarray]] = {}
        matches = ((name, _PART.fullmatch(name)) for name in tensor_names(opened) if not name.startswith("adam_"))
        found = {name: match for name, match in matches if match}
        check_ranks(side, "--adapter_strategy")
        check_named(side, opened, set(found))
        for name, match in found.items():
            info = next(checkpoint.tensors[name] for checkpoint in opened.values() if name in checkpoint.tensors)
            parts.setdefault(f"{match[1]}.weight", {})[match[2].lower()] = _as_float32(
                read_whole(side, opened, name), name, info)
    finally:
        for checkpoint in opened.values():
            checkpoint.close()
    if not parts:
        raise CheckpointError(f"{path} has no LoRA adapter (no tensor ...mindpet_delta_lora_a); pass the file from "
                              "checkpoint_trainable of a LoRA run")
    beside = path / "rank_0" if cut else path
    return _adapter(parts, _alpha_beside(beside) if alpha is None else alpha, path)


def _adapter(parts: Dict[str, Dict[str, np.ndarray]], alpha: float, path: Path) -> Adapter:
    """An adapter from {weight: {"a": A, "b": B}}; CheckpointError where a matrix is missing or does not fit."""
    for name, pair in parts.items():
        if set(pair) != {"a", "b"}:
            raise CheckpointError(f"{path}: the adapter of {name} has only lora_{next(iter(pair))}; copy or "
                                  "save the adapter again")
    return check_adapter(Adapter({name: (pair["a"], pair["b"]) for name, pair in parts.items()}, alpha), path)


def check_adapter(adapter: Adapter, path: Path) -> Adapter:
    """`adapter`; CheckpointError where its matrices do not fit each other."""
    if adapter.alpha <= 0:
        raise CheckpointError(f"{path}: lora_alpha must be positive, found {adapter.alpha}; use the recipe's")
    for name, (a, b) in adapter.pairs.items():
        if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1]:
            raise CheckpointError(f"{path}: A {list(a.shape)} and B {list(b.shape)} of {name} do not match; "
                                  "expected [r, in] and [out, r]: copy or save the adapter again")
        if len(a) != adapter.rank:
            raise CheckpointError(f"{path}: {name} has rank {len(a)}, others rank {adapter.rank}; "
                                  "all layers must have the same rank")
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise CheckpointError(f"{path}: the adapter of {name} has NaN or infinite values; use one saved "
                                  "earlier in training")
    return adapter


def _alpha_beside(path: Path) -> float:
    config = (path if path.is_dir() else path.parent) / CONFIG_NAME
    if not config.is_file():
        raise CheckpointError(f"lora_alpha is unknown: there is no {config}; pass the recipe's with --lora_alpha")
    return float(read_adapter_config(config)["lora_alpha"])


def read_adapter_config(path: Path) -> JsonObject:
    """adapter_config.json; CheckpointError where it is unusable or asks for what is not plain LoRA."""
    try:
        config: JsonObject = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as err:
        raise CheckpointError(f"{path} cannot be read: {err}; expected the JSON file that PEFT writes") from err
    alpha = config.get("lora_alpha") if isinstance(config, dict) else None
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool):
        raise CheckpointError(f"{path}: lora_alpha must be a number, found {alpha!r}; set it to that of the training")
    for key in ("use_dora", "use_rslora", "lora_bias", "alpha_pattern", "rank_pattern", "modules_to_save"):
        if config.get(key):
            raise CheckpointError(f"{path}: {key} is {config[key]!r}; only plain LoRA is supported: train without "
                                  "it")
    if config.get("bias", "none") != "none":
        raise CheckpointError(f"{path}: bias is {config['bias']!r}; only adapters without biases are supported: train "
                              "with bias 'none'")
    return config


def add_to_rows(weight: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
    """weight + scale B A, float32. weight: [rows, in]; a: [r, in]; b: [rows, r], the same rows of B."""
    result: np.ndarray = weight + np.float32(scale) * (b @ a)
    return result


def _match_params(names: Iterable[str], variant: Variant, path: Path) -> Dict[str, Param]:
    found = {param.ms_name: param for param in target_params(variant)}
    unknown = [name for name in names if name not in found]
    if unknown:
        raise CheckpointError(f"{path}: {len(unknown)} adapted layers do not exist in this model, first {unknown[0]}; "
                              f"{_CHOOSE}")
    return {name: found[name] for name in names}


def to_peft(adapter: Adapter, variant: Variant, path: Path, layout: str = OFFICIAL
            ) -> Tuple[Dict[str, np.ndarray], JsonObject]:
    """(tensors, adapter_config.json) of `adapter` for PEFT with the official model, or with the Llama layout, which is
    the official one of TeleChat3.

    Rows of fused weights return to the official order. Llama's projections of one weight share its A. `path` is named
    in errors.
    """
    tensors, targets, transposed = {}, [], False
    layout = official_layout(variant) if layout == OFFICIAL else layout
    for name, param in _match_params(adapter.pairs, variant, path).items():
        a, b = adapter.pairs[name]
        if (len(b), a.shape[1]) != param.shape:
            raise CheckpointError(f"{path}: the adapter of {name} is for [{len(b)}, {a.shape[1]}], the model has "
                                  f"{list(param.shape)}; {_CHOOSE}")
        order = row_order(param, param.groups_in(MINDSPORE), param.groups_in(layout))
        rows = b if order is None else b[order]
        modules = _llama_modules(param) if layout == LLAMA else [_module(param)]
        for module, part in zip(modules, np.split(rows, len(modules))):
            prefix = _LLAMA_PREFIX if layout == LLAMA else _PEFT_PREFIX
            tensors[f"{prefix}{module}.lora_A.weight"] = a
            tensors[f"{prefix}{module}.lora_B.weight"] = part
            targets.append(module.rpartition(".")[2] if layout == LLAMA else module.split(".", 2)[2])
        transposed |= param.transposed and layout == OFFICIAL
    rank, alpha = adapter.rank, adapter.alpha
    return tensors, {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None, "r": rank,
                     "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha, "lora_dropout": 0.0,
                     "bias": "none", "fan_in_fan_out": transposed, "inference_mode": True,
                     "target_modules": sorted(set(targets))}


def from_peft(tensors: Dict[str, np.ndarray], alpha: float, variant: Variant, path: Path) -> Adapter:
    """The inverse of `to_peft`, of both layouts, which the names tell; official names count with and without the prefix
    `transformer.`.

    Where Llama's projections of one weight have an A each, as after training there, theirs are stacked: the rank grows
    (`_joined`), and lora_alpha with it, so that the product stays the same.
    """
    llama = any(name.startswith(f"{_LLAMA_PREFIX}model.layers.") for name in tensors)
    modules = {param: _llama_modules(param) if llama else [_module(param)] for param in target_params(variant)}
    wanted = {module: (param, number) for param, names in modules.items() for number, module in enumerate(names)}
    parts: Dict[Param, Dict[int, Dict[str, np.ndarray]]] = {}
    for name, value in tensors.items():
        match = re.fullmatch(r"base_model\.model\.(?:transformer\.)?(.+)\.lora_([AB])(?:\.default)?\.weight", name)
        found = wanted.get(match[1]) if match else None
        if match is None or found is None:
            raise CheckpointError(f"{path}: {name} belongs to no linear layer of this model; {_CHOOSE}")
        param, number = found
        shape = (param.shape[0] // len(modules[param]), param.shape[1])
        if (value.shape[0] if match[2] == "B" else value.shape[-1]) != shape[match[2] == "A"]:
            raise CheckpointError(f"{path}: {name} has shape {list(value.shape)}, the weight {list(shape)}; {_CHOOSE}")
        parts.setdefault(param, {}).setdefault(number, {})[match[2].lower()] = value
    if not parts:
        raise CheckpointError(f"{path} has no adapter; expected tensors named base_model.model....lora_A.weight and "
                              "lora_B.weight, as PEFT saves them")
    rank, pairs = 0, {}
    for param, pieces in parts.items():
        for number, pair in pieces.items():
            if set(pair) != {"a", "b"}:
                raise CheckpointError(f"{path}: of the adapter of {modules[param][number]} only lora_"
                                      f"{next(iter(pair)).upper()} is there; copy or save the adapter again")
            rank = rank or len(pair["a"])
            if (len(pair["a"]), pair["b"].shape[1]) != (rank, rank):
                raise CheckpointError(f"{path}: rank {len(pair['a'])} of {modules[param][number]} differs from rank "
                                      f"{rank} of others; only adapters of one rank can be used")
        a, b = _joined([(pieces[n]["a"], pieces[n]["b"]) if n in pieces else None for n in range(len(modules[param]))])
        order = row_order(param, param.groups_in(LLAMA if llama else OFFICIAL), param.groups_in(MINDSPORE))
        pairs[param.ms_name] = (a, b if order is None else b[order])
    highest = max(len(a) for a, _ in pairs.values())
    padded = {name: (np.pad(a, ((0, highest - len(a)), (0, 0))), np.pad(b, ((0, 0), (0, highest - len(a)))))
              for name, (a, b) in pairs.items()}
    return check_adapter(Adapter(padded, alpha * highest / rank), path)


def _joined(pairs: List[Optional[Tuple[np.ndarray, np.ndarray]]]) -> Tuple[np.ndarray, np.ndarray]:
    """One A and B of several projections, stacked row after row; those without an adapter are zero.

    With the same A in all, as in an exported adapter, that is the A; else the As are stacked, and B is block-diagonal.
    """
    there = [pair for pair in pairs if pair is not None]
    rows = len(there[0][1])
    if all(np.array_equal(a, there[0][0]) for a, _ in there):
        zero = np.zeros_like(there[0][1])
        return there[0][0], np.concatenate([zero if pair is None else pair[1] for pair in pairs])
    blocks, column = np.zeros((rows * len(pairs), sum(len(a) for a, _ in there)), np.float32), 0
    for number, pair in enumerate(pairs):
        if pair is not None:
            blocks[number * rows:(number + 1) * rows, column:column + len(pair[0])] = pair[1]
            column += len(pair[0])
    return np.concatenate([a for a, _ in there]), blocks


def _llama_modules(param: Param) -> List[str]:
    """The Llama modules of a weight, such as model.layers.0.self_attn.k_proj."""
    return [name[:-len(".weight")] for name in param.llama_names]


def _module(param: Param) -> str:
    """The official module of a weight below `transformer`, such as h.0.self_attention.query."""
    name = param.hf_name[:-len(".weight")]
    return name[len("transformer."):] if name.startswith("transformer.") else name


def mindspore_tensors(adapter: Adapter) -> Dict[str, np.ndarray]:
    """The adapter's tensors under the names that training gives them."""
    return {f"{name[:-len('.weight')]}.mindpet_delta_lora_{part}": value
            for name, pair in adapter.pairs.items() for part, value in zip("ab", pair)}
