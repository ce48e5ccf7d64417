"""Saving checkpoints while training: MindFormers' CheckpointMonitor, made safe. Choosing one is checkpoint/resume.py.

What it adds: old checkpoints are deleted only once the new one is complete and on disk; a failed save (disk full)
leaves no partial file and stops or continues by setting; weights of a step whose loss or norm is not finite are
never saved; names and counters continue after a resumption as in one run; every Nth checkpoint can be kept for good.
All of this also holds for background writes (`async_save`): a write counts when it is complete.
"""
import contextlib
import copy
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Callable, List, NamedTuple, Optional, Tuple

import numpy as np
from mindformers.core.callback.callback import CheckpointMonitor
from mindformers.tools.logger import logger
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindformers.tools.utils import get_real_rank
from mindspore.train.callback import RunContext

from research.telechat.checkpoint.lora import CONFIG_NAME
from research.telechat.checkpoint.manifest import manifest_path
from research.telechat.checkpoint.resume import checkpoints, outdated
from research.telechat.common.errors import TrainingStopped
from research.telechat.common.files import JsonObject, write_text
from research.telechat.training import save_thread as thread
from research.telechat.training.save_manifest import ManifestWriter, remove_with_manifest
from research.telechat.training.step import step_values

if TYPE_CHECKING:
    from mindspore.train.callback._callback import _InternalCallbackParam as StepParams

# Of MindSpore's saving, of MindFormers' meta.json, and of manifests (common/files.py).
_LEFTOVER = re.compile(r".*\.tmp|tmp[a-z0-9_]{8}|\..+\.manifest\.json\.[0-9]+\.part")


class _Shifted:
    """The trainer's parameters with the step counted from the beginning of the training, not of this process."""

    def __init__(self, params: "StepParams", steps: int):
        self._params = params
        self.cur_step_num = params.cur_step_num + steps

    def __getattr__(self, name: str) -> object:
        return getattr(self._params, name)


class _Write(NamedTuple):
    """A file that is being written in the background."""

    path: str
    params: "StepParams"                                        # of the step that it holds
    meta: Optional[tuple]                              # what meta.json is to say when it is complete
    adapter: Optional[tuple] = None                    # what is to be written when it is complete


