"""What training needs beside the model: the one-step cell of the CPU and the log of a run."""
import json
import os
import time
from typing import Any, Dict, List

import numpy as np
from mindformers.tools.register import MindFormerModuleType
from mindformers.tools.utils import get_output_root_path, get_real_rank
from mindformers.wrapper.wrapper import MFTrainOneStepCell
from mindspore.train.callback import Callback

from research.telechat.telechat_compat import on_cpu, plugin_class


@plugin_class(MindFormerModuleType.WRAPPER)
class TelechatTrainOneStepCell(MFTrainOneStepCell):
    """MindFormers' training step; on the CPU, overflow is found from the gradients by operators that exist there."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if on_cpu():
            self.ascend_910b_target = True
            self.enable_allfinite = False


def to_float(value: Any) -> float:
    """A scalar from a Tensor, an array or a number; NaN where there is none."""
    if value is None:
        return float("nan")
    array = np.asarray(value.asnumpy() if hasattr(value, "asnumpy") else value, dtype=np.float64).reshape(-1)
    return float(array.mean()) if array.size else float("nan")


@plugin_class(MindFormerModuleType.CALLBACK)
class TelechatTrainingLog(Callback):
    """Writes one JSON line per step (step, loss, lr, global_norm, seconds) and, at the end, the loss as a picture.

    Files: `training_log.jsonl` and `training_curve.png` in the output folder, by rank 0 only.
    """

    def __init__(self, file_name: str = "training_log.jsonl", picture: str = "training_curve.png", **_: Any):
        super().__init__()
        folder = get_output_root_path()
        self.path, self.picture = os.path.join(folder, file_name), os.path.join(folder, picture)
        self.enabled = get_real_rank() == 0
        self.rows: List[Dict[str, float]] = []
        self.started = 0.0

    def on_train_begin(self, run_context: Any) -> None:
        """Start a new log; a resumed run goes on in the old one."""
        if self.enabled:
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            params = run_context.original_args()
            resumed = getattr(params, "cur_step_num", 0) or getattr(params, "initial_step", 0)
            if not resumed and os.path.exists(self.path):
                os.remove(self.path)
        self.started = time.time()

    def on_train_step_begin(self, run_context: Any) -> None:
        """Note when the step begins."""
        self.started = time.time()

    def on_train_step_end(self, run_context: Any) -> None:
        """Append the step to the log."""
        if not self.enabled:
            return
        params = run_context.original_args()
        outputs = params.net_outputs
        outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        values = [to_float(outputs[i]) if len(outputs) > i else float("nan") for i in (0, 3, 4)]
        row = {"step": int(params.cur_step_num), "loss": values[0], "lr": values[1], "global_norm": values[2],
               "seconds": round(time.time() - self.started, 4)}
        self.rows.append(row)
        with open(self.path, "a", encoding="utf-8") as log:
            log.write(json.dumps(row) + "\n")

    def on_train_end(self, run_context: Any) -> None:
        """Draw loss and learning rate."""
        if self.enabled and self.rows:
            draw_curve(self.rows, self.picture)


def draw_curve(rows: List[Dict[str, float]], path: str) -> None:
    """Loss over steps with the learning rate beside it, as a PNG written whole or not at all."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axis = pyplot.subplots(figsize=(7, 4), dpi=120)
    steps = [row["step"] for row in rows]
    axis.plot(steps, [row["loss"] for row in rows], color="#1f5aa6", label="loss")
    axis.set_xlabel("step")
    axis.set_ylabel("loss")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    other = axis.twinx()
    other.plot(steps, [row["lr"] for row in rows], color="#c97b1a", alpha=0.6, label="learning rate")
    other.set_ylabel("learning rate")
    other.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    lines = axis.get_lines() + other.get_lines()
    axis.legend(lines, [line.get_label() for line in lines], loc="upper right")
    figure.tight_layout()
    beside = f"{path}.part"
    figure.savefig(beside, format="png")
    pyplot.close(figure)
    os.replace(beside, path)
