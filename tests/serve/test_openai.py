"""OpenAI's API, asked as ASGI, with a script in the model's place."""
import json

import numpy as np
import pytest
from needs import require
from serve_fixtures import Served

from research.telechat.generation.sampling import Sampling
from research.telechat.serve import constraint
from research.telechat.serve.openai_requests import CHAT_KEYS, COMPLETION_KEYS

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {
    "type": "object", "properties": {"city": {"enum": ["北京", "上海"]}}, "required": ["city"],
    "additionalProperties": False}}}


@pytest.fixture(scope="module")
def served(vocabs):
    with Served(vocabs["telechat2"], context=2000, sampling=Sampling(True, 0.7, 5), max_new_tokens=300) as served:
        yield served


@pytest.fixture(autouse=True)
def _answer(request):
    if "served" in request.fixturenames:
        served = request.getfixturevalue("served")
        served.answer = "好的。"
        served.scheduler.requests.clear()


def test_models(served):
    listed = served.ask("GET", "/v1/models").json()
    assert [model["id"] for model in listed["data"]] == ["telechat-test"]
    assert served.ask("GET", "/v1/models/telechat-test").json() == listed["data"][0]
    assert listed["data"][0]["max_model_len"] == 2000
    assert served.ask("GET", "/v1/models/other").json()["error"]["code"] == "model_not_found"


