"""Compiles the C++ of this room for this machine's processor, once, and keeps the library in the user's cache folder.

Without a compiler, or with TELECHAT_CPU_KERNELS=0, there is no library, and the model computes with MindSpore's own
operators: slower, with the same results up to rounding.
"""
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import List, Optional

SWITCH = "TELECHAT_CPU_KERNELS"
_ALLOWED = "MS_CUSTOM_AOT_WHITE_LIST"                    # read by MindSpore
_COMPILERS = ("g++", "clang++", "c++")
_FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fPIC", "-pthread", "-Wall")
_MOST_THREADS = 16                                       # the operators of small models gain nothing beyond
_PATIENCE = 300                                          # seconds a compiler may take
_STALE = 3600                                            # seconds after which no compiler writes there any more
_HERE = Path(__file__).resolve().parent
_lock = threading.Lock()


@dataclass(frozen=True)
class Library:
    """The compiled library, or why there is none: one of `path` and `reason` is None. seconds: compilation, 0 if it
    was there already."""

    path: Optional[Path]
    reason: Optional[str] = None
    seconds: float = 0.0


class _MissingError(Exception):
    """There is no library; the message says why."""


def library() -> Library:
    """The library for this processor, compiled if necessary. Never raises: what is missing is in `reason`."""
    with _lock:
        return _library()


def begin() -> None:
    """Compile in the background, if necessary, in a process that will need the library later."""
    threading.Thread(target=library, daemon=True).start()


@functools.lru_cache(maxsize=1)
def _library() -> Library:
    if os.environ.get(SWITCH, "1") == "0":
        return Library(None, f"{SWITCH} is 0")
    if sys.platform != "linux":
        return Library(None, "MindSpore takes them on Linux only")
    started = time.monotonic()
    try:
        compiler = _compiler()
        flags = [*_FLAGS, _for_this_processor()]
        path = _folder() / f"kernels-{_key(compiler, flags)}.so"
        _check_allowed(path)
        made = not path.is_file()
        if made:
            _compile(compiler, flags, path)
        _try(path)
    except (_MissingError, OSError, subprocess.SubprocessError) as err:
        return Library(None, str(err))
    return Library(path, seconds=time.monotonic() - started if made else 0.0)


def _compiler() -> str:
    """Path of the compiler: $CXX, or the first of the usual ones."""
    wanted = os.environ.get("CXX")
    for name in (wanted,) if wanted else _COMPILERS:
        found = shutil.which(name)
        if found:
            return found
    raise _MissingError(f"no C++ compiler was found (looked for {wanted or ', '.join(_COMPILERS)})")


def _for_this_processor() -> str:
    return "-mcpu=native" if platform.machine() == "aarch64" else "-march=native"


def sources() -> List[Path]:
    """The files to compile; what they include is beside them."""
    return sorted(_HERE.glob("*.cc"))


def _key(compiler: str, flags: List[str]) -> str:
    """What the library depends on, as a name: source, compiler, options, processor."""
    digest = hashlib.sha256()
    for path in sorted([*_HERE.glob("*.cc"), *_HERE.glob("*.h")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=_PATIENCE).stdout
    digest.update(version + "\0".join(flags).encode() + _processor())
    return digest.hexdigest()[:20]


def _processor() -> bytes:
    """What -march=native looks at."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return platform.machine().encode()
    wanted = (b"model name", b"flags", b"features", b"cpu part", b"cpu implementer")
    return b"\n".join(sorted({line for line in lines if line.lower().startswith(wanted)}))


def _folder() -> Path:
    """Where libraries are kept. Only the user may be able to write there: what lies in it is executed."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(cache) / "telechat"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as err:
        raise _MissingError(f"{folder} cannot be made ({err.strerror}); "
                            "set XDG_CACHE_HOME to a folder of yours") from err
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise _MissingError(f"{folder} can be written by others; set XDG_CACHE_HOME to a folder of yours")
    return folder


def _check_allowed(path: Path) -> None:
    """Whether MindSpore will load the library: it heeds a variable that names a folder."""
    allowed = os.environ.get(_ALLOWED)
    if allowed is not None and os.path.realpath(allowed) not in os.path.realpath(path):
        raise _MissingError(f"{_ALLOWED} allows libraries in {allowed} only; set XDG_CACHE_HOME to that folder")


def _compile(compiler: str, flags: List[str], path: Path) -> None:
    """Compile to `path`, which appears whole or not at all; all files at the same time."""
    for left in path.parent.glob("compiling-*"):             # of a process that was killed
        if time.time() - left.stat().st_mtime > _STALE:
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="compiling-") as folder:
        objects = [Path(folder) / f"{source.stem}.o" for source in sources()]
        _run_all([[compiler, *flags, "-c", "-o", str(made), str(source)] for source, made in zip(sources(), objects)])
        made = Path(folder) / path.name
        _run_all([[compiler, *flags, "-shared", "-o", str(made), *map(str, objects)]])
        os.replace(made, path)


def _run_all(commands: List[List[str]]) -> None:
    """Run compilers at the same time; _MissingError with the first error of one that fails."""
    running = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                                errors="replace") for command in commands]
    try:
        for command, process in zip(commands, running):
            _, text = process.communicate(timeout=_PATIENCE)
            if process.returncode:
                lines = [line for line in text.splitlines() if "error" in line] or text.splitlines()[-1:]
                why = lines[0].strip()[:300] if lines else f"exit code {process.returncode}"
                raise _MissingError(f"{command[0]} failed: {why}")
    finally:
        for process in running:
            process.kill()
            process.wait()


def _try(path: Path) -> None:
    """Load the library, so that one that cannot be loaded is noticed here; MindSpore gets the same copy of it."""
    ctypes.CDLL(str(path), mode=os.RTLD_LOCAL | os.RTLD_NOW).UseThreads(threads())


def threads() -> int:
    """Threads of an operator: OMP_NUM_THREADS as set for the process, else its processors, at most 16.

    From Python's copy of the environment: MindSpore sets the variable to 1 when it is imported.
    """
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdecimal() and int(given):
        return int(given)
    return min(len(os.sched_getaffinity(0)), _MOST_THREADS)
