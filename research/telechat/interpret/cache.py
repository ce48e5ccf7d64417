"""The paged KV cache: ReshapeAndCache and PagedAttention, from the documentation of mindspore.ops.auto_generate.

Keys and values are stored in blocks [blocks, tokens per block, key/value heads, D]. A block table lists the blocks of
each sequence; a slot is the position of one token, block * tokens per block + offset in the block.
"""
from typing import Any, Callable, Dict

import numpy as np

from research.telechat.common.errors import ExecutionError
from research.telechat.interpret.ir import Node


def store(x: np.ndarray, cache: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """x: [..., N_kv D], one token per element of `slots` -> the updated cache; tokens of slot -1 are dropped."""
    result = cache.copy()
    rows = result.reshape(-1, *cache.shape[2:])
    tokens = x.reshape(-1, *cache.shape[2:])
    places = np.ravel(slots)
    if len(tokens) != len(places):
        raise ExecutionError(f"ReshapeAndCache: {len(tokens)} tokens for {len(places)} slots")
    if places.size and (places.max() >= len(rows) or places.min() < -1):
        raise ExecutionError(f"ReshapeAndCache: slots {places.min()} to {places.max()} in a cache of {len(rows)} "
                             "tokens")
    rows[places[places >= 0]] = tokens[places >= 0]
    return result


def paged_attention(node: Node, query: np.ndarray, keys: np.ndarray, values: np.ndarray, tables: np.ndarray,
                    lengths: np.ndarray, *rest: Any) -> np.ndarray:
    """One query per sequence over its first `lengths` tokens. query: [..., N D]; the result has its shape."""
    if any(value is not None for value in rest[:5]):
        raise ExecutionError(f"{node}: the interpreter does not support quantised caches, masks or query lengths")
    heads, scale, kv_heads = rest[5:8]
    counts = np.ravel(lengths)
    q = query.reshape(len(counts), heads, -1)
    result = np.zeros_like(q)
    for number, count in enumerate(map(int, counts)):
        blocks = tables[number, :-(-count // keys.shape[1])]
        if blocks.size and (blocks.min() < 0 or blocks.max() >= len(keys)):
            raise ExecutionError(f"{node}: sequence {number} of {count} tokens has blocks {blocks.tolist()} of "
                                 f"{len(keys)}")
        k, v = (np.repeat(cache[blocks].reshape(-1, kv_heads, q.shape[-1])[:count], heads // kv_heads, 1)
                for cache in (keys, values))
        scores = np.einsum("hd,thd->ht", q[number], k) * scale
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        result[number] = np.einsum("ht,thd->hd", weights / weights.sum(-1, keepdims=True), v)
    return result.reshape(query.shape)


OPERATORS: Dict[str, Callable[..., np.ndarray]] = {"PagedAttention": paged_attention}
