"""Generation with a cache of keys and values: what all layers share in one step, and the cache of one layer.

The cache is paged, as MindFormers' generator manages it: `num_blocks` blocks of `block_size` slots; `block_tables`
[B, K] says which blocks hold a sequence (-1: none yet), `slot_mapping` into which slot each token of this step goes
(-1: nowhere). Prompts come padded on the right [B, S] or, with `flat_prefill`, back to back [1, T]; afterwards every
step brings one token per sequence [B, 1]. With the composed cache, a prompt may also come piece by piece, each of which
looks at what is cached before it. The attention itself is in telechat_transformer, the loop in generation/scheduler.py.

Keys are cached rotated. Where the official rotary rule changes with the length of the sequence (spec/rope.py), a cache
is valid for the lengths that share one scaling; generation/passes.py refills it when that changes.
"""
from typing import Tuple

import mindspore.common.dtype as mstype
import numpy as np
from mindspore import Parameter, Tensor, nn
from mindspore.common.initializer import initializer
from mindspore.ops import operations as P
from mindspore.ops.auto_generate import PagedAttention, ReshapeAndCache

from research.telechat.model import kernels
from research.telechat.model.mask import forbidden_score
from research.telechat.model.rotary import RotaryTablesByLength
from research.telechat.telechat_config import TelechatConfig


