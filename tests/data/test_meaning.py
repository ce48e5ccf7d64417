"""What stands beside the texts of a record: honoured, or unusable, or counted by name; never dropped."""
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.telechat.chat.session import parse_tool_calls
from research.telechat.common.errors import RecordError
from research.telechat.data.encoding import Encoder
from research.telechat.data.records import parse_record
from research.telechat.data.report import Report, format_report
from research.telechat.data.sources import Chunk
from research.telechat.text.calls import answer_text
from research.telechat.text.renderer import BOT, SYSTEM, USER, Renderer, get_template
from research.telechat.text.vocab import Vocab

ASK, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def parsed(record, data_format="messages", named=False):
    return parse_record(json.dumps(record).encode(), data_format, named)


def refused(record, data_format="messages"):
    with pytest.raises(RecordError) as caught:
        parsed(record, data_format)
    assert "\n" not in str(caught.value)
    return caught.value.kind


# What is trained

OFF = st.sampled_from([("weight", 0), ("weight", 0.0), ("loss", False), ("train", False), ("train", "false"),
                       ("training", 0), ("loss_scale", 0.0), ("mask", True)])
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


@pytest.mark.parametrize("record", [
    {"messages": [ASK, ANSWER], "weight": 0}, {"instruction": "q", "output": "a", "label": False},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "kto_tag": False},
    {"input": "q", "output": "a", "loss": False}])
def test_records_left_out_of_the_loss(record, vocab_files):
    renderer = Renderer(get_template("telechat"), Vocab.load(vocab_files["12b"]))
    encoded = Encoder(renderer, ["messages"], 100)(Chunk(0, [1], [json.dumps(record).encode()], 0))
    assert encoded.counts["dropped: nothing to train"] == 1 and not len(encoded.tokens)
    assert encoded.counts["note: record left out of the loss by its marker"] == 1


def test_preference_pairs_and_pictures_are_unusable():
    assert refused({"messages": [ASK, ANSWER], "rejected": "b"}) == "preference pair"
    assert refused({"messages": [ASK, ANSWER], "images": ["a.jpg"]}) == "not text alone"
    assert parsed({"messages": [ASK, ANSWER], "images": []}).messages
    for part in ({"type": "image", "text": "", "image": "a.png"}, {"type": "image_url", "image_url": {"url": "x"}},
                 {"image": "a.png", "text": "x"}, {"type": "audio", "text": ""}):
        assert refused({"messages": [{"role": "user", "content": [part, {"type": "text", "text": "q"}]}, ANSWER]}) == (
            "unusable message")


# Tools

NAMES = st.text("abcdefg_", min_size=1, max_size=8)
ARGUMENTS = st.dictionaries(NAMES, st.one_of(st.integers(), st.text(max_size=8), st.none(), st.lists(st.booleans())),
                            max_size=3)
TEXT = json.JSONEncoder(ensure_ascii=False).encode
WRITTEN = st.sampled_from(["object", "text", "indented", "twice", "empty"])


def written(arguments, form):
    return {"object": arguments, "text": TEXT(arguments), "indented": json.dumps(arguments, indent=2),
            "twice": TEXT(TEXT(arguments)), "empty": " " if not arguments else TEXT(arguments)}[form]


@given(st.lists(st.tuples(NAMES, ARGUMENTS, WRITTEN), min_size=1, max_size=3),
       st.sampled_from(["openai", "bare", "legacy", "list", "row", "messages"]), st.booleans())
@settings(max_examples=150, deadline=None)
def test_calls_of_any_exporter_are_one_block_each(calls, form, with_text):
    bare = [{"name": name, "arguments": written(arguments, how)} for name, arguments, how in calls]
    words = "let me look" if with_text else None
    key, ask, answer, data_format = "messages", ASK, [], "messages"
    if form in ("openai", "bare"):
        answer = [{"role": "assistant", "content": words, "tool_calls": [
            {"type": "function", "function": call} if form == "openai" else call for call in bare]}]
    elif form == "legacy":
        calls, bare = calls[:1], bare[:1]
        answer = [{"role": "assistant", "content": words, "function_call": bare[0]}]
    else:
        key, ask, data_format = "conversations", {"from": "human", "value": "q"}, "sharegpt"
        answer = [{"from": "gpt", "value": words}] if words else []
        values = {"list": [TEXT(bare)], "row": ["\n".join(map(TEXT, bare))], "messages": [TEXT(call) for call in bare]}
        answer += [{"from": "function_call", "value": value} for value in values[form]]
    messages = parsed({key: [ask, *answer]}, data_format).messages
    assert [message.role for message in messages] == [USER, BOT]
    text = answer_text(messages[1])
    assert text.startswith(words or "<tool_call>") and text.count("<tool_call>") == len(calls)
    assert parse_tool_calls(text).calls == [{"name": name, "arguments": arguments} for name, arguments, _ in calls]


