"""The keys of `model_config` in a recipe: default, kind and meaning of each. Pure Python.

`FIELDS` are the keys this plugin reads, `RENAMED` and `COMPUTED` those of earlier TeleChat YAMLs that are translated,
`LEGACY` those that are no longer needed, `FRAMEWORK` those that MindFormers itself writes into a model config.
"""
from dataclasses import dataclass
from typing import Any, Dict, Optional, Tuple

DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Field:
    """One key: its default, what may stand there and what it means."""

    default: Any
    kind: str                              # int, positive, float, bool, str, dtype, choice, ratio or any
    doc: str
    choices: Tuple[Any, ...] = ()
    optional: bool = False                 # None is allowed


def _dtype(default: Optional[str], doc: str) -> Field:
    return Field(default, "dtype", doc, DTYPES, optional=default is None)


# By group, as docs/recipes.md shows them. What differs between the variants are the capabilities; formulas of the
# rotary embedding stand in spec/rope.py.
GROUPS: Dict[str, Dict[str, Field]] = {
    "sizes": {
        "net_name": Field("", "str", "variant of the table, such as telechat_7b, whose sizes and conventions apply"),
        "batch_size": Field(1, "positive", "prompts answered together; training takes runner_config.batch_size"),
        "seq_length": Field(2048, "positive", "tokens per sequence"),
        "num_layers": Field(32, "positive", "decoder layers"),
        "hidden_size": Field(4096, "positive", "width of the residual stream"),
        "intermediate_size": Field(None, "positive", "width of the feed-forward layer; None: two thirds of "
                                   "4 * hidden_size, rounded up", optional=True),
        "num_heads": Field(32, "positive", "attention heads"),
        "n_kv_heads": Field(None, "positive", "key/value heads; None: as many as num_heads", optional=True),
        "vocab_size": Field(32000, "positive", "rows of the embedding table"),
    },
    "capabilities": {
        "tie_word_embeddings": Field(False, "bool", "logits from the embedding table, no lm_head"),
        "fused_projections": Field(False, "bool", "one w_qkv and one w_gate_hidden (52B)"),
        "out_proj_has_bias": Field(True, "bool", "bias of wo and w2"),
        "qkv_has_bias": Field(False, "bool", "bias of wq and wk_v"),
        "rms_norm_eps": Field(1e-5, "float", "epsilon of RMSNorm"),
        "input_mult": Field(1.0, "float", "factor on the embeddings"),
        "logits_scale": Field(1.0, "float", "factor on the logits (52B: output_mult / mup_scale_factor)"),
    },
    "rotary embedding and long context": {
        "theta": Field(10000.0, "float", "base of the rotary frequencies"),
        "extend_method": Field("TELECHAT", "choice", "TELECHAT: the official long-context rule; PI, NTK: with "
                               "scaling_factor; None: neither", ("TELECHAT", "None", "PI", "NTK")),
        "scaling_factor": Field(1.0, "float", "stretch of PI and NTK"),
        "training_seqlen": Field(8192, "positive", "tokens; context the weights were trained with"),
        "base_seqlen": Field(8192, "positive", "tokens; L of the official rule"),
        "rope_base_power": Field(True, "bool", "base = theta * alpha^(d/(d-2)); False: theta * alpha (52B)"),
        "rope_mscale": Field(True, "bool", "cos and sin grow past training_seqlen"),
        "rope_length": Field(None, "positive", "tokens; scale as for a sequence of this length, whatever its own: the "
                             "KV cache stays valid past training_seqlen. None: by the sequence's own length, as "
                             "officially", optional=True),
    },
    "precision": {
        "amp_level": Field(None, "choice", "preset of the dtypes below: O0 all float32; O1 float32 parameters, 16-bit "
                           "compute; O2 16-bit parameters, compute and residual", ("O0", "O1", "O2"), optional=True),
        "compute_dtype": _dtype("float16", "matrix multiplications"),
        "param_init_type": _dtype("float16", "parameters"),
        "embedding_init_type": _dtype(None, "embedding table; None: as param_init_type"),
        "layernorm_compute_type": _dtype("float32", "RMSNorm"),
        "softmax_compute_type": _dtype("float32", "attention softmax"),
        "rotary_dtype": _dtype("float32", "cos and sin are rounded to it; the official code uses float16 (not 52B)"),
        "res_dtype": _dtype("float32", "residual stream"),
    },
    "regularisation and initialisation": {
        "embed_dropout_prob": Field(0.0, "ratio", "dropout of the embeddings, training only"),
        "hidden_dropout_prob": Field(0.0, "ratio", "dropout after attention output and down projection, training only"),
        "attention_dropout_prob": Field(0.0, "ratio", "dropout of the attention probabilities, training only"),
        "initializer_range": Field(0.02, "float", "standard deviation of new weights"),
    },
    "tokens and masks": {
        "bos_token_id": Field(1, "int", "start of a conversation"),
        "eos_token_id": Field(2, "any", "end of an answer; one id or a list"),
        "pad_token_id": Field(3, "int", "padding"),
        "user_token_id": Field(None, "int", "marker before a question", optional=True),
        "bot_token_id": Field(None, "int", "marker before an answer", optional=True),
        "ignore_token_id": Field(-100, "int", "label that does not count in the loss"),
        "mask_pad_tokens": Field(False, "bool", "no token attends to pad_token_id; for data padded on the left"),
        "document_boundaries": Field(False, "bool", "packed conversations do not attend to each other: the third "
                                     "dataset column actual_seq_len holds their ends"),
    },
    "attention kernels": {
        "use_flash_attention": Field(True, "bool", "flash attention kernel where the device has one"),
        "use_attn_mask_compression": Field(True, "bool", "flash attention with a 2048 x 2048 causal mask, not a full "
                                           "one"),
        "use_ring_attention": Field(False, "bool", "context parallelism by ring attention"),
    },
    "generation": {
        "use_past": Field(False, "bool", "keep keys and values of earlier tokens (KV cache)"),
        "is_dynamic": Field(False, "bool", "prompts of any length in one compiled graph"),
        "block_size": Field(16, "positive", "tokens per block of the KV cache"),
        "num_blocks": Field(512, "positive", "blocks of the KV cache"),
        "max_decode_length": Field(1024, "positive", "tokens of prompt and answer together"),
        "max_new_tokens": Field(None, "positive", "tokens of the answer; wins over max_decode_length", optional=True),
        "do_sample": Field(False, "bool", "sample; else the likeliest token"),
        "temperature": Field(1.0, "float", "divides the logits when sampling"),
        "top_k": Field(5, "int", "sample among the k likeliest tokens"),
        "top_p": Field(1.0, "float", "sample among the likeliest tokens that hold this share of probability"),
        "repetition_penalty": Field(1.0, "float", "over 1: tokens seen before become less likely"),
    },
    "compilation": {
        "share_layer_graphs": Field(True, "bool", "on one device, equal decoder layers are compiled once; False: "
                                    "each by itself, as on several devices"),
        "train_layer_by_layer": Field(None, "bool", "one small graph for all layers, which are computed anew in the "
                                      "backward pass; None: in one process on a CPU, with more than 8 layers",
                                      optional=True),
    },
    "pipeline": {
        "offset": Field(0, "any", "layers by which pipeline stages differ from the even split, one number or a list"),
        "pp_interleave_num": Field(1, "positive", "virtual pipeline stages per stage"),
    },
}
FIELDS: Dict[str, Field] = {key: field for group in GROUPS.values() for key, field in group.items()}

