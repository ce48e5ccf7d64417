"""A scheduler without a model, and a client that speaks ASGI, for the tests of the web server. A module that imports
this is skipped without the packages of the extra `serve`, or fails with CI=true."""
import asyncio
import importlib.util
import json
import os
import threading
import time
from collections import deque
from types import SimpleNamespace

import pytest

MISSING = [name for name in ("starlette", "uvicorn", "prometheus_client") if importlib.util.find_spec(name) is None]
if MISSING and os.environ.get("CI", "").lower() != "true":
    pytest.skip(f"needs {', '.join(MISSING)} (the extra `serve`)", allow_module_level=True)

from research.telechat.common.errors import ConfigError
from research.telechat.generation.choice import CONSTRAINT
from research.telechat.generation.requests import (
    Draining,
    Finished,
    PromptScores,
    QueueFull,
    RequestTooLong,
    Started,
    Stats,
    Ticket,
    Token,
)
from research.telechat.generation.sampling import Sampling
from research.telechat.serve.answering import Engine
from research.telechat.serve.app import make_app
from research.telechat.serve.service import Service
from research.telechat.text.renderer import Renderer, detect_template

_GREEDY = Sampling()


class FakeScheduler:
    """As `SchedulerLike`: answers every prompt with what `script(request)` gives, one token a step.

    Attributes: `requests`, all that were submitted; `cancelled`, tickets; `gate`, an Event without which no step is
    done; `pause`, seconds between steps; `places`, how many run at once; `queue`, how many may wait.
    """

    def __init__(self, script, context, vocab_size, places=16, queue=64, pause=0.0):
        self.script, self.context, self.vocab_size = script, context, vocab_size
        self.places, self.queue, self.pause = places, queue, pause
        self.requests, self.cancelled = [], set()
        self.gate = threading.Event()
        self.gate.set()
        self.fault = None
        self._waiting, self._running, self._lock, self._draining = deque(), {}, threading.RLock(), False
        self._counts = dict.fromkeys(("steps", "submitted", "finished", "cancelled", "failed", "prompt", "new"), 0)

    def submit(self, request, on_event):
        with self._lock:
            if self._draining:
                raise Draining("draining")
            if len(request.prompt) + request.max_new_tokens > self.context:
                raise RequestTooLong("too long", self.context)
            if max(request.prompt) >= self.vocab_size:
                raise ConfigError("a token that the model does not have")
            if len(self._waiting) >= self.queue:
                raise QueueFull("the queue is full", 3.0)
            self.requests.append(request)
            ticket = Ticket(self._counts["submitted"])
            self._waiting.append((ticket, request, on_event))
            self._counts["submitted"] += 1
        return ticket

    def cancel(self, ticket):
        self.cancelled.add(ticket)

    def step(self):
        with self._lock:
            self._counts["steps"] += 1
            for job in [*self._waiting, *self._running.values()]:
                if job[0] in self.cancelled:
                    self._end(job, Finished("cancelled"), "cancelled")
            while self._waiting and len(self._running) < self.places:
                self._start(self._waiting.popleft())
            for job in list(self._running.values()):
                self._advance(job)
            return bool(self._waiting or self._running)

    def _start(self, job):
        ticket, request, on_event = job[:3]
        self._counts["prompt"] += len(request.prompt)
        on_event(Started(len(request.prompt), 0))
        if request.prompt_logprobs:
            values = [None, *(-float(token % 7) for token in request.prompt[1:])]
            on_event(PromptScores(tuple(values), ((), *(((0, -0.5),) for _ in request.prompt[1:]))))
        self._running[ticket] = (*job, deque(self.script(request)), [])

    def _advance(self, job):
        _, request, on_event, tokens, made = job
        if len(made) >= request.max_new_tokens:
            self._end(job, Finished("length"), "finished")
            return
        token = tokens.popleft() if tokens else min(request.end_tokens, default=0)
        if request.constraint is not None:
            try:
                allowed = request.constraint.allowed()
            except ValueError as error:
                self._end(job, Finished("error", f"{CONSTRAINT} failed: {error}"), "failed")
                return
            if not allowed[token]:
                token = int(allowed.argmax())
        made.append(token)
        self._counts["new"] += 1
        scored = request.top_logprobs >= 0
        on_event(Token(token, -0.25 if scored else None, ((token, -0.25), (5, -2.0))[:max(request.top_logprobs, 0)]))
        if token in request.end_tokens:
            self._end(job, Finished("stop"), "finished")
            return
        if request.constraint is not None:
            request.constraint.advance(token)
        if len(made) >= request.max_new_tokens:
            self._end(job, Finished("length"), "finished")

    def _end(self, job, event, outcome):
        self._running.pop(job[0], None)
        if job in self._waiting:
            self._waiting.remove(job)
        self._counts[outcome] += 1
        job[2](event)

    def run(self, stop):
        while not stop.is_set():
            self.gate.wait()
            if self.fault is not None:
                raise self.fault
            if not self.step():
                if self._draining:
                    return
                time.sleep(0.001)
            time.sleep(self.pause)
        with self._lock:
            for job in [*self._waiting, *self._running.values()]:
                self._end(job, Finished("cancelled"), "cancelled")

    def drain(self):
        self._draining = True

    def stats(self):
        counts = self._counts
        return Stats(len(self._waiting), len(self._running), 100, len(self._running), 0, counts["steps"],
                     counts["submitted"], counts["finished"], counts["cancelled"], counts["failed"], counts["prompt"],
                     0, counts["new"])


