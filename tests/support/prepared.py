"""Processes that begin with MindSpore and MindFormers imported, which otherwise takes each of them some ten seconds.

One process imports everything and then forks for every start: `run` and `start` take a script and its arguments as
subprocess does, and the child executes it as `python SCRIPT ARGUMENTS` would, with its own environment, folder, output
and signals. `put_python` makes a program `python` that does so, for shells and launchers. Not for what such a child
cannot show: order of sets (its hash seed is the parent's), and variables that are read while packages are imported.
Tests of those, and the runs that others are compared with, start a fresh Python.
"""
import atexit
import gc
import importlib
import json
import os
import resource
import runpy
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

ROOT = Path(__file__).resolve().parents[2]
MODULES = ("mindspore.dataset", "mindspore.mindrecord", "mindformers.trainer", "matplotlib.pyplot",
           "research.telechat.run.job", "run_mindformer")
_servers: Dict[bool, "Server"] = {}
_lock = threading.Lock()


class Started:
    """A process as subprocess.Popen shows it."""

    def __init__(self, connection: socket.socket, args: Sequence[str]):
        self.connection, self.args, self.returncode = connection, args, None
        self.lines = connection.makefile("r")
        self.pid = json.loads(self.lines.readline())

    def wait(self, timeout: Optional[float] = None) -> int:
        """Its exit code, or minus the signal that has ended it. TimeoutExpired."""
        if self.returncode is None:
            if not select.select([self.connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(list(self.args), timeout)
            line = self.lines.readline()
            assert line, "the process that starts others has ended"
            self.returncode = json.loads(line)
            self.lines.close()
            self.connection.close()
        return self.returncode

    def poll(self) -> Optional[int]:
        """Its exit code, or None while it runs."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        """End it."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


class Server:
    """The process that forks. modules: what it imports; ascend: with the simulated Ascend runtime."""

    def __init__(self, modules: Sequence[str] = MODULES, ascend: bool = False):
        env = dict(os.environ)
        self.folder = tempfile.TemporaryDirectory(prefix="telechat-prepared-")
        if ascend:
            from research.telechat.ascend_sim import runtime
            env = {"OMP_NUM_THREADS": "1", **runtime.environment()}
        env.update(GLOG_v="3", LOG_MF_PATH=f"{self.folder.name}/log")
        self.path = f"{self.folder.name}/socket"
        self.process = subprocess.Popen([sys.executable, __file__, self.path, *modules], env=env, cwd=ROOT,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        while self.process.stdout.readline() not in ("prepared\n", ""):
            pass                                     # what packages print when they are imported
        assert Path(self.path).exists(), "one of the modules cannot be imported"
        atexit.register(self.stop)

    def start(self, job: Dict[str, Any]) -> Started:
        """A child that does `job`."""
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self.path)
        connection.sendall((json.dumps(job) + "\n").encode())
        return Started(connection, job["args"])

    def stop(self) -> None:
        """It ends when its input does."""
        self.process.stdin.close()
        self.process.wait()
        self.folder.cleanup()


def start(args: Sequence[str], cwd: Path, env: Dict[str, str], output: str, error: str = "", limit: int = 0,
          ascend: bool = False) -> Started:
    """`python ARGS...`: a script and its arguments. output, error: files to append to (error: that of output); limit:
    bytes that no file may exceed; ascend: `env` is one of the simulated runtime."""
    with _lock:
        if ascend not in _servers:
            _servers[ascend] = Server(ascend=ascend)
    return _servers[ascend].start({"args": list(map(str, args)), "cwd": str(cwd), "env": dict(env), "output": output,
                                   "error": error, "limit": limit})


def run(args: Sequence[str], cwd: Path = ROOT, env: Optional[Dict[str, str]] = None, limit: int = 0,
        timeout: float = 600, ascend: bool = False) -> "subprocess.CompletedProcess[str]":
    """As subprocess.run(..., text=True, capture_output=True)."""
    with tempfile.TemporaryDirectory(prefix="telechat-prepared-") as folder:
        files = [Path(folder, name) for name in ("output", "error")]
        process = start(args, cwd, {**os.environ, **(env or {})}, *map(str, files), limit=limit, ascend=ascend)
        try:
            process.wait(timeout)
        finally:
            process.kill()
        texts = [path.read_text(encoding="utf-8", errors="replace") for path in files]
    return subprocess.CompletedProcess(list(args), process.returncode, *texts)


def put_python(path: Path) -> None:
    """Write a program `path` that runs `SCRIPT ARGUMENTS` in a process forked from the prepared one, with the standard
    streams, folder, environment, cores and signals that it has itself. It is sys.executable there, for the processes
    which that one starts. Anything else (-c, -m), and what is to load other libraries, it leaves to Python."""
    with _lock:
        if False not in _servers:
            _servers[False] = Server()
    python = shlex.quote(sys.executable)
    program = shlex.join([sys.executable, "-I", "-S", str(Path(__file__).with_name("prepared_python.py")),
                          _servers[False].path, str(path)])
    path.write_text(f"""#!/bin/sh
case $1 in -* | */scripts/launcher_*.py) exec {python} "$@" ;; esac
[ "$LD_LIBRARY_PATH" = {shlex.quote(os.environ.get("LD_LIBRARY_PATH", ""))} ] || exec {python} "$@"
exec {program} "$@"
""")
    path.chmod(0o755)


def with_programs(env: Optional[Dict[str, str]] = None) -> Dict[str, str]:
    """This environment and `env`, in which `python` and `msrun` are forked from the prepared process."""
    folder = Path(tempfile.mkdtemp(prefix="telechat-programs-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    put_python(folder / "python")
    (folder / "msrun").write_text(f"""#!/bin/sh
exec {folder}/python {shlex.quote(str(Path(sys.executable).with_name("msrun")))} "$@"
""")
    (folder / "msrun").chmod(0o755)
    return {**os.environ, **(env or {}), "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"}


# ---- the process that forks


def become(job: Dict[str, Any], streams: Sequence[int]) -> None:
    """Make this process what `job` asks for. streams: descriptors of the three standard ones, or none."""
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    if not streams:
        inputs = os.open(os.devnull, os.O_RDONLY)
        output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        error = os.open(job["error"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600) if job["error"] else output
        streams = [inputs, output, error]
    for target, descriptor in enumerate(streams):
        os.dup2(descriptor, target)
    if "program" in job:
        os.sched_setaffinity(0, job["cores"])
        sys.executable = job["program"]
    if job["limit"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"], job["limit"]))
    sys.argv = job["args"]
    sys.path[0] = str(Path(job["args"][0]).resolve().parent)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()           # as in a process of its own


def execute(script: str) -> None:
    """Run `script` and end as Python does: threads, what is registered for the exit, the exit code. What is then left
    out, the destruction of every module, takes seconds in a process that shares its memory."""
    code: Any = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        code = end.code
    except BaseException as error:
        traceback.print_exc()
        code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()
    atexit._run_exitfuncs()
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if code == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code or 0)


def receive(connection: socket.socket) -> Tuple[Dict[str, Any], List[int]]:
    """The job that comes by `connection`, and the standard streams that come with it, if any."""
    data, streams, _, _ = socket.recv_fds(connection, 1 << 16, 3)
    while not data.endswith(b"\n"):
        data += connection.recv(1 << 16)
    return json.loads(data), streams


def serve(path: str) -> Optional[Tuple[Dict[str, Any], List[int]]]:
    """Fork for every job that comes in by the socket at `path` until the input ends. In a child: its job and its
    standard streams."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    print("prepared", flush=True)
    while True:
        ready, _, _ = select.select([listener, 0], [], [], 1.0)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass
        if 0 in ready:
            return None
        if listener not in ready:
            continue
        connection, _ = listener.accept()
        if os.fork():
            connection.close()
            continue
        listener.close()                             # a process that only waits for the next one and says how it ended
        job, streams = receive(connection)
        child = os.fork()
        if not child:
            connection.close()
            return job, streams
        os.dup2(os.open(os.devnull, os.O_RDWR), 1)
        for descriptor in streams:
            os.close(descriptor)
        connection.sendall(f"{child}\n".encode())
        if streams and connection in select.select([connection, os.pidfd_open(child)], [], [])[0]:
            os.kill(child, signal.SIGKILL)           # who has asked for it was killed
        _, status = os.waitpid(child, 0)
        try:
            connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
        finally:
            os._exit(0)


def main() -> None:
    """The server, and in its children the script."""
    sys.path[:1] = ["", str(ROOT)]                   # "" is the folder of the script to come
    for module in sys.argv[2:]:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()                                      # so that children need not copy what they do not change
    work = serve(sys.argv[1])
    if work is None:
        os._exit(0)
    become(*work)
    execute(sys.argv[0])


if __name__ == "__main__":
    main()
