"""How training keeps updates that 16 bits would round away, and the refusal of recipes that lose them. Pure Python.

An update of AdamW is about as large as the learning rate, whatever the weight. A 16-bit weight changes only by what
exceeds half a step of its type, so that nearly nothing of a fine-tuning at 1e-5 arrives (docs/training.md has figures).
Weights are therefore stored in float32, or in 16 bits with a remainder in the optimizer (training/remainder.py).
"""
from typing import Dict, List, NamedTuple, Optional

from research.telechat.common.errors import ConfigError
from research.telechat.common.files import JsonObject
from research.telechat.recipe.fields import ModelSettings
from research.telechat.recipe.read import section
from research.telechat.recipe.settings import resolve

KINDS = ("float32", "remainder", "none")
_ADAMW = ("AdamW", "TelechatAdamW")
_HALF_STEP = {"bfloat16": "1/512", "float16": "1/4096"}      # of a weight, at least


class Choice(NamedTuple):
    """What keeps the updates of a full training, and the keys of model_config that follow from it."""

    kind: str                    # of KINDS
    keys: Dict[str, str]


def _learning_rate(recipe: JsonObject) -> object:
    for name in ("lr_schedule", "optimizer"):
        rate = section(recipe, name).get("learning_rate")
        if rate is not None:
            return rate
    return "unknown"


def _resolved(config: JsonObject, keys: Dict[str, str]) -> ModelSettings:
    return resolve({**{key: value for key, value in config.items() if key != "pet_config"}, **keys})


def _refusal(recipe: JsonObject, key: str, dtype: str) -> ConfigError:
    return ConfigError(
        f"model_config.{key} is {dtype} without master weights: a weight would change only by updates above "
        f"{_HALF_STEP[dtype]} of it (half a step of {dtype}), and at learning rate {_learning_rate(recipe)} most of "
        "the training would be lost; set optimizer.master_weights to remainder, or the type to float32 (to none to "
        "train like this anyway; docs/training.md, Master weights)")


def _check_optimizer(optimizer: JsonObject) -> None:
    name = optimizer.get("type", "AdamW")
    if name not in _ADAMW or optimizer.get("use_fused"):
        raise ConfigError(f"optimizer.master_weights remainder: {name}{' with use_fused' * (name in _ADAMW)} keeps no "
                          "remainder; use AdamW without use_fused, or store the parameters in float32 "
                          "(model_config.amp_level O1)")


def choose(recipe: JsonObject) -> Optional[Choice]:
    """What keeps the updates of a complete recipe; None where it trains nothing, or an adapter on frozen weights.

    `optimizer.master_weights` says so. Without it, float32 parameters need nothing, and amp_level O2 has the remainder.
    A recipe that names no type of its parameters gets float32.

    Raises:
        ConfigError: updates would be lost, or keys contradict each other.
    """
    config, optimizer = section(recipe, "model", "model_config"), section(recipe, "optimizer")
    if recipe.get("run_mode") not in ("train", "finetune") or config.get("pet_config") or not config:
        return None
    wish = optimizer.get("master_weights")
    if wish is not None and wish not in KINDS:
        raise ConfigError(f"optimizer.master_weights: expected {', '.join(KINDS)}, found {wish!r}")
    keys: Dict[str, str] = {}
    model = _resolved(config, keys)
    named = config.get("param_init_type") is not None
    if not named and (wish == "remainder" or not config.get("amp_level")):
        low = model.compute_dtype if model.compute_dtype != "float32" else "bfloat16"
        keys["param_init_type"] = low if wish == "remainder" else "float32"
        model = _resolved(config, keys)
    stored = {"param_init_type": model.param_init_type, "embedding_init_type": model.embedding_init_type}
    short = [key for key, dtype in stored.items() if dtype != "float32"]
    if not short:
        if wish == "remainder":
            raise ConfigError("optimizer.master_weights is remainder, but model_config.param_init_type is float32, "
                              "which lacks nothing; remove one of the two")
        return Choice("float32", keys)
    if wish == "none":
        return Choice("none", keys)
    only_table, preset = short == ["embedding_init_type"], model.amp_level == "O2" and not named
    if wish == "float32" or (wish is None and not only_table and not preset):
        raise _refusal(recipe, short[0], stored[short[0]])
    _check_optimizer(optimizer)
    if config.get("norm_init_type") is None:
        keys["norm_init_type"] = "float32"
    return Choice("remainder", keys)


def apply(recipe: JsonObject) -> List[str]:
    """Complete a recipe in place with what `choose` finds, so that it finds it again. Returns lines for the log,
    without full stop. Raises ConfigError."""
    chosen, optimizer = choose(recipe), section(recipe, "optimizer")
    if chosen is None:
        optimizer.pop("master_weights", None)
        return []
    recipe["model"]["model_config"].update(chosen.keys)
    optimizer["master_weights"] = chosen.kind
    if chosen.kind == "remainder":
        optimizer["type"] = "TelechatAdamW"
        return ["optimizer.master_weights: 16-bit parameters have a float16 remainder in the optimizer; norms and "
                "biases are float32"]
    if chosen.kind == "none":
        return [f"optimizer.master_weights is none: at learning rate {_learning_rate(recipe)} most updates of 16-bit "
                "parameters are rounded away"]
    return []


def hand_over(recipe: JsonObject) -> None:
    """Leave `optimizer.master_weights` only where the optimizer is to know it: those of MindFormers do not take it."""
    optimizer = section(recipe, "optimizer")
    if optimizer.get("master_weights") != "remainder":
        optimizer.pop("master_weights", None)
