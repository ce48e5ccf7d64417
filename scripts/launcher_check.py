"""Checks what can be checked before msrun_launcher.sh starts any process. Not for the parallel plan.

Looks at the command's first words, its script, its configuration and other input files, the devices of this machine,
and the scheduler's address and port. Each error is one line that says what to change; the exit code is 1 then. With
--split it tells the launcher how msrun has to be given the command.
"""
import argparse
import glob
import hashlib
import json
import os
import re
import shlex
import shutil
import socket
import sys
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional

ROOT = Path(__file__).resolve().parents[1]
INPUT_OPTIONS = ("config", "yaml_file", "register_path", "input_file")   # their values must be there already
MSRUN_PROGRAMS = ("python", "python3", "pytest")    # msrun starts these itself, and gives anything else to `python`
ASSIGNMENT = re.compile(r"""\s*[A-Za-z_]\w*=(?:[^\s'"\\]|'[^']*'|"(?:[^"\\]|\\.)*"|\\.)*(?=\s)""", re.DOTALL)


class Parts(NamedTuple):
    """A command as msrun has to be given it."""

    assignments: str          # `VAR=x ...` before the program, as text for the shell
    rest: str                 # the command from the program on, as text for the shell
    program: bool             # whether it begins with a program that msrun would give to `python` as a script


def split_command(command: str) -> List[str]:
    """The words of a shell command. Raises ValueError on an open quote, and where a marker lacks its quotes."""
    words = shlex.split(command)
    reader = shlex.shlex(command, posix=True, punctuation_chars="<")
    reader.whitespace_split = True
    if "<" in list(reader):
        raise ValueError("it has a '<' outside of quotes, which the shell takes for a file to read; write markers as "
                         "--predict_data '<_user>...<_bot>'")
    if not words:
        raise ValueError("it is empty")
    return words


def split_assignments(command: str) -> Parts:
    """Variables that are set before the program, the rest, and whether msrun cannot start the program itself.

    Raises ValueError where there is no program, or none that can be run.
    """
    if not command.strip():
        raise ValueError("it is empty")
    end = 0
    while True:
        match = ASSIGNMENT.match(command, end)
        if not match:
            break
        end = match.end()
    assignments, rest = command[:end].strip(), command[end:].strip()
    words = split_command(rest) if rest else []
    if not words or re.match(r"[A-Za-z_]\w*=", words[0]):
        raise ValueError("it sets variables and starts nothing; write `VAR=value python SCRIPT ...`")
    first = words[0]
    if first in MSRUN_PROGRAMS or first.startswith("-") or first.endswith(".py"):
        return Parts(assignments, rest, False)
    program = shutil.which(first)
    if program and is_program(Path(program)):
        return Parts(assignments, rest, True)
    if os.path.isfile(first):
        return Parts(assignments, rest, False)
    raise ValueError(f"it begins with {first!r}, which is neither a program nor a Python script here; begin it with "
                     "`python SCRIPT`, after `VAR=value` if variables are to be set")


def is_program(path: Path) -> bool:
    """Whether `path` is to be run as it is: an interpreter, a binary, or a script of another language than Python."""
    if re.fullmatch(r"python[\d.]*", path.name):
        return True
    with path.open("rb") as file:
        head = file.readline(200)
    return head.startswith(b"\x7fELF") or (head.startswith(b"#!") and b"python" not in head)


def set_variables(assignments: str) -> None:
    """Set the variables of `VAR=x ...` here, as far as they can be read without a shell: the checks look at some."""
    for word in shlex.split(assignments):
        name, _, value = word.partition("=")
        os.environ[name] = value


def options_of(words: List[str]) -> Dict[str, str]:
    """`--name value` and `--name=value` as a dict; the last one counts."""
    found = {}
    for word, following in zip(words, [*words[1:], ""]):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            found[name] = value if equals else following
    return found


def find_recipe(name: str) -> Optional[Path]:
    """The recipe that run_mindformer.py takes for --config `name`; None where it finds none."""
    folders = (Path.cwd(), ROOT, ROOT / "research", ROOT / "research/telechat")
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def recipe_digest(words: List[str]) -> Optional[str]:
    """The first 12 hex digits of the SHA-256 of the recipe with its bases; None where there is no readable recipe.

    All machines of a job must log the same ones.
    """
    path = find_recipe(options_of(words).get("config", ""))
    if path is None:
        return None
    sys.path.insert(0, str(ROOT))
    try:
        from research.telechat.recipe.read import read_recipe
        recipe = read_recipe(path.resolve())
    except (ImportError, ValueError):              # no yaml here, or an error that run_mindformer.py reports
        return None
    return hashlib.sha256(json.dumps(recipe, sort_keys=True, default=str).encode()).hexdigest()[:12]


def check_files(words: List[str]) -> List[str]:
    """A line for each file that the command names and that is not there."""
    faults = []
    script = next((word for word in words if word.endswith(".py")), None)
    if script and not os.path.isfile(script):
        faults.append(f"script not found: {script} (looked from {os.getcwd()}; start this in the repository's root)")
    for name, value in options_of(words).items():
        if name in INPUT_OPTIONS and not os.path.exists(value) and not (name == "config" and find_recipe(value)):
            fault = f"--{name} not found: {value} (looked from {os.getcwd()})"
            same = sorted(ROOT.glob(f"research/telechat/**/{Path(value).name}")) if Path(value).name else []
            faults.append(fault + (f"; do you mean {os.path.relpath(same[0])}?" if same else ""))
    return faults


