"""The server process: the web server in a thread, the engine in the main thread, signals in a third.

MindSpore ends the process on SIGINT while a graph runs, so signals are blocked in all threads and waited for in one.
The first signal is a graceful shutdown: running requests are finished, within limits. The second ends at once.
"""
import asyncio
import logging
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from typing import Callable, Optional

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from research.telechat.common.command import INTERRUPTED
from research.telechat.common.errors import ConfigError
from research.telechat.serve.answering import Engine
from research.telechat.serve.http import Response
from research.telechat.serve.service import BROKEN, DRAINING, Service

log = logging.getLogger("telechat.serve")
SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
_FAILED = "the engine failed; see the server's log"
_AT_ONCE = 2.0                           # seconds after a second signal to notify the clients


@dataclass(frozen=True)
class Times:
    """Seconds."""

    grace: float = 30.0                  # for running requests after the first signal
    headers: float = 10.0                # to receive the headers of a request
    send: float = 30.0                   # for a client to accept sent data
    idle: float = 75.0                   # between two requests on a connection


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ConfigError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except OSError as err:
        raise ConfigError(f"--host, --port: cannot listen on {host}:{port}: {err.strerror or err}; is another server "
                          "running there?") from err
    return listener


def make_protocol(times: Times) -> type:
    """uvicorn's protocol with timeouts for connections that send no headers or do not read what is sent."""
    class Protocol(H11Protocol):
        _late: Optional[asyncio.TimerHandle] = None
        _stuck: Optional[asyncio.TimerHandle] = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self._late = self.loop.call_later(times.headers, self._give_up)

        def connection_lost(self, exc: Optional[Exception]) -> None:
            self._late, self._stuck = _cancel(self._late), _cancel(self._stuck)
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch_headers()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._watch_headers()

        def _watch_headers(self) -> None:
            within = self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]
            if not within:
                self._late = _cancel(self._late)
            elif self._late is None:
                self._late = self.loop.call_later(times.headers, self._give_up)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._stuck = self._stuck or self.loop.call_later(times.send, self._give_up)

        def resume_writing(self) -> None:
            self._stuck = _cancel(self._stuck)
            super().resume_writing()

        def _give_up(self) -> None:
            self.transport.abort()
    return Protocol


def _cancel(timer: Optional[asyncio.TimerHandle]) -> Optional[asyncio.TimerHandle]:
    """Cancel a timer, if any; returns None."""
    if timer is not None:
        timer.cancel()
    return None


class Web:
    """uvicorn in its own thread."""

    def __init__(self, app: Response, listener: socket.socket, times: Times, connections: int = 1024):
        config = uvicorn.Config(
            app, http=make_protocol(times), ws="none", lifespan="off", log_config=None, access_log=False,
            server_header=False, proxy_headers=False, timeout_keep_alive=int(times.idle), limit_concurrency=connections,
            timeout_graceful_shutdown=5)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]}, name="web",
                                        daemon=True)

    def start(self) -> None:
        """Start; returns when requests are served."""
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            time.sleep(0.01)

    def stop(self) -> None:
        """Close open connections once their answers are sent, within some seconds."""
        self._server.should_exit = True
        self._thread.join(8)


class Host:
    """Runs one service until a signal or an engine failure."""

    def __init__(self, service: Service, web: Web, times: Times):
        self._service, self._web, self._times = service, web, times
        self._stop = threading.Event()
        self._signals = 0
        self._draining = threading.Lock()      # held from the first reason to stop on

    def run(self, load: Callable[[], Engine], ready: Callable[[], None]) -> int:
        """Load the model while the web server already answers 503, then serve. -> exit code.

        Call with `SIGNALS` blocked, before other threads exist.
        """
        self._web.start()
        threading.Thread(target=self._watch, name="signals", daemon=True).start()
        try:
            engine = load()
        except BaseException:
            self._service.state = BROKEN
            raise
        self._service.open(engine)
        ready()
        try:
            engine.scheduler.run(self._stop)
        except Exception:
            self._service.fail(_FAILED)
            log.exception("the engine failed; the server exits")
            self._web.stop()
            return 1
        self._web.stop()
        if self._signals > 1:
            return INTERRUPTED
        return 0

    def drain(self) -> None:
        """Stop gracefully, as after a first signal. No effect if that is under way; may be called from any thread."""
        if not self._draining.acquire(blocking=False):
            return
        engine = self._service.engine
        if engine is None:
            print("interrupted", file=sys.stderr, flush=True)
            os._exit(INTERRUPTED)
        log.warning("stopping: no new requests; running ones have %g s; a second signal stops at once",
                    self._times.grace)
        self._service.state = DRAINING
        engine.scheduler.drain()
        self._after(self._times.grace, self._stop.set)

    def lose(self, reason: str) -> None:
        """Fail all requests and end the process: the engine will never finish its step. Called from another thread."""
        log.error("the engine failed; the server exits: %s", reason)
        self._service.fail(_FAILED)
        self._web.stop()
        os._exit(1)

    def _watch(self) -> None:
        while True:
            signal.sigwait(SIGNALS)
            self._signals += 1
            if self._signals == 1:
                self.drain()
            else:
                self._stop.set()
                self._after(_AT_ONCE, lambda: os._exit(INTERRUPTED))

    @staticmethod
    def _after(seconds: float, what: Callable[[], None]) -> None:
        timer = threading.Timer(seconds, what)
        timer.daemon = True
        timer.start()
