"""Where 16 bits end: types of softmax, residual stream, norm, rotation and loss next to 16-bit matrix products."""
import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from research.telechat.model import rotary
from research.telechat.model.loss import CrossEntropyLoss
from research.telechat.model.mask import AttentionMask, forbidden_score
from research.telechat.telechat import TelechatHead
from research.telechat.telechat_config import TelechatConfig
from research.telechat.telechat_layer import RMSNorm, TelechatEmbedding
from research.telechat.telechat_transformer import DotProductAttention, TelechatDecodeLayer

SIZES = dict(num_layers=1, hidden_size=16, num_heads=2, intermediate_size=24, vocab_size=32, seq_length=8)
TYPES = dict(compute_dtype="float16", param_init_type="float16", res_dtype="float32",
             softmax_compute_type="float32", layernorm_compute_type="float32", rotary_dtype="float32")


@pytest.fixture(scope="module", autouse=True)
def one_operator_after_the_other():
    ms.set_context(mode=ms.PYNATIVE_MODE, device_target="CPU")
    yield
    ms.set_context(mode=ms.GRAPH_MODE)


def config(**keys):
    return TelechatConfig(**{**SIZES, **TYPES, "use_flash_attention": False, **keys})


class Seen(nn.Cell):
    """Notes the types of what it is given and returns the result of `of`."""

    def __init__(self, of):
        super().__init__()
        self.of, self.types = of, []

    def construct(self, *inputs):
        self.types.append([str(one.dtype) for one in inputs if isinstance(one, Tensor)])
        return self.of(*inputs)


def values(*shape, dtype=ms.float16, size=1.0):
    return Tensor((size * np.random.default_rng(0).normal(size=shape)).astype(np.float32), dtype)


def test_softmax_is_in_its_own_type():
    attend = DotProductAttention(config())
    attend.softmax, attend.add_mask = Seen(attend.softmax), Seen(attend.add_mask)
    x = values(1, 2, 4, 8)
    result = attend(x, x, x, Tensor(np.zeros((1, 1, 4, 4), np.float32)))
    assert attend.softmax.types == [["Float32"]] and result.dtype == ms.float16
    assert attend.add_mask.types == [["Float32", "Float32"]]        # not left to promotion


def test_residual_stream_is_in_its_own_type():
    """Small summands survive next to large ones, which 16 bits would swallow; each sum adds what came before it."""
    settings = config()
    layer = TelechatDecodeLayer(settings, 0)
    layer.attention.construct = lambda x, *_: x * 0 + 0.25
    layer.feed_forward.construct = lambda x: x * 0 + 0.5
    stream = Tensor(np.full((8, 16), 4096, np.float32))
    result = layer(stream, (1, 8), (None, None), None)
    assert result.dtype == ms.float32
    np.testing.assert_array_equal(result.asnumpy(), 4096.75)
    assert TelechatEmbedding(settings)(Tensor(np.arange(8, dtype=np.int32))).dtype == ms.float32
    layer.out_dtype = ms.float16                       # on the way to the next pipeline stage
    assert layer(stream, (1, 8), (None, None), None).dtype == ms.float16


def test_norm_is_in_its_own_type():
    """Squares that float16 cannot hold; the result is in the type of the matrix products."""
    norm = RMSNorm(config())
    x = np.full((2, 16), 1000, np.float32)
    result = norm(Tensor(x))
    assert result.dtype == ms.float16
    np.testing.assert_allclose(result.asnumpy(), 1.0, rtol=1e-3)
    assert norm.kernel.eps == config().rms_norm_eps > 0
    tiny = RMSNorm(config(rms_norm_eps=1e-4))(Tensor(np.full((1, 16), 1e-2, np.float32))).asnumpy()
    np.testing.assert_allclose(tiny, 0.5 ** 0.5, rtol=1e-3)               # mean of squares and epsilon alike


def test_logits_and_loss_are_float32():
    """Logits are no sums in 16 bits that are scaled; large ones do not overflow, and nothing counted is no loss."""
    settings = config(logits_scale=0.5)
    head = TelechatHead(settings)
    head.mul = Seen(head.mul)
    assert head(values(4, 16), values(32, 16)).dtype == ms.float32 and head.mul.types[0][0] == "Float32"
    loss = CrossEntropyLoss(settings)
    logits = np.zeros((2, 32), np.float32)
    logits[0, 3], logits[1, 5] = 300, 400
    for label, expected in ((3, 0.0), (4, 300.0), (settings.ignore_token_id, 0.0)):
        labels = Tensor(np.array([label, settings.ignore_token_id], np.int32))
        total, count = loss(Tensor(logits), labels)
        assert float(total.asnumpy()) / float(count.asnumpy()[0]) == pytest.approx(expected, abs=1e-6)
        total, count, gradient = loss.with_gradient(Tensor(logits), labels)
        assert np.isfinite(gradient.asnumpy()).all() and float(total.asnumpy().sum()) == pytest.approx(expected)


@pytest.mark.parametrize("softmax_type, value", [("float32", -1e30), ("float16", -3e4)])
def test_forbidden_scores(softmax_type, value):
    """Far below every score and still a number, so that a query without any key is not NaN."""
    settings = config(softmax_compute_type=softmax_type)
    mask = AttentionMask(settings).construct(Tensor(np.zeros((1, 4), np.int32)), None, None)
    assert forbidden_score(settings.softmax_compute_type) == value and str(mask.dtype) == softmax_type.capitalize()
    found = mask.asnumpy()[0, 0]
    assert np.isfinite(found).all() and np.array_equal(found < -1e4, np.triu(np.ones((4, 4), bool), 1))
    assert not found[np.tril_indices(4)].any()


@pytest.mark.parametrize("compute, tables, expected", [
    ("float16", "float16", ms.float16), ("float16", "float32", ms.float32), ("float32", "float16", ms.float32)])
def test_rotation_is_in_16_bits_only_where_both_are(compute, tables, expected):
    assert rotary.rotation_dtype(config(compute_dtype=compute, rotary_dtype=tables)) == expected
