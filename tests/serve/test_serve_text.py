"""Text out of tokens: reasoning, tool calls and stop strings come out the same however the tokens fall."""
import json

import pytest

from research.telechat.serve.text import AnswerText, CallFilter, ReasoningFilter
from research.telechat.text.renderer import Renderer, detect_template, get_template

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}}}]


def cuts(text):
    """All ways to split a text in two, and the one to split it into characters."""
    yield from ([text[:at], text[at:]] for at in range(len(text) + 1))
    yield list(text)


def reason(pieces, opened=False):
    divided = ReasoningFilter(opened)
    parts = [divided.feed(piece) for piece in pieces] + [divided.feed("", True)]
    return "".join(one for one, _ in parts), "".join(other for _, other in parts)


@pytest.mark.parametrize(("text", "opened", "reasoning", "content"), [
    ("<think>因为</think>\n\n所以", False, "因为", "所以"),
    ("\n<think>\na<b\n</think>\n\nc</think>", False, "a<b", "c</think>"),
    ("因为</think>所以", True, "因为", "所以"),
    ("没有思考 <think>x</think>", False, "", "没有思考 <think>x</think>"),
    ("<think>没有结束</th", False, "没有结束</th", ""),
    ("<thin", False, "", "<thin"),
    ("", False, "", "")])
def test_reasoning_is_divided_from_the_answer(text, opened, reasoning, content):
    for pieces in cuts(text):
        assert reason(pieces, opened) == (reasoning, content), pieces


@pytest.mark.parametrize(("text", "content", "names"), [
    ("你好", "你好", []),
    (CALL, "", ["weather"]),
    (f"我来查询。\n{CALL}\n{CALL}", "我来查询。", ["weather", "weather"]),
    ("a \n <tool b\n", "a \n <tool b\n", []),
    (f"{CALL}\n再见\n", "\n再见", ["weather"]),
    ("<tool_call>\nno JSON\n</tool_call>", "<tool_call>\nno JSON\n</tool_call>", []),
    ('x\n<tool_call>\n{"name": "f"', 'x\n<tool_call>\n{"name": "f"', [])])
def test_calls_are_taken_out_whole_or_not_at_all(text, content, names):
    for pieces in cuts(text):
        calls = CallFilter()
        parts = [calls.feed(piece) for piece in pieces] + [calls.feed("", True)]
        shown = "".join(part for part, _ in parts)
        assert shown == content, pieces
        assert [call["name"] for _, found in parts for call in found] == names
        for _, found in parts:
            assert all(json.loads(call["arguments"]) == {"city": "北京"} for call in found)


def test_parameters_one_by_one_have_the_types_of_the_tools():
    """Coder's form: a text that reads as a number stays a text where the tool says so."""
    for written, arguments in (("<param_key>city</param_key><param_value>2025</param_value>"
                                "<param_key>days</param_key><param_value>3</param_value>", {"city": "2025", "days": 3}),
                               ("", {})):
        for pieces in cuts(f"<tool_call>weather{written}</tool_call>"):
            calls = CallFilter(TOOLS)
            found = [call for piece in pieces for call in calls.feed(piece)[1]] + calls.feed("", True)[1]
            assert [(call["name"], json.loads(call["arguments"])) for call in found] == [("weather", arguments)]


def test_an_answer_of_whole_characters_ends_at_its_stop_string(vocabs):
    vocab = vocabs["12b"]
    renderer = Renderer(detect_template(vocab), vocab)
    answer = AnswerText(renderer, stop=["龘結束"])
    parts = [answer.feed(token) for token in vocab.encode("龙龘龘結束龘")]
    assert answer.stopped
    assert "".join(part.content for part in parts) == "龙龘"
    assert all("�" not in part.content for part in parts)
    cut = AnswerText(renderer)
    tokens = vocab.encode("龘")
    assert not any(cut.feed(token) for token in tokens[:-1]) and cut.end().content == "�"


def test_the_reasoning_that_a_prompt_has_opened(vocabs):
    """No stop string within, no call; behind it both count."""
    renderer = Renderer(get_template("telechat2_think"), vocabs["telechat2"])
    answer = AnswerText(renderer, stop=["停"], tools=TOOLS, thinking=True)
    text = f"不停。{CALL}\n</think>\n\n答案停。"
    parts = [answer.feed(token) for token in vocabs["telechat2"].encode(text)]
    assert "".join(part.reasoning for part in parts).lstrip(" ") == f"不停。{CALL}"
    assert "".join(part.content for part in parts) == "答案" and answer.stopped and not answer.called
