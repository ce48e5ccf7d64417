"""The manifest of every checkpoint that this project writes: what model it is, and the SHA-256 of every file.

A small JSON. For a single file NAME it is NAME.manifest.json, in a folder of shards, of ranks or of an official
checkpoint telechat_manifest.json; the second names files by their path in the folder. Whoever reads a checkpoint takes
from it what no tensor shows (epsilon, rotary base, lengths, template, generation settings), and can hold its files
against their hashes (checkpoint/integrity.py). The same checkpoint has the same manifest, byte for byte: it holds no
time and no place. No MindSpore here.
"""
import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Dict, Iterable, List, NamedTuple, Optional

from research.telechat import __version__
from research.telechat.common.errors import CheckpointError, ConfigError
from research.telechat.common.files import JsonObject, read_json_object, write_json
from research.telechat.common.hashing import file_sha256
from research.telechat.spec.variants import Variant

FOLDER_NAME = "telechat_manifest.json"
SUFFIX = ".manifest.json"
FORMAT_VERSION = 1
GENERATION_CONFIG = "generation_config.json"
_TOKENIZERS = ("tokenizer.model", "tokenizer.json")


class FileEntry(NamedTuple):
    """What is known of a file."""

    size: int                                    # bytes
    sha256: str                                  # hexadecimal digits


@dataclass(frozen=True)
class ModelFacts:
    """What a checkpoint says of its model in addition to the tensors; passed on to whatever is made of it.

    config, generation: config.json and generation_config.json of the official checkpoint, whole, where there were any.
    tokenizer: {"file", "sha256"} of the vocabulary in its folder.
    merged: digests of the LoRA adapters merged into the weights (checkpoint/lora.py).
    """

    variant: JsonObject                          # every field of spec.variants.Variant
    name: Optional[str] = None                   # as --model_name or net_name gave it
    config: Optional[JsonObject] = None
    generation: Optional[JsonObject] = None
    tokenizer: Optional[JsonObject] = None
    merged: Optional[List[str]] = None

    def to_variant(self) -> Variant:
        """The variant. Fields that only another version of this project knows are left out. Raises ConfigError."""
        known = {entry.name for entry in fields(Variant)}
        try:
            return Variant(**{key: value for key, value in self.variant.items() if key in known})
        except TypeError as err:
            raise ConfigError(f"the manifest's model section lacks sizes: {err}") from err


@dataclass(frozen=True)
class Manifest:
    """A manifest. kind: "mindspore", "official", "llama", "training", "adapter", "peft" or "strategy"; files: by path,
    seen from the manifest's folder; training: of a training checkpoint, the position in the training
    (run/training_setup.py)."""

    kind: str
    files: Dict[str, FileEntry] = field(default_factory=dict)
    model: Optional[ModelFacts] = None
    training: Optional[JsonObject] = None
    path: Optional[Path] = None                  # where it was read

    def entry(self, file: Path) -> Optional[FileEntry]:
        """What it says of a file; None: nothing."""
        if self.path is None:
            return None
        try:
            name = file.resolve().relative_to(self.path.parent.resolve()).as_posix()
        except ValueError:
            return None
        return self.files.get(name)


def facts_of(variant: Variant, name: Optional[str] = None, folder: Optional[Path] = None,
             config: Optional[JsonObject] = None) -> ModelFacts:
    """The facts about a model from its variant and, where given, the official folder it comes from and its config.

    Raises ConfigError: generation_config.json in the folder cannot be read.
    """
    generation, tokenizer = None, None
    if folder is not None:
        if (folder / GENERATION_CONFIG).is_file():
            generation = read_json_object(folder / GENERATION_CONFIG, "generation config")
        found = next((folder / one for one in _TOKENIZERS if (folder / one).is_file()), None)
        if found is not None:
            tokenizer = {"file": found.name, "sha256": file_sha256(found)}
    return ModelFacts(asdict(variant), name, config, generation, tokenizer)


