"""Command: base checkpoint + LoRA adapter -> full MindSpore checkpoint, W + lora_alpha / r B A.

    python scripts/merge_lora.py --base BASE.ckpt --adapter output/checkpoint_trainable/rank_0/X.ckpt --output OUT.ckpt
    python scripts/merge_lora.py --base BASE.ckpt --adapter output/checkpoint_trainable --output OUT.ckpt  # shards

Streams: no more than one block of rows of one weight is in memory. The result has the types of the base. Converting
adapters to and from PEFT is convert_lora.py. See docs/training.md.
"""
import argparse
from dataclasses import replace
from pathlib import Path
from typing import Dict, Optional, Sequence

import numpy as np
from tqdm import tqdm

from research.telechat.checkpoint.agreement import CONFLICT, disagreements_of, recipe_wins
from research.telechat.checkpoint.dtypes import ITEM_SIZE, RAW, cast
from research.telechat.checkpoint.folder import open_mindspore
from research.telechat.checkpoint.integrity import OVERWRITE_HELP, VERIFY_HELP, check_files, is_ours
from research.telechat.checkpoint.lora import Adapter, add_to_rows, read_adapter
from research.telechat.checkpoint.manifest import Manifest, ModelFacts, facts_beside, is_manifest, manifest_path
from research.telechat.checkpoint.reader import Checkpoint
from research.telechat.checkpoint.writer import OutputFile, OutTensor, new_file
from research.telechat.common.command import run_command
from research.telechat.common.errors import CheckpointError
from research.telechat.common.files import refuse_foreign
from research.telechat.common.lock import output_lock

BLOCK = 64 << 20          # bytes of a weight in memory at a time


def base_tensors(base: Checkpoint, adapter: Adapter) -> Dict[str, OutTensor]:
    """What the result holds: the weights of `base` without optimizer state, counters and adapters.

    CheckpointError where the adapter does not belong to `base`.
    """
    tensors = {name: OutTensor(name, info.dtype, info.shape) for name, info in base.tensors.items()
               if name.startswith(("model.", "lm_head.")) and "_delta_lora_" not in name}
    for name, (a, b) in adapter.pairs.items():
        if name not in tensors:
            raise CheckpointError(f"the adapter has {name}, which {base.files[0]} lacks; pass the checkpoint that the "
                                  "adapter was trained on")
        if tensors[name].shape != (len(b), a.shape[1]):
            raise CheckpointError(f"{name}: the adapter is for [{len(b)}, {a.shape[1]}], {base.files[0]} has "
                                  f"{list(tensors[name].shape)}; pass the checkpoint that the adapter was trained on, "
                                  "and for an adapter that is sharded over ranks the folder that contains rank_0, "
                                  "rank_1, ...")
    strange = next((tensor for tensor in tensors.values() if tensor.dtype not in RAW), None)
    if strange:
        raise CheckpointError(f"{base.files[0]}: tensor {strange.name} has the type {strange.dtype}, which cannot be "
                              f"merged; expected {', '.join(RAW)}")
    return tensors


def merge(base: Checkpoint, adapter: Adapter, output: Path, facts: Optional[ModelFacts] = None) -> None:
    """Write the merged checkpoint `output` (.ckpt or .safetensors) and its manifest, or nothing.

    facts: what the base's manifest says of the model.
    """
    tensors = list(base_tensors(base, adapter).values())
    manifest = Manifest("mindspore", model=facts)
    with new_file(output, tensors, {**base.metadata, "format": "ms"}, manifest) as file, \
            tqdm(total=sum(tensor.nbytes for tensor in tensors), unit="B", unit_scale=True, desc="merge",
                 dynamic_ncols=True) as bar:
        for tensor in tensors:
            merge_tensor(base, adapter, tensor, file, bar)


