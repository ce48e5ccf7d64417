"""What stands beside the texts of a record: honoured, or unusable, or counted by name; never dropped."""
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.telechat.chat.session import parse_tool_calls
from research.telechat.common.errors import RecordError
from research.telechat.data.encoding import UNNAMED_MARKERS, Encoder
from research.telechat.data.markers import NO_REASONING
from research.telechat.data.records import parse_record
from research.telechat.data.report import Report, format_report
from research.telechat.data.shapes import REORDERED
from research.telechat.data.sources import Chunk
from research.telechat.text.call_forms import REPAIRED
from research.telechat.text.calls import answer_text
from research.telechat.text.messages import divided
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


def test_pictures_are_unusable():
    assert refused({"messages": [ASK, ANSWER], "images": ["a.jpg"]}) == "not text alone"
    assert parsed({"messages": [ASK, ANSWER], "images": []}).messages
    for part in ({"type": "image", "text": "", "image": "a.png"}, {"type": "image_url", "image_url": {"url": "x"}},
                 {"image": "a.png", "text": "x"}, {"type": "audio", "text": ""}):
        assert refused({"messages": [{"role": "user", "content": [part, {"type": "text", "text": "q"}]}, ANSWER]}) == (
            "unusable message")


# Tools

NAMES = st.text("abcdefg_", min_size=1, max_size=8)
ARGUMENTS = st.dictionaries(NAMES, st.one_of(st.integers(), st.text("aé中\"'\\\n{}", max_size=8), st.none(),
                                             st.lists(st.booleans())), max_size=3)
TEXT = json.JSONEncoder(ensure_ascii=False).encode
WRITTEN = st.sampled_from(["object", "text", "indented", "twice", "empty", "python"])


def written(arguments, form):
    return {"object": arguments, "text": TEXT(arguments), "indented": json.dumps(arguments, indent=2),
            "twice": TEXT(TEXT(arguments)), "python": repr(arguments),
            "empty": " " if not arguments else TEXT(arguments)}[form]


@given(st.lists(st.tuples(NAMES, ARGUMENTS, WRITTEN), min_size=1, max_size=3),
       st.sampled_from(["openai", "bare", "text", "legacy", "list", "row", "messages", "langchain", "anthropic",
                        "tagged", "python"]), st.booleans())
@settings(max_examples=100, deadline=None)
def test_calls_of_any_exporter_are_one_block_each(calls, form, with_text):
    bare = [{"name": name, "arguments": written(arguments, how)} for name, arguments, how in calls]
    words = "let me look" if with_text else None
    key, ask, answer, data_format = "messages", ASK, [], "messages"
    if form == "anthropic":
        blocks = [{"type": "tool_use", "id": f"c{number}", "name": name, "input": arguments}
                  for number, (name, arguments, _) in enumerate(calls)]
        answer = [{"role": "assistant", "content": [*([{"type": "text", "text": words}] if words else []), *blocks]}]
    elif form == "langchain":
        answer = [{"role": "assistant", "content": words, "tool_calls": [
            {"name": call["name"], "args": call["arguments"], "id": "1", "type": "tool_call"} for call in bare]}]
    elif form == "text":
        answer = [{"role": "assistant", "content": words, "tool_calls": TEXT(bare)}]
    elif form in ("openai", "bare"):
        answer = [{"role": "assistant", "content": words, "tool_calls": [
            {"type": "function", "function": call} if form == "openai" else call for call in bare]}]
    elif form == "legacy":
        calls, bare = calls[:1], bare[:1]
        answer = [{"role": "assistant", "content": words, "function_call": bare[0]}]
    else:
        key, ask, data_format = "conversations", {"from": "human", "value": "q"}, "sharegpt"
        answer = [{"from": "gpt", "value": words}] if words else []
        values = {"list": [TEXT(bare)], "row": ["\n".join(map(TEXT, bare))], "messages": [TEXT(call) for call in bare],
                  "python": [repr(bare)], "tagged": ["".join(f"<tool_call>\n{TEXT(call)}\n</tool_call>"
                                                             for call in bare)]}
        answer += [{"from": "function_call", "value": value} for value in values[form]]
    conversation = parsed({key: [ask, *answer]}, data_format)
    messages = conversation.messages
    assert [message.role for message in messages] == [USER, BOT]
    repaired = form == "python" or any(how == "python" and repr(arguments) != TEXT(arguments)
                                       for _, arguments, how in calls)
    assert (REPAIRED in conversation.notes) <= repaired and not conversation.unused
    text = answer_text(messages[1])
    assert text.startswith(words or "<tool_call>") and text.count("<tool_call>") == len(calls)
    assert parse_tool_calls(text).calls == [{"name": name, "arguments": arguments} for name, arguments, _ in calls]


