"""Figures of a training run: speed, share of the peak (MFU), the curve as a picture, the report. No MindSpore here."""
import hashlib
import json
import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, List, Optional, Sequence, Tuple

from research.telechat.common.files import JsonObject
from research.telechat.common.picture import ACCENT, DARK, LIGHT, Words, drawing, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SAMPLE = 1 << 20                          # bytes hashed at both ends of large data files
_WHOLE = 1 << 30                           # data sets up to this many bytes are hashed whole


def seconds_left(rows: Sequence[JsonObject], step: int, total: int) -> Optional[float]:
    """Time until step `total`, from the median of the last steps; the first, which compiles, does not count."""
    recent = sorted(row["seconds"] for row in rows[1:][-20:])
    return recent[len(recent) // 2] * max(total - step, 0) if recent else None


def read_rows(path: Path, until_step: int) -> List[JsonObject]:
    """The rows of a log up to `until_step`, which a resumed run keeps; a half-written last line is dropped."""
    rows: List[JsonObject] = []
    if not path.is_file():
        return rows
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int) and row["step"] <= until_step:
            rows.append(row)
    return rows


def row_text(row: JsonObject) -> str:
    """A row as strict JSON: numbers that are not finite become null."""
    return json.dumps({key: None if isinstance(value, float) and not math.isfinite(value) else value
                       for key, value in row.items()})


def data_digest(files: Sequence[Path]) -> JsonObject:
    """SHA-256 over names and contents of data files; of large ones only size and both ends (`whole` tells)."""
    whole = sum(path.stat().st_size for path in files) <= _WHOLE
    digest = hashlib.sha256()
    for path in sorted(files):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with open(path, "rb") as data:
            if whole:
                for block in iter(partial(data.read, _SAMPLE), b""):
                    digest.update(block)
            else:
                digest.update(data.read(_SAMPLE))
                data.seek(max(size - _SAMPLE, 0))
                digest.update(data.read(_SAMPLE))
    return {"sha256": digest.hexdigest(), "whole": whole, "files": [str(path) for path in sorted(files)]}


def summarise_rows(rows: Sequence[JsonObject]) -> JsonObject:
    """Figures of a whole run."""
    def series(key: str) -> List[float]:
        return [row[key] for row in rows if isinstance(row.get(key), (int, float)) and math.isfinite(row[key])]
    losses, speeds = series("loss"), sorted(series("tokens_per_second_per_card")[1:])
    evaluations = {row["step"]: row["perplexity"] for row in rows if "perplexity" in row}
    return {"first_step": rows[0]["step"], "last_step": rows[-1]["step"],
            "first_loss": losses[0] if losses else None, "last_loss": losses[-1] if losses else None,
            "lowest_loss": min(losses, default=None),
            "median_tokens_per_second_per_card": speeds[len(speeds) // 2] if speeds else None,
            "skipped_steps": [row["step"] for row in rows if row.get("skipped")],
            "peak_memory_gb": max(series("memory_gb"), default=None), "perplexity": evaluations}


_CHINESE = {"training loss": "训练损失", "step": "步数", "learning rate": "学习率",
            "global gradient norm": "梯度全局范数", "tokens/s per card": "每卡吞吐（token/秒）", "each step": "每步",
            "smoothed over {width} steps": "{width} 步平滑", "skipped step": "跳过的步", "checkpoint": "权重保存点",
            "held-out perplexity": "验证集困惑度"}
_PANELS = (("loss", "training loss"), ("lr", "learning rate"), ("global_norm", "global gradient norm"),
           ("tokens_per_second_per_card", "tokens/s per card"))
_DECADE = 10.0                             # a loss that falls by more is drawn on a logarithmic axis


def smoothed(values: Sequence[float], width: int) -> List[float]:
    """The mean of the `width` values around each, of fewer at the ends; it does not lag behind a falling curve."""
    half = width // 2
    parts = [values[max(at - half, 0):at + half + 1] for at in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def draw_curve(rows: List[JsonObject], path: str, language: str = "en") -> None:
    """Loss, learning rate, norm and throughput over steps, as a PNG written whole or not at all.

    Rows with `perplexity`, `skipped` and `checkpoint` are marked. Raises ImportError without matplotlib.
    """
    with drawing((10, 6), _CHINESE, language) as (figure, word):
        axes = figure.subplots(2, 2, sharex=True)
        for axis, (key, label) in zip(axes.flat, _PANELS):
            axis.set_title(word(label))
            points = [(row["step"], row[key]) for row in rows
                      if isinstance(row.get(key), (int, float)) and math.isfinite(row[key])]
            if key == "tokens_per_second_per_card":
                points = points[1:]                          # the first step compiles
            if points:
                _panel(axis, rows, points, key, word)
        for axis in axes[1]:
            axis.set_xlabel(word("step"))
        save(figure, Path(path))


def _panel(axis: "Axes", rows: List[JsonObject], points: List[Tuple[int, float]], key: str, word: Words) -> None:
    """One curve with its marks. points: (step, value)."""
    steps, values = [list(column) for column in zip(*points)]
    width = max(len(points) // 50, 5)
    if key == "lr" or len(points) < 2 * width:
        axis.plot(steps, values, color=DARK, linewidth=1.2)
    else:
        axis.plot(steps, values, color=LIGHT, linewidth=0.8, label=word("each step"))
        axis.plot(steps, smoothed(values, width), color=DARK, linewidth=1.6,
                  label=word("smoothed over {width} steps", width=width))
    skipped = [(row["step"], row[key]) for row in rows if row.get("skipped") and (row["step"], row.get(key)) in points]
    if skipped:
        axis.plot(*zip(*skipped), "x", color=ACCENT, label=word("skipped step"))
    if key == "loss":
        if min(values) > 0 and max(values) / min(values) > _DECADE:
            axis.set_yscale("log")
        saved = [row["step"] for row in rows if row.get("checkpoint")]
        if saved:
            axis.plot(saved, [0.02] * len(saved), "^", color=DARK, markersize=5, markerfacecolor="white",
                      transform=axis.get_xaxis_transform(), label=word("checkpoint"))
        evaluated = [(row["step"], row["perplexity"]) for row in rows if row.get("perplexity") is not None]
        if evaluated:
            other = axis.twinx()
            other.grid(False)
            other.plot(*zip(*evaluated), "s--", color=ACCENT, markersize=4, markerfacecolor="white", linewidth=1)
            axis.plot([], [], "s--", color=ACCENT, markersize=4, markerfacecolor="white", linewidth=1,
                      label=word("held-out perplexity"))
            other.set_ylabel(word("held-out perplexity"))
    if axis.get_legend_handles_labels()[1]:
        axis.legend(loc="best")
