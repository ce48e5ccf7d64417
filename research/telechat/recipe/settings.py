"""Resolving and checking the keys of `model_config`: from what a recipe says to a value for every key. Pure Python.

The keys are in recipe/fields.py, the variants in spec/variants.py. Later sources win: defaults, the variant
named by `net_name`, presets (`amp_level`), keys of earlier YAMLs, explicit keys. TelechatConfig is made from the
result, and the planner reads the result itself, without MindSpore.
"""
import contextlib
import difflib
import math
from dataclasses import fields
from typing import Any, Dict, List, Mapping

from research.telechat.common.errors import ConfigError
from research.telechat.common.files import JsonObject
from research.telechat.recipe.fields import (
    COMPUTED,
    DTYPES,
    FIELDS,
    FRAMEWORK,
    LEGACY,
    RENAMED,
    Field,
    ModelSettings,
)
from research.telechat.spec.rope import RopeRule
from research.telechat.spec.variants import Variant, get_variant, variant_fields

_LARGEST_FACTOR = 64                   # of ffn_dim_multiplier; beyond it is a width
_WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}
_KINDS = {"int": int, "positive": int, "float": float, "ratio": float, "bool": bool, "str": str}


def dtype_name(value: object) -> str:
    """'float32', 'float16' or 'bfloat16' for a name or a MindSpore dtype; anything else comes back as its text."""
    name = str(value).lower()
    return {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}.get(name, name)


def _check_key(key: str, value: Any, field: Field) -> Any:
    """`value` in the type that `field` demands; ConfigError says what was expected and found."""
    if (value is None and field.optional) or field.kind == "any":
        return value
    if field.kind == "dtype":
        name = dtype_name(value)
        if name not in DTYPES:
            raise ConfigError(f"model_config.{key}: {value!r} is not a known dtype; choose {', '.join(DTYPES)}")
        return name
    if field.kind == "ids":
        entries = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
        if any(not isinstance(entry, int) or isinstance(entry, bool) for entry in entries):
            raise ConfigError(f"model_config.{key}: expected a token id or a list of them, found {value!r}")
        return value
    if field.kind == "choice":
        value = "None" if value is None else value
        if value not in field.choices:
            raise ConfigError(f"model_config.{key}: {value!r} is not one of {', '.join(field.choices)}")
        return value
    wanted = _KINDS[field.kind]
    value = _read_number(value, wanted)
    fits = isinstance(value, wanted)
    if not fits or (wanted is not bool and isinstance(value, bool)):
        raise ConfigError(f"model_config.{key}: expected {_WORDS[wanted]}, found {value!r}")
    if field.kind == "positive" and value <= 0:
        raise ConfigError(f"model_config.{key}: expected a positive number, found {value}")
    if field.kind == "ratio" and not 0 <= value < 1:
        raise ConfigError(f"model_config.{key}: expected a probability in [0, 1), found {value}")
    if wanted is float and not math.isfinite(value):
        raise ConfigError(f"model_config.{key}: expected a finite number, found {value}")
    return value


def _read_number(value: object, wanted: type) -> object:
    """`value` as `wanted` where it is a number written in another way, else as it is."""
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if wanted is float and isinstance(value, str):       # YAML 1.1 reads 1e-5 as text
        with contextlib.suppress(ValueError):
            return float(value)
    if wanted is int and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _amp_dtypes(level: str, low: str) -> Dict[str, str]:
    """The dtype fields of a preset; `low` is the 16-bit type."""
    narrow = {"O0": "float32", "O1": low, "O2": low}[level]
    stored = low if level == "O2" else "float32"
    return {"compute_dtype": narrow, "param_init_type": stored, "res_dtype": stored,
            "layernorm_compute_type": "float32", "softmax_compute_type": "float32"}


def _variant_values(name: str) -> JsonObject:
    """The FIELDS that the variant `name` decides."""
    variant = get_variant(name)
    return {key: value for key, value in variant_fields(variant).items() if key in FIELDS}


def _legacy_number(given: JsonObject, key: str, default: float) -> float:
    """A positive number of an earlier YAML. Raises ConfigError."""
    value = default if given.get(key) is None else given[key]
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ConfigError(f"model_config.{key}: expected a positive number, found {value!r}")
    return value


