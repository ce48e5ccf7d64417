"""FlashAttentionScore and its gradient, written from the documentation of aclnnFlashAttentionScore (CANN).

    result = dropout(softmax(scale q k^T, over the keys that count)) v

Masks are 1 where a query must not attend. Sparse modes: 0 the mask and, in addition, a window from `pre_tokens` keys
before the query to `next_tokens` after it; 1 the mask only; 2 and 3 causal, aligned to the upper left and the lower
right corner; 4 a band, aligned to the lower right corner. Modes 2 to 4 need the compressed 2048 x 2048 triangle.
Layouts: BNSD, BSH, SBH, BSND, and TND and TH for sequences packed back to back, TND with their ends.
"""
from functools import lru_cache, partial
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np

from research.telechat.common.errors import ExecutionError
from research.telechat.interpret.ir import Node

LAYOUTS = ("BSH", "BNSD", "SBH", "BSND", "TND", "TH")        # indices are MindSpore's numbers (str_to_enum)
COMPRESSED = 2048
_LOWEST = float(np.finfo(np.float32).min)                    # the maximum for a query without visible keys
_COPIES = 8                                                  # the kernel returns maximum and sum eight times
Array = np.ndarray
Given = Optional[Array]              # an input that may be left out


@lru_cache(maxsize=1)
def _triangle() -> Array:
    return np.triu(np.ones((COMPRESSED, COMPRESSED), np.uint8), 1)


def _is_triangle(mask: Optional[Array]) -> bool:
    if mask is None or mask.shape[-2:] != (COMPRESSED, COMPRESSED) or mask.size != COMPRESSED ** 2:
        return False
    return bool(np.array_equal(mask.reshape(COMPRESSED, COMPRESSED), _triangle()))


def forbidden(queries: int, keys: int, mask: Optional[Array], before: int, behind: int, mode: int,
              empty_band: bool = False) -> Array:
    """Which of `keys` each of `queries` must not see: bool, broadcastable to [B, N, queries, keys].

    before, behind: pre_tokens and next_tokens. empty_band: treat a mode 4 band with both 0 as one without visible keys
    instead of the documented diagonal.
    """
    query, key = np.arange(queries)[:, None], np.arange(keys)[None]
    shift = keys - queries                                     # aligns to the lower right corner
    if mode == 0:
        window = (key > query + behind) | (key < query - before)
        return np.zeros((queries, keys), bool) if mask is None else (mask != 0) | window
    if mode == 1:
        if mask is None:
            raise ExecutionError("FlashAttentionScore: sparse mode 1 has no mask; pass one, or use mode 0")
        return mask != 0
    if mode not in (2, 3, 4):
        raise ExecutionError(f"FlashAttentionScore: unknown sparse mode {mode}; expected 0 to 4")
    if not _is_triangle(mask):
        raise ExecutionError(f"FlashAttentionScore: sparse mode {mode} needs the compressed triangle of {COMPRESSED} x "
                             f"{COMPRESSED}, ones above the diagonal; found "
                             f"{'no mask' if mask is None else f'a mask of {mask.shape}'}")
    if mode == 4:
        if empty_band and before == behind == 0:
            return np.ones((queries, keys), bool)
        return (key > query + shift + behind) | (key < query + shift - before)
    return key > query + (shift if mode == 3 else 0)


def _to_heads(x: Array, layout: str, heads: int) -> Array:
    """-> [B, N, S, D]."""
    if layout == "BNSD":
        return x
    if layout == "BSND":
        return np.swapaxes(x, 1, 2)
    x = np.swapaxes(x, 0, 1) if layout == "SBH" else x
    return np.swapaxes(x.reshape(*x.shape[:2], heads, -1), 1, 2)


def _from_heads(x: Array, layout: str) -> Array:
    """The inverse of `_to_heads`."""
    if layout == "BNSD":
        return x
    x = np.swapaxes(x, 1, 2)
    if layout == "BSND":
        return x
    x = x.reshape(*x.shape[:2], -1)
    return np.swapaxes(x, 0, 1) if layout == "SBH" else x


def _kept(drop: Given, keep: float, shape: Tuple[int, ...]) -> Given:
    """Dropout factors of the probabilities, from one bit each (lowest bit first): 1 / keep where it is set."""
    if drop is None or keep == 1:
        return None
    bits = np.unpackbits(np.ascontiguousarray(drop).reshape(-1), bitorder="little")
    return bits[:int(np.prod(shape))].reshape(shape) / keep


