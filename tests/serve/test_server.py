"""A real server on a tiny model, asked by the clients that people use."""
import asyncio
import contextlib
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import prepared
import psutil
import pytest
from chat_fixtures import save_tiny, tiny_weights
from needs import program, require
from serve_fixtures import events
from vocab_fixtures import train_sentencepiece

from benchmarks import serve_streams
from research.telechat.text.renderer import Renderer, detect_template
from research.telechat.text.vocab import Vocab

pytestmark = [pytest.mark.slow, pytest.mark.long]
ROOT = Path(__file__).resolve().parents[2]
ASKED = [{"role": "user", "content": "今天天气很好，我们去公园散步吧"}]
CONTEXT, SLOTS, STREAMS = 128, 4, 200


def package(name):
    require(importlib.util.find_spec(name), f"needs the package {name} (the extra `clients`)")


class Running:
    """A server process. Attributes: `url`, `vocab`, `renderer`, `process`; `others`, of the same model: rank 1, and the
    process that msrun has beside the ranks."""

    def __init__(self, folder, ranks=1, model=None):
        """model: a server of the same one."""
        self.vocab_file = model.vocab_file if model else train_sentencepiece(folder / "tokenizer.model")
        self.vocab = Vocab.load(self.vocab_file)
        self.renderer = Renderer(detect_template(self.vocab), self.vocab)
        self.words = model.words if model else [
            "--config", "research/telechat/predict_telechat_tiny_cpu.yaml", "--load_checkpoint",
            str(folder / "tiny.ckpt"), "--tokenizer", str(self.vocab_file), "--slots", str(SLOTS), "--max_queue",
            str(STREAMS), *save_tiny(folder / "tiny.ckpt")]
        self.folder, self.log, self.errors = folder, folder / "stdout", folder / "stderr"
        self.others = []
        if ranks > 1:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                cluster = {"MS_WORKER_NUM": str(ranks), "MS_SCHED_HOST": "127.0.0.1",
                           "MS_SCHED_PORT": str(probe.getsockname()[1])}
            self.others = [self._start("scheduler", MS_ROLE="MS_SCHED", **cluster)]
            self.others += [self._start(f"rank{rank}", MS_ROLE="MS_WORKER", RANK_ID=str(rank), MS_NODE_ID=str(rank),
                                        **cluster) for rank in range(1, ranks)]
            self.process = self._start("", MS_ROLE="MS_WORKER", RANK_ID="0", MS_NODE_ID="0", **cluster)
        else:
            self.process = self._start("")
        self._wait(lambda: "ready: " in self.text())
        self.url = re.search(r"http://localhost:\d+", self.text()).group()
        self.port = int(self.url.rpartition(":")[2])

    def _start(self, name, **env):
        words = [*self.words, "--port", "0", "--output_dir", str(self.folder)]
        log, errors = (self.folder / f"{name}.{end}" if name else found for end, found in (
            ("stdout", self.log), ("stderr", self.errors)))
        return prepared.start(["scripts/serve.py", *words, *(["--use_parallel", "True"] if env else [])], ROOT,
                              {**os.environ, **env}, str(log), str(errors))

    def kill(self):
        for process in (self.process, *self.others):
            process.kill()

    def text(self):
        return self.log.read_text() if self.log.exists() else ""

    def _wait(self, condition, seconds=120):
        until = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None and time.monotonic() < until, self.text() + self.errors.read_text()
            time.sleep(0.05)

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return answer.read().decode()

    def post(self, path, **body):
        request = urllib.request.Request(self.url + path, json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())


    def stream(self, **body):
        """The text of each choice of a streamed chat."""
        request = urllib.request.Request(f"{self.url}/v1/chat/completions",
                                         json.dumps({**body, "stream": True}).encode())
        with urllib.request.urlopen(request, timeout=60) as answer:
            chunks = events(answer.read().decode())
        texts = [""] * body.get("n", 1)
        for chunk in chunks:
            for choice in chunk["choices"]:
                texts[choice["index"]] += choice["delta"].get("content") or ""
        return texts


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    running = Running(tmp_path_factory.mktemp("served"))
    yield running
    running.kill()


@pytest.fixture(scope="module")
def model():
    """The same model in this process."""
    from evaluation_fixtures import direct_logits  # noqa: F401 (the module must import without lm-eval)
    from model_fixtures import build_model
    hf_config, weights = tiny_weights()
    return build_model({**hf_config, "training_seqlen": CONTEXT}, weights)


@pytest.fixture(scope="module")
def client(server):
    package("openai")
    from openai import OpenAI
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def name(server):
    return json.loads(server.get("/v1/models"))["data"][0]["id"]


