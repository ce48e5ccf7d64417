"""Tasks of lm-evaluation-harness by name, and where their data lie. No model and no MindSpore here.

A wrong name or missing data is told within seconds, before a model is loaded. Data come from the Hugging Face hub or
its cache, or from files in a folder of the user's, since training clusters often have no way out.
"""
import contextlib
import difflib
import logging
import os
import re
from importlib import metadata
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence

from research.telechat.common.errors import ConfigError
from research.telechat.common.files import JsonObject

SUFFIXES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
SPLITS = {"train": ("train",), "dev": ("dev",), "val": ("val", "validation"), "validation": ("validation", "val"),
          "test": ("test",)}
_SHOWN = 5                       # near names in an error


def harness_version() -> str:
    """Version of lm-evaluation-harness. Raises ConfigError where it is not installed."""
    try:
        return metadata.version("lm_eval")
    except metadata.PackageNotFoundError:
        raise ConfigError("lm-evaluation-harness is not installed; install it with: pip install -e '.[evaluation]' "
                          "(--perplexity needs no harness)") from None


def find_files(folder: Path, name: Optional[str]) -> Dict[str, List[str]]:
    """Files of the splits of a data set, {split: files}; empty where there are none.

    Args:
        folder: of the data set.
        name: its configuration, such as a subject of an examination; None: it has none.

    They may stand as the hub stores them (NAME/SPLIT*.parquet), as C-Eval and CMMLU are published
    (SPLIT/NAME_SPLIT.csv, SPLIT/NAME.csv), or as SPLIT.jsonl in a folder NAME; without a name, as SPLIT* in the folder.
    """
    if name is None or name in ("main", "default"):
        patterns = ["{split}*", "data/{split}*", f"{name}/{{split}}*"]
    else:
        patterns = [f"{name}/{{split}}*", f"{name}_{{split}}*", f"{{split}}/{name}_{{split}}*", f"{{split}}/{name}.*"]
    found: Dict[str, List[str]] = {}
    for split, words in SPLITS.items():
        for pattern in patterns:
            files = sorted(path for word in words for path in folder.glob(pattern.format(split=word))
                           if path.suffix in SUFFIXES and path.is_file())
            if files:
                found[split] = [str(path) for path in files if path.suffix == files[0].suffix]
                break
    return found


@contextlib.contextmanager
def data_from(folder: Optional[Path]) -> Iterator[None]:
    """Within it, data sets come from `folder` where they are there, else from the hub. Failures become ConfigError.

    The harness has no setting for this: it asks `datasets.load_dataset`, which is replaced meanwhile.
    """
    import datasets  # type: ignore[import-untyped]    # of Hugging Face, comes with lm-evaluation-harness
    original = datasets.load_dataset

    def load(path: str, name: Optional[str] = None, **kwargs: object) -> object:
        place = _local(folder, path)
        files = find_files(place, name) if place else {}
        if place and not files:
            raise ConfigError(f"--data: {place} has no files of the data set {path}"
                              + (f", configuration {name!r}" if name else "") + "; expected, for example, "
                              + (f"test/{name}_test.csv or {name}/test.jsonl" if name else "test.jsonl"))
        try:
            if files:
                kind = SUFFIXES[Path(next(iter(files.values()))[0]).suffix]
                return original(kind, data_files=files)
            return original(path, name, **kwargs)
        except Exception as err:          # the hub, its cache and the readers of files raise errors of every kind
            raise ConfigError(_advice(path, name, files, err)) from err

    datasets.load_dataset = load
    try:
        yield
    finally:
        datasets.load_dataset = original


def _local(folder: Optional[Path], path: str) -> Optional[Path]:
    """The folder of data set `path` (such as ceval/ceval-exam) in `folder`, if there is one."""
    if folder is None:
        return None
    return next((folder / part for part in (path, Path(path).name) if (folder / part).is_dir()), None)


