"""Attention and the decoder layer of TeleChat. Sharding is in model/sharding.py."""
from typing import Optional, Tuple

from mindspore import Tensor, nn
from mindspore.ops import operations as P

from research.telechat.model import kernels, sharding
from research.telechat.model.cpu_kernels import FusedAttention
from research.telechat.model.graph_sharing import SharedGraph
from research.telechat.model.kv_cache import ComposedCache, PagedCache
from research.telechat.model.rotary import RotaryEmbedding
from research.telechat.model.rows import HeadsToRows, RowsToHeads
from research.telechat.telechat_config import TelechatConfig
from research.telechat.telechat_layer import RMSNorm, TelechatFeedForward, TelechatLinear


class DotProductAttention(nn.Cell):
    """softmax(q k^T / sqrt(D) + mask) v from plain operators; query head h uses key/value head h // (N / N_kv)."""

    def __init__(self, config: TelechatConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.n_kv_heads, config.head_dim
        self.scale = self.head_dim ** -0.5
        self.softmax_dtype = config.softmax_compute_type
        self.has_dropout = config.attention_dropout_prob > 0
        self.mask_per_sequence = kernels.per_sequence_mask(config)
        self.scale_query = P.Mul()
        self.scores = P.BatchMatMul(transpose_b=True)
        self.add_mask = P.Add()
        self.softmax = kernels.Softmax(config)
        self.dropout = nn.Dropout(p=config.attention_dropout_prob)
        self.context = P.BatchMatMul()
        self.cast = P.Cast()
        self.reshape = P.Reshape()
        self.in_blocks = P.Split(2, kernels.QUERY_BLOCKS)
        self.joined = P.Concat(2)
        sharding.dot_product_attention(self, sharding.Mesh(config))

    def construct(self, query: Tensor, key: Tensor, value: Tensor, mask: kernels.Mask) -> Tensor:
        """query: [B, N, S, D]; key, value: [B, N_kv, T, D]; mask: additive, broadcast to [B, N, S, T], or those of
        equal blocks of queries, each with the keys up to its last query -> as query."""
        if not isinstance(mask, tuple):
            return self.attend(query, key, value, mask)
        keys, values = self.in_blocks(key), self.in_blocks(value)
        contexts: Tuple[Tensor, ...] = ()
        for number, part in enumerate(self.in_blocks(query)):
            if number == len(mask) - 1:
                contexts += (self.attend(part, key, value, mask[number]),)
            else:
                contexts += (self.attend(part, self.joined(keys[:number + 1]), self.joined(values[:number + 1]),
                                         mask[number]),)
        return self.joined(contexts)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """As `construct`, of all queries at once."""
        batch, heads, seq, dim = query.shape
        keys = key.shape[2]
        query = self.scale_query(query, self.cast(self.scale, query.dtype))
        if self.heads != self.kv_heads:                           # queries that share a key/value head side by side
            query = self.reshape(query, (batch, self.kv_heads, -1, dim))
        scores = self.reshape(self.scores(query, key), (batch, heads, seq, keys))
        probs = self.softmax(self.add_mask(self.cast(scores, self.softmax_dtype), mask))
        probs = self.cast(probs, value.dtype)
        if self.has_dropout:
            probs = self.dropout(probs)
        if self.heads != self.kv_heads:
            probs = self.reshape(probs, (batch, self.kv_heads, -1, keys))
        return self.reshape(self.context(probs, value), (batch, heads, seq, dim))


class TelechatAttention(nn.Cell):
    """Grouped-query self-attention with rotary position embedding.

    The rows of wk_v are [k | v] per key/value head, those of w_qkv [q | k | v] per head, so that tensor parallelism of
    any degree that divides the heads splits between heads.
    """

    def __init__(self, config: TelechatConfig):
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
        self.attend = kernels.CausalFlashAttention(config) if self.use_flash else DotProductAttention(config)
        self.to_heads = RowsToHeads(config)
        self.to_rows = HeadsToRows(config)
        self.reshape = P.Reshape()
        self.in_one = kernels.fused_attention_on_cpu(config)
        if self.in_one:
            self.attend_rows = FusedAttention(one=self.fused)
        self.use_past = config.use_past
        if self.use_past:
            self.is_first_iteration = True
            self.paged = kernels.use_paged_attention()
            self.cache = PagedCache(config) if self.paged else ComposedCache(config)
            self.flat_prefill = config.is_dynamic
            if self.paged and self.flat_prefill:
                self.attend_flat = kernels.FlatFlashAttention(config)
        sharding.attention(self, sharding.Mesh(config))

    def construct(self, x: Tensor, shape: Tuple[int, int], rope: Tuple[Tensor, Tensor], mask: kernels.Mask,
                  cached: Optional[Tuple] = None) -> Tensor:
        """x: rows [B S, H] -> [B S, H].

        shape: (B, S); rope: cos and sin (model/rotary.py); mask: as the kernel takes it; cached: what
        `model.kv_cache.GenerationStep` says of the cache, where there is one.
        """
        if self.in_one and isinstance(mask, Tensor) and mask.ndim == 2:                        # documents
            projections = (self.w_qkv(x),) if self.fused else (self.wq(x), self.wk_v(x))
            return self.wo(self.attend_rows(projections, rope, mask))
        query, key, value = self.project(x, shape)
        cos, sin = rope
        query, key = self.rotary(query, cos, sin), self.rotary(key, cos, sin)
        if cached is not None and self.paged:
            context = self.attend_paged(query, key, value, mask, cached)
            return self.wo(self.reshape(context, (-1, self.hidden_size)))
        if cached is not None:
            key, value = self.through_cache(key, value, cached)
        return self.wo(self.to_rows(self.attend(query, key, value, mask)))

    def through_cache(self, key: Tensor, value: Tensor, cached: Tuple) -> Tuple[Tensor, Tensor]:
        """Cache key and value [B, N_kv, S, D] -> the keys and values to look at, [B, N_kv, L, D]: those of this step
        when prompts are read, all cached ones afterwards."""
        caches = self.cache(key, value, cached[0])
        if self.is_first_iteration:
            return key, value
        return self.cache.read(caches, cached[1])

    def attend_paged(self, query: Tensor, key: Tensor, value: Tensor, mask: kernels.Mask, cached: Tuple) -> Tensor:
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
        return self.reshape(self.to_rows(x), (batch, seq, heads * dim))

    def project(self, x: Tensor, shape: Tuple[int, int]) -> Tuple[Tensor, Tensor, Tensor]:
        """x: [B S, H] -> queries [B, N, S, D], keys and values [B, N_kv, S, D]."""
        batch, seq = shape
        if self.fused:
            return self.split(self.to_heads(self.w_qkv(x), batch, seq, self.heads))            # [B, N, S, 3 D]
        key, value = self.split(self.to_heads(self.wk_v(x), batch, seq, self.kv_heads))        # [B, N_kv, S, 2 D]
        return self.to_heads(self.wq(x), batch, seq, self.heads), key, value


class TelechatDecodeLayer(SharedGraph, nn.Cell):
    """h = x + attention(norm(x)); h + feed_forward(norm(h)), the sums in the dtype of the residual stream."""

    def __init__(self, config: TelechatConfig, layer_id: int):
        super().__init__()
        self.layer_id = layer_id
        self.shares_graph = config.share_layer_graphs
        self.attention_norm = RMSNorm(config)
        self.attention = TelechatAttention(config)
        self.ffn_norm = RMSNorm(config)
        self.feed_forward = TelechatFeedForward(config)
        self.has_dropout = config.hidden_dropout_prob > 0
        self.dropout = nn.Dropout(p=config.hidden_dropout_prob)
        self.add = P.Add()
        self.cast = P.Cast()
        self.res_dtype = self.out_dtype = config.res_dtype
        sharding.decode_layer(self, sharding.Mesh(config))

    def construct(self, x: Tensor, shape: Tuple[int, int], rope: Tuple[Tensor, Tensor], mask: kernels.Mask,
                  cached: Optional[Tuple] = None) -> Tensor:
        """x: rows [B S, H] of the residual stream, shape: (B, S); the others as in TelechatAttention -> as x."""
        x = self.cast(x, self.res_dtype)
        h = self.add_residual(x, self.attention(self.attention_norm(x), shape, rope, mask, cached))
        return self.cast(self.add_residual(h, self.feed_forward(self.ffn_norm(h))), self.out_dtype)

    def add_residual(self, x: Tensor, y: Tensor) -> Tensor:
        """x + dropout(y), both [T, H]."""
        if self.has_dropout:
            y = self.dropout(y)
        return self.add(x, self.cast(y, self.res_dtype))