class TelechatCheckpointMonitor(CheckpointMonitor):
    """CheckpointMonitor with the additions named above.

    It is registered as `CheckpointMonitor`, since MindFormers' trainer passes what resuming needs to that name only.

    Args:
        keep_checkpoint_max: the last K checkpoints to keep. At least 2 with several processes (3 with async_save), so
            that there is one that all have.
        async_save: write in a thread while training continues, from a copy of all parameters in the host's memory.
            One checkpoint at a time; the last one is awaited. A failed write is reported at the next step. An adapter
            is copied at its step and written between two steps, when its checkpoint is complete.
        keep_every_n_steps: checkpoints whose step is a multiple are never deleted; 0: none.
        on_save_error: "stop" ends the training with one line, "continue" logs the error and tries again next time.
        adapter_config: content of adapter_config.json for the adapters that `save_trainable_params` saves.
        continue_run: what the files of the resumed run begin with; None: a new run.
        manifest: what the manifests of the files say (training/save_manifest.py); None: hashes alone.
        **kwargs: of CheckpointMonitor.
    """

    _append_step_num: int                              # MindFormers': steps before this process

    def __init__(self, *args: object, keep_checkpoint_max: int = 5, keep_every_n_steps: int = 0,
                 on_save_error: str = "stop", adapter_config: Optional[JsonObject] = None,
                 continue_run: Optional[str] = None, ranks: int = 1, async_save: object = False,
                 manifest: Optional[JsonObject] = None, **kwargs: object):
        self.beside = bool(async_save) and kwargs.get("use_legacy_format", True)
        super().__init__(*args, keep_checkpoint_max=keep_checkpoint_max, async_save=not self.beside and async_save,
                         **kwargs)
        self.manifests = ManifestWriter(manifest, logger)
        self._config._keep_checkpoint_max = 0          # deleting is done here, after saving
        self.keep = max(keep_checkpoint_max, 3 if self.beside else 2) if ranks > 1 else keep_checkpoint_max
        self.every = keep_every_n_steps
        self.stop_on_error = on_save_error == "stop"
        self.adapter_config = adapter_config
        self.saved = True
        self.first_step = self._append_step_num        # steps before this process; now part of cur_step_num
        self._append_step_num = 0
        self._last_triggered_step = self.first_step
        if continue_run:
            self._prefix = continue_run
        self._write: Optional[_Write] = None
        self._newest = ""                              # the file that was begun last
        self._meta: Optional[Tuple[int, int, str]] = None       # what its JSON file will say
        if self.beside:
            thread.watch()
        self._remove_leftovers()

    def _folders(self) -> List[Path]:
        return [Path(str(folder)) for folder in (self._directory, self.network_directory, self.trainable_directory)]

    def _remove_leftovers(self) -> None:
        """Delete what an interrupted save left: MindSpore's *.tmp, the unnamed files of meta.json and of manifests."""
        for folder in self._folders():
            for path in list(folder.iterdir()) if folder.is_dir() else ():
                if not _LEFTOVER.fullmatch(path.name):
                    continue
                logger.info("removing %s, left by an interrupted save.", path)
                with contextlib.suppress(OSError):
                    path.chmod(0o600)
                    path.unlink()

    def step_end(self, run_context: RunContext) -> None:
        """Save if it is time to, after the step is logged."""
        try:
            for entry in run_context.original_args().list_callback or ():
                if hasattr(entry, "before_saving"):
                    entry.before_saving(run_context)
        except TrainingStopped:
            fault = self._finish_write()
            if fault:
                logger.error("%s.", fault)
            raise
        if not thread.writing():
            self._settle()
        super().step_end(run_context)

    def end(self, run_context: RunContext) -> None:
        """Save the last step, and wait until it is written."""
        super().end(run_context)
        self._settle()
        self.manifests.wait()

    def _save_ckpt(self, cb_params: "StepParams", force_to_save: bool = False) -> None:
        super()._save_ckpt(_Shifted(cb_params, self.first_step), force_to_save)

    def save_checkpoint(self, cb_params: "StepParams") -> None:
        """Save everything that resuming needs."""
        self._settle()
        self.saved = False
        values = step_values(cb_params.net_outputs)
        if not np.isfinite(values["loss"]) or not (values["overflow"] or np.isfinite(values.get("global_norm", 0.0))):
            self._last_triggered_step = cb_params.cur_step_num
            logger.error("step %d: no checkpoint is saved, as the loss is %s and the norm %s; earlier ones stay.",
                         cb_params.cur_step_num, values["loss"], values.get("global_norm"))
            return
        self._guarded(super().save_checkpoint, cb_params)

    def save_checkpoint_network(self, cb_params: "StepParams") -> None:
        """Save weights or adapter alone where the recipe says so; then delete what is outdated."""
        if self.saved and self.save_network_params and not self.save_trainable_params:
            self._settle()                             # they are useless without the checkpoint
        if not self.saved:
            return
        self._guarded(super().save_checkpoint_network, cb_params)
        if self.saved and not self.beside:
            self._write_adapter_config()
            self._prune(cb_params.batch_num)

    def _write_adapter_config(self) -> None:
        if self.save_trainable_params and self.adapter_config:
            write_text(Path(self.trainable_directory) / CONFIG_NAME, json.dumps(self.adapter_config) + "\n")

    def remove_redundancy(self, network: object, cur_file: str, append_dict: object, train_network: object) -> None:
        """Write one file (that is what MindFormers' method does), in the background if the recipe says so.

        An adapter whose checkpoint is being written is copied only; `network` is then the list of its parameters.
        """
        if self._write is not None:
            self._write = self._write._replace(adapter=(copy.deepcopy(network), cur_file, append_dict, train_network))
            return
        self._newest = cur_file
        manifest_path(Path(cur_file), False).unlink(missing_ok=True)       # of a file of that name from before
        if not self.beside:
            super().remove_redundancy(network, cur_file, append_dict, train_network)
            return
        self._config._async_save = True                # here only: MindFormers' bookkeeping is for complete files
        try:
            super().remove_redundancy(network, cur_file, append_dict, train_network)
        finally:
            self._config._async_save = False
        thread.sync_behind(cur_file)

    def record_last_ckpt_to_json(self, epoch: int, step: int, ckpt_file: str) -> None:
        """Write meta.json; of a file that is not complete yet, later."""
        if self.beside:
            self._meta = (epoch, step, ckpt_file)
        else:
            super().record_last_ckpt_to_json(epoch, step, ckpt_file)

    def _guarded(self, save: Callable[["StepParams"], object], cb_params: "StepParams") -> None:
        """Run `save`; a failure leaves no half file, and stops the training or not."""
        self._newest, self._meta = "", None
        try:
            save(cb_params)
            if self.beside and self._newest:
                self._write = _Write(self._newest, cb_params, self._meta)
            elif os.path.exists(self._newest):
                thread.sync(self._newest)
                self._complete(self._newest)
            self.saved = True
        except Exception as err:
            # an adapter: its checkpoint is still being written, and what is half of it is no leftover
            self._report(self._finish_write() or self._failure(cb_params, err), err)

    def _settle(self) -> None:
        """Wait for a background write, if there is one; a failure stops the training or not, by setting."""
        fault = self._finish_write()
        if fault:
            self._report(fault, None)

    def _finish_write(self) -> Optional[str]:
        """Wait for a background write; then do what follows a save. Returns why it failed, or None."""
        if self._write is None:
            return None
        write, self._write = self._write, None
        err = thread.take_fault()
        try:
            if err is None:
                if write.meta:
                    super().record_last_ckpt_to_json(*write.meta)
                logger.info("step %d: %s is complete.", write.params.cur_step_num, write.path)
                self._complete(write.path)
                if write.adapter:
                    super().remove_redundancy(*write.adapter)
                    thread.sync(write.adapter[1])
                    self._complete(write.adapter[1])
                    self._write_adapter_config()
        except Exception as fault:
            err = fault
        if err is not None:
            return self._failure(write.params, err)
        self._prune(write.params.batch_num)
        return None

    def _complete(self, path: str) -> None:
        """A file is on disk: its manifest follows, and that of the strategy of this run."""
        file = Path(path)
        kind = "adapter" if file.parent == Path(str(self.trainable_directory)) else (
            "mindspore" if file.parent == Path(str(self.network_directory)) else "training")
        self.manifests.add_strategy(Path(str(self._directory)).parent.parent / "strategy", get_real_rank())
        self.manifests.add(file, kind)

    def _failure(self, cb_params: "StepParams", err: BaseException) -> str:
        """Clean up after a failed save, and say what happened."""
        self.saved = False
        self._remove_leftovers()
        self._last_triggered_step = max(self._last_triggered_step, cb_params.cur_step_num)
        whole = checkpoints(Path(str(self._directory)), get_real_rank())
        return (f"step {cb_params.cur_step_num}: the checkpoint could not be saved in {self._directory}: {err}; "
                + (f"the last complete one is {whole[-1].file(get_real_rank())}" if whole else "there is none yet"))

    def _report(self, text: str, err: Optional[BaseException]) -> None:
        """Stop the training with `text`, or continue, by setting."""
        if self.stop_on_error:
            raise TrainingStopped(f"{text}. Free some space, then resume with the same command and --resume_training "
                                  f"True") from err
        logger.error("%s. Training continues, as on_save_error is 'continue'.", text)

    def _prune(self, steps_per_epoch: int) -> None:
        """Delete outdated checkpoints of this run."""
        rank = get_real_rank()
        for folder in self._folders():
            names = [name for name in checkpoints(folder, rank) if name.stem(rank) == self._prefix]
            for name in outdated(names, self.keep, self.every, steps_per_epoch):
                with contextlib.suppress(OSError):
                    remove_with_manifest(folder / name.file(rank))


MindFormerRegister.register_cls(TelechatCheckpointMonitor, MindFormerModuleType.CALLBACK, alias="CheckpointMonitor")
