"""The MindSpore model of every family against an independent NumPy forward pass. Needs only the checkout."""
import mindspore as ms
import numpy as np
import pytest
from model_fixtures import HF_CONFIGS, build_model, logits_of, loss_of, random_official
from reference import cross_entropy, forward

from research.telechat.model import kernels

pytestmark = pytest.mark.matrix

RNG = np.random.default_rng(7)
FAMILIES = list(HF_CONFIGS)


@pytest.fixture(scope="module", params=[*FAMILIES, *(f"{name} composed" for name in FAMILIES)])
def family(request):
    """(official config, official weights, model in the precision of the official code), computed by the fused operators
    of a CPU and composed of MindSpore's."""
    name, _, composed = request.param.partition(" ")
    hf = HF_CONFIGS[name]
    weights = random_official(hf, seed=3)
    with pytest.MonkeyPatch.context() as patch:
        if composed:
            patch.setattr(kernels, "available", lambda: False)
        model = build_model(hf, weights)
        assert model.model.layers[0].attention.in_one == kernels.native_operators()
    return hf, weights, model


def test_logits(family):
    hf, weights, model = family
    ids = RNG.integers(0, hf["vocab_size"], (2, 24))
    expected, _ = forward(hf, weights, ids)
    np.testing.assert_allclose(logits_of(model, ids), expected, atol=2e-4)


def test_loss_counts_only_labels(family):
    hf, weights, model = family
    ids = RNG.integers(0, hf["vocab_size"], (2, 24))
    labels = np.where(RNG.random((2, 24)) < 0.4, -100, ids)
    losses = cross_entropy(forward(hf, weights, ids[:, :-1])[0], labels)
    model.set_train(True)
    loss = loss_of(model, ms.Tensor(ids, ms.int32), ms.Tensor(labels, ms.int32))
    model.set_train(False)
    np.testing.assert_allclose(loss, np.nanmean(losses), atol=2e-5)


def test_padding_is_not_attended(family):
    hf, weights, model = family
    ids = RNG.integers(4, hf["vocab_size"], (2, 24))
    mask = np.ones((2, 24), np.int32)
    mask[1, :7] = 0
    expected, _ = forward(hf, weights, ids, attention_mask=mask)
    got = logits_of(model, ids, attention_mask=ms.Tensor(mask))
    np.testing.assert_allclose(got[mask.astype(bool)], expected[mask.astype(bool)], atol=2e-4)


@pytest.mark.parametrize("name", ["12b", "telechat2_gqa"])
def test_full_precision_rotary_differs_from_rounded(name):
    hf = HF_CONFIGS[name]
    weights = random_official(hf, seed=4)
    ids = RNG.integers(0, hf["vocab_size"], (1, 24))
    got = logits_of(build_model(hf, weights, rotary_dtype="float32"), ids)
    np.testing.assert_allclose(got, forward(hf, weights, ids, half=False)[0], atol=2e-4)
    assert np.abs(got - forward(hf, weights, ids, half=True)[0]).max() > 5e-4


def test_long_context_scales_rotary():
    """training_seqlen 16, S = 24: alpha 3 and mscale > 1 for TeleChat2; the old rule (None) gives something else."""
    hf = HF_CONFIGS["telechat2_gqa"]
    weights = random_official(hf, seed=5)
    ids = RNG.integers(0, hf["vocab_size"], (1, 24))
    expected, _ = forward(hf, weights, ids)
    np.testing.assert_allclose(logits_of(build_model(hf, weights), ids), expected, atol=2e-4)
    assert np.abs(logits_of(build_model(hf, weights, extend_method="None"), ids) - expected).max() > 1e-2


def test_document_boundaries_give_the_losses_of_each_alone():
    hf = {**HF_CONFIGS["12b"]}
    weights = random_official(hf, seed=6)
    lengths = [9, 5, 10]                                   # 24 positions
    ids = RNG.integers(4, hf["vocab_size"], (1, 25))
    expected, _ = forward(hf, weights, ids[:, :24], documents=lengths)
    ends = ms.Tensor(np.array([[*np.cumsum(lengths).tolist(), 24, 24]], np.int32))
    model = build_model(hf, weights, document_boundaries=True)
    np.testing.assert_allclose(logits_of(model, ids[:, :24], input_position=ends), expected, atol=2e-4)
    start = 0
    for length in lengths:                                 # and each equals the conversation on its own
        alone, _ = forward(hf, weights, ids[:, start:start + length])
        np.testing.assert_allclose(expected[:, start:start + length], alone, atol=1e-9)
        start += length


def test_tied_head_is_the_embedding():
    hf = HF_CONFIGS["7b"]
    model = build_model(hf, random_official(hf))
    assert not [param.name for param in model.get_parameters() if "lm_head" in param.name]


def test_dropout_only_in_training():
    hf = HF_CONFIGS["12b"]
    model = build_model(hf, random_official(hf), hidden_dropout_prob=0.5, attention_dropout_prob=0.5,
                        embed_dropout_prob=0.5)
    ids = ms.Tensor(RNG.integers(0, 97, (1, 12)), ms.int32)
    np.testing.assert_array_equal(model(ids).asnumpy(), model(ids).asnumpy())
    model.set_train(True)
    assert loss_of(model, ids, ids) != loss_of(model, ids, ids)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_policies_stay_near_float32(dtype):
    hf = HF_CONFIGS["12b"]
    weights = {name: value * 0.3 for name, value in random_official(hf).items()}
    ids = RNG.integers(0, 97, (1, 16))
    expected = logits_of(build_model(hf, weights), ids)
    got = logits_of(build_model(hf, weights, compute_dtype=dtype, res_dtype=dtype, rotary_dtype="float32"), ids)
    assert got.dtype == np.float32 and np.isfinite(got).all()
    np.testing.assert_allclose(got, expected, atol=0.05 * np.abs(expected).max())
