"""Fine-tune, evaluate or predict from a recipe, with the options of MindFormers' own run_mindformer.py.

    python run_mindformer.py --config research/telechat/finetune_telechat_7b.yaml --register_path research/telechat \
        --train_dataset DIR --load_checkpoint FILE

Reads the command line and the recipe; what then happens is in research/telechat/run/job.py. The command line is
checked before MindSpore is imported, so that a mistake costs no time.
"""
import argparse
import os
import sys
from pathlib import Path
from typing import List, Optional

ROOT = Path(__file__).resolve().parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from research.telechat.common.errors import ConfigError
from research.telechat.common.versions import fitting_versions
from research.telechat.recipe.read import parse_overrides, parse_value, read_recipe, resolve_config, str2bool


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
            from research.telechat.run.job import run
        run(args, recipe, overrides)
    except ConfigError as err:
        print(f"error: {err}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
