"""Programs that a model wrote, run in isolation: HumanEval and MBPP score an answer by running it. No MindSpore here.

docs/evaluation.md describes the isolation and what it protects from; evaluation/confined.py sets it up. If that fails,
nothing is run: `check_isolation` reports it before a model is loaded.
"""
import json
import os
import secrets
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from math import comb
from pathlib import Path
from typing import Dict, List, NamedTuple, Sequence, Tuple

from research.telechat.common.environment import rank
from research.telechat.common.errors import ConfigError

GUARD = Path(__file__).with_name("confined.py")
MIB = 1 << 20
_SHOWN = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/dev/null",
          "/dev/zero", "/dev/random", "/dev/urandom")
_GRACE = 20.0                    # extra seconds for the interpreters to start on a busy machine


class Limits(NamedTuple):
    """What a program may use."""

    cpu_seconds: int = 3             # of each process; the published scorers allow 3 seconds in total
    seconds: float = 10.0            # in total
    memory: int = 1024 * MIB         # bytes of address space of each process
    processes: int = 8               # concurrent, threads included
    file_size: int = 16 * MIB        # bytes of a file
    folder_size: int = 64 * MIB      # bytes of all files together
    files: int = 64                  # open at the same time


DEFAULT_LIMITS = Limits()


def run_program(program: str, limits: Limits = DEFAULT_LIMITS) -> str:
    """"passed" if a Python program finishes without an error; else "failed: ..." or "timed out".

    Raises ConfigError if the isolation cannot be set up; the program was not run then.
    """
    if not sys.platform.startswith("linux"):
        raise ConfigError(f"--allow_code_execution needs Linux to isolate programs, found {sys.platform}")
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="telechat-program-") as root:
        order = {**limits._asdict(), "token": token, "root": os.path.realpath(root), "paths": _paths(),
                 "python": sys.executable, "libraries": _libraries()}
        try:
            done = subprocess.run([sys.executable, "-I", "-S", "-B", str(GUARD), json.dumps(order)],
                                  input=f"{token}\n{program}".encode("utf-8", "replace"), capture_output=True,
                                  check=False, timeout=limits.seconds + _GRACE)
        except subprocess.TimeoutExpired:
            return "timed out"
    try:
        outcome: Dict[str, str] = json.loads(done.stdout)
    except ValueError:
        outcome = {"refused": done.stderr.decode("utf-8", "replace").strip()[-300:] or f"exit code {done.returncode}"}
    if "refused" in outcome:
        raise ConfigError(f"generated code not run: its isolation cannot be set up ({outcome['refused']}); it needs "
                          "Linux namespaces, as root with CAP_SYS_ADMIN or with unprivileged user namespaces (see "
                          "docs/evaluation.md)")
    return outcome["result"]


def _paths() -> List[str]:
    """What a program sees of the file system: the system's libraries and the interpreter's."""
    own = {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix, *filter(None, [_libraries()])}
    for link in _links(sys.executable):
        own.add(os.path.dirname(link))
    own |= {link for path in own for link in (*_links(path), os.path.realpath(path))}
    paths = [*_SHOWN, *sorted(own)]
    paths = [path for path in dict.fromkeys(paths) if path != "/" and os.path.exists(path)]
    return [path for path in paths if not any(path.startswith(other + "/") for other in paths)]


def _links(path: str) -> List[str]:
    """A file or folder and every symbolic link on the path to it."""
    found = [os.path.abspath(path)]
    while os.path.islink(found[-1]):
        found.append(os.path.normpath(os.path.join(os.path.dirname(found[-1]), os.readlink(found[-1]))))
    return found


def _libraries() -> str:
    """Folder of the interpreter's shared library, "" if it has none or the system finds it."""
    folder = str(sysconfig.get_config_var("LIBDIR") or "")
    return folder if sysconfig.get_config_var("Py_ENABLE_SHARED") and not folder.startswith("/usr/lib") else ""


# What a program must not be able to do. Each line is tried; the program passes only if all of them fail.
_PROBE = """
import os, socket
held = []
def refused(what):
    try:
        what()
    except OSError:
        return True
    return False
assert refused(lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM)), "it can open a socket"
assert refused(lambda: open("/usr/telechat-probe", "w")), "it can write outside its folder"
assert refused(lambda: open({file!r})), "it can read files of the user"
assert refused(lambda: os.setuid(0)), "it can become root"
assert os.listdir(".") == [], "its folder is not empty"
def bear():
    for _ in range({processes} + 1):
        child = os.fork()
        if not child:
            import time
            time.sleep(60)
            os._exit(0)
assert refused(bear), "its processes are not limited"
"""


def check_isolation() -> None:
    """Raise ConfigError if programs cannot be isolated: the isolation is set up once and tested from inside."""
    with tempfile.NamedTemporaryFile(prefix="telechat-probe-") as file:
        os.chmod(file.name, 0o644)
        result = run_program(_PROBE.format(file=file.name, processes=Limits().processes))
    if result != "passed":
        raise ConfigError(f"generated code not run: its isolation is incomplete ({result}); see docs/evaluation.md")


class CodeEval:
    """The metric code_eval as tasks of lm-evaluation-harness use it, with programs in isolation.

    Attributes: `allowed`, whether programs are run. Until it is set, and on all ranks of a parallel run but the first,
    which writes the report, nothing is run and nothing passes.
    """

    def __init__(self) -> None:
        self.allowed = False

    def compute(self, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1, 10, 100)
                ) -> Tuple[Dict[str, float], Dict[int, List[str]]]:
        """({"pass@K": mean over the tasks}, outcomes of each task's programs).

        references: the tests of each task; predictions: its programs; k: the K, those above the number of programs
        are left out. pass@K is the unbiased estimator of Chen et al., "Evaluating Large Language Models Trained on
        Code" (2021): of n programs of which c pass, 1 - C(n - c, K) / C(n, K).
        """
        outcomes: Dict[int, List[str]] = {}
        for number, (programs, test) in enumerate(zip(predictions, references)):
            outcomes[number] = self._run([f"{program}\n{test}" for program in programs])
        found = {}
        for wanted in k:
            values = [pass_at(wanted, len(each), each.count("passed")) for each in outcomes.values()
                      if len(each) >= wanted]
            if len(values) == len(outcomes) and values:
                found[f"pass@{wanted}"] = sum(values) / len(values)
        return found, outcomes

    def _run(self, programs: List[str]) -> List[str]:
        if not self.allowed or rank() != 0:
            return ["failed: not run"] * len(programs)
        if len(programs) == 1:
            return [run_program(programs[0])]
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            return list(pool.map(run_program, programs))


CODE_EVAL = CodeEval()


def pass_at(wanted: int, programs: int, passed: int) -> float:
    """Probability that one of `wanted` of the programs, drawn without replacement, passes."""
    return 1.0 - comb(programs - passed, wanted) / comb(programs, wanted)
