"""`TelechatConfig`: every setting of a TeleChat model, checked before anything is built.

The keys stand in telechat_config_fields, the variants in telechat_variants; this file resolves and checks them. Later
sources win: defaults, the variant named by `net_name`, presets (`amp_level`), keys of earlier YAMLs, explicit keys.
"""
import contextlib
import difflib
import math
from pathlib import Path
from typing import Any, ClassVar, Dict, Union

import mindspore.common.dtype as mstype
from mindformers.models.configuration_utils import PretrainedConfig
from mindformers.modules.transformer.transformer import TransformerOpParallelConfig, default_transformer_config
from mindformers.tools.logger import logger

from research.telechat.telechat_compat import MindFormerModuleType, plugin_class
from research.telechat.telechat_config_fields import DTYPES, FIELDS, FRAMEWORK, LEGACY, Field
from research.telechat.telechat_rope import RopeRule
from research.telechat.telechat_variants import (
    ConfigError,
    Variant,
    get_variant,
    read_hf_config,
    variant_fields,
    variant_from_hf,
)

_MSTYPES = {name: getattr(mstype, name) for name in DTYPES}
_DTYPE_NAMES = {str(dtype).lower(): name for name, dtype in _MSTYPES.items()}
_KINDS = {"int": int, "positive": int, "float": float, "ratio": float, "bool": bool, "str": str}


def dtype_name(value: Any) -> str:
    """'float32', 'float16' or 'bfloat16' for a name or a MindSpore dtype; anything else comes back as its text."""
    if isinstance(value, str):
        return {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}.get(value.lower(), value.lower())
    return _DTYPE_NAMES.get(str(value).lower(), str(value))


def _check_key(key: str, value: Any, field: Field) -> Any:
    """`value` in the type that `field` demands; ConfigError says what was expected and found."""
    if (value is None and field.optional) or field.kind == "any":
        return value
    if field.kind == "dtype":
        name = dtype_name(value)
        if name not in DTYPES:
            raise ConfigError(f"model_config.{key}: {value!r} is not a known dtype; choose {', '.join(DTYPES)}")
        return _MSTYPES[name]
    if field.kind == "choice":
        value = "None" if value is None else value
        if value not in field.choices:
            raise ConfigError(f"model_config.{key}: {value!r} is not one of {', '.join(field.choices)}")
        return value
    wanted = _KINDS[field.kind]
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if wanted is float and isinstance(value, str):       # YAML 1.1 reads 1e-5 as text
        with contextlib.suppress(ValueError):
            value = float(value)
    if wanted is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, wanted) or (wanted is not bool and isinstance(value, bool)):
        raise ConfigError(f"model_config.{key}: expected {wanted.__name__}, found {value!r}")
    if field.kind == "positive" and value <= 0:
        raise ConfigError(f"model_config.{key}: expected a positive number, found {value}")
    if field.kind == "ratio" and not 0 <= value < 1:
        raise ConfigError(f"model_config.{key}: expected a probability in [0, 1), found {value}")
    if wanted is float and not math.isfinite(value):
        raise ConfigError(f"model_config.{key}: expected a finite number, found {value}")
    return value


def _amp_dtypes(level: str, low: str) -> Dict[str, str]:
    """The dtype fields of a preset; `low` is the 16-bit type."""
    narrow = {"O0": "float32", "O1": low, "O2": low}[level]
    stored = low if level == "O2" else "float32"
    return {"compute_dtype": narrow, "param_init_type": stored, "res_dtype": stored,
            "layernorm_compute_type": "float32", "softmax_compute_type": "float32"}


def _variant_values(name: str) -> Dict[str, Any]:
    """The FIELDS that the variant `name` decides."""
    variant = get_variant(name)
    return {key: value for key, value in variant_fields(variant).items() if key in FIELDS}


