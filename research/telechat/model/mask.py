"""Who may attend to whom: causal, padding and document masks, in the form that the attention kernel takes."""
from typing import Optional, Tuple

import mindspore.common.dtype as mstype
import numpy as np
from mindspore import Tensor, nn
from mindspore.ops import operations as P
from mindspore.ops.functional import stop_gradient
from mindspore.ops.primitive import constexpr

from research.telechat.common.errors import ConfigError
from research.telechat.model import kernels, sharding
from research.telechat.telechat_config import TelechatConfig

COMPRESSED = 2048                      # side of the causal triangle that the flash attention kernel repeats by itself


@constexpr
def _above_diagonal(size: int) -> Tensor:
    """[1, 1, size, size] bool: True above the diagonal, where a key comes after the query."""
    return Tensor(np.triu(np.ones((size, size), np.bool_), k=1)[None, None])


@constexpr
def _positions(size: int) -> Tensor:
    """0 .. size - 1, int32."""
    return Tensor(np.arange(size, dtype=np.int32))


@constexpr
def _row_starts(batch: int, seq: int, ranks: int) -> Tensor:
    """[batch, 1] int32: where each sequence begins among those of its rank, which are back to back."""
    return Tensor((np.arange(batch, dtype=np.int32) % (batch // ranks) * seq)[:, None])


@constexpr
def _column(batch: int, value: int) -> Tensor:
    """[batch, 1] int32, all `value`."""
    return Tensor(np.full((batch, 1), value, np.int32))


@constexpr
def _one_document(size: int) -> Tensor:
    """[1, size] int32: all in document 0."""
    return Tensor(np.zeros((1, size), np.int32))


def forbidden_score(softmax_dtype: mstype.Type) -> float:
    """What is added to a score to take it out of the softmax; finite, so that a row of only such scores is not NaN."""
    return -3e4 if softmax_dtype == mstype.float16 else -1e30


class AttentionMask(nn.Cell):
    """The mask that all layers share.

    Composed attention: additive, in softmax_compute_type. Flash attention: uint8, 1 where a query may not look; the
    2048 x 2048 triangle where the mask is only causal, together with the ends of documents where these stand back to
    back; None for ring attention, which masks by itself. The fused attention of a CPU: the documents of all tokens.
    """

    def __init__(self, config: TelechatConfig):
        super().__init__()
        self.flash = kernels.use_flash_attention(config)
        self.by_documents = kernels.fused_attention_on_cpu(config)
        self.per_sequence = kernels.per_sequence_mask(config)
        self.back_to_back = kernels.back_to_back(config)
        self.ends = DocumentEnds(config)
        self.compressed = config.use_attn_mask_compression and not self.per_sequence
        self.ring = config.use_ring_attention and config.parallel_config.context_parallel > 1
        if self.ring and self.per_sequence:
            raise ConfigError("model_config.use_ring_attention supports only the causal mask: set mask_pad_tokens "
                              "and document_boundaries to False, or use_ring_attention to False")
        self.mask_pad = config.mask_pad_tokens
        self.pad_token_id = config.pad_token_id
        self.dtype = config.softmax_compute_type
        self.forbidden = forbidden_score(self.dtype)
        self.cast = P.Cast()
        self.reshape = P.Reshape()
        self.other_document = P.NotEqual()
        self.is_equal = P.Equal()
        self.or_other_document = P.LogicalOr()
        self.or_padding = P.LogicalOr()
        self.mul = P.Mul()
        sharding.mask(self, sharding.Mesh(config))

    def construct(self, tokens: Tensor, attention_mask: Optional[Tensor], documents: Optional[Tensor],
                  ends: Optional[Tensor] = None) -> kernels.Mask:
        """tokens: [B, S]; attention_mask: [B, S], 0 where nothing may look; documents: [B, S], number of the document
        a token belongs to; ends: [B, K], theirs -> [1 or B, 1, S, S] or the compressed forms."""
        batch, seq = tokens.shape
        if self.by_documents and attention_mask is None:
            return _one_document(seq) if documents is None else documents
        if self.flash and self.ring:
            return None
        if self.back_to_back:
            if attention_mask is not None:
                raise ValueError("with document_boundaries and flash attention there is no attention_mask: leave the "
                                 "column out, or set model_config.mask_pad_tokens to True")
            return self.triangle(), self.ends(ends, batch, seq)
        if self.flash and self.compressed and attention_mask is None:
            return self.triangle()
        hidden = _above_diagonal(seq)
        if documents is not None:
            rows, columns = self.reshape(documents, (batch, 1, seq, 1)), self.reshape(documents, (batch, 1, 1, seq))
            hidden = self.or_other_document(hidden, self.other_document(rows, columns))        # [B, 1, S, S]
        if attention_mask is not None:
            padding = self.is_equal(self.reshape(attention_mask, (batch, 1, 1, seq)), 0)
            hidden = self.or_padding(hidden, padding)
        elif self.mask_pad:
            padding = self.is_equal(self.reshape(tokens, (batch, 1, 1, seq)), self.pad_token_id)
            hidden = self.or_padding(hidden, padding)
        if not self.flash:
            return self.mul(self.cast(hidden, self.dtype), self.cast(self.forbidden, self.dtype))
        # No gradient: where devices exchange parts of the mask, its gradient would travel as uint8, which no collective
        # takes.
        hidden = stop_gradient(self.cast(hidden, mstype.uint8))
        return hidden if self.per_sequence or attention_mask is not None else self.reshape(hidden, (seq, seq))


    def triangle(self) -> Tensor:
        """What the kernel repeats."""
        return self.reshape(self.cast(_above_diagonal(COMPRESSED), mstype.uint8), (COMPRESSED, COMPRESSED))


class DocumentEnds(nn.Cell):
    """Where packed documents end among the tokens of a rank, whose sequences are back to back."""

    def __init__(self, config: TelechatConfig):
        super().__init__()
        mesh = sharding.Mesh(config)
        self.ranks = mesh.dp if mesh.in_effect else 1
        self.limit = P.Minimum()
        self.join = P.Concat(1)
        self.shift = P.Add()
        self.cast = P.Cast()
        self.reshape = P.Reshape()
        sharding.document_ends(self, mesh)

    def construct(self, ends: Optional[Tensor], batch: int, seq: int) -> Tensor:
        """ends: [B, K] int32, as `Documents` has them; None: each sequence is a document -> [B (K + 1)] int64.

        What follows the last end of a sequence is a document of its own, as there; a document may be empty.
        """
        last = _column(batch, seq)
        if ends is not None:
            last = self.join((self.limit(ends, seq), last))
        return self.cast(self.reshape(self.shift(last, _row_starts(batch, seq, self.ranks)), (-1,)), mstype.int64)


class Documents(nn.Cell):
    """Which of the packed documents each token belongs to."""

    def __init__(self, config: TelechatConfig):
        super().__init__()
        self.reached = P.LessEqual()
        self.count = P.ReduceSum()
        self.last = P.ReduceMax()
        self.select = P.Mul()
        self.sub = P.Sub()
        self.cast = P.Cast()
        self.reshape = P.Reshape()
        sharding.documents(self, sharding.Mesh(config))

    def construct(self, seq: int, ends: Tensor) -> Tuple[Tensor, Tensor]:
        """Document of each token and its position in it, [B, S] int32 each.

        ends: [B, K] int32, cumulative: document k holds the positions ends[k - 1] .. ends[k] - 1; unused entries
        repeat the last end.
        """
        batch, count = ends.shape
        index = self.reshape(_positions(seq), (1, seq, 1))
        ends = self.reshape(ends, (batch, 1, count))
        passed = self.cast(self.reached(ends, index), mstype.int32)                # [B, S, K]
        document = self.cast(self.count(self.cast(passed, mstype.float32), -1), mstype.int32)
        start = self.cast(self.last(self.cast(self.select(passed, ends), mstype.float32), -1), mstype.int32)
        return document, self.sub(self.reshape(index, (1, seq)), start)
