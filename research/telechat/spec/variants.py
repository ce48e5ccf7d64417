"""The table of TeleChat variants, and the reading of official ``config.json`` files.

Pure Python: no MindSpore, so that conversion, preprocessing and planning start at once. What differs between the
variants is a named capability (``tie_word_embeddings``, ``fused_projections``, ...), decided here once; nothing outside
this file looks at a model's name.
"""
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Dict, List, Optional, Protocol, Tuple, Union

from research.telechat.common.errors import ConfigError
from research.telechat.common.files import JsonObject, read_json_object
from research.telechat.spec import config_keys, llama_keys
from research.telechat.spec.hf_values import get_number


@dataclass(frozen=True)
class Variant:
    """Architecture and conventions of one member of the family. Lengths in tokens, sizes in elements."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    vocab_size: int
    n_kv_heads: Optional[int] = None         # None: as many as num_heads (no grouped-query attention)
    tie_word_embeddings: bool = False        # logits come from the embedding table; no lm_head parameter
    fused_projections: bool = False          # one w_qkv and one w_gate_hidden instead of wq, wk_v and w1, w3
    out_proj_has_bias: bool = True           # bias of wo and w2
    qkv_has_bias: bool = False               # bias of wq and wk_v, or of w_qkv
    rms_norm_eps: float = 1e-5
    input_mult: float = 1.0                  # embeddings are multiplied by it
    logits_scale: float = 1.0                # logits are multiplied by it (52B: output_mult / mup_scale_factor)
    training_seqlen: int = 8192              # context the weights were trained with
    theta: float = 10000.0                   # base of the rotary frequencies
    extend_method: str = "TELECHAT"          # which rotary rule (spec/rope.py)
    scaling_factor: float = 1.0              # YARN: how many times base_seqlen the context is
    yarn_beta_fast: float = 32.0             # YARN: turns within base_seqlen, see spec/rope.py
    yarn_beta_slow: float = 1.0
    attention_factor: float = 1.0            # YARN: factor on cos and sin
    base_seqlen: int = 8192                  # L of the NTK rule: alpha is 1 up to L (see spec/rope.py)
    rope_base_power: bool = True             # base = 10000 * alpha^(d/(d-2)); False: 10000 * alpha
    rope_mscale: bool = True                 # cos and sin grow with log(S / training_seqlen) past training_seqlen
    rope_fp16_tables: bool = True            # the official code rounds cos and sin to float16
    hf_layout: str = "telechat"              # which parameter names the official checkpoint has (spec/parameters.py)
    hf_module: str = "telechat"              # how its Python files end: modeling_telechat
    chat_template: str = "telechat"          # how conversations are written (text/templates.py)
    bos_token_id: int = 1
    eos_token_id: int = 2
    pad_token_id: int = 3
    user_token_id: Optional[int] = None      # None: the marker is ordinary text, not a single token
    bot_token_id: Optional[int] = None
    do_sample: bool = False                  # of the published generation settings, as are the rest
    temperature: float = 0.3
    top_k: int = 5
    top_p: float = 0.85
    repetition_penalty: float = 1.0

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.n_kv_heads or self.num_heads

    @property
    def head_dim(self) -> int:
        """Elements of one attention head."""
        return self.hidden_size // self.num_heads


# What generation_config.json has and config.json has not.
GENERATION = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
_TELECHAT2 = Variant(0, 0, 0, 0, 131072, hf_layout="telechat2", hf_module="telechat2", chat_template="telechat2",
                     user_token_id=4, bot_token_id=5, repetition_penalty=1.02)
_12B = Variant(38, 5120, 12288, 32, 120000, user_token_id=20, bot_token_id=21, repetition_penalty=1.003)
_2_3B = replace(_TELECHAT2, num_layers=24, hidden_size=3072, intermediate_size=6144, num_heads=24, temperature=0.0,
                repetition_penalty=1.05)
_2_7B = replace(_TELECHAT2, num_layers=30, hidden_size=4096, intermediate_size=12288, num_heads=32)
_2_35B = replace(_TELECHAT2, num_layers=64, hidden_size=6144, intermediate_size=20480, num_heads=48)
_2_115B = replace(_TELECHAT2, num_layers=96, hidden_size=8192, intermediate_size=40960, num_heads=64, n_kv_heads=8)
_32K: JsonObject = {"theta": 1e6, "training_seqlen": 32768, "base_seqlen": 32768}
_2_5: JsonObject = {"temperature": 0.0, "repetition_penalty": 1.01}
_T1: JsonObject = {"chat_template": "telechat2_think", "temperature": 0.6, "top_p": 0.95,
                       "repetition_penalty": 1.05}

# Llama's architecture and names, with YaRN from 8192 tokens.
_TELECHAT3 = Variant(64, 6144, 24576, 48, 131072, n_kv_heads=8, out_proj_has_bias=False, rope_fp16_tables=False,
                     training_seqlen=32768, theta=1e6, extend_method="YARN", scaling_factor=4.0,
                     attention_factor=llama_keys.attention_factor("telechat3-yarn", 4.0), hf_layout="llama",
                     hf_module="telechat3", chat_template="telechat3", user_token_id=4, bot_token_id=5, do_sample=True,
                     temperature=0.6, top_k=0, top_p=0.95, repetition_penalty=1.05)

VARIANTS: Dict[str, Variant] = {
    "telechat_7b": Variant(30, 4096, 12288, 32, 160256, tie_word_embeddings=True, base_seqlen=4096,
                           hf_layout="telechat_tied", bos_token_id=160132, eos_token_id=160133, user_token_id=160130,
                           bot_token_id=160131, repetition_penalty=1.03),
    "telechat_12b": _12B,
    "telechat_12b_v2": replace(_12B, chat_template="telechat_system"),
    "telechat_52b": Variant(64, 8192, 21824, 64, 80896, fused_projections=True, out_proj_has_bias=False,
                            logits_scale=1 / 32, training_seqlen=4096, base_seqlen=4096, rope_base_power=False,
                            rope_mscale=False, rope_fp16_tables=False, hf_layout="telechat_mup",
                            chat_template="telechat_52b", repetition_penalty=1.02),
    "telechat2_3b": _2_3B,
    "telechat2_7b": _2_7B,
    "telechat2_7b_32k": replace(_2_7B, **_32K),
    "telechat2_35b": _2_35B,
    "telechat2_35b_32k": replace(_2_35B, **_32K),
    "telechat2_115b": replace(_2_115B, hf_module="telechat", chat_template="telechat2_start", repetition_penalty=1.03),
    "telechat2_5_35b": replace(_2_35B, **_2_5),
    "telechat2_5_115b": replace(_2_115B, **_2_5),
    "telechat_t1_35b": replace(_2_35B, **_T1),
    "telechat_t1_115b": replace(_2_115B, **_T1),
    "telechat3_36b": _TELECHAT3,
    # Coder's config.json was not available: sizes as 36B-Thinking, of the same YaRN up to the published 128K tokens.
    "telechat3_coder": replace(_TELECHAT3, training_seqlen=131072, scaling_factor=16.0,
                               attention_factor=llama_keys.attention_factor("telechat3-yarn", 16.0),
                               chat_template="telechat3_coder"),
}


# How this plugin's first versions computed and wrote members that are published otherwise.
_BEFORE: JsonObject = {"rms_norm_eps": 1e-8, "chat_template": "telechat2_before"}
_CHANGED = ("telechat2_3b", "telechat2_7b", "telechat2_35b", "telechat2_115b")


def settings_before(name: str) -> JsonObject:
    """The settings that the model `name` had before they were corrected, by key; empty where none has changed."""
    return dict(_BEFORE) if name in _CHANGED else {}


def changed_since(before: Optional[str], now: str) -> bool:
    """Whether a model is called otherwise than it was, both names being of the table."""
    return bool(before and now and before != now and before in VARIANTS and now in VARIANTS)


def get_variant(name: str) -> Variant:
    """The variant called `name`; ConfigError lists the known ones."""
    if name not in VARIANTS:
        raise ConfigError(f"model name {name!r} is unknown; expected one of {', '.join(VARIANTS)}")
    return VARIANTS[name]


def read_hf_config(path_or_dict: Union[str, Path, JsonObject]) -> JsonObject:
    """An official config as a dict. `path_or_dict`: the dict itself, a config.json, or the folder that holds one."""
    if isinstance(path_or_dict, dict):
        return dict(path_or_dict)
    path = Path(path_or_dict)
    return read_json_object(path / "config.json" if path.is_dir() else path, "model config")


def variant_from_hf(cfg: JsonObject, name: Optional[str] = None) -> Variant:
    """The variant that an official config describes, detected by its structure (the official code has four).

    Llama's keys mark TeleChat3 (spec/llama_keys.py); `n_embd` the 52B code (fused projections, mu-parametrisation);
    `base_seqlen` the TeleChat2 code; otherwise tied embeddings mark 7B (transformers' default is tied) and untied ones
    12B. Among the members of one code the
    first of the same sizes is taken, see `same_config`. `name` names the variant instead, where the caller knows it;
    sizes, epsilon, theta and lengths always come from `cfg`. Raises ConfigError on missing, wrong or contradicting
    keys, and on what is not supported (spec/config_keys.py).
    """
    if llama_keys.is_llama(cfg):
        return _variant_from_llama_keys(cfg, name)
    config_keys.check(cfg)
    layout = ("telechat_mup" if "n_embd" in cfg else "telechat2" if cfg.get("base_seqlen") is not None else
              "telechat_tied" if _flag(cfg, "tie_word_embeddings", True) else "telechat")
    template = _closest(cfg, layout) if name is None else _named(name, layout)
    if not template.fused_projections and isinstance(cfg.get("tie_word_embeddings"), bool):
        template = replace(template, tie_word_embeddings=cfg["tie_word_embeddings"])
    num_layers, hidden, ffn, heads = (get_number(cfg, key, int) for key in _size_keys(cfg))
    kv_heads = None if cfg.get("num_key_value_heads") is None else get_number(cfg, "num_key_value_heads", int)
    if kv_heads == heads:
        kv_heads = None
    trained = get_number(cfg, "n_positions", int, template.training_seqlen)
    variant = replace(
        template, num_layers=num_layers, hidden_size=hidden, intermediate_size=ffn, num_heads=heads,
        n_kv_heads=kv_heads, vocab_size=get_number(cfg, "vocab_size", int),
        rms_norm_eps=get_number(cfg, "layer_norm_epsilon", float, template.rms_norm_eps),
        theta=config_keys.rope_theta(cfg) or 10000.0,
        training_seqlen=get_number(cfg, "training_seqlen", int, trained),
        base_seqlen=get_number(cfg, "base_seqlen", int, template.base_seqlen))
    if template.fused_projections:
        mup = _flag(cfg, "use_mup", True)
        scale = get_number(cfg, "output_mult", float, 1.0) / get_number(cfg, "mup_scale_factor", float, 1.0)
        variant = replace(variant, logits_scale=scale if mup else 1.0,
                          input_mult=get_number(cfg, "input_mult", float, 1.0) if mup else 1.0)
    return _with_tokens(variant, cfg)


def _variant_from_llama_keys(cfg: JsonObject, name: Optional[str]) -> Variant:
    """`variant_from_hf` where the keys are Llama's. What they do not say comes from the member stretched as far."""
    values: JsonObject = llama_keys.llama_fields(cfg)
    members = [variant for variant in VARIANTS.values() if variant.hf_layout == "llama"]
    template = _named(name, "llama") if name is not None else max(
        members, key=lambda variant: variant.scaling_factor == values["scaling_factor"])
    return _with_tokens(replace(template, **values), cfg)


def _named(name: str, layout: str) -> Variant:
    """The variant called `name`, whose config.json must have the keys of `layout`."""
    template = get_variant(name)
    if template.hf_layout != layout:
        raise ConfigError(f"model config: its keys are those of the layout {layout!r}, but {name} has the layout "
                          f"{template.hf_layout!r}; name the model that this checkpoint belongs to")
    return template


def _with_tokens(variant: Variant, cfg: JsonObject) -> Variant:
    """`variant` with the token ids of its config, after a check of its sizes."""
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if isinstance(cfg.get(key), int) and variant.hf_layout != "telechat_tied":
            variant = replace(variant, **{key: cfg[key]})
    check_shape(variant, where="model config: ")
    return variant


def _size_keys(cfg: JsonObject) -> Tuple[str, ...]:
    return (("n_layer", "n_embd", "n_inner", "n_head") if "n_embd" in cfg
            else ("n_layer", "hidden_size", "ffn_hidden_size", "n_head"))


def _flag(cfg: JsonObject, key: str, default: bool) -> bool:
    return default if cfg.get(key) is None else bool(cfg[key])


def _closest(cfg: JsonObject, layout: str) -> Variant:
    """The first variant of a layout that has the sizes, the Python files and the theta of `cfg`, as far as there is
    one: what no config.json says, such as the chat template, is taken from it."""
    of_layout = [variant for variant in VARIANTS.values() if variant.hf_layout == layout]
    sizes = [cfg.get(key) for key in _size_keys(cfg)]
    theta = config_keys.rope_theta(cfg) or 10000.0
    code = str((cfg.get("auto_map") or {}).get("AutoConfig") if isinstance(cfg.get("auto_map"), dict) else "")

    def likeness(variant: Variant) -> Tuple[bool, bool, bool]:
        own = [variant.num_layers, variant.hidden_size, variant.intermediate_size, variant.num_heads]
        return f"configuration_{variant.hf_module}." in code, own == sizes, own == sizes and variant.theta == theta
    return max(of_layout, key=likeness)


def same_config(variant: Variant) -> List[str]:
    """Names of the members whose config.json says the same as that of `variant`; only their names tell them apart."""
    unsaid: JsonObject = {"chat_template": "", **dict.fromkeys(GENERATION, 0)}
    return [name for name, other in VARIANTS.items() if replace(other, **unsaid) == replace(variant, **unsaid)]


class Sizes(Protocol):
    """What the rules of sizes look at: a Variant, the settings of a recipe, a TelechatConfig."""

    @property
    def hidden_size(self) -> int: ...

    @property
    def intermediate_size(self) -> int: ...

    @property
    def num_heads(self) -> int: ...

    @property
    def n_kv_heads(self) -> Optional[int]: ...

    @property
    def fused_projections(self) -> bool: ...


def shape_faults(sizes: Sizes, mp: int = 1, where: str = "model_config.") -> List[str]:
    """A line for each contradiction between sizes, or of sizes and the degree `mp` of model parallelism.

    where: prefix of the name of a size.
    """
    heads, kv_heads = sizes.num_heads, sizes.n_kv_heads or sizes.num_heads
    again = where if where.endswith(".") else ""
    faults = [f"{where}{name} ({size}) must be a multiple of {again}{by} ({divisor}); change one of them"
              for name, size, by, divisor in (("hidden_size", sizes.hidden_size, "num_heads", heads),
                                              ("num_heads", heads, "n_kv_heads", kv_heads)) if size % divisor]
    if sizes.hidden_size % heads == 0 and sizes.hidden_size // heads % 2:
        faults.append(f"{where}hidden_size / {again}num_heads is {sizes.hidden_size // heads} and must be even for the "
                      "rotary embedding; change one of them")
    if sizes.fused_projections and kv_heads != heads:
        faults.append(f"{where}fused_projections needs n_kv_heads equal to num_heads ({heads}), found {kv_heads}; "
                      "leave n_kv_heads out, or set fused_projections to False")
    faults += [f"{where}{name} ({size}) must be a multiple of parallel_config.model_parallel ({mp}): choose a degree "
               "that divides it"
               for name, size in (("num_heads", heads), ("n_kv_heads", kv_heads),
                                  ("intermediate_size", sizes.intermediate_size)) if size % mp]
    return faults


def check_shape(sizes: Sizes, mp: int = 1, where: str = "model_config.") -> None:
    """Raise ConfigError with the first of `shape_faults`."""
    for fault in shape_faults(sizes, mp, where):
        raise ConfigError(fault)


def variant_fields(variant: Variant) -> JsonObject:
    """The variant as a plain dict, as keyword arguments for TelechatConfig."""
    return asdict(variant)
