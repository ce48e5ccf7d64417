"""Training layer by layer takes the steps that training as a whole takes, and is chosen where it can."""
import mindspore as ms
import numpy as np
import pytest
from mindformers.pet import get_pet_model
from mindformers.pet.pet_config import LoraConfig
from mindformers.wrapper.wrapper import DataOrderWrapperCell
from mindspore import Tensor, nn
from model_fixtures import HF_CONFIGS, build_model, random_official

from research.telechat.common.errors import ConfigError
from research.telechat.training.layerwise import DEEP, LayerByLayer, goes_by_layer, obstacle
from research.telechat.training.optimizer import TelechatAdamW
from research.telechat.training.step import TelechatTrainOneStepCell, step_values

pytestmark = pytest.mark.matrix

STEPS = 4
DOCUMENTS = Tensor(np.array([[5, 16, 16], [9, 12, 16]], np.int32))


def build_step(family="12b", layers=3, lora=None, by_group=False, manager=None, rate=None, prepare=None, settings=None,
               **model_settings):
    """A training step of a random model, on which `prepare` was called; its weights are the same in every call."""
    hf_config = {**HF_CONFIGS[family], "n_layer": layers}
    ms.set_seed(1)
    network = build_model(hf_config, random_official(hf_config), **model_settings)
    if lora:
        network = get_pet_model(network, LoraConfig(lora_rank=2, lora_alpha=4, lora_dropout=0.1, target_modules=lora))
        rng = np.random.default_rng(3)
        for parameter in network.trainable_params():
            parameter.set_data(Tensor(rng.normal(0, 0.1, parameter.shape).astype(np.float32)))
    network.set_train(True)
    if prepare:
        prepare(network)
    trained = network.trainable_params()
    groups = [{"params": [p for p in trained if "norm" not in p.name], "weight_decay": 0.1},
              {"params": [p for p in trained if "norm" in p.name], "weight_decay": 0.0}, {"order_params": trained}]
    rate = rate or nn.CosineDecayLR(0.0, 1e-2, 10)     # eps: large, so that rounding near 0 does not turn steps around
    optimizer = TelechatAdamW(groups if by_group else trained, rate, weight_decay=0.01, eps=1e-4)
    settings = {"use_clip_grad": True, "max_grad_norm": 1.0, "scale_sense": manager or 1.0, **(settings or {})}
    step = TelechatTrainOneStepCell(network, optimizer, **settings)
    return step.set_train()


def batch(number, shape=(2, 17)):
    rng = np.random.default_rng(number)
    return [Tensor(rng.integers(4, 97, shape).astype(np.int32)) for _ in range(2)]


def history(step, more=(), between=None, shapes=()):
    """What each of some steps returned, and parameters and moments after them, by name.

    between(step, number): called after each step; shapes: of the first batches, where they are unusual.
    """
    rows = []
    for number in range(STEPS):
        shape = shapes[number] if number < len(shapes) else (2, 17)
        rows.append(step_values(step(*batch(number, shape), *more)))
        if between:
            between(step, number)
    optimizer = step.optimizer
    # MindSpore renames moments as it compiles a step with a constant rate, whose parameter exists twice.
    everything = (*optimizer._parameters, *optimizer.exp_avg, *optimizer.exp_avg_sq)
    values = {p.name.replace("optimizer.", ""): p.asnumpy() for p in everything}
    return rows, values


