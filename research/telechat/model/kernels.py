"""Which kernel computes what on which device: fused ones on Ascend, composed ones on the CPU.

The only module that asks for the device. Each factory or cell below hides one such choice; the layers do not know it.
"""
from typing import Optional, Tuple, Union

import mindspore as ms
import mindspore.common.dtype as mstype
import numpy as np
from mindformers.modules.flash_attention import FlashAttention
from mindformers.tools.logger import logger
from mindspore import Tensor, nn
from mindspore.ops import Primitive, auto_generate
from mindspore.ops import functional as F
from mindspore.ops import operations as P
from mindspore.ops.operations.nn_ops import FlashAttentionScore

from research.telechat.bridge.compat import on_cpu
from research.telechat.model import cpu_kernels, sharding
from research.telechat.native.operators import available
from research.telechat.spec.attention_form import documents_back_to_back
from research.telechat.telechat_config import TelechatConfig

QUERY_BLOCKS = 4                         # of a long prompt with the composed cache; its tokens are a multiple of it
NO_LIMIT = 2**31 - 1                     # of the attention kernel's window
_FEW = 32                                # rows
NOTHING = -1e4                           # below it, the largest score of a query that sees no key
# What the attention of all layers is given (model/mask.py): nothing, a mask, the documents of all tokens, the triangle
# and the ends of documents, or of a long prompt the masks of all blocks of queries (model/kv_cache.py).
Mask = Union[None, Tensor, Tuple[Tensor, ...]]


def matmul_dtype(dtype: mstype.Type) -> mstype.Type:
    """`dtype`, or float32 for bfloat16 on the CPU, which neither multiplies matrices of it nor looks up rows."""
    if dtype == mstype.bfloat16 and on_cpu():
        logger.info("The CPU has no bfloat16 matrix multiplication and no look-up: float32 is used instead.")
        return mstype.float32
    return dtype


def use_flash_attention(config: TelechatConfig) -> bool:
    """Whether attention runs in the flash attention kernel: asked for, and the device has it."""
    return bool(config.use_flash_attention) and not on_cpu()


def use_paged_attention() -> bool:
    """Whether the device has the fused kernels of the KV cache."""
    return not on_cpu()


def native_operators() -> bool:
    """Whether the fused operators of the room `native` compute: on a CPU with a C++ compiler, where nothing is sharded,
    as MindSpore cannot shard them."""
    alone = ms.get_auto_parallel_context("parallel_mode") in ("stand_alone", "data_parallel")
    return on_cpu() and alone and available()


def gather_labels() -> bool:
    """Whether the logit of a label is picked by a gather (CPU), not by a product with a one-hot matrix.

    On Ascend the vocabulary is sharded over model-parallel ranks, where a gather along it would first collect the
    logits.
    """
    return on_cpu()


def gradient_kernels_of_cpu() -> bool:
    """Whether gradients are clipped and checked by kernels of the CPU (training/optimizer.py), which has no overflow
    flags, and not as MindFormers does."""
    return on_cpu()


def writer() -> Primitive:
    """The operator that writes a value into a parameter: a copy on the CPU, where assigning knows no bfloat16."""
    return auto_generate.InplaceCopy() if on_cpu() else P.Assign()


def dropout_by_step() -> bool:
    """Whether dropout masks follow from the training step (model/dropout.py), and not from the generator of a kernel.

    Not on Ascend: there the kernel is faster, flash attention takes no other mask, and a step may have micro-batches.
    """
    return on_cpu()


def argmax(logits: Tensor, axis: int = -1) -> Tensor:
    """Index of the largest logit along `axis`; unlike mint.argmax, it exists on every device."""
    return ms.ops.argmax(logits, axis)


def fused_on_cpu(config: TelechatConfig) -> bool:
    """Whether the cells of model/cpu_kernels.py compute training and evaluation: where there are native operators, in
    float32, and with the rows of a device in the order of its tokens."""
    if config.use_past or config.parallel_config.context_parallel > 1 or not native_operators():
        return False
    types = (matmul_dtype(config.compute_dtype), config.layernorm_compute_type, config.softmax_compute_type)
    return all(each == mstype.float32 for each in types)


