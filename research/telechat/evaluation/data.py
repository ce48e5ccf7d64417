"""Where the data sets of tasks are: files in the user's folder, in the forms they are published in, or the hub.

No model and no MindSpore here. Training clusters are often offline, so every data set can be read from files.
"""
import contextlib
import gzip
import json
import os
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Optional

from research.telechat.common.errors import ConfigError
from research.telechat.common.files import JsonObject
from research.telechat.evaluation.sandbox import CODE_EVAL

SUFFIXES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
SPLITS = {"train": ("train",), "dev": ("dev",), "val": ("val", "validation"), "validation": ("validation", "val"),
          "test": ("test",)}
# Data sets that are published as one file, by the last part of their name on the hub: its names, and its split.
SINGLE_FILES = {"openai_humaneval": (("HumanEval*.jsonl*", "human-eval*.jsonl*"), "test"),
                "ifeval": (("ifeval_input_data.jsonl", "input_data.jsonl"), "train"),
                "mbpp": (("mbpp.jsonl",), "test")}
# MBPP's file holds all of it; its README says which task_id belongs to which split.
MBPP_SPLITS = {"prompt": range(1, 11), "test": range(11, 511), "validation": range(511, 601), "train": range(601, 975)}


def find_files(folder: Path, name: Optional[str]) -> Dict[str, List[str]]:
    """Files of the splits of a data set, {split: files}; empty if there are none.

    Args:
        folder: of the data set.
        name: its configuration, such as the subject of an exam; None: it has none.

    They may be laid out as on the hub (NAME/SPLIT*.parquet), as C-Eval and CMMLU are published
    (SPLIT/NAME_SPLIT.csv, SPLIT/NAME.csv), as MATH is (SPLIT/NAME/NUMBER.json), or as SPLIT.jsonl in a folder NAME;
    without a name, as SPLIT* in the folder, or as one of SINGLE_FILES.
    """
    if name is None or name in ("main", "default"):
        patterns = ["{split}*", "data/{split}*", f"{name or folder.name}/{{split}}*"]
    else:
        patterns = [f"{name}/{{split}}*", f"{name}_{{split}}*", f"{{split}}/{name}_{{split}}*", f"{{split}}/{name}.*",
                    f"{{split}}/{name}/*"]
    found: Dict[str, List[str]] = {}
    for split, words in SPLITS.items():
        for pattern in patterns:
            files = sorted(path for word in words for path in folder.glob(pattern.format(split=word))
                           if _suffix(path) in SUFFIXES and path.is_file())
            if files:
                found[split] = [str(path) for path in files if _suffix(path) == _suffix(files[0])]
                break
    names, split = SINGLE_FILES.get(folder.name.lower(), ((), ""))
    files = [path for each in names for path in sorted(folder.glob(each))][:1]
    return found or ({split: [str(path) for path in files]} if files else {})


def _suffix(path: Path) -> str:
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix


def _read(files: Dict[str, List[str]], original: Callable[..., object]) -> object:
    """A DatasetDict of the files of each split."""
    import datasets  # type: ignore[import-untyped]    # of Hugging Face, comes with lm-evaluation-harness
    first = Path(next(iter(files.values()))[0])
    if first.name == "mbpp.jsonl":
        records = _records(first)
        splits = {split: [record for record in records if record["task_id"] in numbers]
                  for split, numbers in MBPP_SPLITS.items()}
    elif first.suffix == ".json" and first.stem.isdigit():             # MATH: a file for each question
        splits = {split: [json.loads(Path(name).read_text(encoding="utf-8")) for name in names]
                  for split, names in files.items()}
    else:
        return original(SUFFIXES[_suffix(first)], data_files=files)
    return datasets.DatasetDict({split: datasets.Dataset.from_list(each) for split, each in splits.items() if each})


def _records(path: Path) -> List[JsonObject]:
    with (gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")) as file:
        return [json.loads(line) for line in file if line.strip()]


@contextlib.contextmanager
def data_from(folder: Optional[Path], only_files: bool = False) -> Iterator[None]:
    """Context in which data sets are read from `folder` if they are there, else from the hub unless `only_files`.
    Failures become ConfigError.

    The harness has no setting for this: it calls `datasets.load_dataset`, which is patched in this context. So is
    `evaluate.load`, from which tasks with programs get the metric code_eval: that one runs programs in isolation.
    """
    import datasets
    import evaluate  # type: ignore[import-untyped]
    original, original_metric = datasets.load_dataset, evaluate.load

    def load(path: str, name: Optional[str] = None, **kwargs: object) -> object:
        place = _local(folder, path)
        files = find_files(place, name) if place else {}
        if place and not files:
            raise ConfigError(f"--data: {place} has no files for the data set {path}"
                              + (f", configuration {name!r}" if name else "") + "; expected, for example, "
                              + (f"test/{name}_test.csv or {name}/test.jsonl" if name else
                                 SINGLE_FILES.get(place.name.lower(), (("test.jsonl",), ""))[0][0].replace("*", "")))
        if only_files and not files:
            raise ConfigError(f"{folder} has no folder {Path(path).name}")
        try:
            if files:
                return _read(files, original)
            return original(path, name, **kwargs)
        except Exception as err:          # the hub, its cache and the file readers raise errors of every kind
            raise ConfigError(_advice(path, name, files, err)) from err

    def metric(path: str, *args: object, **kwargs: object) -> object:
        return CODE_EVAL if path == "code_eval" else original_metric(path, *args, **kwargs)

    datasets.load_dataset, evaluate.load = load, metric
    try:
        yield
    finally:
        datasets.load_dataset, evaluate.load = original, original_metric


def _local(folder: Optional[Path], path: str) -> Optional[Path]:
    """The folder of data set `path` (such as ceval/ceval-exam) in `folder`, if there is one; case does not matter."""
    if folder is None:
        return None
    known = {each.name.lower(): each for each in folder.iterdir() if each.is_dir()}
    whole = folder / path
    return whole if whole.is_dir() else known.get(Path(path).name.lower())


def _advice(path: str, name: Optional[str], files: Dict[str, List[str]], err: Exception) -> str:
    reason = " ".join(str(err).split())[:200] or type(err).__name__
    what = f"the data set {path}" + (f" ({name})" if name else "")
    if files:
        return f"--data: {what} cannot be read from {next(iter(files.values()))[0]}: {reason}"
    offline = " (HF_DATASETS_OFFLINE or HF_HUB_OFFLINE is set)" if any(
        os.environ.get(key, "0") not in ("", "0") for key in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE")) else ""
    return (f"{what} was not found on the hub or in its cache{offline}: {reason}. Put its files under "
            f"DIR/{Path(path).name}/ and pass --data DIR, or run this command with --data_only on a machine with a "
            "network and copy its HF_HOME (see docs/evaluation.md)")


