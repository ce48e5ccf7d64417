"""TeleChat3's chat templates, with its official vocabulary: what 36B-Thinking and Coder are asked and trained with."""
from itertools import groupby

import pytest
from conversation_fixtures import bot, system, user
from golden import SHARED, needs_shared

from research.telechat.chat.session import parse_tool_calls
from research.telechat.chat.stream import ThinkFilter
from research.telechat.common.errors import ConfigError
from research.telechat.text.calls import read_parameters
from research.telechat.text.renderer import Renderer, choose_template, get_template
from research.telechat.text.vocab import Vocab

pytestmark = needs_shared
TOOLS = [{"type": "function", "function": {"name": "天气", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}}}]
LISTED = ('{"type": "function", "function": {"name": "天气", "parameters": {"type": "object", "properties": '
          '{"city": {"type": "string"}, "days": {"type": "integer"}}}}}')
CALL = {"type": "function", "function": {"name": "天气", "arguments": {"city": "北京", "days": 2}}}
ROUND = [user("天气？"),
         {"role": "assistant", "content": "看看。", "reasoning_content": "先查", "tool_calls": [CALL, CALL]},
         {"role": "tool", "content": "晴"}, {"role": "tool", "content": "雨"}]


@pytest.fixture(scope="module")
def vocab():
    return Vocab.load(SHARED / "data/telechat3-36b/tokenizer.model")


@pytest.fixture(scope="module")
def thinking(vocab):
    return Renderer(get_template("telechat3"), vocab)


@pytest.fixture(scope="module")
def coder(vocab):
    return Renderer(get_template("telechat3_coder"), vocab)


def written(renderer, ids):
    """Ids as text, markers by their names; what is a marker must be one token."""
    names = {number: piece for piece, number in renderer.vocab.markers.items()}
    return "".join(names[run[0]] if run[0] in names else renderer.vocab.decode(run) for run in (
        list(run) for _, run in groupby(ids, key=lambda each: each if each in names else -1)))


def trained(renderer, messages, tools=None):
    """(the whole conversation, what of it carries loss)."""
    ids, mask = renderer.render(messages, tools)
    return written(renderer, ids), written(renderer, [each for each, on in zip(ids, mask) if on])


