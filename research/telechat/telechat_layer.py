"""The small cells of TeleChat: linear layer, RMSNorm, embedding, rotary embedding, feed-forward.

Each takes the config and reads like its formula. How it is split over devices stands in model/sharding.py.
"""
from typing import Any, Tuple

import mindspore.common.dtype as mstype
from mindformers.modules.layers import Linear
from mindspore import Parameter, Tensor, nn
from mindspore.common.initializer import Normal, initializer
from mindspore.ops import operations as P
from mindspore.ops.auto_generate import SiLU
from mindspore.ops.primitive import constexpr

from research.telechat.model import kernels, sharding
from research.telechat.spec.rope import RopeRule, rope_table


class TelechatLinear(Linear):
    """y = x W^T + b with W [out, in]. A MindFormers Linear, as LoRA finds its targets by that class."""

    def __init__(self, config: Any, in_channels: int, out_channels: int, has_bias: bool = False):
        super().__init__(in_channels, out_channels, has_bias=has_bias, weight_init=Normal(config.initializer_range),
                         param_init_type=config.param_init_type,
                         compute_dtype=kernels.matmul_dtype(config.compute_dtype))


class RMSNorm(nn.Cell):
    """RMSNorm in `layernorm_compute_type`; the result is in the dtype of matrix multiplications."""

    def __init__(self, config: Any):
        super().__init__()
        self.weight = Parameter(initializer("ones", (config.hidden_size,), config.param_init_type),
                                parallel_optimizer=False)
        self.compute_dtype = config.layernorm_compute_type
        self.out_dtype = kernels.matmul_dtype(config.compute_dtype)
        self.kernel = kernels.RMSNormKernel(config.rms_norm_eps)
        self.cast = P.Cast()
        sharding.norm(self, sharding.Mesh(config))

    def construct(self, x: Tensor) -> Tensor:
        """x: [..., H] -> [..., H]."""
        weight = self.cast(self.weight, self.compute_dtype)
        return self.cast(self.kernel(self.cast(x, self.compute_dtype), weight), self.out_dtype)


class TelechatEmbedding(nn.Cell):
    """Rows of the embedding table, times input_mult, in the dtype of the residual stream."""

    def __init__(self, config: Any):
        super().__init__()
        shape = (config.vocab_size, config.hidden_size)
        self.embedding_weight = Parameter(initializer(Normal(config.initializer_range), shape,
                                                      config.embedding_init_type), name="embedding_weight")
        mesh = sharding.Mesh(config)
        # Where looked-up rows travel between devices, they do so in the 16 bits of the matrix multiplications.
        self.table_dtype = kernels.matmul_dtype(config.compute_dtype) if mesh.vocab > 1 else config.embedding_init_type
        self.out_dtype = config.res_dtype
        self.input_mult = config.input_mult
        self.gather = P.Gather()
        self.scale = P.Mul()
        self.cast = P.Cast()
        self.dropout = nn.Dropout(p=config.embed_dropout_prob)
        self.has_dropout = config.embed_dropout_prob > 0
        sharding.embedding(self, mesh)

    def construct(self, tokens: Tensor) -> Tensor:
        """tokens: [T] int32 -> rows [T, H]."""
        table = self.cast(self.embedding_weight, self.table_dtype)
        h = self.cast(self.gather(table, tokens, 0), self.out_dtype)
        if self.input_mult != 1.0:
            h = self.scale(h, self.cast(self.input_mult, self.out_dtype))
        return self.dropout(h) if self.has_dropout else h


@constexpr
def _rope_constants(rule: tuple, seq_length: int, dtype: Any) -> Tuple[Tensor, Tensor]:
    """cos and sin [S, D] as constants of the graph; made when it is compiled, for the length it is compiled for."""
    cos, sin = rope_table(RopeRule(*rule), seq_length)
    return Tensor(cos, dtype), Tensor(sin, dtype)


class RotaryEmbedding(nn.Cell):
    """Rotates queries and keys: x cos + rotate_half(x) sin (Su et al., 2021), rotate_half([a, b]) = [-b, a]."""

    def __init__(self, config: Any):
        super().__init__()
        compute = kernels.matmul_dtype(config.compute_dtype)
        # 16-bit arithmetic only where both the activations and the tables are of that type, as in the official code.
        self.dtype = compute if compute == config.rotary_dtype else mstype.float32
        self.rule = tuple(vars(config.rope_rule).values())
        self.halves = P.Split(axis=-1, output_num=2)
        self.neg = P.Neg()
        self.concat = P.Concat(axis=-1)
        self.mul_cos = P.Mul()
        self.mul_sin = P.Mul()
        self.add = P.Add()
        self.cast = P.Cast()
        self.gather = P.Gather()
        self.reshape = P.Reshape()
        sharding.rotary(self, sharding.Mesh(config))

    def tables(self, seq_length: int) -> Tuple[Tensor, Tensor]:
        """cos and sin for positions 0 .. seq_length - 1, [1, 1, S, D]."""
        cos, sin = _rope_constants(self.rule, seq_length, self.dtype)
        shape = (1, 1, seq_length, cos.shape[-1])
        return self.reshape(cos, shape), self.reshape(sin, shape)

    def tables_at(self, positions: Tensor, seq_length: int) -> Tuple[Tensor, Tensor]:
        """cos and sin at `positions` [B, S], scaled as for `seq_length` tokens: [B, 1, S, D]."""
        cos, sin = _rope_constants(self.rule, seq_length, self.dtype)
        batch, length = positions.shape
        shape = (batch, 1, length, cos.shape[-1])
        return self.reshape(self.gather(cos, positions, 0), shape), self.reshape(self.gather(sin, positions, 0), shape)

    def construct(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: [B, N, S, D]; cos, sin: [1 or B, 1, S, D] -> as x."""
        dtype = x.dtype
        x = self.cast(x, self.dtype)
        first, second = self.halves(x)                                             # [B, N, S, D / 2] each
        rotated = self.concat((self.neg(second), first))
        return self.cast(self.add(self.mul_cos(x, cos), self.mul_sin(rotated, sin)), dtype)


class TelechatFeedForward(nn.Cell):
    """w2(silu(gate(x)) * up(x)) (SwiGLU, Shazeer, 2020); gate and up are w1 and w3, or one w_gate_hidden."""

    def __init__(self, config: Any):
        super().__init__()
        self.fused = config.fused_projections
        self.ffn, self.groups = config.intermediate_size, config.ffn_groups
        hidden = config.hidden_size
        if self.fused:
            self.w_gate_hidden = TelechatLinear(config, hidden, 2 * self.ffn)
            self.split = P.Split(axis=-1, output_num=2)
        else:
            self.w1 = TelechatLinear(config, hidden, self.ffn)
            self.w3 = TelechatLinear(config, hidden, self.ffn)
        self.w2 = TelechatLinear(config, self.ffn, hidden, has_bias=config.out_proj_has_bias)
        self.silu = SiLU()
        self.mul = P.Mul()
        self.reshape = P.Reshape()
        sharding.feed_forward(self, sharding.Mesh(config))

    def construct(self, x: Tensor) -> Tensor:
        """x: rows [T, H] -> [T, H]."""
        if not self.fused:
            return self.w2(self.mul(self.silu(self.w1(x)), self.w3(x)))
        both = self.reshape(self.w_gate_hidden(x), (-1, self.groups, 2 * self.ffn // self.groups))
        gate, up = self.split(both)                                                # [T, G, F / G] each
        return self.w2(self.reshape(self.mul(self.silu(gate), up), (-1, self.ffn)))