def test_an_answer_and_its_stream_say_the_same(served):
    served.answer = "<think>想一想</think>\n答案是：龘。"
    whole = served.chat()
    assert whole["object"] == "chat.completion" and whole["choices"][0]["finish_reason"] == "stop"
    message = whole["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "答案是：龘。", "reasoning_content": "想一想"}
    prompt = served.scheduler.requests[0].prompt
    assert list(prompt) == served.renderer.prompt([{"role": "user", "content": "你好"}])
    tokens = len(served.vocab.encode_with_specials(served.answer)) + 1
    assert whole["usage"]["prompt_tokens"] == len(prompt) and whole["usage"]["completion_tokens"] == tokens
    chunks = served.stream(stream_options={"include_usage": True})
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
    assert "".join(delta.get("content", "") for delta in deltas) == message["content"]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == message["reasoning_content"]
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
    assert all(chunk["choices"] for chunk in served.stream())              # no usage unless it is asked for


def test_what_is_asked_reaches_the_scheduler(served):
    served.chat(temperature=0.5, top_p=0.9, top_k=7, presence_penalty=1, frequency_penalty=-1, min_tokens=2, n=3,
                repetition_penalty=1.2, logit_bias={"7": -100}, seed=-1, max_tokens=3, max_completion_tokens=4)
    requests = served.scheduler.requests
    assert [request.seed for request in requests] == [2 ** 32 - 1, 0, 1]
    assert {request.max_new_tokens for request in requests} == {4}
    assert requests[0].sampling == Sampling(True, 0.5, 7, 0.9, 1.2, 2, 1.0, -1.0, ((7, -100.0),))
    assert requests[0].end_tokens == {served.renderer.end_id, served.renderer.user_id}
    served.scheduler.requests.clear()
    served.chat()
    served.chat(temperature=0, ignore_eos=True, max_tokens=9)
    plain, greedy = served.scheduler.requests
    assert plain.sampling == Sampling(True, 0.7, 5) and plain.max_new_tokens == 300 and plain.seed is None
    assert not greedy.sampling.do_sample and greedy.end_tokens == frozenset()


def test_several_answers(served):
    whole = served.chat(n=2)
    assert [choice["index"] for choice in whole["choices"]] == [0, 1]
    prompt = len(served.scheduler.requests[0].prompt)
    assert whole["usage"]["prompt_tokens"] == prompt                       # once, though it is answered twice
    texts = ["", ""]
    for chunk in served.stream(n=2):
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == ["好的。", "好的。"]


def test_stop_and_length(served):
    served.answer = "一二三四五"
    whole = served.chat(stop=["四", "三四"])
    assert whole["choices"][0]["message"]["content"] == "一二"
    assert whole["choices"][0]["finish_reason"] == "stop"
    cut = served.chat(max_tokens=2)
    assert cut["choices"][0]["finish_reason"] == "length" and cut["usage"]["completion_tokens"] == 2


def test_logprobs(served):
    whole = served.chat(logprobs=True, top_logprobs=2)["choices"][0]
    content = whole["logprobs"]["content"]
    ids = [*served.vocab.encode("好的。"), served.renderer.end_id]
    assert [bytes(entry["bytes"]) for entry in content] == [served.vocab.token_bytes(token) for token in ids]
    assert content[0]["logprob"] == -0.25 and [top["logprob"] for top in content[0]["top_logprobs"]] == [-0.25, -2.0]
    streamed = [entry for chunk in served.stream(logprobs=True) for choice in chunk["choices"]
                for entry in (choice["logprobs"] or {}).get("content", ())]
    assert len(streamed) == len(ids)
    assert served.chat()["choices"][0]["logprobs"] is None


def test_bytes_that_are_no_character_are_written_as_bytes(served):
    token = served.vocab.token_to_id("<0xE4>")
    served.answer = [token]
    entry = served.chat(logprobs=True)["choices"][0]["logprobs"]["content"][0]
    assert entry["token"] == "bytes:\\xe4" and entry["bytes"] == [0xE4]


def test_tool_calls(served):
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>'
    served.answer = f"我来查询。\n{call}\n{call}"
    choice = served.chat(tools=[TOOL])["choices"][0]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] == "我来查询。"
    calls = choice["message"]["tool_calls"]
    assert [json.loads(call["function"]["arguments"]) for call in calls] == [{"city": "北京"}] * 2
    assert calls[0]["id"] != calls[1]["id"] and calls[0]["type"] == "function"
    prompt = served.vocab.decode(served.scheduler.requests[0].prompt)
    assert '"name": "weather"' in prompt
    deltas = [chunk["choices"][0] for chunk in served.stream(tools=[TOOL])]
    streamed = [call for choice in deltas for call in choice["delta"].get("tool_calls", ())]
    assert [call["index"] for call in streamed] == [0, 1] and deltas[-1]["finish_reason"] == "tool_calls"
    plain = served.chat(tools=[TOOL], tool_choice="none")["choices"][0]
    assert "<tool_call>" in plain["message"]["content"] and "tool_calls" not in plain["message"]
    assert "weather" not in served.vocab.decode(served.scheduler.requests[-1].prompt)
    history = [{"role": "user", "content": "天气"}, {"role": "assistant", "content": None, "tool_calls": calls[:1]},
               {"role": "tool", "tool_call_id": calls[0]["id"], "content": "晴"}]
    assert served.post("/v1/chat/completions", messages=history).status == 200


@pytest.fixture
def constrained():
    require(constraint.available(), "needs the package llguidance (the extra `constrained`)")


def test_json_of_a_schema(served, constrained):
    """The script says something else at every token, and the constraint wins."""
    schema = {"type": "object", "properties": {"name": {"enum": ["生抽", "老抽"]}, "dark": {"type": "boolean"}},
              "required": ["name", "dark"], "additionalProperties": False}
    served.answer = "这不是JSON" * 20
    asked = {"type": "json_schema", "json_schema": {"name": "sauce", "schema": schema}}
    choice = served.chat(response_format=asked)["choices"][0]
    read = json.loads(choice["message"]["content"])
    assert set(read) == {"name", "dark"} and read["name"] in ("生抽", "老抽") and choice["finish_reason"] == "stop"
    served.answer = '{"a": "是"}'
    assert json.loads(served.chat(response_format={"type": "json_object"})["choices"][0]["message"]["content"]) == {
        "a": "是"}
    wrong = {"type": "json_schema", "json_schema": {"schema": {"type": "no such type"}}}
    refused = served.post("/v1/chat/completions", messages=[{"role": "user", "content": "x"}], response_format=wrong)
    assert refused.status == 400 and refused.json()["error"]["param"] == "response_format"