@pytest.mark.parametrize("arguments", ["{", "[1]", "3", [1], 3, "f(x=1)", '{"a": NaN}', True, "{'a': ['x' 'y']}",
                                       "{'a': {1, 2}}", "{1: 2}", "{'a': 1, 'a': 2}", '{"a": 1, "a": 2}', "{'a': f()}",
                                       "{'a': " * 99 + "1" + "}" * 99, "{'a': '\\ud800'}", "{'a': 1e999}"])
def test_arguments_that_are_no_object_make_a_record_unusable(arguments):
    call = {"function": {"name": "f", "arguments": arguments}}
    assert refused({"messages": [ASK, {"role": "assistant", "tool_calls": [call]}]}) == "unusable message"


@pytest.mark.parametrize("call", [
    {"name": "f", "params": {"a": 1}}, {"name": "f", "arguments": {"a": 1}, "input": {"a": 2}},
    {"name": "f", "function": {"name": "g", "arguments": {}}}, {"name": " ", "arguments": {}}])
def test_a_call_loses_nothing(call):
    assert refused({"messages": [ASK, {"role": "assistant", "tool_calls": [call]}]}) == "unusable message"


@given(st.permutations(["c0", "c1", "c2"]), st.booleans())
def test_results_of_parallel_calls_follow_the_calls(order, anthropic):
    calls = [{"id": name, "function": {"name": f"f{name}", "arguments": "{}"}} for name in ("c0", "c1", "c2")]
    answer = {"role": "assistant", "content": None, "tool_calls": calls}
    results = [{"role": "tool", "content": f"r{name}", "tool_call_id": name} for name in order]
    if anthropic:
        results = [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": name, "content": f"r{name}"}
                                                for name in order]}]
    conversation = parsed({"messages": [ASK, answer, *results, ANSWER]})
    assert [message.content for message in conversation.messages[2:5]] == ["rc0", "rc1", "rc2"]
    assert (REORDERED in conversation.notes) == (order != ["c0", "c1", "c2"])
    foreign = [{**result, "tool_call_id": "other"} for result in results] if not anthropic else []
    if foreign:
        assert refused({"messages": [ASK, answer, *foreign, ANSWER]}) == "result of another call"


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


def test_tools_in_odd_forms():
    tool = {"name": "f", "parameters": {}}
    for tools in (tool, json.dumps(tool), [json.dumps(tool)], repr([tool]), json.dumps([json.dumps(tool)])):
        assert parsed({"messages": [ASK, ANSWER], "tools": tools}).tools == [tool]
    wrapped = [{"type": "function", "function": tool}]
    assert parsed({"messages": [ASK, ANSWER], "functions": wrapped}).tools == wrapped
    for tools in (["f"], [3], "f", "3", [["f"]]):
        assert refused({"messages": [ASK, ANSWER], "tools": tools}) == "wrong shape"
    for tools in ([], "", " ", "[]", None, "null", {}):
        assert parsed({"messages": [ASK, ANSWER], "tools": tools}).tools is None


def test_a_result_without_a_call_is_noted():
    notes = parsed({"messages": [ASK, ANSWER, {"role": "tool", "content": "r"}, ANSWER]}).notes
    assert notes == ("result of a tool without a call in front of it",)


# Who speaks, and what nobody reads

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


def test_tools_without_the_names_of_their_markers_are_noted(vocab_files, tmp_path):
    tools = [{"name": "f"}]
    plain, with_tools = ({"messages": [ASK, ANSWER], **more} for more in ({}, {"tools": tools}))
    called = {"messages": [ASK, {"role": "assistant", "tool_calls": [{"name": "f"}]}]}
    chunk = Chunk(0, [1, 2, 3], [json.dumps(record).encode() for record in (plain, with_tools, called)], 0)
    file = tmp_path / "tokenizer.model"
    file.write_bytes(vocab_files["telechat2"].read_bytes())
    for config, noted in ((None, 2), ({"tokenizer_class": "Telechat2Tokenizer"}, 0)):
        if config:
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        encoder = Encoder(Renderer(get_template("telechat2"), Vocab.load(file)), ["messages"], 2000)
        assert encoder(chunk).counts.get(f"note: {UNNAMED_MARKERS}", 0) == noted


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
