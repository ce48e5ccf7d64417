"""Compilation of plans for Ascend with the simulated runtime, and of recipes on the CPU."""
import json
from pathlib import Path

import prepared
import pytest

from research.telechat.ascend_sim import compile as ascend_compile
from research.telechat.ascend_sim.account import Mesh
from research.telechat.ascend_sim.runtime import mindspore_folder
from research.telechat.common.errors import SimulationError
from research.telechat.plan.cost import cost_of
from research.telechat.plan.plan import find_faults, read_plan

ROOT = Path(__file__).resolve().parents[2]
try:
    mindspore_folder()
    NO_PLUGIN = ""
except SimulationError as error:
    NO_PLUGIN = str(error)


def compile_plan(*args, **options):
    """ascend_sim.compile.compile_plan by a process that has MindSpore and MindFormers imported already."""
    def start(words, folder, env, log):
        log.write_bytes(b"")
        return prepared.start(words, folder, env, str(log), ascend=True)
    return ascend_compile.compile_plan(*args, **options, start=start)


def compiled(recipe, rank=0, keep=None, **options):
    """(plan, what the graphs of `rank` hold), compiled."""
    plan = read_plan(recipe)
    assert find_faults(plan) == []
    report = compile_plan(recipe, Mesh(plan.pp, plan.dp, plan.cp, plan.mp), rank, plan.model.seq_length + 1, keep,
                          timeout=900, **options)
    assert report["ok"], report["error"] + "\n".join(report["details"])
    return plan, report["graphs"]


def agree(plan, rank, graph):
    """Arithmetic and compiler within 10 %."""
    cost, memory = cost_of(plan, rank), graph["memory"]
    assert graph["unresolved_calls"] == 0
    assert cost.sent == pytest.approx(graph["communication"]["bytes"], rel=0.1)
    for purpose, size in graph["communication"]["by_purpose"].items():
        if size > 0.02 * cost.sent:
            assert cost.sent_by("purpose")[purpose] == pytest.approx(size, rel=0.1), purpose
    assert cost.memory.parameters == pytest.approx(memory["parameters"]["bytes"], rel=0.1)
    assert cost.memory.optimizer == pytest.approx(memory["optimizer"]["bytes"], rel=0.1)
    assert cost.memory.remainder == memory.get("remainder", {"bytes": 0})["bytes"]
    assert cost.memory.gradients == pytest.approx(memory.get("gradients", {"bytes": 0})["bytes"], rel=0.1)


def compile_on_cpu(recipe, folder):
    """The worker's report of compiling `recipe` on the CPU of this machine."""
    job = {"folder": str(folder), "report": str(folder / "report.json"), "recipe": recipe, "config": "recipe",
           "columns": ["input_ids", "labels"], "length": recipe["model"]["model_config"]["seq_length"] + 1, "rows": 8,
           "ranks": 1}
    (folder / "job.json").write_text(json.dumps(job))
    env = {"LOG_MF_PATH": str(folder / "log"), "GLOG_v": "3", "OMP_NUM_THREADS": "1"}
    done = prepared.run([ROOT / "research/telechat/ascend_sim/worker.py", folder / "job.json"], folder, env)
    assert (folder / "report.json").is_file(), done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads((folder / "report.json").read_text())
