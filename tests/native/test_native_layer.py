"""The fused decoder layer and head against NumPy in float64: odd sizes, prompts, pieces and single tokens at once."""
from dataclasses import dataclass

import numpy as np
import pytest
from native_fixtures import call

EPS = 1e-5


@dataclass
class Shape:
    """Sizes of a layer."""

    heads: int = 4
    kv_heads: int = 2
    dim: int = 12
    ffn: int = 50
    block_size: int = 5
    groups: int = 1
    fused: bool = False
    bias: bool = True

    @property
    def hidden(self):
        return self.heads * self.dim


SHAPES = {
    "grouped heads": Shape(), "one key head": Shape(heads=3, kv_heads=1, dim=24, ffn=7, block_size=3, bias=False),
    "fused": Shape(heads=2, kv_heads=2, dim=16, ffn=24, groups=3, fused=True, block_size=16),
    "large": Shape(heads=4, kv_heads=4, dim=32, ffn=200, block_size=300, bias=False),
    "blocks of 257": Shape(heads=2, kv_heads=1, dim=40, ffn=64, block_size=257)}
# Tokens cached before, and tokens of the step, of each sequence; 0 of the second is a row of padding.
STEPS = {"tokens": [(3, 1), (0, 1), (17, 1), (0, 0), (9, 1)], "prompts": [(0, 13), (0, 1), (0, 100)],
         "pieces": [(30, 7), (101, 200), (2, 1)], "one": [(40, 1)], "long": [(0, 300)]}


def norm(x, weight):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * weight


def rotate(x, cos, sin):
    """x: [T, N, D]; cos, sin: [T, D]."""
    first, second = np.split(x, 2, -1)
    return x * cos[:, None] + np.concatenate([-second, first], -1) * sin[:, None]


