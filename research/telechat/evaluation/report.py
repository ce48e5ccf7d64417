"""The result of an evaluation: a table for the terminal, a JSON report, a bar chart. No model and no MindSpore here."""
import json
import math
import platform
from importlib import metadata
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence

from research.telechat.common.files import JsonObject, whole, write_json
from research.telechat.common.picture import drawing, save
from research.telechat.common.table import table

ACCURACIES = ("acc", "acc_norm", "exact_match")          # what the chart shows; the rest is in table and report
PACKAGES = ("mindspore", "mindformers", "lm_eval", "datasets", "numpy", "sentencepiece", "tokenizers")


class Row(NamedTuple):
    """One metric of one task or group."""

    task: str
    metric: str
    filter: str                      # how the answer was found in the text, "" if there is only one way
    shots: Optional[int]
    documents: Optional[int]
    value: float
    error: Optional[float]           # standard error of the mean; None: not known


def result_rows(results: JsonObject) -> List[Row]:
    """Rows of a result of the harness: groups first, then tasks that belong to none of them."""
    inside = {name for names in results.get("group_subtasks", {}).values() for name in names}
    groups = results.get("groups", {})
    sizes = results.get("n-samples", {})
    rows = []
    for name in [*groups, *(name for name in results["results"] if name not in groups and name not in inside)]:
        values = groups[name] if name in groups else results["results"][name]
        documents = sum(sizes[task]["effective"] for task in leaves(name, results) if task in sizes)
        for key, value in values.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr") or isinstance(value, str):
                continue
            error = values.get(f"{metric}_stderr,{filter_name}")
            rows.append(Row(name, metric, "" if filter_name == "none" else filter_name, results["n-shot"].get(name),
                            documents or None, value, error if isinstance(error, (int, float)) else None))
    return rows


def leaves(name: str, results: JsonObject) -> List[str]:
    """The tasks below a group, or the task itself."""
    children = results.get("group_subtasks", {}).get(name)
    return [leaf for child in children for leaf in leaves(child, results)] if children else [name]


def result_table(rows: Sequence[Row]) -> str:
    """Rows as a text table."""
    cells: List[List[object]] = [["task", "metric", "shots", "questions", "value", "+-"]]
    for row in rows:
        metric = row.metric + (f" ({row.filter})" if row.filter else "")
        error = None if row.error is None or math.isnan(row.error) else row.error
        cells.append([row.task, metric, row.shots, row.documents, float(row.value), error])
    return table(cells, 4)


def judged_table(judged: Dict[str, JsonObject]) -> str:
    """Ratings of a judge by benchmark and category as a text table."""
    cells: List[List[object]] = [["benchmark", "category", "judgments", "rating"]]
    for name, found in judged.items():
        cells.append([name, "all", found["judgments"], found["score"]])
        cells += [["", category, None, float(value)] for category, value in found["categories"].items()]
    lines = [table(cells, 2)]
    lines += [f"{name}: {found['unread']} judgments without a rating are not counted" for name, found in judged.items()
              if found["unread"]]
    return "\n".join(lines)


def versions() -> Dict[str, str]:
    """Versions of Python and of the packages that affect the result, if installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_results(path: Path, report: JsonObject, samples: Optional[Dict[str, List[JsonObject]]] = None
                  ) -> None:
    """Write `report` as JSON and `samples`, each question with its answer, as JSON lines next to it. Atomic writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if samples is not None:
        lines = (json.dumps({"task": task, **entry}, ensure_ascii=False, default=str)
                 for task, entries in samples.items() for entry in entries)
        with whole(samples_path(path)) as beside, beside.open("w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
    write_json(path, report)


def samples_path(path: Path) -> Path:
    """The file for the samples of report `path`."""
    return path.with_name(f"{path.stem}.samples.jsonl")


def draw_bars(rows: Sequence[Row], path: Path) -> bool:
    """Accuracies as a horizontal bar chart with standard errors (PNG); whether there was anything to draw.

    Raises ImportError without matplotlib.
    """
    shown = [row for row in rows if row.metric in ACCURACIES][::-1]
    if not shown:
        return False
    with drawing((8, 1.2 + 0.35 * len(shown)), {}) as (figure, _):
        axis = figure.subplots()
        names = [f"{row.task}  {row.metric}" + (f" ({row.filter})" if row.filter else "")
                 + ("" if row.shots is None else f", {row.shots}-shot") for row in shown]
        errors = [0.0 if row.error is None or math.isnan(row.error) else 100 * row.error for row in shown]
        bars = axis.barh(range(len(shown)), [100 * row.value for row in shown], xerr=errors, color="#1f5aa6",
                         error_kw={"ecolor": "#555555", "capsize": 2})
        axis.bar_label(bars, labels=[f"{100 * row.value:.1f}" for row in shown], padding=4, fontsize=8)
        axis.set_yticks(range(len(shown)), names, fontsize=8)
        axis.set_xlim(0, 108)
        axis.set_xlabel("correct, %")
        axis.grid(visible=False, axis="y")
        save(figure, path)
    return True
