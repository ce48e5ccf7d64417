"""config.json in the words of Llama, which TeleChat3 uses: reading it, and its rotary rule, into fields of a Variant.

Reads transformers 4 (`rope_scaling` and `rope_theta`) and 5 (`rope_parameters`). The rotary types:
`telechat3-yarn` is YaRN (spec/rope.py) whose factor on cos and sin is 0.07 ln(factor) + 1; `yarn` is transformers' own,
0.1 ln(factor) + 1 or `attention_factor`; `default`, or none, is the plain rotation.
"""
import math
from typing import Dict, Union

from research.telechat.common.errors import ConfigError
from research.telechat.common.files import JsonObject
from research.telechat.spec.config_keys import check_required
from research.telechat.spec.hf_values import get_number

_YARN_KEYS = {"type", "rope_type", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow",
              "attention_factor", "rope_theta", "truncate"}
_GROWTH = {"telechat3-yarn": 0.07, "yarn": 0.1}            # of cos and sin with ln(factor)

Fields = Dict[str, Union[int, float, bool, str, None]]


def is_llama(cfg: JsonObject) -> bool:
    """Whether a config.json has Llama's keys."""
    return "num_hidden_layers" in cfg and "num_attention_heads" in cfg


def llama_fields(cfg: JsonObject) -> Fields:
    """The fields of a Variant that a config.json with Llama's keys decides.

    Raises:
        ConfigError: a key is missing, wrong, or says what the model cannot do.
    """
    check_required(cfg)
    heads, hidden = get_number(cfg, "num_attention_heads", int), get_number(cfg, "hidden_size", int)
    head_dim = get_number(cfg, "head_dim", int, max(hidden // heads, 1))
    if head_dim * heads != hidden:
        raise ConfigError(f"model config: head_dim ({head_dim}) times num_attention_heads ({heads}) must be "
                          f"hidden_size ({hidden}); another head size is not supported")
    tied = cfg.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise ConfigError(f"model config: key 'tie_word_embeddings' must be bool, found {tied!r}")
    kv_heads = get_number(cfg, "num_key_value_heads", int) if cfg.get("num_key_value_heads") is not None else None
    return {"num_layers": get_number(cfg, "num_hidden_layers", int), "hidden_size": hidden, "num_heads": heads,
            "n_kv_heads": kv_heads, "intermediate_size": get_number(cfg, "intermediate_size", int),
            "vocab_size": get_number(cfg, "vocab_size", int), "tie_word_embeddings": tied,
            "rms_norm_eps": get_number(cfg, "rms_norm_eps", float, 1e-6),
            "training_seqlen": get_number(cfg, "max_position_embeddings", int, 2048), **_rotary_fields(cfg)}


def attention_factor(kind: str, factor: float) -> float:
    """The factor on cos and sin that goes with the rotary type `kind`."""
    return _GROWTH[kind] * math.log(factor) + 1.0 if factor > 1 else 1.0


def _rotary_fields(cfg: JsonObject) -> Fields:
    """The fields of the rotary rule."""
    key = "rope_parameters" if cfg.get("rope_parameters") else "rope_scaling"
    rope = cfg.get(key) or {}
    if not isinstance(rope, dict):
        raise ConfigError(f"model config: {key} must be an object, found {rope!r}")
    where = f"{key}."
    theta = get_number(rope, "rope_theta", float, get_number(cfg, "rope_theta", float, 10000.0), where)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {"theta": theta, "extend_method": "None", "scaling_factor": 1.0, "attention_factor": 1.0}
    if kind not in _GROWTH:
        raise ConfigError(f"model config: {where}rope_type is {kind!r}; supported are default, {', '.join(_GROWTH)}, "
                          "and another one would change the result")
    unknown = sorted(name for name in rope.keys() - _YARN_KEYS if rope[name] is not None)
    if unknown or rope.get("truncate") is False:
        name = unknown[0] if unknown else "truncate"
        raise ConfigError(f"model config: {where}{name} is {rope[name]!r}; it is not supported and would change the "
                          "result")
    factor = get_number(rope, "factor", float, where=where)
    given = rope.get("attention_factor")
    return {"theta": theta, "extend_method": "YARN", "scaling_factor": factor,
            "base_seqlen": get_number(rope, "original_max_position_embeddings", int, where=where),
            "yarn_beta_fast": get_number(rope, "beta_fast", float, 32.0, where),
            "yarn_beta_slow": get_number(rope, "beta_slow", float, 1.0, where),
            "attention_factor": attention_factor(kind, factor) if given is None
            else get_number(rope, "attention_factor", float, where=where)}
