"""What a record has besides its texts: honoured, or unusable, or counted by name; never dropped."""
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from record_fixtures import ANSWER, ASK, parsed, refused

from research.telechat.common.errors import RecordError
from research.telechat.data.markers import NO_REASONING
from research.telechat.data.report import Report, format_report
from research.telechat.text.messages import divided
from research.telechat.text.renderer import BOT, SYSTEM, USER


def test_pictures_are_unusable():
    assert refused({"messages": [ASK, ANSWER], "images": ["a.jpg"]}) == "not text alone"
    assert parsed({"messages": [ASK, ANSWER], "images": []}).messages
    for part in ({"type": "image", "text": "", "image": "a.png"}, {"type": "image_url", "image_url": {"url": "x"}},
                 {"image": "a.png", "text": "x"}, {"type": "audio", "text": ""}):
        assert refused({"messages": [{"role": "user", "content": [part, {"type": "text", "text": "q"}]}, ANSWER]}) == (
            "unusable message")


@given(st.sampled_from(["role", "from", "both"]), st.sampled_from(["content", "value", "both"]),
       st.sampled_from(["messages", "conversations", "dialog"]), st.sampled_from(["gpt", "assistant", "bot"]))
def test_names_of_speaker_and_text_in_any_list(speaker, text, key, bot):
    def message(role, words):
        named = {"role": "user" if role == "user" else "bot", "from": "human" if role == "user" else bot}
        said = {"content": words, "value": words}
        return {**{name: value for name, value in named.items() if speaker in (name, "both")},
                **{name: value for name, value in said.items() if text in (name, "both")}}
    conversation = parsed({key: [message("user", "q"), message("bot", "a")]})
    assert [(message.role, message.content) for message in conversation.messages] == [(USER, "q"), (BOT, "a")]
    assert not conversation.unused
    for twice, kind in (({"role": "user", "from": "gpt"}, "two speakers"),
                        ({"content": "q", "value": "x"}, "two texts")):
        assert refused({key: [{**message("user", "q"), **twice}, message("bot", "a")]}) == kind


@given(st.sampled_from(["instruction", "prompt", "query", "output", "conversations", "dialog", "chosen"]),
       st.sampled_from(["q", "a", "other"]))
def test_a_second_conversation_is_the_same_or_unusable(key, text):
    value = [{"role": "user", "content": text}] if key in ("conversations", "dialog") else text
    record = {"messages": [ASK, ANSWER], key: value}
    if key == "dialog":
        record = {"dialog": [ASK, ANSWER], "messages": value}
    if key in ("prompt", "query"):
        assert parsed(record).unused == (key,)
    elif text == "other" or (key == "chosen" and text == "q"):
        assert refused(record) in ("key of another format", "preference pair")
    else:
        assert parsed(record).messages[-1].content == "a"


@given(st.sampled_from(["system", "system_prompt"]), st.sampled_from(["s", "t", None]), st.sampled_from(["s", None]))
def test_two_system_prompts_are_one_or_unusable(key, beside, within):
    record = {"messages": [*([{"role": "system", "content": within}] if within else []), ASK, ANSWER], key: beside}
    if within and beside == "t":
        assert refused(record) == "two system prompts"
        return
    if beside and within is None:
        blank = {"role": "system", "content": " "}
        assert parsed({"messages": [blank, ASK, ANSWER], key: beside}).messages == parsed(record).messages
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


@pytest.mark.parametrize("record", [
    {"instruction": "q", "input": "", "output": "a", "prompt": "### Instruction: q"},
    {"messages": [ASK, ANSWER], "answer": "1/2"}, {"messages": [ASK, ANSWER], "context": "c"},
    {"input": "q", "output": "a", "answer": "b"}])
def test_texts_beside_a_whole_conversation_are_counted(record):
    conversation = parsed(record, "input_output")
    assert [message.content for message in conversation.messages] == ["q", "a"]
    assert conversation.unused == (list(record)[-1],)


def test_a_context_of_a_question_is_not_left_out():
    assert refused({"question": "q", "context": "c", "answer": "a"}) == "key of another format"


def test_keys_of_other_formats_are_not_lost():
    record = {"instruction": "Translate:", "input": "q", "output": "a"}
    with pytest.raises(RecordError, match="key 'instruction' in a record of the format 'input_output'"):
        parsed(record, "input_output", named=True)
    assert refused({"input": "q", "output": "a", "history": [["x", "y"]]}, "input_output") == "key of another format"


KEYS = st.text("xyzäß", min_size=3, max_size=8)
VALUES = st.one_of(st.integers(), st.text(min_size=1, max_size=3).filter(str.strip), st.booleans(), st.just([1]))


@given(st.dictionaries(KEYS, VALUES, max_size=3), st.dictionaries(KEYS, VALUES, max_size=3), st.dictionaries(
    KEYS, st.sampled_from([None, "", [], {}]), max_size=2))
