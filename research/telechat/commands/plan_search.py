"""`plan --search`: the fastest plan of a model on a number of cards, as a table, a picture and a recipe."""
import argparse
from pathlib import Path
from typing import Callable

from research.telechat.common.errors import ConfigError
from research.telechat.common.files import JsonObject, write_json
from research.telechat.plan.plan import chip_faults, read_plan
from research.telechat.plan.search import MARGIN, search, search_prediction, sequences_of
from research.telechat.plan.search_report import (
    check_target,
    draw_search,
    prediction_table,
    search_json,
    search_table,
    write_recipe,
)
from research.telechat.plan.timing import step_time
from research.telechat.recipe.read import resolve_config
from research.telechat.spec.variants import get_variant


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that belong to --search."""
    add = parser.add_argument
    add("--search", action="store_true", help="find the fastest plan for --ranks cards, by estimated times")
    add("--model", help="instead of --config: the model whose fine-tuning recipe is searched, e.g. telechat2_115b")
    add("--global_batch", type=int, help="with --search: sequences of a step on all cards; default: the recipe's")
    add("--seq_length", type=int, help="with --search: tokens per sequence; default: the recipe's")
    add("--margin", type=float, default=MARGIN, help="with --search: fraction of max_device_memory to leave free")
    add("--write_recipe", type=Path, metavar="FILE",
        help="with --search: recipe of the best plan; default: finetune_MODEL_N_cards.yaml here")


def recipe_of(model: str) -> str:
    """The fine-tuning recipe of a model. Raises ConfigError for an unknown one."""
    get_variant(model)
    return f"research/telechat/finetune_{model}.yaml"


def run_search(recipe: JsonObject, args: argparse.Namespace) -> int:
    """Search, print, write; returns the exit code. Raises ConfigError."""
    from tqdm import tqdm
    if not args.ranks or args.ranks < 1:
        raise ConfigError("--search needs the number of cards: pass --cards N")
    if not 0 <= args.margin < 1:
        raise ConfigError(f"--margin: expected a share of at least 0, below 1, found {args.margin:g}")
    if args.seq_length:
        recipe["model"]["model_config"]["seq_length"] = args.seq_length
    start = read_plan(recipe)
    if chip_faults(start):
        raise ConfigError(chip_faults(start)[0])
    if not start.training:
        for option in ("global_batch", "write_recipe", "picture", "json"):
            if getattr(args, option):
                raise ConfigError(f"--{option}: belongs to the search for plans of training, and {args.config} is for "
                                  "prediction; leave it out")
        print(prediction_table(search_prediction(recipe, args.ranks, args.margin)))
        return 0
    sequences = args.global_batch or sequences_of(recipe)
    if sequences < 1:
        raise ConfigError(f"--global_batch: expected at least 1 sequence, found {sequences}")
    source = resolve_config(args.config)
    path = args.write_recipe or Path(f"finetune_{start.model.net_name or 'model'}_{args.ranks}_cards.yaml")
    check_target(source, path)
    with tqdm(total=None, desc="searching", unit="plan", disable=None, leave=False) as bar:
        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)
        found = search(recipe, args.ranks, sequences, args.margin, progress=progress)
    print(f"{start.model.net_name or 'model'} on {args.ranks} cards ({start.chip.name}), {start.model.seq_length:,} "
          f"tokens per sequence, {sequences} sequences per step:\n")
    print(search_table(found, step_time(start)))
    write_recipe(found[0], recipe, source, path)
    print(f"the first as a recipe: {path}")
    if args.json:
        write_json(args.json, search_json(found, step_time(start)))
    if args.picture:
        _drawn(lambda: draw_search(found, args.picture), args.picture)
    return 0


def _drawn(draw: Callable[[], None], path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draw()
    except (OSError, ValueError) as err:
        raise ConfigError(f"--picture {path} cannot be drawn: {err}; name a .png file elsewhere") from err
    print(f"time and memory of all: {path}")
