"""Compiles one plan for one rank of a simulated cluster, in a process of its own, and accounts for the graph.

`compile_plan` is for Python; the command line is scripts/plan.py --compile.
"""
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable, Dict, List, Optional, Protocol

from research.telechat.ascend_sim import runtime
from research.telechat.ascend_sim.account import Mesh, account, load
from research.telechat.common.files import JsonObject

_SLOW_DOWN = 0.2                                # seconds of processor after which a thread counts as polling


def quieten(process: int) -> None:
    """Let the threads that poll the simulated device run only when nothing else wants the processor.

    MindSpore asks the device for callbacks in two threads; the real call waits, the stub returns at once, so that
    they would take two processors from the compiler.
    """
    ticks_per_second = os.sysconf("SC_CLK_TCK")
    try:
        for entry in Path(f"/proc/{process}/task").iterdir():
            thread = int(entry.name)
            if thread == process or os.sched_getscheduler(thread) == os.SCHED_IDLE:
                continue
            name, _, facts = (entry / "stat").read_text(encoding="utf-8").rpartition(")")
            busy = int(facts.split()[11]) / ticks_per_second
            if name.partition("(")[2].startswith("python") and busy > _SLOW_DOWN:
                os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
    except (OSError, AttributeError, ValueError):   # a thread or the process has ended, or this is not Linux
        pass


def compiler_errors(log: Path, most: int = 8) -> List[str]:
    """The lines of a worker's log in which MindSpore's front end says what it could not do, without repetition."""
    found: List[str] = []
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        match = re.match(r"\[(?:ERROR|EXCEPTION)\] (?:PARALLEL|ANALYZER|PIPELINE|CORE|OPS)\(.*?\] \w+\] (.*)", line)
        if match and match.group(1) not in found:
            found.append(match.group(1))
    return found[:most]


def _rows(recipe: JsonObject) -> int:
    """Records of one step: the global batch."""
    runner, plan = recipe.get("runner_config") or {}, recipe.get("parallel_config") or {}
    micro = plan.get("micro_batch_num", 1) if plan.get("pipeline_stage", 1) > 1 else 1
    return (runner.get("batch_size", 1) * plan.get("data_parallel", 1) * micro
            * runner.get("gradient_accumulation_steps", 1) * (recipe.get("micro_batch_interleave_num") or 1))


class Worker(Protocol):
    """A process, with what is needed of Popen."""

    pid: int

    def wait(self, timeout: Optional[float] = None) -> int:
        """Its exit code. Raises subprocess.TimeoutExpired."""

    def poll(self) -> Optional[int]:
        """Its exit code, or None while it runs."""

    def kill(self) -> None:
        """End it."""


def start_worker(words: List[str], folder: Path, env: Dict[str, str], log: Path) -> Worker:
    """Start Python with `words`, a script and its arguments, in `folder`; what it prints goes to `log`."""
    with log.open("wb") as handle:
        return subprocess.Popen([sys.executable, *words], cwd=folder, env=env, stdout=handle, stderr=subprocess.STDOUT)


def compile_plan(recipe: JsonObject, mesh: Mesh, rank: int, length: int, keep: Optional[Path] = None,
                 timeout: float = 3600, progress: Optional[Callable[[float], None]] = None,
                 start: Callable[[List[str], Path, Dict[str, str], Path], Worker] = start_worker,
                 count: bool = True, all_stages: bool = False) -> JsonObject:
    """Compile `recipe` as rank `rank` of the ranks of `mesh`.

    Args:
        recipe: complete, as recipe.read.read_recipe gives it with overrides applied.
        mesh: degrees of parallelism.
        length: tokens of a training record, seq_length + 1; not used for prediction.
        keep: folder for log, graphs and strategy files; None: a temporary one, removed unless compiling failed.
        timeout: seconds.
        progress: called every half second with the seconds passed.
        start: starts the process that compiles.
        count: whether to account for the graphs, which takes seconds.
        all_stages: whether the decoder layers of other pipeline stages are parsed and inferred as well, as on a
            cluster, before they are dropped (shortcuts.py).

    Returns:
        {"ok", "seconds", "versions", "compiler_memory_mb", "folder"}, and "graphs": {name: what `account` counts, or
        nothing} where it compiled, "error" and "details" (lines of the compiler) where not.

    Raises:
        SimulationError: the simulated runtime cannot be made.
    """
    folder = Path(keep) if keep else Path(tempfile.mkdtemp(prefix="telechat-compile-"))
    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    ranks = mesh.pp * mesh.dp * mesh.cp * mesh.mp
    columns = list((recipe.get("train_dataset") or {}).get("input_columns") or ["input_ids", "labels"])
    if ((recipe.get("model") or {}).get("model_config") or {}).get("document_boundaries"):
        columns = [*columns, "actual_seq_len"] if "actual_seq_len" not in columns else columns
    result = folder / "worker.json"
    job = {"folder": str(folder), "report": str(result), "recipe": recipe, "config": "recipe",
           "columns": columns, "length": length, "rows": _rows(recipe), "ranks": ranks, "all_stages": all_stages}
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    result.unlink(missing_ok=True)
    env = runtime.environment(ranks, rank)
    env.update(LOG_MF_PATH=str(folder / "log"), GLOG_v="3", OMP_NUM_THREADS=env.get("OMP_NUM_THREADS", "1"))
    log = folder / "worker.log"
    started = time.time()
    worker = start([str(Path(__file__).with_name("worker.py")), str(folder / "job.json")], folder, env, log)
    try:
        while True:
            try:
                code = str(worker.wait(0.5))
                break
            except subprocess.TimeoutExpired:
                quieten(worker.pid)
                passed = time.time() - started
                if progress:
                    progress(passed)
                if passed > timeout:
                    code = f"nothing: it was stopped after {timeout:.0f} s"
                    break
    finally:
        if worker.poll() is None:
            worker.kill()
            worker.wait()
    report: JsonObject = {"ok": False, "error": f"the compiler ended with {code} and without a report"}
    if result.is_file():
        report = json.loads(result.read_text(encoding="utf-8"))
    report["folder"] = str(folder)
    report["graphs"] = {name: account(load(Path(path), runtime.mindspore_folder()), mesh, rank) if count else {}
                        for name, path in report.get("graphs", {}).items()}
    if not report["ok"]:
        report["details"] = compiler_errors(log)
    elif keep is None:
        shutil.rmtree(folder, ignore_errors=True)
    return report