def test_answers_equal_those_of_the_model_alone(server, model):
    prompt = server.renderer.prompt(ASKED)
    ids = list(model.stream(prompt, do_sample=False, repetition_penalty=1.0, max_new_tokens=12,
                            eos_token_id=[server.renderer.end_id]))
    sampled = list(model.stream(prompt, do_sample=True, temperature=0.9, top_k=0, top_p=1.0, repetition_penalty=1.0,
                                seed=5, max_new_tokens=12, eos_token_id=[server.renderer.end_id]))
    for expected, how in ((ids, {"temperature": 0}), (sampled, {"temperature": 0.9, "seed": 5, "top_k": 0})):
        found = server.post("/v1/completions", prompt=prompt, max_tokens=12, top_p=1, repetition_penalty=1, **how)
        ended = expected[:-1] if expected[-1] == server.renderer.end_id else expected
        assert found["choices"][0]["text"] == server.vocab.decode(ended, True)
        assert found["usage"]["completion_tokens"] == len(expected)


def test_openai(server, client):
    import openai
    served = client.models.list().data[0].id
    whole = client.chat.completions.create(model=served, messages=ASKED, seed=1, temperature=1, max_tokens=20,
                                           logprobs=True, top_logprobs=2, n=2)
    again = client.chat.completions.create(model=served, messages=ASKED, seed=2, temperature=1, max_tokens=20)
    assert again.choices[0].message.content == whole.choices[1].message.content
    assert len(whole.choices[0].logprobs.content) <= 20 and len(whole.choices[0].logprobs.content[0].top_logprobs) == 2
    stream = client.chat.completions.create(model=served, messages=ASKED, seed=1, temperature=1, max_tokens=20,
                                            stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content and chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=served, messages=ASKED * 1, max_tokens=1000)
    assert caught.value.code == "context_length_exceeded" and caught.value.request_id
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt", messages=ASKED)
    texts = client.completions.create(model=served, prompt=["the quick", "brown"], max_tokens=3, temperature=0)
    assert len(texts.choices) == 2


def test_json_from_a_model_that_knows_nothing(server, client):
    require(importlib.util.find_spec("llguidance"), "needs the package llguidance (the extra `constrained`)")
    schema = {"type": "object", "properties": {"sauce": {"enum": ["生抽", "老抽"]}, "dark": {"type": "boolean"}},
              "required": ["sauce", "dark"], "additionalProperties": False}
    for seed in range(3):
        answer = client.chat.completions.create(
            model=name(server), messages=ASKED, seed=seed, temperature=1.5, max_tokens=60,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}).choices[0]
        read = json.loads(answer.message.content)
        assert set(read) == {"sauce", "dark"} and answer.finish_reason == "stop"


def test_langchain(server):
    package("langchain_openai")
    from langchain_openai import ChatOpenAI
    chat = ChatOpenAI(model=name(server), base_url=f"{server.url}/v1", api_key="none", temperature=0,
                      max_completion_tokens=10, max_retries=0, seed=3)
    whole = chat.invoke([("human", ASKED[0]["content"])])
    assert whole.content == "".join(chunk.content for chunk in chat.stream([("human", ASKED[0]["content"])]))
    assert whole.usage_metadata["output_tokens"] <= 10
    assert whole.response_metadata["finish_reason"] in ("length", "stop")


def test_lm_eval(server, model):
    """Log-likelihoods and chat answers over HTTP equal those of the adapter in one process."""
    require(importlib.util.find_spec("lm_eval"), "needs lm-evaluation-harness (the extra `evaluation`)")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

    from research.telechat.evaluation.harness import TelechatLM
    from research.telechat.telechat_tokenizer import TelechatTokenizer
    texts = [("生抽与老抽的区别？", "生抽颜色浅"), ("The quick brown", " fox jumps"), ("a", "b"),
             ("今天", "天气很好" * 8)]
    asked = [Instance("loglikelihood", {}, pair, 0) for pair in texts]
    here = TelechatLM(model, TelechatTokenizer(str(server.vocab_file)), batch_size=4, progress=False)
    there = LocalCompletionsAPI(base_url=f"{server.url}/v1/completions", model=name(server), max_length=CONTEXT,
                                num_concurrent=3, batch_size=2)
    assert there.tokenizer_backend == "remote"
    context, continuation = there._encode_pair(*texts[0])
    assert context + continuation == here._encode_pair(*texts[0])[0] + here._encode_pair(*texts[0])[1]
    for (found, greedy), (expected, expected_greedy) in zip(there.loglikelihood(asked), here.loglikelihood(asked)):
        assert abs(found - expected) < 1e-3 and greedy == expected_greedy
    from lm_eval.models.api_models import JsonChatStr
    chat = LocalChatCompletion(base_url=f"{server.url}/v1/chat/completions", model=name(server), max_length=CONTEXT,
                               num_concurrent=2)
    talk = [*ASKED, {"role": "assistant", "content": "颜色不同。"}, {"role": "user", "content": "The quick brown"}]
    settings = [{"until": ["。"], "max_gen_toks": 6, "temperature": 0}, {"until": ["\n\n"], "max_gen_toks": 12}]
    cases = [(messages, each) for messages in (ASKED, talk) for each in settings]
    answers = chat.generate_until([Instance("generate_until", {}, (
        JsonChatStr(json.dumps(messages, ensure_ascii=False)), dict(each)), 0) for messages, each in cases])
    assert answers == here.generate_until([Instance("generate_until", {}, (
        here.apply_chat_template(messages), each), 0) for messages, each in cases]) and any(answers)


