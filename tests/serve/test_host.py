"""The process of the server: connections that hang, signals, a failing engine."""
import asyncio
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from serve_fixtures import Served

from research.telechat.commands import serve as serve_command
from research.telechat.common.errors import ConfigError
from research.telechat.serve.host import Times, Web, listen

ROOT = Path(__file__).resolve().parents[2]
TIMES = Times(grace=1, headers=0.5, send=0.3)


@pytest.fixture(scope="module")
def port(vocabs):
    with Served(vocabs["12b"]) as served:
        listener = listen("127.0.0.1", 0)
        web = Web(served.app, listener, TIMES)
        web.start()
        yield listener.getsockname()[1]
        web.stop()


def closed_after(connection):
    """Seconds until the other side closes; what it sent before is read."""
    connection.settimeout(5)
    begun = time.monotonic()
    try:
        while connection.recv(65536):
            pass
    except ConnectionResetError:
        pass
    return time.monotonic() - begun


@pytest.mark.parametrize("data", [b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\nGET /hea"])
def test_half_a_request_is_not_waited_for(port, data):
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(data)
        assert 0.1 < closed_after(connection) < 4


def test_a_connection_is_kept_for_the_next_request(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.connect()
    first = connection.sock
    for _ in range(2):
        connection.request("GET", "/health")
        assert connection.getresponse().read() and connection.sock is first
        time.sleep(0.8)                                  # longer than the headers of a request may take
    connection.close()


def test_a_client_who_takes_nothing_counts_as_gone():
    ended = []

    async def endless(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await receive()
        gone = asyncio.ensure_future(receive())
        while not gone.done():
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
            await asyncio.sleep(0)
        ended.append(gone.result()["type"])
    listener = listen("127.0.0.1", 0)
    web = Web(endless, listener, TIMES)
    web.start()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", listener.getsockname()[1]))
        connection.sendall(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n")
        until = time.monotonic() + 10
        while not ended and time.monotonic() < until:
            time.sleep(0.02)
    web.stop()
    assert ended == ["http.disconnect"]


def test_a_port_in_use_is_an_error_in_one_line(port):
    with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
        listen("127.0.0.1", port)


class Process:
    """tests/support/host_driver.py with a stream under way."""

    def __init__(self, vocab_files, *words):
        env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/support'}"}
        self.process = subprocess.Popen([sys.executable, str(ROOT / "tests/support/host_driver.py"),
                                         str(vocab_files["12b"]), *words], stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, text=True, env=env)
        self.port = int(self.process.stdout.readline())
        body = json.dumps({"messages": [{"role": "user", "content": "x"}], "stream": True}).encode()
        self.stream = urllib.request.urlopen(f"http://127.0.0.1:{self.port}/v1/chat/completions", body, timeout=20)
        self.stream.readline()

    def end(self):
        """(exit code, the rest of the stream)"""
        rest = self.stream.read().decode()
        code = self.process.wait(20)
        self.process.stdout.close()
        self.process.stderr.close()
        return code, rest


@pytest.fixture
def start(vocab_files):
    started = []

    def start(*words):
        started.append(Process(vocab_files, *words))
        return started[-1]
    yield start
    for one in started:
        one.process.kill()


@pytest.mark.slow
def test_a_failing_engine_tells_all_and_ends_the_process(start):
    code, rest = start("fault").end()
    assert code == 1 and '"error":{' in rest and "the engine failed" in rest


@pytest.mark.slow
def test_a_rank_that_dies_ends_a_step_that_waits_for_it(start):
    code, rest = start("lost").end()
    assert code == 1 and '"error":{' in rest and "the engine failed" in rest


@pytest.mark.slow
def test_another_rank_may_drain_the_server(start):
    code, rest = start("word").end()
    assert code == 0 and "server_stopping" in rest


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_is_not_finished_within_the_grace_gets_an_error(start, number):
    process = start()
    begun = time.monotonic()
    process.process.send_signal(number)
    code, rest = process.end()
    assert code == 0 and time.monotonic() - begun > 0.4
    assert "server_stopping" in rest and '"finish_reason":"length"' not in rest


@pytest.mark.slow
def test_a_second_signal_ends_at_once(start, monkeypatch):
    process = start()
    process.process.send_signal(signal.SIGTERM)
    time.sleep(0.15)
    process.process.send_signal(signal.SIGTERM)
    code, rest = process.end()
    assert code == 130 and "server_stopping" in rest


# --- the command -----------------------------------------------------------------------------------------------------

def parse(*words):
    return serve_command.build_parser().parse_args(list(words))


def test_nothing_begins_threads_before_signals_are_blocked():
    code = "import sys, research.telechat.commands.serve; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_other_addresses_need_a_key(tmp_path, monkeypatch):
    monkeypatch.delenv(serve_command.KEY_VARIABLE, raising=False)
    for host in ("127.0.0.1", "localhost", "::1", "127.0.0.9"):
        assert serve_command.read_keys(parse("--host", host)) == ()
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"):
        with pytest.raises(ConfigError, match="a key is needed"):
            serve_command.read_keys(parse("--host", host))
        assert serve_command.read_keys(parse("--host", host, "--no_key")) == ()
    keys = tmp_path / "keys"
    keys.write_text("one\n\n two \n")
    assert serve_command.read_keys(parse("--host", "0.0.0.0", "--key_file", str(keys))) == ("one", "two")
    keys.write_text("\n")
    with pytest.raises(ConfigError, match="contains no key"):
        serve_command.read_keys(parse("--key_file", str(keys)))
    monkeypatch.setenv(serve_command.KEY_VARIABLE, "three")
    assert serve_command.read_keys(parse("--host", "0.0.0.0")) == ("three",)


@pytest.mark.parametrize(("words", "fault"), [
    ([], "--config is missing"), (["--demo", "/no/such"], "quick start"),
    (["--config", "x", "--port", "70000"], "--port"),
    (["--config", "x", "--slots", "0"], "--slots"), (["--config", "x", "--demo"], "omit them")])
def test_options_that_make_no_sense(words, fault):
    with pytest.raises(ConfigError, match=fault):
        serve_command.complete(parse(*words))


def test_the_demo_is_what_the_quick_start_has_made(tmp_path):
    saved = "finetune/checkpoint/rank_0"
    for name in ("tokenizer/tokenizer.model", f"{saved}/a-1.ckpt", f"{saved}/a-2.ckpt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    os.utime(tmp_path / saved / "a-1.ckpt", (1, 1))
    args = parse("--demo", str(tmp_path))
    serve_command.complete(args)
    assert args.load_checkpoint.endswith("a-2.ckpt") and args.tokenizer == str(tmp_path / "tokenizer/tokenizer.model")
