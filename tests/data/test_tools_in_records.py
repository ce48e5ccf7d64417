"""Calls, results and lists of tools in a record: kept whatever their form, or unusable; never dropped."""
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from record_fixtures import ANSWER, ASK, parsed, refused

from research.telechat.chat.session import parse_tool_calls
from research.telechat.data.encoding import UNNAMED_MARKERS, Encoder
from research.telechat.data.shapes import REORDERED
from research.telechat.data.sources import Chunk
from research.telechat.text.call_forms import REPAIRED
from research.telechat.text.calls import answer_text
from research.telechat.text.renderer import BOT, USER, Renderer, get_template
from research.telechat.text.vocab import Vocab

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
    assert notes == ("tool result without a preceding call",)


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
