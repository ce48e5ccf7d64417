"""Stubs of the CANN libraries that MindSpore's Ascend plug-in links to, and the environment that loads them.

MindSpore's public wheel brings its Ascend plug-in, which does not load where Huawei's CANN is not installed. `prepare`
reads from the plug-in which libraries and symbols it misses and makes libraries of these names whose functions return 0
(a matter of seconds, kept in a cache per MindSpore build). With MindSpore's own dry run (MS_SIMULATION_LEVEL=0) that is
enough to compile for any number of devices; nothing runs. Works for mindspore 2.7.0, 2.7.1, 2.7.2 and 2.9.0 on x86_64;
aarch64 is written but was never tried.

    python research/telechat/ascend_sim/runtime.py check           # load the plug-in as rank 3 of 8
    python research/telechat/ascend_sim/runtime.py env 8 3         # the environment of rank 3 of 8, for a shell to eval
"""
import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Set, Tuple

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from research.telechat.ascend_sim.elf import Code, SharedObject, write_library
from research.telechat.common.errors import SimulationError

RECIPE = 2                                    # raise it when the stubs change, so that cached ones are rebuilt
SOC = "Ascend910B3"                           # answer of aclrtGetSocName: the chip of an Atlas 800T A2
CARDS_PER_HOST = 8
ROOTS = ("libmindspore_ascend.so.2", "libmindspore_ops_ascend.so")
# Optional kernel libraries with C++ factories. MindSpore does without them where they do not load; loaded with empty
# stubs they would hand out null pointers.
LEAVE_OUT = re.compile(r"lib(atb|lcal|ms_kernels|asdsip)|_c_")
# Functions that the plug-in looks up by name at run time; the names are among its constants. Operators (aclnn...) are
# not asked for before something is executed.
LOOKED_UP = re.compile(rb"(?!aclnn)(acl[a-z]*|hccl|Hccl|Hcom|hcom|rt|mstx|shmem|Msprof|prof|Tsd|hal)"
                       rb"[A-Z][A-Za-z0-9]{2,80}")
# What a launcher or an earlier job may have left; it would win over the simulation.
LAUNCHER_VARIABLES = ("MS_ROLE", "MS_WORKER_NUM", "MS_SCHED_HOST", "MS_SCHED_PORT", "MS_NODE_ID", "RANK_TABLE_FILE",
                      "OMPI_COMM_WORLD_RANK", "ASCEND_RT_VISIBLE_DEVICES", "DEVICE_ID", "DEVICE_NUM")


class Wanted(NamedTuple):
    """What the plug-in misses."""

    machine: int
    libraries: List[str]
    functions: Set[str]
    data: Set[str]


def mindspore_folder() -> Path:
    """Where MindSpore is installed, found without importing it. Raises SimulationError."""
    spec = importlib.util.find_spec("mindspore")
    if spec is None or not spec.submodule_search_locations:
        raise SimulationError(f"mindspore is not installed for {sys.executable}; activate the environment that "
                              "has it")
    folder = Path(next(iter(spec.submodule_search_locations)))
    if not (folder / "lib/plugin" / ROOTS[0]).is_file():
        raise SimulationError(f"this mindspore has no Ascend plug-in ({folder / 'lib/plugin' / ROOTS[0]} is missing); "
                              "the public wheels of mindspore 2.7.2 and 2.9.0 have one")
    return folder


def mindspore_version() -> str:
    """Version of the installed MindSpore, without importing it."""
    try:
        return metadata.version("mindspore")
    except metadata.PackageNotFoundError:
        return "unknown"


def _system_folders() -> List[Path]:
    triple = f"{platform.machine()}-linux-gnu"
    folders = [sysconfig.get_config_var("LIBDIR"), f"/lib/{triple}", f"/usr/lib/{triple}", "/lib64", "/usr/lib64",
               "/lib", "/usr/lib", "/usr/local/lib"]
    return [Path(folder) for folder in folders if folder and os.path.isdir(folder)]