def fused_attention_on_cpu(config: TelechatConfig) -> bool:
    """Whether attention, too, is one of them: it has no dropout, and knows no padding."""
    return fused_on_cpu(config) and not config.mask_pad_tokens and config.attention_dropout_prob == 0


class Softmax(nn.Cell):
    """softmax over the last axis of [B, N, S, T]. For training on the CPU over that of the matrix [B N S, T], whose
    sums, which the gradient needs, are several times faster there."""

    def __init__(self, config: TelechatConfig):
        super().__init__()
        self.flat = on_cpu() and not config.use_past
        self.softmax = P.Softmax(-1)
        self.reshape = P.Reshape()

    def construct(self, x: Tensor) -> Tensor:
        """x: [B, N, S, T] -> as x."""
        if self.flat:
            return self.reshape(self.softmax(self.reshape(x, (-1, x.shape[-1]))), x.shape)
        return self.softmax(x)

    def shard(self, strategy: tuple) -> None:
        """`strategy`: how x is sharded; the last axis never is."""
        if not self.flat:
            self.softmax.shard((strategy,))


class RowMax(nn.Cell):
    """Largest number of each row, [N, V] -> [N, 1]."""

    def __init__(self):
        super().__init__()
        self.by_index = on_cpu()               # the CPU finds a maximum with its index faster than without
        self.max = P.ArgMaxWithValue(axis=-1, keep_dims=True) if self.by_index else P.ReduceMax(keep_dims=True)

    def construct(self, x: Tensor) -> Tensor:
        """x: [N, V] float32 -> [N, 1]."""
        if self.by_index:
            return self.max(x)[1]
        return self.max(x, -1)

    def shard(self, strategy: tuple) -> None:
        """`strategy`: how x is sharded."""
        self.max.shard((strategy,))


class Spread(nn.Cell):
    """A column made ready to be combined with each column of a matrix.

    Repeated on the CPU, whose operators on two shapes take several times as long, and keep sixteen bytes of indices
    per element for as long as the graph lives; elsewhere as it is. Of all ways to repeat, Tile is the fastest.
    """

    def __init__(self):
        super().__init__()
        self.repeat = on_cpu()
        self.tile = P.Tile()

    def construct(self, column: Tensor, matrix: Tensor) -> Tensor:
        """column: [N, 1], matrix: [N, V] -> [N, V] on the CPU, [N, 1] elsewhere."""
        return self.tile(column, (1, matrix.shape[1])) if self.repeat else column


class PerHead(nn.Cell):
    """A rotary table made ready to be combined with queries and keys: repeated for all heads and sequences on the CPU
    (see Spread), once for all layers; elsewhere as it is."""

    def __init__(self, config: TelechatConfig):
        super().__init__()
        self.heads = config.num_heads
        self.repeat = on_cpu() and not fused_attention_on_cpu(config)
        self.tile = P.Tile()

    def construct(self, table: Tensor, batch: int) -> Tensor:
        """table: [1 or B, 1, S, D] -> [B, N, S, D] on the CPU, as `table` elsewhere. batch: B by which to repeat it."""
        return self.tile(table, (batch, self.heads, 1, 1)) if self.repeat else table


def reshape_one_token() -> bool:
    """Whether heads of one token are made by a reshape: no compiler removes such a transposition on the CPU."""
    return on_cpu()


def bias_add(config: TelechatConfig) -> Primitive:
    """The operator that adds a bias [H] to rows [T, H]."""
    if fused_on_cpu(config):
        return cpu_kernels.bias_add()
    return P.BiasAdd() if on_cpu() else P.Add()              # for the CPU see Spread


def _are_few(rows: int) -> bool:
    """Whether rows, as of the newest tokens of some answers, are so few that repeating for them costs more than it
    saves. Known when a graph is compiled; a number of any size is not few."""
    if F.isconstant(rows):
        return rows <= _FEW
    return False


