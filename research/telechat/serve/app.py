"""The routes."""
import asyncio
import json
import logging
from typing import AbstractSet, AsyncIterator, Callable, Dict, List, Mapping, Optional, TypeVar, Union

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.routing import Route

from research.telechat.common.files import JsonObject
from research.telechat.serve import legacy
from research.telechat.serve.answering import Answers
from research.telechat.serve.errors import ApiError
from research.telechat.serve.fields import Fields, read_body
from research.telechat.serve.http import (
    Access,
    ClientGone,
    Guard,
    Receive,
    Response,
    Scope,
    Send,
    Stream,
    answer,
    encoded,
    read_bytes,
    send_error,
    until_gone,
)
from research.telechat.serve.metrics import CONTENT_TYPE
from research.telechat.serve.openai_answers import ChatWriter, CompletionWriter
from research.telechat.serve.openai_requests import (
    CHAT_KEYS,
    COMPLETION_KEYS,
    Asked,
    read_chat,
    read_completion,
    unknown_keys,
)
from research.telechat.serve.page import read_page
from research.telechat.serve.service import BROKEN, READY, Service, prompt_of

log = logging.getLogger("telechat.serve")
BODY_SECONDS = 30.0
_Result = TypeVar("_Result")
_DONE = b"data: [DONE]\n\n"


class Whole:
    """A complete response."""

    def __init__(self, body: Union[bytes, JsonObject], status: int = 200, media_type: str = "application/json",
                 headers: Optional[Mapping[str, str]] = None):
        self.body = encoded(body) if isinstance(body, dict) else body
        self.status, self.headers = status, {"content-type": media_type, **(headers or {})}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await answer(send, self.status, self.body, self.headers)


