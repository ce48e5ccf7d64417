"""Plan a training or prediction job before you book a cluster: check it, estimate its cost, compile it.

    python scripts/plan.py --config research/telechat/finetune_telechat2_115b.yaml --ranks 64
    python scripts/plan.py --config ... --ranks 64 --rank 63 --compile       # by MindSpore's own compiler, minutes
    python scripts/plan.py --config ... --ranks 64 --check                   # errors only
    python scripts/plan.py --command "python run_mindformer.py ..." --ranks 64 --check         # for launchers
    python scripts/plan.py --config ... --ranks 64 --parallel_config.micro_batch_num 32 --picture plan.png
    python scripts/plan.py --search --model telechat2_115b --cards 64 --picture plans.png      # the fastest plan
    python scripts/plan.py --config ... --ranks 8 --execute                  # computes a small model, compares it

Keys of the recipe are set as in run_mindformer.py. The exit code is 1 if the plan cannot run, or computes
something else than one rank. No NPU is needed: graphs are compiled for Ascend and executed in NumPy, and activations
are estimated (docs/parallel.md).
"""
import argparse
import copy
import json
import shlex
import sys
from pathlib import Path
from typing import List, Optional, Tuple

from research.telechat.commands import plan_execute, plan_search
from research.telechat.commands.help_text import HelpFormatter
from research.telechat.common.command import run_command
from research.telechat.common.errors import ConfigError
from research.telechat.common.files import JsonObject, read_json_object, refuse_foreign, write_text
from research.telechat.common.picture import is_ours
from research.telechat.common.table import table
from research.telechat.plan.cost import cost_of
from research.telechat.plan.plan import PLANNED_FOR, Plan, find_faults, read_plan, usable_gb
from research.telechat.plan.report import as_json, compared, draw, text
from research.telechat.recipe.legacy import translate
from research.telechat.recipe.options import all_overrides
from research.telechat.recipe.options import build_parser as build_run_parser
from research.telechat.recipe.read import parse_overrides, read_recipe, resolve_config, set_key
from research.telechat.spec.flops import DEVICES

LIMIT = "context.max_device_memory"


def build_parser() -> argparse.ArgumentParser:
    """All options."""
    parser = argparse.ArgumentParser(
        formatter_class=HelpFormatter,
        description=__doc__.splitlines()[0],
        epilog="Any key of the recipe can be set as well: --parallel_config.model_parallel 8")
    add = parser.add_argument
    add("--config", help="recipe")
    add("--command", help="instead of --config: the command to check; checked if it is run_mindformer.py's")
    add("--ranks", "--cards", type=int, help="cards of the job; default: those of the recipe")
    add("--device", choices=DEVICES, help="hardware to plan for (docs/cluster.md); default: A2, Atlas 800T A2")
    add("--rank", type=int, default=0, help="card whose communication is shown, and which is compiled")
    add("--check", action="store_true", help="only check for errors; prints nothing if there are none")
    add("--compile", action="store_true", help="compile for Ascend with a simulated runtime, and compare")
    add("--layers", type=int, help="plan and compile with this number of decoder layers; one per stage is quick")
    add("--micro_batches", type=int, help="plan and compile with this number of micro-batches")
    add("--mfu", type=float, default=0.4, help="model FLOPs utilisation assumed for tokens per second")
    add("--json", type=Path, help="file to write all figures to")
    add("--picture", type=Path, help="PNG file for a plot of the memory per stage")
    add("--overwrite", action="store_true", help="let --json and --picture replace files that plan did not write")
    add("--keep", type=Path, help="with --compile: folder that keeps log, graph and strategy files")
    add("--timeout", type=float, default=3600, help="with --compile and --execute: seconds for one rank")
    plan_execute.add_options(parser)
    plan_search.add_options(parser)
    add("--options", nargs="+", default=[], metavar="KEY=VALUE", help="keys of the recipe to set")
    return parser


def complete_recipe(args: argparse.Namespace, overrides: JsonObject) -> JsonObject:
    """The recipe with everything from the command line. Raises ConfigError."""
    recipe = copy.deepcopy(read_recipe(resolve_config(args.config)))
    overrides = dict(overrides)
    if args.layers:
        overrides = {**overrides, "model.model_config.num_layers": args.layers, "model.model_config.offset": 0}
    if args.micro_batches:
        overrides = {**overrides, "parallel_config.micro_batch_num": args.micro_batches}
    if args.device:
        recipe[PLANNED_FOR] = args.device
        overrides.setdefault(LIMIT, f"{usable_gb(DEVICES[args.device])}GB")
    for dotted, value in overrides.items():
        set_key(recipe, dotted, value)
    translate(recipe)                    # keys of earlier recipes; run_mindformer.py says what it changes
    return recipe


def read_command(command: str) -> Optional[Tuple[str, JsonObject]]:
    """Recipe and overrides of a run_mindformer.py command; None for another command. Raises ConfigError."""
    words = shlex.split(command)
    script = next((number for number, word in enumerate(words) if Path(word).name == "run_mindformer.py"), None)
    if script is None:
        return None
    try:
        args, rest = build_run_parser().parse_known_args(words[script + 1:])
    except SystemExit:
        raise ConfigError(f"run_mindformer.py does not take this command (the reason is above): {command}") from None
    return args.config, all_overrides(args, rest)


