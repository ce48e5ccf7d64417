"""Fine-tune, evaluate or predict from a recipe, with the options of MindFormers' own run_mindformer.py.

    python run_mindformer.py --config research/telechat/finetune_telechat_7b.yaml --register_path research/telechat \
        --train_dataset DIR --load_checkpoint FILE

Reads the command line and the recipe; what then happens is in research/telechat/telechat_run.py. The command line is
checked before MindSpore is imported, so that a mistake costs no time.
"""
import argparse
import os
import sys
from pathlib import Path
from typing import Any, List, Optional

ROOT = Path(__file__).resolve().parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import yaml

from research.telechat.telechat_variants import ConfigError
from research.telechat.telechat_versions import fitting_versions


def str2bool(text: str) -> bool:
    """'True' and 'False' as users write them."""
    value = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(text.lower())
    if value is None:
        raise argparse.ArgumentTypeError(f"expected True or False, found {text!r}")
    return value


def parse_value(text: str) -> Any:
    """A value from the command line, read as YAML: numbers, True, False, lists; anything else is text."""
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):      # ValueError: a date that does not exist
        return text
    if isinstance(value, str):
        try:
            return float(value)          # YAML 1.1 reads 1e-5 as text
        except ValueError:
            return value
    return value


def resolve_config(name: str) -> Path:
    """The recipe `name`: a path from here, from the repository, or from its folder research."""
    for folder in (Path.cwd(), ROOT, ROOT / "research"):
        path = folder / name
        if path.is_file():
            return path.resolve()
    raise ConfigError(f"--config: {name} does not exist (looked in {Path.cwd()}, {ROOT} and {ROOT / 'research'})")


def merge(base: dict, over: dict) -> dict:
    """`base` with the keys of `over`: sections merge key by key, everything else is replaced."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def read_recipe(path: Path, above: tuple = ()) -> dict:
    """A recipe merged over the recipes it names as `base_config`, later ones over earlier ones.

    ConfigError says which file is at fault, and where.
    """
    if path in above:
        raise ConfigError(f"recipe {path} inherits itself: {' -> '.join(file.name for file in (*above, path))}")
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"recipe {path} cannot be read: {err}") from err
    except (yaml.YAMLError, ValueError, RecursionError) as err:
        raise ConfigError(f"recipe {path} is not valid YAML: {' '.join(str(err).split())}") from err
    if not isinstance(recipe, dict):
        raise ConfigError(f"recipe {path} must hold keys and values, found {type(recipe).__name__}")
    bases = recipe.pop("base_config", None) or []
    merged: dict = {}
    for base in bases if isinstance(bases, list) else [bases]:
        base_path = (path.parent / str(base)).resolve()
        if not base_path.is_file():
            raise ConfigError(f"recipe {path}: base_config {base} does not exist (looked for {base_path})")
        merged = merge(merged, read_recipe(base_path, (*above, path)))
    return merge(merged, recipe)


def build_parser() -> argparse.ArgumentParser:
    """All options; those not given leave the recipe as it is."""
    parser = argparse.ArgumentParser(
        description="Fine-tune, evaluate or predict with TeleChat from a recipe.",
        epilog="Any key of the recipe can be set as well: --runner_config.epochs 3 "
               "--model.model_config.seq_length 1024, or --options a.b=value.")
    add = parser.add_argument
    add("--config", required=True, help="recipe, e.g. research/telechat/finetune_telechat_7b.yaml")
    add("--register_path", help="folder of the plugin: research/telechat")
    add("--run_mode", choices=("train", "finetune", "eval", "predict"), help="what to do")
    add("--train_dataset", "--train_dataset_dir", dest="train_dataset", help="MindRecord file or folder to train on")
    add("--eval_dataset", "--eval_dataset_dir", dest="eval_dataset", help="MindRecord file or folder to evaluate on")
    add("--predict_data", nargs="+", help="question, raw prompt, or text file with one per line")
    add("--raw", type=str2bool, nargs="?", const=True, default=False,
        help="predict: leave plain text as it is instead of writing it as the model's template demands")
    add("--predict_batch_size", type=int, help="prompts answered together")
    add("--adapter_id", nargs="+", help="LoRA to predict with")
    add("--modal_type", nargs="+", help=argparse.SUPPRESS)
    add("--load_checkpoint", help="checkpoint file or folder")
    add("--src_strategy_path_or_dir", help="strategy of a checkpoint that is cut already")
    add("--auto_trans_ckpt", type=str2bool, help="cut a complete checkpoint for the parallel plan while loading")
    add("--transform_process_num", type=int, help="processes that cut the checkpoint")
    add("--only_save_strategy", type=str2bool, help="write the strategy files and stop")
    add("--strategy_load_checkpoint", help="strategy file to load")
    add("--resume_training", type=parse_value, help="True, or the name of the checkpoint to resume from")
    add("--output_dir", help="folder of logs, checkpoints and results")
    add("--seed", type=int, help="of initialisation and shuffling")
    add("--use_parallel", type=str2bool, help="run as one of several processes (msrun)")
    add("--mode", type=int, choices=(0, 1), help="0: graph mode, 1: PyNative mode")
    add("--device_id", type=int, help="card of a single process")
    add("--device_target", choices=("Ascend", "CPU"), help="where to compute")
    add("--do_eval", type=str2bool, help="evaluate while training")
    add("--epochs", type=int, help="passes over the data")
    add("--batch_size", type=int, help="sequences per step and data-parallel rank")
    add("--gradient_accumulation_steps", type=int, help="micro-steps per optimizer step")
    add("--sink_mode", type=str2bool, help="run steps on the device without returning to Python")
    add("--num_samples", type=int, help="records to use of the data set")
    add("--profile", type=str2bool, help="record a profile")
    add("--remote_save_url", help="where ModelArts uploads the results to")
    add("--options", nargs="+", default=[], metavar="KEY=VALUE", help="keys of the recipe to set")
    return parser


def parse_overrides(options: List[str], rest: List[str]) -> List[tuple]:
    """(dotted key, value) pairs from `--options a.b=c` and from `--a.b c` or `--a.b=c`."""
    pairs = []
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise ConfigError(f"--options: expected KEY=VALUE, found {option!r}")
        pairs.append((key, parse_value(value)))
    words = list(rest)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"unexpected word {word!r} on the command line; keys of the recipe start with --")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not words:
                raise ConfigError(f"option --{key} needs a value")
            value = words.pop(0)
        pairs.append((key, parse_value(value)))
    return pairs


def main(argv: Optional[List[str]] = None) -> int:
    """Run; returns the exit code. A fault of the user's making is one line on stderr and exit code 1."""
    args, rest = build_parser().parse_known_args(argv)
    try:
        path = resolve_config(args.config)
        recipe = read_recipe(path)
        overrides = parse_overrides(args.options, rest)
        output_dir = args.output_dir or recipe.get("output_dir") or "./output"
        os.environ.setdefault("LOG_MF_PATH", os.path.join(os.path.abspath(str(output_dir)), "log"))
        with fitting_versions():
            from research.telechat.telechat_run import run
        run(args, recipe, overrides)
    except ConfigError as err:
        print(f"error: {err}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
