"""The fused operators of training on a CPU: against formulas in float64, with 1 and 2 threads, and in the model."""
import types

import mindspore as ms
import model_fixtures
import native_fixtures
import numpy as np
import pytest
from mindspore import nn
from model_fixtures import HF_CONFIGS, build_model, random_official

from research.telechat.model import cpu_kernels, kernels
from research.telechat.native import build
from research.telechat.telechat_config import TelechatConfig

DOCUMENTS = dict(document_boundaries=True)


@pytest.fixture(scope="module")
def native():
    """Calls an operator of the library: name, inputs and shapes of its outputs -> its outputs."""
    def call(name, *inputs, shapes, threads=2, fails=False):
        return native_fixtures.call(name, [np.ascontiguousarray(each) for each in inputs], shapes, threads, fails)

    def on_both(name, *inputs, shapes, **keys):
        """The same with one thread and with two, which must agree to the bit."""
        one, two = (call(name, *inputs, shapes=shapes, threads=threads, **keys) for threads in (1, 2))
        for first, second in zip(one, two):
            np.testing.assert_array_equal(first, second)
        return one
    return types.SimpleNamespace(call=on_both, once=call)


def numbers(*shape, size=1.0, seed=0):
    return (size * np.random.default_rng([seed, *shape]).normal(size=shape)).astype(np.float32)


def assert_near(found, expected, error=5e-6):
    """Differences are small beside the largest number."""
    assert found.shape == expected.shape
    assert np.abs(found - expected).max(initial=0) <= error * max(np.abs(expected).max(initial=0), 1e-30)


def assert_gradients(function, inputs, gradients, dy, error=1e-5):
    """`gradients` are those of sum(dy * function(*inputs)): by central differences in a random direction for each."""
    inputs = [each.astype(np.float64) for each in inputs]
    for place, gradient in enumerate(gradients):
        direction = np.random.default_rng(place).normal(size=inputs[place].shape)
        ahead, back = ([each + sign * 1e-5 * direction if number == place else each
                        for number, each in enumerate(inputs)] for sign in (1, -1))
        slope = ((function(*ahead) - function(*back)) * dy).sum() / 2e-5
        size = np.abs(gradient.astype(np.float64) * direction).sum()
        assert abs((gradient.astype(np.float64) * direction).sum() - slope) <= error * size, place


@pytest.mark.parametrize("tokens, depth, columns", [
    (1, 1, 1), (7, 3, 17), (13, 259, 1001), (197, 300, 16), (200, 4100, 33), (0, 5, 6), (3, 1024, 48)])
def test_linear(native, tokens, depth, columns):
    x, weight, dy = numbers(tokens, depth), numbers(columns, depth, seed=1), numbers(tokens, columns)
    wide = [each.astype(np.float64) for each in (x, weight, dy)]
    assert_near(native.call("Linear", x, weight, shapes=[(tokens, columns)])[0], wide[0] @ wide[1].T)
    assert_near(native.call("LinearInputGradient", dy, weight, shapes=[(tokens, depth)])[0], wide[2] @ wide[1])
    assert_near(native.call("LinearWeightGradient", dy, x, shapes=[(columns, depth)])[0], wide[2].T @ wide[0])


@pytest.mark.parametrize("tokens", [0, 1, 45, 1100])
def test_bias(native, tokens):
    x, bias = numbers(tokens, 21), numbers(21, seed=1)
    np.testing.assert_array_equal(native.call("AddBias", x, bias, shapes=[x.shape])[0], x + bias)
    assert_near(native.call("BiasGradient", x, shapes=[bias.shape])[0], x.astype(np.float64).sum(0))


@pytest.mark.parametrize("shape", [(1, 3), (37, 24), (3, 5, 45), (1100, 16), (0, 8)])
def test_rms_norm(native, shape):
    x, weight, dy, eps = numbers(*shape), numbers(shape[-1], seed=1), numbers(*shape, seed=2), np.float32([1e-3])
    rows = (int(np.prod(shape[:-1])),)

    def norm(x, weight):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + float(eps[0])) * weight
    y, inverse = native.call("RmsNorm", x, weight, eps, shapes=[shape, rows])
    assert_near(y, norm(x.astype(np.float64), weight.astype(np.float64)))
    gradients = native.call("RmsNormGradient", x, weight, inverse, dy, shapes=[shape, weight.shape])
    assert_gradients(norm, [x, weight], gradients, dy)