class Case:
    """A layer, a cache and a step of random numbers."""

    def __init__(self, shape, step, seed=0):
        self.shape, self.step = shape, step
        rng = np.random.default_rng(seed)
        hidden, kv = shape.hidden, 2 * shape.kv_heads * shape.dim
        blocks = sum(-(-max(before + new, 1) // shape.block_size) for before, new in step)
        self.slots = (blocks + 1) * shape.block_size

        def draw(*size, scale=1.0):
            return (rng.normal(0, scale, size)).astype(np.float32)

        def bias(size):
            return draw(size, scale=0.3) if shape.bias else np.zeros(1, np.float32)
        q_rows = 3 * hidden if shape.fused else hidden
        scale = hidden ** -0.5
        self.weights = [1 + draw(hidden, scale=0.1), draw(q_rows, hidden, scale=2 * scale), bias(q_rows),
                        draw(kv, hidden, scale=2 * scale), bias(kv), draw(hidden, hidden, scale=scale), bias(hidden),
                        1 + draw(hidden, scale=0.1),
                        draw(2 * shape.ffn if shape.fused else shape.ffn, hidden, scale=scale),
                        draw(shape.ffn, hidden, scale=scale), draw(hidden, shape.ffn, scale=0.2), bias(hidden)]
        self.cache = [draw(shape.kv_heads * self.slots, shape.dim) for _ in range(2)]
        width = max(-(-max(before + new, 1) // shape.block_size) for before, new in step)
        order = rng.permutation(blocks)
        self.tables = np.full((len(step), width), -1, np.int32)
        positions, sequences, slots = [], [], []
        for number, (before, new) in enumerate(step):
            count = -(-max(before + new, 1) // shape.block_size)
            self.tables[number, :count], order = order[:count], order[count:]
            for at in range(before, before + max(new, 1)):
                positions.append(at)
                sequences.append(number)
                slots.append(self.tables[number, at // shape.block_size] * shape.block_size + at % shape.block_size
                             if new else -1)
        self.rows = np.array([positions, sequences, slots], np.int32)
        angle = np.array(positions)[:, None] * 0.3 ** np.arange(shape.dim // 2)
        self.cos, self.sin = (np.concatenate([part, part], -1).astype(np.float32)
                              for part in (np.cos(angle), np.sin(angle)))
        self.x = draw(len(positions), hidden)

    def inputs(self, rows=slice(None)):
        """Of the operator; rows: those of the step."""
        shape = self.shape
        sizes = np.array([shape.heads, shape.kv_heads, shape.dim, shape.block_size, shape.ffn, shape.groups,
                          shape.fused], np.int32)
        self.written = [part.copy() for part in self.cache]
        return [self.x[rows].copy(), *self.weights, *self.written, self.cos[rows].copy(), self.sin[rows].copy(),
                self.rows[:, rows].copy(), self.tables, sizes, np.array([EPS], np.float32)]

    def run(self, threads=2, rows=slice(None)):
        inputs = self.inputs(rows)
        return call("DecoderLayer", inputs, [inputs[0].shape], threads)[0]

    def reference(self):
        """The same in float64; the cache is written in `self.expected`."""
        shape, dim = self.shape, self.shape.dim
        w = [weight.astype(np.float64) for weight in self.weights]
        has = shape.bias
        x = self.x.astype(np.float64)
        normed, count = norm(x, w[0]), len(x)
        if shape.fused:
            q, k, v = np.split((normed @ w[1].T + has * w[2]).reshape(count, shape.heads, 3 * dim), 3, -1)
        else:
            q = (normed @ w[1].T + has * w[2]).reshape(count, shape.heads, dim)
            k, v = np.split((normed @ w[3].T + has * w[4]).reshape(count, shape.kv_heads, 2 * dim), 2, -1)
        q, k = rotate(q, self.cos, self.sin), rotate(k, self.cos, self.sin)
        keys, values = (part.reshape(shape.kv_heads, self.slots, dim).astype(np.float64) for part in self.cache)
        for t, slot in enumerate(self.rows[2]):
            if slot >= 0:
                keys[:, slot], values[:, slot] = k[t], v[t]
        self.expected = keys, values
        context = np.zeros((count, shape.heads, dim))
        for t, (position, sequence, slot) in enumerate(self.rows.T):
            if slot < 0:
                continue
            seen = np.arange(position + 1)
            at = self.tables[sequence, seen // shape.block_size] * shape.block_size + seen % shape.block_size
            for head in range(shape.heads):
                kv_head = head // (shape.heads // shape.kv_heads)
                scores = keys[kv_head, at] @ q[t, head] / np.sqrt(dim)
                weights = np.exp(scores - scores.max())
                context[t, head] = weights @ values[kv_head, at] / weights.sum()
        h = x + context.reshape(count, -1) @ w[5].T + has * w[6]
        normed = norm(h, w[7])
        if shape.fused:
            both = (normed @ w[8].T).reshape(count, shape.groups, 2, -1)
            gate, up = both[:, :, 0].reshape(count, -1), both[:, :, 1].reshape(count, -1)
        else:
            gate, up = normed @ w[8].T, normed @ w[9].T
        return h + (gate / (1 + np.exp(-gate)) * up) @ w[10].T + has * w[11]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_layer(shape, step):
    case = Case(SHAPES[shape], STEPS[step])
    found, expected = case.run(), case.reference()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5)
    for written, want in zip(case.written, case.expected):
        np.testing.assert_allclose(written, want.reshape(written.shape), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("shape", ["grouped heads", "fused"])
def test_last_layer_computes_what_is_wanted(shape):
    """As if all were computed."""
    case = Case(SHAPES[shape], STEPS["pieces"])
    whole = case.run()
    wanted = np.array([6, 9, 10, 11, 206, 207], np.int32)
    inputs = [*case.inputs(), wanted]
    found, = call("LastDecoderLayer", inputs, [(6, case.shape.hidden)])
    np.testing.assert_allclose(found, whole[wanted], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("step", ["tokens", "pieces", "long"])
def test_threads_and_neighbours_change_no_bit(step):
    """A token's result depends neither on the number of threads nor on what is computed beside it."""
    case = Case(SHAPES["grouped heads"], STEPS[step])
    whole = case.run(threads=1)
    for threads in (2, 3):
        np.testing.assert_array_equal(case.run(threads=threads), whole)
    if step == "tokens":
        for row in range(len(whole)):
            np.testing.assert_array_equal(case.run(rows=slice(row, row + 1)), whole[row:row + 1])


def test_head():
    """Logits, and the first of the largest ones; rows of odd sizes."""
    rng = np.random.default_rng(1)
    for rows, hidden, vocabulary in ((1, 20, 33), (5, 48, 1001), (40, 8, 7)):
        x, weight, head = (rng.normal(0, 1, size).astype(np.float32)
                           for size in ((rows, hidden), (hidden,), (vocabulary, hidden)))
        if vocabulary > 30:
            head[30] = head[3]                           # equal logits: the first one counts
        eps, scale = np.array([EPS], np.float32), np.array([0.5], np.float32)
        logits, tokens = call("Head", [x, weight, head, eps, scale], [(rows, vocabulary), ((rows,), np.int32)])
        expected = 0.5 * norm(x.astype(np.float64), weight) @ head.astype(np.float64).T
        np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(tokens, logits.argmax(-1))


def test_large_and_small_scores():
    """Scores far apart, also in 32-bit range, neither overflow nor lose the largest."""
    case = Case(SHAPES["large"], STEPS["pieces"])
    case.weights[1] *= 60
    np.testing.assert_allclose(case.run(), case.reference(), rtol=2e-3, atol=2e-3)
    assert np.isfinite(case.run()).all()