class GenerationStep(nn.Cell):
    """What all layers share in one step: rotary tables, mask, and where the cache is written and read."""

    def __init__(self, config: TelechatConfig, tables: RotaryTablesByLength):
        super().__init__()
        self.is_first_iteration = True
        self.flat_prefill = config.is_dynamic
        self.paged = kernels.use_paged_attention()
        self.tables = tables
        self.block_size = config.block_size
        self.slots = (config.num_blocks + 1) * config.block_size                   # the last block takes slot -1
        self.spare = config.num_blocks * config.block_size
        self.kv_heads, self.query_heads = config.n_kv_heads, config.num_heads
        self.offsets = Tensor(np.arange(config.block_size, dtype=np.int32).reshape(1, 1, -1))
        self.heads = Tensor((np.arange(self.kv_heads, dtype=np.int32) * self.slots).reshape(1, -1, 1))
        self.dtype = config.softmax_compute_type
        self.forbidden = forbidden_score(self.dtype)
        self.reshape = P.Reshape()
        self.cast = P.Cast()
        self.add = P.Add()
        self.sub = P.Sub()
        self.mul = P.Mul()
        self.less = P.Less()
        self.greater = P.Greater()
        self.either = P.LogicalOr()
        self.maximum = P.Maximum()
        self.minimum = P.Minimum()
        self.count = P.ReduceSum()
        self.cumsum = P.CumSum()
        self.ones_like = P.OnesLike()
        self.tile = P.Tile()
        self.expand = P.ExpandDims()
        self.gather = P.Gather()
        self.query_blocks = kernels.QUERY_BLOCKS
        self.in_blocks = False                     # set while the graph of long prompts is compiled
        self.split_rows = P.Split(2, self.query_blocks)
        self.split_columns = P.Split(3, self.query_blocks)
        self.join_columns = P.Concat(3)

    def construct(self, tokens: Tensor, lengths: Tensor, block_tables: Tensor, slot_mapping: Tensor
                  ) -> Tuple[Tuple[Tensor, Tensor], kernels.Mask, Tuple]:
        """Inputs as in the head of this file; lengths: [B], tokens of each sequence including those of this step.

        -> rotary tables of this step's tokens; additive mask [B, 1 or N, S, T], None where the causal mask of training
        serves; what `ComposedCache` or `PagedCache` needs.
        """
        batch, seq = tokens.shape
        mask = None
        if not self.is_first_iteration:
            totals = self.reshape(lengths, (-1, 1))
            positions = self.sub(totals, 1)                                        # [B, 1]
        elif self.flat_prefill:
            tokens = self.reshape(tokens, (1, -1))
            positions, totals, mask = self.flat(tokens, lengths)                   # [1, T] each
        else:
            totals = self.reshape(lengths, (-1, 1))
            positions = self.sub(self.cumsum(self.ones_like(tokens), 1), 1)        # [B, S]
        rope = self.tables(positions, totals)
        if self.paged:
            return rope, mask, (slot_mapping, lengths, block_tables)
        slots = self.reshape(slot_mapping, (batch, 1, seq))
        nowhere = self.cast(self.less(slots, 0), mstype.int32)
        write = self.add(self.add(slots, self.mul(nowhere, self.spare + 1)), self.heads)   # [B, N_kv, S]
        if self.is_first_iteration:
            return rope, mask, (write,)
        return rope, *self.read(totals, block_tables, write)

    def flat(self, tokens: Tensor, lengths: Tensor) -> Tuple[Tensor, Tensor, kernels.Mask]:
        """tokens: [1, T], prompts back to back -> positions in their prompt, its length, [1, T] each, and the mask."""
        index = self.sub(self.cumsum(self.ones_like(tokens), 1), 1)                # [1, T]
        ends = self.cumsum(lengths, 0)
        past = self.cast(self.greater(self.reshape(ends, (1, -1)), self.reshape(index, (-1, 1))), mstype.float32)
        remaining = self.count(past, -1)                                           # [T], prompts that end behind it
        prompts = self.count(self.cast(self.ones_like(lengths), mstype.float32), -1)
        prompt = self.minimum(self.sub(prompts, remaining), self.sub(prompts, 1))  # padding counts to the last one
        prompt = self.reshape(self.cast(prompt, mstype.int32), (1, -1))
        starts = self.gather(self.sub(ends, lengths), prompt, 0)                   # [1, T]
        totals = self.gather(lengths, prompt, 0)
        positions = self.sub(index, starts)
        if self.paged:
            return positions, totals, None
        row, column = self.reshape(index, (1, 1, -1, 1)), self.reshape(index, (1, 1, 1, -1))
        hidden = self.either(self.greater(column, row), self.less(column, self.reshape(starts, (1, 1, -1, 1))))
        if self.in_blocks:
            return positions, totals, self.blocks(hidden)
        # Once for all heads and layers: adding a mask that is broadcast takes the CPU several times as long.
        return positions, totals, self.tile(self.where(hidden), (1, self.query_heads, 1, 1))       # [1, N, T, T]

    def blocks(self, hidden: Tensor) -> Tuple[Tensor, ...]:
        """hidden: [1, 1, T, T], who does not see whom -> the masks of equal blocks of queries, each with the keys up to
        its last query: [1, N, T / 4, T / 4], [1, N, T / 4, T / 2] and so on. What comes later is never computed."""
        masks: Tuple[Tensor, ...] = ()
        for number, rows in enumerate(self.split_rows(hidden)):
            if number < self.query_blocks - 1:
                rows = self.join_columns(self.split_columns(rows)[:number + 1])
            masks += (self.tile(self.where(rows), (1, self.query_heads, 1, 1)),)
        return masks

    def piece(self, tokens: Tensor, first: Tensor, total: Tensor, block_table: Tensor, slot_mapping: Tensor
              ) -> Tuple[Tuple[Tensor, Tensor], Tensor, Tuple]:
        """As `construct` with the composed cache, for a piece of one prompt: tokens [1, S], whose first one is at
        position `first` [1] of a prompt of `total` [1] tokens. The mask is [1, N, S, L]."""
        positions = self.sub(self.add(self.cumsum(self.ones_like(tokens), 1), first), 1)           # [1, S]
        rope = self.tables(positions, self.reshape(total, (1, 1)))
        write = self.add(self.reshape(slot_mapping, (1, 1, -1)), self.heads)                       # [1, N_kv, S]
        rows, columns = self.cached_rows(block_table)
        unread = self.less(self.reshape(positions, (1, -1, 1)), columns)                           # [1, S, L]
        mask = self.tile(self.where(self.expand(unread, 1)), (1, self.query_heads, 1, 1))
        return rope, mask, (write, rows)

    def read(self, totals: Tensor, block_tables: Tensor, write: Tensor) -> Tuple[Tensor, Tuple]:
        """The mask [B, N, 1, L] and the rows of the cache that hold the last L = K * block_size slots, [B, N_kv, L]."""
        batch = block_tables.shape[0]
        rows, positions = self.cached_rows(block_tables)
        unread = self.less(self.sub(self.reshape(totals, (batch, 1, 1)), 1), positions)
        mask = self.where(self.reshape(unread, (batch, 1, 1, -1)))
        return self.tile(mask, (1, self.query_heads, 1, 1)), (write, rows)

    def cached_rows(self, block_tables: Tensor) -> Tuple[Tensor, Tensor]:
        """Rows of the cache that hold the slots of `block_tables` [B, K], [B, N_kv, L], and their positions in the
        sequence, [B, 1, L]."""
        batch, blocks = block_tables.shape
        slots = self.add(self.mul(self.reshape(self.maximum(block_tables, 0), (batch, blocks, 1)), self.block_size),
                         self.offsets)                                             # [B, K, block_size]
        slots = self.reshape(slots, (batch, 1, -1))                                # [B, 1, L]
        positions = self.sub(self.cumsum(self.ones_like(slots), 2), 1)             # [B, 1, L]
        return self.add(slots, self.heads), positions

    def where(self, hidden: Tensor) -> Tensor:
        """`hidden`, a bool tensor, as addend of scores."""
        return self.mul(self.cast(hidden, self.dtype), self.cast(self.forbidden, self.dtype))