def device_target(config: str, depth: int = 0) -> Optional[str]:
    """context.device_target of a recipe, or of the bases it names; None if unknown."""
    try:
        import yaml
        data = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    except (ImportError, OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    if not isinstance(data, dict) or depth > 8:
        return None
    context = data.get("context")
    if isinstance(context, dict) and isinstance(context.get("device_target"), str):
        return context["device_target"]
    bases = data.get("base_config") or []
    for base in reversed([bases] if isinstance(bases, str) else bases):
        target = device_target(str(Path(config).parent / str(base)), depth + 1)
        if target:
            return target
    return None


def count_devices() -> int:
    """Ascend cards that processes started here can see."""
    visible = os.environ.get("ASCEND_RT_VISIBLE_DEVICES")
    if visible is not None:
        return len([part for part in visible.split(",") if part.strip()])
    return len([path for path in glob.glob("/dev/davinci*") if re.fullmatch(r"/dev/davinci\d+", path)])


def check_devices(words: List[str], workers: int) -> List[str]:
    """Too few cards for `workers`. Says nothing for the CPU, and under MindSpore's simulation, which needs no card."""
    options = options_of(words)
    config = options.get("config") or options.get("yaml_file") or ""
    target = options.get("device_target") or device_target(config)
    devices = count_devices()
    if target != "Ascend" or devices >= workers or os.environ.get("MS_SIMULATION_LEVEL"):
        return []
    return [f"{workers} workers need {workers} Ascend cards on this machine, {devices} are visible; "
            f"name the number of workers after the command, or check ASCEND_RT_VISIBLE_DEVICES and npu-smi info"]


def check_port(port: int) -> List[str]:
    """A scheduler must be able to listen on `port`; 0 checks nothing."""
    if not port:
        return []
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("", port))
        except OSError as err:
            return [f"port {port} is not free ({err.strerror}), perhaps an earlier job still runs: stop it "
                    f"(`ss -ltnp 'sport = :{port}'` shows it), or pass another port with the 6-argument form"]
    return []


def check_master(address: str) -> List[str]:
    """The master's name must resolve, as msrun looks it up on every machine."""
    name = address.strip()
    name = name[1:-1] if name.startswith("[") and name.endswith("]") else name       # an IPv6 address in brackets
    try:
        socket.getaddrinfo(name, None, socket.AF_UNSPEC, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as err:
        return [f"MASTER_ADDR {address} cannot be resolved here ({getattr(err, 'strerror', None) or err}); give the "
                f"first machine's IP address, or enter the name in /etc/hosts of every machine"]
    return []


def is_local(address: str) -> bool:
    """Whether `address` belongs to this machine, so that msrun starts the scheduler here."""
    try:
        family, kind, _, _, where = socket.getaddrinfo(address.strip("[] "), 0, 0, socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as sock:
            sock.bind(where)
    except OSError:
        return False
    return True


def master_warnings(address: str, port: int, node_rank: int) -> List[str]:
    """What will go wrong later because of where the scheduler starts, which msrun tells by the address alone."""
    local = is_local(address)
    if node_rank and local:
        return [f"MASTER_ADDR {address} is this machine's own address, and NODE_RANK is {node_rank}: msrun starts a "
                f"scheduler here too. If one listens on port {port} already, it fails, and the job counts as failed "
                f"although the workers may end well; use one launcher per machine"]
    if not node_rank and not local:
        return [f"MASTER_ADDR {address} is not an address of this machine, and NODE_RANK is 0: msrun starts no "
                f"scheduler here, but on the machine that has this address"]
    return []


def main() -> int:
    """Print every error found; 1 if there is one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=1, help="worker processes on this machine")
    parser.add_argument("--port", type=int, default=0, help="port of the scheduler")
    parser.add_argument("--master", help="address of the machine with the scheduler; without it, this one")
    parser.add_argument("--node_rank", type=int, default=0, help="number of this machine")
    parser.add_argument("--split", action="store_true", help="only print the command in three parts, each ended by "
                        "a NUL: assignments, the rest, and 1 if msrun cannot start the program itself")
    parser.add_argument("command", help="the command to launch, as one string")
    args = parser.parse_args()
    try:
        parts = split_assignments(args.command)
        words = split_command(parts.rest)
    except ValueError as err:
        faults = [f"the command cannot be read: {err}"]
    else:
        if args.split:
            print(parts.assignments, parts.rest, int(parts.program), "", sep="\0", end="")
            return 0
        set_variables(parts.assignments)
        faults = check_files(words) + check_devices(words, args.workers)
        faults += check_master(args.master) if args.master else []
        if not faults and args.master:
            for warning in master_warnings(args.master, args.port, args.node_rank):
                print(f"[msrun_launcher] warning: {warning}.", file=sys.stderr)
        faults += check_port(args.port if args.node_rank == 0 else 0)
        digest = recipe_digest(words)
        if digest and not faults:
            print(f"recipe {options_of(words)['config']} with its bases: sha256 {digest}, the same on every machine")
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
