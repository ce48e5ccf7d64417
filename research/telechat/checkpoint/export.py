"""What comes with the weights in a folder that other programs load: configs, tokenizer, template, official code.

Nothing here is written: `beside` says what to write, copy and report, before the conversion begins.
"""
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional

from research.telechat.checkpoint import manifest
from research.telechat.checkpoint.targets import Sizes, official_config
from research.telechat.common.errors import ConfigError, VocabError
from research.telechat.common.files import JsonObject, json_text, read_json_object
from research.telechat.spec.llama_config import llama_config
from research.telechat.spec.parameters import LLAMA
from research.telechat.text.jinja import chat_template
from research.telechat.text.renderer import Renderer
from research.telechat.text.templates import get_template
from research.telechat.text.tokenizer_json import differences, probe_texts, tokenizer_json
from research.telechat.text.vocab import Vocab, check_fit
from research.telechat.text.vocab_files import JSON_FILE, MODEL_FILE

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".partial", ".lock")
_COPY_LIMIT = 256 << 20          # bytes; code, vocabularies and settings are far smaller
_SHOWN = 3                       # texts that differ and are shown


class Wishes(NamedTuple):
    """The user's options for the files that come with the weights."""

    tokenizer: Optional[Path] = None         # vocabulary file, or the folder that holds it
    copy_from: Optional[Path] = None         # official folder
    max_length: Optional[int] = None         # Llama: tokens of the longest sequence


class Beside(NamedTuple):
    """Files that come with the weights: texts to write and files to copy, by their place; lines for the user."""

    texts: Dict[Path, str]
    copies: Dict[Path, Path]
    notes: List[str]


def beside(folder: Path, layout: str, sizes: Sizes, dtype: str, wishes: Wishes, source: Path) -> Beside:
    """What goes into an official or Llama folder with its weights.

    dtype: of the weights; source: folder of the checkpoint that is converted, whose tokenizer is taken where the user
    names none.

    Raises ConfigError, VocabError: another model is in `folder`; the tokenizer is not the model's; a length that Llama
    has no config for; an unusable `copy_from`.
    """
    result = Beside({}, _copies(folder, wishes.copy_from, layout) if wishes.copy_from else {}, [])
    vocab = None if _has_tokenizer(result.copies) else _vocabulary(wishes, source)
    renderer = None if vocab is None else _renderer(vocab, sizes)
    texts = _llama(folder, sizes, dtype, wishes.max_length, renderer) if layout == LLAMA else _official(
        folder, sizes, result.copies)
    if vocab is not None and renderer is not None:
        texts.update(_tokenizer(folder, vocab, renderer, sizes, result.notes))
    result.texts.update(texts)
    result.notes.extend(_missing(folder, layout, {path.name for path in (*texts, *result.copies)}))
    return result


def _official(folder: Path, sizes: Sizes, copies: Dict[Path, Path]) -> Dict[Path, str]:
    texts = official_config(folder, sizes)
    for name, text in manifest.official_texts(sizes.facts).items():
        copies.pop(folder / name, None)
        texts[folder / name] = text
    return _changed(texts)


def _llama(folder: Path, sizes: Sizes, dtype: str, max_length: Optional[int], renderer: Optional[Renderer]
           ) -> Dict[Path, str]:
    path = folder / "config.json"
    config = llama_config(sizes.variant, dtype, max_length, sizes.config)
    if renderer is not None:
        config.update(_token_ids(renderer))
    if path.is_file() and read_json_object(path, "model config") != config:
        raise ConfigError(f"{path} describes another model; remove it or use another folder")
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
    generation = {**ids, **((sizes.facts.generation if sizes.facts else None) or {})}
    return _changed({path: json_text(config), folder / manifest.GENERATION_CONFIG: json_text(generation)})


def _changed(texts: Dict[Path, str]) -> Dict[Path, str]:
    """The texts that are not there already, word for word."""
    return {path: text for path, text in texts.items()
            if not path.is_file() or path.read_text(encoding="utf-8", errors="replace") != text}


def _token_ids(renderer: Renderer) -> JsonObject:
    """The ids that a config.json has, as the vocabulary says."""
    ids: JsonObject = {"eos_token_id": renderer.end_id, "pad_token_id": renderer.pad_id}
    bos = _bos(renderer.vocab)
    return ids if bos is None else {"bos_token_id": renderer.vocab.markers[bos], **ids}