def _translate_legacy(given: Dict[str, Any]) -> Dict[str, Any]:
    """Values of FIELDS that follow from keys of earlier YAMLs; says once which keys are no longer needed."""
    values: Dict[str, Any] = {}
    renamed = {"model_name": "net_name", "wo_has_bias": "out_proj_has_bias", "sigma": "initializer_range"}
    for key in given.keys() & renamed.keys():
        values[renamed[key]] = given[key]
    if given.get("use_mup"):
        values["logits_scale"] = float(given.get("output_mult", 1.0)) / float(given.get("mup_scale_factor", 1.0))
    for key in sorted(given.keys() & LEGACY.keys()):
        if LEGACY[key] and given[key]:
            logger.info("model_config.%s is no longer needed and has no effect: %s.", key, LEGACY[key])
    return values


def _default_ffn(given: Dict[str, Any], hidden: int) -> int:
    """Feed-forward width where none is given: two thirds of 4 * hidden, rounded up to `multiple_of`."""
    width = int(2 * 4 * hidden / 3)
    if given.get("ffn_dim_multiplier") is not None:
        width = int((float(given["ffn_dim_multiplier"]) + 0.01) * width)
    multiple = int(given.get("multiple_of") or 256)
    return multiple * math.ceil(width / multiple)


@plugin_class(MindFormerModuleType.CONFIG)
class TelechatConfig(PretrainedConfig):
    """Settings of a TeleChat model: the keys of `model_config` in a recipe (telechat_config_fields lists them).

    Args:
        **kwargs: keys of FIELDS, of earlier TeleChat YAMLs (LEGACY), or those that MindFormers writes (FRAMEWORK).

    Raises:
        ConfigError: unknown key (the nearest known one is named), wrong type or value, sizes that do not fit.
    """

    model_type = "telechat"
    _support_list: ClassVar[list] = []

    def __init__(self, **kwargs: Any):
        framework = {key: kwargs.pop(key) for key in list(kwargs) if key in FRAMEWORK and key not in FIELDS}
        self._reject_unknown(kwargs)
        legacy = _translate_legacy(kwargs)
        explicit = {key: value for key, value in kwargs.items() if key in FIELDS}
        values = {key: field.default for key, field in FIELDS.items()}
        name = explicit.get("net_name") or legacy.get("net_name")
        if name:
            values.update(_variant_values(name))
        if explicit.get("amp_level"):
            level = _check_key("amp_level", explicit["amp_level"], FIELDS["amp_level"])
            low = dtype_name(explicit.get("compute_dtype", "float16"))
            values.update(_amp_dtypes(level, low if low != "float32" else "float16"))
        values.update(legacy)
        values.update({key: value for key, value in explicit.items() if not (value is None and FIELDS[key].optional
                                                                             and values[key] is not None)})
        checked = {key: _check_key(key, value, FIELDS[key]) for key, value in values.items()}
        if checked["intermediate_size"] is None:
            checked["intermediate_size"] = _default_ffn(kwargs, checked["hidden_size"])
        checked["n_kv_heads"] = checked["n_kv_heads"] or checked["num_heads"]
        checked["embedding_init_type"] = checked["embedding_init_type"] or checked["param_init_type"]
        parallel = framework.pop("parallel_config", default_transformer_config)
        if isinstance(parallel, dict):
            parallel = TransformerOpParallelConfig(**parallel)
        tokens = {key: checked.pop(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        super().__init__(parallel_config=parallel, **tokens, **framework)
        for key, value in checked.items():
            setattr(self, key, value)
        self._check_sizes()

    @staticmethod
    def _reject_unknown(kwargs: Dict[str, Any]) -> None:
        known = [*FIELDS, *LEGACY]
        for key in kwargs:
            if key not in FIELDS and key not in LEGACY:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else "see docs/recipes.md for the known keys"
                raise ConfigError(f"model_config: unknown key {key!r} (value {kwargs[key]!r}); {hint}")

    def _check_sizes(self) -> None:
        """Raise ConfigError where sizes contradict each other or the parallel plan."""
        mp = self.parallel_config.model_parallel
        for size, by, fault in (
                ("hidden_size", "num_heads", self.hidden_size % self.num_heads),
                ("num_heads", "n_kv_heads", self.num_heads % self.n_kv_heads)):
            if fault:
                raise ConfigError(f"model_config.{size} ({getattr(self, size)}) must be a multiple of "
                                  f"model_config.{by} ({getattr(self, by)})")
        if self.head_dim % 2:
            raise ConfigError(f"model_config: hidden_size / num_heads = {self.head_dim} must be even for rotary "
                              "embedding")
        if self.fused_projections and self.n_kv_heads != self.num_heads:
            raise ConfigError("model_config.fused_projections needs n_kv_heads equal to num_heads "
                              f"({self.num_heads}), found {self.n_kv_heads}")
        for size in ("num_heads", "n_kv_heads", "intermediate_size"):
            if mp > 1 and getattr(self, size) % mp:
                raise ConfigError(f"model_config.{size} ({getattr(self, size)}) must be a multiple of "
                                  f"parallel_config.model_parallel ({mp}); choose another degree")
        if self.fine_grain_interleave != 1:
            raise ConfigError("model_config.fine_grain_interleave: only 1 (off) is supported, found "
                              f"{self.fine_grain_interleave}")
        stages = self.parallel_config.pipeline_stage
        if isinstance(stages, int) and stages > self.num_layers:
            raise ConfigError(f"parallel_config.pipeline_stage ({stages}) exceeds model_config.num_layers "
                              f"({self.num_layers})")

    @property
    def head_dim(self) -> int:
        """Elements of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def ffn_groups(self) -> int:
        """Groups of w_gate_hidden's rows, so that every degree of tensor parallelism cuts between whole groups."""
        return math.gcd(self.num_heads, self.intermediate_size)

    @property
    def rope_rule(self) -> RopeRule:
        """What the rotary tables depend on."""
        return RopeRule(
            head_dim=self.head_dim, theta=self.theta, extend_method=self.extend_method,
            scaling_factor=self.scaling_factor, training_seqlen=self.training_seqlen, base_seqlen=self.base_seqlen,
            base_power=self.rope_base_power, mscale=self.rope_mscale, length=self.rope_length or 0,
            table_dtype=dtype_name(self.rotary_dtype))

    def to_variant(self) -> Variant:
        """Sizes and capabilities as a Variant, which names and shapes of parameters follow from (telechat_weights)."""
        dense = "telechat_tied" if self.tie_word_embeddings else "telechat"
        layout = "telechat_mup" if self.fused_projections else dense
        fields = {key: getattr(self, key) for key in variant_fields(get_variant("telechat_12b")) if hasattr(self, key)}
        return Variant(**{**fields, "hf_layout": layout})

    @classmethod
    def from_hf_config(cls, path_or_dict: Union[str, Path, Dict[str, Any]], **overrides: Any) -> "TelechatConfig":
        """The config of an official checkpoint, in the precision of the official code.

        Args:
            path_or_dict: config.json of any of the four families, the folder that holds it, or its content.
            **overrides: keys of `model_config` that win over it.

        Returns:
            TelechatConfig; parameters and compute in `torch_dtype` where the file names one, else float32 (as
            transformers' `from_pretrained` does), rotary tables rounded as the official code rounds them.

        Raises:
            ConfigError: the file is missing, is not a TeleChat config, or a key does not fit.
        """
        hf = read_hf_config(path_or_dict)
        variant = variant_from_hf(hf)
        dtype = str(hf.get("torch_dtype") or "float32").replace("torch.", "")
        values = {key: value for key, value in variant_fields(variant).items() if key in FIELDS}
        values.update(
            compute_dtype=dtype, param_init_type=dtype, res_dtype=dtype, theta=float(hf.get("rotary_theta", 10000.0)),
            rotary_dtype="float16" if variant.rope_fp16_tables else "float32",
            seq_length=hf.get("seq_length", hf.get("n_positions", variant.training_seqlen)),
            hidden_dropout_prob=hf.get("hidden_dropout", hf.get("resid_pdrop", 0.0)),
            attention_dropout_prob=hf.get("attention_dropout", hf.get("attn_pdrop", 0.0)),
            embed_dropout_prob=hf.get("embd_pdrop", 0.0), initializer_range=hf.get("initializer_range", 0.02))
        values.update(overrides)
        return cls(**values)


__all__ = ["ConfigError", "TelechatConfig", "dtype_name"]