def linear_product(config: TelechatConfig) -> Primitive:
    """The operator (x [T, K], weight [N, K]), of one dtype -> x weight^T [T, N]."""
    return cpu_kernels.linear_product() if fused_on_cpu(config) else P.MatMul(transpose_b=True)


def loss_chunk_rows(config: TelechatConfig) -> Optional[int]:
    """Rows of a chunk of head and loss: as the recipe says, else None, by size (spec/loss_chunks.py).

    0, all at once, for the fused loss of a CPU: it needs logits and their gradient only, and chunks keep that, too.
    """
    if config.loss_chunk_rows is None and fused_on_cpu(config):
        return 0
    return config.loss_chunk_rows


def adamw() -> Primitive:
    """The operator of a CPU that updates a float32 parameter."""
    return cpu_kernels.adamw() if native_operators() else P.AdamWeightDecay()


def rms_norm(config: TelechatConfig) -> nn.Cell:
    """(x [..., H], weight [H]), of one dtype -> RMSNorm of x."""
    return cpu_kernels.FusedRMSNorm(config.rms_norm_eps) if fused_on_cpu(config) else RMSNormKernel(config.rms_norm_eps)


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
            self.tile = P.Tile()               # see Spread
            self.reshape = P.Reshape()
            self.scale = P.Mul()
            self.mul = P.Mul()

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        """x: [..., H] and weight: [H] of one dtype -> [..., H]."""
        if self.fused:
            return self.norm(x, weight)[0]
        inverse = self.rsqrt(self.add(self.mean(self.square(x), -1), self.eps))  # [..., 1]
        if _are_few(x.shape[0]):
            return self.mul(self.scale(x, inverse), weight)
        ones = (1,) * (x.ndim - 1)
        weight = self.tile(self.reshape(weight, (*ones, -1)), (*x.shape[:-1], 1))
        return self.mul(self.scale(x, self.tile(inverse, (*ones, x.shape[-1]))), weight)

    def shard(self, strategy: tuple) -> None:
        """`strategy`: how x [..., H] is sharded; the last axis never is."""
        if self.fused:
            self.norm.shard((strategy, (1,)))
            return
        self.square.shard((strategy,))
        self.mean.shard((strategy,))
        self.add.shard((strategy, ()))
        self.rsqrt.shard((strategy,))
        self.scale.shard((strategy, strategy))
        self.mul.shard((strategy, strategy))


def per_sequence_mask(config: TelechatConfig) -> bool:
    """Whether every sequence has a mask of its own, for padding or packed documents."""
    return config.mask_pad_tokens or config.document_boundaries


def back_to_back(config: TelechatConfig) -> bool:
    """Whether packed documents pass through the kernel back to back."""
    plan = config.parallel_config
    gathering = plan.context_parallel // plan.get_ulysses_cp_num()
    return use_flash_attention(config) and documents_back_to_back(config, gathering)