def _open(path: Path) -> Optional[SharedObject]:
    try:
        return SharedObject(path)
    except (OSError, ValueError):             # a linker script, a library for another processor
        return None


def find_missing(mindspore: Path) -> Wanted:
    """Libraries and symbols that the plug-in and all it loads need and this machine lacks."""
    plugin = mindspore / "lib/plugin"
    own: Dict[str, Path] = {}
    for folder in (mindspore, mindspore / "lib", plugin, plugin / "ascend"):
        for path in sorted(folder.glob("*.so*")):
            own.setdefault(path.name, path)
    start = [own[name] for name in ROOTS if name in own] + sorted((plugin / "ascend").glob("*.so*"))
    root = SharedObject(start[0])
    loaded, system, missing = {}, {}, set()
    waiting = list(start)
    while waiting:
        path = waiting.pop()
        library = None if path in loaded else _open(path)
        if library is None or library.machine != root.machine:
            continue
        loaded[path] = library
        for name in library.needed:
            inside = next((folder / name for folder in library.search if (folder / name).is_file()), None)
            outside = next((folder / name for folder in _system_folders() if (folder / name).is_file()), None)
            if name in own:
                waiting.append(own[name])
            elif LEAVE_OUT.match(name):
                continue
            elif inside:
                waiting.append(inside)
            elif outside:
                system[name] = outside
            else:
                missing.add(name)

    offered: Set[str] = set()
    for library in [*loaded.values(), *filter(None, map(_open, system.values())),
                    *filter(None, (_open(path) for path in own.values() if path not in loaded))]:
        offered |= library.defined
    asked: Set[str] = set()
    for path, library in loaded.items():
        does_not_load = any(LEAVE_OUT.match(name) and not name.startswith("_c_") for name in library.needed)
        if plugin in path.parents and not does_not_load:
            asked |= library.undefined
            asked |= {text.decode() for text in library.constants() if LOOKED_UP.fullmatch(text)}
    asked = {name for name in asked - offered if not re.match("_?Py", name)}
    data = {name for name in asked if re.match("_ZT[VIST]", name)}       # C++ tables; codespell:ignore vist
    return Wanted(root.machine, sorted(missing), asked - data, data)


