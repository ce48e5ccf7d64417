"""Training and fine-tuning by the options of the earlier TeleChat script; run_mindformer.py does the work.

    python research/telechat/run_telechat.py --config research/telechat/finetune_telechat_7b.yaml --run_mode finetune \
        --train_dataset DIR --load_checkpoint FILE --use_parallel True --auto_trans_ckpt True
"""
import argparse
import sys
from pathlib import Path
from typing import List, Optional

ROOT = Path(__file__).resolve().parents[3]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import run_mindformer

# earlier option -> option of run_mindformer.py, or key of the recipe
_OPTIONS = {
    "run_mode": "--run_mode", "use_parallel": "--use_parallel", "device_id": "--device_id", "mode": "--mode",
    "load_checkpoint": "--load_checkpoint", "src_strategy": "--src_strategy_path_or_dir",
    "auto_trans_ckpt": "--auto_trans_ckpt", "resume": "--resume_training", "train_dataset": "--train_dataset",
    "remote_save_url": "--remote_save_url", "seq_length": "--model.model_config.seq_length",
    "vocab_file": "--processor.tokenizer.vocab_file",
}


def build_parser() -> argparse.ArgumentParser:
    """The options of the earlier script, with its defaults."""
    parser = argparse.ArgumentParser(description="Train or fine-tune TeleChat (options of the earlier script).")
    add = parser.add_argument
    add("--task", default="text_generation", choices=("text_generation",), help="only text_generation exists")
    add("--config", required=True, help="recipe, e.g. research/telechat/finetune_telechat_7b.yaml")
    add("--run_mode", default="train", choices=("train", "finetune"), help="what to do")
    add("--seq_length", type=int, help="tokens per sequence")
    add("--use_parallel", default="True", help="run as one of several processes (msrun)")
    add("--device_id", type=int, help="card of a single process")
    add("--mode", type=int, choices=(0, 1), help="0: graph mode, 1: PyNative mode")
    add("--load_checkpoint", help="checkpoint file or folder")
    add("--src_strategy", help="strategy of a checkpoint that is cut already")
    add("--auto_trans_ckpt", help="cut a complete checkpoint for the parallel plan while loading")
    add("--resume", help="resume training")
    add("--train_dataset", help="MindRecord file or folder")
    add("--remote_save_url", help="where ModelArts uploads the results to")
    add("--vocab_file", help="tokenizer.model")
    return parser


def main(argv: Optional[List[str]] = None) -> int:
    """Translate the options and run; further words (`--key value`) go on as they are."""
    args, rest = build_parser().parse_known_args(argv)
    words = ["--config", args.config, "--register_path", str(Path(__file__).resolve().parent)]
    for option, target in _OPTIONS.items():
        value = getattr(args, option)
        if value not in (None, ""):
            words += [target, str(value)]
    return run_mindformer.main(words + rest)


if __name__ == "__main__":
    sys.exit(main())
