"""Command: MindSpore checkpoint -> official (Hugging Face) folder that the official PyTorch code loads.

    python research/telechat/convert_weight_ms_to_torch.py --mindspore_path IN.ckpt --torch_path DIR \
        --model_name telechat_12b

See docs/conversion.md.
"""
import argparse
import sys
from pathlib import Path
from typing import Optional, Sequence

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from research.telechat.checkpoint.convert import open_source
from research.telechat.checkpoint.folder import open_mindspore
from research.telechat.commands.convert import (
    add_options,
    run_command,
    run_conversion,
    sizes_for,
    sizes_from_shapes,
)


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(description="Convert a MindSpore TeleChat checkpoint to the official format.")
    parser.add_argument("--mindspore_path", type=Path, required=True, metavar="IN",
                        help="a .ckpt or .safetensors file, or a folder with shards")
    parser.add_argument("--torch_path", type=Path, required=True, metavar="DIR",
                        help="folder for weights and config.json, or one .safetensors or .bin file")
    parser.add_argument("--format", choices=["safetensors", "bin"], default="safetensors",
                        help="files in the folder (default: safetensors; bin needs PyTorch)")
    add_options(parser)
    return parser


def convert(args: argparse.Namespace) -> None:
    """Run the command. Raises CheckpointError, ConfigError or OSError."""
    path = args.mindspore_path
    folder = path if path.is_dir() else path.parent
    checkpoint = open_mindspore(path)
    try:
        sizes = sizes_for(args, folder) or sizes_from_shapes(args, checkpoint, folder)
        source = open_source(checkpoint, sizes.variant, False, args.source_mp)
        run_conversion(args, source, sizes, args.torch_path, official=True)
    finally:
        checkpoint.close()


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Entry point; the exit code."""
    return run_command(convert, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
