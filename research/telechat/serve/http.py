"""Common to all requests: ids, key, origins, rate limit, size limit, the log. Plain ASGI.

The log has the client, route, outcome and token counts of each request, never its contents.
"""
import asyncio
import hmac
import json
import logging
import re
import time
import uuid
from dataclasses import dataclass, field
from typing import AsyncIterator, Awaitable, Callable, Dict, List, Mapping, Optional, Tuple, TypeVar
from urllib.parse import urlsplit

from research.telechat.common.files import JsonObject
from research.telechat.serve.errors import ApiError
from research.telechat.serve.metrics import Metrics

Scope = JsonObject
Receive = Callable[[], Awaitable[JsonObject]]
Send = Callable[[JsonObject], Awaitable[None]]
Response = Callable[[Scope, Receive, Send], Awaitable[None]]     # or an application: the same in ASGI
log = logging.getLogger("telechat.serve")
_Result = TypeVar("_Result")
_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_LOCAL = {"localhost", "127.0.0.1", "::1", ""}
_OPEN = {"/", "/health", "/ready"}
PING_SECONDS = 15.0
_PROBES = {"/health", "/ready", "/metrics"}      # polled every few seconds; logged at level DEBUG
_CLIENTS = 10_000                        # addresses whose rate is tracked


class ClientGone(Exception):
    """The client has closed its connection."""


@dataclass(frozen=True)
class Access:
    """Access control. `keys`: accepted keys, none needed if empty; `local`: the server is bound to loopback."""

    keys: Tuple[str, ...] = ()
    local: bool = True
    origins: Tuple[str, ...] = ()        # allowed origins of web pages; "*" for all
    open_metrics: bool = False
    per_minute: int = 0                  # requests per address; 0: no limit


@dataclass
class Rate:
    """Rate limit per address, a token bucket that refills within a minute."""

    per_minute: int
    left: Dict[str, Tuple[float, float]] = field(default_factory=dict)

    def take(self, client: str) -> None:
        """Raises ApiError if the bucket is empty."""
        if not self.per_minute:
            return
        now = time.monotonic()
        left, since = self.left.pop(client, (float(self.per_minute), now))
        left = min(self.per_minute, left + (now - since) * self.per_minute / 60)
        if len(self.left) >= _CLIENTS:
            del self.left[next(iter(self.left))]
        self.left[client] = (max(left - 1, 0) if left >= 1 else left, now)
        if left < 1:
            raise ApiError(429, f"more than {self.per_minute} requests a minute", code="rate_limit_exceeded",
                           retry_after=(1 - left) * 60 / self.per_minute)


class Guard:
    """Middleware in front of the routes."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], access: Access, metrics: Metrics,
                 routes: List[str]):
        self.app, self.access, self.metrics = app, access, metrics
        self._routes = frozenset(routes)
        self._rate = Rate(access.per_minute)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1000})
                return
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        note: JsonObject = scope.setdefault("state", {}).setdefault("note", {})
        started, status = time.perf_counter(), 499

        async def send_on(message: JsonObject) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", request_id.encode()),
                                                  (b"x-content-type-options", b"nosniff"),
                                                  *self._cors(headers.get("origin"))]}
            await send(message)
        try:
            try:
                self._admit(scope, headers)
                if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                    await answer(send_on, 204, b"", {})
                else:
                    await self.app(scope, receive, send_on)
            except ApiError as err:
                await send_error(send_on, err)
        finally:
            seconds = time.perf_counter() - started
            route = scope["path"] if scope["path"] in self._routes else "other"
            self.metrics.requests.labels(route, str(status)).inc()
            if route not in _OPEN and route != "/metrics":
                self.metrics.request_seconds.observe(seconds)
            client = scope.get("client") or ("-",)
            quiet = route in _PROBES and status in (200, 503)
            log.log(logging.DEBUG if quiet else logging.INFO, "%s %s %s %s %s %.3fs%s", client[0], request_id,
                    scope["method"], _path(scope), status, seconds,
                    "".join(f" {key}={value}" for key, value in note.items()))

    def _admit(self, scope: Scope, headers: Mapping[str, str]) -> None:
        """Raises ApiError if the client is not allowed."""
        host = _host(headers.get("host", ""))
        if self.access.local and not self.access.keys and host not in _LOCAL:
            raise ApiError(403, "a server without a key only answers under this machine's own names; use localhost")
        origin = headers.get("origin")
        if origin and not self._may(origin, headers.get("host", "")):
            raise ApiError(403, "this page's origin is not allowed; start the server with --allow_origin")
        if scope["method"] == "OPTIONS":
            return
        path = scope["path"]
        if path in _OPEN:
            return
        free = path == "/metrics" and (self.access.local or self.access.open_metrics)
        if self.access.keys and not free:
            given = headers.get("authorization", "")
            kind, _, key = given.partition(" ")
            if kind.lower() != "bearer" or not self._known(key.strip()):
                raise ApiError(401, "the key is " + ("wrong" if given else "missing") +
                               "; expected the header Authorization: Bearer KEY", code="invalid_api_key")
        if path != "/metrics":
            self._rate.take((scope.get("client") or ("-",))[0])

    def _known(self, key: str) -> bool:
        found = [hmac.compare_digest(key.encode(), known.encode()) for known in self.access.keys]
        return any(found)

    def _may(self, origin: str, host: str) -> bool:
        return "*" in self.access.origins or origin in self.access.origins or urlsplit(origin).netloc == host

    def _cors(self, origin: Optional[str]) -> List[Tuple[bytes, bytes]]:
        if not origin or not ("*" in self.access.origins or origin in self.access.origins):
            return []
        return [(b"access-control-allow-origin", origin.encode("latin-1")), (b"vary", b"Origin"),
                (b"access-control-allow-methods", b"GET, POST"), (b"access-control-max-age", b"600"),
                (b"access-control-allow-headers", b"authorization, content-type, x-request-id"),
                (b"access-control-expose-headers", b"x-request-id, retry-after")]


def _host(header: str) -> str:
    """The host without its port."""
    try:
        return (urlsplit(f"//{header}").hostname or "").lower()
    except ValueError:
        return "?"


def _path(scope: Scope) -> str:
    """The path for the log: one word of limited length."""
    return re.sub(r"[^!-~]", "?", scope["path"])[:100]


async def answer(send: Send, status: int, body: bytes, headers: Mapping[str, str]) -> None:
    """Send a complete response."""
    pairs = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    if status != 204:
        pairs.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


async def send_error(send: Send, err: ApiError) -> None:
    """Send an error in OpenAI's format."""
    headers = {"content-type": "application/json", **err.headers}
    if err.status in (408, 413):
        headers["connection"] = "close"                  # the rest of the body is not read
    await answer(send, err.status, encoded(err.body()), headers)


