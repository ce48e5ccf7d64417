"""Decoder layers that are alike share one graph, and compute what they compute without sharing."""
import mindspore as ms
import model_fixtures
import numpy as np
import pytest
from mindspore import nn
from model_fixtures import HF_CONFIGS, build_model, random_official

from research.telechat.model import graph_sharing as model_graph_sharing
from research.telechat.model.graph_sharing import shared_graph_key
from research.telechat.telechat_config import TelechatConfig
from research.telechat.telechat_transformer import TelechatDecodeLayer

HF = {**HF_CONFIGS["12b"], "n_layer": 3}


def layer(training=True, **settings):
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
    cell = TelechatDecodeLayer(TelechatConfig.from_hf_config(HF, **settings), 0)
    cell.set_train(training)
    return cell


def loss_and_gradients():
    model = build_model(HF, random_official(HF))
    model.set_train(True)
    ids = ms.Tensor(np.random.default_rng(0).integers(4, 97, (2, 17)).astype(np.int32))
    loss, gradients = model_fixtures.loss_and_gradients(model, ids, ids)
    return loss, {p.name: gradient for p, gradient in zip(model.trainable_params(), gradients)}


@pytest.mark.slow
def test_gradients_are_those_of_separate_graphs(parsed, monkeypatch):
    shared_loss, shared = loss_and_gradients()
    assert len({id(cell) for cell in parsed}) == 1, "the layers were compiled one by one"
    parsed.clear()
    monkeypatch.setattr(model_graph_sharing, "shared_graph_key", lambda cell: None)
    loss, separate = loss_and_gradients()
    assert len({id(cell) for cell in parsed}) == 3
    assert shared_loss == loss
    assert sorted(shared) == sorted(separate) and len(shared) == 3 * 10 + 3
    for name, gradient in separate.items():
        assert np.abs(gradient).max() > 0
        np.testing.assert_allclose(shared[name], gradient, rtol=1e-6, atol=1e-9, err_msg=name)


def test_equal_layers_have_one_key():
    assert shared_graph_key(layer()) == shared_graph_key(layer())
    assert shared_graph_key(layer()) == layer().cell_init_args
    assert shared_graph_key(layer()).startswith("lazy_inline_")


def test_what_differs_has_another_key():
    key = shared_graph_key(layer())
    assert key != shared_graph_key(layer(training=False))
    assert key != shared_graph_key(layer(param_init_type="float16"))
    frozen = layer()
    frozen.attention.wq.weight.requires_grad = False
    assert key != shared_graph_key(frozen)
    other = layer()
    other.feed_forward.w1 = nn.Dense(32, 48)
    assert key != shared_graph_key(other)
    first = layer()
    first.add_flags_recursive(is_first_iteration=False)
    assert key != shared_graph_key(first)


def test_random_numbers_and_recomputation_are_not_shared():
    dropping = layer(hidden_dropout_prob=0.1)
    assert shared_graph_key(dropping) is None and not hasattr(dropping, "cell_init_args")
    assert shared_graph_key(layer(training=False, hidden_dropout_prob=0.1)) is not None
    again = layer()
    again.recompute()
    assert shared_graph_key(again) is None
    partly = layer()
    partly.feed_forward.mul.recompute()
    assert shared_graph_key(partly) is None


def test_sharing_can_be_switched_off():
    assert hasattr(layer(), "cell_init_args")
    assert not hasattr(layer(share_layer_graphs=False), "cell_init_args")


def test_several_devices_have_separate_graphs(monkeypatch):
    cell = layer()
    monkeypatch.setattr(ms, "get_auto_parallel_context", lambda key: "semi_auto_parallel")
    assert shared_graph_key(cell) is None
