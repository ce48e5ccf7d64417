"""Asking a judge: any server with OpenAI's chat API, using the standard library; earlier answers come from a file.

No MindSpore here. evaluation/judged.py has the benchmarks.
"""
import hashlib
import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

from research.telechat.common.errors import ConfigError
from research.telechat.common.files import JsonObject
from research.telechat.evaluation.judged import Messages

KEYS = ("TELECHAT_JUDGE_KEY", "OPENAI_API_KEY")      # environment variables; the first one set counts
ATTEMPTS, TIMEOUT, TOKENS = 5, 300.0, 2048
_LATER = (408, 409, 425, 429, 500, 502, 503, 504)    # try again


_BEGIN = b'{"key": "'                               # of each line of a `Store`


def digest(*parts: object) -> str:
    """A key for what was asked, for `Store`."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


class Store:
    """Texts by the digest of what was asked, one JSON line each, written as they come: an interrupted run can resume.

    Args:
        path: the file; its last line may be incomplete.
        kind: for error messages.

    Raises:
        ConfigError: a file of another kind.
    """

    def __init__(self, path: Path, kind: str):
        self.path, self._lock = path, threading.Lock()
        self.texts: Dict[str, str] = {}
        self._cut: Optional[int] = None                    # bytes to keep, where a record is broken off
        whole = 0
        data = path.read_bytes() if path.exists() else b""
        for number, line in enumerate(data.splitlines(keepends=True), 1):
            if not line.endswith(b"\n") and line[:len(_BEGIN)] == _BEGIN[:len(line)]:
                self._cut = whole
                break
            try:
                record = json.loads(line)
                self.texts[record["key"]] = record["text"]
            except (ValueError, KeyError, TypeError):
                raise ConfigError(f"{path}, line {number}: expected one of the {kind} of an earlier run; use another "
                                  "--output, or remove the file") from None
            whole += len(line)

    def add(self, key: str, text: str, about: JsonObject) -> None:
        """Keep a text; `about` describes it for human readers. The first text replaces a record that was broken off."""
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self._cut is not None:
                os.truncate(self.path, self._cut)
                self._cut = None
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, **about, "text": text}, ensure_ascii=False) + "\n")
            self.texts[key] = text


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Redirects are errors: the key must not go to another server."""

    def redirect_request(self, *_args: object) -> None:
        """None: not followed."""


def _checked(url: str) -> str:
    """`url`. Raises ConfigError where it is no address of a server."""
    try:
        parts = urllib.parse.urlsplit(url)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError as err:
        raise ConfigError(f"--judge_url: {url!r} is not a valid URL: {err}") from None
    if parts.username is not None:
        raise ConfigError(f"--judge_url must not contain a user or password; the key is read from {' or '.join(KEYS)}")
    if not fits or not url.isascii() or not url.isprintable() or " " in url:
        raise ConfigError(f"--judge_url: expected http://HOST... or https://HOST..., found {url!r}")
    return url


class Judge:
    """A model behind OpenAI's chat API.

    Args:
        url: up to and including /v1; /chat/completions is appended if missing.
        model: its name there.
        pause: seconds before the second attempt; doubled for each further one.

    Raises:
        ConfigError: an address that is none, or a key that no header can carry.
    """

    def __init__(self, url: str, model: str, pause: float = 1.0):
        url = _checked(url).rstrip("/")
        self.url = url if url.endswith("/chat/completions") else f"{url}/chat/completions"
        self.model, self._pause = model, pause
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._key = ""
        for name in KEYS:
            self._key = self._key or os.environ.get(name, "").strip()
            if not (self._key.isascii() and self._key.isprintable()):
                raise ConfigError(f"{name}: expected a one-line key of printable ASCII characters, found others "
                                  "(not shown); set it again")

    def ask(self, messages: Messages) -> str:
        """The judge's most likely answer. Raises ConfigError if there is none after ATTEMPTS attempts."""
        body = json.dumps({"model": self.model, "messages": messages, "temperature": 0, "max_tokens": TOKENS}).encode()
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        reason = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(self._pause * 2 ** (attempt - 1))
            try:
                with self._opener.open(urllib.request.Request(self.url, body, headers), timeout=TIMEOUT) as answer:
                    return self._text(answer.read())
            except urllib.error.HTTPError as err:
                reason = f"HTTP {err.code}: {_said(err)}"
                if err.code not in _LATER:
                    break
            except (OSError, http.client.HTTPException) as err:
                reason = str(getattr(err, "reason", err)) or type(err).__name__
        key = "" if self._key else f"; no key is set ({' or '.join(KEYS)})"
        raise ConfigError(f"--judge_url: {self.url} does not answer: {reason}{key}; judgments are kept, rerun the same "
                          "command to continue")

    def _text(self, data: bytes) -> str:
        try:
            text = json.loads(data)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError):
            raise ConfigError(f"--judge_url: {self.url} answered without choices[0].message.content: "
                              f"{data[:200].decode('utf-8', 'replace')}") from None
        return str(text or "")


def _said(err: urllib.error.HTTPError) -> str:
    """The beginning of an error's text, and where a redirect leads."""
    place = err.headers.get("Location") if 300 <= err.code < 400 else None
    try:
        text = " ".join(err.read(300).decode("utf-8", "replace").split())
    except (OSError, http.client.HTTPException):
        text = ""
    return f"it redirects to {place}, where the key is not sent; use that URL" if place else text


def judge_all(judge: Judge, store: Store, asked: Sequence[Tuple[Messages, JsonObject]], at_once: int = 4,
              bar: Optional[object] = None) -> List[str]:
    """The judgments of (messages, what they are about); those in `store` are not asked for again."""
    def one(item: Tuple[Messages, JsonObject]) -> str:
        messages, about = item
        key = digest(judge.url, judge.model, messages)
        if key not in store.texts:
            store.add(key, judge.ask(messages), {**about, "judge": judge.model})
        if bar is not None:
            bar.update()  # type: ignore[attr-defined]
        return store.texts[key]
    with ThreadPoolExecutor(at_once) as pool:
        futures = [pool.submit(one, item) for item in asked]
        try:
            return [future.result() for future in futures]
        except BaseException:
            for future in futures:
                future.cancel()
            raise
