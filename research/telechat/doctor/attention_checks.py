"""Attention in every form that recipes use: layouts, masks, grouped heads, dropout, and the band of ring attention."""
from functools import lru_cache, partial
from typing import List, NamedTuple, Sequence, Tuple

import numpy as np

from research.telechat.common.bfloat16 import round_bfloat16
from research.telechat.common.files import JsonObject
from research.telechat.doctor.checks import LIMITS, Check, Outcome, within
from research.telechat.doctor.device import Array, AttentionForm, Device
from research.telechat.interpret import attention

PAD = 3                                      # the id of padding
_SHARE = 0.1                                 # fraction of probabilities that are dropped
_FLASH = "model_config.use_flash_attention: True"
_NO_BAND = ("no key (MindSpore's ring attention counts on it)", "no key", "the diagonal")


class Sizes(NamedTuple):
    """Tokens of a sequence; tokens of one longer than the kernel's 2048 x 2048 triangle; head size."""

    seq: int = 256
    long: int = 2304
    dim: int = 128


def rounded(x: Array, dtype: str) -> Array:
    """x rounded to `dtype`, as float32."""
    x = np.asarray(x, np.float32)
    return round_bfloat16(x) if dtype == "bfloat16" else x.astype(dtype).astype(np.float32)


def forms(dtypes: Sequence[str], sizes: Sizes) -> List[Tuple[AttentionForm, str]]:
    """(form, what to avoid) of all recipes."""
    compressed: JsonObject = {"use_attn_mask_compression": True}
    main = dtypes[0]

    def form(name: str, keys: JsonObject, dtype: str = main, kv_heads: int = 4, batch: int = 2,
             seq: int = sizes.seq) -> AttentionForm:
        return AttentionForm(name, dtype, batch, 4 if batch > 1 else 2, kv_heads if batch > 1 else 2, seq, sizes.dim,
                             keys)
    documents = {"document_boundaries": True}
    return [*((form("causal, triangle", compressed, dtype), "model_config.use_attn_mask_compression: True")
              for dtype in dtypes),
            (form("causal, full mask", {"use_attn_mask_compression": False}),
             "model_config.use_attn_mask_compression: False"),
            (form("causal, grouped heads", compressed, kv_heads=2), f"{_FLASH} with n_kv_heads"),
            (form("causal, longer than the triangle", compressed, batch=1, seq=sizes.long),
             f"{_FLASH} with seq_length over 2048"),
            (form("padding", {"mask_pad_tokens": True}), "model_config.mask_pad_tokens: True"),
            (form("documents back to back", documents), "model_config.document_boundaries: True"),
            (form("documents and padding", {**documents, "mask_pad_tokens": True}),
             "model_config.document_boundaries: True with mask_pad_tokens: True")]


