"""A record as preprocessing packs it, through the model: each conversation has the losses that it has alone."""
import mindspore as ms
import numpy as np
import pytest
from model_fixtures import HF_CONFIGS, build_model, logits_of, random_official
from vocab_fixtures import train_sentencepiece

from research.telechat.data.packing import IGNORED, FirstFitPacker, ShuffleBuffer, marked_ids, pack_all, to_record
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
    record = to_record(pack, length, PAD, side, slots=8)
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