def test_swiglu(native):
    """Also in groups, and far from 0, where e^-x is beyond float32."""
    gate, up, dy = numbers(7, 24, size=30), numbers(7, 24, seed=1), numbers(7, 24, seed=2)
    gate[0, :3] = (-1000, 1000, 0)

    def swiglu(gate, up):
        return gate / (1 + np.exp(-np.clip(gate, -700, 700))) * up
    y, = native.call("SwiGlu", gate, up, shapes=[gate.shape])
    assert_near(y, swiglu(gate.astype(np.float64), up.astype(np.float64)))
    gradients = native.call("SwiGluGradient", gate, up, dy, shapes=[gate.shape, up.shape])
    assert_gradients(swiglu, [gate, up], gradients, dy)
    both = np.stack([gate.reshape(7, 3, 8), up.reshape(7, 3, 8)], 2).reshape(7, 48)
    groups = np.zeros(3, np.float32)
    np.testing.assert_array_equal(native.call("GroupedSwiGlu", both, groups, shapes=[gate.shape])[0], y)
    dboth, = native.call("GroupedSwiGluGradient", both, groups, dy, shapes=[both.shape])
    np.testing.assert_array_equal(dboth.reshape(7, 3, 2, 8)[:, :, 0].reshape(7, 24), gradients[0])
    np.testing.assert_array_equal(dboth.reshape(7, 3, 2, 8)[:, :, 1].reshape(7, 24), gradients[1])


@pytest.mark.parametrize("tokens, vocab", [(9, 1001), (1, 1), (6, 64), (0, 7)])
def test_cross_entropy(native, tokens, vocab):
    logits, dloss, ignored = numbers(tokens, vocab, size=20), numbers(tokens, seed=1), np.int32([-100])
    labels = np.random.default_rng(0).integers(0, vocab, tokens).astype(np.int32)
    counts = np.ones(tokens)
    if tokens > 3:
        labels[2], counts[2] = -100, 0

    def losses(logits):
        top = logits.max(-1)
        picked = logits[np.arange(tokens), np.maximum(labels, 0)]
        return counts * (np.log(np.exp(logits - top[:, None]).sum(-1)) + top - picked)
    loss, lse = native.call("CrossEntropy", logits, labels, ignored, shapes=[(tokens,), (tokens,)])
    assert_near(loss, losses(logits.astype(np.float64)))
    gradient, = native.call("CrossEntropyGradient", logits, labels, ignored, lse, dloss, shapes=[logits.shape])
    assert_gradients(losses, [logits], [gradient], dloss)
    assert not gradient[counts == 0].any()


@pytest.mark.parametrize("label", [-1, 8])
def test_labels_that_are_no_column_fail(native, label):
    native.call("CrossEntropy", numbers(2, 8), np.int32([0, label]), np.int32([-100]), shapes=[(2,), (2,)], fails=True)


def attention(query, key_value, cos, sin, documents, heads):
    """Rows [B S, N D] and [B S, 2 N_kv D] -> context [B S, N D], as the composed operators define it, in float64."""
    batch, seq, dim = documents.shape[0], documents.shape[1], cos.shape[-1]
    query = query.reshape(batch, seq, heads, dim).transpose(0, 2, 1, 3)
    key, value = np.split(key_value.reshape(batch, seq, -1, 2 * dim).transpose(0, 2, 1, 3), 2, axis=-1)
    group = heads // key.shape[1]

    def rotated(x):
        first, second = np.split(x, 2, axis=-1)
        return x * cos + np.concatenate([-second, first], -1) * sin
    query, key, value = rotated(query), np.repeat(rotated(key), group, 1), np.repeat(value, group, 1)
    scores = query @ key.transpose(0, 1, 3, 2) / np.sqrt(dim)
    hidden = np.triu(np.ones((seq, seq), bool), 1) | (documents[:, None, :, None] != documents[:, None, None, :])
    scores = np.where(hidden, -np.inf, scores)
    exps = np.exp(scores - scores.max(-1, keepdims=True))
    context = exps / exps.sum(-1, keepdims=True) @ value
    return context.transpose(0, 2, 1, 3).reshape(batch * seq, heads * dim)


@pytest.mark.parametrize("batch, seq, heads, kv_heads, dim, ends", [
    (1, 1, 1, 1, 2, [[]]), (2, 50, 4, 2, 24, [[]]), (1, 300, 2, 1, 32, [[130, 131, 240]]),
    (2, 110, 2, 2, 8, [[3], [100]]), (1, 7, 2, 2, 40, [[]])])
