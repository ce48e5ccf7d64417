"""Dropout by step: its numbers, its mask against independent arithmetic, and what a training step makes of it."""
import copy

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn

from research.telechat.model.dropout import CountedDropout, count_dropout, key_words
from research.telechat.model.graph_sharing import shared_graph_key
from research.telechat.training.step import TelechatTrainOneStepCell

pytestmark = pytest.mark.matrix

RATE = 0.1
SHAPE = (4, 64, 500)


@pytest.fixture(autouse=True, params=[ms.GRAPH_MODE, ms.PYNATIVE_MODE], ids=["graph", "pynative"])
def cpu(request):
    ms.set_context(mode=request.param, device_target="CPU")
    ms.set_seed(7)
    yield
    ms.set_context(mode=ms.GRAPH_MODE)


class TwoDropouts(nn.Cell):
    """Two cells that differ by their name alone."""

    def __init__(self, rate=RATE):
        super().__init__()
        self.one, self.two = nn.Dropout(p=rate), nn.Dropout(p=rate)

    def construct(self, x):
        return self.one(x), self.two(x)


def at_step(number):
    return Parameter(Tensor([number], ms.int32), name="global_step", requires_grad=False)


def drawn(step=0, rank=0, seed=7, rate=RATE, shape=SHAPE, dtype=ms.float32):
    """What two cells make of ones."""
    ms.set_seed(seed)
    network = TwoDropouts(rate)
    network.set_train()
    assert count_dropout(network, at_step(step), rank) == 2
    return [y.astype(ms.float32).asnumpy() for y in network(ms.ops.ones(shape, dtype))]


def expected_mask(rate, key, step, rows, columns):
    """The formula of model/dropout.py in Python's own integers, one element after the other."""
    def mix(word):
        word = (word ^ word >> 16) * 0x85EBCA6B % 2**32
        word = (word ^ word >> 13) * 0xC2B2AE35 % 2**32
        return word ^ word >> 16

    def words(count, number):
        state = mix((step * 0x9E3779B9 + key[number]) % 2**32)
        return [mix((index * 0x9E3779B9 + state) % 2**32) for index in range(count)]
    r, c, s, d = words(rows, 0), words(columns, 1), words(rows, 2), words(columns, 3)
    return np.array([[(r[i] * c[j] + s[i] * d[j]) % 2**32 >= rate * 2**32 for j in range(columns)]
                     for i in range(rows)])


@pytest.mark.parametrize("step", [0, 3, 2**31 - 1])
def test_mask_is_the_formula(step):
    one, two = drawn(step, shape=(2, 3, 40))
    for name, found in (("one", one), ("two", two)):
        expected = expected_mask(RATE, key_words(7, 0, "", name), step, 6, 40)
        np.testing.assert_array_equal(found.reshape(6, 40) > 0, expected)


@pytest.mark.parametrize(("dtype", "rate"), [(ms.float32, 0.05), (ms.float32, 0.5), (ms.float16, 0.1)])
def test_share_and_scale(dtype, rate):
    found, _ = drawn(rate=rate, dtype=dtype)
    kept = found > 0
    np.testing.assert_allclose(found[kept], 1 / (1 - rate), rtol=1e-3 if dtype == ms.float16 else 1e-6)
    deviation = np.sqrt(rate * (1 - rate))
    z = (kept.reshape(-1, SHAPE[-1]) - (1 - rate)) / deviation                   # [256, 500]
    assert abs(z.sum()) < 5 * np.sqrt(z.size)
    for sums, count in ((z.sum(0), len(z)), (z.sum(1), z.shape[1])):             # every row and column by itself
        assert np.abs(sums).max() < 5 * np.sqrt(count)
        assert 0.7 < (sums**2).mean() / count < 1.3
    pairs = (z @ z.T)[np.triu_indices(len(z), 1)] / np.sqrt(z.shape[1])          # rows know nothing of each other
    assert np.abs(pairs).max() < 9 and 0.95 < (pairs**2).mean() < 1.05


def test_equal_again_and_different_by_cell_step_rank_and_seed():
    first, other_cell = drawn()
    np.testing.assert_array_equal(first, drawn()[0])
    for other in (other_cell, drawn(step=1)[0], drawn(rank=1)[0], drawn(seed=8)[0]):
        assert abs(np.corrcoef(first.ravel() > 0, other.ravel() > 0)[0, 1]) < 0.015       # 5 / sqrt(128000)


