"""Attention and the decoder layer of TeleChat. Cells take `(config, ...)` and carry their own sharding."""
from typing import Any, Optional, Tuple

from mindspore import Tensor, nn
from mindspore.ops import operations as P

from research.telechat import telechat_kernels as kernels
from research.telechat.telechat_kv_cache import ComposedCache, PagedCache, rotates_on_read
from research.telechat.telechat_layer import RMSNorm, RotaryEmbedding, TelechatFeedForward, TelechatLinear


class DotProductAttention(nn.Cell):
    """softmax(q k^T / sqrt(D) + mask) v from plain operators; query head h uses key/value head h // (N / N_kv)."""

    def __init__(self, config: Any):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.n_kv_heads, config.head_dim
        self.scale = self.head_dim ** -0.5
        self.softmax_dtype = config.softmax_compute_type
        self.has_dropout = config.attention_dropout_prob > 0
        self.scale_query = P.Mul()
        self.scores = P.BatchMatMul(transpose_b=True)
        self.add_mask = P.Add()
        self.softmax = P.Softmax(-1)
        self.dropout = nn.Dropout(p=config.attention_dropout_prob)
        self.context = P.BatchMatMul()
        self.cast = P.Cast()
        self.reshape = P.Reshape()
        self.shard(config)

    def construct(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """query: [B, N, S, D]; key, value: [B, N_kv, T, D]; mask: additive, broadcast to [B, N, S, T] -> as query."""
        batch, heads, seq, dim = query.shape
        keys = key.shape[2]
        query = self.scale_query(query, self.cast(self.scale, query.dtype))
        if self.heads != self.kv_heads:                                # queries that share a key/value head side by side
            query = self.reshape(query, (batch, self.kv_heads, -1, dim))
        scores = self.reshape(self.scores(query, key), (batch, heads, seq, keys))
        probs = self.softmax(self.add_mask(self.cast(scores, self.softmax_dtype), mask))
        probs = self.cast(probs, value.dtype)
        if self.has_dropout:
            probs = self.dropout(probs)
        if self.heads != self.kv_heads:
            probs = self.reshape(probs, (batch, self.kv_heads, -1, keys))
        return self.reshape(self.context(probs, value), (batch, heads, seq, dim))

    def shard(self, config: Any) -> None:
        """Heads over model parallelism."""
        plan = config.parallel_config
        x = (plan.data_parallel, plan.model_parallel, 1, 1)
        self.scale_query.shard((x, ()))
        self.scores.shard((x, x))
        self.add_mask.shard((x, (plan.data_parallel if config.mask_pad_tokens or config.document_boundaries else 1,
                                 1, 1, 1)))
        self.softmax.shard((x,))
        self.dropout.dropout.shard((x,))
        self.context.shard((x, x))


class TelechatAttention(nn.Cell):
    """Grouped-query self-attention with rotary position embedding.

    The rows of wk_v are [k | v] per key/value head, those of w_qkv [q | k | v] per head, so that tensor parallelism of
    any degree that divides the heads cuts between heads.
    """

    def __init__(self, config: Any):
        super().__init__()
        self.hidden_size, self.head_dim = config.hidden_size, config.head_dim
        self.heads, self.kv_heads = config.num_heads, config.n_kv_heads
        self.fused = config.fused_projections
        hidden, bias = config.hidden_size, config.qkv_has_bias
        if self.fused:
            self.w_qkv = TelechatLinear(config, hidden, 3 * hidden, bias)
            self.split = P.Split(axis=-1, output_num=3)
        else:
            self.wq = TelechatLinear(config, hidden, hidden, bias)
            self.wk_v = TelechatLinear(config, hidden, 2 * self.kv_heads * self.head_dim, bias)
            self.split = P.Split(axis=-1, output_num=2)
        self.wo = TelechatLinear(config, hidden, hidden, has_bias=config.out_proj_has_bias)
        self.rotary = RotaryEmbedding(config)
        self.use_flash = kernels.use_flash_attention(config)
        self.attend = kernels.flash_attention(config) if self.use_flash else DotProductAttention(config)
        self.to_heads = P.Transpose()
        self.kv_to_heads = P.Transpose()
        self.merge_heads = P.Transpose()
        self.reshape = P.Reshape()
        self.use_past = config.use_past
        if self.use_past:
            self.is_first_iteration = True
            self.rotate_on_read = rotates_on_read(config)
            self.paged = kernels.use_paged_attention(config)
            self.cache = PagedCache(config) if self.paged else ComposedCache(config)
            self.flat_prefill = config.is_dynamic
            if self.paged and self.flat_prefill:
                self.attend_flat = kernels.FlatFlashAttention(config)
        self.shard(config)

    def construct(self, x: Tensor, rope: Tuple[Tensor, Tensor], mask: Optional[Tensor],
                  cached: Optional[Tuple] = None) -> Tensor:
        """x: [B, S, H]; rope: cos and sin (telechat_layer.RotaryEmbedding); mask as the kernel takes it -> [B, S, H].

        cached: what `telechat_kv_cache.GenerationStep` says of the cache, where there is one.
        """
        batch, seq, _ = x.shape
        query, key, value = self.project(x)
        cos, sin = rope
        query = self.rotary(self.to_heads(query, (0, 2, 1, 3)), cos, sin)          # [B, N, S, D]
        plain_key = self.kv_to_heads(key, (0, 2, 1, 3))
        key = self.rotary(plain_key, cos, sin)                                     # [B, N_kv, S, D]
        value = self.kv_to_heads(value, (0, 2, 1, 3))
        if self.use_past and self.paged:
            return self.wo(self.attend_paged(query, key, value, mask, cached))
        if self.use_past:
            key, value = self.through_cache(plain_key if self.rotate_on_read else key, key, value, cached)
        context = self.merge_heads(self.attend(query, key, value, mask), (0, 2, 1, 3))
        return self.wo(self.reshape(context, (batch, seq, self.hidden_size)))

    def through_cache(self, kept: Tensor, key: Tensor, value: Tensor, cached: Tuple) -> Tuple[Tensor, Tensor]:
        """Cache `kept` (the key, or the unrotated key) and `value`: [B, N_kv, S, D] each -> the keys and values to look
        at, [B, N_kv, L, D]: those of this step when prompts are read, all cached ones afterwards."""
        caches = self.cache(kept, value, cached[0])
        if self.is_first_iteration:
            return key, value
        key, value = self.cache.read(caches, cached[1])
        if self.rotate_on_read:
            key = self.rotary(key, *cached[2])
        return key, value

    def attend_paged(self, query: Tensor, key: Tensor, value: Tensor, mask: Optional[Tensor], cached: Tuple) -> Tensor:
        """As `construct`, after rotation, with the fused kernels of the cache -> [B, S, H]."""
        slot_mapping, lengths, block_tables = cached
        flat_key, flat_value = self.flatten(key), self.flatten(value)
        written = self.cache(flat_key, flat_value, slot_mapping)
        query = P.Depend()(query, written)
        if not self.is_first_iteration:
            return self.cache.attend(self.flatten(query), lengths, block_tables)
        if self.flat_prefill:
            return self.attend_flat(self.flatten(query), flat_key, flat_value, lengths)
        return self.flatten(self.attend(query, key, value, mask))

    def flatten(self, x: Tensor) -> Tensor:
        """[B, N, S, D] -> [B, S, N * D]."""
        batch, heads, seq, dim = x.shape
        return self.reshape(self.merge_heads(x, (0, 2, 1, 3)), (batch, seq, heads * dim))

    def project(self, x: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        """x: [B, S, H] -> queries [B, S, N, D], keys and values [B, S, N_kv, D]."""
        batch, seq, _ = x.shape
        if self.fused:
            return self.split(self.reshape(self.w_qkv(x), (batch, seq, self.heads, 3 * self.head_dim)))
        query = self.reshape(self.wq(x), (batch, seq, self.heads, self.head_dim))
        key, value = self.split(self.reshape(self.wk_v(x), (batch, seq, self.kv_heads, 2 * self.head_dim)))
        return query, key, value

    def shard(self, config: Any) -> None:
        """Heads over model parallelism; the output is reduced, or reduce-scattered over the sequence."""
        plan = config.parallel_config
        dp, cp, mp = plan.data_parallel, plan.context_parallel, plan.model_parallel
        rows = dp * cp
        for linear in (self.w_qkv,) if self.fused else (self.wq, self.wk_v):
            linear.shard(((rows, 1), (mp, 1)), strategy_bias=((rows, mp), (mp,)))
        self.split.shard(((dp, cp, mp, 1),))
        self.to_heads.shard(((dp, cp, mp, 1),))
        self.kv_to_heads.shard(((dp, cp, mp, 1),))
        self.merge_heads.shard(((dp, mp, cp, 1),))
        out = ((rows * mp, 1),) if plan.use_seq_parallel else None
        self.wo.shard(((rows, mp), (1, mp)), strategy_bias=((rows * mp, 1) if out else (rows, 1), (1,)),
                      out_strategy_matmul=out)


class TelechatDecodeLayer(nn.Cell):
    """h = x + attention(norm(x)); h + feed_forward(norm(h)), the sums in the dtype of the residual stream."""

    def __init__(self, config: Any, layer_id: int):
        super().__init__()
        self.layer_id = layer_id
        self.attention_norm = RMSNorm(config)
        self.attention = TelechatAttention(config)
        self.ffn_norm = RMSNorm(config)
        self.feed_forward = TelechatFeedForward(config)
        self.has_dropout = config.hidden_dropout_prob > 0
        self.dropout = nn.Dropout(p=config.hidden_dropout_prob)
        self.add = P.Add()
        self.cast = P.Cast()
        self.res_dtype = config.res_dtype
        self.shard(config)

    def construct(self, x: Tensor, rope: Tuple[Tensor, Tensor], mask: Optional[Tensor],
                  cached: Optional[Tuple] = None) -> Tensor:
        """x: [B, S, H] in res_dtype -> the same."""
        h = self.add_residual(x, self.attention(self.attention_norm(x), rope, mask, cached))
        return self.add_residual(h, self.feed_forward(self.ffn_norm(h)))

    def add_residual(self, x: Tensor, y: Tensor) -> Tensor:
        """x + dropout(y), both [B, S, H]."""
        if self.has_dropout:
            y = self.dropout(y)
        return self.add(x, self.cast(y, self.res_dtype))

    def shard(self, config: Any) -> None:
        """The residual stream is cut over data and context parallelism, with sequence parallelism over mp as well."""
        plan = config.parallel_config
        seq = plan.context_parallel * (plan.model_parallel if plan.use_seq_parallel else 1)
        x = (plan.data_parallel, seq, 1)
        self.attention_norm.shard(x)
        self.ffn_norm.shard(x)
        self.add.shard((x, x))
        self.dropout.dropout.shard((x,))