class Routes:
    """The routes of one service."""

    def __init__(self, service: Service):
        self.service = service
        self._told: set = set()                                                  # unknown keys already logged

    def routes(self) -> Dict[str, Route]:
        """The routes by path."""
        gets = {"/": self.page, "/health": self.health, "/ready": self.ready, "/metrics": self.metrics,
                "/v1/models": self.models, "/v1/models/{model:path}": self.model,
                "/tokenizer_info": self.tokenizer_info}
        posts = {"/v1/chat/completions": self.chat, "/v1/completions": self.completion, "/tokenize": self.tokenize,
                 "/detokenize": self.detokenize, "/telechat/gptDialog/v2": self.dialog_stream,
                 "/telechat/gptDialog/v4": self.dialog, "/generate": self.generate}
        return {**{path: Route(path, endpoint, methods=["GET"]) for path, endpoint in gets.items()},
                **{path: Route(path, endpoint, methods=["POST"]) for path, endpoint in posts.items()}}

    async def _body(self, request: HttpRequest) -> JsonObject:
        data = await read_bytes(request.scope, request.receive, self.service.limits.body_bytes, BODY_SECONDS)
        return read_body(data)

    async def _asked_of_model(self, request: HttpRequest, known: AbstractSet[str]) -> JsonObject:
        body = await self._body(request)
        self._tell_unknown(body, known)
        self.service.check_model(body.get("model"))
        return body

    # For operators

    async def health(self, _: HttpRequest) -> Whole:
        broken = self.service.state == BROKEN
        return Whole({"status": self.service.state, "code": 500 if broken else 200}, 500 if broken else 200)

    async def ready(self, _: HttpRequest) -> Whole:
        state = self.service.state
        return Whole({"status": state}, 200 if state == READY else 503)

    async def metrics(self, _: HttpRequest) -> Whole:
        return Whole(self.service.metrics.page(), media_type=CONTENT_TYPE)

    async def page(self, _: HttpRequest) -> Whole:
        page, policy = read_page()
        return Whole(page, media_type="text/html; charset=utf-8",
                     headers={"content-security-policy": policy, "referrer-policy": "no-referrer",
                              "cache-control": "no-cache"})

    # OpenAI's API

    def _model(self) -> JsonObject:
        engine = self.service.engine
        return {"id": self.service.name, "object": "model", "created": self.service.created, "owned_by": "telechat",
                "max_model_len": engine.context if engine else None}

    async def models(self, _: HttpRequest) -> Whole:
        return Whole({"object": "list", "data": [self._model()]})

    async def model(self, request: HttpRequest) -> Whole:
        self.service.check_model(request.path_params["model"])
        return Whole(self._model())

    async def chat(self, request: HttpRequest) -> Response:
        body = await self._asked_of_model(request, CHAT_KEYS)
        limits = self.service.limits
        asked = read_chat(body, limits.choices, limits.messages)
        engine = self.service.ready()                    # before there are answers that nobody would close
        answers = await until_gone(request.receive, self.service.chat(asked))
        writer = ChatWriter(self.service.name, engine.renderer.vocab, asked.asked.n, asked.asked.top_logprobs >= 0)
        return await self._respond(request, answers, writer, asked.asked)

    async def completion(self, request: HttpRequest) -> Response:
        body = await self._asked_of_model(request, COMPLETION_KEYS)
        limits = self.service.limits
        asked = read_completion(body, limits.choices, limits.answers)
        vocab = self.service.ready().renderer.vocab
        answers, echoes = await until_gone(request.receive, self.service.completion(asked))
        writer = CompletionWriter(self.service.name, vocab, len(asked.prompts) * asked.asked.n,
                                  asked.asked.top_logprobs >= 0, echoes, asked.asked.max_tokens == 0)
        return await self._respond(request, answers, writer, asked.asked)

    async def _respond(self, request: HttpRequest, answers: Answers, writer: Union[ChatWriter, CompletionWriter],
                       asked: Asked) -> Response:
        note = request.scope["state"]["note"]
        if asked.stream:
            return Stream(_events(answers, writer, asked, note), "text/event-stream; charset=utf-8", answers.close,
                          b": ping\n\n")
        async with answers:
            await until_gone(request.receive, _gather(answers, writer))
        _note(note, answers)
        return Whole(writer.whole(answers.usage))

    def _tell_unknown(self, body: JsonObject, known: AbstractSet[str]) -> None:
        new = [key[:40] for key in unknown_keys(body, known) if key[:40] not in self._told][:8]
        if new and len(self._told) < 256:
            self._told.update(new)
            log.warning("ignored unknown keys: %s", ", ".join(json.dumps(key) for key in new))

    # Tokens, as vLLM has it

    async def tokenize(self, request: HttpRequest) -> Whole:
        body = await self._body(request)
        self.service.check_model(body.get("model"))
        engine, fields = self.service.ready(), Fields(body)
        messages = fields.items("messages")
        if messages is not None:
            ids = await _threaded(lambda: prompt_of(engine, messages, fields.items("tools") or []))
        else:
            text = fields.text("prompt")
            if text is None:
                raise fields.wrong("prompt", "text or messages")
            ids = await _threaded(lambda: engine.renderer.vocab.encode(text))
        return Whole({"count": len(ids), "max_model_len": engine.context, "tokens": ids})

    async def detokenize(self, request: HttpRequest) -> Whole:
        body = await self._body(request)
        self.service.check_model(body.get("model"))
        engine, fields = self.service.ready(), Fields(body)
        ids = fields.get("tokens")
        if not isinstance(ids, list) or not all(type(one) is int and 0 <= one < engine.vocab_size for one in ids):
            raise fields.wrong("tokens", f"a list of token ids below {engine.vocab_size}")
        return Whole({"prompt": await _threaded(lambda: engine.renderer.vocab.decode(ids))})

    async def tokenizer_info(self, _: HttpRequest) -> Whole:
        engine = self.service.ready()
        renderer = engine.renderer
        names = {renderer.vocab.markers[name]: name for name in renderer.vocab.markers}
        start = None if renderer.start_id is None else names.get(renderer.start_id)
        return Whole({"bos_token": start, "eos_token": names.get(renderer.end_id),
                      "pad_token": names.get(renderer.pad_id), "chat_template": None,
                      "template": renderer.template.name})

    # The legacy APIs

    async def dialog_stream(self, request: HttpRequest) -> Response:
        try:
            answers = await self._dialog(request)
        except legacy.DialogError as err:
            return Whole(err.body())
        pieces = _encoded_text(legacy.text(answers))
        return Stream(pieces, "text/html; charset=utf-8", answers.close)

    async def dialog(self, request: HttpRequest) -> Response:
        try:
            answers = await self._dialog(request)
            content = await until_gone(request.receive, _joined(legacy.text(answers)))
        except legacy.DialogError as err:
            return Whole(err.body())
        except ApiError as err:
            return Whole(legacy.DialogError(legacy.FAILED, err.message).body())
        _note(request.scope["state"]["note"], answers)
        return Whole({"role": "bot", "content": content})

    async def _dialog(self, request: HttpRequest) -> Answers:
        wanted = legacy.read_dialog(await self._body(request))
        try:
            return await _threaded_submit(self.service, wanted)
        except ApiError as err:
            if err.status in (429, 503):
                raise
            raise legacy.DialogError(legacy.FAILED, err.message) from err

    async def generate(self, request: HttpRequest) -> Response:
        wanted, stream = legacy.read_chat_web(await self._body(request))
        try:
            answers = await _threaded_submit(self.service, wanted)
            if stream:
                return Stream(_chat_web_events(answers), "text/event-stream; charset=utf-8", answers.close,
                              b": ping\r\n\r\n")
            content = await until_gone(request.receive, _joined(legacy.text(answers)))
        except ApiError as err:
            body = legacy.failed(err)
            if body is None:
                raise
            return Whole(body)
        _note(request.scope["state"]["note"], answers)
        return Whole(legacy.chat_web_answer({"role": "assistant", "content": content}, "stop"))


