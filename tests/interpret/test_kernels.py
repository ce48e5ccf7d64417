"""The interpreter's fused kernels against loops over single queries and keys, their gradients against differences."""
import itertools

import numpy as np
import pytest

from research.telechat.common.errors import ExecutionError
from research.telechat.interpret import attention, cache, norm
from research.telechat.interpret.ir import Node

NODE = Node("FlashAttentionScore", [], "1:x", {}, None, "", "kernel", "attend")
TRIANGLE = np.triu(np.ones((2048, 2048), np.uint8), 1)
NO_LIMIT = 2**31 - 1
RNG = np.random.default_rng(0)


def call(q, k, v, mask=None, heads=4, keep=1.0, before=NO_LIMIT, behind=0, layout="BNSD", mode=0, drop=None, ends=None,
         empty_band=False):
    return attention.flash_attention(NODE, q, k, v, None, drop, None, mask, None, ends, ends, heads, keep, 0.3, before,
                                     behind, 0, attention.LAYOUTS.index(layout), mode, empty_band)


def by_loops(q, k, v, sees, keep=lambda *place: 1.0):
    """q: [B, N, S, D]; sees(b, i, j): whether query i may look at key j; one query and one head at a time."""
    result = np.zeros(q.shape[:3] + v.shape[3:])
    share = q.shape[1] // k.shape[1]
    for b, n, i in itertools.product(*map(range, q.shape[:3])):
        keys = [j for j in range(k.shape[2]) if sees(b, i, j)]
        if keys:
            weights = [np.exp(0.3 * q[b, n, i] @ k[b, n // share, j]) for j in keys]
            result[b, n, i] = sum(w / sum(weights) * keep(b, n, i, j) * v[b, n // share, j]
                                  for w, j in zip(weights, keys))
    return result


def heads(*shape):
    return RNG.normal(size=shape)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("mode, queries, keys, sees", [
    (2, 6, 6, lambda i, j: j <= i), (2, 4, 6, lambda i, j: j <= i), (3, 4, 6, lambda i, j: j <= i + 2),
    (4, 6, 6, lambda i, j: i - 2 <= j <= i + 1), (4, 4, 6, lambda i, j: i <= j <= i + 3)])
def test_causal_modes(kv_heads, mode, queries, keys, sees):
    q, k, v = heads(2, 4, queries, 4), heads(2, kv_heads, keys, 4), heads(2, kv_heads, keys, 4)
    window = {"before": 2, "behind": 1} if mode == 4 else {}
    found = call(q, k, v, TRIANGLE, mode=mode, **window)
    np.testing.assert_allclose(found[3], by_loops(q, k, v, lambda b, i, j: sees(i, j)), atol=1e-14)


def test_masks_and_windows():
    q, k, v = heads(2, 4, 5, 4), heads(2, 4, 5, 4), heads(2, 4, 5, 4)
    mask = (RNG.random((2, 1, 5, 5)) < 0.4).astype(np.uint8)
    mask[0, 0, 2] = 1                                             # a query that may look at nothing
    seen = call(q, k, v, mask, mode=1)
    np.testing.assert_allclose(seen[3], by_loops(q, k, v, lambda b, i, j: not mask[b, 0, i, j]), atol=1e-14)
    assert (seen[3][0, :, 2] == 0).all() and (seen[1][0, :, 2] == 0).all()
    windowed = call(q, k, v, mask, mode=0, before=3, behind=1)
    np.testing.assert_allclose(
        windowed[3], by_loops(q, k, v, lambda b, i, j: not mask[b, 0, i, j] and i - 3 <= j <= i + 1), atol=1e-14)
    full = call(q, k, v, mask[1, 0], mode=0, behind=NO_LIMIT)     # [S, T], for all sequences
    np.testing.assert_allclose(full[3], by_loops(q, k, v, lambda b, i, j: not mask[1, 0, i, j]), atol=1e-14)


def test_the_two_readings_of_an_empty_band():
    """Ring attention asks for mode 4 with both windows 0 where no key counts; documented, that is the diagonal."""
    q, k, v = heads(1, 4, 4, 4), heads(1, 4, 4, 4), heads(1, 4, 4, 4)
    documented = call(q, k, v, TRIANGLE, mode=4, before=0, behind=0)[3]
    np.testing.assert_allclose(documented, v, atol=1e-14)
    assert (call(q, k, v, TRIANGLE, mode=4, before=0, behind=0, empty_band=True)[3] == 0).all()


def test_layouts_are_the_same_attention():
    q, k, v = heads(2, 4, 6, 4), heads(2, 2, 6, 4), heads(2, 2, 6, 4)
    expected = call(q, k, v, TRIANGLE, mode=2)[3]
    swap = lambda x: np.swapaxes(x, 1, 2)                         # noqa: E731
    flat = lambda x: swap(x).reshape(2, 6, -1)                    # noqa: E731
    assert np.allclose(call(*map(swap, (q, k, v)), TRIANGLE, layout="BSND", mode=2)[3], swap(expected))
    assert np.allclose(call(*map(flat, (q, k, v)), TRIANGLE, layout="BSH", mode=2)[3], flat(expected))
    sbh = [np.swapaxes(flat(x), 0, 1) for x in (q, k, v)]
    assert np.allclose(call(*sbh, TRIANGLE, layout="SBH", mode=2)[3], np.swapaxes(flat(expected), 0, 1))
    tnd = [swap(x).reshape(12, -1, 4) for x in (q, k, v)]
    assert np.allclose(call(*tnd, TRIANGLE, layout="TND", mode=3, ends=(6, 12))[3], swap(expected).reshape(12, 4, 4))
    th = [swap(x).reshape(12, -1) for x in (q, k, v)]
    assert np.allclose(call(*th, layout="TH", ends=np.array([6, 6]))[3], swap(expected).reshape(12, 16))


def test_dropout_by_given_bits():
    q, k, v = heads(1, 4, 4, 4), heads(1, 4, 8, 4), heads(1, 4, 8, 4)
    kept = RNG.random((1, 4, 4, 8)) < 0.6
    bits = np.packbits(kept, bitorder="little").reshape(1, 4, 4, 1)
    found = call(q, k, v, keep=0.6, behind=NO_LIMIT, drop=bits)[3]
    expected = by_loops(q, k, v, lambda b, i, j: True, lambda *place: kept[place] / 0.6)
    np.testing.assert_allclose(found, expected, atol=1e-14)


def slope(function, x, direction):
    return (function(x + 1e-6 * direction) - function(x - 1e-6 * direction)) / 2e-6


@pytest.mark.parametrize("layout, kv_heads, keep", [("BNSD", 4, 1.0), ("BNSD", 2, 0.5), ("TND", 2, 1.0)])
def test_gradients_of_attention(layout, kv_heads, keep):
    shape = (2, 4, 8, 4) if layout == "BNSD" else (16, 4, 4)
    q = heads(*shape)
    k, v = (heads(2, kv_heads, 8, 4) if layout == "BNSD" else heads(16, kv_heads, 4) for _ in range(2))
    dy = heads(*shape)
    drop = RNG.integers(0, 256, (2, 4, 8, 1), np.uint8) if keep < 1 else None
    options = {"layout": layout, "mode": 3, "keep": keep, "drop": drop, "ends": (5, 16) if layout == "TND" else None}
    top, total, _, result = call(q, k, v, TRIANGLE, **options)
    ends = options["ends"]
    gradients = attention.flash_attention_grad(
        NODE, q, k, v, dy, None, drop, None, TRIANGLE, top, total, None, result, None, ends, ends, 4, keep, 0.3,
        NO_LIMIT, 0, 0, attention.LAYOUTS.index(layout), 3)
    for number, x in enumerate((q, k, v)):
        direction = RNG.normal(size=x.shape)
        others = [q, k, v]

        def loss(value, number=number, others=others):
            return float((call(*others[:number], value, *others[number + 1:], TRIANGLE, **options)[3] * dy).sum())
        assert np.sum(gradients[number] * direction) == pytest.approx(slope(loss, x, direction), rel=1e-6)


@pytest.mark.parametrize("arguments, words", [
    ({"mode": 5}, "sparse mode 5"), ({"mode": 1}, "has no mask"), ({"mode": 2}, "compressed triangle"),
    ({"mode": 2, "mask": 1 - TRIANGLE}, "compressed triangle"), ({"heads": 3}, "head_num 3")])
def test_what_attention_refuses(arguments, words):
    q = heads(1, 4, 4, 4)
    with pytest.raises(ExecutionError, match=words):
        call(q, q, q, **arguments)
    with pytest.raises(ExecutionError, match="pse_shift"):
        attention.flash_attention(NODE, q, q, q, q, None, None, None, None, None, None, 4, 1.0, 0.3, 0, 0, 0, 1, 0)


def test_norm_and_its_gradient():
    x, weight, dy = heads(3, 5, 8), heads(8), heads(3, 5, 8)
    result, inverse = norm.rms_norm(NODE, x, weight, 1e-5)
    for place in itertools.product(range(3), range(5)):
        root = np.sqrt(sum(value ** 2 for value in x[place]) / 8 + 1e-5)
        np.testing.assert_allclose(result[place], x[place] / root * weight, atol=1e-14)
        assert inverse[place][0] == pytest.approx(1 / root)
    dx, dweight = norm.rms_norm_grad(NODE, dy, x, inverse, weight)
    for number, (value, gradient) in enumerate(((x, dx), (weight, dweight))):
        direction = RNG.normal(size=value.shape)

        def loss(one, number=number):
            return float((norm.rms_norm(NODE, *((one, weight) if number == 0 else (x, one)), 1e-5)[0] * dy).sum())
        assert np.sum(gradient * direction) == pytest.approx(slope(loss, value, direction), rel=1e-6)


def test_paged_cache():
    """What is stored token by token, in blocks in any order, is attended to in the order of the sequence."""
    keys, values = np.zeros((6, 4, 2, 4)), np.zeros((6, 4, 2, 4))
    tables = np.array([[5, 0, 3], [2, 4, 1]])
    lengths = np.array([9, 3])
    k, v = [heads(n, 8) for n in lengths], [heads(n, 8) for n in lengths]
    for row, count in enumerate(lengths):
        slots = np.array([tables[row, place // 4] * 4 + place % 4 for place in range(count)])
        slots[1:2] = -1                                           # a token that is not stored
        keys, values = cache.store(k[row], keys, slots), cache.store(v[row], values, slots)
        k[row][1] = v[row][1] = 0
    query = heads(2, 1, 16)
    found = cache.paged_attention(NODE, query, keys, values, tables, lengths, None, None, None, None, None, 4, 0.3, 2)
    for row, count in enumerate(lengths):
        expected = by_loops(query[row].reshape(1, 4, 1, 4), k[row].reshape(1, count, 2, 4).swapaxes(1, 2),
                            v[row].reshape(1, count, 2, 4).swapaxes(1, 2), lambda b, i, j: True)
        np.testing.assert_allclose(found[row].reshape(4, 4), expected[0, :, 0], atol=1e-14)
    with pytest.raises(ExecutionError, match="2 tokens for 1 slots"):
        cache.store(heads(2, 8), keys, np.array([0]))
    with pytest.raises(ExecutionError, match="cache of 24 tokens"):
        cache.store(heads(1, 8), keys, np.array([24]))
