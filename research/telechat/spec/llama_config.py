"""config.json of the Llama layout: what LlamaForCausalLM needs to compute the same as TeleChat, and the way back.

TeleChat's rotary rule scales with the length of the sequence; Llama's has one base. Up to `training_seqlen` TeleChat's
has one as well, and that is the length for which a checkpoint is written. Longer ones are refused, not approximated.

The official config.json travels in the key `telechat_config`, which Llama's readers ignore: it names the member of the
family, which the sizes alone do not tell. transformers writes it again when it saves a model.
"""
from typing import Optional

from research.telechat.common.errors import ConfigError
from research.telechat.common.files import JsonObject
from research.telechat.spec.hf_config import hf_config
from research.telechat.spec.parameters import llama_biases
from research.telechat.spec.rope import RopeRule, rope_scaling, rule_is_constant
from research.telechat.spec.variants import Variant

ORIGIN = "telechat_config"                   # key of the official config
ARCHITECTURE = "LlamaForCausalLM"
# transformers leaves out what equals its defaults when it saves a config
_DEFAULTS: JsonObject = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "rope_theta": 10000.0,
}


def rope_rule(variant: Variant) -> RopeRule:
    """The rotary rule of a variant, with exact tables."""
    return RopeRule(variant.head_dim, theta=variant.theta, extend_method=variant.extend_method,
                    scaling_factor=variant.scaling_factor, training_seqlen=variant.training_seqlen,
                    base_seqlen=variant.base_seqlen, base_power=variant.rope_base_power, mscale=variant.rope_mscale,
                    beta_fast=variant.yarn_beta_fast, beta_slow=variant.yarn_beta_slow,
                    attention_factor=variant.attention_factor)


def yarn(variant: Variant) -> Optional[JsonObject]:
    """`rope_scaling` of a variant with YaRN, under the type and with the factor that every reader of Llama knows."""
    if variant.extend_method != "YARN":
        return None
    return {"rope_type": "yarn", "factor": variant.scaling_factor,
            "original_max_position_embeddings": variant.base_seqlen, "beta_fast": variant.yarn_beta_fast,
            "beta_slow": variant.yarn_beta_slow, "attention_factor": variant.attention_factor}


def constant_length(variant: Variant) -> int:
    """The longest sequence, in tokens, up to which all have the same rotary tables; 0: there is none."""
    rule = rope_rule(variant)
    low, high = 0, 2 * max(variant.training_seqlen, variant.base_seqlen)     # the results never fall with the length
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if rule_is_constant(rule, middle) else (low, middle - 1)
    return low


def llama_config(variant: Variant, dtype: str, max_length: Optional[int] = None, official: Optional[JsonObject] = None
                 ) -> JsonObject:
    """config.json of a Llama checkpoint.

    Args:
        dtype: "float16", "bfloat16" or "float32".
        max_length: tokens of the longest sequence; None: `training_seqlen`.
        official: the official config, to be carried along; None: the one of `variant`.

    Raises ConfigError: the rotary rule changes within `max_length` tokens.
    """
    length = max_length or variant.training_seqlen
    rule = rope_rule(variant)
    limit = constant_length(variant)
    if length > limit:
        raise ConfigError(f"the rotary embedding of this model is another one for {length} tokens than for shorter "
                          f"sequences, which Llama cannot express; pass --max_length of at most {limit} (this "
                          "project's own server follows the rule at any length)")
    theta, _ = rope_scaling(rule, length)
    attention_bias, mlp_bias = llama_biases(variant)
    return {
        "architectures": [ARCHITECTURE], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": variant.hidden_size, "intermediate_size": variant.intermediate_size,
        "num_hidden_layers": variant.num_layers, "num_attention_heads": variant.num_heads,
        "num_key_value_heads": variant.kv_heads, "head_dim": variant.head_dim, "vocab_size": variant.vocab_size,
        "rms_norm_eps": variant.rms_norm_eps, "rope_theta": theta, "max_position_embeddings": length,
        "attention_bias": attention_bias, "mlp_bias": mlp_bias,
        "attention_dropout": 0.0, "pretraining_tp": 1, "tie_word_embeddings": variant.tie_word_embeddings,
        "bos_token_id": variant.bos_token_id, "eos_token_id": variant.eos_token_id,
        "pad_token_id": variant.pad_token_id, "initializer_range": 0.02, "use_cache": True, "torch_dtype": dtype,
        **({"rope_scaling": yarn(variant)} if yarn(variant) else {}),
        ORIGIN: official or hf_config(variant),
    }


def is_llama_config(config: JsonObject) -> bool:
    """Whether a config.json is that of a Llama checkpoint."""
    return bool(config.get("model_type") == "llama" or ARCHITECTURE in (config.get("architectures") or ()))


NO_ORIGIN = (f"it is a Llama without the key {ORIGIN!r}, which this project writes: a Llama that is not a TeleChat "
             "cannot be converted; for a TeleChat from elsewhere pass --model_name")


def origin(config: JsonObject) -> Optional[JsonObject]:
    """The official config that travels in a Llama config.json; None where there is none."""
    found = config.get(ORIGIN)
    return found if isinstance(found, dict) else None


def check_llama_weights(config: JsonObject) -> None:
    """ConfigError where a config.json says that the weights are quantised."""
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "?")
        raise ConfigError(f"its weights are quantised ({method}); convert the folder that was quantised instead")


def check_llama_config(config: JsonObject, variant: Variant) -> None:
    """ConfigError where a Llama config.json is not that of `variant`: after tokens were added, or of another Llama."""
    expected = llama_config(variant, "float32", constant_length(variant))
    found = {**_DEFAULTS, **config}
    rope = found.get("rope_parameters") or found.get("rope_scaling") or {}
    found["rope_theta"] = rope.get("rope_theta", found["rope_theta"])         # where transformers 5 has it
    found["num_key_value_heads"] = found["num_key_value_heads"] or found["num_attention_heads"]
    rope = {**rope, "rope_type": rope.get("rope_type", rope.get("type", "default"))}
    for key, want in (yarn(variant) or {"rope_type": "default"}).items():
        if rope.get(key) != want:
            what = "is of the type" if key == "rope_type" else f"has {key}"
            raise ConfigError(f"its rotary embedding {what} {rope.get(key)!r}, the TeleChat model's {want!r}; is it "
                              "this model's?")
    for key in _DEFAULTS:
        want, got = expected[key], found[key]
        equal = abs(want - got) <= 1e-6 * abs(want) if isinstance(want, float) and isinstance(
            got, (int, float)) else want == got
        if not equal:
            raise ConfigError(f"key {key!r} is {got!r}, the TeleChat model has {want!r}; it is another model, or was "
                              "changed in a way that TeleChat cannot express")
