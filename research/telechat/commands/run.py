"""Command: fine-tune, evaluate or predict from a recipe, with the options of MindFormers' own run_mindformer.py.

    python run_mindformer.py --config research/telechat/finetune_telechat_7b.yaml --register_path research/telechat \
        --train_dataset DIR --load_checkpoint FILE

The command line is checked before MindSpore is imported, so that a mistake costs no time.
"""
from typing import List, Optional, Sequence

from research.telechat.common.command import leave, run_command
from research.telechat.common.environment import workers
from research.telechat.common.files import JsonObject, prepare_log
from research.telechat.common.versions import fitting_versions
from research.telechat.native import build
from research.telechat.recipe.options import all_overrides, build_parser
from research.telechat.recipe.read import check_overrides, read_recipe, resolve_config

_modes: List[str] = []                       # what this process has run


def start(config: str, overrides: JsonObject, register_path: Optional[str] = None,
          predict_data: Optional[List[str]] = None, raw: bool = False) -> None:
    """Read the recipe `config`, import MindFormers and run; arguments as of run/job.py's `run`. Raises ConfigError."""
    recipe = read_recipe(resolve_config(config))
    check_overrides(recipe, overrides)
    prepare_log(overrides.get("output_dir") or recipe.get("output_dir"))
    if (overrides.get("context.device_target") or recipe.get("context", {}).get("device_target")) == "CPU":
        build.begin()                        # while MindSpore is imported
    with fitting_versions():
        from research.telechat.run.job import run
    run(recipe, overrides, register_path, predict_data, raw)
    _modes.append(str(overrides.get("run_mode") or recipe.get("run_mode")))


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run; returns the exit code (common/command.py)."""
    def body() -> None:
        args, rest = build_parser().parse_known_args(argv)
        start(args.config, all_overrides(args, rest), args.register_path, args.predict_data, args.raw)
    return run_command(body)


def program(argv: Optional[Sequence[str]] = None) -> int:
    """`main` as the whole of a program, which it ends at once where that loses nothing: after predictions of one
    process, if no device has to be released."""
    code = main(argv)
    if _modes == ["predict"] and workers() == 1:
        from research.telechat.bridge.compat import nothing_to_release
        if nothing_to_release():
            leave(code)
    return code