async def _threaded(work: Callable[[], _Result]) -> _Result:
    return await asyncio.get_running_loop().run_in_executor(None, work)


async def _threaded_submit(service: Service, wanted: legacy.Wanted) -> Answers:
    choice = await _threaded(lambda: legacy.choice(service, wanted))
    return service.submit([choice])


def _note(note: JsonObject, answers: Answers) -> None:
    """Add the token counts of the answers to the log entry."""
    note.update(prompt=answers.usage.prompt_tokens, completion=answers.usage.completion_tokens)


async def _gather(answers: Answers, writer: Union[ChatWriter, CompletionWriter]) -> None:
    async for update in answers.updates():
        writer.add(update)


async def _events(answers: Answers, writer: Union[ChatWriter, CompletionWriter], asked: Asked,
                  note: JsonObject) -> AsyncIterator[bytes]:
    """A stream of OpenAI's API. The chunks of one update are sent together."""
    async with answers:
        try:
            yield _data(writer.begin())
            async for update in answers.updates():
                yield _data(writer.chunks(update))
            if asked.include_usage:
                yield _data([writer.usage_chunk(answers.usage)])
        except ApiError as err:
            note["finish"] = err.code
            yield _data([err.body()])
        finally:
            _note(note, answers)
    yield _DONE


def _data(chunks: List[JsonObject]) -> bytes:
    return b"".join(b"data: " + encoded(chunk) + b"\n\n" for chunk in chunks)


async def _encoded_text(pieces: AsyncIterator[str]) -> AsyncIterator[bytes]:
    async for piece in pieces:
        yield piece.encode("utf-8", "replace")


async def _joined(pieces: AsyncIterator[str]) -> str:
    return "".join([piece async for piece in pieces])


async def _chat_web_events(answers: Answers) -> AsyncIterator[bytes]:
    async for chunk in legacy.chat_web_chunks(answers):
        yield b"data: " + encoded(chunk) + b"\r\n\r\n"


async def _on_http_error(request: HttpRequest, err: Exception) -> Response:
    status = err.status_code if isinstance(err, HTTPException) else 500
    what = {404: "no such route", 405: f"this route does not accept {request.method}"}.get(status, "refused")
    return _Error(ApiError(status, f"{what}: {request.url.path[:100]}"))


async def _on_api_error(_: HttpRequest, err: Exception) -> Response:
    assert isinstance(err, ApiError)
    return _Error(err)


async def _on_gone(request: HttpRequest, _: Exception) -> Response:
    request.scope["state"]["note"]["finish"] = "gone"
    return _Nothing()


async def _on_fault(_: HttpRequest, __: Exception) -> Response:
    return _Error(ApiError(500, "the server failed on this request; see its log"))


class _Nothing:
    """The response to a client that has disconnected."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pass


class _Error:
    """An error response."""

    def __init__(self, err: ApiError):
        self.err = err

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send_error(send, self.err)


def make_app(service: Service, access: Optional[Access] = None) -> Guard:
    """The ASGI application of a service."""
    routes = Routes(service).routes()
    app = Starlette(routes=list(routes.values()), exception_handlers={
        HTTPException: _on_http_error, ApiError: _on_api_error, ClientGone: _on_gone, Exception: _on_fault})
    return Guard(app, access or Access(), service.metrics, [path for path in routes if "{" not in path])
