"""The APIs that users of TeleChat had before: their forms, bounds and codes."""
import json

import pytest
from serve_fixtures import Served

ASKED = [{"role": "user", "content": "你好"}]
V2, V4 = "/telechat/gptDialog/v2", "/telechat/gptDialog/v4"


@pytest.fixture(scope="module")
def served(vocabs):
    with Served(vocabs["12b"], context=300) as served:
        served.answer = "您好，龘！"
        yield served


def test_v2_is_the_bare_text_in_whole_characters(served):
    answer = served.post(V2, dialog=ASKED)
    assert answer.text == "您好，龘！" and answer.headers["content-type"] == "text/html; charset=utf-8"
    for piece in answer.pieces:
        piece.decode("utf-8")
    request = served.scheduler.requests[-1]
    assert request.sampling.top_k == 20 and request.sampling.top_p == 0.2 and request.sampling.temperature == 0.1
    assert request.sampling.repetition_penalty == 1.03 and request.sampling.do_sample
    assert len(request.prompt) + request.max_new_tokens == 300                  # 4096 by default, the context here


def test_v4_is_text_in_json(served):
    dialog = [*ASKED, {"role": "bot", "content": "您好"}, {"role": "user", "content": "你是谁"}]
    assert served.post(V4, dialog=dialog, max_length=100).json() == {"role": "bot", "content": "您好，龘！"}
    request = served.scheduler.requests[-1]
    assert list(request.prompt) == served.renderer.prompt(dialog)
    assert len(request.prompt) + request.max_new_tokens == 100


def test_a_history_that_is_too_long_loses_its_beginning(served):
    dialog = [{"role": ("user", "bot")[number % 2], "content": "很长的话" * 20} for number in range(21)]
    assert served.post(V4, dialog=dialog).json()["content"] == "您好，龘！"
    assert len(served.scheduler.requests[-1].prompt) <= 225


@pytest.mark.parametrize(("body", "code"), [
    ({}, "10301"), ({"dialog": None}, "10301"), ({"dialog": "x"}, "10904"), ({"dialog": []}, "10903"),
    ({"dialog": [{"role": "bot", "content": "x"}]}, "10904"), ({"dialog": [{"role": "user"}]}, "10904"),
    ({"dialog": [*ASKED, {"role": "bot", "content": "x"}]}, "10904"),
    *(({"dialog": ASKED, key: value}, "10305") for key, values in {
        "do_sample": (1, "x"), "max_length": (0, 4097, 1.0, True), "top_k": (0, 100, 1.5), "top_p": (0.0, 1.0, 1),
        "temperature": (0.0, 1.0, 1), "repetition_penalty": (1.0, 100.0, 2)}.items() for value in values)])
@pytest.mark.parametrize("path", [V2, V4])
def test_errors_have_their_codes_and_status_200(served, body, code, path):
    answer = served.post(path, **body)
    found = answer.json()
    assert answer.status == 200 and found["code"] == code, found
    assert set(found) == {"seqid", "code", "message", "flag", "data"} and found["data"] == "执行失败"


def test_null_counts_as_missing(served):
    assert served.post(V4, dialog=ASKED, top_p=None, do_sample=None).json()["role"] == "bot"


def test_generate(served):
    found = served.post("/generate", messages=ASKED).json()
    assert found["object"] == "chat.completion" and "id" not in found
    assert found["choices"] == [{"index": 0, "message": {"role": "assistant", "content": "您好，龘！"},
                                 "finish_reason": "stop"}]
    assert served.scheduler.requests[-1].sampling.greedy
    streamed = served.post("/generate", messages=ASKED, stream=True).text
    frames = streamed.split("\r\n\r\n")
    assert frames.pop() == "" and "[DONE]" not in streamed
    choices = [json.loads(frame[len("data: "):])["choices"][0] for frame in frames]
    assert choices[0]["delta"] == {"role": "assistant"} and choices[-1]["finish_reason"] == "stop"
    assert "".join(choice["delta"].get("content", "") for choice in choices) == "您好，龘！"


def test_generate_knows_no_earlier_question(served):
    """chat_web kept one history for all its clients; here it is the request's own."""
    served.post("/generate", messages=ASKED)
    served.post("/generate", messages=ASKED)
    assert served.scheduler.requests[-1].prompt == served.scheduler.requests[-2].prompt


def test_errors_of_generate(served):
    assert served.post("/generate", messages=[*ASKED, {"role": "assistant", "content": "x"}]).status == 400
    late = served.post("/generate", messages=[*ASKED, {"role": "system", "content": "x"}, *ASKED])
    choice = late.json()["choices"][0]
    assert late.status == 200 and choice["finish_reason"] == "error" and "after other messages" in choice["message"]
