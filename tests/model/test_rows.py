"""The order of rows under context parallelism is invisible: same logits, loss and gradients as without it.

MindSpore cuts nothing on a CPU, but the order that model/rows.py makes follows from the plan alone.
"""
import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from model_fixtures import loss_and_gradients

from research.telechat.model import kernels
from research.telechat.model.rows import HeadsToRows, RowsToHeads, RowsToTokens, TokensToRows
from research.telechat.telechat import TelechatForCausalLM
from research.telechat.telechat_config import TelechatConfig

SIZES = dict(num_layers=2, hidden_size=32, num_heads=4, n_kv_heads=2, intermediate_size=48, vocab_size=64,
             seq_length=16, amp_level="O0", use_flash_attention=False, initializer_range=0.3)


@pytest.fixture(scope="module", autouse=True)
def graph_mode():
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")


def config(dp=1, cp=1, **keys):
    return TelechatConfig(**{**SIZES, **keys}, parallel_config={"data_parallel": dp, "context_parallel": cp})


def test_rows_of_a_device_stand_side_by_side():
    """2 sequences a device, halves of 4 tokens: device (data d, context c) has rows 8 (2 d + c) onwards."""
    tokens = np.arange(4 * 8, dtype=np.int32).reshape(4, 8)
    rows = TokensToRows(config(2, 2))(Tensor(tokens)).asnumpy()
    for data in range(2):
        for part in range(2):
            expected = tokens[2 * data:2 * data + 2, 4 * part:4 * part + 4].ravel()
            np.testing.assert_array_equal(rows[8 * (2 * data + part):][:8], expected)


class Ways(nn.Cell):
    """Tokens as rows, their features as tokens and as heads, and these as rows again: one graph for all of them."""

    def __init__(self, plan, batch, seq, heads):
        super().__init__()
        self.to_rows, self.to_tokens = TokensToRows(plan), RowsToTokens(plan)
        self.to_heads, self.from_heads = RowsToHeads(plan), HeadsToRows(plan)
        self.batch, self.seq, self.heads = batch, seq, heads

    def construct(self, tokens, features):
        by_head = self.to_heads(features, self.batch, self.seq, self.heads)
        return (self.to_rows(tokens), self.to_tokens(features, self.batch, self.seq), by_head,
                self.from_heads(by_head))


def place_of_rows(dp, cp, batch, seq):
    """The number of each token, in the order of rows, counted by hand: by data rank, by context rank, by sequence."""
    return np.arange(batch * seq).reshape(dp, batch // dp, cp, seq // cp).transpose(0, 2, 1, 3).ravel()


@pytest.mark.parametrize("dp, cp, batch", [(1, 1, 3), (2, 2, 4), (1, 4, 2), (2, 2, 2), (4, 2, 4)])
def test_every_way_has_a_way_back(dp, cp, batch):
    plan, seq, heads, dim = config(dp, cp), 8, 4, 8
    tokens = np.arange(batch * seq, dtype=np.int32).reshape(batch, seq)
    expected_rows = place_of_rows(dp, cp, batch, seq)
    features = expected_rows[:, None].astype(np.float32) * 100 + np.arange(heads * dim, dtype=np.float32)
    rows, back, by_head, again = (each.asnumpy() for each in Ways(plan, batch, seq, heads)(
        Tensor(tokens), Tensor(features)))
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_array_equal(back[..., 0], tokens.astype(np.float32) * 100)
    expected = (tokens[:, None, :, None].astype(np.float32) * 100
                + np.arange(heads * dim, dtype=np.float32).reshape(1, heads, 1, dim))
    np.testing.assert_array_equal(by_head, expected)
    np.testing.assert_array_equal(again, features)


@pytest.mark.slow
def test_model_computes_the_same(monkeypatch):
    monkeypatch.setattr(kernels, "fused_on_cpu", lambda _config: False)    # the same operators for both orders
    rng = np.random.default_rng(0)
    ids = Tensor(rng.integers(0, 64, (4, 17)).astype(np.int32))
    labels = Tensor(np.where(rng.random((4, 17)) < 0.3, -100, ids.asnumpy()).astype(np.int32))
    results = []
    weights = None
    for plan in (config(), config(2, 2)):
        model = TelechatForCausalLM(plan)
        if weights is None:
            weights = {p.name: p.asnumpy().copy() for p in model.get_parameters()}
        for p in model.get_parameters():
            p.set_data(Tensor(weights[p.name]))
        model.set_train(False)
        logits = model(ids[:, :16]).asnumpy()
        model.set_train(True)
        results.append((logits, *loss_and_gradients(model, ids, labels)))
    np.testing.assert_allclose(results[1][0], results[0][0], atol=1e-5)
    assert results[1][1] == pytest.approx(results[0][1], abs=1e-6)
    for one, other in zip(results[0][2], results[1][2]):
        np.testing.assert_allclose(other, one, atol=1e-5)