def compare(more=(), between=None, shapes=(), rounding=1e-4, **arguments):
    """Both ways from the same start; returns the step that goes layer by layer, its rows, and what it has changed."""
    whole = build_step(train_layer_by_layer=False, **arguments)
    expected_rows, expected = history(whole, more, between, shapes)
    step = build_step(train_layer_by_layer=True, **arguments)
    before = {p.name: p.asnumpy().copy() for p in step.network.get_parameters()}
    rows, found = history(step, more, between, shapes)
    assert isinstance(step.layer_by_layer, LayerByLayer) and whole.layer_by_layer is False
    assert int(step.optimizer.global_step.asnumpy()[0]) == int(whole.optimizer.global_step.asnumpy()[0])
    for row, right in zip(rows, expected_rows):
        assert row["overflow"] == right["overflow"] and row["loss_scale"] == right["loss_scale"]
        assert row["loss"] == pytest.approx(right["loss"], rel=rounding / 10) and row["lr"] == right["lr"]
        if "global_norm" not in right:
            assert "global_norm" not in row
        elif row["overflow"]:
            assert not np.isfinite([row["global_norm"], right["global_norm"]]).any()
        else:
            assert row["global_norm"] == pytest.approx(right["global_norm"], rel=rounding)
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert np.linalg.norm(found[name] - value) <= rounding * np.linalg.norm(value), name
    changed = {p.name for p in step.network.get_parameters() if not np.array_equal(p.asnumpy(), before[p.name])}
    return step, rows, changed


@pytest.mark.slow
def test_same_steps_with_decay_by_group():
    """All parameters, moments, losses, norms and rates; layers of one kind have one set of graphs."""
    step, rows, changed = compare(by_group=True)
    assert step.layer_by_layer.kinds == 1
    assert changed == {p.name for p in step.network.get_parameters()}
    assert rows[-1]["loss"] < rows[0]["loss"] and len({row["lr"] for row in rows}) == STEPS


@pytest.mark.slow
def test_same_steps_with_tied_embeddings_documents_and_an_adapter_with_dropout():
    """The base stays, each layer has its own masks, and MindFormers' wrappers are looked through."""
    step, _, changed = compare(family="7b", lora=".*wq|.*w2", document_boundaries=True, more=(DOCUMENTS,))
    assert changed == {p.name for p in step.network.trainable_params()} and len(changed) == 3 * 2 * 2


@pytest.mark.slow
def test_same_steps_with_tied_embeddings_that_are_trained_and_dropout():
    step, _, changed = compare(family="7b", hidden_dropout_prob=0.1, attention_dropout_prob=0.1)
    assert changed == {p.name for p in step.network.get_parameters()}


def recompute_layers(network):
    for layer in network.model.layers:
        layer.recompute()


def evaluate(step, number):
    if number == 1:
        step.network.set_train(False)
        assert step.network(batch(9)[0]).shape == (2, 17, 97)
        step.set_train(True)


@pytest.mark.slow
def test_same_steps_with_recomputation_embedding_dropout_evaluation_and_other_batches():
    compare(family="7b", layers=2, embed_dropout_prob=0.1, hidden_dropout_prob=0.1, prepare=recompute_layers,
            between=evaluate, shapes=[(2, 17), (3, 9)])


def freeze_first_layer(network):
    for parameter in (*network.model.layers[0].get_parameters(), *network.model.tok_embeddings.get_parameters()):
        parameter.requires_grad = False


@pytest.mark.slow
def test_same_steps_with_frozen_parts_a_loss_scale_that_is_set_and_nothing_clipped():
    def rescale(step, number):
        step.set_sense_scale(Tensor(float(4 ** number), ms.float32))
    step, _, changed = compare(layers=2, prepare=freeze_first_layer, between=rescale, rate=1e-3,
                               settings={"use_clip_grad": False})
    assert step.layer_by_layer.kinds == 2
    assert changed == {p.name for p in step.network.trainable_params()} and len(changed) == 10 + 2


@pytest.mark.slow
def test_same_steps_in_float16():
    compare(layers=2, compute_dtype="float16", manager=1024.0, rounding=2e-2)


@pytest.mark.slow
def test_overflow_and_spikes_are_skipped_alike():
    """A loss scale beyond float32 lets gradients overflow until it has come down; then norms over 80 are skipped."""
    manager = nn.DynamicLossScaleUpdateCell(loss_scale_value=2.0 ** 127, scale_factor=2 ** 40, scale_window=1000)
    step, rows, _ = compare(manager=manager, logits_scale=8.0, settings={"use_skip_data_by_global_norm": True,
                                                                         "global_norm_spike_threshold": 80.0})
    assert [row["overflow"] for row in rows][:1] == [True] and not rows[-1]["overflow"]
    taken = int(step.optimizer.global_step.asnumpy()[0])
    assert 0 < taken == sum(not row["overflow"] and row["global_norm"] < 80.0 for row in rows) < len(rows) - 1


