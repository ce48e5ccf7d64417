"""The table of TeleChat variants, and the reading of official ``config.json`` files.

Pure Python: no MindSpore, so that conversion, preprocessing and planning start at once. What differs between the
variants is a named capability (``tie_word_embeddings``, ``fused_projections``, ...), decided here once; nothing outside
this file looks at a model's name.
"""
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Dict, List, Optional, Protocol, Type, TypeVar, Union

from research.telechat.common.errors import ConfigError
from research.telechat.common.files import JsonObject, read_json_object


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
    base_seqlen: int = 8192                  # L of the NTK rule: alpha is 1 up to L (see spec/rope.py)
    rope_base_power: bool = True             # base = 10000 * alpha^(d/(d-2)); False: 10000 * alpha
    rope_mscale: bool = True                 # cos and sin grow with log(S / training_seqlen) past training_seqlen
    rope_fp16_tables: bool = True            # the official code rounds cos and sin to float16
    hf_layout: str = "telechat"              # which parameter names the official checkpoint has (spec/parameters.py)
    chat_template: str = "telechat"          # how conversations are written (text/renderer.py)
    bos_token_id: int = 1
    eos_token_id: int = 2
    pad_token_id: int = 3
    user_token_id: Optional[int] = None      # None: the marker is ordinary text, not a single token
    bot_token_id: Optional[int] = None

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.n_kv_heads or self.num_heads

    @property
    def head_dim(self) -> int:
        """Elements of one attention head."""
        return self.hidden_size // self.num_heads


_TELECHAT2 = Variant(0, 0, 0, 0, 131072, rms_norm_eps=1e-8, hf_layout="telechat2", chat_template="telechat2",
                     user_token_id=4, bot_token_id=5)


def _telechat2(layers: int, hidden: int, ffn: int, heads: int, kv_heads: Optional[int] = None) -> Variant:
    return replace(_TELECHAT2, num_layers=layers, hidden_size=hidden, intermediate_size=ffn, num_heads=heads,
                   n_kv_heads=kv_heads)


VARIANTS: Dict[str, Variant] = {
    "telechat_7b": Variant(30, 4096, 12288, 32, 160256, tie_word_embeddings=True, base_seqlen=4096,
                           hf_layout="telechat_tied", bos_token_id=160132, eos_token_id=160133, user_token_id=160130,
                           bot_token_id=160131),
    "telechat_12b": Variant(38, 5120, 12288, 32, 120000, user_token_id=20, bot_token_id=21),
    "telechat_52b": Variant(64, 8192, 21824, 64, 80896, fused_projections=True, out_proj_has_bias=False,
                            logits_scale=1 / 32, training_seqlen=4096, base_seqlen=4096, rope_base_power=False,
                            rope_mscale=False, rope_fp16_tables=False, hf_layout="telechat_mup",
                            chat_template="telechat_52b"),
    # The official config.json of 3B, 7B and 35B were not at hand: sizes as published, the rest as 115B.
    "telechat2_3b": _telechat2(24, 3072, 6144, 24),
    "telechat2_7b": _telechat2(30, 4096, 12288, 32),
    "telechat2_35b": _telechat2(64, 6144, 20480, 48),
    "telechat2_115b": _telechat2(96, 8192, 40960, 64, 8),
}


def get_variant(name: str) -> Variant:
    """The variant called `name`; ConfigError lists the known ones."""
    if name not in VARIANTS:
        raise ConfigError(f"model name {name!r} is unknown; known are {', '.join(VARIANTS)}")
    return VARIANTS[name]


def read_hf_config(path_or_dict: Union[str, Path, JsonObject]) -> JsonObject:
    """An official config as a dict. `path_or_dict`: the dict itself, a config.json, or the folder that holds one."""
    if isinstance(path_or_dict, dict):
        return dict(path_or_dict)
    path = Path(path_or_dict)
    return read_json_object(path / "config.json" if path.is_dir() else path, "model config")


Number = TypeVar("Number", int, float)


def _get(cfg: JsonObject, key: str, kind: Type[Number], default: Optional[Number] = None) -> Number:
    """cfg[key] as `kind`; ConfigError if it is missing (and has no default) or of another type."""
    value: Any = cfg.get(key, default)
    if value is None:
        raise ConfigError(f"model config: key {key!r} is missing; is this a TeleChat config.json?")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"model config: key {key!r} must be {kind.__name__}, found {value!r}")
    if value <= 0:
        raise ConfigError(f"model config: key {key!r} must be positive, found {value!r}")
    return value


def variant_from_hf(cfg: JsonObject, name: Optional[str] = None) -> Variant:
    """The variant that an official config describes, told by its structure (the official code has three).

    `n_embd` marks the 52B code (fused projections, mu-parametrisation); `base_seqlen` the TeleChat2 code; otherwise
    tied embeddings mark 7B (transformers' default is tied) and untied ones 12B. `name` names the variant instead, where
    the caller knows it; sizes always come from `cfg`. Raises ConfigError on missing, wrong or contradicting keys.
    """
    if "n_embd" in cfg:
        template = VARIANTS["telechat_52b"]
    elif "base_seqlen" in cfg:
        template = VARIANTS["telechat2_115b"]
    else:
        template = VARIANTS["telechat_7b" if cfg.get("tie_word_embeddings", True) else "telechat_12b"]
    if name is not None:
        named = get_variant(name)
        if named.hf_layout != template.hf_layout:
            raise ConfigError(f"model config: its keys are those of the layout {template.hf_layout!r}, but {name} has "
                              f"the layout {named.hf_layout!r}; name the model that this checkpoint belongs to")
        template = named
    if not template.fused_projections and isinstance(cfg.get("tie_word_embeddings"), bool):
        template = replace(template, tie_word_embeddings=cfg["tie_word_embeddings"])
    keys = (("n_layer", "n_embd", "n_inner", "n_head") if "n_embd" in cfg
            else ("n_layer", "hidden_size", "ffn_hidden_size", "n_head"))
    num_layers, hidden, ffn, heads = (_get(cfg, key, int) for key in keys)
    kv_heads = cfg.get("num_key_value_heads")
    if kv_heads is not None:
        kv_heads = _get(cfg, "num_key_value_heads", int)
    variant = replace(
        template, num_layers=num_layers, hidden_size=hidden, intermediate_size=ffn, num_heads=heads,
        n_kv_heads=kv_heads, vocab_size=_get(cfg, "vocab_size", int),
        rms_norm_eps=_get(cfg, "layer_norm_epsilon", float, template.rms_norm_eps),
        training_seqlen=_get(cfg, "training_seqlen", int, cfg.get("n_positions", template.training_seqlen)),
        base_seqlen=_get(cfg, "base_seqlen", int, template.base_seqlen))
    if template.fused_projections:
        mup = cfg.get("use_mup", True)
        scale = _get(cfg, "output_mult", float, 1.0) / _get(cfg, "mup_scale_factor", float, 1.0) if mup else 1.0
        variant = replace(variant, logits_scale=scale,
                          input_mult=_get(cfg, "input_mult", float, 1.0) if mup else 1.0)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if isinstance(cfg.get(key), int) and template.hf_layout != "telechat_tied":
            variant = replace(variant, **{key: cfg[key]})
    check_shape(variant, where="model config: ")
    return variant


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

    where: what stands before the name of a size.
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
