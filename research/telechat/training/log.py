"""What a training run says about itself: one JSON line per step, a picture and a report at the end, a stop at NaN.

Arithmetic, picture and report are training/report.py's; what the run is (sizes, recipe, data) comes as
`run_info` from run/job.py. TensorBoard and trackers: training/tracker.py.
"""
import contextlib
import math
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Dict, Iterable, List, Optional

import mindspore as ms
import numpy as np
from mindformers.core.callback.callback import EvalCallBack, MFLossMonitor
from mindformers.tools.logger import logger
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindformers.tools.utils import get_output_root_path, get_real_rank
from mindspore.train.callback import Callback, RunContext

from research.telechat import __version__
from research.telechat.bridge.compat import (
    chip_name,
    get_tensorboard_writer,
    mindformers_version,
    peak_memory,
    plugin_class,
)
from research.telechat.checkpoint.resume import checkpoints
from research.telechat.common.errors import ConfigError, TrainingStopped
from research.telechat.common.files import JsonObject, write_json, write_text
from research.telechat.common.picture import LANGUAGES
from research.telechat.spec.flops import peak_flops
from research.telechat.training import save_thread as training_save_thread
from research.telechat.training.records import describe_records, record_numbers, step_batches
from research.telechat.training.report import data_digest, draw_curve, read_rows, row_text, seconds_left, summarise_rows
from research.telechat.training.step import step_values, to_float
from research.telechat.training.tracker import Tracker, to_tensorboard

if TYPE_CHECKING:
    from mindspore.train.callback._callback import _InternalCallbackParam as StepParams

class TelechatLossMonitor(MFLossMonitor):
    """MFLossMonitor for a step that returns the loss: MindFormers divides it by the number of micro-batches."""

    def _fix_loss_for_parallel(self, loss: float, *_: object, **__: object) -> float:
        return loss


MindFormerRegister.register_cls(TelechatLossMonitor, MindFormerModuleType.CALLBACK, alias=MFLossMonitor.__name__)