@pytest.mark.slow
def test_deep_models_go_layer_by_layer_and_one_layer_is_parsed(parsed):
    step = build_step(layers=DEEP + 1)
    losses = [step_values(step(*batch(0)))["loss"] for _ in range(2)]
    assert isinstance(step.layer_by_layer, LayerByLayer) and losses[1] < losses[0]
    assert len({id(cell) for cell in parsed}) == 1


@pytest.mark.slow
def test_an_interrupted_update_is_not_trained_on(monkeypatch):
    step = build_step(layers=1, train_layer_by_layer=True)
    step(*batch(0))

    def interrupt(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(step.layer_by_layer, "update_rest", interrupt)
    with pytest.raises(KeyboardInterrupt):
        step(*batch(1))
    with pytest.raises(RuntimeError, match="interrupted while it changed the weights"):
        step(*batch(2))


def test_skipping_by_norm_needs_the_norm():
    with pytest.raises(ConfigError, match=r"runner_wrapper\.use_clip_grad is not, without which there is no norm"):
        build_step(layers=1, settings={"use_clip_grad": False, "use_skip_data_by_global_norm": True})


def test_others_do_not():
    inputs = batch(0)
    assert not goes_by_layer(build_step(layers=DEEP), inputs)
    assert goes_by_layer(build_step(layers=DEEP + 1), inputs)
    assert not goes_by_layer(build_step(layers=DEEP + 1, train_layer_by_layer=False), inputs)
    assert goes_by_layer(build_step(layers=1, train_layer_by_layer=True), inputs)


@pytest.mark.parametrize(("change", "words"), [
    (lambda step: setattr(step, "cpu", False), "only a CPU"),
    (lambda step: setattr(step, "local_norm", True), "local_norm is set"),
    (lambda step: setattr(step, "accumulation", object()), "gradients are accumulated"),
    (lambda step: setattr(step, "network", nn.MicroBatchInterleaved(step.network, 2)), "MicroBatchInterleaved is ar"),
    (lambda step: setattr(step.optimizer, "fused", False), "the optimizer is not AdamW on float32"),
    (lambda step: setattr(step.network.model.norm_out.weight, "requires_grad", False), "trains other parameters"),
    (lambda step: setattr(step.network.model.layers[0], "dropout", nn.Dropout(p=0.5).set_train()), "from a generator"),
])
def test_obstacles(change, words):
    step = build_step(layers=1, train_layer_by_layer=True)
    assert obstacle(step, batch(0)) is None
    change(step)
    assert words in obstacle(step, batch(0))
    with pytest.raises(ConfigError, match=f"train_layer_by_layer is True, but .*{words}.*; leave the key out"):
        goes_by_layer(step, batch(0))


def test_obstacles_outside_of_the_step(monkeypatch):
    step, deep = build_step(layers=1, train_layer_by_layer=True), build_step(layers=DEEP + 1)
    assert "4 columns" in obstacle(step, batch(0) * 2)
    plain, names = step.network, ["input_ids", "labels"]
    step.network = DataOrderWrapperCell(names, plain)
    assert obstacle(step, batch(0)) is None
    step.network = DataOrderWrapperCell(names[::-1], plain)
    assert "2 columns, ['labels', 'input_ids']; expected" in obstacle(step, batch(0))
    step.network = plain
    monkeypatch.setattr(ms, "get_auto_parallel_context", lambda key: "data_parallel")
    assert "several processes" in obstacle(step, batch(0))
    with pytest.raises(ConfigError, match="train_layer_by_layer is True, but several processes train together; leave"):
        step(*batch(0))
    assert not goes_by_layer(deep, batch(0))