def check_outputs(args: argparse.Namespace) -> None:
    """Refuse up front to overwrite files that this command did not write. Raises ConfigError."""
    if args.picture and args.picture.suffix.lower() != ".png":
        raise ConfigError(f"--picture: expected the name of a .png file, found {args.picture}")
    refuse_foreign([args.json] if args.json else [], is_plan, args.overwrite)
    refuse_foreign([args.picture] if args.picture else [], is_ours, args.overwrite)


def is_plan(path: Path) -> bool:
    """Whether a file is one that --json has written."""
    try:
        found = read_json_object(path, "plan")
    except ConfigError:
        return False
    return "ranks" in found and ("stages" in found or "plans" in found or {"plan", "fault"} <= set(found))


def write(path: Path, content: str) -> None:
    """Write a text file atomically. Raises ConfigError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, content)
    except OSError as err:
        raise ConfigError(f"{path} cannot be written: {err}; name another file") from err


def compile_and_compare(plan: Plan, recipe: JsonObject, args: argparse.Namespace) -> JsonObject:
    """Compile, print the graph's figures next to the arithmetic; returns the report."""
    from tqdm import tqdm

    from research.telechat.ascend_sim.account import Mesh
    from research.telechat.ascend_sim.compile import compile_plan
    doing = f"compiling rank {args.rank} of {plan.ranks}"
    with tqdm(total=None, desc=doing, bar_format="{desc}: {elapsed}", disable=None, leave=False) as bar:
        report = compile_plan(recipe, Mesh(plan.pp, plan.dp, plan.cp, plan.mp), args.rank,
                              plan.model.seq_length + 1, args.keep, args.timeout, lambda _: bar.refresh())
    if not report["ok"]:
        for line in report["details"] or report["error"].splitlines()[:12]:
            print(line)
        raise ConfigError(f"the plan does not compile (mindspore {report.get('versions', {}).get('mindspore', '?')}); "
                          f"the compiler's message begins: {report['error'].splitlines()[0][:300]}; all of them: "
                          f"{report['folder']}/worker.log")
    cost = cost_of(plan, args.rank)
    print(f"\nCompiled by mindspore {report['versions']['mindspore']} in {report['seconds']['compile']:.0f} s "
          f"({report['compiler_memory_mb'] / 1000:.1f} GB).")
    for name, graph in report["graphs"].items():
        print(f"\nGraph {name}: {graph['nodes']} operators; " + ", ".join(
            f"{operator} {sum(phases.values())}" for operator, phases in graph["operators"].items()))
        communication = graph["communication"]
        print("sent in MB by phase: " + ", ".join(f"{phase} {size / 1e6:.2f}"
                                                  for phase, size in communication["by_phase"].items()))
        rows = [["MB", "times", "operator", "over", "phase", "for", "place"]]
        rows += [[place["bytes"] / 1e6, place["calls"], place["operator"], place["axes"], place["phase"],
                  place["purpose"], place["place"] or "-"] for place in communication["places"][:12]]
        if len(rows) > 1:
            print(table(rows))
        print("\n" + table([["MB", "arithmetic", "compiled", "difference"],
                            *compared(cost, {**graph, "name": name})]))
    return report


def run(args: argparse.Namespace, rest: List[str]) -> int:
    """Carry out the command; returns the exit code. Raises ConfigError."""
    overrides = parse_overrides(args.options, rest)
    if args.command:
        found = read_command(args.command)
        if found is None:
            return 0
        args.config, overrides = found[0], {**found[1], **overrides}
    if args.model and not args.config:
        args.config = plan_search.recipe_of(args.model)
    if not args.config:
        raise ConfigError("--config is missing; name the recipe to plan, e.g. "
                          "research/telechat/finetune_telechat2_115b.yaml")
    check_outputs(args)
    if not 0 < args.mfu <= 1:
        raise ConfigError(f"--mfu: expected a fraction above 0, at most 1, found {args.mfu:g}")
    recipe = complete_recipe(args, overrides)
    if args.search:
        return plan_search.run_search(recipe, args)
    if args.execute:
        recipe.pop(PLANNED_FOR, None)
        result = plan_execute.execute_plan(recipe, args)
        if args.json:
            write(args.json, json.dumps(result, indent=1) + "\n")
        return 1 if result["fault"] else 0
    plan = read_plan(recipe)
    faults = find_faults(plan, args.ranks)
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    if not 0 <= args.rank < plan.ranks:
        raise ConfigError(f"--rank {args.rank}: the plan has the ranks 0 to {plan.ranks - 1}")
    if faults or args.check:
        return 1 if faults else 0
    print(text(plan, args.rank, args.mfu))
    result = as_json(plan, args.rank, args.mfu)
    if args.compile:
        recipe.pop(PLANNED_FOR, None)
        result["compiled"] = compile_and_compare(plan, recipe, args)
    if args.json:
        write(args.json, json.dumps(result, indent=1) + "\n")
    if args.picture:
        try:
            args.picture.parent.mkdir(parents=True, exist_ok=True)
            draw(plan, args.picture)
        except (OSError, ValueError) as err:
            raise ConfigError(f"--picture {args.picture} cannot be drawn: {err}; name a .png file elsewhere") from err
    return 0


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command; returns the exit code (common/command.py)."""
    return run_command(lambda: run(*build_parser().parse_known_args(argv)))
