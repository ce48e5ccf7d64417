"""meta.json, which preprocessing writes next to a MindRecord data set, and the checks against it before training.

No data is read here; data/scan.py does that if there is no meta.json.
"""
import json
from pathlib import Path
from typing import List, Optional, Union

from research.telechat import __version__
from research.telechat.common.errors import ConfigError
from research.telechat.common.files import JsonObject, read_json_object
from research.telechat.common.hashing import file_sha256
from research.telechat.common.verified import Check, faults

META_FILE = "meta.json"
OLD_META_FILE = "old_meta.json"              # meta.json of the data set being replaced
REPORT_FILE = "report.json"                  # of the command, next to the data set
UNFINISHED = ".unfinished-"                  # prefix of the folder in which a data set is built
FORMAT_VERSION = 1
_EARLIER = {"telechat2": "telechat2_before"}         # current names of templates
_DATA_SUFFIX = ".mindrecord"


def write_meta(folder: Union[str, Path], meta: JsonObject) -> None:
    """Write meta.json into `folder`, byte-identical for the same contents."""
    content = json.dumps({"format_version": FORMAT_VERSION, "telechat_version": __version__, **meta},
                         ensure_ascii=False, indent=1)
    (Path(folder) / META_FILE).write_text(content + "\n", encoding="utf-8")


def is_part(path: Path) -> bool:
    """Whether a file belongs to a data set that preprocessing wrote into its folder, unchanged since: listed in its
    meta.json with this size and hash, or its report. Files that an interrupted run was moving into place count too."""
    if path.name == META_FILE:
        return bool(_own_meta(path))
    if path.name == REPORT_FILE:
        return {"conversations", "tokens"} <= _object(path).keys()
    metas = [path.parent / META_FILE, *path.parent.glob(f"{UNFINISHED}*/{META_FILE}"),
             *path.parent.glob(f"{UNFINISHED}*/{OLD_META_FILE}")]
    for meta in map(_own_meta, metas):
        hashes: JsonObject = meta.get("sha256") or {}
        if meta and not hashes:                                  # from a version that wrote no hashes
            if path.stat().st_size == (meta.get("files") or {}).get(path.name, path.stat().st_size):
                return True
        elif path.name in hashes and file_sha256(path) == hashes[path.name]:
            return True
    return False


def _object(path: Path) -> JsonObject:
    try:
        return read_json_object(path, "file")
    except ConfigError:
        return {}


def _own_meta(path: Path) -> JsonObject:
    """meta.json if preprocessing wrote it, else {}."""
    meta = _object(path)
    return meta if {"format_version", "telechat_version", "files"} <= meta.keys() else {}


def check_hashes(dataset: Union[str, Path], remember: bool = True) -> int:
    """Check the MindRecord files of a data set against the hashes in its meta.json; returns the number of files.

    remember: reuse earlier results of this machine (common/verified.py). Raises ConfigError: a file has changed.
    """
    meta = read_meta(dataset) or {}
    hashes, sizes = meta.get("sha256") or {}, meta.get("files") or {}
    folder = _folder(Path(dataset))
    checks = [Check(folder / name, size, hashes[name]) for name, size in sizes.items() if name in hashes]
    wrong = faults(checks, remember)
    if wrong:
        more = f" (and {len(wrong) - 1} more files)" if len(wrong) > 1 else ""
        raise ConfigError(f"data set {dataset}: {wrong[0]}{more}; it is damaged or was changed later: copy it again, "
                          "or preprocess again")
    return len(checks)


def read_meta(dataset: Union[str, Path]) -> Optional[JsonObject]:
    """meta.json of a data set (its folder, or a MindRecord file in it); None if there is none. Raises ConfigError."""
    path = _folder(Path(dataset)) / META_FILE
    return read_json_object(path, "data set's meta file") if path.exists() else None


def check_dataset_meta(dataset_dir_or_file: Union[str, Path], *, vocab_size: int, seq_length: int,
                       pad_token_id: Optional[int] = None, document_boundaries: bool = False,
                       template: str = "") -> Optional[str]:
    """Compare a data set with the recipe, using only its meta.json. To be called before the first step.

    Args:
        dataset_dir_or_file: the recipe's data set.
        vocab_size, seq_length, pad_token_id: of the model; `pad_token_id` None is not compared.
        document_boundaries: whether the recipe reads the column actual_seq_len.
        template: the model's chat template; '' is not compared.

    Returns:
        None if everything matches, or a warning for the log, such as that there is no meta.json.

    Raises:
        ConfigError: one line on what does not match, what was found and what to do.
    """
    dataset = Path(dataset_dir_or_file)
    if not dataset.exists():
        raise ConfigError(f"data set not found: {dataset}; name the file or folder that telechat_preprocess.py wrote")
    files = data_files(dataset)
    if not files:
        raise ConfigError(f"data set {dataset} contains no {_DATA_SUFFIX} file; create one with telechat_preprocess.py")
    meta = read_meta(dataset)
    _check_unfinished(dataset, meta)
    if meta is None:
        return (f"data set {dataset} has no {META_FILE}: whether its tokenizer and padding fit the recipe is unknown; "
                "data sets made by telechat_preprocess.py have it")
    _check_meta(dataset, meta, vocab_size, seq_length, pad_token_id, document_boundaries, template)
    note = _check_files(dataset, meta)
    _check_listed(dataset, files, meta)
    return note


