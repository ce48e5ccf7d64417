"""Merge and split distributed checkpoints: from the shards of one parallel plan to those of another, or to one file.

    python scripts/transform_checkpoint.py --source output/checkpoint_network --source_strategy output/strategy \
        --target merged                                                    # shards -> one complete checkpoint
    python scripts/transform_checkpoint.py --source merged --target shards --target_strategy STRATEGY
    python scripts/transform_checkpoint.py --source A --source_strategy SA --target B --target_strategy SB

A strategy is a file, or the folder with those of all ranks (or of one rank per pipeline stage): a run writes them to
output/strategy, `--only_save_strategy True` writes them and stops, and scripts/plan.py --compile --keep DIR writes one
without any card. MindSpore's transform functions do the work, rank by rank, on .ckpt files (shards in safetensors are
copied to .ckpt first; the result is .ckpt). Every byte of the result is then checked by independent arithmetic
(checkpoint/strategy.py) before it is renamed into place.
"""
import argparse
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Dict, List, Optional, Set

import numpy as np

from research.telechat.checkpoint.integrity import VERIFY_HELP, check_files, file_entry
from research.telechat.checkpoint.manifest import Manifest, manifest_path, manifests_of, with_files, write_manifest
from research.telechat.checkpoint.reader import Checkpoint
from research.telechat.checkpoint.slices import (
    Side,
    check_named,
    check_ranks,
    first_slices,
    open_ranks,
    read_bytes,
    read_whole,
    tensor_names,
    whole_shape,
)
from research.telechat.checkpoint.strategy import (
    full_shape,
    layout_of,
    newest_files,
    read_strategy,
    region,
    strategy_files,
)
from research.telechat.commands.help_text import HelpFormatter
from research.telechat.common.command import run_command
from research.telechat.common.environment import cores
from research.telechat.common.errors import CheckpointError
from research.telechat.common.files import set_usual_permissions
from research.telechat.common.lock import output_lock
from research.telechat.plan.plan import read_plan
from research.telechat.recipe.read import read_recipe, resolve_config
from research.telechat.recipe.settings import to_variant
from research.telechat.spec.parameters import parameters, summarise


def check_shapes(shapes: Dict[str, tuple], config: str) -> None:
    """CheckpointError where whole parameters have other shapes than the recipe's model: a strategy of another run may
    fit the number of ranks and divide every shape evenly, but wrongly."""
    plan = read_plan(read_recipe(resolve_config(config)))
    size = {param.ms_name: param.shape for param in parameters(to_variant(plan.model))}
    wrong = [f"{name} {list(shape)}, the recipe says {list(size[name])}" for name, shape in shapes.items()
             if name in size and size[name] != tuple(shape)]
    if wrong:
        raise CheckpointError(f"put together as --source_strategy says, {len(wrong)} parameters get shapes that "
                              f"{config} does not have ({wrong[0]}); the strategy belongs to another run")


def merged_strategy(path: Optional[Path], folder: Path, name: str) -> Optional[str]:
    """One strategy file for MindSpore: `path` itself, or what merge_pipeline_strategys makes of a folder."""
    if path is None:
        return None
    files = strategy_files(path)
    if len(files) == 1 and path.is_file():
        return str(files[0])
    from mindspore import merge_pipeline_strategys
    only = folder / f"{name}_files"
    only.mkdir()
    for file in files:
        shutil.copyfile(file, only / file.name)
    target = folder / f"{name}.ckpt"
    merge_pipeline_strategys(str(only), str(target))
    return str(target)


def as_ckpt(files: Dict[int, Path], folder: Path) -> Dict[int, Path]:
    """The same files as .ckpt, which is all that MindSpore transforms; safetensors are copied into `folder`."""
    import mindspore as ms
    from tqdm import tqdm
    made = dict(files)
    others = {rank: path for rank, path in files.items() if path.suffix != ".ckpt"}
    for rank, path in tqdm(others.items(), desc="reading safetensors", unit="rank", disable=not others):
        made[rank] = folder / f"slice_{rank}.ckpt"
        content = ms.load_checkpoint(str(path), format="safetensors")
        ms.save_checkpoint([{"name": name, "data": value} for name, value in content.items()], str(made[rank]))
    return made


def transform(source: Side, target: Side, strategies: List[Optional[str]], out: Path, prefix: str) -> Dict[int, Path]:
    """Write the files of all target ranks under `out`; returns them."""
    import mindspore as ms
    from tqdm import tqdm
    made = {}
    for rank in tqdm(range(target.ranks), desc="transforming", unit="rank"):
        needed = ms.rank_list_for_transform(rank, *strategies)
        path = out / f"rank_{rank}" / f"{prefix}_rank_{rank}.ckpt"
        path.parent.mkdir(parents=True)
        ms.transform_checkpoint_by_rank(rank, {one: str(source.files[one]) for one in needed}, str(path), *strategies)
        set_usual_permissions(path)
        made[rank] = path
    return made


def write_target_manifest(folder: Path, target: Side, files: Dict[int, Path]) -> None:
    """The manifest in `folder`, the result: what those of the source's `files` say, and the hashes of its own."""
    with ThreadPoolExecutor(max(1, min(4, cores()))) as pool:
        entries = dict(zip((path.relative_to(folder).as_posix() for path in target.files.values()),
                           pool.map(file_entry, target.files.values())))
    found = manifests_of(files.values())
    source = found[0] if found else Manifest("mindspore")
    write_manifest(manifest_path(folder, True), with_files(source, entries))