# Keys of earlier TeleChat YAMLs and code: other names of FIELDS,
RENAMED = {"model_name": "net_name", "wo_has_bias": "out_proj_has_bias", "sigma": "initializer_range"}
# keys that a field is computed from (recipe/settings.py),
COMPUTED = {"use_mup": "logits_scale", "output_mult": "logits_scale", "mup_scale_factor": "logits_scale",
            "multiple_of": "intermediate_size", "ffn_dim_multiplier": "intermediate_size"}
# and keys that are no longer needed, with the reason that a user sees.
LEGACY: Dict[str, str] = {
    "mean": "new weights are drawn around 0",
    "pretrain_seqlen": "the earlier code never read it; training_seqlen is the context of the weights",
    "fine_grain_interleave": "micro_batch_interleave_num 2 computes while it communicates",
    "parallel_optimizer": "parallel.enable_parallel_optimizer decides",
    "qkv_concat": "wq and wk_v are parameters of their own in every checkpoint (52B: w_qkv)",
    "max_position_embedding": "positions are computed for any length",
    "use_rope_slice": "the tables always fit the sequence",
    "use_past_shard": "the cache is sharded as the heads are",
    "use_kvcache_op": "the kernel of the KV cache follows from the device",
    "is_flexible_shape": "is_dynamic covers it",
    "quant": "quantisation is not supported",
    "compute_in_2d": "the layout of activations is not configurable",
    "run_mode": "the recipe's own run_mode decides",
    "use_moe": "there are no experts in this family",
    "use_fused_ops": "fused kernels follow from the device",
}

# Keys that MindFormers writes or reads itself; passed through untouched.
FRAMEWORK = frozenset((
    "type", "auto_register", "auto_map", "parallel_config", "moe_config", "pet_config", "checkpoint_name_or_path",
    "checkpoint_path", "name_or_path", "mindformers_version", "tokenizer_class", "architectures",
    "is_encoder_decoder", "is_sample_acceleration", "quantization_config", "quantization", "pretrained_model_dir",
    "disable_lazy_inline", "use_eod_attn_mask_compression", "track_max_attention_logit", "npu_mem_size",
    "parallel_decoding_params", "model_type", "text_config", "vision_config", "head_config", "torch_dtype",
    "chunk_prefill", "return_extra_loss", "llm_backend", "input_sliced_sig", "rl_config", "monitor_config",
    "calculate_per_token_loss", "swap_config", "batch_size", "transformers_version", "is_composition", "_commit_hash",
    "use_legacy", "mem_coeff", "swap", "user_eos_token_id", "dataset_config",
))
