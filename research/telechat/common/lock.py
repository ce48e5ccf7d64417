"""Lock files, so that two commands never write one output at the same time. A lock file records its owner.

The kernel's lock of that file (flock) decides on one machine, and ends with the process that holds it, however that
ends; between machines its text decides, as not every file system carries locks over the network.
"""
import contextlib
import fcntl
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Iterator, Optional

from research.telechat.common.errors import OutputBusyError
from research.telechat.common.files import JsonObject

_PATIENCE = 2.0                          # seconds in which processes that a dead holder has begun may still end


def lock_path(output: Path, folder: bool = False) -> Path:
    """The lock file of an output: inside a folder that several commands add to, else next to the output."""
    output = Path(os.path.abspath(output))
    return output / ".telechat.lock" if folder else output.with_name(f".{output.name}.lock")


@contextlib.contextmanager
def output_lock(output: Path, folder: bool = False) -> Iterator[None]:
    """Hold the lock of `output` during the block. folder: see lock_path; a folder that is missing is made, and removed
    at the end where nothing came into it.

    Raises OutputBusyError: another process writes there (its number, machine, command and beginning are named).
    OSError: the place cannot be written.
    """
    path = lock_path(output, folder)
    made = [place for place in (path.parent, *path.parent.parents) if not place.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = _take(path, Path(output))
        try:
            yield
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)                          # while it is held: who waits for it looks again
            os.close(descriptor)
    finally:
        for place in made:
            with contextlib.suppress(OSError):           # it is not empty, or somebody else's by now
                place.rmdir()


def _take(path: Path, output: Path) -> int:
    """The descriptor of the lock file, held and with our name in it."""
    patience = time.monotonic() + _PATIENCE
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)   # who made it may have removed it
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            continue
        try:
            held = _flock(descriptor)
            holder = _read(descriptor)
            if not held:
                ending = holder is None or (_here(holder) and not _alive(holder))
                if ending and time.monotonic() < patience:    # or it is just writing its name
                    os.close(descriptor)
                    descriptor = -1
                    time.sleep(0.05)
                    continue
                raise _busy(path, output, holder)
            if not _same_file(descriptor, path):         # its holder has just removed it
                os.close(descriptor)
                descriptor = -1
                continue
            if holder is not None and not (_here(holder) and not _alive(holder)):
                raise _busy(path, output, holder)
            os.ftruncate(descriptor, 0)
            os.write(descriptor, json.dumps(_me(), ensure_ascii=False).encode())
            return descriptor
        except BaseException:
            if descriptor >= 0:
                os.close(descriptor)
            raise


def _flock(descriptor: int) -> bool:
    """Whether the lock is ours now. On a file system without locks the file's text alone decides."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _read(descriptor: int) -> Optional[JsonObject]:
    try:
        holder = json.loads(os.pread(descriptor, 65536, 0))
    except ValueError:
        return None
    return holder if isinstance(holder, dict) else None


def _me() -> JsonObject:
    return {"pid": os.getpid(), "started": _started(os.getpid()), "host": socket.gethostname(),
            "command": " ".join(sys.argv)[:1000], "since": time.strftime("%Y-%m-%d %H:%M:%S")}


def _started(pid: int) -> Optional[str]:
    """When a process began, in the kernel's own count: another process of the same number has another one."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _here(holder: JsonObject) -> bool:
    return holder.get("host") == socket.gethostname()


def _alive(holder: JsonObject) -> bool:
    pid = holder.get("pid")
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return holder.get("started") in (None, _started(pid))


def _busy(path: Path, output: Path, holder: Optional[JsonObject]) -> OutputBusyError:
    if holder is None:
        return OutputBusyError(f"{output} is being written by another process (lock file {path}); wait for it, or "
                               "choose another place")
    who = (f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')}: "
           f"{holder.get('command')}")
    stale = "" if _here(holder) else f"; if that process is gone, remove {path}"
    return OutputBusyError(f"{output} is being written by {who}; wait for it, or choose another place{stale}")