def merge_tensor(base: Checkpoint, adapter: Adapter, tensor: OutTensor, file: OutputFile, bar: tqdm) -> None:
    """Copy a tensor in blocks of whole rows, adding the adapter where there is one."""
    row = max(tensor.nbytes // tensor.shape[0], 1) if tensor.shape else tensor.nbytes
    rows = max(BLOCK // row, 1)
    pair = adapter.pairs.get(tensor.name)
    for first in range(0, tensor.shape[0] if tensor.shape else 1, rows):
        count = min(rows * row, tensor.nbytes - first * row)
        raw: np.ndarray = np.empty(count // ITEM_SIZE[tensor.dtype], RAW[tensor.dtype])
        base.read_into(tensor.name, first * row, memoryview(raw).cast("B"))
        if pair:
            a, b = pair
            weight = cast(raw, tensor.dtype, "F32").view(np.float32).reshape(-1, tensor.shape[1])
            merged = add_to_rows(weight, a, b[first:first + len(weight)], adapter.alpha / adapter.rank)
            raw = cast(np.ascontiguousarray(merged, np.float32).view(np.uint32), "F32", tensor.dtype).reshape(-1)
        file.write(tensor.name, first * row, memoryview(raw).cast("B"))
        bar.update(count)


def build_parser() -> argparse.ArgumentParser:
    """All options."""
    parser = argparse.ArgumentParser(description="Merge a LoRA adapter into the weights it was trained on.")
    parser.add_argument("--base", type=Path, required=True, help="MindSpore checkpoint: file or folder of shards")
    parser.add_argument("--adapter", type=Path, required=True, help="file from checkpoint_trainable of a LoRA run; "
                        "with model parallelism checkpoint_trainable itself, or one rank's file in it")
    parser.add_argument("--adapter_strategy", type=Path, help="strategy by which the adapter is sharded, file or "
                                                              "folder; default: the folder strategy next to --adapter, "
                                                              "if that contains rank_0, rank_1, ...")
    parser.add_argument("--output", type=Path, required=True, help="the result, .ckpt or .safetensors")
    parser.add_argument("--lora_alpha", type=float, help="default: from adapter_config.json next to the adapter")
    parser.add_argument("--verify", action="store_true", help=VERIFY_HELP)
    parser.add_argument("--checkpoint_conflict", choices=CONFLICT, default="stop",
                        help="what wins if the manifests differ: checkpoint (the base's), recipe (the adapter's); "
                             "default: stop")
    parser.add_argument("--again", action="store_true", help="merge even if the base already contains this adapter")
    parser.add_argument("--overwrite", action="store_true", help=OVERWRITE_HELP)
    return parser


def run(args: argparse.Namespace) -> None:
    """Carry out the command. Raises CheckpointError."""
    with output_lock(args.output):
        _merge(args)


def facts_of_result(args: argparse.Namespace, adapter: Adapter) -> Optional[ModelFacts]:
    """What is known of the model: by the base, and by the adapter, which was trained with it.

    Raises ConfigError where they say different things and --checkpoint_conflict does not say which counts;
    CheckpointError where the base has this adapter already.
    """
    facts, base = _facts_of_both(args), facts_beside(args.base)
    merged = (base.merged if base else None) or []
    if adapter.digest in merged and not args.again:
        raise CheckpointError(f"{args.base} already has the adapter {args.adapter} merged in, by its manifest; give "
                              "the checkpoint that the adapter was trained on (--again adds it a second time)")
    return facts and replace(facts, merged=[*merged, adapter.digest])


def _facts_of_both(args: argparse.Namespace) -> Optional[ModelFacts]:
    base, adapter = facts_beside(args.base), facts_beside(args.adapter)
    if base is None or adapter is None:
        return base or adapter
    found = disagreements_of(adapter.to_variant(), base.to_variant())
    if recipe_wins(found, args.checkpoint_conflict, args.base, "--checkpoint_conflict"):
        return replace(base, variant={**base.variant, **{one.key: one.recipe for one in found}})
    return base


def _merge(args: argparse.Namespace) -> None:
    adapter = read_adapter(args.adapter, args.lora_alpha, args.adapter_strategy, args.verify)
    base = open_mindspore(args.base, "--base")
    try:
        if args.output.resolve() in {path.resolve() for path in base.files}:
            raise CheckpointError(f"--output {args.output} would overwrite the base while it is read; name another "
                                  "file")
        refuse_foreign([args.output], is_ours, args.overwrite)
        refuse_foreign([manifest_path(args.output, False)], is_manifest, args.overwrite)
        check_files(base.files, False, args.verify)
        merge(base, adapter, args.output, facts_of_result(args, adapter))
    finally:
        base.close()
    print(f"{args.output}: {len(adapter.pairs)} weights with the adapter (rank {adapter.rank}, lora_alpha "
          f"{adapter.alpha:g}) added, the others as they were")


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command; returns the exit code (common/command.py)."""
    return run_command(lambda: run(build_parser().parse_args(argv)), "nothing was written")