def _bos(vocab: Vocab) -> Optional[str]:
    return next((piece for piece in (vocab.own_tokens.get("bos"), "<_start>", "<s>") if piece in vocab.markers), None)


# Tokenizer


def _vocabulary(wishes: Wishes, source: Path) -> Optional[Vocab]:
    """The vocabulary that the user names, or that of the input's folder; None: there is none."""
    if wishes.tokenizer is not None:
        return Vocab.load(wishes.tokenizer)
    for folder in (wishes.copy_from, source):
        if folder is not None and any((folder / name).is_file() for name in (MODEL_FILE, JSON_FILE)):
            return Vocab.load(folder)
    return None


def _renderer(vocab: Vocab, sizes: Sizes) -> Renderer:
    try:
        return Renderer(get_template(sizes.variant.chat_template), vocab)
    except ConfigError as err:
        raise ConfigError(f"{err}; or is {vocab.path} another model's tokenizer?") from err


def _tokenizer(folder: Path, vocab: Vocab, renderer: Renderer, sizes: Sizes, notes: List[str]) -> Dict[Path, str]:
    """tokenizer.json, tokenizer_config.json and special_tokens_map.json, compared with the vocabulary itself."""
    warning = check_fit(str(vocab.path), len(vocab), sizes.variant.vocab_size)
    if warning:
        notes.append(f"WARNING: {warning}")
    known = (sizes.facts.tokenizer if sizes.facts else None) or {}
    if known.get("sha256", vocab.fingerprint) != vocab.fingerprint:
        notes.append(f"WARNING: {vocab.path} differs from the {known.get('file')} of the original checkpoint's "
                     f"folder")
    try:
        content = tokenizer_json(vocab)
    except VocabError as err:
        notes.append(f"WARNING: no tokenizer.json: {err}")
        return {}
    texts = probe_texts(vocab)
    wrong = differences(content, vocab, texts)
    if wrong:
        notes.append(f"WARNING: tokenizer.json differs from {vocab.path.name} for {len(wrong)} of {len(texts)} "
                     f"texts, such as {', '.join(repr(text[:40]) for text in wrong[:_SHOWN])}")
    else:
        notes.append(f"tokenizer.json: ids for {len(texts)} texts compared with {vocab.path.name}, all equal")
    special = {f"{role}_token": piece for role, piece in (
        ("bos", _bos(vocab)), ("eos", vocab.id_to_token(renderer.end_id)), ("pad", vocab.id_to_token(renderer.pad_id)),
        ("unk", vocab.own_tokens.get("unk"))) if piece is not None}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special, "clean_up_tokenization_spaces": False,
                "model_max_length": sizes.variant.training_seqlen, "padding_side": "left",
                "chat_template": chat_template(renderer)}
    return {folder / JSON_FILE: json_text(content), folder / "tokenizer_config.json": json_text(settings),
            folder / "special_tokens_map.json": json_text(special)}


# Files of the official folder


def _copies(folder: Path, official: Path, layout: str) -> Dict[Path, Path]:
    """Code, tokenizer and settings of the official folder; of a Llama folder only its licence and the like."""
    if not official.is_dir():
        raise ConfigError(f"--copy_from {official} is not a folder; pass the folder of the official checkpoint")
    if layout == LLAMA:
        return {}
    return {folder / path.name: path for path in sorted(official.iterdir())
            if path.is_file() and not path.name.startswith(".") and path.suffix not in _WEIGHTS
            and not path.name.endswith(".index.json") and path.name not in ("config.json", manifest.FOLDER_NAME)
            and path.stat().st_size <= _COPY_LIMIT and (folder / path.name).resolve() != path.resolve()}


def _has_tokenizer(copies: Dict[Path, Path]) -> bool:
    return any(path.name in (MODEL_FILE, JSON_FILE) for path in copies)


def _missing(folder: Path, layout: str, names: set) -> List[str]:
    """What the folder lacks, and for which use."""
    there = names | {path.name for path in folder.glob("*")}
    lines = []
    if not there & {MODEL_FILE, JSON_FILE}:
        lines.append("missing: the tokenizer, without which prompts must be token ids; pass --tokenizer FILE or "
                     "--copy_from OFFICIAL")
    if layout != LLAMA and not any(name.startswith("modeling_") for name in there):
        lines.append("missing: the official modeling_*.py and configuration_*.py, which transformers needs "
                     "(trust_remote_code); pass --copy_from OFFICIAL, or use the layout llama, which needs none")
    return lines
