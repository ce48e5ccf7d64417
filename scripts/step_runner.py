"""Steps with results that are reused while their inputs stay the same. Knows nothing of what the steps do.

Each step fills a folder of its own beside its place; only a finished one is moved there. A step counts as done if its
inputs hash to the same key as then and its files are still there. Interrupted or failed steps leave only their log.
"""
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Union

POLL = 0.3   # seconds between two looks at a running command


class StepError(Exception):
    """A step failed; the message is what the user should read."""


def hash_inputs(inputs: Iterable[Union[str, Path]]) -> str:
    """One hash over texts (as they are) and files (by name and content)."""
    digest = hashlib.sha256()
    for item in inputs:
        part = item.name.encode() + b"\0" + item.read_bytes() if isinstance(item, Path) else item.encode()
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def list_files(folder: Path) -> Dict[str, int]:
    """Size in bytes of every file below `folder`, by relative name."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}


def run_command(command: Sequence[str], log: Path, cwd: Path, watch: Optional[Callable[[], None]] = None) -> None:
    """Run `command` with its output in `log`; `watch` is called now and then. StepError shows the end of the log.

    The command gets its own process group, so that an interrupt here ends it with all its children.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w", encoding="utf-8") as output:
        output.write("$ " + shlex.join(command) + "\n")
        output.flush()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=cwd,
                                   start_new_session=True)
        try:
            while process.poll() is None:
                time.sleep(POLL)
                if watch:
                    watch()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if process.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        error = next((line for line in reversed(lines) if line.startswith("error: ")), None)
        if error is None:
            print("\n".join("  | " + line for line in lines[-12:]), file=sys.stderr)
            error = f"error: exit code {process.returncode}, its last lines are above"
        raise StepError(f"{Path(command[1]).name}: {error[len('error: '):]} (all output: {log})")


class Workspace:
    """A folder with the results of steps, used by one process at a time."""

    def __init__(self, folder: Path, steps: int, fresh: bool = False):
        self.folder, self.steps, self.count = folder, steps, 0
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = open(folder / ".lock", "w")  # noqa: SIM115 - held open as long as the process lives
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StepError(f"another run is using {folder}; wait for it or stop it") from None
        self._record_file = folder / ".steps.json"
        self.record = self._read_record()
        for left in folder.glob(".partial-*"):
            shutil.rmtree(left)
        if fresh:                                # only what steps made: the folder may hold other things
            for name in [*self.record, "logs"]:
                if Path(name).name == name:
                    shutil.rmtree(folder / name, ignore_errors=True)
            self.record = {}
            self._write_record()

    def _read_record(self) -> Dict[str, Any]:
        try:
            record = json.loads(self._record_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return record if isinstance(record, dict) else {}

    def _write_record(self) -> None:
        beside = self._record_file.with_suffix(".part")
        beside.write_text(json.dumps(self.record, indent=1), encoding="utf-8")
        os.replace(beside, self._record_file)

    def is_done(self, name: str, key: str) -> bool:
        """Whether the step's files are there, made from the same inputs."""
        entry = self.record.get(name)
        return (isinstance(entry, dict) and entry.get("key") == key and (self.folder / name).is_dir()
                and list_files(self.folder / name) == entry.get("files"))

    def step(self, name: str, title: str, inputs: Iterable[Union[str, Path]], make: Callable[[Path], None]) -> str:
        """Make folder `name`, unless it is done: `make` fills the folder that it is given. Returns the step's key."""
        self.count += 1
        key = hash_inputs([name, *inputs])
        head = f"[{self.count}/{self.steps}] {title}"
        if self.is_done(name, key):
            print(f"{head}: done before, reused", flush=True)
            return key
        print(head, flush=True)
        start = time.time()
        partial = self.folder / f".partial-{name}"
        partial.mkdir()
        try:
            make(partial)
            self.record.pop(name, None)
            self._write_record()
            shutil.rmtree(self.folder / name, ignore_errors=True)
            os.replace(partial, self.folder / name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        self.record[name] = {"key": key, "files": list_files(self.folder / name)}
        self._write_record()
        print(f"      {time.time() - start:.1f} s", flush=True)
        return key

    def run(self, name: str, command: List[str], cwd: Path, watch: Optional[Callable[[], None]] = None) -> None:
        """Print `command` as a user would type it, and run it; its output goes to logs/NAME.log."""
        shown = ["python" if word == sys.executable else _short(word, cwd) for word in command]
        print("      $ " + shlex.join(shown), flush=True)
        run_command(command, self.folder / "logs" / f"{name}.log", cwd, watch)


def _short(word: str, cwd: Path) -> str:
    """An absolute path below `cwd` as a relative one; partial folders by the name they will have."""
    return word.replace(str(cwd) + os.sep, "").replace(".partial-", "")
