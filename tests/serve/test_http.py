"""What holds for every request: keys, origins, sizes, rates, the queue, clients who go, the state of the server, the
log."""
import asyncio
import logging
import time

import pytest
from serve_fixtures import Served, exchange

from research.telechat.serve.http import Access
from research.telechat.serve.service import DRAINING, Limits

MESSAGES = [{"role": "user", "content": "你好，秘密"}]
CHAT = "/v1/chat/completions"


def make(vocabs, **options):
    return Served(vocabs["12b"], **options)


def error(answer):
    return answer.json()["error"]


def wait(condition, seconds=5.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.002)


def test_a_key_is_needed_where_there_is_one(vocabs):
    with make(vocabs, access=Access(keys=("secret", "另一个"), local=False)) as served:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic secret"},
                        {"authorization": "secret"}):
            refused = served.post(CHAT, headers, messages=MESSAGES)
            assert refused.status == 401 and error(refused)["code"] == "invalid_api_key"
            assert refused.headers["www-authenticate"] == "Bearer"
        assert served.post(CHAT, {"authorization": "bearer secret"}, messages=MESSAGES).status == 200
        assert served.ask("GET", "/metrics").status == served.ask("GET", "/v1/models").status == 401
        assert served.post("/telechat/gptDialog/v2").status == served.post("/generate").status == 401
        assert [served.ask("GET", path).status for path in ("/", "/health", "/ready")] == [200] * 3
    with make(vocabs, access=Access(keys=("secret",), local=False, open_metrics=True)) as served:
        assert served.ask("GET", "/metrics").status == 200


def test_pages_of_other_servers_may_not_ask(vocabs):
    with make(vocabs) as served:
        own = served.post(CHAT, {"origin": "http://localhost:8000"}, messages=MESSAGES)
        other = served.post(CHAT, {"origin": "https://evil.example"}, messages=MESSAGES)
        named = served.post(CHAT, {"host": "evil.example:8000", "origin": "http://evil.example:8000"},
                            messages=MESSAGES)                             # a name that now leads to this machine
        assert (own.status, other.status, named.status) == (200, 403, 403)
        assert "access-control-allow-origin" not in own.headers
    with make(vocabs, access=Access(origins=("https://good.example",))) as served:
        asked = {"origin": "https://good.example", "access-control-request-method": "POST"}
        before = served.ask("OPTIONS", CHAT, headers=asked)
        assert before.status == 204 and before.headers["access-control-allow-origin"] == "https://good.example"
        assert served.post(CHAT, {"origin": "https://good.example"}, messages=MESSAGES).status == 200


def test_bodies_have_a_limit(vocabs):
    with make(vocabs, limits=Limits(body_bytes=1000)) as served:
        whole = served.ask("POST", CHAT, b"x" * 1001)
        pieces = served.ask("POST", CHAT, chunks=[b"x" * 300] * 4)
        for refused in (whole, pieces):
            assert refused.status == 413 and error(refused)["code"] == "body_too_large"
            assert refused.headers["connection"] == "close"


def test_rates_have_a_limit(vocabs):
    with make(vocabs, access=Access(per_minute=2)) as served:
        statuses = [served.ask("GET", "/v1/models").status for _ in range(3)]
        assert statuses == [200, 200, 429]
        refused = served.ask("GET", "/v1/models")
        assert 1 <= int(refused.headers["retry-after"]) <= 30
        assert served.ask("GET", "/v1/models", client="10.0.0.9").status == 200
        assert served.ask("GET", "/health").status == 200


def test_a_full_queue_says_when_to_come_again(vocabs):
    with make(vocabs, places=1, queue=1) as served:
        served.scheduler.gate.clear()

        async def three():
            asked = [asyncio.ensure_future(exchange(served.app, "POST", CHAT, {"messages": MESSAGES}))
                     for _ in range(3)]
            done, _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED, timeout=5)
            first = [task.result() for task in done]
            served.scheduler.gate.set()
            return first, await asyncio.gather(*asked)
        first, answers = asyncio.run(three())
        assert {answer.status for answer in first} == {429}
        assert sorted(answer.status for answer in answers)[0] == 200
        refused = first[0]
        assert refused.headers["retry-after"] == "3" and error(refused)["code"] == "queue_full"
        assert served.post("/telechat/gptDialog/v2", dialog=MESSAGES[:1]).status == 200


def test_one_of_several_answers_that_finds_the_queue_full_takes_the_others_back(vocabs):
    with make(vocabs, places=1, queue=2) as served:
        served.scheduler.gate.clear()
        assert served.post(CHAT, messages=MESSAGES, n=3).status == 429
        assert len(served.scheduler.cancelled) == 2


def test_the_queue_has_a_time_limit(vocabs):
    with make(vocabs, limits=Limits(queue_timeout=0.05)) as served:
        served.scheduler.gate.clear()
        refused = served.post(CHAT, messages=MESSAGES)
        assert refused.status == 429 and error(refused)["code"] == "queue_timeout"
        assert len(served.scheduler.cancelled) == 1


@pytest.mark.parametrize(("path", "body"), [
    (CHAT, {"messages": MESSAGES, "stream": True}), (CHAT, {"messages": MESSAGES}),
    ("/v1/completions", {"prompt": ["x", "y"], "max_tokens": 200, "stream": True}),
    ("/telechat/gptDialog/v2", {"dialog": MESSAGES}), ("/telechat/gptDialog/v4", {"dialog": MESSAGES}),
    ("/generate", {"messages": MESSAGES, "stream": True})])
