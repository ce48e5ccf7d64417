"""What a record marks for the loss: honoured, or unusable, or counted by name; never dropped."""
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from record_fixtures import ANSWER, ASK, parsed, refused

from research.telechat.data.encoding import Encoder
from research.telechat.data.sources import Chunk
from research.telechat.text.renderer import BOT, Renderer, get_template
from research.telechat.text.vocab import Vocab

OFF = st.sampled_from([("weight", 0), ("weight", 0.0), ("loss", False), ("train", False), ("train", "false"),
                       ("training", 0), ("loss_scale", 0.0), ("mask", True), ("loss_mask", 0),
                       ("step_loss_mask", 0), ("no_loss", True), ("compute_loss", False), ("learnable", "0")])
ON = st.sampled_from([("weight", 1), ("weight", 1.0), ("weight", None), ("loss", True), ("loss", None),
                      ("train", "true"), ("mask", False), None])


@given(st.lists(st.one_of(OFF.map(lambda mark: (mark, False)), ON.map(lambda mark: (mark, True))), min_size=1,
                max_size=5),
       st.sampled_from(["messages", "dialog", "sharegpt"]), st.sampled_from(["12b", "52b", "telechat2"]))
@settings(max_examples=60, deadline=None)
def test_markers_leave_answers_out_of_the_loss(vocab_files, answers, data_format, family):
    key = "conversations" if data_format == "sharegpt" else data_format
    role, text, bot = ("from", "value", "gpt") if data_format == "sharegpt" else ("role", "content", "assistant")
    user = "human" if data_format == "sharegpt" else "user"
    messages = [message for number, (mark, _) in enumerate(answers) for message in (
        {role: user, text: f"q{number}"}, {role: bot, text: f"a{number}", **(dict([mark]) if mark else {})})]
    conversation = parsed({key: messages}, data_format)
    trained = [train for _, train in answers]
    assert [message.train for message in conversation.messages if message.role == BOT] == trained
    assert len(conversation.notes) == trained.count(False)
    vocab = Vocab.load(vocab_files[family])
    template = {"12b": "telechat", "52b": "telechat_52b", "telechat2": "telechat2"}[family]
    renderer = Renderer(get_template(template), vocab)
    ids, mask = renderer.render(conversation.messages)
    every, whole = renderer.render([message._replace(train=True) for message in conversation.messages])
    assert ids == every                                          # a marker changes the loss, never the text
    text = vocab.decode([token for token, on in zip(ids, mask) if on])
    for number, train in enumerate(trained):
        assert (f"a{number}" in text) == train
    assert all(on <= full for on, full in zip(mask, whole)) and (mask == whole) == all(trained)
    assert any(mask) == any(trained)


@pytest.mark.parametrize("marker", [{"weight": 0.5}, {"loss": "maybe"}, {"train_detail": [{"begin_offset": 0}]}])
def test_markers_that_cannot_be_honoured_make_a_record_unusable(marker):
    assert refused({"messages": [ASK, {**ANSWER, **marker}]}) == "loss marker"


def test_a_question_marked_for_training_is_unusable():
    assert refused({"messages": [{**ASK, "loss": True}, ANSWER]}) == "loss marker"
    assert parsed({"messages": [{**ASK, "loss": False}, {**ANSWER, "loss": True}]}).messages[1].train


@given(st.integers(1, 4), st.sampled_from([True, "true", 1, False, None]))
def test_mask_history_leaves_the_last_answer_only(turns, value):
    messages = parsed({"messages": [ASK, ANSWER] * turns, "mask_history": value}).messages
    trained = [message.train for message in messages if message.role == BOT]
    assert trained == ([False] * (turns - 1) + [True] if value else [True] * turns)


def test_records_marked_for_training_as_a_whole_are_unusable():
    for key in ("train_on_prompt", "train_on_inputs"):
        assert refused({"messages": [ASK, ANSWER], key: True}) == "loss marker"
        assert not parsed({"messages": [ASK, ANSWER], key: False}).unused


@pytest.mark.parametrize("key,value,trained", [
    ("label", "False", False), ("label", "spam", None), ("label", 0, None), ("loss", 0.37, None), ("loss", 0, False),
    ("loss_scale", 0.0, False), ("training", "false", False), ("label", True, True), ("kto_tag", "1", True)])
def test_markers_of_records_are_honoured_or_counted(key, value, trained):
    conversation = parsed({"messages": [ASK, ANSWER], key: value})
    assert conversation.messages[1].train == (trained is not False)
    assert conversation.unused == ((key,) if trained is None else ())


@pytest.mark.parametrize("record", [
    {"messages": [ASK, ANSWER], "weight": 0}, {"instruction": "q", "output": "a", "label": False},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "kto_tag": False},
    {"input": "q", "output": "a", "loss": False}])
def test_records_left_out_of_the_loss(record, vocab_files):
    renderer = Renderer(get_template("telechat"), Vocab.load(vocab_files["12b"]))
    encoded = Encoder(renderer, ["messages"], 100)(Chunk(0, [1], [json.dumps(record).encode()], 0))
    assert encoded.counts["dropped: nothing to train"] == 1 and not len(encoded.tokens)
    assert encoded.counts["note: record left out of the loss by its marker"] == 1