def manifest_path(output: Path, folder: bool) -> Path:
    """Path of the manifest of an output: inside a folder, next to a file."""
    return output / FOLDER_NAME if folder else output.with_name(output.name + SUFFIX)


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write it atomically: the same bytes for the same contents."""
    value: JsonObject = {"format": "telechat manifest", "format_version": FORMAT_VERSION,
                         "telechat_version": __version__, "kind": manifest.kind}
    if manifest.model is not None:
        value["model"] = {key: entry for key, entry in asdict(manifest.model).items() if entry is not None}
    if manifest.training is not None:
        value["training"] = manifest.training
    value["files"] = {name: entry._asdict() for name, entry in sorted(manifest.files.items())}
    write_json(path, value)


def announced(path: Path) -> Path:
    """Path of a manifest while the files that it lists are renamed."""
    return path.with_name(path.name + ".next")


def load_manifest(path: Path) -> Manifest:
    """The manifest at `path`. Raises CheckpointError: it is damaged, or of a later format."""
    try:
        data = read_json_object(path, "manifest")
    except ConfigError as err:
        raise CheckpointError(str(err)) from err
    if data.get("format") != "telechat manifest":
        raise CheckpointError(f"{path} is not a checkpoint manifest; rename it")
    if data.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(f"{path} has format version {data.get('format_version')!r}, expected {FORMAT_VERSION}; "
                              "use the version of this project that wrote it")
    try:
        files = {name: FileEntry(int(entry["size"]), str(entry["sha256"])) for name, entry in data["files"].items()}
        model = data.get("model")
        known = {entry.name for entry in fields(ModelFacts)}
        facts = None if model is None else ModelFacts(**{key: model[key] for key in model if key in known})
        if facts is not None and not isinstance(facts.variant, dict):
            raise TypeError("its variant is not an object")
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        raise CheckpointError(f"{path} is damaged ({type(err).__name__}: {err}); copy it again, or delete it to use "
                              "the checkpoint without a manifest") from err
    return Manifest(str(data.get("kind")), files, facts, data.get("training"), path)


def is_manifest(path: Path) -> bool:
    """Whether a file is a manifest that can be read."""
    try:
        load_manifest(path)
    except CheckpointError:
        return False
    return True


def find_manifest(checkpoint: Path) -> Optional[Manifest]:
    """The manifest of a checkpoint (a file, or a folder of files or of ranks); None where it has none.

    Raises CheckpointError: there is one that cannot be used.
    """
    if checkpoint.is_dir():
        if not (checkpoint / FOLDER_NAME).is_file() and (checkpoint / "rank_0").is_dir():
            checkpoint = checkpoint / "rank_0"           # of a training: each rank's files have their own, of one model
            newest = sorted(checkpoint.glob(f"*{SUFFIX}"), key=lambda path: path.stat().st_mtime_ns)
            return load_manifest(newest[-1]) if newest else None
        if (checkpoint / FOLDER_NAME).is_file():
            return load_manifest(checkpoint / FOLDER_NAME)
        beside = sorted(path for path in checkpoint.glob(f"*{SUFFIX}") if path.with_name(_named(path)).is_file())
        return load_manifest(beside[0]) if len(beside) == 1 else None
    if manifest_path(checkpoint, False).is_file():
        return load_manifest(manifest_path(checkpoint, False))
    for folder in (checkpoint.absolute().parent, checkpoint.absolute().parent.parent):
        if (folder / FOLDER_NAME).is_file():
            manifest = load_manifest(folder / FOLDER_NAME)
            if manifest.entry(checkpoint) is not None:
                return manifest
    return None


def _named(manifest: Path) -> str:
    """The file that a manifest belongs to."""
    return manifest.name[:-len(SUFFIX)]


def manifests_of(files: Iterable[Path]) -> List[Manifest]:
    """The manifests of several files, each once."""
    found: Dict[Optional[Path], Manifest] = {}
    for file in files:
        manifest = find_manifest(file)
        if manifest is not None:
            found.setdefault(manifest.path, manifest)
    return list(found.values())


def facts_beside(checkpoint: Path) -> Optional[ModelFacts]:
    """What the manifest of a checkpoint says of its model; None where there is none. Raises CheckpointError."""
    manifest = find_manifest(checkpoint)
    return manifest.model if manifest else None


def official_texts(facts: Optional[ModelFacts]) -> Dict[str, str]:
    """The JSON files, name to text, that an official checkpoint gets in addition to config.json."""
    if facts is None or facts.generation is None:
        return {}
    return {GENERATION_CONFIG: json.dumps(facts.generation, indent=2, ensure_ascii=False) + "\n"}


def with_files(manifest: Manifest, files: Dict[str, FileEntry]) -> Manifest:
    """The manifest with `files`."""
    return replace(manifest, files=files)
