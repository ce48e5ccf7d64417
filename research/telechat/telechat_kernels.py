"""Which kernel computes what on which device: fused ones on Ascend, composed ones on the CPU.

The only module that asks for the device. Each factory or cell below hides one such choice; the layers do not know it.
"""
from typing import Any

import mindspore as ms
import mindspore.common.dtype as mstype
from mindformers.modules.flash_attention import FlashAttention
from mindformers.tools.logger import logger
from mindspore import Tensor, nn
from mindspore.ops import operations as P

from research.telechat.telechat_compat import on_cpu


def matmul_dtype(dtype: Any) -> Any:
    """`dtype`, or float32 for bfloat16 on the CPU, which has no bfloat16 matrix multiplication."""
    if dtype == mstype.bfloat16 and on_cpu():
        logger.info("The CPU has no bfloat16 matrix multiplication: float32 is used instead.")
        return mstype.float32
    return dtype


def use_flash_attention(config: Any) -> bool:
    """Whether attention runs in the flash attention kernel: asked for, and the device has it."""
    return bool(config.use_flash_attention) and not on_cpu()


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
