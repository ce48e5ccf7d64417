"""The keys of an official config.json: which are used, which have no effect, and which are not supported.

Every key is one of four kinds. Used: `variant_from_hf` (spec/variants.py) and TelechatConfig read it. Without effect:
`NO_EFFECT` says why. Required: `REQUIRED` names the only values that this plugin computes, anything else is an error.
The rest is unknown and named in one line (`unknown_keys`). Spellings of transformers 5 (`dtype`, `rope_parameters`)
count as the older ones. A key with null is a key that is not there.
"""
import math
from typing import Any, Dict, List, Optional, Tuple

from research.telechat.common.errors import ConfigError
from research.telechat.common.files import JsonObject

USED = frozenset((
    "n_layer", "hidden_size", "ffn_hidden_size", "n_head", "num_key_value_heads", "vocab_size", "layer_norm_epsilon",
    "training_seqlen", "base_seqlen", "seq_length", "tie_word_embeddings", "bos_token_id", "eos_token_id",
    "pad_token_id", "torch_dtype", "dtype", "hidden_dropout", "attention_dropout", "initializer_range", "rope_theta",
    "rope_scaling", "rope_parameters", "n_embd", "n_inner", "n_positions", "rotary_theta", "input_mult", "output_mult",
    "mup_scale_factor", "use_mup", "embd_pdrop", "resid_pdrop", "attn_pdrop", "head_dim", "num_hidden_layers",
    "num_attention_heads", "intermediate_size", "rms_norm_eps", "max_position_embeddings"))

# TeleChat's word and Llama's for the same; only that of the config's own kind is read.
_SAME = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "ffn_hidden_size": "intermediate_size",
         "layer_norm_epsilon": "rms_norm_eps"}

NO_EFFECT: Dict[str, str] = {
    **dict.fromkeys(("architectures", "auto_map", "model_type", "_name_or_path", "name_or_path", "tokenizer_class",
                     "transformers_version", "torchscript", "_commit_hash", "task_specific_params"),
                    "says which code and files belong to the weights"),
    **dict.fromkeys(("attention_softmax_in_fp32", "flash_attn", "enable_flash_attn", "masked_softmax_fusion",
                     "bias_dropout_fusion", "reorder_and_upcast_attn", "slow_but_exact", "pretraining_tp",
                     "_attn_implementation", "_attn_implementation_autoset", "attn_implementation",
                     "gradient_checkpointing"),
                    "chooses kernels and precision, which the recipe does here"),
    **dict.fromkeys(("skip_bias_add", "skip_bias_add_qkv"), "where the official code adds biases, not whether"),
    "n_ctx": "positions are computed for any length",
    **dict.fromkeys(("use_cache", "unk_token_id", "output_attentions", "output_hidden_states", "return_dict",
                     "user_token_id", "bot_token_id", "start_token_id"), "nothing that the model computes"),
    **dict.fromkeys(("offset_alibi", "rotary_xpos_scale_base", "mup_base_width", "scale_attn_by_inverse_layer_idx",
                     "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type",
                     "summary_use_proj"),
                    "read by the official code and not used for these models"),
}

# Values that this plugin computes; None among them: as if the key were missing.
REQUIRED: Dict[str, Tuple[object, ...]] = {
    "apply_residual_connection_post_layernorm": (False,),
    "activation_function": ("silu", "swish"), "hidden_act": ("silu", "swish"),
    "relative_encoding": ("rotary",), "rotary_use_xpos": (False,), "partial_rotary_factor": (1,), "rotary_pct": (1,),
    "use_RMSNorm": (True,), "scale_attn_weights": (True,), "add_bias_linear": (False,),
    "attention_bias": (False,), "mlp_bias": (False,),
    "logn": (False,), "semi_causal": (False,), "embed_layernorm": (False,),
    "alibi": (False,), "use_alibi": (False,), "is_encoder_decoder": (False,), "add_cross_attention": (False,),
    "sliding_window": (), "use_sliding_window": (False,), "layer_types": (), "attention_chunk_size": (),
    "quantization_config": (), "num_experts": (0, 1), "num_local_experts": (0, 1), "n_routed_experts": (0,),
    "moe_config": (), "use_moe": (False,), "kv_lora_rank": (), "logit_softcapping": (), "attn_logit_softcapping": (),
}
_SWITCHED: Dict[str, Tuple[str, object]] = {"sliding_window": ("use_sliding_window", False)}     # has no effect then
_NO_SCALING = (None, "default")


