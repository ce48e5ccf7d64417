"""Chromium without a window, driven by its DevTools protocol through two pipes (--remote-debugging-pipe)."""
import base64
import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from needs import require

NAMES = ("chromium", "chromium-browser", "google-chrome")


class Browser:
    """One browser with one page. Attributes: `errors`, what the page's console has as errors or refused by policy."""

    def __init__(self, width=1000, height=760, dark=False, language="en-US"):
        found = next(filter(None, map(shutil.which, NAMES)), None)
        require(found, "needs a browser: chromium is not installed (Debian: apt-get install chromium)")
        self._folder = tempfile.TemporaryDirectory(prefix="telechat-browser-")
        ours, theirs = os.pipe(), os.pipe()               # what we write, what it writes

        def place():
            """Its ends as descriptors 3 and 4."""
            read, write = os.dup(ours[0]), os.dup(theirs[1])
            os.dup2(read, 3)
            os.dup2(write, 4)
        home = {**os.environ, "HOME": self._folder.name}
        with open(Path(self._folder.name, "log"), "wb") as log:
            self._process = subprocess.Popen(
                [found, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                 "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
                 f"--lang={language}", f"--window-size={width},{height}", f"--user-data-dir={self._folder.name}/data",
                 "--remote-debugging-pipe", "about:blank"],
                preexec_fn=place, close_fds=False, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=home)
        os.close(ours[0])
        os.close(theirs[1])
        self._write, self._read = ours[1], theirs[0]
        self._numbers, self._held, self._session, self.errors = itertools.count(1), b"", None, []
        pages = self._ask("Target.getTargets")["targetInfos"]
        target = next(page["targetId"] for page in pages if page["type"] == "page")
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._ask(f"{domain}.enable")
        self._ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=width < 600)
        self._ask("Emulation.setEmulatedMedia", features=[
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self._ask("Emulation.setLocaleOverride", locale=language.replace("-", "_"))

    def _ask(self, method, **params):
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + 30
        while True:
            answer = self._next(until)
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _next(self, until):
        while b"\0" not in self._held:
            assert select.select([self._read], [], [], max(until - time.monotonic(), 0))[0], "the browser is silent"
            data = os.read(self._read, 1 << 20)
            assert data, Path(self._folder.name, "log").read_text(errors="replace")[-2000:]
            self._held += data
        line, _, self._held = self._held.partition(b"\0")
        message = json.loads(line)
        if message.get("method") == "Runtime.exceptionThrown":
            self.errors.append(message["params"]["exceptionDetails"]["exception"]["description"])
        if message.get("method") == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
            text = message["params"]["entry"]["text"]
            if "responded with a status" not in text:                # an answer of the server, which the page shows
                self.errors.append(text)
        return message

    def open(self, url):
        """Go to a page, and wait until it is there."""
        self._ask("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def reload(self):
        """Load the page again."""
        self.run("window.before = 1")
        self._ask("Page.reload")
        self.wait("window.before === undefined && document.readyState === 'complete'")

    def run(self, script):
        """The value of an expression in the page."""
        found = self._ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, script, seconds=10):
        """Wait until an expression is true; its value."""
        until = time.monotonic() + seconds
        while True:
            value = self.run(script)
            if value:
                return value
            assert time.monotonic() < until, f"never true: {script}\n{self.run('document.body.innerText')}"
            time.sleep(0.02)

    def type(self, text):
        """Text as an input method gives it."""
        self._ask("Input.insertText", text=text)

    def press(self, key, **more):
        """A key down and up; more: fields of the event, such as isComposing."""
        for kind in ("rawKeyDown", "char", "keyUp"):
            self._ask("Input.dispatchKeyEvent", type=kind, key=key, text="\r" if key == "Enter" else key,
                      windowsVirtualKeyCode={"Enter": 13}.get(key, 0), **more)

    def picture(self, path):
        """What is seen, as a PNG."""
        Path(path).write_bytes(base64.b64decode(self._ask("Page.captureScreenshot")["data"]))

    def close(self):
        """End it."""
        with contextlib.suppress(OSError):
            self._session = None
            os.write(self._write, json.dumps({"id": 0, "method": "Browser.close"}).encode() + b"\0")
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._write)
        os.close(self._read)
        self._folder.cleanup()
