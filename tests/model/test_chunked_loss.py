"""Head and loss in chunks of rows give the loss and the gradients of all rows together, by NumPy in float64."""
import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn
from mindspore.ops import composite as C

from research.telechat.model.chunked_loss import ChunkedLoss
from research.telechat.model.loss import CrossEntropyLoss, unit
from research.telechat.spec.loss_chunks import LARGEST, MOST, rows_at_once
from research.telechat.telechat import TelechatHead
from research.telechat.telechat_config import TelechatConfig

ROWS, HIDDEN, VOCAB, CHUNK = 40, 16, 50, 12                # chunks of 12, 12, 12 and 4 rows


def by_numpy(x, weight, labels, scale):
    """(sum, number, gradients of the sum for x and for weight)."""
    x, weight = x.astype(np.float64), weight.astype(np.float64)
    logits = scale * (x @ weight.T)
    probability = np.exp(logits - logits.max(-1, keepdims=True))
    probability /= probability.sum(-1, keepdims=True)
    counts = labels >= 0
    losses = -np.log(probability[np.arange(len(labels)), np.where(counts, labels, 0)])
    gradient = probability - np.eye(weight.shape[0])[np.where(counts, labels, 0)]
    gradient *= scale * counts[:, None]
    return losses[counts].sum(), counts.sum(), gradient @ weight, gradient.T @ x


class _Net(nn.Cell):
    def __init__(self, loss, weight, parts):
        super().__init__()
        self.loss, self.weight, self.parts = loss, Parameter(Tensor(weight), name="head.weight"), parts

    def construct(self, x, labels):
        if self.parts:
            return self.loss(x, self.weight, labels)
        return self.loss.loss(self.loss.head(x, self.weight), labels)


@pytest.mark.parametrize("in_chunks", [True, False], ids=["in chunks", "at once"])
def test_loss_and_gradients(in_chunks):
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
    config = TelechatConfig(num_layers=1, hidden_size=HIDDEN, num_heads=2, vocab_size=VOCAB, seq_length=ROWS,
                            compute_dtype="float32", logits_scale=0.5, loss_chunk_rows=CHUNK)
    rng = np.random.default_rng(1)
    x, weight = (rng.normal(size=(size, HIDDEN)).astype(np.float32) for size in (ROWS, VOCAB))
    labels = rng.integers(0, VOCAB, ROWS).astype(np.int32)
    labels[5:19] = config.ignore_token_id                  # one chunk without a label that counts, two with few
    loss = ChunkedLoss(config, TelechatHead(config), CrossEntropyLoss(config))
    assert loss.rows_of_chunk(ROWS) == (CHUNK, ROWS)
    net = _Net(loss, weight, in_chunks)
    sens = (Tensor(3.0, ms.float32), Tensor([0.0], ms.float32))
    (of_x, _), of_weight = C.GradOperation(get_all=True, get_by_list=True, sens_param=True)(
        net, ms.ParameterTuple([net.weight]))(Tensor(x), Tensor(labels), sens)
    total, count = net(Tensor(x), Tensor(labels))
    expected = by_numpy(x, weight, labels, 0.5)
    size = unit(ROWS)
    assert float(total.asnumpy()) * size == pytest.approx(expected[0], rel=1e-6)
    assert float(count.asnumpy()[0]) * size == expected[1] == 26
    np.testing.assert_allclose(of_x.asnumpy() * size / 3, expected[2], atol=1e-6)
    np.testing.assert_allclose(of_weight[0].asnumpy() * size / 3, expected[3], atol=2e-6)
    assert not np.any(of_x.asnumpy()[5:19])


def test_rows_of_a_chunk():
    assert rows_at_once(2048, 160256, 0) == 2048
    assert rows_at_once(2048, 160256, 500) == 500 and rows_at_once(300, 160256, 500) == 300
    assert rows_at_once(2048, 160256, None) == 512         # 5 chunks of 410, in whole units of 128
    assert rows_at_once(2048, LARGEST // 2048, None) == 2048
    assert rows_at_once(6400, 10, 1) == 100 == 6400 // MOST
    assert rows_at_once(7, 10, None) == 7


def test_unit():
    """The least power of two from a number on: nothing that is divided by it is rounded."""
    assert [unit(tokens) for tokens in (1, 2, 3, 40, 64, 65)] == [1, 2, 4, 64, 64, 128]
