"""Options of run_mindformer.py, and the keys of a recipe that options of every command set.

A command line is read once: what it changes of the recipe is passed on as {dotted key: value}.
"""
import argparse
from typing import Callable, List, Optional

from research.telechat.common.files import JsonObject
from research.telechat.recipe.read import parse_overrides, parse_value

# option of a command -> key of the recipe
OPTION_KEYS = {
    "run_mode": "run_mode", "load_checkpoint": "load_checkpoint", "output_dir": "output_dir", "seed": "seed",
    "src_strategy_path_or_dir": "src_strategy_path_or_dir", "auto_trans_ckpt": "auto_trans_ckpt",
    "transform_process_num": "transform_process_num", "only_save_strategy": "only_save_strategy",
    "strategy_load_checkpoint": "parallel.strategy_ckpt_load_file", "resume_training": "resume_training",
    "use_parallel": "use_parallel", "mode": "context.mode", "device_id": "context.device_id",
    "device_target": "context.device_target", "do_eval": "do_eval", "profile": "profile",
    "remote_save_url": "remote_save_url", "epochs": "runner_config.epochs", "batch_size": "runner_config.batch_size",
    "gradient_accumulation_steps": "runner_config.gradient_accumulation_steps",
    "sink_mode": "runner_config.sink_mode", "train_dataset": "train_dataset.data_loader.dataset_dir",
    "eval_dataset": "eval_dataset.data_loader.dataset_dir", "num_samples": "train_dataset.data_loader.num_samples",
    "predict_batch_size": "predict_batch_size", "adapter_id": "adapter_id",
    "use_past": "model.model_config.use_past", "seq_length": "model.model_config.seq_length",
    "vocab_file": "processor.tokenizer.vocab_file", "checkpoint_meaning": "checkpoint_meaning",
    "checkpoint_conflict": "checkpoint_conflict",
}


def str2bool(text: str) -> bool:
    """'True' and 'False' as users write them."""
    value = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(text.lower())
    if value is None:
        raise argparse.ArgumentTypeError(f"expected True or False, found {text!r}")
    return value


def or_none(read: Callable[[str], object]) -> Callable[[str], object]:
    """`read` for an option whose value may be empty, as shell scripts pass what they do not set; None then."""
    def optional(text: str) -> object:
        return read(text) if text else None
    return optional


def add_checkpoint_options(parser: argparse.ArgumentParser) -> None:
    """What a checkpoint says against what the recipe says (run/published.py)."""
    meaning = parser.add_mutually_exclusive_group()
    meaning.add_argument("--as_published", dest="checkpoint_meaning", action="store_const", const="as_published",
                         help="TeleChat2 checkpoint without manifest: use the published settings")
    meaning.add_argument("--as_before", dest="checkpoint_meaning", action="store_const", const="as_before",
                         help="the same: use the settings of earlier versions of this plugin, for weights fine-tuned "
                              "with them")
    parser.add_argument("--checkpoint_conflict", choices=("stop", "recipe", "checkpoint"),
                        help="which wins if recipe and checkpoint contradict each other (default: stop)")


def add_sampling_options(parser: argparse.ArgumentParser, when: str = "") -> None:
    """Sampling settings. when: appended to the help of each option."""
    add = parser.add_argument
    add("--max_new_tokens", type=int, help=f"tokens of an answer{when}")
    add("--do_sample", type=str2bool, help=f"sample; False: take the likeliest token{when}")
    add("--temperature", type=float, help=f"sampling temperature{when}")
    add("--top_k", type=int, help=f"sample among the k likeliest tokens; 0: all{when}")
    add("--top_p", type=float, help=f"sample among the likeliest tokens with this total probability{when}")
    add("--repetition_penalty", type=float, help=f"above 1: tokens seen before become less likely{when}")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of run_mindformer.py but --config; those not given leave the recipe as it is."""
    add = parser.add_argument
    add("--register_path", help="folder of the plugin: research/telechat")
    add("--run_mode", choices=("train", "finetune", "eval", "predict"), help="what to do")
    add("--train_dataset", "--train_dataset_dir", dest="train_dataset", help="MindRecord file or folder to train on")
    add("--eval_dataset", "--eval_dataset_dir", dest="eval_dataset", help="MindRecord file or folder to evaluate on")
    add("--predict_data", nargs="+", help="question, raw prompt, or text file with one per line")
    add("--raw", type=str2bool, nargs="?", const=True, default=False,
        help="predict: pass plain text unchanged instead of formatting it with the model's template")
    add("--predict_batch_size", type=int, help="prompts answered together")
    add("--adapter_id", nargs="+", help="LoRA to predict with")
    add("--modal_type", nargs="+", help=argparse.SUPPRESS)
    add("--load_checkpoint", help="checkpoint file or folder")
    add_checkpoint_options(parser)
    add("--src_strategy_path_or_dir", help="strategy of a checkpoint that is already sharded")
    add("--auto_trans_ckpt", type=str2bool, help="shard a complete checkpoint for the parallel plan while loading")
    add("--transform_process_num", type=int, help="processes that shard the checkpoint")
    add("--only_save_strategy", type=str2bool, help="write the strategy files and stop")
    add("--strategy_load_checkpoint", help="strategy file to load")
    add("--resume_training", type=parse_value, help="True, or the name of the checkpoint to resume from")
    add("--output_dir", help="folder of logs, checkpoints and results")
    add("--seed", type=int, help="seed of initialisation and shuffling")
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


def build_parser() -> argparse.ArgumentParser:
    """The command line of run_mindformer.py."""
    parser = argparse.ArgumentParser(
        description="Fine-tune, evaluate or predict with TeleChat from a recipe.",
        epilog="Any key of the recipe can be set as well: --runner_config.epochs 3 "
               "--model.model_config.seq_length 1024, or --options a.b=value.")
    parser.add_argument("--config", required=True, help="recipe, e.g. research/telechat/finetune_telechat_7b.yaml")
    add_options(parser)
    return parser


def overrides_of(args: argparse.Namespace, only: Optional[List[str]] = None) -> JsonObject:
    """Keys of the recipe that the options in `args` set: those of `only`, else all in OPTION_KEYS that were given."""
    given = {OPTION_KEYS[name]: getattr(args, name, None) for name in only or OPTION_KEYS}
    return {key: value for key, value in given.items() if value is not None}


def all_overrides(args: argparse.Namespace, rest: List[str]) -> JsonObject:
    """Keys of the recipe that a command line of run_mindformer.py sets. Raises ConfigError."""
    return {**overrides_of(args), **parse_overrides(args.options, rest)}


def parse_further(words: List[str]) -> JsonObject:
    """Keys of the recipe from words that another command does not know itself: anything that run_mindformer.py takes.

    Raises ConfigError.
    """
    parser = argparse.ArgumentParser(add_help=False)
    add_options(parser)
    return all_overrides(*parser.parse_known_args(words))