def check_required(cfg: JsonObject) -> None:
    """Raise ConfigError for the first key of REQUIRED that has another value, and where two words for the same have
    different ones."""
    for ours, theirs in _SAME.items():
        if cfg.get(ours) is not None and cfg.get(theirs) is not None and cfg[ours] != cfg[theirs]:
            raise ConfigError(f"model config: {ours} {cfg[ours]!r} and {theirs} {cfg[theirs]!r} contradict each other; "
                              "correct config.json")
    for key, values in REQUIRED.items():
        value = cfg.get(key)
        switch, off = _SWITCHED.get(key, ("", None))
        if value is None or (switch and cfg.get(switch) == off and cfg.get(switch) is not None):
            continue
        if isinstance(value, str):
            value = value.lower()
        if not any(value == good and isinstance(value, bool) == isinstance(good, bool) for good in values):
            expected = " or ".join(repr(good) for good in values) or "no such key"
            raise ConfigError(f"model config: {key} is {cfg[key]!r}, which changes the result and is not supported; "
                              f"expected {expected}: these weights need other code")


def check(cfg: JsonObject) -> None:
    """Raise ConfigError for the first key whose value would change the result and is not supported."""
    check_required(cfg)
    heads: Any = cfg.get("n_head")
    hidden: Any = cfg.get("n_embd", cfg.get("hidden_size"))
    head_dim: Any = cfg.get("head_dim")
    sizes = isinstance(heads, (int, float)) and isinstance(hidden, (int, float)) and heads
    if head_dim is not None and sizes and not (isinstance(head_dim, (int, float)) and head_dim * heads == hidden):
        raise ConfigError(f"model config: head_dim is {cfg['head_dim']!r}, expected hidden_size / n_head "
                          f"({hidden} / {heads}); other sizes of a head are not supported")
    if "n_embd" not in cfg and cfg.get("n_inner") not in (None, cfg.get("ffn_hidden_size")):
        raise ConfigError(f"model config: n_inner is {cfg['n_inner']!r} and ffn_hidden_size "
                          f"{cfg.get('ffn_hidden_size')!r}; expected n_inner null or equal to it")
    rope_theta(cfg)


def rope_theta(cfg: JsonObject) -> Optional[float]:
    """The base of the rotary frequencies that a config names; None where it names none.

    Raises ConfigError: two different ones, no positive number, or a scaling of the frequencies other than the
    family's own (`rope_type` dynamic with factor 1, as 7B-32K has it, adds nothing to that).
    """
    found: JsonObject = {key: cfg[key] for key in ("rope_theta", "rotary_theta") if cfg.get(key) is not None}
    for key in ("rope_scaling", "rope_parameters"):
        section = cfg.get(key)
        if section is None:
            continue
        if not isinstance(section, dict):
            raise ConfigError(f"model config: {key} is {section!r}; expected an object with rope_type")
        _check_scaling(key, section)
        if section.get("rope_theta") is not None:
            found[f"{key}.rope_theta"] = section["rope_theta"]
    for key, value in found.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ConfigError(f"model config: {key} is {value!r}; expected a positive number")
    if len({float(value) for value in found.values()}) > 1:
        raise ConfigError("model config: " + " and ".join(f"{key} {value!r}" for key, value in found.items())
                          + " contradict each other; correct config.json")
    return next((float(value) for value in found.values()), None)


def _check_scaling(key: str, section: JsonObject) -> None:
    kind = section.get("rope_type", section.get("type"))
    factor = section.get("factor")
    plain = factor is None or (isinstance(factor, (int, float)) and factor == 1)
    partial = section.get("partial_rotary_factor")
    if kind in _NO_SCALING or (kind == "dynamic" and plain):
        if partial is None or partial == 1:
            return
        raise ConfigError(f"model config: {key}.partial_rotary_factor is {partial!r}, which is not supported; expected "
                          "1, the whole head")
    raise ConfigError(f"model config: {key} asks for the type {kind!r} with factor {factor!r}, which is not supported; "
                      "expected null, 'default' or 'dynamic' with factor 1: TeleChat scales by base_seqlen and "
                      "training_seqlen (docs/models.md)")


def unknown_keys(cfg: JsonObject) -> List[str]:
    """Keys that are neither used nor listed, in the order of the file; empty values do not count."""
    llama = "num_hidden_layers" in cfg and "num_attention_heads" in cfg
    unread = {ours if llama else theirs for ours, theirs in _SAME.items() if ours not in cfg or theirs not in cfg}
    known = (USED - unread) | NO_EFFECT.keys() | REQUIRED.keys()
    return [key for key, value in cfg.items() if key not in known and value not in (None, [], {})]
