"""The keys of `model_config` in a recipe: default, kind and meaning of each. Pure Python.

`ModelSettings` has the keys this plugin reads, with their types, and `FIELDS` what is known of each; `RENAMED` and
`COMPUTED` are those of earlier TeleChat YAMLs that are translated, `LEGACY` those that are no longer needed,
`FRAMEWORK` those that MindFormers itself writes into a model config.
"""
from dataclasses import dataclass, field, fields
from typing import Any, Callable, Dict, Mapping, Optional, Tuple, get_args, get_type_hints

from research.telechat.common.tokens import EndTokens

DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Field:
    """One key: its default, its allowed values and its meaning."""

    default: object
    kind: str                              # int, positive, float, bool, str, dtype, choice, ratio, ids or any
    doc: str
    group: str
    choices: Tuple[str, ...]
    optional: bool                         # None is allowed


def _group(name: str) -> Callable[..., Any]:
    """The maker of the fields of one group, as docs/recipes.md shows them.

    A field has no default of its own: settings come from recipe/settings.py, which fills what follows from other keys
    (`filled`: None is allowed in a recipe, and replaced).
    """
    def make(default: object, doc: str, *, choices: Tuple[str, ...] = (), positive: bool = False, ratio: bool = False,
             filled: bool = False) -> Any:
        return field(metadata={"group": name, "default": default, "doc": doc, "choices": choices, "filled": filled,
                               "positive": positive, "ratio": ratio})
    return make


_size = _group("sizes")
_capability = _group("capabilities")
_rotary = _group("rotary embedding and long context")
_precision = _group("precision")
_regular = _group("regularisation and initialisation")
_token = _group("tokens and masks")
_kernel = _group("attention kernels")
_generation = _group("generation")
_compile = _group("compilation")
_pipeline = _group("pipeline")