@pytest.mark.parametrize("family", ["7b", "12b", "52b", "telechat2"])
def test_every_vocabulary_can_be_constrained(vocabs, family, constrained):
    vocab = vocabs[family]
    grammars = constraint.Grammars(vocab, vocab.size + 8, [2])
    text = '{"数": 12, "b": "x\\n好"}'
    grammar = grammars.constraint(constraint.json_grammar({"type": "object"}), "response_format")
    for token in vocab.encode(text):
        mask = grammar.allowed()
        assert mask.shape == (vocab.size + 8,) and mask[token] and not mask[2], vocab.id_to_token(token)
        grammar.advance(token)
    assert np.flatnonzero(grammar.allowed()).tolist() == [2]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_demanded_call_comes(served, constrained, choice):
    served.answer = "我不想调用" * 30
    other = {"type": "function", "function": {"name": "time"}}
    found = served.chat(tools=[TOOL] if choice == "required" else [TOOL, other], tool_choice=choice,
                        parallel_tool_calls=False)["choices"][0]
    (call,) = found["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"])["city"] in ("北京", "上海")


def test_without_the_library_nothing_is_pretended(served, monkeypatch):
    monkeypatch.setattr(constraint, "available", lambda: False)
    refused = served.post("/v1/chat/completions", messages=[{"role": "user", "content": "x"}],
                          response_format={"type": "json_object"})
    assert refused.status == 400 and "llguidance" in refused.json()["error"]["message"]


def test_completions(served):
    vocab = served.vocab
    served.answer = "，世界"
    ids = vocab.encode("你好")
    found = served.post("/v1/completions", prompt=["你好", "你好"], n=2, max_tokens=9).json()
    assert [choice["text"] for choice in found["choices"]] == ["，世界"] * 4
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2, 3]
    assert found["usage"]["prompt_tokens"] == 2 * len(ids)
    for prompt in (ids, [ids]):
        served.post("/v1/completions", prompt=prompt)
        assert list(served.scheduler.requests[-1].prompt) == ids
    assert served.scheduler.requests[-1].max_new_tokens == 16
    streamed = served.post("/v1/completions", prompt="你好", stream=True, echo=True).text
    texts = [json.loads(frame[6:])["choices"][0]["text"] for frame in streamed.split("\n\n")[:-2]]
    assert "".join(texts) == "你好，世界"


def test_scores_of_a_prompt(served):
    """As lm-eval asks for log-likelihoods; it reads token_logprobs[len(context):-1]."""
    ids = served.vocab.encode("生抽与老抽的区别")
    choice = served.post("/v1/completions", prompt=[ids], max_tokens=1, echo=True, logprobs=1,
                         temperature=0).json()["choices"][0]
    logprobs = choice["logprobs"]
    assert len(logprobs["tokens"]) == len(ids) + 1
    assert logprobs["token_logprobs"][:-1] == [None, *(-float(token % 7) for token in ids[1:])]
    assert logprobs["top_logprobs"][0] is None
    for token, logprob, top in list(zip(ids, logprobs["token_logprobs"], logprobs["top_logprobs"]))[1:]:
        assert max(top.values()) == max(-0.5, logprob), token
    alone = served.post("/v1/completions", prompt=[ids], max_tokens=0, echo=True, logprobs=1).json()["choices"][0]
    assert len(alone["logprobs"]["tokens"]) == len(ids) and alone["text"] == served.vocab.decode(ids)
    offsets = [*alone["logprobs"]["text_offset"], len(alone["text"])]
    pieces = [alone["text"][begin:end] for begin, end in zip(offsets, offsets[1:])]
    for piece, token in zip(pieces, alone["logprobs"]["tokens"]):
        assert piece == token.strip() or token.startswith("bytes:"), (piece, token)


