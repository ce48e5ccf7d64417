"""Compiles all ranks of a plan with the simulated runtime and caches the graphs.

The cache key is a digest of the recipe without its names, of the versions of MindSpore and MindFormers, and of the
sources that a graph depends on: recipes whose small models are equal share their graphs, which are cached next to the
stubs of the simulated runtime (TELECHAT_SIM_CACHE).
"""
import copy
import gzip
import hashlib
import json
import pickle
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

from research.telechat.ascend_sim import runtime
from research.telechat.ascend_sim.account import Mesh
from research.telechat.ascend_sim.compile import compile_plan, start_worker
from research.telechat.checkpoint.strategy import Strategy, read_strategy
from research.telechat.common.environment import PLUGIN
from research.telechat.common.errors import ConfigError
from research.telechat.common.files import JsonObject, whole
from research.telechat.interpret.ir import Program, read_program
from research.telechat.plan.plan import Plan, read_plan
from research.telechat.recipe.fields import FRAMEWORK
from research.telechat.recipe.settings import resolve

_FORM = 1                                    # raise it when the cached format changes
_IN_A_GRAPH = ("ascend_sim", "bridge", "model", "recipe", "run", "spec", "training")     # rooms; and files at the top
_NOT_IN_A_GRAPH = ("net_name", "chat_template", "do_sample", "repetition_penalty", "temperature", "top_k", "top_p")
Starter = Callable[..., Any]


class Compiled(NamedTuple):
    """All ranks of a plan. programs: per rank {"step" or "prefill" and "decode": Program}."""

    recipe: JsonObject
    plan: Plan
    programs: List[Dict[str, Program]]
    strategy: Optional[Strategy]             # None if nothing is sharded within a pipeline stage
    seconds: float                           # of compiling; 0 if all graphs were cached


def _sources() -> str:
    """Digest of the sources that a graph depends on."""
    digest = hashlib.sha256()
    for path in sorted(PLUGIN.rglob("*.py")):
        place = path.relative_to(PLUGIN)
        if len(place.parts) == 1 or place.parts[0] in _IN_A_GRAPH:
            digest.update(str(place).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def content(recipe: JsonObject) -> str:
    """What the graphs of a recipe depend on, as text: equal for recipes that differ in names only."""
    kept = copy.deepcopy(recipe)
    kept.get("trainer", {}).pop("model_name", None)
    kept.get("runner_config", {}).pop("epochs", None)
    model = kept["model"]["model_config"]
    settings = {key: value for key, value in asdict(resolve(model)).items() if key not in _NOT_IN_A_GRAPH}
    kept["model"]["model_config"] = {key: value for key, value in model.items() if key in FRAMEWORK}
    return json.dumps([kept, settings], sort_keys=True, default=str)


def _key(recipe: JsonObject) -> str:
    versions = [runtime.mindspore_version(), metadata.version("mindformers")]
    content_of_graphs = json.dumps([_FORM, content(recipe), versions, _sources()])
    return hashlib.sha256(content_of_graphs.encode()).hexdigest()[:16]


def _compile_rank(recipe: JsonObject, plan: Plan, rank: int, target: Path, timeout: float, start: Starter) -> float:
    """Compile one rank into the file `target`; returns the compiler's seconds. Raises ConfigError."""
    work = Path(tempfile.mkdtemp(prefix="telechat-execute-"))
    try:
        report = compile_plan(recipe, Mesh(plan.pp, plan.dp, plan.cp, plan.mp), rank, plan.model.seq_length + 1, work,
                              timeout, start=start, count=False, all_stages=True)
        if not report["ok"]:
            said = (report["details"] or report["error"].splitlines())[0]
            raise ConfigError(f"rank {rank} of the scaled-down plan does not compile: {said[:400]}")
        programs = {name: read_program(work / f"{name}.mindir", runtime.mindspore_folder())
                    for name in report["graphs"]}
        strategies = {path.name: path.read_bytes() for path in sorted(work.glob("output/strategy/*.ckpt"))}
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole(target) as beside, gzip.open(beside, "wb", compresslevel=1) as handle:
            pickle.dump((programs, strategies), handle)
        return float(report["seconds"].get("total", 0))
    finally:
        shutil.rmtree(work, ignore_errors=True)


def compiled(recipe: JsonObject, jobs: int = 1, timeout: float = 3600, start: Starter = start_worker,
             progress: Callable[[], object] = lambda: None) -> Compiled:
    """The graphs of all ranks of `recipe`, compiled unless cached.

    Args:
        recipe: small and complete (shrink.py).
        jobs: ranks compiled at the same time; each takes a core and about 1.5 GB.
        timeout: seconds per rank.
        start: see ascend_sim.compile.compile_plan.
        progress: called when a rank is done.

    Raises:
        ConfigError: a rank does not compile. SimulationError: there is no simulated runtime.
    """
    plan = read_plan(recipe)
    folder = runtime.cache_folder() / "graphs" / _key(recipe)
    files = [folder / f"rank_{rank}.gz" for rank in range(plan.ranks)]
    seconds = 0.0

    def one(rank: int) -> float:
        spent = 0.0 if files[rank].is_file() else _compile_rank(recipe, plan, rank, files[rank], timeout, start)
        progress()
        return spent

    with ThreadPoolExecutor(max(1, jobs)) as pool:
        seconds = sum(pool.map(one, range(plan.ranks)))
    programs, strategies = [], {}
    for file in files:
        mine, written = _kept(file)
        programs.append(mine)
        strategies.update(written)
    return Compiled(recipe, plan, programs, _strategy(plan, strategies), seconds)


def _kept(file: Path) -> Tuple[Dict[str, Program], Dict[str, bytes]]:
    """Graphs and strategy files of a rank, as `_compile_rank` wrote them into the user's own cache."""
    try:
        with gzip.open(file, "rb") as handle:
            programs, strategies = pickle.load(handle)
        return programs, strategies
    except (OSError, EOFError, ValueError, TypeError, AttributeError, ImportError, pickle.UnpicklingError) as err:
        file.unlink(missing_ok=True)
        raise ConfigError(f"{file}, a graph kept from an earlier run, cannot be read ({err}) and was removed; run the "
                          "command again") from err


def _strategy(plan: Plan, files: Dict[str, bytes]) -> Optional[Strategy]:
    if plan.ranks == plan.pp or not files:                   # MindSpore writes no device matrix for stages only
        return None
    with tempfile.TemporaryDirectory(prefix="telechat-strategy-") as name:
        for file, content in files.items():
            (Path(name) / file).write_bytes(content)
        return read_strategy(Path(name))