@dataclass(frozen=True)
class ModelSettings:
    """A value for every key of `model_config`, dtypes by name; made by recipe/settings.py.

    What differs between the variants are the capabilities; the formulas of the rotary embedding are in spec/rope.py.
    """

    net_name: str = _size("", "variant of the table, such as telechat_7b, whose sizes and conventions apply")
    batch_size: int = _size(1, "prompts answered together; training takes runner_config.batch_size", positive=True)
    seq_length: int = _size(2048, "tokens per sequence", positive=True)
    num_layers: int = _size(32, "decoder layers", positive=True)
    hidden_size: int = _size(4096, "width of the residual stream", positive=True)
    intermediate_size: int = _size(
        None, "width of the feed-forward layer; None: two thirds of 4 * hidden_size, rounded up", positive=True,
        filled=True)
    num_heads: int = _size(32, "attention heads", positive=True)
    n_kv_heads: int = _size(None, "key/value heads; None: as many as num_heads", positive=True, filled=True)
    vocab_size: int = _size(32000, "rows of the embedding table", positive=True)
    tie_word_embeddings: bool = _capability(False, "logits from the embedding table, no lm_head")
    fused_projections: bool = _capability(False, "one w_qkv and one w_gate_hidden (52B)")
    out_proj_has_bias: bool = _capability(True, "bias of wo and w2")
    qkv_has_bias: bool = _capability(False, "bias of wq and wk_v")
    rms_norm_eps: float = _capability(1e-5, "epsilon of RMSNorm")
    input_mult: float = _capability(1.0, "factor on the embeddings")
    logits_scale: float = _capability(1.0, "factor on the logits (52B: output_mult / mup_scale_factor)")
    theta: float = _rotary(10000.0, "base of the rotary frequencies")
    extend_method: str = _rotary(
        "TELECHAT", "TELECHAT: the official long-context rule; PI, NTK: with scaling_factor; YARN: that of TeleChat3; "
        "None: neither", choices=("TELECHAT", "None", "PI", "NTK", "YARN"))
    scaling_factor: float = _rotary(1.0, "stretch of PI, NTK and YARN")
    yarn_beta_fast: float = _rotary(32.0, "YARN: turns within base_seqlen tokens, above which a frequency stays")
    yarn_beta_slow: float = _rotary(1.0, "YARN: turns within base_seqlen tokens, below which it is stretched fully")
    attention_factor: float = _rotary(1.0, "factor on cos and sin at every length (YARN)")
    training_seqlen: int = _rotary(8192, "tokens; context the weights were trained with", positive=True)
    base_seqlen: int = _rotary(8192, "tokens; L of the official rule and of YARN", positive=True)
    rope_base_power: bool = _rotary(True, "base = theta * alpha^(d/(d-2)); False: theta * alpha (52B)")
    rope_mscale: bool = _rotary(True, "cos and sin grow past training_seqlen")
    rope_length: Optional[int] = _rotary(
        None, "tokens; scale as for a sequence of this length, whatever its own: the KV cache stays valid past "
        "training_seqlen. None: by the sequence's own length, as officially", positive=True)
    amp_level: Optional[str] = _precision(
        None, "preset of the dtypes below: O0 all float32; O1 float32 parameters, 16-bit compute; O2 16-bit "
        "parameters, compute and residual, trained with a remainder (optimizer.master_weights)",
        choices=("O0", "O1", "O2"))
    compute_dtype: str = _precision("float16", "matrix multiplications", choices=DTYPES)
    param_init_type: str = _precision(
        "float16", "parameters; full training: float32 unless set", choices=DTYPES)
    embedding_init_type: str = _precision(
        None, "embedding table; None: as param_init_type", choices=DTYPES, filled=True)
    norm_init_type: str = _precision(
        None, "norms and biases; None: as param_init_type, float32 with a remainder", choices=DTYPES, filled=True)
    layernorm_compute_type: str = _precision("float32", "RMSNorm", choices=DTYPES)
    softmax_compute_type: str = _precision("float32", "attention softmax", choices=DTYPES)
    rotary_dtype: str = _precision(
        "float32", "cos and sin are rounded to it; the official code uses float16 (not 52B)", choices=DTYPES)
    res_dtype: str = _precision("float32", "residual stream", choices=DTYPES)
    embed_dropout_prob: float = _regular(0.0, "dropout of the embeddings, training only", ratio=True)
    hidden_dropout_prob: float = _regular(
        0.0, "dropout after attention output and down projection, training only", ratio=True)
    attention_dropout_prob: float = _regular(0.0, "dropout of the attention probabilities, training only", ratio=True)
    initializer_range: float = _regular(0.02, "standard deviation of new weights")
    chat_template: str = _token("", "how conversations are written (text/templates.py); '': as the vocabulary suggests")
    bos_token_id: int = _token(1, "start of a conversation")
    eos_token_id: EndTokens = _token(2, "end of an answer; one id or a list")    # noqa: RUF009 (as the others)
    pad_token_id: int = _token(3, "padding")
    user_token_id: Optional[int] = _token(None, "marker before a question")
    bot_token_id: Optional[int] = _token(None, "marker before an answer")
    ignore_token_id: int = _token(-100, "label that does not count in the loss")
    mask_pad_tokens: bool = _token(False, "no token attends to pad_token_id; for data padded on the left")
    document_boundaries: bool = _token(
        False, "packed conversations do not attend to each other: the third dataset column actual_seq_len holds "
        "their ends")
    use_flash_attention: bool = _kernel(True, "flash attention kernel where the device has one")
    use_attn_mask_compression: bool = _kernel(True, "flash attention with a 2048 x 2048 causal mask, not a full one")
    use_ring_attention: bool = _kernel(False, "context parallelism by ring attention")
    use_past: bool = _generation(False, "keep keys and values of earlier tokens (KV cache)")
    is_dynamic: bool = _generation(False, "prompts of any length in one compiled graph")
    block_size: int = _generation(16, "tokens per block of the KV cache", positive=True)
    num_blocks: int = _generation(512, "blocks of the KV cache", positive=True)
    max_decode_length: int = _generation(1024, "tokens of prompt and answer together", positive=True)
    max_new_tokens: Optional[int] = _generation(
        None, "tokens of the answer; wins over max_decode_length", positive=True)
    do_sample: bool = _generation(False, "sample; else the likeliest token")
    temperature: float = _generation(1.0, "divides the logits when sampling")
    top_k: int = _generation(5, "sample among the k likeliest tokens")
    top_p: float = _generation(1.0, "sample among the likeliest tokens that hold this share of probability")
    repetition_penalty: float = _generation(1.0, "over 1: tokens seen before become less likely")
    share_layer_graphs: bool = _compile(
        True, "on one device, equal decoder layers are compiled once; False: each separately, as on several devices")
    train_layer_by_layer: Optional[bool] = _compile(
        None, "one small graph for all layers, which are recomputed in the backward pass; None: in one process on a "
        "CPU, with more than 8 layers")
    loss_chunk_rows: Optional[int] = _compile(
        None, "tokens per device whose logits exist at once in training; None: enough for about 2^26 logits; 0: all")
    offset: object = _pipeline(0, "layers by which pipeline stages differ from the even split, one number or a list")
    pp_interleave_num: int = _pipeline(1, "virtual pipeline stages per stage", positive=True)


def _kind(hint: object, metadata: Mapping[str, object]) -> str:
    """The kind of a field, from its type (without Optional) and its metadata."""
    if metadata["choices"]:
        return "dtype" if metadata["choices"] == DTYPES else "choice"
    if metadata["positive"] or metadata["ratio"]:
        return "positive" if metadata["positive"] else "ratio"
    kinds: Dict[object, str] = {int: "int", float: "float", bool: "bool", str: "str", EndTokens: "ids", object: "any"}
    return kinds[hint]


def _fields() -> Dict[str, Field]:
    hints, found = get_type_hints(ModelSettings), {}
    for entry in fields(ModelSettings):
        metadata, hint = entry.metadata, hints[entry.name]
        arguments = get_args(hint)
        optional = len(arguments) == 2 and type(None) in arguments
        if optional:
            hint = next(argument for argument in arguments if argument is not type(None))
        found[entry.name] = Field(metadata["default"], _kind(hint, metadata), metadata["doc"], metadata["group"],
                                  metadata["choices"], optional or metadata["filled"])
    return found


FIELDS: Dict[str, Field] = _fields()
GROUPS: Dict[str, Dict[str, Field]] = {}
for _name, _field in FIELDS.items():
    GROUPS.setdefault(_field.group, {})[_name] = _field

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
