"""Which files make up a checkpoint: a single file, or a folder with shards and an index. Finds, checks and opens them.

Official folders hold model*.safetensors or pytorch_model*.bin, MindSpore folders *.safetensors or one *.ckpt. Reading
the files is checkpoint/reader.py.
"""
import re
from pathlib import Path
from typing import Dict, Iterable, List, Optional, Tuple

from research.telechat.checkpoint.foreign import prefix_note, unwrapped
from research.telechat.checkpoint.plain_bin import open_plain_bin
from research.telechat.checkpoint.reader import BIN_INDEX_NAME, INDEX_NAMES, Checkpoint, open_ckpt, open_safetensors
from research.telechat.common.errors import CheckpointError, ConfigError
from research.telechat.common.files import read_json_object
from research.telechat.spec.parameters import LLAMA, MINDSPORE, OFFICIAL, summarise

_NOT_WEIGHTS = {"hyper_param.safetensors", "training_args.bin", "optimizer.bin", "scheduler.bin"}


def open_official(path: Path, source_format: str = "auto", option: str = "--torch_path") -> Checkpoint:
    """Open an official (Hugging Face) checkpoint: a folder, or one .safetensors or .bin file.

    source_format: "safetensors", "bin", or "auto" (safetensors where both are there, as transformers does).
    option: how the user named it, for messages.
    """
    if path.is_file():
        return _without_wrappers(open_files([path], "bin" if path.suffix in (".bin", ".pt", ".pth") else "safetensors"))
    _must_be_folder(path, option)
    found = {"safetensors": _weights(path, "model*.safetensors") or _weights(path, "*.safetensors"),
             "bin": _weights(path, "pytorch_model*.bin") or _weights(path, "*.bin")}
    indexes = {"safetensors": _first(path, INDEX_NAMES), "bin": _first(path, (BIN_INDEX_NAME,))}
    kinds = [kind for kind in found if (found[kind] or indexes[kind]) and source_format in ("auto", kind)]
    if not kinds:
        what = "*.safetensors and no pytorch_model*.bin" if source_format == "auto" else f"*.{source_format}"
        raise CheckpointError(f"{path} contains no {what}; pass the folder with the official weights")
    kind = kinds[0]
    checkpoint = _without_wrappers(_open_folder(found[kind], indexes[kind], kind))
    if len(kinds) > 1:
        checkpoint.notes.append(f"{path} holds safetensors and .bin files; the safetensors are read "
                                "(--source_format bin reads the others)")
    return checkpoint


def open_mindspore(path: Path, option: str = "--mindspore_path") -> Checkpoint:
    """Open a MindSpore checkpoint: one .ckpt or .safetensors file, or a folder with shards, or with one .ckpt.

    option: how the user named it, for messages.
    """
    if path.is_file():
        return _without_wrappers(open_files([path], "ckpt" if path.suffix == ".ckpt" else "safetensors"))
    _must_be_folder(path, option)
    if any(entry.is_dir() and entry.name.startswith("rank_") for entry in path.iterdir()):
        raise CheckpointError(f"{path} contains shards of a distributed checkpoint (folders rank_N); merge them into "
                              f"one checkpoint first (scripts/transform_checkpoint.py), then pass that")
    shards, ckpts = _weights(path, "*.safetensors"), _weights(path, "*.ckpt")
    if shards or _first(path, INDEX_NAMES):
        checkpoint = _without_wrappers(_open_folder(shards, _first(path, INDEX_NAMES), "safetensors"))
        if ckpts:
            checkpoint.notes.append(f"{path} holds safetensors and .ckpt files; the safetensors are read (name a .ckpt "
                                    "file to read that)")
        return checkpoint
    if len(ckpts) != 1:
        names = ", ".join(file.name for file in ckpts) or "none"
        raise CheckpointError(f"{path} must contain *.safetensors or exactly one *.ckpt, found {names}; pass the file")
    return _without_wrappers(open_files(ckpts, "ckpt"))


def layout_of_names(names: Iterable[str]) -> str:
    """The layout of a checkpoint, detected by its tensors: Llama's, MindSpore's, or else the official one."""
    names = set(names)
    if any(name.startswith(("model.embed_tokens.", "model.layers.0.self_attn.")) for name in names):
        return LLAMA
    return MINDSPORE if any(name.startswith(("model.tok_embeddings.", "model.layers.")) for name in names) else OFFICIAL


