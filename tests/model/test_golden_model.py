"""The model against vectors of the official PyTorch code (development set, skipped without it)."""
import json

import mindspore as ms
import numpy as np
import pytest
from golden import SHARED, needs_shared
from model_fixtures import build_model, logits_of, loss_and_gradients, loss_of
from safetensors.numpy import load_file

from research.telechat.spec.parameters import parameters
from research.telechat.spec.variants import variant_from_hf

pytestmark = needs_shared
FOLDERS = ("telechat_7b", "telechat_12b", "telechat_52b", "telechat2_mha", "telechat2_gqa")
GOLDEN = SHARED / "golden"
VARIANTS = sorted((path.parent.name, path.stem[len("golden_"):])
                  for path in GOLDEN.glob("*/golden_*.npz")) if GOLDEN.is_dir() else []


def read(folder, variant=""):
    """(official config, weights, vectors) of a folder or of one of its variants."""
    suffix = f"_{variant}" if variant else ""
    hf = json.loads((GOLDEN / folder / f"config{suffix}.json").read_text())
    return hf, load_file(GOLDEN / folder / "model.safetensors"), np.load(GOLDEN / folder / f"golden{suffix}.npz")


class Golden:
    """One folder with its model, built once for all tests of the module."""

    def __init__(self, folder):
        self.folder = folder
        self.hf, self.weights, self.vectors = read(folder)
        self.model = build_model(self.hf, self.weights)
        self.full = None if folder == "telechat_52b" else build_model(self.hf, self.weights, rotary_dtype="float32")


@pytest.fixture(scope="module", params=FOLDERS)
def golden(request):
    return Golden(request.param)


def test_logits(golden):
    got = logits_of(golden.model, golden.vectors["input_ids"])
    np.testing.assert_allclose(got, golden.vectors["logits"], atol=1e-4)


def test_logits_full_precision_rotary(golden):
    if golden.full is None:
        pytest.skip("the official 52B code does not round its tables")
    got = logits_of(golden.full, golden.vectors["input_ids"])[0, -20:]
    np.testing.assert_allclose(got, golden.vectors["logits_fullrope_row0_last20"], atol=1e-4)


def test_padded_batch(golden):
    mask = ms.Tensor(golden.vectors["pad_attention_mask"])
    got = logits_of(golden.model, golden.vectors["pad_input_ids"], attention_mask=mask)[:, -4:]
    np.testing.assert_allclose(got, golden.vectors["pad_logits_last4"], atol=1e-4)


def test_hidden_states(golden):
    class States(ms.nn.Cell):
        def __init__(self, model):
            super().__init__(auto_prefix=False)
            self.model = model

        def construct(self, tokens):
            h, rope, mask = self.model.prepare(tokens, None, None)
            states = (h,)
            for layer in self.model.layers:
                h = layer(h, tokens.shape, rope, mask, None)
                states = (*states, h)
            return (*states[:-1], self.model.norm_out(h))

    states = States(golden.model.model)(ms.Tensor(golden.vectors["input_ids"][:1]))
    expected = golden.vectors["hidden_states_row0"]
    assert len(states) == len(expected)
    for got, want in zip(states, expected):
        np.testing.assert_allclose(got.asnumpy(), want, atol=1e-4)           # rows of the one sequence


def test_loss_and_gradient_norms(golden):
    ids = ms.Tensor(golden.vectors["input_ids"])
    labels = ms.Tensor(golden.vectors["labels"].astype(np.int32))
    model = golden.model
    model.set_train(True)
    weights = {param.name: param for param in model.trainable_params()}
    loss, grads = loss_and_gradients(model, ids, labels)
    model.set_train(False)
    np.testing.assert_allclose(loss, golden.vectors["loss"], atol=1e-5)
    norms = json.loads((GOLDEN / golden.folder / "info.json").read_text())["grad_l2_norms"]
    official = {param.ms_name: param.hf_name for param in parameters(variant_from_hf(golden.hf))}
    bare = {name.replace("transformer.", ""): value for name, value in norms.items()}
    assert len(grads) == len(bare)
    for name, grad in zip(weights, grads):
        got = np.linalg.norm(grad.astype(np.float64))
        np.testing.assert_allclose(got, bare[official[name].replace("transformer.", "")], rtol=1e-3, err_msg=name)


def test_loss_full_precision_rotary(golden):
    if golden.full is None:
        pytest.skip("the official 52B code does not round its tables")
    golden.full.set_train(True)
    loss = loss_of(golden.full, ms.Tensor(golden.vectors["input_ids"]),
                   ms.Tensor(golden.vectors["labels"].astype(np.int32)))
    golden.full.set_train(False)
    np.testing.assert_allclose(loss, golden.vectors["loss_fullrope"], atol=1e-5)


def next_tokens(model, ids, start, penalty=1.0):
    """Greedy choice after each prefix ids[:start], ids[:start + 1], ..., from one forward pass (the scaling is constant
    below training_seqlen, and the model causal)."""
    logits = logits_of(model, ids[None])[0].astype(np.float64)
    chosen = []
    for end in range(start, len(ids)):
        row = logits[end - 1].copy()
        seen = np.unique(ids[:end])
        row[seen] = np.where(row[seen] < 0, row[seen] * penalty, row[seen] / penalty)
        chosen.append(int(row.argmax()))
    return chosen


def test_greedy_tokens(golden):
    start = len(golden.vectors["gen_prompt"])
    ids = golden.vectors["gen_ids"]
    assert next_tokens(golden.model, ids, start) == ids[start:].tolist()
    ids = golden.vectors["gen_ids_rep_penalty_1p03"]
    assert next_tokens(golden.model, ids, start, 1.03) == ids[start:].tolist()
    if golden.full is not None:
        ids = golden.vectors["gen_ids_fullrope"]
        assert next_tokens(golden.full, ids, start) == ids[start:].tolist()


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "variant"), VARIANTS)
def test_long_context_variant(folder, variant):
    hf, weights, vectors = read(folder, variant)
    ids, positions = vectors["input_ids"], vectors["positions"]
    got = logits_of(build_model(hf, weights, seq_length=ids.shape[1]), ids)[:, positions]
    np.testing.assert_allclose(got, vectors["logits"], atol=1e-4)
    if "logits_fullrope_last" in vectors:
        expected = vectors["logits_fullrope_last"]
        full = logits_of(build_model(hf, weights, seq_length=ids.shape[1], rotary_dtype="float32"), ids)
        np.testing.assert_allclose(full[:, positions][:, -expected.shape[1]:], expected, atol=1e-4)
