"""Commands: checkpoints between the official (PyTorch) layout, MindSpore's and Llama's, for every model of the family.

    python research/telechat/convert_weight_torch_to_ms.py --torch_path DIR --mindspore_path OUT.ckpt \
        --model_name telechat_12b
    python research/telechat/convert_weight_ms_to_torch.py --mindspore_path IN.ckpt --torch_path DIR \
        --model_name telechat_12b [--layout llama]
    telechat convert --from IN --to llama DIR

The first also imports 52B checkpoints of earlier MindFormers converters (--from_mindspore, --source_mp), and reads
folders of the Llama layout. The conversion itself is checkpoint/convert.py. See docs/conversion.md and docs/serving.md.
"""
import argparse
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import List, Optional, Sequence

from research.telechat.checkpoint.agreement import CONFLICT, Disagreement, disagreements_of, recipe_wins
from research.telechat.checkpoint.conversion import Options, Source, dtype_names, summary
from research.telechat.checkpoint.convert import convert, open_source, plan_tensors
from research.telechat.checkpoint.dtypes import CODES, NAMES
from research.telechat.checkpoint.export import Wishes, beside
from research.telechat.checkpoint.folder import layout_of_names, open_any, open_mindspore, open_official
from research.telechat.checkpoint.integrity import check_files
from research.telechat.checkpoint.manifest import facts_beside, facts_of
from research.telechat.checkpoint.reader import Checkpoint
from research.telechat.checkpoint.targets import Sizes, mindspore_target, torch_target
from research.telechat.common.command import run_command
from research.telechat.common.errors import CheckpointError, ConfigError
from research.telechat.common.lock import output_lock
from research.telechat.common.printable import one_line, printable
from research.telechat.spec.hf_config import config_notes
from research.telechat.spec.llama_config import (
    NO_ORIGIN,
    check_llama_config,
    check_llama_weights,
    is_llama_config,
    origin,
)
from research.telechat.spec.llama_keys import is_llama
from research.telechat.spec.parameters import LLAMA, MINDSPORE, OFFICIAL, official_layout
from research.telechat.spec.variants import VARIANTS, get_variant, read_hf_config, variant_from_hf

