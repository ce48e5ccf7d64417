"""Tasks of lm-evaluation-harness by name. No model and no MindSpore here.

A wrong name, a missing package or missing data is reported within seconds, before a model is loaded
(evaluation/needs.py, evaluation/data.py).
"""
import difflib
import logging
import re
from importlib import metadata
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

from research.telechat.common.errors import ConfigError
from research.telechat.common.files import JsonObject
from research.telechat.evaluation.data import data_from
from research.telechat.evaluation.needs import check_needs

_SHOWN = 5                       # similar names in an error


def harness_version() -> str:
    """Version of lm-evaluation-harness. Raises ConfigError if it is not installed."""
    try:
        return metadata.version("lm_eval")
    except metadata.PackageNotFoundError:
        raise ConfigError("lm-evaluation-harness is not installed; install it with: pip install -e '.[evaluation]' "
                          "(--perplexity needs no harness)") from None


def load_tasks(names: Sequence[str], include_path: Optional[str] = None, data: Optional[str] = None,
               only_files: bool = False) -> JsonObject:
    """The tasks, groups and tags of these names with their data, in the form that the harness's `evaluate` takes.

    Args:
        names: as `lm_eval --tasks` takes them.
        include_path: folder with the user's own task files (YAML).
        data: folder with data sets, see `find_files` in evaluation/data.py.
        only_files: do not fall back to the hub.

    Raises:
        ConfigError: unknown name (similar ones are listed), no such folder, a broken task, missing data.
    """
    for option, folder in (("--include_path", include_path), ("--data", data)):
        if folder and not Path(folder).is_dir():
            raise ConfigError(f"{option}: {folder} is not a folder")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)    # it repeats itself without a network
    manager = _manager(names, include_path)
    for name in names:
        if name not in manager.all_tasks:
            near = near_names(name, manager.all_tasks)
            raise ConfigError(f"--tasks: {name!r} is not a task of lm-evaluation-harness {harness_version()}"
                              + (f"; similar names: {', '.join(near)}" if near else "")
                              + ("" if include_path else "; your own tasks need --include_path DIR"))
    check_needs(names, data)
    with data_from(Path(data) if data else None, only_files):
        try:
            return manager.load(list(names))
        except ConfigError:
            raise
        except Exception as err:                               # a task's YAML can be invalid in any way
            fault = err.__cause__ if isinstance(err.__cause__, ConfigError) else err
            if isinstance(fault, ConfigError):
                raise fault from err
            raise ConfigError(f"--tasks: {', '.join(names)} cannot be loaded: {type(err).__name__}: "
                              f"{' '.join(str(err).split())[:300]}") from err


def near_names(name: str, known: Sequence[str]) -> List[str]:
    """Suggestions for a misspelled name: similar ones, and the shortest of those with a similar first word."""
    words: Dict[str, List[str]] = {}
    for each in known:
        words.setdefault(re.split("[-_]", each)[0], []).append(each)
    near = [min(words[word], key=len)
            for word in difflib.get_close_matches(re.split("[-_]", name)[0], words, n=2, cutoff=0.7)]
    near += difflib.get_close_matches(name, known, n=_SHOWN, cutoff=0.6)
    return list(dict.fromkeys(near))[:_SHOWN]


def _manager(names: Sequence[str], include_path: Optional[str]) -> Any:
    """A TaskManager that knows the names, if they exist.

    Reading all 14,000 task files takes ten seconds or more, those in the folder that a name begins with less than one.
    Tags collect tasks from everywhere, so they need all files.
    """
    import lm_eval.tasks
    root = Path(lm_eval.tasks.__file__).parent
    beginnings = {name[:end] for name in names
                  for end in [len(name), *(at.start() for at in re.finditer("[-_]", name))]}
    folders = [root / each for each in sorted(beginnings - {""}) if (root / each).is_dir()]
    own = [Path(include_path)] if include_path else []
    for shared in ([], [root / "benchmarks"]):               # groups of tasks from several folders
        if folders or own:
            manager = lm_eval.tasks.TaskManager(include_path=[*folders, *shared, *own], include_defaults=False)
            if all(name in manager.all_tasks and name not in manager.all_tags for name in names):
                return manager
    return lm_eval.tasks.TaskManager(include_path=own or None)


def set_shots(loaded: JsonObject, num_fewshot: Optional[int], seed: int) -> List[str]:
    """Set the number of few-shot examples, as the harness's own command does.

    Returns the names of tasks that keep theirs because they set it to 0. ConfigError: a task has fewer examples.
    """
    kept = []
    for name, task in loaded["tasks"].items():
        own = task.get_config("num_fewshot")
        if num_fewshot is not None and own == 0:
            kept.append(name)
        elif num_fewshot is not None or own is None:
            if num_fewshot and len(list(task.fewshot_docs())) < num_fewshot:
                raise ConfigError(f"--num_fewshot is {num_fewshot}: {name} has only {len(list(task.fewshot_docs()))} "
                                  "solved examples; use that number, or fewer")
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(seed=seed)
    return kept


def count_documents(loaded: JsonObject) -> Dict[str, int]:
    """Number of questions of each task."""
    return {name: len(task.eval_docs) for name, task in loaded["tasks"].items()}
