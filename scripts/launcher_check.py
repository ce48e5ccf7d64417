"""Checks what can be checked before msrun_launcher.sh starts any process. Not for the parallel plan.

Looks at the command's script, its configuration and other input files, the devices of this machine and the scheduler's
port. Each fault is one line that says what to change; the exit code is 1 then.
"""
import argparse
import glob
import hashlib
import json
import os
import re
import shlex
import socket
import sys
from pathlib import Path
from typing import Dict, List, Optional

ROOT = Path(__file__).resolve().parents[1]
INPUT_OPTIONS = ("config", "yaml_file", "register_path", "input_file")   # their values must be there already


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
    except (ImportError, ValueError):              # no yaml here, or a fault that run_mindformer.py names
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
    """context.device_target of a recipe, or of the bases it names; None where that cannot be told."""
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
                    f"(`ss -ltnp 'sport = :{port}'` shows which), or name another port with the 6-argument form"]
    return []


def main() -> int:
    """Print every fault found; 1 if there is one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, required=True, help="worker processes on this machine")
    parser.add_argument("--port", type=int, default=0, help="port of the scheduler; 0: not on this machine")
    parser.add_argument("command", help="the command to launch, as one string")
    args = parser.parse_args()
    try:
        words = split_command(args.command)
    except ValueError as err:
        faults = [f"the command cannot be read: {err}"]
    else:
        faults = check_files(words) + check_devices(words, args.workers) + check_port(args.port)
        digest = recipe_digest(words)
        if digest and not faults:
            print(f"recipe {options_of(words)['config']} with its bases: sha256 {digest}, the same on every machine")
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