class Served:
    """A service whose model is a script. `answer`: the text, or the token ids, of every answer from now on.

    Attributes: `service`, `app`, `scheduler`, `renderer`, `vocab`.
    """

    def __init__(self, vocab, context=512, limits=None, access=None, sampling=_GREEDY, max_new_tokens=None,
                 **scheduler):
        self.vocab = vocab
        self.renderer = Renderer(detect_template(vocab), vocab)
        self.answer = "好的。"
        self.scheduler = FakeScheduler(self._script, context, vocab.size, **scheduler)
        self.service = Service("telechat-test", limits)
        self.app = make_app(self.service, access)
        self.engine = Engine(self.scheduler, self.renderer, context, vocab.size, sampling, max_new_tokens)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self.scheduler.run, args=(self._stop,), daemon=True)

    def _script(self, _request):
        answer = self.answer
        return [*(self.vocab.encode_with_specials(answer) if isinstance(answer, str) else answer), self.renderer.end_id]

    def __enter__(self):
        self.service.open(self.engine)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.scheduler.gate.set()
        self._stop.set()
        self._thread.join(5)

    def ask(self, method, path, body=None, headers=None, **how):
        """A whole answer, see `exchange`."""
        return asyncio.run(exchange(self.app, method, path, body, headers, **how))

    def post(self, path, headers=None, **body):
        """POST with a JSON body."""
        return self.ask("POST", path, body, headers)

    def chat(self, content="你好", **body):
        """The JSON of /v1/chat/completions, which must succeed."""
        answer = self.post("/v1/chat/completions", messages=[{"role": "user", "content": content}], **body)
        assert answer.status == 200, answer.text
        return answer.json()

    def stream(self, content="你好", **body):
        """The chunks of /v1/chat/completions as a stream."""
        answer = self.post("/v1/chat/completions", messages=[{"role": "user", "content": content}], stream=True, **body)
        assert answer.status == 200, answer.text
        return events(answer.text)


def events(text):
    """The JSON of each event of a stream, which must end with [DONE]."""
    frames = [frame for frame in text.split("\n\n") if frame and not frame.startswith(":")]
    assert all(frame.startswith("data: ") for frame in frames)
    assert frames[-1] == "data: [DONE]"
    return [json.loads(frame[len("data: "):]) for frame in frames[:-1]]


class Answer(SimpleNamespace):
    """status, headers, pieces (as they were sent), complete."""

    @property
    def text(self):
        return b"".join(self.pieces).decode("utf-8")

    def json(self):
        return json.loads(self.text)


async def exchange(app, method, path, body=None, headers=None, leave_after=None, client="127.0.0.1", chunks=None):
    """One request by ASGI.

    body: JSON, or bytes; chunks: bytes of the body in pieces instead; leave_after: the client leaves after this many
    pieces of the answer (0: at once), or None.
    """
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    parts = deque(chunks if chunks is not None else [data])
    given = {"host": "localhost:8000", **(headers or {})}
    if chunks is None:
        given.setdefault("content-length", str(len(data)))
    scope = {"type": "http", "http_version": "1.1", "method": method, "path": path, "raw_path": path.encode(),
             "query_string": b"", "scheme": "http", "root_path": "", "client": (client, 1234), "server": ("test", 80),
             "headers": [(name.lower().encode(), value.encode()) for name, value in given.items()]}
    answer = Answer(status=None, headers={}, pieces=[], complete=False)
    left = asyncio.Event()

    async def receive():
        if parts:
            part = parts.popleft()
            return {"type": "http.request", "body": part, "more_body": bool(parts)}
        if leave_after == 0:
            left.set()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        if message["type"] == "http.response.start":
            answer.status = message["status"]
            answer.headers = {name.decode(): value.decode("latin-1") for name, value in message["headers"]}
            return
        if message.get("body"):
            answer.pieces.append(message["body"])
        answer.complete = answer.complete or not message.get("more_body")
        if leave_after is not None and len(answer.pieces) >= leave_after:
            left.set()
    await app(scope, receive, send)
    return answer
