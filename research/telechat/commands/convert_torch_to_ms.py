"""Command: official (PyTorch) checkpoint -> MindSpore checkpoint, for every model of the family.

    python research/telechat/convert_weight_torch_to_ms.py --torch_path DIR --mindspore_path OUT.ckpt \
        --model_name telechat_12b

Also imports 52B checkpoints of earlier MindFormers converters (--from_mindspore, --source_mp). See docs/conversion.md.
"""
import argparse
import sys
from pathlib import Path
from typing import Optional, Sequence

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from research.telechat.checkpoint.convert import open_source
from research.telechat.checkpoint.folder import open_mindspore, open_official
from research.telechat.commands.convert import (
    add_options,
    run_command,
    run_conversion,
    sizes_for,
    sizes_from_shapes,
    sizes_from_table,
)
from research.telechat.common.errors import CheckpointError


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(description="Convert an official TeleChat checkpoint to MindSpore.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--torch_path", type=Path, metavar="DIR",
                        help="official folder (safetensors or .bin), or one such file")
    source.add_argument("--from_mindspore", type=Path, metavar="IN",
                        help="instead: a MindSpore checkpoint, to be written anew in this project's order, another "
                             "type or another format")
    parser.add_argument("--mindspore_path", type=Path, required=True, metavar="OUT",
                        help="OUT.ckpt, OUT.safetensors, or a folder")
    parser.add_argument("--format", choices=["ckpt", "safetensors"], default="ckpt",
                        help="in a folder: mindspore.ckpt (default), or safetensors in shards with an index")
    parser.add_argument("--source_format", choices=["auto", "safetensors", "bin"], default="auto",
                        help="which files of --torch_path to read (default: safetensors where there are any)")
    add_options(parser)
    return parser


def convert(args: argparse.Namespace) -> None:
    """Run the command. Raises CheckpointError, ConfigError or OSError."""
    path = args.torch_path or args.from_mindspore
    folder = path if path.is_dir() else path.parent
    if args.torch_path is not None and args.source_mp is not None:
        raise CheckpointError("--source_mp belongs to --from_mindspore; official checkpoints know no such degree")
    checkpoint = (open_official(path, args.source_format) if args.torch_path is not None
                  else open_mindspore(path, "--from_mindspore"))
    try:
        sizes = sizes_for(args, folder)
        if sizes is None:
            sizes = (sizes_from_table(args, folder) if args.torch_path is not None
                     else sizes_from_shapes(args, checkpoint, folder))
        source = open_source(checkpoint, sizes.variant, args.torch_path is not None, args.source_mp)
        run_conversion(args, source, sizes, args.mindspore_path, official=False)
    finally:
        checkpoint.close()


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Entry point; the exit code."""
    return run_command(convert, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