def reason(err: Exception) -> str:
    """The informative line of a MindSpore error, whose text is a page long."""
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    return next((line for line in lines if line.startswith("[ERROR]")), lines[0] if lines else type(err).__name__)


def data_files(dataset: Path) -> List[Path]:
    """The MindRecord files that training reads from `dataset`, a file or a folder."""
    if dataset.is_dir():
        return sorted(path for path in dataset.rglob(f"*{_DATA_SUFFIX}*")
                      if path.name.rstrip("0123456789").endswith(_DATA_SUFFIX))
    return [dataset] if dataset.exists() else []


def _folder(dataset: Path) -> Path:
    return dataset if dataset.is_dir() else dataset.parent


def _check_meta(dataset: Path, meta: JsonObject, vocab_size: int, seq_length: int, pad_token_id: Optional[int],
                document_boundaries: bool, template: str) -> None:
    version = meta.get("format_version")
    if version != FORMAT_VERSION:
        raise ConfigError(f"data set {dataset}: {META_FILE} has format version {version!r}, expected {FORMAT_VERSION}; "
                          "create the data set again with this version's telechat_preprocess.py")
    if not meta.get("records"):
        raise ConfigError(f"data set {dataset} is empty (records: {meta.get('records')}); preprocess again and check "
                          "what the command reports")
    check_length(dataset, meta.get("record_length"), seq_length)
    greatest = meta.get("max_token_id")
    if not isinstance(greatest, int) or greatest >= vocab_size:
        raise ConfigError(vocabulary_fault(dataset, greatest, vocab_size)
                          + f" (its tokenizer: {meta.get('tokenizer')}, {meta.get('vocab_size')} ids)")
    pad = meta.get("pad_token_id")
    if pad_token_id is not None and pad != pad_token_id:
        raise ConfigError(f"data set {dataset} is padded with {pad}, but the recipe's pad_token_id is {pad_token_id}; "
                          "correct the recipe, or preprocess with the --pad_token of the model")
    written = meta.get("template")
    if "tool_marker_ids" not in meta:        # written by an earlier version
        written = _EARLIER.get(str(written), written)
    if template and written and written != template:
        raise ConfigError(f"data set {dataset} uses the chat template {written!r}, but the model's is "
                          f"{template!r}; preprocess with the --model_name of the recipe's net_name, or set "
                          f"model_config.chat_template to {written}")
    if document_boundaries and "actual_seq_len" not in meta.get("columns", ()):
        raise ConfigError(f"data set {dataset} has no column actual_seq_len, which the recipe's document boundaries "
                          "need; preprocess with --document_boundaries, or disable them in the recipe")


def _check_unfinished(dataset: Path, meta: Optional[JsonObject]) -> None:
    """ConfigError if a folder contains an unfinished run: training reads every MindRecord file below it."""
    left = next(_folder(dataset).glob(f"{UNFINISHED}*"), None)
    if left is not None and (meta is None or dataset.is_dir()):
        raise ConfigError(f"data set {dataset}: telechat_preprocess.py is writing to this folder, or was killed "
                          f"({left.name} is there); wait for it, or preprocess again")


def _check_listed(dataset: Path, files: List[Path], meta: JsonObject) -> None:
    """ConfigError if a folder has MindRecord files that its meta.json does not list."""
    listed = {dataset / name for name in meta.get("files") or {}}
    other = next((path for path in files if path not in listed), None)
    if dataset.is_dir() and listed and other is not None:
        raise ConfigError(f"data set {dataset}: {other.relative_to(dataset)} is not listed in its "
                          f"{META_FILE}, and training would read it as well; move it elsewhere")


def _check_files(dataset: Path, meta: JsonObject) -> Optional[str]:
    sizes = meta.get("files") or {}
    for name, size in sizes.items():
        path = _folder(dataset) / name
        found = path.stat().st_size if path.exists() else None
        if found != size:
            state = "is missing" if found is None else f"has {found}"
            raise ConfigError(f"data set {dataset}: the file {name} should have {size} bytes and {state}; copy it "
                              "again, or preprocess again")
    others = [name for name in sizes if name.endswith(_DATA_SUFFIX)]
    if dataset.is_file() and len(others) > 1:
        return (f"{dataset} is one of {len(others)} files of its data set; use the folder {dataset.parent} to train "
                "on all of them")
    return None


def check_length(dataset: Path, found: object, seq_length: int) -> None:
    """ConfigError if records of `found` tokens do not match the recipe's seq_length."""
    if found != seq_length + 1:
        made = f"--max_length {found - 1}" if isinstance(found, int) else "another length"
        raise ConfigError(f"data set {dataset} has records of {found} tokens, but the recipe's seq_length {seq_length} "
                          f"needs {seq_length + 1}; it was created with {made}: preprocess with --max_length "
                          f"{seq_length}, or set seq_length to it")


def vocabulary_fault(dataset: Path, greatest: object, vocab_size: int) -> str:
    """The message about an id that the model has no embedding for."""
    return (f"data set {dataset} contains token id {greatest}, but the recipe's vocab_size is {vocab_size}; use "
            "the model's tokenizer in preprocessing, or correct the recipe")
