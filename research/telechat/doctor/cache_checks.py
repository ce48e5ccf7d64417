"""The paged cache of keys and values: writing into blocks, and attention over them."""
from functools import partial
from typing import List, Sequence, Tuple

import numpy as np

from research.telechat.doctor.attention_checks import rounded
from research.telechat.doctor.checks import LIMITS, Check, Outcome, gap, within
from research.telechat.doctor.device import Array, Cache, Device
from research.telechat.interpret import cache
from research.telechat.interpret.ir import Node

_BLOCKS, _SIZE, _KV_HEADS, _HEADS = 12, 16, 2, 4
_NODE = Node("PagedAttention", [], "", {}, None, "", "", "")


def _filled(dtype: str, dim: int) -> Tuple[Cache, Array, Array]:
    """A cache, the blocks of three sequences in it [3, 4], and their lengths."""
    rng = np.random.default_rng(4)
    keys, values = (rounded(rng.normal(size=(_BLOCKS, _SIZE, _KV_HEADS, dim)), dtype) for _ in range(2))
    tables = rng.permutation(_BLOCKS).reshape(3, 4).astype(np.int32)
    return Cache(keys, values), tables, np.array([64, 17, 1], np.int32)


def _storing(device: Device, dtype: str, dim: int) -> Outcome:
    """Eleven tokens, two of which go nowhere; the rest of the cache must not change."""
    before, tables, _ = _filled(dtype, dim)
    rng = np.random.default_rng(5)
    key, value = (rounded(rng.normal(size=(11, _KV_HEADS, dim)), dtype) for _ in range(2))
    places = np.arange(11, 22)                                         # across the border of two blocks
    slots = (tables[1, places // _SIZE] * _SIZE + places % _SIZE).astype(np.int32)
    slots[[3, 10]] = -1
    found = device.store(dtype, before, key, value, slots)
    worst = max(gap(now, cache.store(x, old, slots)) for now, x, old in zip(found, (key, value), before))
    return Outcome("the cache with nine more tokens, exactly", "equal" if worst == 0 else f"differs by {worst:.1e}",
                   worst == 0)


def _attending(device: Device, dtype: str, dim: int) -> Outcome:
    held, tables, lengths = _filled(dtype, dim)
    query = rounded(np.random.default_rng(6).normal(size=(3, _HEADS, dim)), dtype)
    expected = cache.paged_attention(_NODE, query.reshape(3, 1, -1).astype(np.float64), held.keys, held.values, tables,
                                     lengths, None, None, None, None, None, _HEADS, dim ** -0.5, _KV_HEADS)
    found = device.paged_attention(dtype, query, held, tables, lengths)
    return within([(found, expected.reshape(query.shape))], LIMITS[dtype])


def checks(dtypes: Sequence[str], dim: int) -> List[Check]:
    """All cache checks."""
    result: List[Check] = []
    for dtype in dtypes:
        avoid = f"model_config.use_past: True with compute_dtype: {dtype}"
        result += [Check(f"cache, writing ({dtype})", partial(_storing, dtype=dtype, dim=dim), avoid),
                   Check(f"cache, paged attention ({dtype})", partial(_attending, dtype=dtype, dim=dim), avoid,
                         fused=True)]
    return result