class CausalFlashAttention(nn.Cell):
    """Causal attention in the fused kernel (Dao et al., 2022), which never stores the scores.

    Its mask is a 2048 x 2048 triangle that the kernel repeats (sparse mode 2), a full one (mode 0), [B, 1, S, S] where
    sequences differ and else [S, S], or none with ring attention, which masks by itself. Packed documents without
    dropout have the triangle, too: their tokens are packed back to back (layout TND), each document ends where `ends`
    says, and its triangle starts again (mode 3).
    """

    def __init__(self, config: TelechatConfig):
        super().__init__()
        self.ring = config.use_ring_attention and config.parallel_config.context_parallel > 1
        self.back_to_back = back_to_back(config)
        self.mask_form = ("triangle" if self.back_to_back else "sequence" if per_sequence_mask(config) else
                          "triangle" if config.use_attn_mask_compression else "full")
        self.has_dropout = config.attention_dropout_prob > 0
        keep = 1.0 - config.attention_dropout_prob
        self.kernel = FlashAttentionScore(
            head_num=config.num_heads, keep_prob=keep, scale_value=config.head_dim ** -0.5, pre_tokens=NO_LIMIT,
            next_tokens=0, inner_precise=0, input_layout="TND" if self.back_to_back else "BNSD",
            sparse_mode=3 if self.back_to_back else 2 if self.mask_form == "triangle" and not self.ring else 0)
        if self.ring:
            self.kernel.add_prim_attr("enable_ring_attention", True)
            self.kernel.add_prim_attr("enable_ra_send_recv", True)
        self.draw_dropout = P.DropoutGenMask()
        self.keep = Tensor(keep, mstype.float16)
        self.to_tokens = P.Transpose()
        self.to_heads = P.Transpose()
        self.reshape = P.Reshape()
        sharding.flash_attention(self, sharding.Mesh(config))

    def construct(self, query: Tensor, key: Tensor, value: Tensor, mask: Union[Tensor, Tuple[Tensor, Tensor]]
                  ) -> Tensor:
        """query: [B, N, S, D]; key, value: [B, N_kv, T, D]; mask: uint8, 1 where a query may not look, or that and ends
        [K] int64 -> as query."""
        if self.back_to_back:
            return self.of_documents(query, key, value, mask[0], mask[1])
        drop = None
        if self.has_dropout:                                           # one bit per score
            batch, heads, seq, _ = query.shape
            keys = key.shape[2]
            drop = self.draw_dropout((batch, heads, seq, keys), self.keep)
            drop = self.reshape(drop, (batch, heads, seq, keys // 8))
        return self.kernel(query, key, value, None, drop, None, mask, None, None, None)[3]

    def of_documents(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, ends: Tensor) -> Tensor:
        """As `construct`, with the tokens back to back, [B S, N, D]."""
        batch, heads, seq, dim = query.shape
        query, key, value = self.flat(query), self.flat(key), self.flat(value)
        result = self.kernel(query, key, value, None, None, None, mask, None, ends, ends)[3]
        return self.to_heads(self.reshape(result, (batch, seq, heads, dim)), (0, 2, 1, 3))

    def flat(self, x: Tensor) -> Tensor:
        """[B, N, S, D] -> [B S, N, D]."""
        _, heads, _, dim = x.shape
        return self.reshape(self.to_tokens(x, (0, 2, 1, 3)), (-1, heads, dim))


class _NarrowBand(nn.Cell):
    """Flash attention by sparse mode 4 with both windows 0, compiled as in a model."""

    def __init__(self) -> None:
        super().__init__(auto_prefix=False)
        self.kernel = FlashAttentionScore(head_num=1, keep_prob=1.0, scale_value=1.0, pre_tokens=0, next_tokens=0,
                                          inner_precise=0, input_layout="BNSD", sparse_mode=4)

    def construct(self, x: Tensor, triangle: Tensor) -> Tuple[Tensor, Tensor]:
        """x: query, key and value [1, 1, S, D] -> largest score and sum of exponentials of each query."""
        found = self.kernel(x, x, x, None, None, None, triangle, None, None, None)
        return found[0], found[1]


def narrow_band_sees_keys() -> bool:
    """Whether flash attention by sparse mode 4 with both windows 0 sees any key; asks the device's kernel, once.

    That is how MindSpore's ring attention says "no key counts" for keys of later cards, and how the kernel's
    documentation says "the diagonal". A query that sees nothing has no exponentials to sum, or a largest score like
    the least number of float32.
    """
    ones = Tensor(np.ones((1, 1, 128, 128), np.float32), mstype.bfloat16)
    triangle = Tensor(np.triu(np.ones((2048, 2048), np.uint8), 1))
    top, total = _NarrowBand()(ones, triangle)
    return bool(np.any((top.asnumpy() > NOTHING) & (total.asnumpy() > 0)))


class FlatFlashAttention(nn.Cell):
    """Causal flash attention over prompts packed back to back, for generation with is_dynamic."""

    def __init__(self, config: TelechatConfig):
        super().__init__()
        self.kernel = FlashAttention(head_num=config.num_heads, pre_tokens=NO_LIMIT, next_tokens=0,
                                     scale_value=config.head_dim ** -0.5, input_layout="TH", use_attention_mask=True)
        self.kernel.shard(config.parallel_config)
        # The kernel repeats this triangle; its values depend on the type (MindFormers' inference attention).
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
