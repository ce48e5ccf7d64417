"""Ring attention is refused where the device's kernel reads a zero-width band as the diagonal. The kernel is the
interpreter's, by both readings."""
import numpy as np
import pytest
from mindformers.tools.register import MindFormerConfig

from research.telechat.common.errors import ConfigError
from research.telechat.interpret import attention
from research.telechat.model import kernels
from research.telechat.run.preflight import check_ring_attention


class Result:
    def __init__(self, value):
        self.value = value

    def asnumpy(self):
        return self.value


@pytest.fixture
def kernel(monkeypatch):
    """A function from the reading to the kernel that was asked; `asked` counts."""
    asked = []

    def use(empty_band):
        def make(head_num, keep_prob, scale_value, pre_tokens, next_tokens, inner_precise, input_layout, sparse_mode):
            def run(*inputs):
                asked.append(sparse_mode)
                arrays = [one.float().asnumpy() if one is not None and "Float" in str(one.dtype) else
                          None if one is None else one.asnumpy() for one in inputs]
                return [Result(value) for value in attention.flash_attention(
                    None, *arrays, head_num, keep_prob, scale_value, pre_tokens, next_tokens, inner_precise,
                    attention.LAYOUTS.index(input_layout), sparse_mode, empty_band)]
            return run
        monkeypatch.setattr(kernels, "FlashAttentionScore", make)
        monkeypatch.setattr(kernels._NarrowBand, "__call__", kernels._NarrowBand.construct)    # NumPy is not compiled
        return asked
    return use


def job(ring=True, cards=2, **keys):
    return MindFormerConfig(use_parallel=True, parallel_config={"context_parallel": cards},
                            model={"model_config": {"use_ring_attention": ring}}, **keys)


def test_the_diagonal_is_refused(kernel):
    asked = kernel(empty_band=False)
    with pytest.raises(ConfigError, match="sees keys in a zero-width band"):
        check_ring_attention(job())
    assert asked == [4]


def test_an_empty_band_is_accepted(kernel):
    asked = kernel(empty_band=True)
    check_ring_attention(job())
    assert asked == [4]


def test_nothing_is_asked_where_nothing_depends_on_it(kernel, monkeypatch):
    asked = kernel(empty_band=False)
    check_ring_attention(job(ring=False))
    check_ring_attention(job(cards=1))
    monkeypatch.setenv("MS_SIMULATION_LEVEL", "0")
    check_ring_attention(job())
    assert not asked and np.isfinite(kernels.NOTHING)