def test_attention(native, batch, seq, heads, kv_heads, dim, ends):
    """Grouped heads, documents of one token and over more than a block, lengths that divide nothing."""
    query, key_value = numbers(batch * seq, heads * dim), numbers(batch * seq, 2 * kv_heads * dim, seed=1)
    dy = numbers(batch * seq, heads * dim, seed=2)
    documents = np.array([np.searchsorted(of, np.arange(seq), "right") for of in ends], np.int32)
    cos, sin = (numbers(len(ends), 1, seq, dim, seed=seed) for seed in (3, 4))        # any numbers will do
    whole = np.broadcast_to(documents, (batch, seq))

    def context_of(query, key_value):
        return attention(query, key_value, cos.astype(np.float64), sin.astype(np.float64), whole, heads)
    context, lse = native.call("Attention", query, key_value, cos, sin, documents,
                               shapes=[query.shape, (batch * seq * heads,)])
    assert_near(context, context_of(query.astype(np.float64), key_value.astype(np.float64)), 1e-5)
    gradients = native.call("AttentionGradient", query, key_value, cos, sin, documents, context, lse, dy,
                            shapes=[query.shape, key_value.shape])
    assert_gradients(context_of, [query, key_value], gradients, dy, 2e-5)
    if heads == kv_heads:                              # the same, from rows [q | k | v] per head
        rows = np.concatenate([query.reshape(-1, heads, dim), key_value.reshape(-1, heads, 2 * dim)], -1)
        rows = rows.reshape(batch * seq, -1)
        found = native.call("AttentionOfOne", rows, cos, sin, documents, shapes=[query.shape, lse.shape])
        np.testing.assert_array_equal(found[0], context)
        of_rows, = native.call("AttentionOfOneGradient", rows, cos, sin, documents, context, lse, dy,
                               shapes=[rows.shape])
        of_rows = of_rows.reshape(-1, heads, 3 * dim)
        np.testing.assert_array_equal(of_rows[..., :dim].reshape(query.shape), gradients[0])
        np.testing.assert_array_equal(of_rows[..., dim:].reshape(key_value.shape), gradients[1])


def test_tokens_behind_a_query_and_of_other_documents_change_nothing(native):
    """Not by a bit, whatever is there."""
    documents = np.int32([[0] * 20 + [1] * 40])
    cos, sin = np.ones((1, 1, 60, 8), np.float32), np.zeros((1, 1, 60, 8), np.float32)

    def of(tokens):
        values = numbers(60, 16), numbers(60, 32, seed=1)
        values[1][tokens] = 1e3
        return native.call("Attention", *values, cos, sin, documents, shapes=[(60, 16), (120,)])[0]
    plain = of(slice(0, 0))
    np.testing.assert_array_equal(of(slice(50, 60))[:50], plain[:50])
    np.testing.assert_array_equal(of(slice(0, 20))[20:], plain[20:])
    assert (of(slice(0, 20))[:20] != plain[:20]).any()


def test_what_is_no_number_shows(native):
    """Overflow is found by gradients that are no numbers: none is lost on the way."""
    with np.errstate(invalid="ignore"):
        for wrong in (np.nan, np.inf):
            gate, query, logits = numbers(2, 40), numbers(2, 8), numbers(2, 40)
            gate[1, 5] = query[1, 5] = logits[1, 5] = wrong
            assert not np.isfinite(native.call("SwiGlu", gate, np.ones_like(gate), shapes=[gate.shape])[0][1, 5])
            labels, ignored = np.int32([0, 0]), np.int32([-100])
            loss = native.call("CrossEntropy", logits, labels, ignored, shapes=[(2,), (2,)])[0]
            assert not np.isfinite(loss[1]) and np.isfinite(loss[0])
            tables, documents = np.ones((1, 1, 2, 8), np.float32), np.int32([[0, 0]])
            context = native.call("Attention", query, numbers(2, 16), tables, tables, documents,
                                  shapes=[(2, 8), (2,)])[0]
            assert not np.isfinite(context[1]).any() and np.isfinite(context[0]).all()
            x = numbers(2, 40)
            x[1, 5] = wrong
            norm = native.call("RmsNorm", x, np.ones(40, np.float32), np.float32([1e-5]), shapes=[x.shape, (2,)])[0]
            assert np.isnan(norm[1, 5])


def test_numbers_near_zero_are_zero_in_every_thread(native):
    """Whatever the thread of the caller does with them: MindSpore's differ."""
    y, = native.call("Linear", np.full((400, 1), 1e-30, np.float32), np.full((16, 1), 1e-10, np.float32),
                     shapes=[(400, 16)])
    assert not y.any()


