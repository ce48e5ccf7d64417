"""Rotary position embedding as cells: the rotation itself, and the cos and sin tables that all layers share.

Formulas and tables are in spec/rope.py. A model has one `RotaryTables`; one whose rotation depends on the number of
tokens in a text, or that has a KV cache, has `RotaryTablesByLength` too.
"""
from typing import Tuple

import mindspore.common.dtype as mstype
import numpy as np
from mindspore import Tensor, nn
from mindspore.ops import operations as P
from mindspore.ops.primitive import constexpr

from research.telechat.model import kernels, sharding
from research.telechat.spec.rope import RopeRule, rope_table, rule_is_constant, tables_by_length
from research.telechat.telechat_config import TelechatConfig


def rotation_dtype(config: TelechatConfig) -> mstype.Type:
    """In which queries and keys are rotated: 16 bits only where both the activations and the tables are of that type,
    as in the official code."""
    compute = kernels.matmul_dtype(config.compute_dtype)
    return compute if compute == config.rotary_dtype else mstype.float32


@constexpr
def _rope_constants(rule: Tuple, seq_length: int, dtype: mstype.Type) -> Tuple[Tensor, Tensor]:
    """cos and sin [S, D] as constants of the graph; made when it is compiled, for the length it is compiled for."""
    cos, sin = rope_table(RopeRule(*rule), seq_length)
    return Tensor(cos, dtype), Tensor(sin, dtype)


class RotaryEmbedding(nn.Cell):
    """Rotates queries and keys: x cos + rotate_half(x) sin (Su et al., 2021), rotate_half([a, b]) = [-b, a]."""

    def __init__(self, config: TelechatConfig):
        super().__init__()
        self.dtype = rotation_dtype(config)
        self.halves = P.Split(axis=-1, output_num=2)
        self.neg = P.Neg()
        self.concat = P.Concat(axis=-1)
        self.mul_cos = P.Mul()
        self.mul_sin = P.Mul()
        self.add = P.Add()
        self.cast = P.Cast()
        sharding.rotary(self, sharding.Mesh(config))

    def construct(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: [B, N, S, D]; cos, sin: [1 or B, 1 or N and more, S, D] -> as x."""
        dtype, heads = x.dtype, x.shape[1]
        if cos.shape[1] > heads:                                                   # repeated for more heads
            cos, sin = cos[:, :heads], sin[:, :heads]
        x = self.cast(x, self.dtype)
        first, second = self.halves(x)                                             # [B, N, S, D / 2] each
        rotated = self.concat((self.neg(second), first))
        return self.cast(self.add(self.mul_cos(x, cos), self.mul_sin(rotated, sin)), dtype)


class RotaryTables(nn.Cell):
    """cos and sin for sequences that are all scaled alike, as constants of the graph."""

    def __init__(self, config: TelechatConfig):
        super().__init__()
        self.dtype = rotation_dtype(config)
        self.rule = tuple(vars(config.rope_rule).values())
        self.gather = P.Gather()
        self.reshape = P.Reshape()
        self.per_head = kernels.PerHead(config)
        sharding.rotary_tables(self, sharding.Mesh(config))

    def all_positions(self, batch: int, seq_length: int) -> Tuple[Tensor, Tensor]:
        """cos and sin for positions 0 .. seq_length - 1 of `batch` sequences, [1 or B, 1 or N, S, D]."""
        cos, sin = _rope_constants(self.rule, seq_length, self.dtype)
        shape = (1, 1, seq_length, cos.shape[-1])
        return self.per_head(self.reshape(cos, shape), batch), self.per_head(self.reshape(sin, shape), batch)

    def at(self, positions: Tensor, seq_length: int) -> Tuple[Tensor, Tensor]:
        """cos and sin at `positions` [B, S], scaled as for `seq_length` tokens: [B, 1 or N, S, D]."""
        cos, sin = _rope_constants(self.rule, seq_length, self.dtype)
        batch, length = positions.shape
        shape = (batch, 1, length, cos.shape[-1])
        cos, sin = self.gather(cos, positions, 0), self.gather(sin, positions, 0)
        return self.per_head(self.reshape(cos, shape), 1), self.per_head(self.reshape(sin, shape), 1)


class RotaryTablesByLength(nn.Cell):
    """cos and sin by position and by the number of tokens in the sequence, as constants of the graph."""

    def __init__(self, config: TelechatConfig):
        super().__init__()
        tables = tables_by_length(config.rope_rule, config.seq_length)
        self.dtype = rotation_dtype(config)
        self.constant = rule_is_constant(config.rope_rule, config.seq_length)
        self.limit, self.head_dim = config.seq_length, config.head_dim
        self.rounding = config.rotary_dtype
        table_dtype = self.dtype if self.constant else mstype.float32
        self.cos, self.sin = Tensor(tables.cos, table_dtype), Tensor(tables.sin, table_dtype)
        self.first_row = Tensor(tables.level * np.int32(self.limit))
        self.mscale = Tensor(tables.mscale)
        self.grows = bool((tables.mscale != 1).any())
        self.gather = P.Gather()
        self.expand = P.ExpandDims()       # not Reshape: the parallel compiler loses track of shapes of any size
        self.reshape = P.Reshape()
        self.cast = P.Cast()
        self.add = P.Add()
        self.sub = P.Sub()
        self.mul = P.Mul()
        self.minimum = P.Minimum()
        self.cumsum = P.CumSum()
        self.ones_like = P.OnesLike()
        self.per_head = kernels.PerHead(config)

    def construct(self, positions: Tensor, totals: Tensor) -> Tuple[Tensor, Tensor]:
        """positions: [B, S]; totals: [B, S] or [B, 1], tokens in the sequence -> cos and sin, [B, 1 or N, S, D]."""
        cos, sin = self.at(positions, totals)
        return self.per_head(self.expand(cos, 1), 1), self.per_head(self.expand(sin, 1), 1)

    def at(self, positions: Tensor, totals: Tensor) -> Tuple[Tensor, Tensor]:
        """As `construct` -> cos and sin, [B, S, D]."""
        rows = self.minimum(positions, self.limit - 1)                             # padding may reach further
        if not self.constant:
            totals = self.minimum(totals, self.limit)
            rows = self.add(rows, self.gather(self.first_row, totals, 0))
        cos, sin = self.gather(self.cos, rows, 0), self.gather(self.sin, rows, 0)
        if self.grows:
            mscale = self.expand(self.gather(self.mscale, totals, 0), -1)          # [B, S, 1] or [B, 1, 1]
            cos = self.cast(self.mul(cos, mscale), self.rounding)
            sin = self.cast(self.mul(sin, mscale), self.rounding)
        return self.cast(cos, self.dtype), self.cast(sin, self.dtype)

    def all_positions(self, tokens: Tensor, lengths: Tensor) -> Tuple[Tensor, Tensor]:
        """cos and sin of every position of tokens [B, S], in sequences of `lengths` [B] tokens."""
        positions = self.sub(self.cumsum(self.ones_like(tokens), 1), 1)            # [B, S]
        return self.construct(positions, self.reshape(lengths, (-1, 1)))
