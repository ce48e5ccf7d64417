"""`TelechatConfig`: every setting of a TeleChat model, checked before anything is built.

The keys are in recipe/fields.py, the variants in spec/variants.py; recipe/settings.py resolves them.
"""
from pathlib import Path
from typing import ClassVar, Union

import mindspore.common.dtype as mstype
from mindformers.models.configuration_utils import PretrainedConfig
from mindformers.modules.transformer.transformer import TransformerOpParallelConfig, default_transformer_config
from mindformers.tools.logger import logger

from research.telechat.bridge.compat import MindFormerModuleType, plugin_class
from research.telechat.common.errors import ConfigError
from research.telechat.common.files import JsonObject
from research.telechat.recipe.fields import DTYPES, FIELDS, FRAMEWORK, ModelSettings
from research.telechat.recipe.settings import dtype_name, not_needed, resolve, to_variant
from research.telechat.spec.parameters import gate_up_groups
from research.telechat.spec.rope import RopeRule
from research.telechat.spec.variants import (
    GENERATION,
    Variant,
    check_shape,
    read_hf_config,
    variant_fields,
    variant_from_hf,
)

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

    def __init__(self, **kwargs: object):
        framework = {key: value for key, value in kwargs.items() if key in FRAMEWORK and key not in FIELDS}
        for line in not_needed(kwargs):
            logger.info(line)
        settings = resolve(kwargs)
        parallel = framework.pop("parallel_config", default_transformer_config)
        if isinstance(parallel, dict):
            parallel = TransformerOpParallelConfig(**parallel)
        super().__init__(parallel_config=parallel, bos_token_id=settings.bos_token_id,
                         eos_token_id=settings.eos_token_id, pad_token_id=settings.pad_token_id, **framework)
        self._take(settings)
        if settings.use_past and settings.is_dynamic:
            # A full mask has the length of the prompt, which the graph does not know.
            self.use_attn_mask_compression = True
        self._check_sizes()

    def _take(self, settings: ModelSettings) -> None:
        """Every setting as an attribute, dtypes as MindSpore's. MindFormers reads them all, and changes some."""
        self.net_name = settings.net_name
        self.batch_size = settings.batch_size
        self.seq_length = settings.seq_length
        self.num_layers = settings.num_layers
        self.hidden_size = settings.hidden_size
        self.intermediate_size = settings.intermediate_size
        self.num_heads = settings.num_heads
        self.n_kv_heads = settings.n_kv_heads
        self.vocab_size = settings.vocab_size
        self.tie_word_embeddings = settings.tie_word_embeddings
        self.fused_projections = settings.fused_projections
        self.out_proj_has_bias = settings.out_proj_has_bias
        self.qkv_has_bias = settings.qkv_has_bias
        self.rms_norm_eps = settings.rms_norm_eps
        self.input_mult = settings.input_mult
        self.logits_scale = settings.logits_scale
        self.theta = settings.theta
        self.extend_method = settings.extend_method
        self.scaling_factor = settings.scaling_factor
        self.yarn_beta_fast = settings.yarn_beta_fast
        self.yarn_beta_slow = settings.yarn_beta_slow
        self.attention_factor = settings.attention_factor
        self.training_seqlen = settings.training_seqlen
        self.base_seqlen = settings.base_seqlen
        self.rope_base_power = settings.rope_base_power
        self.rope_mscale = settings.rope_mscale
        self.rope_length = settings.rope_length
        self.amp_level = settings.amp_level
        self.compute_dtype = _MSTYPES[settings.compute_dtype]
        self.param_init_type = _MSTYPES[settings.param_init_type]
        self.embedding_init_type = _MSTYPES[settings.embedding_init_type]
        self.norm_init_type = _MSTYPES[settings.norm_init_type]
        self.layernorm_compute_type = _MSTYPES[settings.layernorm_compute_type]
        self.softmax_compute_type = _MSTYPES[settings.softmax_compute_type]
        self.rotary_dtype = _MSTYPES[settings.rotary_dtype]
        self.res_dtype = _MSTYPES[settings.res_dtype]
        self.embed_dropout_prob = settings.embed_dropout_prob
        self.hidden_dropout_prob = settings.hidden_dropout_prob
        self.attention_dropout_prob = settings.attention_dropout_prob
        self.initializer_range = settings.initializer_range
        self.bos_token_id = settings.bos_token_id
        self.eos_token_id = settings.eos_token_id
        self.pad_token_id = settings.pad_token_id
        self.chat_template = settings.chat_template
        self.user_token_id = settings.user_token_id
        self.bot_token_id = settings.bot_token_id
        self.ignore_token_id = settings.ignore_token_id
        self.mask_pad_tokens = settings.mask_pad_tokens
        self.document_boundaries = settings.document_boundaries
        self.use_flash_attention = settings.use_flash_attention
        self.use_attn_mask_compression = settings.use_attn_mask_compression
        self.use_ring_attention = settings.use_ring_attention
        self.use_past = settings.use_past
        self.is_dynamic = settings.is_dynamic
        self.block_size = settings.block_size
        self.num_blocks = settings.num_blocks
        self.max_decode_length = settings.max_decode_length
        self.max_new_tokens = settings.max_new_tokens
        self.do_sample = settings.do_sample
        self.temperature = settings.temperature
        self.top_k = settings.top_k
        self.top_p = settings.top_p
        self.repetition_penalty = settings.repetition_penalty
        self.share_layer_graphs = settings.share_layer_graphs
        self.train_layer_by_layer = settings.train_layer_by_layer
        self.loss_chunk_rows = settings.loss_chunk_rows
        self.offset = settings.offset
        self.pp_interleave_num = settings.pp_interleave_num

    def _check_sizes(self) -> None:
        """Raise ConfigError where sizes contradict each other or the parallel plan."""
        check_shape(self, self.parallel_config.model_parallel)
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
        """Groups of w_gate_hidden's rows, so that every degree of tensor parallelism splits between whole groups."""
        return gate_up_groups(self)

    @property
    def rope_rule(self) -> RopeRule:
        """What the rotary tables depend on."""
        return RopeRule(
            head_dim=self.head_dim, theta=self.theta, extend_method=self.extend_method,
            scaling_factor=self.scaling_factor, training_seqlen=self.training_seqlen, base_seqlen=self.base_seqlen,
            base_power=self.rope_base_power, mscale=self.rope_mscale, length=self.rope_length or 0,
            table_dtype=dtype_name(self.rotary_dtype), beta_fast=self.yarn_beta_fast, beta_slow=self.yarn_beta_slow,
            attention_factor=self.attention_factor)

    def to_variant(self) -> Variant:
        """Sizes and capabilities as a Variant, which names and shapes of parameters follow from."""
        return to_variant(self)

    @classmethod
    def from_hf_config(cls, path_or_dict: Union[str, Path, JsonObject], **overrides: object) -> "TelechatConfig":
        """The config of an official checkpoint, in the precision of the official code.

        Args:
            path_or_dict: config.json of any of the five families, the folder that holds it, or its content.
            **overrides: keys of `model_config` that win over it.

        Returns:
            TelechatConfig; parameters and compute in `torch_dtype` where the file names one, else float32 (as
            transformers' `from_pretrained` does), rotary tables rounded as the official code rounds them.

        Raises:
            ConfigError: the file is missing, is not a TeleChat config, or a key does not fit.
        """
        hf = read_hf_config(path_or_dict)
        variant = variant_from_hf(hf)
        dtype = str(hf.get("torch_dtype") or hf.get("dtype") or "float32").replace("torch.", "")
        values = {key: value for key, value in variant_fields(variant).items()
                  if key in FIELDS and key not in GENERATION}
        hf = {key: value for key, value in hf.items() if value is not None}
        values.update(
            compute_dtype=dtype, param_init_type=dtype, res_dtype=dtype,
            rotary_dtype="float16" if variant.rope_fp16_tables else "float32",
            seq_length=hf.get("seq_length", hf.get("n_positions", variant.training_seqlen)),
            hidden_dropout_prob=hf.get("hidden_dropout", hf.get("resid_pdrop", 0.0)),
            attention_dropout_prob=hf.get("attention_dropout", hf.get("attn_pdrop", 0.0)),
            embed_dropout_prob=hf.get("embd_pdrop", 0.0), initializer_range=hf.get("initializer_range", 0.02))
        values.update(overrides)
        return cls(**values)


__all__ = ["ConfigError", "TelechatConfig", "dtype_name"]
