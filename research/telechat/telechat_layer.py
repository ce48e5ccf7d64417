"""The small cells of TeleChat: linear layer, RMSNorm, embedding, feed-forward.

Each takes the config and reads like its formula. Sharding is in model/sharding.py.
"""
from mindformers.modules.layers import Linear
from mindspore import Parameter, Tensor, nn
from mindspore.common.initializer import Normal, initializer
from mindspore.ops import operations as P
from mindspore.ops.auto_generate import SiLU

from research.telechat.model import kernels, sharding
from research.telechat.model.cpu_kernels import FusedGroupedSwiGLU, FusedSwiGLU
from research.telechat.telechat_config import TelechatConfig


class TelechatLinear(Linear):
    """y = x W^T + b with W [out, in]. A MindFormers Linear, as LoRA finds its targets by that class."""

    def __init__(self, config: TelechatConfig, in_channels: int, out_channels: int, has_bias: bool = False):
        super().__init__(in_channels, out_channels, has_bias=has_bias, weight_init=Normal(config.initializer_range),
                         param_init_type=config.param_init_type,
                         compute_dtype=kernels.matmul_dtype(config.compute_dtype))
        self.matmul = kernels.linear_product(config)
        if has_bias:
            self.bias_add = kernels.bias_add(config)
        if has_bias and config.norm_init_type != config.param_init_type:
            self.bias = Parameter(initializer("zeros", (out_channels,), config.norm_init_type), name="bias")


class RMSNorm(nn.Cell):
    """RMSNorm in `layernorm_compute_type`; the result is in the dtype of matrix multiplications."""

    def __init__(self, config: TelechatConfig):
        super().__init__()
        self.weight = Parameter(initializer("ones", (config.hidden_size,), config.norm_init_type),
                                parallel_optimizer=False)
        self.compute_dtype = config.layernorm_compute_type
        self.out_dtype = kernels.matmul_dtype(config.compute_dtype)
        self.kernel = kernels.rms_norm(config)
        self.cast = P.Cast()
        sharding.norm(self, sharding.Mesh(config))

    def construct(self, x: Tensor) -> Tensor:
        """x: [..., H] -> [..., H]."""
        weight = self.cast(self.weight, self.compute_dtype)
        return self.cast(self.kernel(self.cast(x, self.compute_dtype), weight), self.out_dtype)


class TelechatEmbedding(nn.Cell):
    """Rows of the embedding table, times input_mult, in the dtype of the residual stream."""

    def __init__(self, config: TelechatConfig):
        super().__init__()
        shape = (config.vocab_size, config.hidden_size)
        self.embedding_weight = Parameter(initializer(Normal(config.initializer_range), shape,
                                                      config.embedding_init_type), name="embedding_weight")
        mesh = sharding.Mesh(config)
        # Where looked-up rows travel between devices, they do so in the 16 bits of the matrix multiplications.
        self.table_dtype = kernels.matmul_dtype(config.compute_dtype if mesh.vocab > 1 else config.embedding_init_type)
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


class TelechatFeedForward(nn.Cell):
    """w2(silu(gate(x)) * up(x)) (SwiGLU, Shazeer, 2020); gate and up are w1 and w3, or one w_gate_hidden."""

    def __init__(self, config: TelechatConfig):
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
        self.in_one = kernels.fused_on_cpu(config)
        if self.in_one:
            self.swiglu = FusedGroupedSwiGLU(self.groups) if self.fused else FusedSwiGLU()
        sharding.feed_forward(self, sharding.Mesh(config))

    def construct(self, x: Tensor) -> Tensor:
        """x: rows [T, H] -> [T, H]."""
        if not self.fused:
            gate, up = self.w1(x), self.w3(x)
            return self.w2(self.swiglu(gate, up) if self.in_one else self.mul(self.silu(gate), up))
        both = self.w_gate_hidden(x)
        if self.in_one:
            return self.w2(self.swiglu(both))
        both = self.reshape(both, (-1, self.groups, 2 * self.ffn // self.groups))
        gate, up = self.split(both)                                                # [T, G, F / G] each
        return self.w2(self.reshape(self.mul(self.silu(gate), up), (-1, self.ffn)))