@settings(deadline=None)
def test_unused_keys_are_named(extra, inner, empty):
    for data_format, record in (
            ("messages", {"messages": [ASK, {**ANSWER, **inner}]}), ("alpaca", {"instruction": "q", "output": "a"}),
            ("sharegpt", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", **inner}]}),
            ("input_output", {"input": "q", "output": "a"})):
        expected = set(extra)
        if data_format in ("messages", "sharegpt"):
            expected |= {f"{next(iter(record))}[].{key}" for key in inner}
        assert set(parsed({**empty, **record, **extra}, data_format).unused) == expected


@pytest.mark.parametrize("message,unused", [
    ({"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "r", "is_error": True}],
      "note": "n"}, ("messages[].content[].is_error", "messages[].note")),
    ({"role": "assistant", "content": [{"type": "thinking", "thinking": "t", "signature": "s"},
                                       {"type": "text", "text": "b", "citations": ["c"], "note": ""}]},
     ("messages[].content[].citations", "messages[].content[].signature")),
    ({"role": "user", "content": [{"type": "text", "text": "q", "note": "n"}]}, ("messages[].content[].note",)),
    ({"role": "user", "content": [{"type": ["x"], "text": "q", "type_of": 3}]}, None)])
def test_unused_keys_of_parts_are_named(message, unused):
    call = {"role": "assistant", "tool_calls": [{"name": "f", "id": "1"}]}
    before = [ASK, call] if "tool_result" in str(message) else [ASK] if message["role"] == "assistant" else []
    record = {"messages": [*before, message, *([] if message["role"] == "assistant" else [ANSWER])]}
    if unused is None:
        assert refused(record) == "unusable message"
    else:
        assert parsed(record).unused == unused


def test_unused_keys_are_reported_per_file_in_bounded_memory():
    report = Report(100)
    report.add({"records": 2}, [], "a.jsonl", {"id": 2, "\x1b[2J": 1})
    report.add({"records": 100}, [], "b.jsonl", {f"key {number}": 1 for number in range(100)})
    summary = report.summary(1, 1.0)
    assert summary["unused_keys"]["a.jsonl"] == {"id": 2, "\x1b[2J": 1}
    assert len(summary["unused_keys"]["b.jsonl"]) == 51 and sum(summary["unused_keys"]["b.jsonl"].values()) == 100
    lines = [line for line in format_report(summary).splitlines() if line.startswith("not used")]
    assert lines[0] == "not used   a.jsonl: keys id (2), '\\x1b[2J' (1)" and "and 43 more" in lines[1]


@given(st.sampled_from(["reasoning_content", "reasoning", "thinking", "thought"]), st.sampled_from([
    "message", "record", "prompt", "block", "think", "both", "call"]))
def test_reasoning_is_kept_wherever_it_stands(key, place):
    block = {"type": "thinking", "thinking": "because"}
    call = {"role": "tool_call", "content": '{"name": "f"}', key: "because"}
    record = {
        "message": {"messages": [ASK, {**ANSWER, key: "\nbecause\n"}]}, "call": {"messages": [ASK, call]},
        "record": {"instruction": "q", "output": "a", key: "because"},
        "prompt": {"question": "q", "answer": "a", key: "because"},
        "block": {"messages": [ASK, {"role": "assistant", "content": [block, {"type": "text", "text": "a"}]}]},
        "think": {"messages": [ASK, {"role": "assistant", "content": "<think>because</think>a"}]},
        "both": {"messages": [ASK, {"role": "assistant", key: "because",
                                    "content": "<think>\nbecause\n</think>\n\na"}]}}
    conversation = parsed(record[place])
    last = divided(conversation.messages[-1])
    assert (last.content, last.reasoning) == ("" if place == "call" else "a", "because") and not conversation.unused
    assert (NO_REASONING in conversation.notes) == (place != "think")


@given(st.sampled_from(["<think></think>a", "<think>\n\n</think>\n\na", "<think>because</think>a", "</think>a"]))
@settings(max_examples=8, deadline=None)
def test_an_empty_block_beside_the_reasoning_is_left_out(content):
    message = parsed({"messages": [ASK, {"role": "assistant", "content": content, "reasoning": "because"}]}).messages[1]
    assert (message.content, message.reasoning) == ("a", "because")


def test_reasoning_that_would_be_lost():
    for answer in ({**ANSWER, "reasoning": "x", "thinking": "y"}, {**ANSWER, "reasoning_content": ["x"]},
                   {"role": "assistant", "content": "<think>x</think>a", "reasoning": "y"}):
        assert refused({"messages": [ASK, answer]}) in ("reasoning", "unusable message")
    assert parsed({"messages": [{**ASK, "thinking": "x"}, {**ANSWER, "thinking": True}]}).unused == (
        "messages[].thinking",)