def test_evaluation_and_rate_zero_change_nothing():
    network = TwoDropouts()
    count_dropout(network, at_step(0), 0)
    network.set_train(False)
    x = ms.ops.ones(SHAPE, ms.float32)
    np.testing.assert_array_equal(network(x)[0].asnumpy(), 1)
    plain = TwoDropouts(0.0)
    assert count_dropout(plain, at_step(0), 0) == 0 and type(plain.one) is nn.Dropout


def test_gradient_has_the_mask_of_the_result():
    dropout = CountedDropout(RATE, key_words("x"), at_step(5))
    dropout.set_train()
    x = Tensor(np.random.default_rng(0).normal(size=SHAPE).astype(np.float32))
    gradient = ms.grad(dropout)(x).asnumpy()
    np.testing.assert_allclose(dropout(x).asnumpy(), gradient * x.asnumpy(), rtol=1e-6)
    assert 0.88 < (gradient > 0).mean() < 0.92


def test_one_cell_stands_for_others_in_turn():
    """A copy whose key is a parameter draws each cell's mask, and its step is still the optimizer's."""
    step = at_step(2)
    cells = [CountedDropout(RATE, key_words(name), step) for name in ("x", "y")]
    stand_in = copy.deepcopy(cells[0], {id(step): step})
    key = stand_in.key_as_parameter()
    x = ms.ops.ones(SHAPE, ms.float32)
    for cell in (*cells, stand_in):
        cell.set_train()
    for number in (2, 3):
        step.set_data(Tensor([number], ms.int32))
        for cell in (*cells, cells[0]):
            key.assign_value(cell.key_tensor())
            np.testing.assert_array_equal(stand_in(x).asnumpy(), cell(x).asnumpy())
    assert list(stand_in.get_parameters()) == []


def test_counter_belongs_to_the_optimizer_alone():
    """A checkpoint of the network has nothing new, and old ones lack nothing."""
    network = TwoDropouts()
    count_dropout(network, at_step(0), 0)
    assert list(network.get_parameters()) == []
    network.set_train()
    assert shared_graph_key(network) is None


class Linear(nn.Cell):
    """sum of dropout(x) w, the gradient of which is dropout(x)."""

    def __init__(self):
        super().__init__()
        self.weight = Parameter(Tensor(np.ones(40, np.float32)), name="weight")
        self.dropout = nn.Dropout(p=RATE)

    def construct(self, x):
        return (self.dropout(x) * self.weight).sum(), ms.ops.ones(1, ms.float32)


def test_training_steps_count_and_resume():
    """Loss and update of each step have the mask of that step; another process goes on from the counter."""
    x = ms.ops.ones((1, 40), ms.float32)
    weight, found = np.ones(40), []
    network = Linear()
    cell = TelechatTrainOneStepCell(network, nn.SGD(network.trainable_params(), 0.1), scale_sense=1.0)
    cell.set_train()
    for step in range(4):
        kept = expected_mask(RATE, key_words(7, 0, "", "dropout"), step, 1, 40)[0] / (1 - RATE)
        found.append(float(cell(x)[0]))
        assert found[-1] == pytest.approx((kept * weight).sum(), rel=1e-5)
        weight -= 0.1 * kept
        np.testing.assert_allclose(network.weight.asnumpy(), weight, rtol=1e-5)
        if step == 1:
            saved = [Tensor(p.asnumpy().copy()) for p in (network.weight, cell.optimizer.global_step)]
    other = Linear()
    cell = TelechatTrainOneStepCell(other, nn.SGD(other.trainable_params(), 0.1), scale_sense=1.0)
    cell.set_train()
    for parameter, value in zip((other.weight, cell.optimizer.global_step), saved):
        parameter.set_data(value)
    assert [float(cell(x)[0]) for _ in range(2)] == found[2:]
    np.testing.assert_array_equal(other.weight.asnumpy(), network.weight.asnumpy())


@pytest.mark.parametrize("wrapper", [nn.MicroBatchInterleaved, nn.PipelineCell])
def test_micro_batches_do_not_share_masks(wrapper):
    """Their masks are not a function of the step alone, so MindSpore's kernel stays."""
    network = Linear()
    optimizer = nn.SGD(network.trainable_params(), 0.1)
    TelechatTrainOneStepCell(wrapper(network, 2), optimizer, scale_sense=1.0)
    assert type(network.dropout) is nn.Dropout
    TelechatTrainOneStepCell(network, optimizer, scale_sense=1.0)
    assert type(network.dropout) is CountedDropout