def test_markers_are_the_tokens_of_the_official_vocabulary(thinking):
    names = ("</think>", "<think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
    assert [thinking.vocab.markers[name] for name in names] == [9, 10, 11, 12, 13, 14]
    ids = thinking.prompt([user("你好")])
    assert ids == [6, 4, *thinking.vocab.encode("你好"), 5, 10, *thinking.vocab.encode("\n")]
    assert written(thinking, ids) == "<_system><_user>你好<_bot><think>\n"


def test_the_vocabulary_alone_does_not_tell_the_template(vocab):
    with pytest.raises(ConfigError, match=r"TeleChat3's.*telechat3, telechat3_coder"):
        choose_template(vocab)


def test_thinking_always_has_a_system_marker_and_asks_for_reasoning(thinking):
    def prompt(messages, tools=None):
        return written(thinking, thinking.prompt(messages, tools))
    earlier = {"role": "assistant", "content": "a", "reasoning_content": "lost"}
    assert prompt([system(""), user("q")]) == "<_system>\n<_user>q<_bot><think>\n"
    assert prompt([system("S"), user("q"), earlier, user("r")]) == (
        "<_system>S\n<_user>q<_bot>a<_end>\n<_user>r<_bot><think>\n")
    text = prompt(ROUND, TOOLS)
    assert text.startswith("<_system>\n\n# 可用工具\n") and f"<tools>\n{LISTED}\n</tools>" in text
    call = '<tool_call>\n{"name": "天气", "arguments": {"city": "北京", "days": 2}}\n</tool_call>'
    assert text.endswith(f"</tool_call>\n\n<_user>天气？<_bot>看看。{call}\n{call}<_end>\n<_user><tool_response>\n晴\n"
                         "</tool_response>\n<tool_response>\n雨\n</tool_response><_bot><think>\n")


def test_thinking_is_trained_with_its_reasoning_and_asked_as_it_is_trained(thinking):
    messages = [user("q"), {"role": "assistant", "content": "a", "reasoning_content": "plan"}]
    assert trained(thinking, messages) == ("<_system><_user>q<_bot><think>\nplan\n</think>\n\na<_end>",
                                           "plan\n</think>\n\na<_end>")
    assert trained(thinking, [user("q"), bot("a")]) == (
        "<_system><_user>q<_bot><think>\n\n</think>\n\na<_end>", "a<_end>")
    ids, _ = thinking.render(messages)
    assert ids[:len(thinking.prompt(messages[:1]))] == thinking.prompt(messages[:1])


@pytest.mark.parametrize("content", ["<think>\nplan\n</think>\n\na", "\n<think>plan</think>a", "plan\n</think>\n\na"])
def test_reasoning_in_the_content_is_reasoning(thinking, content):
    """As models write it, with the marker that opens it or without, as the prompt has that."""
    whole, part = ({"role": "assistant", "content": content},
                   {"role": "assistant", "content": "a", "reasoning_content": "plan"})
    assert trained(thinking, [user("q"), whole]) == trained(thinking, [user("q"), part])
    assert thinking.prompt([user("q"), whole, user("r")]) == thinking.prompt([user("q"), bot("a"), user("r")])
    other = {"role": "assistant", "content": f"see <think> and {content}"}           # not at the beginning: a text
    assert "see <think>" in written(thinking, thinking.prompt([user("q"), other, user("r")]))


def test_coder_has_no_line_ends_and_keeps_the_reasoning_since_the_last_question(coder):
    def prompt(messages, tools=None):
        return written(coder, coder.prompt(messages, tools))
    assert prompt([user("q")]) == "<_system><_user>q<_bot><think>"
    assert prompt([system("S"), user("q"), {**bot("a"), "reasoning_content": "lost"}, user("r")]) == (
        "<_system>S<_user>q<_bot></think>a<_end><_user>r<_bot><think>")
    call = ("<tool_call>天气<param_key>city</param_key><param_value>北京</param_value><param_key>days</param_key>"
            "<param_value>2</param_value></tool_call>")
    results = "<_observation><tool_response>晴</tool_response><tool_response>雨</tool_response>"
    text = prompt([user("x"), bot("y"), *ROUND], TOOLS)
    assert text.startswith("<_system>\n# Tools\n\nYou may call one or more functions") and f"\n{LISTED}\n" in text
    assert text.endswith("{param-value-2}</param_value>...</tool_call><_user>x<_bot></think>y<_end><_user>天气？<_bot>"
                         f"<think>\n先查\n</think>看看。{call}{call}<_end>{results}<_bot><think>")
    asked = [*ROUND, {**bot("好"), "reasoning_content": "知"}, user("谢")]
    assert prompt(asked).endswith(f"<_bot></think>看看。{call}{call}<_end>{results}<_bot></think>好<_end>"
                                  "<_user>谢<_bot><think>")


def test_coder_is_trained_with_its_reasoning(coder):
    whole, loss = trained(coder, [*ROUND, {**bot("晴"), "reasoning_content": "知"}], TOOLS)
    assert whole.endswith("<_bot><think>\n知\n</think>晴<_end>") and loss == "\n知\n</think>晴<_end>"
    assert "<_bot><think>\n先查\n</think>看看。" in whole
    ids, _ = coder.render([user("q"), bot("a")])
    assert ids[:len(coder.prompt([user("q")]))] == coder.prompt([user("q")])
    with_text = written(coder, coder.render([user("<think>x</think>"), bot("<tool_call>")])[0])
    assert with_text.count("<think>") == 2                       # the typed one is text, not the marker
    assert coder.render([user("<think>"), bot("a")])[0].count(10) == 1


def test_calls_of_coder_are_read_with_the_types_of_the_tools():
    pair = "<param_key>{}</param_key><param_value>{}</param_value>"
    answer = "ok<tool_call>天气" + pair.format("city", "22") + pair.format("days", "2") + "</tool_call>"
    assert parse_tool_calls(answer, tools=TOOLS) == (
        "ok", [{"name": "天气", "arguments": {"city": "22", "days": 2}}], [])
    assert parse_tool_calls(answer).calls == [{"name": "天气", "arguments": {"city": 22, "days": 2}}]
    assert read_parameters("天气", TOOLS) == {"name": "天气", "arguments": {}} and read_parameters("天气") is None
    assert parse_tool_calls("<tool_call>天气<param_key>city</tool_call>").faults
    stream = ThinkFilter(True)
    pieces = stream.feed("\nplan\n</think>a") + stream.flush()
    assert [(piece.text, piece.reasoning) for piece in pieces] == [("plan", True), ("a", False)]