def test_tokens(served):
    ids = served.vocab.encode("你好 <_user>")
    found = served.post("/tokenize", prompt="你好 <_user>", add_special_tokens=False).json()
    assert found["tokens"] == ids and found["count"] == len(ids) and found["max_model_len"] == 2000
    assert served.renderer.user_id not in ids
    assert served.post("/detokenize", tokens=ids).json() == {"prompt": "你好 <_user>"}
    messages = [{"role": "user", "content": "你好"}]
    assert served.post("/tokenize", messages=messages).json()["tokens"] == served.renderer.prompt(messages)
    assert served.ask("GET", "/tokenizer_info").json()["eos_token"] == "<_end>"
    assert served.post("/detokenize", tokens=[-1]).status == served.post("/tokenize", prompt=3).status == 400


MESSAGES = [{"role": "user", "content": "x"}]
FAULTS = [
    ({}, "messages", None), ({"messages": []}, "messages", None), ({"messages": "hi"}, "messages", None),
    ({"messages": [{"role": "bot?", "content": "x"}]}, "messages", "role 'bot?' is unknown"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "text"),
    ({"messages": [*MESSAGES, {"role": "system", "content": "x"}, *MESSAGES]}, "messages", "after other messages"),
    ({"messages": MESSAGES * 2000}, "messages", "found 2000"),
    ({"temperature": -1}, "temperature", "found -1"), ({"temperature": "hot"}, "temperature", "number"),
    ({"temperature": True}, "temperature", "number"), ({"top_p": 0}, "top_p", "above 0"),
    ({"n": 99}, "n", "from 1 to 8"), ({"n": 0}, "n", None), ({"seed": 1.5}, "seed", "whole"),
    ({"stop": ""}, "stop", None), ({"stop": [1]}, "stop", None),
    ({"max_tokens": 0}, "max_tokens", None), ({"stream": "yes"}, "stream", "true or false"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream: true"),
    ({"top_logprobs": 3}, "top_logprobs", "logprobs: true"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", None),
    ({"logit_bias": {"x": 1}}, "logit_bias", None), ({"logit_bias": {"999999": 1}}, "logit_bias", "999999"),
    ({"logit_bias": {"1": 101}}, "logit_bias", None), ({"tools": [{"type": "x"}]}, "tools", "number 1"),
    ({"tool_choice": "required"}, "tool_choice", "needs tools"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "no"}}}, "tool_choice", None),
    ({"response_format": {"type": "xml"}}, "response_format", None), ({"functions": [{}]}, "functions", "use tools"),
    ({"modalities": ["audio"]}, "modalities", None), ({"reasoning_effort": "high"}, "reasoning_effort", "medium"),
    ({"skip_special_tokens": False}, "skip_special_tokens", "only supported value"),
    ({"add_generation_prompt": False}, "add_generation_prompt", "only supported value"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": []}}}, "tool_choice", None),
]


@pytest.mark.parametrize(("changes", "param", "word"), FAULTS)
def test_a_fault_is_named(served, changes, param, word):
    body = changes if "messages" in changes or not changes else {"messages": MESSAGES, **changes}
    refused = served.post("/v1/chat/completions", **body)
    error = refused.json()["error"]
    assert refused.status == 400 and error["type"] == "invalid_request_error" and error["param"] == param, error
    assert (word or param) in error["message"] and "\n" not in error["message"]
    assert not served.scheduler.requests


@pytest.mark.parametrize(("changes", "param"), [
    ({"prompt": None}, "prompt"), ({"prompt": []}, "prompt"), ({"prompt": [[]]}, "prompt"), ({"prompt": ""}, "prompt"),
    ({"prompt": [1.5]}, "prompt"), ({"prompt": [[999999]]}, "prompt"), ({"prompt": ["x"] * 200}, "prompt"),
    ({"suffix": "x"}, "suffix"), ({"best_of": 3}, "best_of"), ({"max_tokens": 0}, "max_tokens")])
def test_a_fault_of_a_completion_is_named(served, changes, param):
    refused = served.post("/v1/completions", **{"prompt": "x", **changes})
    assert refused.status == 400 and refused.json()["error"]["param"] == param, refused.text