def _advice(path: str, name: Optional[str], files: Dict[str, List[str]], err: Exception) -> str:
    reason = " ".join(str(err).split())[:200] or type(err).__name__
    what = f"the data set {path}" + (f" ({name})" if name else "")
    if files:
        return f"--data: {what} cannot be read from {next(iter(files.values()))[0]}: {reason}"
    offline = " (HF_DATASETS_OFFLINE or HF_HUB_OFFLINE is set)" if any(
        os.environ.get(key, "0") not in ("", "0") for key in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE")) else ""
    return (f"{what} was not found on the hub or in its cache{offline}: {reason}. Put its files under "
            f"DIR/{Path(path).name}/ and give --data DIR, or run this command with --data_only on a machine with a "
            "network and copy its HF_HOME (see docs/evaluation.md)")


def load_tasks(names: Sequence[str], include_path: Optional[str] = None, data: Optional[str] = None) -> JsonObject:
    """The tasks, groups and tags of these names with their data, as the harness's `evaluate` takes them.

    Args:
        names: as `lm_eval --tasks` takes them.
        include_path: folder with task files (YAML) of the user's own.
        data: folder with data sets, see `find_files`.

    Raises:
        ConfigError: a name that does not exist (near ones are listed), no such folder, a broken task, missing data.
    """
    for option, folder in (("--include_path", include_path), ("--data", data)):
        if folder and not Path(folder).is_dir():
            raise ConfigError(f"{option}: {folder} is no folder")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)    # it repeats itself without a network
    manager = _manager(names, include_path)
    for name in names:
        if name not in manager.all_tasks:
            near = near_names(name, manager.all_tasks)
            raise ConfigError(f"--tasks: {name!r} is no task of lm-evaluation-harness {harness_version()}"
                              + (f"; near names: {', '.join(near)}" if near else "")
                              + ("" if include_path else "; tasks of your own need --include_path DIR"))
    with data_from(Path(data) if data else None):
        try:
            return manager.load(list(names))
        except ConfigError:
            raise
        except Exception as err:                               # a task's YAML can be wrong in any way
            fault = err.__cause__ if isinstance(err.__cause__, ConfigError) else err
            if isinstance(fault, ConfigError):
                raise fault from err
            raise ConfigError(f"--tasks: {', '.join(names)} cannot be loaded: {type(err).__name__}: "
                              f"{' '.join(str(err).split())[:300]}") from err


def near_names(name: str, known: Sequence[str]) -> List[str]:
    """Names that somebody may have meant: similar ones, and the shortest of those with a similar first word."""
    words: Dict[str, List[str]] = {}
    for each in known:
        words.setdefault(re.split("[-_]", each)[0], []).append(each)
    near = [min(words[word], key=len)
            for word in difflib.get_close_matches(re.split("[-_]", name)[0], words, n=2, cutoff=0.7)]
    near += difflib.get_close_matches(name, known, n=_SHOWN, cutoff=0.6)
    return list(dict.fromkeys(near))[:_SHOWN]


def _manager(names: Sequence[str], include_path: Optional[str]) -> Any:
    """A TaskManager that knows the names, if they exist.

    Reading all 14,000 task files takes ten seconds and more, those in the folder that a name begins with hardly one.
    Tags gather tasks from everywhere, so they need all files.
    """
    import lm_eval.tasks
    root = Path(lm_eval.tasks.__file__).parent
    words = sorted({re.split("[-_]", name)[0] for name in names})
    folders = [root / word for word in words if word and (root / word).is_dir()]
    own = [Path(include_path)] if include_path else []
    if folders or own:
        manager = lm_eval.tasks.TaskManager(include_path=[*folders, *own], include_defaults=False)
        if all(name in manager.all_tasks and name not in manager.all_tags for name in names):
            return manager
    return lm_eval.tasks.TaskManager(include_path=own or None)


def set_shots(loaded: JsonObject, num_fewshot: Optional[int], seed: int) -> List[str]:
    """Set the number of solved examples in front of each question, as the harness's own command does.

    Returns the names of tasks that keep theirs: those that have it set to 0. ConfigError: a task has fewer examples.
    """
    kept = []
    for name, task in loaded["tasks"].items():
        own = task.get_config("num_fewshot")
        if num_fewshot is not None and own == 0:
            kept.append(name)
        elif num_fewshot is not None or own is None:
            if num_fewshot and len(list(task.fewshot_docs())) < num_fewshot:
                raise ConfigError(f"--num_fewshot is {num_fewshot}: {name} has only {len(list(task.fewshot_docs()))} "
                                  "solved examples; give that number, or less")
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(seed=seed)
    return kept


def count_documents(loaded: JsonObject) -> Dict[str, int]:
    """Number of questions of each task."""
    return {name: len(task.eval_docs) for name, task in loaded["tasks"].items()}
