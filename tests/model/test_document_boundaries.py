"""A record as preprocessing packs it, through the model: each conversation has the losses that it has alone."""
import mindspore as ms
import numpy as np
import pytest
from model_fixtures import HF_CONFIGS, build_model, logits_of, random_official
from packing_fixtures import marked_ids
from vocab_fixtures import train_sentencepiece

from research.telechat.data.packing import IGNORED, FirstFitPacker, ShuffleBuffer, pack_all, to_records
from research.telechat.interpret import attention
from research.telechat.model.mask import COMPRESSED, DocumentEnds, Documents
from research.telechat.spec.attention_form import documents_back_to_back
from research.telechat.telechat_config import TelechatConfig
from research.telechat.text.renderer import Renderer, get_template
from research.telechat.text.vocab import Vocab

TEXTS = [("hi", "yes"), ("你是谁？", "我是一个语言模型。"), ("Write a poem", "the sea, the sea")]
PAD = 3


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """Three short conversations as ids."""
    vocab = Vocab.load(train_sentencepiece(tmp_path_factory.mktemp("vocab") / "v.model", vocab_size=500))
    renderer = Renderer(get_template("telechat"), vocab)
    plans = [renderer.plan([{"role": "user", "content": q}, {"role": "bot", "content": a}]) for q, a in TEXTS]
    return [renderer.assemble(plan, map(vocab.encode, plan.texts)) for plan in plans]


def losses(logits, labels):
    """Negative log-likelihood of each label [N] under logits [N, V]; 0 where the label is ignored."""
    logits = logits.astype(np.float64)
    log_sum = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    picked = np.take_along_axis(logits, np.maximum(labels, 0)[:, None], -1)[:, 0]
    return np.where(labels == IGNORED, 0.0, log_sum - picked)


@pytest.mark.slow
@pytest.mark.parametrize("family,side", [
    ("12b", "left"), ("12b", "right"), ("telechat2_mha", "right"), ("52b", "left")])
def test_packed_losses_are_those_of_each_alone(rendered, family, side):
    # Records within training_seqlen: beyond it rotary scaling depends on the length of the whole input, by design.
    hf = {**HF_CONFIGS[family], "vocab_size": 512}
    weights = random_official(hf, seed=3)
    length = sum(len(one.ids) for one in rendered) + 6
    pack, = pack_all(marked_ids(rendered), ShuffleBuffer(0, 0), FirstFitPacker(length))
    record, = to_records([pack], length, PAD, side, slots=8)
    ids, labels = record["input_ids"][None, :-1], record["labels"][1:]
    ends = ms.Tensor(record["actual_seq_len"][None])
    separate = logits_of(build_model(hf, weights, document_boundaries=True), ids, input_position=ends)[0]
    together = logits_of(build_model(hf, weights), ids)[0]
    packed, mixed = losses(separate, labels), losses(together, labels)
    alone_model = build_model(hf, weights)
    start = length - sum(map(len, pack)) if side == "left" else 0
    counted = 0
    for number, piece in enumerate(pack):
        tokens = np.where(piece < 0, ~piece, piece)
        alone_labels = np.where(piece < 0, IGNORED, piece)[1:]
        alone = losses(logits_of(alone_model, tokens[None, :-1])[0], alone_labels)
        here = slice(start, start + len(piece) - 1)
        np.testing.assert_allclose(packed[here], alone, atol=1e-4)
        if number or side == "left":
            assert np.abs(mixed[here] - alone).max() > 1e-3      # which attention across the borders would change
        counted += int((alone_labels != IGNORED).sum())
        start += len(piece)
    assert counted == int((labels != IGNORED).sum()) > 10


def test_documents_back_to_back():
    """What the kernel does with ends and triangle is what the mask of each sequence says, in NumPy; a tail without an
    end, two documents that end together and sequences of several ranks included."""
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
    batch, seq, heads, dim = 2, 8, 2, 4
    ends = np.array([[3, 5, 8, 8], [1, 6, 6, 9]], np.int32)                # 9: beyond the tokens that are trained on
    config = TelechatConfig(num_layers=1, hidden_size=heads * dim, num_heads=heads, document_boundaries=True)
    flat = DocumentEnds(config)(ms.Tensor(ends), batch, seq).asnumpy()
    assert flat.tolist() == [3, 5, 8, 8, 8, 9, 14, 14, 16, 16] and flat.dtype == np.int64
    assert DocumentEnds(config)(None, batch, seq).asnumpy().tolist() == [8, 16]
    documents = Documents(config)(seq, ms.Tensor(ends))[0].asnumpy()
    hidden = np.triu(np.ones((seq, seq), bool), 1) | (documents[:, :, None] != documents[:, None])
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(batch, heads, seq, dim)) for _ in range(3))
    expected = attention.forward(q, k, v, hidden[:, None], 0.5)[2]

    def tokens(x):
        return np.swapaxes(x, 1, 2).reshape(batch * seq, heads, dim)
    triangle = np.triu(np.ones((COMPRESSED, COMPRESSED), np.uint8), 1)
    found = attention.flash_attention(None, tokens(q), tokens(k), tokens(v), None, None, None, triangle, None, flat,
                                      flat, heads, 1.0, 0.5, 2**31 - 1, 0, 0, attention.LAYOUTS.index("TND"), 3)[3]
    np.testing.assert_allclose(found, tokens(expected), atol=1e-14)


@pytest.mark.parametrize("keys, gathering, expected", [
    ({}, 1, True), ({}, 2, False), ({"mask_pad_tokens": True}, 1, False), ({"attention_dropout_prob": 0.1}, 1, False),
    ({"document_boundaries": False}, 1, False), ({"use_flash_attention": False}, 1, False)])
def test_when_documents_stand_back_to_back(keys, gathering, expected):
    config = TelechatConfig(num_layers=1, hidden_size=8, num_heads=2, **{"document_boundaries": True, **keys})
    assert documents_back_to_back(config, gathering) is expected
