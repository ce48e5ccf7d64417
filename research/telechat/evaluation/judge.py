"""Asking a judge: any server with OpenAI's chat API, using the standard library; earlier answers come from a file.

No MindSpore here. evaluation/judged.py has the benchmarks.
"""
import hashlib
import json
import os
import threading
import time
import urllib.error
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
        whole = 0
        data = path.read_bytes() if path.exists() else b""
        for number, line in enumerate(data.splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):
                break
            try:
                record = json.loads(line)
                self.texts[record["key"]] = record["text"]
            except (ValueError, KeyError, TypeError):
                raise ConfigError(f"{path}, line {number}: expected one of the {kind} of an earlier run; give another "
                                  "--output, or remove the file") from None
            whole += len(line)
        if whole < len(data):
            with path.open("r+b") as file:
                file.truncate(whole)

    def add(self, key: str, text: str, about: JsonObject) -> None:
        """Keep a text; `about` describes it for human readers."""
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, **about, "text": text}, ensure_ascii=False) + "\n")
            self.texts[key] = text


class Judge:
    """A model behind OpenAI's chat API.

    Args:
        url: up to and including /v1; /chat/completions is appended if missing.
        model: its name there.
        pause: seconds before the second attempt; doubled for each further one.
    """

    def __init__(self, url: str, model: str, pause: float = 1.0):
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"--judge_url: expected http://... or https://..., found {url!r}")
        url = url.rstrip("/")
        self.url = url if url.endswith("/chat/completions") else f"{url}/chat/completions"
        self.model, self._pause = model, pause
        self._key = next((os.environ[name] for name in KEYS if os.environ.get(name)), None)

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
                with urllib.request.urlopen(urllib.request.Request(self.url, body, headers), timeout=TIMEOUT) as answer:
                    return self._text(answer.read())
            except urllib.error.HTTPError as err:
                reason = f"HTTP {err.code}: {' '.join(err.read(300).decode('utf-8', 'replace').split())}"
                if err.code not in _LATER:
                    break
            except OSError as err:
                reason = str(getattr(err, "reason", err))
        key = "" if self._key else f"; no key is set ({' or '.join(KEYS)})"
        raise ConfigError(f"--judge_url: {self.url} does not answer: {reason}{key}; what was judged is kept, the same "
                          "command goes on")

    def _text(self, data: bytes) -> str:
        try:
            text = json.loads(data)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError):
            raise ConfigError(f"--judge_url: {self.url} answered without choices[0].message.content: "
                              f"{data[:200].decode('utf-8', 'replace')}") from None
        return str(text or "")


def judge_all(judge: Judge, store: Store, asked: Sequence[Tuple[Messages, JsonObject]], at_once: int = 4,
              bar: Optional[object] = None) -> List[str]:
    """The judgments of (messages, what they are about); those in `store` are not asked for again."""
    def one(item: Tuple[Messages, JsonObject]) -> str:
        messages, about = item
        key = digest(judge.model, messages)
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