def _translate_legacy(given: JsonObject) -> JsonObject:
    """Values of FIELDS that follow from keys of earlier YAMLs."""
    values = {RENAMED[key]: given[key] for key in given.keys() & RENAMED.keys()}
    if given.get("use_mup"):
        scale = _legacy_number(given, "mup_scale_factor", 1.0)
        values["logits_scale"] = _legacy_number(given, "output_mult", 1.0) / scale
    return values


def _default_ffn(given: JsonObject, hidden: int) -> int:
    """Feed-forward width where no intermediate_size is given.

    Two thirds of 4 * hidden, times `ffn_dim_multiplier`, rounded up to `multiple_of`. Earlier TeleChat YAMLs give the
    width itself as `ffn_dim_multiplier`, which no factor is as large as.
    """
    factor, multiple = _legacy_number(given, "ffn_dim_multiplier", 1.0), _legacy_number(given, "multiple_of", 256)
    if factor > _LARGEST_FACTOR:
        return int(factor)
    return int(multiple * math.ceil(int(factor * int(2 * 4 * hidden / 3)) / multiple))


def _reject_unknown(given: JsonObject) -> None:
    known = [*FIELDS, *RENAMED, *COMPUTED, *LEGACY]
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "see docs/recipes.md for the known keys"
            raise ConfigError(f"model_config: unknown key {key!r} (value {given[key]!r}); {hint}")


def resolve(given: Mapping[str, object]) -> ModelSettings:
    """A value for every key of FIELDS, dtypes by name.

    given: keys of recipe/fields.py; those of FRAMEWORK are ignored.

    Raises:
        ConfigError: unknown key (the nearest known one is named), wrong type or value.
    """
    given = {key: value for key, value in given.items() if key not in FRAMEWORK or key in FIELDS}
    _reject_unknown(given)
    legacy = _translate_legacy(given)
    explicit = {key: value for key, value in given.items() if key in FIELDS}
    values = {key: field.default for key, field in FIELDS.items()}
    name = explicit.get("net_name") or legacy.get("net_name")
    if name:
        values.update(_variant_values(str(name)))
    if explicit.get("amp_level"):
        level = _check_key("amp_level", explicit["amp_level"], FIELDS["amp_level"])
        low = dtype_name(explicit.get("compute_dtype", "float16"))
        values.update(_amp_dtypes(level, low if low != "float32" else "float16"))
    values.update(legacy)
    values.update({key: value for key, value in explicit.items() if not (value is None and FIELDS[key].optional
                                                                         and values[key] is not None)})
    checked = {key: _check_key(key, value, FIELDS[key]) for key, value in values.items()}
    if checked["intermediate_size"] is None:
        checked["intermediate_size"] = _default_ffn(given, checked["hidden_size"])
    checked["n_kv_heads"] = checked["n_kv_heads"] or checked["num_heads"]
    for key in ("embedding_init_type", "norm_init_type"):
        checked[key] = checked[key] or checked["param_init_type"]
    return ModelSettings(**checked)


def to_variant(settings: object) -> Variant:
    """Sizes and capabilities of a ModelSettings or a TelechatConfig, which parameter names and shapes follow from."""
    values = {entry.name: getattr(settings, entry.name) for entry in fields(Variant) if entry.name in FIELDS}
    tied, fused = values["tie_word_embeddings"], values["fused_projections"]
    return Variant(**values, hf_layout="telechat_mup" if fused else "telechat_tied" if tied else "telechat")


def rope_rule(settings: ModelSettings) -> RopeRule:
    """What the rotary tables of a model depend on."""
    return RopeRule(
        head_dim=settings.hidden_size // settings.num_heads, theta=settings.theta,
        extend_method=settings.extend_method, scaling_factor=settings.scaling_factor,
        training_seqlen=settings.training_seqlen, base_seqlen=settings.base_seqlen,
        base_power=settings.rope_base_power, mscale=settings.rope_mscale, length=settings.rope_length or 0,
        table_dtype=settings.rotary_dtype, beta_fast=settings.yarn_beta_fast, beta_slow=settings.yarn_beta_slow,
        attention_factor=settings.attention_factor)


def not_needed(given: JsonObject) -> List[str]:
    """A line for each key of an earlier YAML that is set to something and no longer needed."""
    def is_set(value: object) -> bool:
        return bool(value) and not (isinstance(value, int) and not isinstance(value, bool) and value == 1)    # 1: off
    return [f"model_config.{key} is no longer needed and has no effect: {LEGACY[key]}."
            for key in sorted(given.keys() & LEGACY.keys()) if is_set(given[key])]