def encoded(value: object) -> bytes:
    """Compact JSON in UTF-8; lone surrogates, which UTF-8 cannot encode, become ?."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


async def read_bytes(scope: Scope, receive: Receive, limit: int, seconds: float) -> bytes:
    """The body of a request. Raises ApiError if it is too large or times out, ClientGone."""
    length = dict(scope["headers"]).get(b"content-length", b"0")
    too_large = ApiError(413, f"the body is too large; the limit is {limit} bytes", code="body_too_large")
    if length.isdigit() and int(length) > limit:
        raise too_large
    data = bytearray()
    deadline = time.monotonic() + seconds
    while True:
        try:
            message = await asyncio.wait_for(receive(), max(deadline - time.monotonic(), 0.001))
        except asyncio.TimeoutError:
            raise ApiError(408, f"the body did not arrive within {seconds:g} s") from None
        if message["type"] == "http.disconnect":
            raise ClientGone
        data += message.get("body", b"")
        if len(data) > limit:
            raise too_large
        if not message.get("more_body"):
            return bytes(data)


async def until_gone(receive: Receive, work: Awaitable[_Result]) -> _Result:
    """The result of `work`, which is cancelled if the client disconnects. Raises ClientGone."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Stream:
    """A streamed response; `ping` is sent after PING_SECONDS without other data."""

    def __init__(self, pieces: AsyncIterator[bytes], media_type: str, close: Callable[[], None], ping: bytes = b""):
        """close: called at the end, even if the client has disconnected."""
        self.pieces, self.media_type, self.close, self.ping = pieces, media_type, close, ping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {"content-type": self.media_type, "cache-control": "no-store", "x-accel-buffering": "no"}
        try:
            await send({"type": "http.response.start", "status": 200,
                        "headers": [(name.encode(), value.encode()) for name, value in headers.items()]})
            if await until_gone(receive, self._pump(send)):
                await send({"type": "http.response.body", "body": b""})
        except ClientGone:
            scope["state"]["note"]["finish"] = "gone"
        finally:
            self.close()

    async def _pump(self, send: Send) -> bool:
        """Whether all pieces were sent; if not, the connection is closed with the answer incomplete."""
        waiting: Optional[asyncio.Future] = None
        try:
            while True:
                waiting = waiting or asyncio.ensure_future(self.pieces.__anext__())
                await asyncio.wait({waiting}, timeout=PING_SECONDS if self.ping else None)
                if not waiting.done():
                    await send({"type": "http.response.body", "body": self.ping, "more_body": True})
                    continue
                done, waiting = waiting, None
                try:
                    piece = done.result()
                except StopAsyncIteration:
                    return True
                except ApiError:
                    return False
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        finally:
            if waiting is not None:
                waiting.cancel()
                await asyncio.gather(waiting, return_exceptions=True)
            await self.pieces.aclose()  # type: ignore[attr-defined]     # all pieces here are generators