@plugin_class(MindFormerModuleType.CALLBACK)
class TelechatTrainingLog(Callback):
    """Log, picture and report of a run, by rank 0; every rank stops at a loss that is not finite.

    Files in the output folder: `training_log.jsonl` with, per step, step, epoch, loss, lr, global_norm, loss_scale,
    seconds, tokens_per_second_per_card, mfu (known chips), memory_gb, seconds_left, skipped ("overflow", "norm") and
    perplexity (steps with an evaluation) and checkpoint (steps that are saved); `training_curve.png`;
    `training_report.json`.

    Args:
        stop_at_nan: end the training at a loss, or a norm without overflow, that is not finite.
        peak_tflops: peak of the chip for the MFU where the table does not have it.
        lang: language of the picture, en or zh.
        tracker: module with wandb's `init`, `log` and `finish`, which gets every row as well; see training/tracker.py.
        tracker_args: arguments of its `init`.
        run_info: set by run/job.py.

    Raises:
        ConfigError: an unknown language, a tracker that is not installed.
    """

    def __init__(self, file_name: str = "training_log.jsonl", picture: str = "training_curve.png",
                 report: str = "training_report.json", stop_at_nan: bool = True, peak_tflops: Optional[float] = None,
                 lang: str = "en", tracker: Optional[str] = None, tracker_args: Optional[JsonObject] = None,
                 run_info: Optional[JsonObject] = None, **_: object):
        super().__init__()
        folder = get_output_root_path()
        self.folder = Path(folder)
        self.path, self.picture = os.path.join(folder, file_name), os.path.join(folder, picture)
        self.report = self.folder / report
        self.rank = get_real_rank()
        self.enabled = self.rank == 0
        self.stop_at_nan = stop_at_nan
        if lang not in LANGUAGES:
            raise ConfigError(f"callbacks: TelechatTrainingLog.lang: expected {' or '.join(LANGUAGES)}, found {lang!r}")
        self.lang = lang
        self.tracker = Tracker(tracker, tracker_args) if tracker and self.enabled else None
        self.info = run_info or {}
        self.peak = peak_flops(chip_name(), peak_tflops)
        self.rows: List[JsonObject] = []
        self.started = self.begun = time.time()
        self.first_step = self.last_step = self.total = 0
        self.evaluations: List[EvalCallBack] = []
        self.length = 0                                            # bytes of the log before its last row

    def on_train_begin(self, run_context: RunContext) -> None:
        """Start a new log; a resumed run continues the old one, without the rows after its checkpoint."""
        params = run_context.original_args()
        self.first_step = self.last_step = int(self.info.get("first_step") or 0)
        if self.enabled:
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            self.rows = read_rows(Path(self.path), self.first_step)
            write_text(self.path, "".join(row_text(row) + "\n" for row in self.rows))
        if self.tracker:
            self.tracker.start(self.info)
        self.evaluations = [entry for entry in params.list_callback or () if isinstance(entry, EvalCallBack)]
        for callback in self.evaluations:
            callback.eval_func = self._recorded(callback.eval_func)
            callback.on_train_step_end = self._evaluation(callback)
        self.begun = self.started = time.time()

    def on_train_epoch_begin(self, run_context: RunContext) -> None:
        """Note how many steps there will be."""
        params = run_context.original_args()
        if not self.total:
            done = int(params.cur_epoch_num) - 1
            self.total = (done + int(params.epoch_num)) * int(params.batch_num)

    def on_train_step_begin(self, run_context: RunContext) -> None:
        """Note when the step begins."""
        self.started = time.time()

    def on_train_step_end(self, run_context: RunContext) -> None:
        """Append the step to the log, and stop if it is not finite; a second call for a step does nothing."""
        params = run_context.original_args()
        step = int(params.cur_step_num) + self.first_step
        if step == self.last_step:
            return
        values = step_values(params.net_outputs)
        if self.enabled:
            self._append(self._row(params, step, values))
        first, self.last_step = self.last_step + 1, step           # more than one step with a sink size
        norm = values.get("global_norm", 0.0)
        if self.stop_at_nan and not (math.isfinite(values["loss"]) and (values["overflow"] or math.isfinite(norm))):
            records = self._records(params, first, step)
            self._finish("stopped: loss or norm not finite", records)
            raise TrainingStopped(self._explain(step, values, records))

    def before_saving(self, run_context: RunContext) -> None:
        """Log and evaluate the step now: whoever resumes from its checkpoint then finds its row complete, and a loss
        that is not finite stops the training before it is saved. (MindFormers puts saving first.)"""
        self.on_train_step_end(run_context)
        for callback in self.evaluations:
            callback.on_train_step_end(run_context)
        if self.enabled and self.rows:
            self._amend(checkpoint=True)

    def on_train_end(self, run_context: RunContext) -> None:
        """Draw the curves, write the report."""
        self._finish("complete")

    def _row(self, params: "StepParams", step: int, values: JsonObject) -> JsonObject:
        steps = max(step - self.last_step, 1)                      # more than one with a sink size
        seconds = (time.time() - self.started) / steps
        row = {"step": step, "epoch": int(params.cur_epoch_num), "loss": values["loss"],
               **{key: values[key] for key in ("lr", "global_norm", "loss_scale") if key in values},
               "seconds": round(seconds, 4)}
        tokens = self.info.get("tokens_per_step_per_card")
        if tokens:
            row["tokens_per_second_per_card"] = round(tokens / max(seconds, 1e-9), 1)
            if self.peak:
                row["mfu"] = round(row["tokens_per_second_per_card"] * self.info["flops_per_token"] / self.peak, 4)
        row["memory_gb"] = round(peak_memory() / 1e9, 3)
        own = [old for old in self.rows if old["step"] > self.first_step]
        left = seconds_left([*own, row], step, self.total)
        if left is not None:
            row["seconds_left"] = round(left)
        if values["overflow"]:
            row["skipped"] = "overflow"
        elif self.info.get("norm_limit") is not None and values.get("global_norm", 0.0) >= self.info["norm_limit"]:
            row["skipped"] = "norm"
        return row

    def _amend(self, **values: object) -> None:
        """Add to the last row, which is written again."""
        row = {**self.rows.pop(), **values}
        with contextlib.suppress(OSError):
            os.truncate(self.path, self.length)
        self._write(row)
        to_tensorboard(get_tensorboard_writer(), {"step": row["step"], **values})
        if self.tracker:
            self.tracker.log({"step": row["step"], **values})

    def _append(self, row: JsonObject) -> None:
        self._write(row)
        to_tensorboard(get_tensorboard_writer(), row)
        if self.tracker:
            self.tracker.log(row)
        if row.get("skipped"):
            logger.warning("step %d is skipped (%s): loss %s, norm %s, loss scale %s", row["step"], row["skipped"],
                           row["loss"], row.get("global_norm"), row.get("loss_scale"))

    def _write(self, row: JsonObject) -> None:
        self.rows.append(row)
        try:
            with open(self.path, "a", encoding="utf-8") as log:
                self.length = log.tell()
                log.write(row_text(row) + "\n")
        except OSError as err:                                     # a full disk must not end the training here
            logger.error("step %d could not be logged, training continues: %s", row["step"], err)

    def _recorded(self, evaluate: Callable[[], Optional[JsonObject]]) -> Callable[[], Optional[JsonObject]]:
        """`evaluate`, once for each step, with its perplexity noted in the row of the step."""
        latest: Dict[int, Optional[JsonObject]] = {}

        def run() -> Optional[JsonObject]:
            if self.last_step in latest:
                return latest[self.last_step]
            latest.clear()
            result = latest[self.last_step] = evaluate()
            for value in (result or {}).values():
                value = value.get("PPL") if isinstance(value, dict) else value
                if value is not None and self.enabled and self.rows:
                    self._amend(perplexity=to_float(value))
                    logger.info("step %d: perplexity %.4f on the evaluation data", self.last_step, to_float(value))
            return result
        return run

    def _evaluation(self, callback: EvalCallBack) -> Callable[[RunContext], None]:
        """Evaluate at the same steps as without a resumption: MindFormers counts those of this process."""
        def step_end(run_context: RunContext) -> None:
            step = int(run_context.original_args().cur_step_num) + self.first_step
            if callback.step_interval > 0 and step % callback.step_interval == 0:
                callback._execute_eval()
        return step_end

    def _explain(self, step: int, values: JsonObject, records: Dict[int, List[Optional[int]]]) -> str:
        """What a user needs to know when the loss is not finite."""
        training_save_thread.wait()                          # one that is still being written is good as well
        folder = self.folder / "checkpoint" / f"rank_{self.rank}"
        whole = [name for name in checkpoints(folder, self.rank) if not name.kind]
        good = (f"last good checkpoint: {folder / whole[-1].file(self.rank)}" if whole else "no checkpoint was saved")
        reader = f" by rank {self.rank}" if int(self.info.get("cards") or 1) > 1 else ""
        batch = describe_records(records, reader) if records else "its records could not be found, see the log"
        norm = values.get("global_norm", math.nan)
        return (f"step {step}: the loss is {values['loss']:g}, the norm {norm:g} ({batch}; {good}). Look at these "
                "records; lower the learning rate or the loss scale; then resume with --resume_training True")

    def _records(self, params: "StepParams", first: int, last: int) -> Dict[int, List[Optional[int]]]:
        """Numbers of the records that this rank read in the steps `first` to `last`; empty where they cannot be found.

        In sink mode the device fetches the batches, so they are not available here and are read again.
        """
        files = self.info.get("data_files")
        element = getattr(params, "train_dataset_element", None)
        try:
            if not files:
                raise ValueError("the training data are no MindRecord files")
            logger.info("looking for the records of step %s in the training data.",
                        first if first == last else f"{first} to {last}")
            if first == last and element and hasattr(element[0], "asnumpy"):
                batches: Iterable[np.ndarray] = [element[0].asnumpy()]
            else:
                batches = step_batches(params.train_dataset, first, last)
            return dict(zip(range(first, last + 1), record_numbers(batches, files)))
        except Exception as err:                                   # the original failure must still be reported
            logger.error("the records of steps %d to %d could not be found: %s", first, last, err)
            return {}

    def _finish(self, ending: str, records: Optional[Dict[int, List[Optional[int]]]] = None) -> None:
        if self.tracker:
            self.tracker.finish()
        if not self.enabled or not self.rows:
            return
        try:
            draw_curve(self.rows, self.picture, self.lang)
            write_json(self.report, {
                "ending": ending, **({"records_of_steps": records} if records else {}),
                "seconds": round(time.time() - self.begun, 1), "resumed_at_step": self.first_step,
                **summarise_rows(self.rows), "seed": self.info.get("seed"), "tokens_per_step_per_card":
                self.info.get("tokens_per_step_per_card"), "cards": self.info.get("cards"),
                "device": chip_name(), "peak_flops": self.peak,
                "versions": {"telechat": __version__, "python": sys.version.split()[0], "mindspore": ms.__version__,
                             "mindformers": mindformers_version(), "numpy": np.__version__},
                "data": data_digest([Path(file) for file in self.info.get("data_files") or ()]),
                "recipe": self.info.get("recipe")})
        except Exception as err:                                   # a failed plot must not fail a finished run
            logger.error("picture and report could not be written: %s; the figures are in %s", err, self.path)