def _cache_parameter(shape: Tuple[int, ...], dtype: mstype.Type, name: str) -> Parameter:
    """A part of the cache. It is a parameter only because graphs can write to nothing else: no checkpoint has it."""
    parameter = Parameter(initializer("zeros", shape, dtype), name=name, requires_grad=False, parallel_optimizer=False)
    parameter.param_info.is_pipeline_shared_param = True     # MindSpore saves no parameter with this mark
    return parameter


class ComposedCache(nn.Cell):
    """Keys and values of one layer, written and read by plain operators. Rows of [N_kv * slots, D]: head by head."""

    def __init__(self, config: TelechatConfig):
        super().__init__()
        rows = config.n_kv_heads * (config.num_blocks + 1) * config.block_size
        dtype = kernels.matmul_dtype(config.compute_dtype)
        self.key_cache = _cache_parameter((rows, config.head_dim), dtype, "key_cache")
        self.value_cache = _cache_parameter((rows, config.head_dim), dtype, "value_cache")
        self.write_key = P.ScatterUpdate()
        self.write_value = P.ScatterUpdate()
        self.gather = P.Gather()
        self.cast = P.Cast()

    def construct(self, key: Tensor, value: Tensor, rows: Tensor) -> Tuple[Tensor, Tensor]:
        """key, value: [B, N_kv, S, D] go to `rows` [B, N_kv, S] -> the whole cache of keys and of values."""
        keys = self.write_key(self.key_cache, rows, self.cast(key, self.key_cache.dtype))
        values = self.write_value(self.value_cache, rows, self.cast(value, self.value_cache.dtype))
        return keys, values

    def read(self, caches: Tuple[Tensor, Tensor], rows: Tensor) -> Tuple[Tensor, Tensor]:
        """The contents of `rows` [B, N_kv, L] of `caches`, the result of writing: [B, N_kv, L, D] each."""
        return self.gather(caches[0], rows, 0), self.gather(caches[1], rows, 0)


class PagedCache(nn.Cell):
    """Keys and values of one layer in the fused kernels' layout, [num_blocks, block_size, N_kv, D], 16 bit."""

    def __init__(self, config: TelechatConfig):
        super().__init__()
        shape = (config.num_blocks, config.block_size, config.n_kv_heads, config.head_dim)
        self.key_cache = _cache_parameter(shape, config.compute_dtype, "key_cache")
        self.value_cache = _cache_parameter(shape, config.compute_dtype, "value_cache")
        mp = config.parallel_config.model_parallel
        self.write = ReshapeAndCache()
        # The kernel counts the heads of one rank.
        self.paged = PagedAttention(config.num_heads // mp, config.head_dim ** -0.5, config.n_kv_heads // mp)
        self.shard(config)

    def construct(self, key: Tensor, value: Tensor, slot_mapping: Tensor) -> Tensor:
        """key, value: [B, S, N_kv * D] go to the slots [B * S]; the result is only a token of having written."""
        return self.write(key, value, self.key_cache, self.value_cache, slot_mapping)

    def attend(self, query: Tensor, lengths: Tensor, block_tables: Tensor) -> Tensor:
        """query: [B, 1, N * D] to all `lengths` [B] cached tokens of its sequence -> as query."""
        return self.paged(query, self.key_cache, self.value_cache, block_tables, lengths)

    def shard(self, config: TelechatConfig) -> None:
        """Heads over model parallelism."""
        plan = config.parallel_config
        x, cache = (plan.data_parallel, 1, plan.model_parallel), (1, 1, plan.model_parallel, 1)
        self.write.shard((x, x, cache, cache, (1,)))
        self.paged.shard((x, cache, cache, (plan.data_parallel, 1), (plan.data_parallel,)))
