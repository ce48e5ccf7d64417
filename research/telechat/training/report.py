"""Figures of a training run: speed, share of the peak (MFU), the curve as a picture, the report. No MindSpore here."""
import hashlib
import json
import math
from functools import partial
from pathlib import Path
from typing import List, Optional, Sequence

from research.telechat.common.files import JsonObject, whole

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


def draw_curve(rows: List[JsonObject], path: str) -> None:
    """Loss, learning rate, norm and throughput over steps, as a PNG written whole or not at all."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 6), dpi=110, sharex=True)
    panels = (("loss", "loss"), ("lr", "learning rate"), ("global_norm", "global gradient norm"),
              ("tokens_per_second_per_card", "tokens/s per card"))
    for axis, (key, label) in zip(axes.flat, panels):
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        if key == "tokens_per_second_per_card":
            points = points[1:]                              # the first step compiles
        if points:
            axis.plot(*zip(*points), color="#1f5aa6", linewidth=1.2)
        skipped = [(step, value) for step, value in points if any(
            row["step"] == step and row.get("skipped") for row in rows)]
        if skipped:
            axis.plot(*zip(*skipped), "x", color="#b3261e", label="skipped")
            axis.legend()
        axis.set_title(label, fontsize=10)
        axis.grid(alpha=0.3)
        if key == "loss" and any("perplexity" in row for row in rows):
            other = axis.twinx()
            other.plot(*zip(*[(row["step"], row["perplexity"]) for row in rows if "perplexity" in row]), "o-",
                       color="#c97b1a", markersize=3)
            other.set_ylabel("held-out perplexity", fontsize=8)
    for axis in axes[1]:
        axis.set_xlabel("step")
    figure.tight_layout()
    with whole(path) as beside:
        figure.savefig(beside, format="png")
    pyplot.close(figure)