def cache_folder() -> Path:
    """Where stubs are cached: TELECHAT_SIM_CACHE, or telechat-ascend-sim in the user's cache folder."""
    given = os.environ.get("TELECHAT_SIM_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "telechat-ascend-sim"


def _write_stand_ins(wanted: Wanted, folder: Path) -> int:
    """Fill `folder`; returns the number of symbols."""
    code = Code(wanted.machine)
    symbols: Dict[str, Optional[bytes]] = dict.fromkeys(wanted.functions, code.zero())
    symbols.update(dict.fromkeys(wanted.data))
    symbols["aclrtGetSocName"] = code.text(SOC)
    symbols["aclrtGetDeviceCount"] = code.answer(CARDS_PER_HOST)
    symbols["aclrtGetRunMode"] = code.answer(1)                          # ACL_HOST
    # MindSpore asks where aclrtMalloc was loaded from and demands a path with "cann" in it. Before 2.7.2 it demands
    # "latest", opens libraries in lib64 below that, and looks for the folder opp_kernel next to ASCEND_OPP_PATH.
    libraries, package = folder / "latest/cann/lib64", folder / "latest/cann/python/hccl"
    libraries.mkdir(parents=True)
    package.mkdir(parents=True)
    (folder / "latest/lib64").symlink_to("cann/lib64")
    (folder / "latest/opp_kernel").mkdir()
    # One library holds all symbols and the others ask for it: whichever is opened, every name is found in it.
    holder = "libascendcl.so"
    for name in {holder, *wanted.libraries}:
        content = (write_library(name, symbols, wanted.machine) if name == holder
                   else write_library(name, {}, wanted.machine, [holder]))
        (libraries / name).write_bytes(content)
        (libraries / name).chmod(0o755)
    (package / "__init__.py").write_text('"""Stand-in for CANN\'s package of this name."""\n', encoding="utf-8")
    (package / "sys_version.py").write_text('__sys_version__ = "0.0"\n', encoding="utf-8")
    return len(symbols)


def _publish(work: Path, target: Path) -> None:
    """Give the complete folder `work` the name `target`, unless another process was quicker: its folder is in use."""
    try:
        os.replace(work, target)
    except OSError:
        if (target / "made.json").is_file():
            return
        shutil.rmtree(target, ignore_errors=True)                        # left over by something else
        os.replace(work, target)


def prepare() -> Path:
    """The folder of the stubs for the installed MindSpore, created if there is none yet. Raises SimulationError."""
    mindspore = mindspore_folder()
    plugin = mindspore / "lib/plugin" / ROOTS[0]
    facts = plugin.stat()
    key = hashlib.sha256(f"{RECIPE} {plugin} {facts.st_size} {facts.st_mtime_ns}".encode()).hexdigest()[:12]
    target = cache_folder() / f"mindspore-{mindspore_version()}-{key}"
    if (target / "made.json").is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix="making-", dir=target.parent))
    except OSError as err:
        raise SimulationError(f"the stub libraries cannot be written: {err}; name another folder in "
                              "TELECHAT_SIM_CACHE") from err
    try:
        wanted = find_missing(mindspore)
        symbols = _write_stand_ins(wanted, work)
        made = {"mindspore": mindspore_version(), "symbols": symbols, "libraries": wanted.libraries, "soc": SOC}
        (work / "made.json").write_text(json.dumps(made, indent=1), encoding="utf-8")
        _publish(work, target)
    except (OSError, ValueError) as err:
        raise SimulationError(f"the stub libraries could not be made: {err}") from err
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def environment(ranks: int = 1, rank: int = 0) -> Dict[str, str]:
    """Variables of a process that takes itself for `rank` of `ranks` cards; everything else is inherited."""
    folder = prepare()
    env = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    env.update(MS_SIMULATION_LEVEL="0", RANK_SIZE=str(ranks), RANK_ID=str(rank))

    def before(variable: str, *folders: Path) -> None:
        env[variable] = os.pathsep.join([*map(str, folders), *filter(None, [env.get(variable)])])

    before("LD_LIBRARY_PATH", folder / "latest/cann/lib64", mindspore_folder() / "lib/plugin/ascend")
    before("PYTHONPATH", folder / "latest/cann/python")
    env["ASCEND_OPP_PATH"] = str(folder / "latest/opp")
    return env


_LOAD = """
import mindspore as ms
from mindspore.communication import get_group_size, get_rank, init
ms.set_context(mode=ms.GRAPH_MODE, device_target="Ascend")
init()
print("LOADED", ms.__version__, ms.get_context("device_target"), get_group_size(), get_rank())
"""


def check() -> Tuple[bool, str]:
    """Whether the plug-in loads as rank 3 of 8, and what it said."""
    done = subprocess.run([sys.executable, "-c", _LOAD], env=environment(8, 3), capture_output=True, text=True,
                          check=False, timeout=300)
    line = next((line for line in done.stdout.splitlines() if line.startswith("LOADED")), "")
    return line.endswith("Ascend 8 3"), line or (done.stdout + done.stderr)[-2000:]


def main() -> int:
    """`check`, or `env RANKS RANK`; returns the exit code."""
    action, *numbers = sys.argv[1:] or [""]
    if (action, len(numbers)) not in (("check", 0), ("env", 2)) or not all(map(str.isdigit, numbers)):
        print("usage: runtime.py check | env RANKS RANK", file=sys.stderr)
        return 2
    try:
        if action == "check":
            loaded, said = check()
            print(said)
            return 0 if loaded else 1
        for name, value in sorted(environment(*map(int, numbers)).items()):
            if os.environ.get(name) != value:
                print(f"export {name}={shlex.quote(value)}")
    except SimulationError as err:
        print(f"error: {err}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
