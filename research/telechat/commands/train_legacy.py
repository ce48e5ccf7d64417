"""Command: train or fine-tune with the options of the earlier TeleChat script, and those of run_mindformer.py.

    python research/telechat/run_telechat.py --config research/telechat/finetune_telechat_7b.yaml --run_mode finetune \
        --train_dataset DIR --load_checkpoint FILE --use_parallel True --auto_trans_ckpt True
"""
import argparse
from typing import List, Optional

from research.telechat.commands.run import start
from research.telechat.common.command import run_command
from research.telechat.common.environment import PLUGIN
from research.telechat.recipe.options import add_options, all_overrides, or_none, str2bool
from research.telechat.recipe.read import parse_value


def build_parser() -> argparse.ArgumentParser:
    """The options of run_mindformer.py, and over them those of the earlier script with its defaults."""
    parser = argparse.ArgumentParser(description="Train or fine-tune TeleChat (options of the earlier script).",
                                     conflict_handler="resolve")
    add_options(parser)
    add = parser.add_argument
    add("--task", default="text_generation", choices=("text_generation",), help="only text_generation exists")
    add("--config", required=True, help="recipe, e.g. research/telechat/finetune_telechat_7b.yaml")
    add("--run_mode", default="train", choices=("train", "finetune"), help="what to do")
    add("--seq_length", type=int, help="tokens per sequence")
    add("--use_parallel", type=or_none(str2bool), default=True, help="run as one of several processes (msrun)")
    add("--load_checkpoint", type=or_none(str), help="checkpoint file or folder")
    add("--src_strategy", dest="src_strategy_path_or_dir", type=or_none(str),
        help="strategy of a checkpoint that is already sharded")
    add("--auto_trans_ckpt", type=or_none(str2bool),
        help="shard a complete checkpoint for the parallel plan while loading")
    add("--resume", dest="resume_training", type=or_none(parse_value), help="resume training")
    add("--train_dataset", type=or_none(str), help="MindRecord file or folder")
    add("--remote_save_url", type=or_none(str), help="where ModelArts uploads the results to")
    add("--vocab_file", type=or_none(str), help="tokenizer.model")
    return parser


def main(argv: Optional[List[str]] = None) -> int:
    """Run; returns the exit code (common/command.py)."""
    def body() -> None:
        args, rest = build_parser().parse_known_args(argv)
        start(args.config, all_overrides(args, rest), args.register_path or str(PLUGIN), args.predict_data, args.raw)
    return run_command(body)
