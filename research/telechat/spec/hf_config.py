"""The official config.json of a variant, for checkpoints that are converted back without one.

Only what the official code needs to build the model; where the original config.json exists it is used instead.
"""

from typing import Dict, List, Optional

from research.telechat.common.files import JsonObject
from research.telechat.spec.config_keys import unknown_keys
from research.telechat.spec.llama_keys import attention_factor
from research.telechat.spec.variants import Variant, same_config

_COMMON = {"initializer_range": 0.02, "unk_token_id": 0, "use_cache": True}
_DENSE = {
    "model_type": "telechat",
    "apply_residual_connection_post_layernorm": False, "attention_softmax_in_fp32": True, "bias_dropout_fusion": True,
    "attention_dropout": 0.0, "hidden_dropout": 0.0, "masked_softmax_fusion": True, "n_inner": None,
    "skip_bias_add_qkv": False, "slow_but_exact": False, "flash_attn": True, **_COMMON,
}
_CODE: Dict[str, JsonObject] = {       # by Variant.hf_module
    "telechat": {"architectures": ["TelechatForCausalLM"],
                 "auto_map": {"AutoConfig": "configuration_telechat.TelechatConfig",
                              "AutoModelForCausalLM": "modeling_telechat.TelechatForCausalLM"}},
    "telechat2": {"architectures": ["TeleChat2ForCausalLM"],
                  "auto_map": {"AutoConfig": "configuration_telechat2.Telechat2Config",
                               "AutoModelForCausalLM": "modeling_telechat2.Telechat2ForCausalLM"}},
    "telechat3": {"architectures": ["Telechat3ForCausalLM"],
                  "auto_map": {"AutoConfig": "configuration_telechat3.Telechat3Config",
                               "AutoModel": "modeling_telechat3.Telechat3Model",
                               "AutoModelForCausalLM": "modeling_telechat3.Telechat3ForCausalLM"}},
}
_MUP = {
    "model_type": "telechat", "activation_function": "silu", "add_bias_linear": False, "attn_pdrop": 0.0,
    "auto_map": {"AutoConfig": "configuration_telechat.TELECHATConfig", "AutoModel": "modeling_telechat.TELECHAT",
                 "AutoModelForCausalLM": "modeling_telechat.TELECHAT"},
    "embd_pdrop": 0.0, "resid_pdrop": 0.0, "enable_flash_attn": True, "mup_base_width": 256,
    "relative_encoding": "rotary", "reorder_and_upcast_attn": True, "rotary_use_xpos": False,
    "rotary_xpos_scale_base": 512, "scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": True,
    "tokenizer_class": "TELECHATTokenizer", "use_RMSNorm": True, "use_mup": True, "output_mult": 1.0, **_COMMON,
}


_LLAMA = {"model_type": "telechat3", "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0,
          "mlp_bias": False, "pretraining_tp": 1, "use_cache": True, "initializer_range": 0.0048}


def _llama_config(variant: Variant) -> JsonObject:
    config: JsonObject = {
        "num_hidden_layers": variant.num_layers, "hidden_size": variant.hidden_size, "head_dim": variant.head_dim,
        "intermediate_size": variant.intermediate_size, "num_attention_heads": variant.num_heads,
        "num_key_value_heads": variant.kv_heads, "vocab_size": variant.vocab_size,
        "rms_norm_eps": variant.rms_norm_eps, "max_position_embeddings": variant.training_seqlen,
        "rope_theta": variant.theta, "tie_word_embeddings": variant.tie_word_embeddings,
        "bos_token_id": variant.bos_token_id, "eos_token_id": variant.eos_token_id,
        "pad_token_id": variant.pad_token_id}
    if variant.extend_method == "YARN":
        kind = "telechat3-yarn"
        rope: JsonObject = {"rope_type": kind, "type": kind, "factor": variant.scaling_factor,
                            "original_max_position_embeddings": variant.base_seqlen,
                            "beta_fast": variant.yarn_beta_fast, "beta_slow": variant.yarn_beta_slow}
        if variant.attention_factor != attention_factor(kind, variant.scaling_factor):
            rope["attention_factor"] = variant.attention_factor
        config["rope_scaling"] = rope
    return {**_LLAMA, **_CODE[variant.hf_module], **config}


def hf_config(variant: Variant) -> JsonObject:
    """An official config.json with the sizes of `variant`; spec.variants.variant_from_hf reads it back."""
    if variant.hf_layout == "llama":
        return _llama_config(variant)
    config: JsonObject = {
        "n_layer": variant.num_layers, "n_head": variant.num_heads, "vocab_size": variant.vocab_size,
        "layer_norm_epsilon": variant.rms_norm_eps,
        "bos_token_id": variant.bos_token_id, "eos_token_id": variant.eos_token_id,
        "pad_token_id": variant.pad_token_id,
    }
    if variant.hf_layout == "telechat_tied":     # 7B's official config has the ids of the generic vocabulary
        config.update(bos_token_id=1, eos_token_id=2)
    if variant.hf_layout == "telechat_mup":
        return {**_MUP, **config, "n_embd": variant.hidden_size, "n_inner": variant.intermediate_size,
                "n_positions": variant.training_seqlen, "input_mult": variant.input_mult,
                "mup_scale_factor": 1 / variant.logits_scale, "rotary_theta": variant.theta,
                "tie_word_embeddings": False}
    config.update(hidden_size=variant.hidden_size, ffn_hidden_size=variant.intermediate_size,
                  training_seqlen=variant.training_seqlen, seq_length=variant.training_seqlen)
    if variant.theta != 10000.0:
        config["rope_theta"] = variant.theta
    if variant.n_kv_heads or variant.hf_layout == "telechat2":
        config["num_key_value_heads"] = variant.kv_heads
    if variant.hf_layout == "telechat2":
        config.update(base_seqlen=variant.base_seqlen, skip_bias_add=False,
                      tie_word_embeddings=variant.tie_word_embeddings)
    else:
        config.update(skip_bias_add=True, embed_layernorm=False)
        if not variant.tie_word_embeddings:
            config.update(tie_word_embeddings=False, logn=False, semi_causal=False)
    return {**_DENSE, **_CODE[variant.hf_module], **config}


def config_notes(config: JsonObject, variant: Variant, name: Optional[str]) -> List[str]:
    """What of an official config.json decides the result, and what of it is not understood; a line each.

    variant: what `variant_from_hf` read in it. name: of the model, where it is known.
    """
    notes = [f"config.json: epsilon {variant.rms_norm_eps:g}, theta {variant.theta:g}, training_seqlen "
             f"{variant.training_seqlen}, base_seqlen {variant.base_seqlen}; chat template {variant.chat_template}"]
    unknown, alike = unknown_keys(config), same_config(variant)
    if unknown:
        notes.append(f"config.json: keys that this project does not know, without effect: {', '.join(unknown)}")
    if name is None and len(alike) > 1:
        notes.append(f"config.json: {', '.join(alike)} have the same; --model_name tells their chat templates and "
                     "generation settings apart")
    return notes
