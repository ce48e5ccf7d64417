"""Updates that are far below half a step of bfloat16 arrive, with every kind of master weights and with none lost."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn

from benchmarks import master_weights as benchmark
from research.telechat.spec.precision import REMAINDER_PREFIX, REMAINDER_SCALE
from research.telechat.training.optimizer import TelechatAdamW
from research.telechat.training.remainder import joined, low_part


@pytest.fixture(scope="module")
def figures():
    return benchmark.distances(200, 256)


@pytest.mark.parametrize("kind", ["float32", "bfloat16 and remainder", "float16 and remainder"])
def test_master_weights_travel_the_exact_distance(kind, figures):
    share, error = figures[kind]
    assert abs(share - 1) <= 1e-3 and error <= 1e-3


def test_plain_bfloat16_does_not(figures):
    share, error = figures["bfloat16"]
    assert share < 0.2 and error > 0.5


def test_exact_reference_against_a_second_one():
    """The benchmark's float64 steps against the float32 optimizer of the recipes, on gradients of very unequal size."""
    rng = np.random.default_rng(3)
    start = benchmark.bfloat16(rng.normal(0, 0.02, 40))
    gradients = benchmark.bfloat16(rng.normal(0, 1, (6, 40)) * 10.0 ** rng.integers(-4, 3, (6, 1)))
    parameter = Parameter(Tensor(start), name="p")
    optimizer = TelechatAdamW([parameter], learning_rate=nn.CosineDecayLR(0.0, 1e-5, 6), betas=(0.9, 0.95), eps=1e-8)
    for gradient in gradients:
        optimizer((Tensor(gradient),))
    np.testing.assert_allclose(parameter.asnumpy(), benchmark.exact_adamw(start, gradients), atol=3e-9)


class Split(nn.Cell):
    """master -> (16 bits, remainder, both joined)."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def construct(self, master):
        stored = master.astype(self.dtype)
        remainder = low_part(master, stored)
        return stored.astype(ms.float32), remainder, joined(stored, remainder)


@pytest.mark.parametrize(("dtype", "relative"), [(ms.bfloat16, 2.0 ** -20), (ms.float16, 2.0 ** -23)])
def test_bound_of_the_error(dtype, relative):
    """|p + s / 4096 - w| <= relative |w| + 2^-37, as training/remainder.py has it, from 2^-14 to 2^12."""
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
    rng = np.random.default_rng(0)
    master = (rng.choice([-1, 1], 20000) * 2.0 ** rng.uniform(-14, 12, 20000)).astype(np.float32)
    stored, remainder, found = (value.asnumpy() for value in Split(dtype)(Tensor(master)))
    errors = np.abs(found.astype(np.float64) - master)
    assert (errors <= relative * np.abs(master) + 2.0 ** -37).all()
    assert np.abs(stored - master).max() > 1e3 * errors.max() / 2 and remainder.dtype == np.float16
    if dtype == ms.bfloat16:
        assert (benchmark.bfloat16(found) != stored).mean() < 1e-3           # but close to half way between two
        np.testing.assert_array_equal(benchmark.bfloat16(master), stored)


def test_huge_weights_keep_a_finite_remainder():
    master = np.array([2.0 ** 12 + 15.9, -2.0 ** 20 - 4000, 0.0], np.float32)
    _, remainder, found = Split(ms.bfloat16)(Tensor(master))
    assert np.isfinite(remainder.asnumpy()).all() and found.asnumpy()[2] == 0
    assert (np.abs(found.asnumpy() - master) <= 2.0 ** -8 * np.abs(master)).all()


def test_only_16_bit_parameters_have_a_remainder_and_it_begins_at_zero():
    parameters = [Parameter(Tensor(np.ones(3, np.float32)).astype(dtype), name=name)
                  for name, dtype in (("matrix", ms.bfloat16), ("norm", ms.float32))]
    groups = [{"params": parameters[:1], "weight_decay": 0.1}, {"params": parameters[1:], "weight_decay": 0.0},
              {"order_params": parameters}]
    optimizer = TelechatAdamW(groups, learning_rate=1e-3, weight_decay=0.1, master_weights="remainder")
    names = [parameter.name for parameter in optimizer.get_parameters()]
    assert [name for name in names if name.startswith(REMAINDER_PREFIX)] == [f"{REMAINDER_PREFIX}matrix"]
    remainder = optimizer.remainders[0]
    assert remainder.dtype == ms.float16 and not remainder.asnumpy().any() and not optimizer.fused
    optimizer((Tensor(np.ones(3, np.float32)).astype(ms.bfloat16), Tensor(np.ones(3, np.float32))))
    decayed, plain = np.float32(1 - 1e-3 * 0.1 - 1e-3), np.float32(1 - 1e-3)      # the first step is the learning rate
    low = remainder.asnumpy().astype(np.float32) / REMAINDER_SCALE
    np.testing.assert_allclose(parameters[0].astype(ms.float32).asnumpy() + low, decayed, atol=2e-6)
    np.testing.assert_allclose(parameters[1].asnumpy(), plain, atol=1e-6)