def _wide(x: Array, heads: int) -> Array:
    """Key/value heads [B, N_kv, T, D] repeated for the query heads that share them."""
    if heads % x.shape[1]:
        raise ExecutionError(f"FlashAttentionScore: {heads} query heads cannot share {x.shape[1]} key/value heads")
    return np.repeat(x, heads // x.shape[1], 1)


def _narrow(x: Array, heads: int) -> Array:
    """Sum the gradients of repeated heads."""
    return x.reshape(x.shape[0], heads, -1, *x.shape[2:]).sum(2)


def forward(q: Array, k: Array, v: Array, hidden: Array, scale: float, kept: Given = None
            ) -> Tuple[Array, Array, Array]:
    """q: [B, N, S, D]; k, v: [B, N_kv, T, D] -> row maximum and sum of exponentials [B, N, S, 1], result like q."""
    heads = q.shape[1]
    scores = np.matmul(q, np.swapaxes(_wide(k, heads), -1, -2)) * scale
    hidden = np.broadcast_to(hidden, scores.shape)
    top = np.max(np.where(hidden, -np.inf, scores), -1, keepdims=True)
    top = np.where(np.isfinite(top), top, _LOWEST)
    weights = np.where(hidden, 0.0, np.exp(np.where(hidden, 0.0, scores - top)))
    total = weights.sum(-1, keepdims=True)
    probabilities = weights / np.where(total == 0, 1.0, total)
    if kept is not None:
        probabilities = probabilities * kept
    return top, total, np.matmul(probabilities, _wide(v, heads))


def backward(q: Array, k: Array, v: Array, dy: Array, hidden: Array, scale: float, top: Array, total: Array,
             result: Array, kept: Given = None) -> Tuple[Array, Array, Array]:
    """Gradients of q, k and v from that of the result and the saved values of the forward pass."""
    heads, kv_heads = q.shape[1], k.shape[1]
    scores = np.matmul(q, np.swapaxes(_wide(k, heads), -1, -2)) * scale
    hidden = np.broadcast_to(hidden, scores.shape)
    weights = np.where(hidden, 0.0, np.exp(np.where(hidden, 0.0, scores - top)))
    probabilities = weights / np.where(total == 0, 1.0, total)
    used = probabilities if kept is None else probabilities * kept
    d_used = np.matmul(dy, np.swapaxes(_wide(v, heads), -1, -2))
    d_probabilities = d_used if kept is None else d_used * kept
    d_scores = probabilities * (d_probabilities - np.sum(dy * result, -1, keepdims=True)) * scale
    return (np.matmul(d_scores, _wide(k, heads)),
            _narrow(np.matmul(np.swapaxes(d_scores, -1, -2), q), kv_heads),
            _narrow(np.matmul(np.swapaxes(used, -1, -2), dy), kv_heads))


def _pieces(layout: str, ends: Given, lengths_of: str) -> List[slice]:
    """The sequences of TND (`ends`: where each ends) and TH (their lengths)."""
    if ends is None:
        raise ExecutionError(f"FlashAttentionScore: layout {layout} needs {lengths_of}")
    numbers = [int(value) for value in np.ravel(ends)]
    stops = numbers if layout == "TND" else list(np.cumsum(numbers))
    return [slice(start, stop) for start, stop in zip([0, *stops[:-1]], stops)]


class _Call:
    """The kernel inputs that forward and backward share."""

    def __init__(self, node: Node, shift: Given, padding: Given, prefix: Given, heads: int, keep: float, scale: float,
                 before: int, behind: int, layout: int, mode: int, empty_band: bool):
        for value, name in ((shift, "pse_shift"), (padding, "padding_mask"), (prefix, "prefix")):
            if value is not None:
                raise ExecutionError(f"{node}: the interpreter does not support input {name}; omit it")
        self.layout = LAYOUTS[layout]
        self.heads, self.keep, self.scale, self.mode = heads, keep, scale, mode
        self.before, self.behind, self.empty_band = before, behind, empty_band

    def hidden(self, queries: int, keys: int, mask: Given) -> Array:
        return forbidden(queries, keys, mask, self.before, self.behind, self.mode, self.empty_band)

    def check(self, q: Array, k: Array, v: Array) -> None:
        """Raises ExecutionError if heads or lengths do not match."""
        if q.shape[1] != self.heads or k.shape != v.shape or q.shape[-1] != k.shape[-1] or q.shape[0] != k.shape[0]:
            raise ExecutionError(f"FlashAttentionScore: query {q.shape}, key {k.shape} and value {v.shape} as [B, N, "
                                 f"S, D] do not match each other, or head_num {self.heads}")

    def heads_of(self, x: Array, q: Array) -> Array:
        """x as [B, N, S, D]; head size as in q."""
        if self.layout in ("BSH", "SBH"):
            return _to_heads(x, self.layout, x.shape[-1] // (q.shape[-1] // self.heads))
        return _to_heads(x, self.layout, self.heads)


def flash_attention(node: Node, q: Array, k: Array, v: Array, shift: Given, drop: Given, padding: Given, mask: Given,
                    prefix: Given, q_ends: Given, kv_ends: Given, heads: int, keep: float, scale: float, before: int,
                    behind: int, _inner: int, layout: int, mode: int, empty_band: bool = False) -> Tuple[Array, ...]:
    """(row maxima, sums, [], result); in TH only the result is meaningful."""
    call = _Call(node, shift, padding, prefix, heads, keep, scale, before, behind, layout, mode, empty_band)
    empty = np.zeros(1, q.dtype)
    if call.layout not in ("TND", "TH"):
        qh, kh, vh = (call.heads_of(x, q) for x in (q, k, v))
        call.check(qh, kh, vh)
        hidden, kept = call.hidden(qh.shape[2], kh.shape[2], mask), _kept(drop, keep, (*qh.shape[:3], kh.shape[2]))
        top, total, result = forward(qh, kh, vh, hidden, scale, kept)
        copies = (*qh.shape[:3], _COPIES)
        return np.broadcast_to(top, copies), np.broadcast_to(total, copies), empty, _from_heads(result, call.layout)
    if drop is not None:
        raise ExecutionError(f"{node}: the interpreter does not support dropout in layout {call.layout}")
    width = q.shape[-1] // heads if call.layout == "TH" else q.shape[-1]
    qt, kt, vt = (x.reshape(x.shape[0], -1, width) for x in (q, k, v))
    tops, totals = np.zeros((len(qt), heads, 1)), np.zeros((len(qt), heads, 1))
    result = np.zeros_like(qt)
    for rows, keys in zip(_pieces(call.layout, q_ends, "q lengths"), _pieces(call.layout, kv_ends, "kv lengths")):
        if rows.start == rows.stop:                                # an empty document
            continue
        qh, kh, vh = (np.swapaxes(x, 0, 1)[None] for x in (qt[rows], kt[keys], vt[keys]))
        call.check(qh, kh, vh)
        # TH is causal: the kernel repeats the given triangle.
        hidden = (np.triu(np.ones((qh.shape[2], kh.shape[2]), bool), 1) if call.layout == "TH"
                  else call.hidden(qh.shape[2], kh.shape[2], mask))
        top, total, part = forward(qh, kh, vh, hidden, scale)
        tops[rows], totals[rows], result[rows] = (np.swapaxes(x[0], 0, 1) for x in (top, total, part))
    if call.layout == "TH":
        return empty, empty, empty, result.reshape(q.shape)
    return np.broadcast_to(tops, (*tops.shape[:2], _COPIES)), np.broadcast_to(totals, (*tops.shape[:2], _COPIES)), \
        empty, result


def flash_attention_grad(node: Node, q: Array, k: Array, v: Array, dy: Array, shift: Given, drop: Given, padding: Given,
                         mask: Given, top: Array, total: Array, _softmax: object, result: Array, prefix: Given,
                         q_ends: Given, kv_ends: Given, heads: int, keep: float, scale: float, before: int,
                         behind: int, _inner: int, layout: int, mode: int, empty_band: bool = False
                         ) -> Tuple[Array, ...]:
    """Gradients of query, key, value, and an empty one of pse_shift."""
    call = _Call(node, shift, padding, prefix, heads, keep, scale, before, behind, layout, mode, empty_band)
    empty = np.zeros(0, q.dtype)
    if call.layout == "TH":
        raise ExecutionError(f"{node}: the interpreter has no gradient for layout TH, which is for inference")
    if call.layout != "TND":
        qh, kh, vh, dyh, rh = (call.heads_of(x, q) for x in (q, k, v, dy, result))
        call.check(qh, kh, vh)
        hidden, kept = call.hidden(qh.shape[2], kh.shape[2], mask), _kept(drop, keep, (*qh.shape[:3], kh.shape[2]))
        parts = backward(qh, kh, vh, dyh, hidden, scale, top[..., :1], total[..., :1], rh, kept)
        return (*(_from_heads(part, call.layout) for part in parts), empty)
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for rows, keys in zip(_pieces("TND", q_ends, "q lengths"), _pieces("TND", kv_ends, "kv lengths")):
        if rows.start == rows.stop:
            continue
        qh, kh, vh, dyh, rh, t, s = (np.swapaxes(x, 0, 1)[None] for x in (
            q[rows], k[keys], v[keys], dy[rows], result[rows], top[rows, :, :1], total[rows, :, :1]))
        parts = backward(qh, kh, vh, dyh, call.hidden(qh.shape[2], kh.shape[2], mask), scale, t, s, rh)
        dq[rows], dk[keys], dv[keys] = (np.swapaxes(part[0], 0, 1) for part in parts)
    return dq, dk, dv, empty


def operators(empty_band: bool = False) -> Dict[str, Callable[..., Sequence[Array]]]:
    """The kernels by name. empty_band: see `forbidden`."""
    return {"FlashAttentionScore": partial(flash_attention, empty_band=empty_band),
            "FlashAttentionScoreGrad": partial(flash_attention_grad, empty_band=empty_band)}
