"""Who may attend to whom: causal, padding and document masks, in the form that the attention kernel takes."""
from typing import Any, Optional, Tuple

import mindspore.common.dtype as mstype
import numpy as np
from mindspore import Tensor, nn
from mindspore.ops import operations as P
from mindspore.ops.primitive import constexpr

from research.telechat import telechat_kernels as kernels
from research.telechat import telechat_sharding as sharding

COMPRESSED = 2048                      # side of the causal triangle that the flash attention kernel repeats by itself


@constexpr
def _above_diagonal(size: int, dtype: Any, value: float) -> Tensor:
    """[1, 1, size, size]: `value` above the diagonal, 0 elsewhere."""
    return Tensor(np.triu(np.full((size, size), value, np.float32), k=1)[None, None], dtype)


@constexpr
def _positions(size: int) -> Tensor:
    """0 .. size - 1, int32."""
    return Tensor(np.arange(size, dtype=np.int32))


def forbidden_score(softmax_dtype: Any) -> float:
    """What is added to a score to take it out of the softmax; finite, so that a row of only such scores is no NaN."""
    return -3e4 if softmax_dtype == mstype.float16 else -1e30


class AttentionMask(nn.Cell):
    """The mask that all layers share.

    Composed attention: additive, in softmax_compute_type. Flash attention: uint8, 1 where a query may not look; the
    2048 x 2048 triangle where the mask is only causal; None for ring attention, which masks by itself.
    """

    def __init__(self, config: Any):
        super().__init__()
        self.flash = kernels.use_flash_attention(config)
        self.compressed = config.use_attn_mask_compression and not kernels.per_sequence_mask(config)
        self.ring = config.use_ring_attention and config.parallel_config.context_parallel > 1
        self.mask_pad = config.mask_pad_tokens
        self.pad_token_id = config.pad_token_id
        self.dtype = mstype.uint8 if self.flash else config.softmax_compute_type
        self.forbidden = 1.0 if self.flash else forbidden_score(config.softmax_compute_type)
        self.cast = P.Cast()
        self.reshape = P.Reshape()
        self.not_equal = P.NotEqual()
        self.equal = P.Equal()
        self.combine = P.Maximum() if self.flash else P.Minimum()
        self.mul = P.Mul()
        self.less_equal = P.LessEqual()
        self.count = P.ReduceSum()
        self.max = P.ReduceMax()
        self.sub = P.Sub()
        sharding.mask(self, sharding.Mesh(config))

    def construct(self, tokens: Tensor, attention_mask: Optional[Tensor], documents: Optional[Tensor]
                  ) -> Optional[Tensor]:
        """tokens: [B, S]; attention_mask: [B, S], 0 where nothing may look; documents: [B, S], number of the document
        a token belongs to -> [1 or B, 1, S, S] or the compressed forms."""
        batch, seq = tokens.shape
        if self.flash and self.ring:
            return None
        if self.flash and self.compressed and attention_mask is None:
            return self.reshape(_above_diagonal(COMPRESSED, self.dtype, self.forbidden), (COMPRESSED, COMPRESSED))
        mask = _above_diagonal(seq, self.dtype, self.forbidden)
        if documents is not None:
            rows, columns = self.reshape(documents, (batch, 1, seq, 1)), self.reshape(documents, (batch, 1, 1, seq))
            mask = self.combine(mask, self.where(self.not_equal(rows, columns)))   # [B, 1, S, S]
        if attention_mask is not None:
            mask = self.combine(mask, self.where(self.equal(self.reshape(attention_mask, (batch, 1, 1, seq)), 0)))
        elif self.mask_pad:
            pads = self.equal(self.reshape(tokens, (batch, 1, 1, seq)), self.pad_token_id)
            mask = self.combine(mask, self.where(pads))
        if self.flash and mask.shape[0] != batch:
            mask = P.Tile()(mask, (batch, 1, 1, 1))
        return mask

    def where(self, forbidden: Tensor) -> Tensor:
        """`forbidden`, a bool tensor, in the kernel's form."""
        return self.mul(self.cast(forbidden, self.dtype), self.cast(self.forbidden, self.dtype))

    def documents(self, seq: int, ends: Tensor) -> Tuple[Tensor, Tensor]:
        """Document of each token and its position in it, [B, S] int32 each.

        ends: [B, K] int32, cumulative: document k holds the positions ends[k - 1] .. ends[k] - 1; unused entries
        repeat the last end.
        """
        batch, count = ends.shape
        index = self.reshape(_positions(seq), (1, seq, 1))
        ends = self.reshape(ends, (batch, 1, count))
        passed = self.cast(self.less_equal(ends, index), mstype.int32)             # [B, S, K]
        document = self.cast(self.count(self.cast(passed, mstype.float32), -1), mstype.int32)
        start = self.cast(self.max(self.cast(self.mul(passed, ends), mstype.float32), -1), mstype.int32)
        return document, self.sub(self.reshape(index, (1, seq)), start)