def verify(source: Side, target: Side, names: Set[str]) -> None:
    """Compare every element of the target's shards with the source's. Raises CheckpointError."""
    from tqdm import tqdm
    before, after = open_ranks(source.files), open_ranks(target.files)
    stage_ranks = target.strategy.stage_ranks if target.strategy else 1
    for name in tqdm(sorted(names), desc="checking", unit="parameter"):
        whole = read_whole(source, before, name)
        layout = layout_of(target.strategy, name, whole.ndim)
        holders = (target.strategy.holders(name) if target.strategy and name in target.strategy.layouts
                   else list(range(target.ranks)))
        for rank in holders:
            if name not in after[rank].tensors:
                raise CheckpointError(f"{name} is missing in {target.files[rank]}; the result is not to be used, "
                                      "transform again")
            expected = whole[tuple(slice(*span) for span in region(layout, rank % stage_ranks, whole.shape))]
            found = read_bytes(after[rank], name)
            if expected.shape != found.shape or expected.tobytes() != found.tobytes():
                raise CheckpointError(f"{name} of rank {rank} differs from the source; the result is not to be used, "
                                      "transform again")
    for checkpoint in [*before.values(), *after.values()]:
        checkpoint.close()


def check_target(args: argparse.Namespace) -> None:
    """CheckpointError where the target cannot be written."""
    if args.target.exists() and any(args.target.iterdir() if args.target.is_dir() else [args.target]):
        raise CheckpointError(f"{args.target} exists and is not empty; name another --target or remove it")
    parent = args.target.resolve().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise CheckpointError(f"{parent} cannot be made: {err}; name another --target") from err


def make_work_folder(parent: Path, name: str) -> Path:
    """A folder next to the target, whose lock is held; those of killed runs are removed."""
    for left in parent.iterdir():
        if re.fullmatch(rf"\.{re.escape(name)}\.\d+\.transform", left.name):
            shutil.rmtree(left, ignore_errors=True)
    work = parent / f".{name}.{os.getpid()}.transform"
    work.mkdir()
    return work


def check_space(folder: Path, source: Side, opened: Dict[int, Checkpoint], target: Side, names: Set[str]) -> None:
    """CheckpointError where the disk is too small for the target, and for copies of safetensors."""
    needed = sum(path.stat().st_size for path in source.files.values() if path.suffix != ".ckpt")
    for name in names:
        holder = next(checkpoint for checkpoint in opened.values() if name in checkpoint.tensors)
        info = holder.tensors[name]
        whole = full_shape(layout_of(source.strategy, name, len(info.shape)), info.shape)
        item = info.nbytes / max(int(np.prod(info.shape)), 1)
        layout = layout_of(target.strategy, name, len(info.shape))
        copies = len(target.strategy.holders(name)) if target.strategy and name in target.strategy.layouts else 1
        part = np.prod([stop - start for start, stop in region(layout, 0, whole)])
        needed += int(copies * part * item)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(f"the result takes {needed / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB free; "
                              "free some, or name a --target elsewhere")


def build_parser() -> argparse.ArgumentParser:
    """All options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--source", type=Path, required=True, help="folder with rank_0, rank_1, ..., or a complete checkpoint")
    add("--source_strategy", type=Path, help="file or folder; without it: the source is complete")
    add("--target", type=Path, required=True, help="folder to create")
    add("--target_strategy", type=Path, help="file or folder; without it: create one complete checkpoint")
    add("--config", help="recipe of the model; shapes are checked against it")
    add("--prefix", default="telechat", help="prefix of the new files' names")
    add("--no_verify", action="store_true", help="do not read the result back and compare it")
    add("--verify", action="store_true", help=VERIFY_HELP)
    return parser


def run(args: argparse.Namespace) -> None:
    """Carry out the command. Raises CheckpointError."""
    with output_lock(args.target):
        _run(args)


def _run(args: argparse.Namespace) -> None:
    check_target(args)
    files = newest_files(args.source)
    check_files(files.values(), False, args.verify)
    source = Side(read_strategy(args.source_strategy) if args.source_strategy else None, files)
    target = Side(read_strategy(args.target_strategy) if args.target_strategy else None, {})
    opened = open_ranks(files)
    check_ranks(source, "--source_strategy")
    names = set(tensor_names(opened))
    check_named(source, opened, names)
    shapes = {name: whole_shape(first_slices(source, opened, name)) for name in names}
    if args.config:
        check_shapes(shapes, args.config)
    if target.strategy:
        lost = sorted(name for name in names - target.strategy.layouts.keys() if source.strategy is None
                      or name in source.strategy.layouts)
        lost = [name for name in lost if any(np.prod(checkpoint.tensors[name].shape) > 1
                                             for checkpoint in opened.values() if name in checkpoint.tensors)]
        if lost:
            raise CheckpointError(f"the target strategy does not name {summarise(lost)}; it belongs to another model, "
                                  "or files of pipeline stages are missing")
    parent = args.target.resolve().parent
    check_space(parent, source, opened, target, names)
    for checkpoint in opened.values():
        checkpoint.close()
    work = make_work_folder(parent, args.target.name)
    try:
        strategies = [merged_strategy(args.source_strategy, work, "source"),
                      merged_strategy(args.target_strategy, work, "target")]
        made = work / "result"
        copies = work / "copies"
        copies.mkdir()
        copied = source._replace(files=as_ckpt(files, copies))
        target = target._replace(files=transform(copied, target, strategies, made, args.prefix))
        shutil.rmtree(copies)
        if not args.no_verify:
            verify(source, target, names)
        write_target_manifest(made, target, files)
        if args.target.is_dir():
            args.target.rmdir()
        os.replace(made, args.target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"{len(names)} parameters from {source.ranks} to {target.ranks} rank(s): {args.target}"
          + ("" if args.no_verify else "; every element compared"))


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command; returns the exit code (common/command.py)."""
    return run_command(lambda: run(build_parser().parse_args(argv)), "nothing was written")
