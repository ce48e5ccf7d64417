"""Command: LoRA adapters between this project's checkpoints and the folders of Hugging Face PEFT.

    python scripts/convert_lora.py export --adapter X.ckpt --peft_dir DIR --model_name telechat_12b
    python scripts/convert_lora.py import --peft_dir DIR --adapter X.ckpt --model_name telechat_12b

Rows of 52B's fused weights change their order as the weights do. Adding an adapter to weights is merge_lora.py.
"""
import argparse
import json
from pathlib import Path
from typing import Optional, Sequence

from research.telechat.checkpoint.lora import (
    CONFIG_NAME,
    PEFT_NAMES,
    from_peft,
    mindspore_tensors,
    read_adapter,
    read_adapter_config,
    read_float32,
    to_peft,
)
from research.telechat.checkpoint.reader import open_safetensors
from research.telechat.checkpoint.writer import OutTensor, new_file
from research.telechat.common.command import run_command
from research.telechat.common.errors import CheckpointError, ConfigError
from research.telechat.common.files import write_text
from research.telechat.spec.variants import VARIANTS, Variant, get_variant, read_hf_config, variant_from_hf


def find_variant(args: argparse.Namespace) -> Variant:
    """Sizes from --config, else from the table."""
    if args.config is not None:
        return variant_from_hf(read_hf_config(args.config), args.model_name)
    if args.model_name is None:
        raise ConfigError("--model_name or --config is needed: the model that the adapter belongs to")
    return get_variant(args.model_name)


def write_tensors(path: Path, tensors: dict, metadata: dict) -> None:
    """A complete .ckpt or .safetensors file of float32 `tensors`, or none."""
    outs = [OutTensor(name, "F32", value.shape) for name, value in tensors.items()]
    with new_file(path, outs, metadata) as file:
        for name, value in tensors.items():
            file.write(name, 0, memoryview(value.astype("<f4", copy=False).tobytes()))


def export_adapter(args: argparse.Namespace) -> None:
    """MindSpore -> PEFT."""
    adapter = read_adapter(args.adapter, args.lora_alpha, args.adapter_strategy)
    tensors, config = to_peft(adapter, find_variant(args), args.adapter)
    write_tensors(args.peft_dir / PEFT_NAMES[0], tensors, {"format": "pt"})
    write_text(args.peft_dir / CONFIG_NAME, json.dumps(config, indent=2) + "\n")
    print(f"{args.peft_dir}: {len(tensors) // 2} adapted layers, rank {config['r']}, lora_alpha {config['lora_alpha']}")


def import_adapter(args: argparse.Namespace) -> None:
    """PEFT -> MindSpore."""
    config = read_adapter_config(args.peft_dir / CONFIG_NAME)
    path = args.peft_dir / PEFT_NAMES[0]
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; an adapter in another format must first be saved as safetensors")
    checkpoint = open_safetensors([path])
    try:
        tensors = {name: read_float32(checkpoint, name) for name in checkpoint.tensors}
    finally:
        checkpoint.close()
    adapter = from_peft(tensors, args.lora_alpha or config["lora_alpha"], find_variant(args), path)
    write_tensors(args.adapter, mindspore_tensors(adapter), {"format": "ms"})
    write_text(args.adapter.parent / CONFIG_NAME, json.dumps(
        {"peft_type": "LORA", "r": adapter.rank, "lora_alpha": adapter.alpha}, indent=2) + "\n")
    print(f"{args.adapter}: {len(adapter.pairs)} adapted layers, rank {adapter.rank}, lora_alpha {adapter.alpha:g}")


def build_parser() -> argparse.ArgumentParser:
    """All options."""
    parser = argparse.ArgumentParser(description="Convert LoRA adapters to and from Hugging Face PEFT.")
    parser.add_argument("direction", choices=("export", "import"), help="export: to PEFT; import: from PEFT")
    parser.add_argument("--adapter", type=Path, required=True, help="MindSpore checkpoint with the adapter; "
                        "export: also the folder with the slices of all ranks, checkpoint_trainable")
    parser.add_argument("--adapter_strategy", type=Path, help="export: how the ranks cut the adapter, file or folder; "
                        "default: the folder strategy beside --adapter, if that holds rank_0, rank_1, ...")
    parser.add_argument("--peft_dir", type=Path, required=True, help=f"folder with {PEFT_NAMES[0]} and {CONFIG_NAME}")
    parser.add_argument("--model_name", choices=list(VARIANTS), help="the model, sizes as published")
    parser.add_argument("--config", type=Path, help="official config.json of a model of other sizes")
    parser.add_argument("--lora_alpha", type=float, help="default: from adapter_config.json")
    return parser


def run(args: argparse.Namespace) -> None:
    """Carry out the command. Raises CheckpointError and ConfigError."""
    (export_adapter if args.direction == "export" else import_adapter)(args)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command; returns the exit code (common/command.py)."""
    return run_command(lambda: run(build_parser().parse_args(argv)))
