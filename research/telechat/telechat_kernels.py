"""Which kernel computes what on which device: fused ones on Ascend, composed ones on the CPU.

The only module that asks for the device. Each factory or cell below hides one such choice; the layers do not know it.
"""
from typing import Any

import mindspore as ms
import mindspore.common.dtype as mstype
import numpy as np
from mindformers.modules.flash_attention import FlashAttention
from mindformers.tools.logger import logger
from mindspore import Tensor, nn
from mindspore.ops import operations as P

from research.telechat.telechat_compat import on_cpu
from research.telechat.telechat_rope import rule_is_constant


def matmul_dtype(dtype: Any) -> Any:
    """`dtype`, or float32 for bfloat16 on the CPU, which has no bfloat16 matrix multiplication."""
    if dtype == mstype.bfloat16 and on_cpu():
        logger.info("The CPU has no bfloat16 matrix multiplication: float32 is used instead.")
        return mstype.float32
    return dtype


def use_flash_attention(config: Any) -> bool:
    """Whether attention runs in the flash attention kernel: asked for, and the device and the cache allow it."""
    return bool(config.use_flash_attention) and not on_cpu() and (not config.use_past or use_paged_attention(config))


def use_paged_attention(config: Any) -> bool:
    """Whether the KV cache works with the fused kernels, which need keys that are rotated once and for all."""
    return config.use_past and not on_cpu() and rule_is_constant(config.rope_rule, config.seq_length)


def gather_labels() -> bool:
    """Whether the logit of a label is picked by a gather (CPU), not by a product with a one-hot matrix.

    On Ascend the vocabulary is cut over model-parallel ranks, where a gather along it would first collect the logits.
    """
    return on_cpu()


def argmax(logits: Tensor, axis: int = -1) -> Tensor:
    """Index of the largest logit along `axis`; unlike mint.argmax, it exists on every device."""
    return ms.ops.argmax(logits, axis)


class RMSNormKernel(nn.Cell):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang and Sennrich, 2019)."""

    def __init__(self, eps: float):
        super().__init__()
        self.fused = not on_cpu()
        self.eps = eps
        if self.fused:
            self.norm = P.RmsNorm(eps)
        else:
            self.square = P.Square()
            self.mean = P.ReduceMean(keep_dims=True)
            self.add = P.Add()
            self.rsqrt = P.Rsqrt()
            self.scale = P.Mul()
            self.mul = P.Mul()

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        """x: [..., H] and weight: [H] of one dtype -> [..., H]."""
        if self.fused:
            return self.norm(x, weight)[0]
        inverse = self.rsqrt(self.add(self.mean(self.square(x), -1), self.eps))  # [..., 1]
        return self.mul(self.scale(x, inverse), weight)

    def shard(self, strategy: tuple) -> None:
        """`strategy`: how x [..., H] is cut; the last axis is never cut."""
        if self.fused:
            self.norm.shard((strategy, (1,)))
            return
        self.square.shard((strategy,))
        self.mean.shard((strategy,))
        self.add.shard((strategy, ()))
        self.rsqrt.shard((strategy,))
        self.scale.shard((strategy, strategy))
        self.mul.shard((strategy, (1,)))


def flash_attention(config: Any) -> FlashAttention:
    """The flash attention cell for training: BNSD layout, causal.

    Its mask is a 2048 x 2048 triangle (sparse_mode 2) unless per-batch masks are needed.
    """
    full_mask = not config.use_attn_mask_compression or config.mask_pad_tokens
    kernel = FlashAttention(
        head_num=config.num_heads, keep_prob=1.0 - config.attention_dropout_prob, scale_value=config.head_dim ** -0.5,
        pre_tokens=65536, next_tokens=0, input_layout="BNSD", sparse_mode=0 if full_mask else 2,
        use_attention_mask=not config.use_ring_attention, use_ring_attention=config.use_ring_attention)
    kernel.shard(config.parallel_config)
    return kernel


class FlatFlashAttention(nn.Cell):
    """Causal flash attention over prompts that stand back to back, for generation with is_dynamic."""

    def __init__(self, config: Any):
        super().__init__()
        self.kernel = FlashAttention(head_num=config.num_heads, pre_tokens=2147483647, next_tokens=0,
                                     scale_value=config.head_dim ** -0.5, input_layout="TH", use_attention_mask=True)
        self.kernel.shard(config.parallel_config)
        # The kernel repeats this triangle; what stands in it depends on the type (MindFormers' inference attention).
        forbidden = 1.0 if config.compute_dtype == mstype.bfloat16 else -10000.0
        self.mask = Tensor(np.triu(np.full((128, 128), forbidden, np.float32), 1), config.compute_dtype)
        self.reshape = P.Reshape()

    def construct(self, query: Tensor, key: Tensor, value: Tensor, lengths: Tensor) -> Tensor:
        """query: [1, T, N * D]; key, value: [1, T, N_kv * D]; lengths: [B], tokens of each prompt -> as query."""
        query = self.reshape(query, (-1, query.shape[-1]))
        key = self.reshape(key, (-1, key.shape[-1]))
        value = self.reshape(value, (-1, value.shape[-1]))
        context = self.kernel(query, key, value, self.mask, None, None, None, lengths, lengths)
        return self.reshape(context, (1, -1, context.shape[-1]))
