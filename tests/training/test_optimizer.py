"""AdamW and clipping on the CPU do what MindFormers' own do."""
import mindspore as ms
import numpy as np
import pytest
from mindformers.core.clip_grad import ClipGradNorm as ComposedClipGradNorm
from mindformers.core.optim.adamw import AdamW
from mindformers.tools.register import MindFormerConfig
from mindspore import Parameter, Tensor, nn

from research.telechat.run.job import adapt_to_cpu
from research.telechat.training.optimizer import ClipGradNorm, TelechatAdamW, is_overflow

pytestmark = pytest.mark.matrix

SHAPES = [(30, 40), (40,), (7, 9)]
STEPS = 12


@pytest.fixture(autouse=True)
def cpu():
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")


def random_tensors(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return tuple(Tensor((scale * rng.normal(size=shape)).astype(np.float32)) for shape in SHAPES)


def trained(optimizer_class, grouped, dtype=ms.float32):
    """(parameters, first moments, second moments) after STEPS steps whose gradients differ by orders of magnitude."""
    parameters = [Parameter(value.astype(dtype), name=f"p{i}") for i, value in enumerate(random_tensors(0))]
    groups = [{"params": parameters[:1], "weight_decay": 0.1}, {"params": parameters[1:], "weight_decay": 0.0},
              {"order_params": parameters}]
    rate = nn.CosineDecayLR(0.0, 1e-2, STEPS) if grouped else 1e-2
    optimizer = optimizer_class(groups if grouped else parameters, learning_rate=rate, betas=(0.9, 0.95), eps=1e-8,
                                weight_decay=0.1)
    for step in range(STEPS):
        optimizer(random_tensors(step + 1, 10.0 ** (step % 5 - 3)))
    return [[p.astype(ms.float32).asnumpy() for p in group]
            for group in (optimizer.parameters, optimizer.exp_avg, optimizer.exp_avg_sq)], optimizer


@pytest.mark.parametrize("grouped", [False, True], ids=["constant rate", "schedule and decay by group"])
def test_is_adamw(grouped):
    expected, _ = trained(AdamW, grouped)
    found, optimizer = trained(TelechatAdamW, grouped)
    assert optimizer.fused and int(optimizer.global_step.asnumpy()[0]) == STEPS
    start = random_tensors(0)
    for ours, theirs, before in zip(found[0], expected[0], start):
        assert np.abs(theirs - before.asnumpy()).max() > 1e-2                     # it moved
        np.testing.assert_allclose(ours, theirs, atol=5e-6)
    for ours, theirs in zip(found[1] + found[2], expected[1] + expected[2]):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert [p.name for p in optimizer.exp_avg] == [f"adam_m.p{i}" for i in range(3)]


def test_other_types_are_left_to_mindformers():
    found, optimizer = trained(TelechatAdamW, False, ms.float16)
    assert not optimizer.fused
    for ours, theirs in zip(found[0], trained(AdamW, False, ms.float16)[0][0]):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_clips_as_mindformers(scale):
    gradients = random_tensors(3, scale)
    ours, norm = ClipGradNorm(1.0)(gradients)
    theirs, expected = ComposedClipGradNorm(1.0)(gradients)
    truth = np.sqrt(sum(np.square(g.asnumpy().astype(np.float64)).sum() for g in gradients))
    np.testing.assert_allclose([norm.asnumpy()[0], expected.asnumpy()[0]], truth, rtol=1e-6)
    for found, right in zip(ours, theirs):
        np.testing.assert_allclose(found.asnumpy(), right.asnumpy(), rtol=1e-5)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("index", range(3))
def test_overflow_is_found_anywhere(bad, index):
    gradients = list(random_tensors(3))
    clip = ClipGradNorm(1.0)
    assert not bool(is_overflow(clip.norm(tuple(gradients))))
    values = gradients[index].asnumpy().copy()
    values.flat[-1] = bad
    gradients[index] = Tensor(values)
    assert bool(is_overflow(clip.norm(tuple(gradients))))


@pytest.mark.parametrize(("device", "settings", "expected"), [
    ("CPU", {"type": "AdamW"}, "TelechatAdamW"), ("Ascend", {"type": "AdamW"}, "AdamW"),
    ("CPU", {"type": "AdamW", "use_fused": True}, "AdamW"), ("CPU", {"type": "Came"}, "Came")])
def test_recipes_get_it_on_the_cpu_only(device, settings, expected):
    config = MindFormerConfig(context={"device_target": device}, optimizer=settings, use_parallel=False)
    adapt_to_cpu(config)
    assert config.optimizer.type == expected