@pytest.mark.parametrize("pieces", [0, 1, 3])
def test_a_client_who_goes_frees_its_place(vocabs, path, body, pieces):
    with make(vocabs, pause=0.001) as served:
        served.answer = "好" * 400
        whole = not body.get("stream") and "v2" not in path
        answer = served.ask("POST", path, body, leave_after=0 if whole else pieces)
        assert not answer.complete
        wait(lambda: served.scheduler.stats().running == served.scheduler.stats().waiting == 0)
        stats = served.scheduler.stats()
        assert stats.cancelled == stats.submitted and stats.generated_tokens < 200
        assert served.post(CHAT, messages=MESSAGES, max_tokens=3).status == 200


def test_a_stop_string_frees_the_place(vocabs):
    with make(vocabs, pause=0.001) as served:
        served.answer = "一二三" + "四" * 400
        assert served.chat(stop="三")["choices"][0]["finish_reason"] == "stop"
        wait(lambda: served.scheduler.stats().running == 0)
        assert served.scheduler.stats().generated_tokens < 100


def test_the_state_of_the_server(vocabs):
    served = make(vocabs)
    assert served.ask("GET", "/health").status == 200 and served.ask("GET", "/ready").status == 503
    refused = served.post(CHAT, messages=MESSAGES)
    assert refused.status == 503 and "loading" in error(refused)["message"] and "retry-after" in refused.headers
    assert served.ask("GET", "/v1/models").status == 200
    with served:
        assert served.ask("GET", "/ready").status == 200
        served.service.state = DRAINING
        assert served.ask("GET", "/ready").status == 503 and served.ask("GET", "/health").status == 200
        assert error(served.post(CHAT, messages=MESSAGES))["code"] == "server_draining"
        served.service.fail("broken")
        assert served.ask("GET", "/health").status == 500


@pytest.mark.parametrize("stream", [False, True])
def test_a_failed_engine_ends_all_requests(vocabs, stream):
    with make(vocabs, pause=0.001) as served:
        served.answer = "好" * 400

        async def ask():
            task = asyncio.ensure_future(exchange(served.app, "POST", CHAT, {"messages": MESSAGES, "stream": stream}))
            while not served.scheduler.stats().running:
                await asyncio.sleep(0.002)
            served.service.fail("the engine failed")
            return await asyncio.wait_for(task, 5)
        answer = asyncio.run(ask())
        assert "the engine failed" in answer.text
        assert answer.status == (200 if stream else 500)
        if stream:
            assert '"error":{' in answer.text and answer.text.endswith("data: [DONE]\n\n")


def test_an_old_client_sees_a_failure_as_a_broken_connection(vocabs):
    with make(vocabs, pause=0.001) as served:
        served.answer = "好" * 400

        async def ask():
            task = asyncio.ensure_future(exchange(served.app, "POST", "/telechat/gptDialog/v2", {"dialog": MESSAGES}))
            while not served.scheduler.stats().generated_tokens:
                await asyncio.sleep(0.002)
            served.service.fail("broken")
            return await asyncio.wait_for(task, 5)
        answer = asyncio.run(ask())
        assert answer.status == 200 and not answer.complete and "broken" not in answer.text


def test_the_log_names_requests_and_never_their_contents(vocabs, caplog):
    with make(vocabs) as served, caplog.at_level(logging.DEBUG, logger="telechat.serve"):
        served.answer = "机密回答"
        own = served.post(CHAT, {"x-request-id": "my-id.1"}, messages=MESSAGES)
        made = served.post(CHAT, {"x-request-id": "two\nlines"}, messages=MESSAGES, secret_key=1)
        served.post(CHAT, messages=[{"role": "user", "content": 7, "x": "秘密"}])
        served.ask("GET", "/%0a\n\x1b[31m")
        assert own.headers["x-request-id"] == "my-id.1" and len(made.headers["x-request-id"]) == 32
    text = caplog.text
    assert "my-id.1 POST /v1/chat/completions 200" in text and "prompt=" in text and "completion=" in text
    assert '"secret_key"' in text                                              # a key that is ignored, once
    assert "秘密" not in text and "机密" not in text and "\x1b" not in text and len(caplog.records) == 5


def test_metrics(vocabs):
    with make(vocabs) as served:
        served.chat()
        served.ask("GET", "/no/such/route")
        page = served.ask("GET", "/metrics").text
    for line in ('telechat_requests_total{route="/v1/chat/completions",status="200"} 1.0',
                 'telechat_requests_total{route="other",status="404"} 1.0', "telechat_first_token_seconds_count 1.0",
                 "telechat_waiting 0.0", 'telechat_answers_total{outcome="finished"} 1.0',
                 "telechat_kv_blocks_total 100.0"):
        assert line in page.splitlines(), line


def test_routes_that_are_not_there(vocabs):
    with make(vocabs) as served:
        assert error(served.ask("GET", "/v2/models"))["type"] == "not_found_error"
        assert served.ask("GET", CHAT).status == 405 and served.ask("POST", "/health").status == 405


def test_a_stream_without_tokens_is_kept_alive(vocabs, monkeypatch):
    from research.telechat.serve import http
    monkeypatch.setattr(http, "PING_SECONDS", 0.01)
    with make(vocabs, pause=0.05) as served:
        text = served.post(CHAT, messages=MESSAGES, stream=True).text
        assert ": ping\n\n" in text and text.endswith("data: [DONE]\n\n")
