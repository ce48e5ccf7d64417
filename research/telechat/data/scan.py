"""Checks a data set before training; without meta.json the data is read, so that an invalid id is reported up front.

data/meta.py checks meta.json without reading the data. Importing this file does not import MindSpore.
"""
import contextlib
import json
from pathlib import Path
from typing import Dict, List, Optional, Union

from research.telechat.common.environment import rank
from research.telechat.common.errors import ConfigError
from research.telechat.common.files import JsonObject, write_text
from research.telechat.data.meta import (
    check_dataset_meta,
    check_length,
    data_files,
    read_meta,
    reason,
    vocabulary_fault,
)

MOST_BYTES = 4 << 30                       # of int32 tokens: data sets up to this size are read completely
_BATCH = 256                               # records checked at once
_BLOCKS = 16                               # evenly spaced parts of a larger data set that are read
_COLUMNS = ["input_ids", "labels"]


def check_dataset(dataset_dir_or_file: Union[str, Path], *, vocab_size: int, seq_length: int,
                  pad_token_id: Optional[int] = None, document_boundaries: bool = False,
                  template: str = "", remember: Optional[Path] = None) -> Optional[str]:
    """`check_dataset_meta` and, without a meta.json, `check_records`.

    Args:
        remember: file that caches the result of reading a data set for the next start; None: no cache.
    """
    warning = check_dataset_meta(dataset_dir_or_file, vocab_size=vocab_size, seq_length=seq_length,
                                 pad_token_id=pad_token_id, document_boundaries=document_boundaries,
                                 template=template)
    if read_meta(dataset_dir_or_file) is None:
        note = check_records(dataset_dir_or_file, vocab_size=vocab_size, seq_length=seq_length, remember=remember)
        warning = f"{warning}. {note}"
    return warning


def check_records(dataset_dir_or_file: Union[str, Path], *, vocab_size: int, seq_length: int,
                  remember: Optional[Path] = None, most_bytes: int = MOST_BYTES) -> str:
    """Compare the records of a data set with the recipe. Only rank 0 reads more than the first of each file.

    Args:
        dataset_dir_or_file: the recipe's data set.
        vocab_size, seq_length: of the model.
        remember: JSON file that caches earlier results, by path, size and time of the files; None: no cache.
        most_bytes: of larger data sets, evenly spaced parts of this total size are read.

    Returns:
        What was read, for the log.

    Raises:
        ConfigError: no file, not readable, a missing column, records of another length, ids below 0 or outside the
            vocabulary.
    """
    dataset = Path(dataset_dir_or_file)
    files = data_files(dataset)
    if not files:
        raise ConfigError(f"data set {dataset} contains no .mindrecord file; create one with telechat_preprocess.py")
    for file in files:
        check_length(file, _first_length(file), seq_length)
    if rank() != 0:
        return "Rank 0 reads its records"
    key = json.dumps([[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files])
    known = _remembered(remember)
    found = known.get(key) or _read(files, seq_length, most_bytes)
    if found["lowest"] < 0:
        raise ConfigError(f"data set {dataset} contains token id {found['lowest']} in input_ids; ids start at 0, "
                          "preprocess again")
    if found["highest"] >= vocab_size:
        raise ConfigError(vocabulary_fault(dataset, found["highest"], vocab_size))
    if remember and key not in known:
        with contextlib.suppress(OSError):            # then the data is read again at the next start
            remember.parent.mkdir(parents=True, exist_ok=True)
            write_text(remember, json.dumps({**known, key: found}, indent=1) + "\n")
    part = "All" if found["read"] == found["records"] else f"{found['read']:,} of"
    return f"{part} {found['records']:,} records were read: token ids {found['lowest']} to {found['highest']}"


def _first_length(file: Path) -> int:
    """Tokens of the first record of a file. ConfigError if there is none or it cannot be read."""
    from mindspore.mindrecord import FileReader
    try:
        reader = FileReader(str(file))
        record = next(iter(reader.get_next()), None)
        reader.close()
    except RuntimeError as err:
        raise ConfigError(f"{file} is not a readable MindRecord file (is {file.name}.db next to it, and neither "
                          f"renamed?): {reason(err)}; copy both again, or preprocess again") from err
    if record is None:
        raise ConfigError(f"data set {file} is empty; preprocess again and check the command's report")
    for column in _COLUMNS:
        if column not in record:
            raise ConfigError(f"data set {file} has no column {column!r}, only {', '.join(sorted(record))}; create it "
                              "with telechat_preprocess.py")
    if record["labels"].size != record["input_ids"].size:
        raise ConfigError(f"data set {file}: input_ids has {record['input_ids'].size} tokens, labels "
                          f"{record['labels'].size}; expected equal lengths, preprocess again")
    return int(record["input_ids"].size)


def _read(files: List[Path], seq_length: int, most_bytes: int) -> Dict[str, int]:
    """Lowest and highest id of the records of `files`, the number of records, and how many were read."""
    import mindspore.dataset as ds
    from tqdm import tqdm

    names = [str(file) for file in files]
    try:
        records = ds.MindDataset(names, shuffle=False).get_dataset_size()
        most = max(most_bytes // (4 * len(_COLUMNS) * (seq_length + 1)), 1)
        blocks = [(0, records)]
        if records > most:
            size = max(most // _BLOCKS, 1)
            count = most // size
            blocks = [(number * (records - size) // max(count - 1, 1), size) for number in range(count)]
        found = {"records": records, "read": sum(size for _, size in blocks), "lowest": 1 << 31, "highest": -1}
        with tqdm(total=found["read"], unit=" records", desc="reading the data set", disable=None, leave=False) as bar:
            for start, size in blocks:
                data = ds.MindDataset(names, columns_list=_COLUMNS, sampler=ds.SequentialSampler(start, size))
                for ids, labels in data.batch(_BATCH).create_tuple_iterator(num_epochs=1, output_numpy=True):
                    found["lowest"] = min(found["lowest"], int(ids.min()))
                    found["highest"] = max(found["highest"], int(ids.max()), int(labels.max()))
                    if ids.shape[1] != seq_length + 1:
                        check_length(files[0].parent, int(ids.shape[1]), seq_length)
                    bar.update(len(ids))
    except RuntimeError as err:
        raise ConfigError(f"data set {files[0].parent} cannot be read completely, or its records differ in length; "
                          f"copy it again or preprocess again: {reason(err)}") from err
    return found


def _remembered(path: Optional[Path]) -> JsonObject:
    """Cached results; a file of another form counts as empty."""
    try:
        known = json.loads(path.read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError, RecursionError):
        return {}
    keys = ("records", "read", "lowest", "highest")
    return {key: value for key, value in known.items() if isinstance(value, dict)
            and all(isinstance(value.get(each), int) for each in keys)} if isinstance(known, dict) else {}


__all__ = ["MOST_BYTES", "check_records"]