_TO_MINDSPORE = "Convert an official TeleChat checkpoint to MindSpore."
_TO_TORCH = "Convert a MindSpore TeleChat checkpoint to the official format."
_DTYPES = {**{name: name for name in CODES}, "fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not match or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write for example 5GB or 500MB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that both commands have."""
    parser.add_argument("--model_name", choices=list(VARIANTS), metavar="NAME",
                        help=f"one of {', '.join(VARIANTS)}; optional if there is a config.json")
    parser.add_argument("--config", type=Path, metavar="CONFIG.JSON",
                        help="official config.json with the sizes (default: the one in the input's folder)")
    parser.add_argument("--dtype", choices=list(_DTYPES), help="type of the result (default: unchanged)")
    parser.add_argument("--max_shard_size", type=_size, metavar="SIZE",
                        help="largest file of a folder of shards, such as 5GB (default: 5GB; 1GB for .bin)")
    parser.add_argument("--verify", action="store_true",
                        help="verify the input against the hashes in its manifest, if it has one; read the result "
                             "back and compare every tensor")
    parser.add_argument("--overwrite", action="store_true",
                        help="replace existing files that no conversion wrote")
    parser.add_argument("--checkpoint_conflict", choices=CONFLICT, default="stop",
                        help="what wins if --config or --model_name contradict the manifest of a MindSpore "
                             "checkpoint: recipe (the options), checkpoint (the manifest); default: stop")
    parser.add_argument("--strict", action="store_true",
                        help="read the input once beforehand and stop if it has NaN or infinity (otherwise they are "
                             "counted during conversion)")
    parser.add_argument("--workers", type=_positive, metavar="N", help="threads (default: number of cores, 2 to 4)")
    parser.add_argument("--source_mp", type=_positive, metavar="N",
                        help="52B: the MindSpore checkpoint was made by an earlier converter with --mp N")
    parser.add_argument("--mp", type=_positive, metavar="N",
                        help="accepted for old commands, no effect: the result fits every degree")


def sizes_for(args: argparse.Namespace, folder: Path) -> Optional[Sizes]:
    """Sizes from --config or from config.json in `folder`; without either None."""
    path = args.config or folder / "config.json"
    if args.config is None and not path.is_file():
        return None
    config = read_hf_config(path)
    if is_llama_config(config):
        raise ConfigError(f"{path / 'config.json' if path.is_dir() else path} is that of a Llama layout, the weights "
                          "have another; pass the official config.json with --config")
    try:
        return Sizes(variant_from_hf(config, args.model_name), config)
    except ConfigError as err:
        raise ConfigError(f"{path / 'config.json' if path.is_dir() else path}: {err}") from err


def sizes_from_manifest(args: argparse.Namespace, path: Path) -> Optional[Sizes]:
    """Sizes from the manifest of a MindSpore checkpoint; None where there is none.

    Raises ConfigError where --config or --model_name contradict it, and nothing says which of them wins.
    """
    facts = facts_beside(path)
    if facts is None:
        return None
    sizes = Sizes(facts.to_variant(), facts.config, facts)
    if args.model_name and facts.name and args.model_name != facts.name:
        disagreements = [Disagreement("model_name", args.model_name, facts.name)]
    elif args.config is not None:
        given = variant_from_hf(read_hf_config(args.config), args.model_name or facts.name)
        disagreements = disagreements_of(given, sizes.variant)
    else:
        return sizes
    return None if recipe_wins(disagreements, args.checkpoint_conflict, path, "--checkpoint_conflict") else sizes


def sizes_from_llama(args: argparse.Namespace, path: Path, folder: Path) -> Sizes:
    """Sizes of a folder with Llama's names: of its manifest or config.json, or, of a TeleChat from elsewhere, of
    --config or --model_name. Raises ConfigError where its config.json contradicts them."""
    file = folder / "config.json"
    own = args.config or file
    if own.is_file():
        given = read_hf_config(own)
        if is_llama(given) and not is_llama_config(given):                     # the official names are Llama's
            return Sizes(variant_from_hf(given, args.model_name), given)
    elif args.model_name is not None and official_layout(get_variant(args.model_name)) == LLAMA:
        return sizes_from_table(args, folder)
    config = read_hf_config(file)
    sizes = sizes_from_manifest(args, path)
    try:
        check_llama_weights(config)
        if sizes is None:
            given = read_hf_config(args.config) if args.config is not None else {}
            official = origin(config) if not given or is_llama_config(given) else given
            if official is None:
                if args.model_name is None:
                    raise ConfigError(NO_ORIGIN)
                sizes = Sizes(get_variant(args.model_name), None)
            else:
                sizes = Sizes(variant_from_hf(official, args.model_name), official)
        check_llama_config(config, sizes.variant)
    except ConfigError as err:
        raise ConfigError(f"{file}: {err}") from err
    return sizes


def sizes_from_table(args: argparse.Namespace, folder: Path) -> Sizes:
    """Sizes of --model_name as published."""
    if args.model_name is None:
        raise ConfigError(f"--model_name is needed, because {folder} contains no config.json; "
                          f"one of {', '.join(VARIANTS)}")
    return Sizes(get_variant(args.model_name), None)


def sizes_from_shapes(args: argparse.Namespace, checkpoint: Checkpoint, folder: Path) -> Sizes:
    """Sizes for a MindSpore checkpoint without config: its metadata, or the table, with the layers, vocabulary and
    feed-forward width that the shapes show (the number of heads cannot be seen in them)."""
    text = checkpoint.metadata.get("telechat_config")
    if text:
        try:
            config = json.loads(text)
            return Sizes(variant_from_hf(config, args.model_name), config)
        except (ValueError, AttributeError, TypeError) as err:
            raise ConfigError(f"{checkpoint.files[0]}: the config in its metadata is unusable: {err}; pass the "
                              "config.json of this model with --config") from err
    sizes = sizes_from_table(args, folder)
    variant = sizes.variant
    embedding = checkpoint.tensors.get("model.tok_embeddings.embedding_weight")
    down = checkpoint.tensors.get("model.layers.0.feed_forward.w2.weight")
    if embedding is None or down is None or len(embedding.shape) != 2 or len(down.shape) != 2:
        return sizes                                       # the check of names says what is wrong
    if embedding.shape[1] != variant.hidden_size:
        raise ConfigError(f"{checkpoint.files[0]} has hidden size {embedding.shape[1]}, {args.model_name} has "
                          f"{variant.hidden_size}; pass the config.json of this model with --config")
    layers = {int(match[1]) for match in map(re.compile(r"model\.layers\.(\d+)\.").match, checkpoint.tensors) if match}
    return Sizes(replace(variant, num_layers=max(layers) + 1, vocab_size=embedding.shape[0],
                         intermediate_size=down.shape[1]), None)


def run_conversion(args: argparse.Namespace, source: Source, sizes: Sizes, out: Path, layout: str, folder: Path
                   ) -> None:
    """Plan and run a conversion whose input is open, in `folder`, and print what happened."""
    dtype = _DTYPES[args.dtype] if args.dtype else None
    transfers = plan_tensors(source, dtype, official_layout(source.variant) if layout == OFFICIAL else layout)
    tensors = [transfer.out for transfer in transfers.values()]
    notes: List[str] = []
    if layout == MINDSPORE:
        target = mindspore_target(out, args.format, tensors, sizes, args.max_shard_size)
    else:
        target = torch_target(out, args.format, tensors, sizes, layout, args.max_shard_size)
        if target.folder_is_model:
            wishes = Wishes(args.tokenizer, args.copy_from, args.max_length)
            files = beside(out, layout, sizes, NAMES[tensors[0].dtype], wishes, folder)
            target = target._replace(texts={**target.texts, **files.texts}, copies=files.copies)
            notes = files.notes
    for note in source.checkpoint.notes:
        print(one_line(note))
    shown = len(source.checkpoint.notes)
    report = convert(source, target, transfers, Options(dtype, args.verify, args.strict, args.workers, args.overwrite))
    report.notes.extend([*source.checkpoint.notes[shown:], *notes])
    print(printable("\n".join(summary(report, target, dtype_names(transfers)))))


def add_torch_to_mindspore(parser: argparse.ArgumentParser) -> None:
    """The options of convert_weight_torch_to_ms.py."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--torch_path", type=Path, metavar="DIR",
                        help="official folder (safetensors or .bin), or one such file; or a folder of the Llama layout")
    source.add_argument("--from_mindspore", type=Path, metavar="IN",
                        help="instead: a MindSpore checkpoint, to be rewritten in this project's order, another "
                             "type or another format")
    parser.add_argument("--mindspore_path", type=Path, required=True, metavar="OUT",
                        help="OUT.ckpt, OUT.safetensors, or a folder")
    parser.add_argument("--format", choices=["ckpt", "safetensors"], default="ckpt",
                        help="in a folder: mindspore.ckpt (default), or safetensors in shards with an index")
    parser.add_argument("--source_format", choices=["auto", "safetensors", "bin"], default="auto",
                        help="which files of --torch_path to read (default: safetensors if there are any)")
    add_options(parser)
    parser.set_defaults(convert=convert_to_mindspore)


def add_mindspore_to_torch(parser: argparse.ArgumentParser) -> None:
    """The options of convert_weight_ms_to_torch.py."""
    parser.add_argument("--mindspore_path", type=Path, required=True, metavar="IN",
                        help="a .ckpt or .safetensors file, or a folder with shards")
    parser.add_argument("--torch_path", type=Path, required=True, metavar="DIR",
                        help="folder for weights and config.json, or one .safetensors or .bin file")
    parser.add_argument("--format", choices=["safetensors", "bin"], default="safetensors",
                        help="files in the folder (default: safetensors; bin needs PyTorch)")
    parser.add_argument("--layout", choices=[OFFICIAL, LLAMA], default=OFFICIAL,
                        help="official: for the official code (default); llama: for everything that loads a "
                             "LlamaForCausalLM")
    add_export_options(parser)
    add_options(parser)
    parser.set_defaults(convert=convert_to_torch)


def add_any_to_any(parser: argparse.ArgumentParser) -> None:
    """The options of `telechat convert --from IN --to LAYOUT OUT`."""
    parser.add_argument("--from", type=Path, required=True, metavar="IN", dest="source",
                        help="a checkpoint of any layout (detected): a folder, or one file")
    parser.add_argument("--to", choices=[OFFICIAL, LLAMA, MINDSPORE], required=True, dest="layout",
                        help="layout of the result")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the result, or one file (not for llama)")
    parser.add_argument("--format", choices=["safetensors", "ckpt", "bin"], default="safetensors",
                        help="files in the folder (default: safetensors)")
    parser.add_argument("--source_format", choices=["auto", "safetensors", "bin"], default="auto",
                        help="which files of IN to read (default: safetensors if there are any)")
    add_export_options(parser)
    add_options(parser)
    parser.set_defaults(convert=convert_any)


def add_export_options(parser: argparse.ArgumentParser) -> None:
    """The options for results that other programs load."""
    parser.add_argument("--tokenizer", type=Path, metavar="FILE",
                        help="tokenizer.model or tokenizer.json of the model, or their folder (default: the one in the "
                             "input's folder); tokenizer.json and the chat template are made from it")
    parser.add_argument("--copy_from", type=Path, metavar="OFFICIAL",
                        help="folder of the official checkpoint: its tokenizer, and for the official layout its code "
                             "and settings")
    parser.add_argument("--max_length", type=_positive, metavar="N",
                        help="llama: tokens of the longest sequence (default: what the weights were trained with)")


def convert_to_mindspore(args: argparse.Namespace) -> None:
    """Official or Llama, or MindSpore in another order, -> MindSpore. Raises CheckpointError, ConfigError, OSError."""
    path = args.torch_path or args.from_mindspore
    if args.torch_path is not None and args.source_mp is not None:
        raise CheckpointError("--source_mp belongs to --from_mindspore; official checkpoints know no such degree")
    with output_lock(args.mindspore_path, _is_folder(args.mindspore_path)):
        if args.torch_path is None:
            checkpoint, layout = open_mindspore(path, "--from_mindspore"), MINDSPORE
        else:
            checkpoint = open_official(path, args.source_format)
            layout = LLAMA if layout_of_names(checkpoint.tensors) == LLAMA else OFFICIAL
        _convert(args, checkpoint, path, args.mindspore_path, layout, MINDSPORE)


def convert_to_torch(args: argparse.Namespace) -> None:
    """MindSpore -> official or Llama. Raises CheckpointError, ConfigError, OSError."""
    with output_lock(args.torch_path, _is_folder(args.torch_path)):
        checkpoint = open_mindspore(args.mindspore_path)
        _convert(args, checkpoint, args.mindspore_path, args.torch_path, MINDSPORE, args.layout)


def convert_any(args: argparse.Namespace) -> None:
    """Any layout -> any layout. Raises CheckpointError, ConfigError, OSError."""
    if args.format == ("bin" if args.layout == MINDSPORE else "ckpt"):
        raise CheckpointError(f"--format {args.format} does not go with --to {args.layout}")
    with output_lock(args.out, _is_folder(args.out)):
        checkpoint, layout = open_any(args.source, args.source_format)
        if args.source_mp is not None and layout != MINDSPORE:
            raise CheckpointError(f"--source_mp is for MindSpore checkpoints; {args.source} has the {layout} layout")
        _convert(args, checkpoint, args.source, args.out, layout, args.layout)


def _is_folder(path: Path) -> bool:
    """Whether an output is a folder, existing or to be made."""
    return path.is_dir() or path.suffix not in (".ckpt", ".safetensors", ".bin", ".pt", ".pth")


def _convert(args: argparse.Namespace, checkpoint: Checkpoint, path: Path, out: Path, layout: str, target: str) -> None:
    """Check the open `checkpoint` of `layout` at `path`, find the sizes, and convert it to `target`, at `out`."""
    folder = path if path.is_dir() else path.parent
    try:
        checked = check_files(checkpoint.files, remember=False, all_of_it=args.verify)
        if checked:
            checkpoint.notes.append(f"{checked} of {len(checkpoint.files)} files of the input are as they were written "
                                    "(SHA-256, or MindSpore's CRC)")
        if layout == LLAMA:
            sizes = sizes_from_llama(args, path, folder)
        else:
            known = sizes_from_manifest(args, path) if layout == MINDSPORE else None
            known = known or sizes_for(args, folder)
            sizes = known or (sizes_from_shapes(args, checkpoint, folder) if layout == MINDSPORE
                              else sizes_from_table(args, folder))
        if sizes.facts is None:
            before = facts_beside(path)
            sizes = sizes._replace(facts=replace(facts_of(sizes.variant, args.model_name, folder, sizes.config),
                                                 merged=before.merged if before else None))
        facts = sizes.facts
        if sizes.config is not None and facts is not None:
            for note in config_notes(sizes.config, sizes.variant, args.model_name or facts.name):
                print(one_line(note))
        run_conversion(args, open_source(checkpoint, sizes.variant, layout, args.source_mp), sizes, out, target,
                       folder)
    finally:
        checkpoint.close()


def torch_to_mindspore(argv: Optional[Sequence[str]] = None) -> int:
    """The command convert_weight_torch_to_ms.py; returns the exit code (common/command.py)."""
    parser = argparse.ArgumentParser(description=_TO_MINDSPORE)
    add_torch_to_mindspore(parser)
    return _run(parser, argv)


def mindspore_to_torch(argv: Optional[Sequence[str]] = None) -> int:
    """The command convert_weight_ms_to_torch.py; returns the exit code (common/command.py)."""
    parser = argparse.ArgumentParser(description=_TO_TORCH)
    add_mindspore_to_torch(parser)
    return _run(parser, argv)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """--from and --to, or either of the two above, the direction being the first word; returns the exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    if words[:1] not in (["torch-to-ms"], ["ms-to-torch"]):
        parser = argparse.ArgumentParser(
            description="Convert a checkpoint between the official layout, Llama's and MindSpore's.",
            epilog="Also: telechat convert torch-to-ms and telechat convert ms-to-torch, with the options of "
                   "convert_weight_torch_to_ms.py and convert_weight_ms_to_torch.py.")
        add_any_to_any(parser)
        return _run(parser, words)
    parser = argparse.ArgumentParser(description="Convert checkpoints between the official layout and MindSpore's.")
    directions = parser.add_subparsers(required=True, dest="direction", metavar="DIRECTION")
    for name, text, add in (("torch-to-ms", _TO_MINDSPORE, add_torch_to_mindspore),
                            ("ms-to-torch", _TO_TORCH, add_mindspore_to_torch)):
        add(directions.add_parser(name, help=text, description=text))
    return _run(parser, argv)


def _run(parser: argparse.ArgumentParser, argv: Optional[Sequence[str]]) -> int:
    def body() -> None:
        args = parser.parse_args(argv)
        if args.mp is not None:
            print(f"--mp {args.mp}: accepted and not needed; the order of the rows fits every tensor-parallel degree "
                  "that divides the heads")
        args.convert(args)
    return run_command(body, "what is complete is kept: the same command continues there",
                       "use fewer threads (--workers 1) or close other programs")
