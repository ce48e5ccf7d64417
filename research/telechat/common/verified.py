"""Verifies files against known SHA-256 or CRC-32, at most once per machine.

Reading a checkpoint of 200 GB takes minutes. What starts often may remember the result for this machine, by path, size,
time and inode of the file; processes that want the same file at the same time wait for the one that reads it. Where the
numbers come from is checkpoint/integrity.py's matter and data/meta.py's.
"""
import contextlib
import fcntl
import hashlib
import json
import os
import sys
import tempfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, Iterator, List, NamedTuple, Optional, Sequence

from tqdm import tqdm

from research.telechat.common.environment import cores
from research.telechat.common.hashing import file_sha256

_BLOCK = 4 << 20                         # bytes
_KEPT = 90 * 86400                       # seconds that a result is remembered


class Check(NamedTuple):
    """A file and what it must be."""

    path: Path
    size: int                            # bytes
    digest: str                          # hexadecimal SHA-256, or CRC-32 as a decimal number
    kind: str = "sha256"                 # or "crc32": of all but the last 17 bytes, as MindSpore appends it


def faults(checks: Sequence[Check], remember: bool, shown: bool = True) -> List[str]:
    """What is wrong, a line without full stop for each file; empty where all files are as they should be.

    remember: a result of this machine counts, and is kept for the next time. shown: with a bar of progress.
    """
    left: List[Check] = []
    found: List[str] = []
    for check in checks:
        fault = _fault_of_size(check)
        if fault:
            found.append(fault)
        elif not (remember and _known(check)):
            left.append(check)
    if not left:
        return found
    with tqdm(total=sum(check.size for check in left), desc="check files", unit="B", unit_scale=True,
              dynamic_ncols=True, mininterval=0.3, disable=not shown or not sys.stderr.isatty()) as bar, \
            ThreadPoolExecutor(min(4, max(1, cores()))) as pool:
        results = pool.map(lambda check: _examine(check, remember, bar.update), left)
        return found + [fault for fault in results if fault]


def _fault_of_size(check: Check) -> Optional[str]:
    try:
        size = os.stat(check.path).st_size
    except FileNotFoundError:
        return f"{check.path} is missing"
    return None if size == check.size else f"{check.path} has {size} bytes, {check.size} were written"


def _examine(check: Check, remember: bool, progress: Callable[[int], object]) -> Optional[str]:
    if not remember:
        return _compare(check, progress)
    with _turn(check):
        if _known(check):                                # another process has read it meanwhile
            progress(check.size)
            return None
        fault = _compare(check, progress)
        if fault is None:
            _remember(check)
        return fault


def _compare(check: Check, progress: Callable[[int], object]) -> Optional[str]:
    if check.kind == "crc32":
        found = str(_crc32(check.path, check.size - 17, progress))
        return None if found == check.digest else (
            f"{check.path} has the CRC-32 {found}, its own last bytes say {check.digest}")
    found = file_sha256(check.path, progress)
    return None if found == check.digest else (
        f"{check.path} has the SHA-256 {found[:16]}..., {check.digest[:16]}... was written")


def _crc32(path: Path, length: int, progress: Callable[[int], object]) -> int:
    value = 0
    with open(path, "rb", buffering=0) as file:
        while length > 0:
            block = file.read(min(_BLOCK, length))
            if not block:
                break
            value = zlib.crc32(block, value)
            length -= len(block)
            progress(len(block))
    return value


def cache_folder() -> Path:
    """Where this machine keeps results: XDG_CACHE_HOME, else ~/.cache, else the folder of temporary files."""
    with contextlib.suppress(OSError, RuntimeError):
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = base / "telechat" / "verified"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    folder = Path(tempfile.gettempdir()) / f"telechat-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _key(check: Check) -> Path:
    stat = os.stat(check.path)
    text = json.dumps([os.path.realpath(check.path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino,
                       stat.st_dev, check.kind, check.digest])
    return cache_folder() / hashlib.sha256(text.encode()).hexdigest()


def _known(check: Check) -> bool:
    try:
        return _key(check).is_file()
    except OSError:
        return False


def _remember(check: Check) -> None:
    with contextlib.suppress(OSError):                   # then it is read again the next time
        key = _key(check)
        key.touch()
        for old in key.parent.iterdir():
            if time.time() - old.stat().st_mtime > _KEPT:
                old.unlink(missing_ok=True)


@contextlib.contextmanager
def _turn(check: Check) -> Iterator[None]:
    """Of the processes of this machine that check this file, one at a time."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            descriptor = os.open(f"{_key(check)}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