def open_any(path: Path, source_format: str = "auto") -> Tuple[Checkpoint, str]:
    """Open a checkpoint of any layout: (it, its layout)."""
    ranks = path.is_dir() and any(entry.is_dir() and entry.name.startswith("rank_") for entry in path.iterdir())
    if path.suffix == ".ckpt" or ranks or (path.is_dir() and _weights(path, "*.ckpt")
                                           and not _weights(path, "*.safetensors")):
        return open_mindspore(path, "--from"), MINDSPORE
    checkpoint = open_official(path, source_format, "--from")
    return checkpoint, layout_of_names(checkpoint.tensors)


def _without_wrappers(checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint`, its tensors named without what wrappers have added. Raises CheckpointError."""
    try:
        renamed = unwrapped(checkpoint.tensors)
        if renamed:
            checkpoint.rename(renamed)
            checkpoint.notes.append(prefix_note(renamed))
    except CheckpointError:
        checkpoint.close()
        raise
    return checkpoint


def open_files(paths: List[Path], kind: str) -> Checkpoint:
    """Open `paths`, all of one kind: "safetensors", "ckpt" (one file) or "bin"."""
    if kind == "bin":
        plain = open_plain_bin(paths)
        if plain is not None:
            return plain
        from research.telechat.checkpoint.torch_bin import open_bin  # imports torch: only who reads others needs it
        return open_bin(paths)
    return open_ckpt(paths[0]) if kind == "ckpt" else open_safetensors(paths)


def _must_be_folder(path: Path, option: str) -> None:
    if not path.exists():
        raise CheckpointError(f"{option} {path} does not exist; pass the checkpoint's file or folder")
    if not path.is_dir():
        raise CheckpointError(f"{option} {path} is neither a file nor a folder; pass the checkpoint's")


def _weights(folder: Path, pattern: str) -> List[Path]:
    return sorted(path for path in folder.glob(pattern) if path.is_file() and path.name not in _NOT_WEIGHTS)


def _first(folder: Path, names: tuple) -> Optional[Path]:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _open_folder(paths: List[Path], index: Optional[Path], kind: str) -> Checkpoint:
    """Open the shards that `index` names, or `paths` where there is none, and check that nothing is missing."""
    if index is None:
        _check_numbering(paths)
        return open_files(paths, kind)
    weight_map = _read_index(index)
    shards = sorted(set(weight_map.values()))
    missing = [name for name in shards if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(f"{index} lists {len(shards)} files, {len(missing)} of which are missing: "
                              f"{', '.join(missing)}; copy or download them")
    checkpoint = open_files([index.parent / name for name in shards], kind)
    wrong = [name for name, shard in weight_map.items()
             if name not in checkpoint.tensors or checkpoint.tensors[name].file.name != shard]
    if wrong:
        raise CheckpointError(f"{index} lists tensors that are not in its files: {summarise(wrong)}; index and files "
                              "belong to different checkpoints, or a file is damaged: copy or download the folder "
                              "again")
    extra = [name for name in checkpoint.tensors if name not in weight_map]
    if extra:
        raise CheckpointError(f"{index} lacks tensors that are in its files: {summarise(extra)}; the index is "
                              "incomplete: copy or download it again")
    return checkpoint


def _read_index(index: Path) -> Dict[str, str]:
    try:
        data = read_json_object(index, "index")
    except ConfigError as err:
        raise CheckpointError(str(err)) from err
    weight_map = data.get("weight_map", data)
    if isinstance(weight_map, dict):
        weight_map = {key: value[2:] if isinstance(value, str) and value.startswith("./") else value
                      for key, value in weight_map.items() if key != "__metadata__"}
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map must map tensor names to file names; copy or download it "
                              "again")
    for name in weight_map.values():
        if Path(name).name != name or name in (".", "..") or "\\" in name:
            raise CheckpointError(f"{index} lists the file {name!r}; files must be in the folder of the index: put "
                                  f"them there and correct it, or download it again")
    return weight_map


def _check_numbering(paths: List[Path]) -> None:
    """Without an index, shards named x-00001-of-00003 still tell how many they are."""
    matches = [re.search(r"[-_](\d+)-of-(\d+)\.[a-z]+$", path.name) for path in paths]
    numbers = [match for match in matches if match]
    totals = {int(match[2]) for match in numbers}
    if len(totals) == 1 and len(numbers) == len(paths):
        missing = sorted(set(range(1, totals.pop() + 1)) - {int(match[1]) for match in numbers})
        if missing:
            raise CheckpointError(f"{paths[0].parent} holds {len(paths)} files of {len(paths) + len(missing)}: number "
                                  f"{', '.join(map(str, missing))} is missing; copy or download it")
