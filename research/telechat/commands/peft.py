"""Command: LoRA adapters between this project's checkpoints and the folders of Hugging Face PEFT.

    python scripts/convert_lora.py export --adapter X.ckpt --peft_dir DIR --model_name telechat_12b
    python scripts/convert_lora.py import --peft_dir DIR --adapter X.ckpt --model_name telechat_12b

Rows of fused weights change their order as the weights do. With --layout llama an adapter fits a folder that
`telechat convert --to llama` wrote, for PEFT and vLLM; adapters trained there are imported in the same way. Adding an
adapter to weights is merge_lora.py.
"""
import argparse
import json
from pathlib import Path
from typing import Dict, Optional, Sequence

import numpy as np

from research.telechat.checkpoint.integrity import OVERWRITE_HELP, VERIFY_HELP, check_files, is_ours
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
from research.telechat.checkpoint.manifest import (
    Manifest,
    ModelFacts,
    facts_beside,
    facts_of,
    is_manifest,
    manifest_path,
)
from research.telechat.checkpoint.reader import open_safetensors
from research.telechat.checkpoint.writer import OutTensor, new_file
from research.telechat.common.command import run_command
from research.telechat.common.errors import CheckpointError, ConfigError
from research.telechat.common.files import JsonObject, refuse_foreign
from research.telechat.common.lock import output_lock
from research.telechat.spec.llama_config import NO_ORIGIN, is_llama_config, origin
from research.telechat.spec.parameters import LLAMA, OFFICIAL
from research.telechat.spec.variants import VARIANTS, Variant, get_variant, read_hf_config, variant_from_hf


def find_variant(args: argparse.Namespace, facts: Optional[ModelFacts] = None) -> Variant:
    """Sizes from --config, else from the adapter's manifest, else from the table."""
    if args.config is not None:
        config = read_hf_config(args.config)
        official = origin(config) if is_llama_config(config) else config
        if official is None:
            raise ConfigError(f"{args.config}: {NO_ORIGIN}")
        return variant_from_hf(official, args.model_name)
    if facts is not None and args.model_name in (None, facts.name):
        return facts.to_variant()
    if args.model_name is None:
        raise ConfigError("--model_name or --config is needed: the model that the adapter belongs to")
    return get_variant(args.model_name)


def write_tensors(path: Path, tensors: Dict[str, np.ndarray], metadata: Dict[str, str],
                  manifest: Optional[Manifest] = None, place: Optional[Path] = None,
                  texts: Optional[Dict[Path, str]] = None) -> None:
    """A complete .ckpt or .safetensors file of float32 `tensors`, or none. The rest: see checkpoint/writer.new_file."""
    outs = [OutTensor(name, "F32", value.shape) for name, value in tensors.items()]
    with new_file(path, outs, metadata, manifest, place, texts) as file:
        for name, value in tensors.items():
            file.write(name, 0, memoryview(value.astype("<f4", copy=False).tobytes()))


def write_result(tensors: Dict[str, np.ndarray], metadata: Dict[str, str], config: JsonObject, path: Path,
                 manifest: Manifest, place: Path, overwrite: bool) -> None:
    """The file `path`, its adapter_config.json and `manifest` at `place`, or none of them. Raises OverwriteError.
    """
    text = path.parent / CONFIG_NAME
    texts = {} if _says(text, config) else {text: json.dumps(config, indent=2) + "\n"}
    refuse_foreign([path, *texts], is_ours, overwrite)
    refuse_foreign([place], is_manifest, overwrite)
    write_tensors(path, tensors, metadata, manifest, place, texts)


def _says(path: Path, config: JsonObject) -> bool:
    """Whether adapter_config.json is there and says nothing else than `config`."""
    if not path.is_file():
        return False
    found = read_adapter_config(path)
    return all(found.get(key, value) == value for key, value in config.items())


def export_adapter(args: argparse.Namespace) -> None:
    """MindSpore -> PEFT."""
    with output_lock(args.peft_dir, folder=True):
        adapter = read_adapter(args.adapter, args.lora_alpha, args.adapter_strategy, args.verify)
        facts = facts_beside(args.adapter)
        tensors, config = to_peft(adapter, find_variant(args, facts), args.adapter, args.layout)
        write_result(tensors, {"format": "pt"}, config, args.peft_dir / PEFT_NAMES[0], Manifest("peft", model=facts),
                     manifest_path(args.peft_dir, True), args.overwrite)
    print(f"{args.peft_dir}: {len(tensors) // 2} adapted layers, rank {config['r']}, lora_alpha {config['lora_alpha']}")


def import_adapter(args: argparse.Namespace) -> None:
    """PEFT -> MindSpore."""
    with output_lock(args.adapter):
        config = read_adapter_config(args.peft_dir / CONFIG_NAME)
        path = args.peft_dir / PEFT_NAMES[0]
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist; an adapter in another format must first be saved as "
                                  "safetensors")
        if args.verify:
            check_files([path, args.peft_dir / CONFIG_NAME], remember=False)
        checkpoint = open_safetensors([path])
        try:
            tensors = {name: read_float32(checkpoint, name) for name in checkpoint.tensors}
        finally:
            checkpoint.close()
        facts = facts_beside(args.peft_dir)
        variant = find_variant(args, facts)
        adapter = from_peft(tensors, args.lora_alpha or config["lora_alpha"], variant, path)
        write_result(mindspore_tensors(adapter), {"format": "ms"},
                     {"peft_type": "LORA", "r": adapter.rank, "lora_alpha": adapter.alpha}, args.adapter,
                     Manifest("adapter", model=facts or facts_of(variant, args.model_name)),
                     manifest_path(args.adapter, False), args.overwrite)
    print(f"{args.adapter}: {len(adapter.pairs)} adapted layers, rank {adapter.rank}, lora_alpha {adapter.alpha:g}")


def build_parser() -> argparse.ArgumentParser:
    """All options."""
    parser = argparse.ArgumentParser(description="Convert LoRA adapters to and from Hugging Face PEFT.")
    parser.add_argument("direction", choices=("export", "import"), help="export: to PEFT; import: from PEFT")
    parser.add_argument("--adapter", type=Path, required=True, help="MindSpore checkpoint with the adapter; "
                        "export: also the folder with the shards of all ranks, checkpoint_trainable")
    parser.add_argument("--adapter_strategy", type=Path, help="export: strategy by which the adapter is sharded, file "
                                                              "or folder; default: the folder strategy next to "
                                                              "--adapter, if that contains rank_0, rank_1, ...")
    parser.add_argument("--peft_dir", type=Path, required=True, help=f"folder with {PEFT_NAMES[0]} and {CONFIG_NAME}")
    parser.add_argument("--layout", choices=(OFFICIAL, LLAMA), default=OFFICIAL, help="export: for the official model "
                        "(default), or for a folder of the Llama layout; import: detected")
    parser.add_argument("--model_name", choices=list(VARIANTS), help="the model, sizes as published")
    parser.add_argument("--config", type=Path, help="config.json of a model of other sizes, official or Llama's")
    parser.add_argument("--lora_alpha", type=float, help="default: from adapter_config.json")
    parser.add_argument("--verify", action="store_true", help=VERIFY_HELP)
    parser.add_argument("--overwrite", action="store_true", help=OVERWRITE_HELP)
    return parser


def run(args: argparse.Namespace) -> None:
    """Carry out the command. Raises CheckpointError and ConfigError."""
    (export_adapter if args.direction == "export" else import_adapter)(args)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command; returns the exit code (common/command.py)."""
    return run_command(lambda: run(build_parser().parse_args(argv)))