@pytest.mark.parametrize("arguments", ["{", "[1]", "3", [1], 3, "f(x=1)", '{"a": NaN}', True])
def test_arguments_that_are_no_object_make_a_record_unusable(arguments):
    call = {"function": {"name": "f", "arguments": arguments}}
    assert refused({"messages": [ASK, {"role": "assistant", "tool_calls": [call]}]}) == "unusable message"


@pytest.mark.parametrize("value", ["f(x)", "{}", "[]", "", '[{"name": "f"}', None])
def test_calls_that_are_none_make_a_record_unusable(value):
    record = {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": value}]}
    assert refused(record, "sharegpt") == "unusable message"


def test_tools_wherever_they_stand():
    tool = {"name": "f", "parameters": {}}
    wrapped = [{"type": "function", "function": tool}]
    for record in ({"messages": [ASK, ANSWER], "tools": wrapped}, {"messages": [ASK, ANSWER], "functions": [tool]},
                   {"messages": [{"role": "system", "content": "s", "tools": wrapped}, ASK, ANSWER]},
                   {"instruction": "q", "output": "a", "tools": json.dumps(wrapped)},
                   {"messages": [ASK, ANSWER], "tools": wrapped, "functions": [tool]}):
        assert parsed(record).tools == wrapped
    assert refused({"messages": [ASK, ANSWER], "tools": [tool], "functions": [tool]}) == "two lists of tools"
    both = {**ANSWER, "tool_calls": [tool], "function_call": tool}
    assert refused({"messages": [ASK, both]}) == "unusable message"


# Who speaks, and what nobody reads

@given(st.sampled_from(["system", "system_prompt"]), st.sampled_from(["s", "t", None]), st.sampled_from(["s", None]))
def test_two_system_prompts_are_one_or_unusable(key, beside, within):
    record = {"messages": [*([{"role": "system", "content": within}] if within else []), ASK, ANSWER], key: beside}
    if within and beside == "t":
        assert refused(record) == "two system prompts"
        return
    expected = within or beside
    assert [message.content for message in parsed(record).messages if message.role == SYSTEM] == (
        [expected] if expected else [])


@given(st.lists(st.sampled_from([
    {"messages": [ASK, ANSWER]}, {"instruction": "Translate:", "input": "q", "output": "a"},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, {"input": "q", "output": "a"},
    {"dialog": [ASK, ANSWER]}]), min_size=1, max_size=6), st.sampled_from(["messages", "input_output", "alpaca"]))
def test_each_record_is_read_in_its_own_format(records, of_file):
    for record in records:
        question = "Translate:\nq" if "instruction" in record else "q"
        assert [message.content for message in parsed(record, of_file).messages] == [question, "a"]


def test_keys_of_other_formats_are_not_lost():
    record = {"instruction": "Translate:", "input": "q", "output": "a"}
    with pytest.raises(RecordError, match="key 'instruction' in a record of the format 'input_output'"):
        parsed(record, "input_output", named=True)
    assert refused({"input": "q", "output": "a", "history": [["x", "y"]]}, "input_output") == "key of another format"


KEYS = st.text("xyzäß", min_size=3, max_size=8)
VALUES = st.one_of(st.integers(), st.text(min_size=1, max_size=3).filter(str.strip), st.booleans(), st.just([1]))


@given(st.dictionaries(KEYS, VALUES, max_size=3), st.dictionaries(KEYS, VALUES, max_size=3), st.dictionaries(
    KEYS, st.sampled_from([None, "", [], {}]), max_size=2))
def test_unused_keys_are_named(extra, inner, empty):
    for data_format, record in (
            ("messages", {"messages": [ASK, {**ANSWER, **inner}]}), ("alpaca", {"instruction": "q", "output": "a"}),
            ("sharegpt", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", **inner}]}),
            ("input_output", {"input": "q", "output": "a"})):
        expected = set(extra)
        if data_format in ("messages", "sharegpt"):
            expected |= {f"{next(iter(record))}[].{key}" for key in inner}
        assert set(parsed({**empty, **record, **extra}, data_format).unused) == expected


def test_unused_keys_are_reported_per_file_in_bounded_memory():
    report = Report(100)
    report.add({"records": 2}, [], "a.jsonl", {"id": 2, "\x1b[2J": 1})
    report.add({"records": 100}, [], "b.jsonl", {f"key {number}": 1 for number in range(100)})
    summary = report.summary(1, 1.0)
    assert summary["unused_keys"]["a.jsonl"] == {"id": 2, "\x1b[2J": 1}
    assert len(summary["unused_keys"]["b.jsonl"]) == 51 and sum(summary["unused_keys"]["b.jsonl"].values()) == 100
    lines = [line for line in format_report(summary).splitlines() if line.startswith("not used")]
    assert lines[0] == "not used   a.jsonl: keys id (2), '\\x1b[2J' (1)" and "and 43 more" in lines[1]


def test_reasoning_is_left_out_with_a_note():
    notes = parsed({"messages": [ASK, {**ANSWER, "reasoning_content": "because"}]}).notes
    assert notes == ("reasoning of an answer left out: the template has no place for it",)
