"""`TelechatConfig`: every setting of a TeleChat model, checked before anything is built.

The keys stand in recipe/fields.py, the variants in spec/variants.py; recipe/settings.py resolves them.
"""
import math
from pathlib import Path
from typing import Any, ClassVar, Dict, Union

import mindspore.common.dtype as mstype
from mindformers.models.configuration_utils import PretrainedConfig
from mindformers.modules.transformer.transformer import TransformerOpParallelConfig, default_transformer_config
from mindformers.tools.logger import logger

from research.telechat.bridge.compat import MindFormerModuleType, plugin_class
from research.telechat.common.errors import ConfigError
from research.telechat.recipe.fields import DTYPES, FIELDS, FRAMEWORK
from research.telechat.recipe.settings import dtype_name, not_needed, resolve
from research.telechat.spec.rope import RopeRule
from research.telechat.spec.variants import Variant, get_variant, read_hf_config, variant_fields, variant_from_hf

_MSTYPES = {name: getattr(mstype, name) for name in DTYPES}


@plugin_class(MindFormerModuleType.CONFIG)
class TelechatConfig(PretrainedConfig):
    """Settings of a TeleChat model: the keys of `model_config` in a recipe (recipe/fields.py lists them).

    Args:
        **kwargs: keys of recipe/fields.py: of its own, of earlier TeleChat YAMLs, of MindFormers.

    Raises:
        ConfigError: unknown key (the nearest known one is named), wrong type or value, sizes that do not fit.
    """

    model_type = "telechat"
    _support_list: ClassVar[list] = []

    def __init__(self, **kwargs: Any):
        framework = {key: value for key, value in kwargs.items() if key in FRAMEWORK and key not in FIELDS}
        for line in not_needed(kwargs):
            logger.info(line)
        values = {key: _MSTYPES[value] if FIELDS[key].kind == "dtype" and value else value
                  for key, value in resolve(kwargs).items()}
        parallel = framework.pop("parallel_config", default_transformer_config)
        if isinstance(parallel, dict):
            parallel = TransformerOpParallelConfig(**parallel)
        tokens = {key: values.pop(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        super().__init__(parallel_config=parallel, **tokens, **framework)
        for key, value in values.items():
            setattr(self, key, value)
        if self.use_past and self.is_dynamic:      # a full mask has the prompt's length, which the graph does not know
            self.use_attn_mask_compression = True
        self._check_sizes()

    def _check_sizes(self) -> None:
        """Raise ConfigError where sizes contradict each other or the parallel plan."""
        mp = self.parallel_config.model_parallel
        for size, by, fault in (
                ("hidden_size", "num_heads", self.hidden_size % self.num_heads),
                ("num_heads", "n_kv_heads", self.num_heads % self.n_kv_heads)):
            if fault:
                raise ConfigError(f"model_config.{size} ({getattr(self, size)}) must be a multiple of "
                                  f"model_config.{by} ({getattr(self, by)}); change one of them")
        if self.head_dim % 2:
            raise ConfigError(f"model_config: hidden_size / num_heads = {self.head_dim} must be even for the rotary "
                              "embedding; change one of them")
        if self.fused_projections and self.n_kv_heads != self.num_heads:
            raise ConfigError("model_config.fused_projections needs n_kv_heads equal to num_heads "
                              f"({self.num_heads}), found {self.n_kv_heads}; leave n_kv_heads out, or set "
                              "fused_projections to False")
        for size in ("num_heads", "n_kv_heads", "intermediate_size"):
            if mp > 1 and getattr(self, size) % mp:
                raise ConfigError(f"model_config.{size} ({getattr(self, size)}) must be a multiple of "
                                  f"parallel_config.model_parallel ({mp}); choose another degree")
        stages = self.parallel_config.pipeline_stage
        if isinstance(stages, int) and stages > self.num_layers:
            raise ConfigError(f"parallel_config.pipeline_stage ({stages}) exceeds model_config.num_layers "
                              f"({self.num_layers}); lower it")

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
        """Sizes and capabilities as a Variant, which names and shapes of parameters follow from."""
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