def test_adamw(native):
    """Two steps of the update, in place."""
    parameter, mean, square = numbers(3, 33), np.zeros((3, 33), np.float32), np.zeros((3, 33), np.float32)
    expected = [each.astype(np.float64) for each in (parameter, mean, square)]
    numbers_of = [np.float32(each) for each in (1e-2, 0.9, 0.95, 1e-8, 0.1)]          # rate, beta1, beta2, eps, decay
    for seed in (1, 2):
        gradient = numbers(3, 33, seed=seed)
        rate, beta1, beta2, eps, decay = (float(each) for each in numbers_of)
        p, m, v = expected
        m, v = m * beta1 + gradient * (1 - beta1), v * beta2 + gradient.astype(np.float64)**2 * (1 - beta2)
        expected = [p - rate * (m / (np.sqrt(v) + eps) + decay * p), m, v]
        state = parameter, mean, square
        copies = [each.copy() for each in state]
        for target in (copies, state):                 # one call each, as a call changes what it is given
            native.once("AdamW", *target, *numbers_of, gradient, shapes=[(1,)])
        for one, other, wanted in zip(copies, state, expected):
            np.testing.assert_array_equal(one, other)
            assert_near(one, wanted)


def of_model(monkeypatch, family, switch, inputs, **settings):
    """(loss, gradients by name) of a small model in training, with or without the fused operators."""
    monkeypatch.setenv(build.SWITCH, switch)
    build._library.cache_clear()
    try:
        model = build_model(HF_CONFIGS[family], random_official(HF_CONFIGS[family]), **settings)
        assert model.loss.in_one == (switch == "1")
    finally:
        monkeypatch.delenv(build.SWITCH)
        build._library.cache_clear()
    model.set_train(True)
    if "document_boundaries" in settings:
        of_two = model

        class WithEnds(nn.Cell):
            def construct(self, ids, labels):
                return of_two(ids, labels, ms.Tensor(np.int32([[5, 9], [1, 14]])))
        model = WithEnds()
    loss, gradients = model_fixtures.loss_and_gradients(model, *inputs)
    return loss, dict(zip([p.name for p in model.trainable_params()], gradients))


@pytest.mark.parametrize("family, settings", [("telechat2_gqa", DOCUMENTS), ("52b", {})], ids=["grouped", "fused"])
def test_model_equals_composed_operators(native, monkeypatch, family, settings):
    rng = np.random.default_rng(0)
    ids, labels = (ms.Tensor(rng.integers(4, 97, (2, 18)).astype(np.int32)) for _ in range(2))
    labels = ms.ops.select(ms.Tensor(rng.random((2, 18)) < 0.3), ms.ops.full_like(labels, -100), labels)
    fused, composed = (of_model(monkeypatch, family, switch, (ids, labels), **settings) for switch in "10")
    assert abs(fused[0] - composed[0]) <= 1e-6 * composed[0]
    assert sorted(fused[1]) == sorted(composed[1])
    for name, gradient in composed[1].items():
        assert np.abs(gradient).max() > 0, name
        assert_near(fused[1][name], gradient, 1e-5)


def test_without_a_graph(native):
    """Operator by operator (PyNative), gradients as well."""
    x, weight, dy = numbers(5, 12), numbers(9, 12, seed=1), numbers(5, 9, seed=2)
    ms.set_context(mode=ms.PYNATIVE_MODE, device_target="CPU")
    try:
        product = cpu_kernels.linear_product()
        gradients = ms.grad(lambda x, weight: (product(x, weight) * ms.Tensor(dy)).sum(), (0, 1))(
            ms.Tensor(x), ms.Tensor(weight))
    finally:
        ms.set_context(mode=ms.GRAPH_MODE)
    assert_near(gradients[0].asnumpy(), dy @ weight)
    assert_near(gradients[1].asnumpy(), dy.T @ x)


@pytest.mark.parametrize("settings, all_of_them, attention_too", [
    ({}, True, True), ({"mask_pad_tokens": True}, True, False), ({"attention_dropout_prob": 0.1}, True, False),
    ({"softmax_compute_type": "float16"}, False, False), ({"layernorm_compute_type": "float16"}, False, False),
    ({"compute_dtype": "float16"}, False, False), ({"use_past": True}, False, False)])
def test_when_they_are_used(native, settings, all_of_them, attention_too):
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
    config = TelechatConfig(**{**dict(compute_dtype="float32", softmax_compute_type="float32",
                                      layernorm_compute_type="float32"), **settings})
    assert kernels.fused_on_cpu(config) == all_of_them
    assert kernels.fused_attention_on_cpu(config) == attention_too


def test_not_where_mindspore_shards(native):
    ms.set_auto_parallel_context(parallel_mode="semi_auto_parallel")
    try:
        assert not kernels.fused_on_cpu(TelechatConfig(compute_dtype="float32"))
    finally:
        ms.reset_auto_parallel_context()
    assert kernels.fused_on_cpu(TelechatConfig(compute_dtype="float32"))