@lru_cache(maxsize=32)
def _inputs(dtype: str, *sizes: int) -> Tuple[List[Array], Array, Array, Array]:
    """Query, key, value; gradient of the result; tokens [B, S] that end in padding; ends of documents [B, 3]."""
    batch, heads, kv_heads, seq, dim = sizes
    rng = np.random.default_rng(seq)
    shapes = [(batch, count, seq, dim) for count in (heads, kv_heads, kv_heads, heads)]
    *qkv, dy = (rounded(rng.normal(size=shape), dtype) for shape in shapes)
    tokens = rng.integers(4, 90, (batch, seq)).astype(np.int32)
    tokens[-1, -seq // 5:] = PAD
    ends = np.stack([[seq // 3 + row, seq // 2 + row, seq] for row in range(batch)]).astype(np.int32)
    return qkv, dy, tokens, ends


def hidden(form: AttentionForm, tokens: Array, ends: Array) -> Array:
    """Which keys a query may not see, [B, 1, S, S]."""
    result = np.triu(np.ones((form.seq, form.seq), bool), 1)[None, None]
    if form.keys.get("document_boundaries"):
        number = np.stack([np.searchsorted(row, np.arange(form.seq), "right") for row in ends])
        result = result | (number[:, None, :, None] != number[:, None, None])
    if form.keys.get("mask_pad_tokens"):
        result = result | (tokens == PAD)[:, None, None]
    return result


@lru_cache(maxsize=32)
def _expected(dtype: str, masks: Tuple[bool, bool], *sizes: int) -> Tuple[Array, ...]:
    """Result and gradients in float64."""
    qkv, dy, tokens, ends = _inputs(dtype, *sizes)
    batch, heads, kv_heads, seq, dim = sizes
    form = AttentionForm("", dtype, batch, heads, kv_heads, seq, dim,
                         {"document_boundaries": masks[0], "mask_pad_tokens": masks[1]})
    unseen, scale = hidden(form, tokens, ends), dim ** -0.5
    q, k, v = (x.astype(np.float64) for x in qkv)
    top, total, result = attention.forward(q, k, v, unseen, scale)
    return (result, *attention.backward(q, k, v, dy, unseen, scale, top, total, result))


def _compare(device: Device, form: AttentionForm) -> Outcome:
    sizes = (form.batch, form.heads, form.kv_heads, form.seq, form.dim)
    masks = bool(form.keys.get("document_boundaries")), bool(form.keys.get("mask_pad_tokens"))
    qkv, dy, tokens, ends = _inputs(form.dtype, *sizes)
    found = device.attention(form, qkv, dy, tokens, ends)
    return within(list(zip(found, _expected(form.dtype, masks, *sizes))), LIMITS[form.dtype], "result and gradients")


def _dropped(device: Device, dtype: str, dim: int) -> Outcome:
    """Zero queries make all probabilities of a row equal; with the identity matrix as values they are the result."""
    form = AttentionForm("dropout", dtype, 1, 4, 4, dim, dim, {"attention_dropout_prob": _SHARE})
    query = np.zeros((1, 4, dim, dim), np.float32)
    value = np.broadcast_to(np.eye(dim, dtype=np.float32), query.shape).copy()
    dy = rounded(np.random.default_rng(2).normal(size=query.shape), dtype)
    result, _, _, d_value = device.attention(form, (query, query, value), dy, np.full((1, dim), 5, np.int32),
                                             np.full((1, 1), dim, np.int32))
    even = np.tril(np.ones((dim, dim))) / np.arange(1, dim + 1)[:, None]
    factor = result * np.arange(1, dim + 1)[:, None]                   # 0 or 1 / (1 - share)
    seen = np.broadcast_to(even > 0, result.shape)
    kept = factor > 0.5
    limit = LIMITS[dtype]
    values = np.abs(factor - kept / (1 - _SHARE)).max()
    share = 1 - kept[seen].mean()
    backward = np.abs(d_value - np.matmul(np.swapaxes(result, -1, -2).astype(np.float64), dy)).max() / np.abs(
        d_value).max()
    spread = 5 * (_SHARE * (1 - _SHARE) / seen.sum()) ** 0.5
    fine = values <= limit and not kept[~seen].any() and abs(share - _SHARE) < spread and backward <= limit
    return Outcome(f"{_SHARE:.3f} +- {spread:.3f} dropped, the others times {1 / (1 - _SHARE):.3f}, and so in the "
                   f"gradient, within {limit:.0e}",
                   f"{share:.3f}, differs by {values:.1e}, in the gradient by {backward:.1e}", bool(fine))


def _flat(device: Device, dtype: str, dim: int) -> Outcome:
    lengths = np.array([5, 33, 17], np.int32)
    rng = np.random.default_rng(3)
    total = int(lengths.sum())
    q, k, v = (rounded(rng.normal(size=(total, heads, dim)), dtype) for heads in (4, 2, 2))
    found = device.flat_attention(dtype, (q, k, v), lengths, 2)
    expected, start = [], 0
    for length in lengths:
        mine = slice(start, start + length)
        causal = np.triu(np.ones((length, length), bool), 1)
        one, two, three = (np.swapaxes(x[mine], 0, 1)[None].astype(np.float64) for x in (q, k, v))
        expected.append(np.swapaxes(attention.forward(one, two, three, causal, dim ** -0.5)[2][0], 0, 1))
        start += length
    return within([(found, np.concatenate(expected))], LIMITS[dtype])


def _band(device: Device) -> Outcome:
    expected, empty, diagonal = _NO_BAND
    sees = device.band_sees_keys()
    return Outcome(expected, diagonal if sees else empty, not sees)


def checks(dtypes: Sequence[str], sizes: Sizes) -> List[Check]:
    """All attention checks."""
    result = [Check(f"attention, {form.name} ({form.dtype})", partial(_compare, form=form), avoid)
              for form, avoid in forms(dtypes, sizes)]
    main = dtypes[0]
    return [*result,
            Check(f"attention, dropout ({main})", partial(_dropped, dtype=main, dim=sizes.dim),
                  "model_config.attention_dropout_prob over 0"),
            Check(f"attention, prompts back to back ({main})", partial(_flat, dtype=main, dim=sizes.dim),
                  "model_config.is_dynamic: True", fused=True),
            Check("attention, zero-width band", _band,
                  "model_config.use_ring_attention: True (parallel_config.context_parallel_algo: ulysses_cp instead)",
                  fused=True)]