def test_curl(server):
    curl = program("curl")
    body = json.dumps({"messages": ASKED, "max_tokens": 5, "stream": True})
    done = subprocess.run([curl, "-sNi", f"{server.url}/v1/chat/completions", "-d", body], capture_output=True,
                          text=True, timeout=60, check=True).stdout
    head, _, text = done.partition("\n\n")
    assert "200 OK" in head and "x-request-id" in head.lower() and events(text.replace("\r", ""))
    old = json.dumps({"dialog": ASKED, "max_length": 40})
    done = subprocess.run([curl, "-sN", f"{server.url}/telechat/gptDialog/v2", "-d", old], capture_output=True,
                          timeout=60, check=True).stdout
    done.decode("utf-8")


def test_garbage_does_no_harm(server):
    for data in (b"\x00\xff\x16\x03\x01" * 50, b"GET / HTTP/9.9\r\n\r\n", b"POST /v1/chat/completions HTTP/1.1\r\n"
                 b"host: localhost\r\ncontent-length: 99999999999\r\n\r\n", b"A" * 200000,
                 b"POST /generate HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n"):
        with contextlib.suppress(ConnectionError), socket.create_connection(
                ("localhost", server.port), timeout=10) as connection:
            connection.sendall(data)                         # more than anybody reads
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass
    assert server.get("/ready") == '{"status":"ready"}'


def test_many_streams_and_clients_who_leave(server):
    """None is lost, no block leaks, memory stays flat."""
    process = psutil.Process(server.process.pid)
    before, memory = serve_streams.settled(server.port), process.memory_info().rss
    ended = asyncio.run(asyncio.wait_for(serve_streams.streams(server.port, STREAMS, 7), 90))
    read = [one for one in ended if one.text is not None]
    assert 60 < len(read) < 140 and all(one.whole for one in read)
    after = serve_streams.settled(server.port)
    change = {key: after[key] - before.get(key, 0) for key in after if key.startswith("telechat_answers_total")}
    assert sum(change.values()) <= STREAMS and change['telechat_answers_total{outcome="failed"}'] == 0
    assert change['telechat_answers_total{outcome="finished"}'] >= len(read)
    assert change['telechat_answers_total{outcome="cancelled"}'] > 0
    assert after["telechat_kv_blocks_used"] == 0
    assert process.memory_info().rss - memory < 100 << 20


def test_two_ranks_answer_like_one_process(server, tmp_path):
    """Only rank 0 serves; rank 1 launches the same, and ends well with it. On a CPU each has the whole model."""
    two = Running(tmp_path, 2, server)
    try:
        asked = [{"temperature": 0}, {"temperature": 1, "seed": 3, "n": 2}]
        if importlib.util.find_spec("llguidance"):                # which only rank 0 has
            asked.append({"seed": 4, "temperature": 1, "response_format": {"type": "json_object"}})
        for how in asked:
            found = [one.stream(messages=ASKED, max_tokens=12, **how) for one in (server, two)]
            assert found[0] == found[1] and all(found[0])
        ended = asyncio.run(asyncio.wait_for(serve_streams.streams(two.port, 12, 1), 60))
        assert all(one.whole for one in ended if one.text is not None) and not all(one.text for one in ended)
        assert serve_streams.settled(two.port)["telechat_kv_blocks_used"] == 0
        os.kill(two.others[1].pid, signal.SIGTERM)                # it asks rank 0
        assert two.process.wait(60) == two.others[1].wait(60) == two.others[0].wait(60) == 0
    finally:
        two.kill()
    ranks = [re.search(r"rank (\d): (\d+ launches, digest \w+)", log.read_text()) for log in (
        two.log, tmp_path / "rank1.stdout")]
    assert [rank.group(1) for rank in ranks] == ["0", "1"] and ranks[0].group(2) == ranks[1].group(2)
    assert "http://" not in (tmp_path / "rank1.stdout").read_text()


def test_sigterm_finishes_what_runs_and_takes_nothing_new(server):
    """Last, as the server ends."""
    body = json.dumps({"messages": ASKED, "stream": True, "max_tokens": 60, "ignore_eos": True}).encode()
    request = urllib.request.Request(f"{server.url}/v1/chat/completions", body)
    with urllib.request.urlopen(request, timeout=60) as answer:
        answer.readline()
        os.kill(server.process.pid, signal.SIGTERM)
        server._wait(lambda: "stopping: no new requests" in server.errors.read_text(), 10)
        assert '"finish_reason":"length"' in answer.read().decode()
    assert server.process.wait(30) == 0
    text = server.errors.read_text()
    assert "Traceback" not in text and "今天" not in text