# JSON that is not what any key expects.
ODD = ["null", "true", "0", "-1", "3", "1.5", "1e400", "9" * 400, "-" + "9" * 4200, '""', '"x"', '"\\u0000"', "[]",
       "{}", "[null]", '["a"]', "[[1]]", "[{}]", '{"1": 1e400}', '{"type": []}', "[" * 300 + "]" * 300,
       '[{"type": "function", "function": {"name": {}}}]', '[{"role": ["user"], "content": [{"type": {}}]}]',
       '[{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [5]}, {"role": "user", "content": 5}]']


@pytest.mark.parametrize(("path", "rest", "keys"), [
    ("/v1/chat/completions", '"messages": [{"role": "user", "content": "x"}], "stream": true', CHAT_KEYS - {"stream"}),
    ("/v1/completions", '"prompt": "x"', COMPLETION_KEYS), ("/generate", '"stream": false', {
        "messages", "top_p", "top_k", "temperature", "max_length", "do_sample"})])
def test_odd_values_are_taken_or_named_in_one_line(served, path, rest, keys):
    """The key comes last, so it wins over the rest of the body."""
    for key in sorted(keys):
        for value in ODD:
            answer = served.ask("POST", path, f'{{"max_tokens": 1, {rest}, "{key}": {value}}}'.encode())
            assert answer.status in (200, 400, 404), (key, value[:60], answer.text[:200])
            if answer.status != 200:
                error = answer.json()["error"]
                assert "\n" not in error["message"] and len(error["message"]) < 500, (key, value[:60], error)


@pytest.mark.parametrize(("schema", "word"), [
    ({"type": "string", "enum": ["\ud800"]}, "surrogates"), ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    ({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "no value fits"),
    ({"type": "object", "properties": {str(number): {"type": "string"} for number in range(3000)}}, "2000")])
def test_what_the_library_cannot_do_is_refused(served, constrained, schema, word):
    """Never answered with what does not fit, even where it is found at the second token."""
    served.answer = '{"1": "x"}'
    refused = served.post("/v1/chat/completions", messages=[{"role": "user", "content": "x"}],
                          response_format={"type": "json_schema", "json_schema": {"schema": schema}})
    error = refused.json()["error"]
    assert refused.status == 400 and word in error["message"] and "start:" not in error["message"], error


def test_only_one_call_where_calls_are_not_parallel(served):
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>'
    served.answer = f"查。\n{call}\n{call}\n好"
    choice = served.chat(tools=[TOOL], parallel_tool_calls=False)["choices"][0]
    assert len(choice["message"]["tool_calls"]) == 1 and choice["message"]["content"] == "查。"
    deltas = [chunk["choices"][0] for chunk in served.stream(tools=[TOOL], parallel_tool_calls=False)]
    assert sum(len(choice["delta"].get("tool_calls", ())) for choice in deltas) == 1
    assert choice["finish_reason"] == deltas[-1]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff\xfe", b'{"messages": NaN}', b"[" * 50000, b'"x"',
                                  b'{"user": "\\ud83d"}'])
def test_garbage_is_refused(served, body):
    refused = served.ask("POST", "/v1/chat/completions", body)
    assert refused.status == 400 and "body" in refused.json()["error"]["message"]


def test_what_is_too_long_is_refused_as_such(served):
    long = served.post("/v1/chat/completions", messages=[{"role": "user", "content": "好" * 3000}])
    asked = served.post("/v1/chat/completions", messages=MESSAGES, max_tokens=5000)
    for refused in (long, asked):
        error = refused.json()["error"]
        assert refused.status == 400 and error["code"] == "context_length_exceeded" and "2000" in error["message"]
    assert served.post("/v1/chat/completions", messages=MESSAGES, model="gpt-4").status == 404
    assert served.post("/v1/chat/completions", messages=MESSAGES, model="telechat-test", made_up=1).status == 200
