"""Training on the device, through the Trainer: steps with given weights and batches, and a resumed run.

Everything up to the training loop is what run_mindformer.py does; for given batches, the loop is replaced.
"""
import contextlib
import copy
import io
import shutil
import tempfile
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import mindspore as ms
import numpy as np
from mindspore import Tensor
from mindspore.train.model import Model

from research.telechat.bridge.compat import forget_context
from research.telechat.checkpoint.strategy import Strategy, full_shape, read_strategy, region, strategy_files
from research.telechat.common.environment import PLUGIN, rank, workers
from research.telechat.common.errors import CheckpointError
from research.telechat.common.files import JsonObject
from research.telechat.doctor.device import Array, TrainRun
from research.telechat.doctor.plan_checks import BROKEN, COLUMNS, initial_value, is_weight
from research.telechat.run.job import run
from research.telechat.training.step import step_values


class _Done(BaseException):
    """Leaves the Trainer after the steps. Not an Exception, so that no `except Exception` on the way catches it."""


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """A temporary folder of this rank, with the parallel context reset to that of a new process."""
    path = Path(tempfile.mkdtemp(prefix="telechat-doctor-"))
    forget_context()
    try:
        yield path
    finally:
        forget_context()
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the recipe that MindFormers prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


@contextlib.contextmanager
def _instead_of_training(loop: Callable[..., None]) -> Iterator[None]:
    kept = Model.train
    Model.train = loop
    try:
        with _quiet():
            yield
    except _Done:
        pass
    finally:
        Model.train = kept


def _strategy(folder: Path) -> Optional[Strategy]:
    """The sharding of the compiled step; None if it is not sharded, or only into stages."""
    try:
        return read_strategy(strategy_files(folder / "output" / "strategy")[0])
    except CheckpointError:
        return None


def _place(strategy: Optional[Strategy], name: str, shape: Sequence[int]) -> Tuple[Tuple[slice, ...], Tuple[int, ...]]:
    """Where a parameter's shard of `shape` lies, and the shape of the whole parameter."""
    if strategy is None or name not in strategy.layouts:
        return tuple(slice(0, size) for size in shape), tuple(shape)
    layout = strategy.layouts[name]
    whole = full_shape(layout, shape)
    return tuple(slice(*ends) for ends in region(layout, rank() % strategy.stage_ranks, whole)), whole


def train(recipe: JsonObject, batches: Sequence[Sequence[Array]], seed: int, broken: bool) -> TrainRun:
    """See device.Device.train."""
    recipe = copy.deepcopy(recipe)
    losses: List[float] = []
    norms: List[float] = []
    overflows: List[bool] = []
    held: Dict[str, Array] = {}
    places: Dict[str, Tuple[slice, ...]] = {}
    with _folder() as folder:
        def given_steps(model: Model, *_args: object, **_kwargs: object) -> None:
            network = model._train_network
            network.set_train()
            cut = ms.get_auto_parallel_context("parallel_mode") in ("semi_auto_parallel", "auto_parallel")
            rows = slice(None)
            if ms.get_auto_parallel_context("parallel_mode") == "data_parallel":
                share = len(batches[0][0]) // workers()
                rows = slice(rank() * share, (rank() + 1) * share)
            if cut:
                network.compile(*(Tensor(column) for column in batches[0]))
            strategy = _strategy(folder) if cut else None
            weights = [one for one in network.get_parameters() if is_weight(one.name)]
            for parameter in weights:
                places[parameter.name], whole = _place(strategy, parameter.name, parameter.shape)
                value = initial_value(parameter.name, whole, seed)
                if broken and parameter.name == BROKEN:
                    value[0] = np.inf
                parameter.set_data(Tensor(np.ascontiguousarray(value[places[parameter.name]]), parameter.dtype))
            for batch in batches:
                values = step_values(network(*(Tensor(column[rows]) for column in batch)))
                losses.append(float(values["loss"]))
                norms.append(float(values.get("global_norm", float("nan"))))
                overflows.append(bool(values["overflow"]))
            held.update({one.name: one.float().asnumpy() for one in weights})
            raise _Done

        with _instead_of_training(given_steps):
            data = write_records(folder / "records.mindrecord", [np.concatenate([one, one]) for one in batches[0]])
            run(recipe, {"run_mode": "finetune", "train_dataset.data_loader.dataset_dir": str(data),
                         "train_dataset.num_parallel_workers": 1, "load_checkpoint": "",
                         "output_dir": str(folder / "output"), "runner_config.sink_mode": False},
                register_path=str(PLUGIN))
    return TrainRun(losses, norms, held, places, overflows)


def resume(recipe: JsonObject, records: Array) -> Tuple[Dict[str, Array], Dict[str, Array]]:
    """See device.Device.resume."""
    recipe = copy.deepcopy(recipe)
    recipe["callbacks"] = [{"type": "TelechatTrainingLog"}, {
        "type": "CheckpointMonitor", "prefix": "doctor", "save_checkpoint_steps": 1, "keep_checkpoint_max": 9,
        "integrated_save": False, "async_save": False}]
    results = []
    with _folder() as folder:
        data = write_records(folder / "records.mindrecord", [records, records])
        common = {"run_mode": "finetune", "train_dataset.data_loader.dataset_dir": str(data),
                  "train_dataset.data_loader.shuffle": False, "train_dataset.num_parallel_workers": 1,
                  "runner_config.epochs": 1, "runner_config.batch_size": 1, "runner_config.sink_mode": False,
                  "check_free_disk": False}
        half = {"load_checkpoint": str(folder / "whole" / "checkpoint"),
                "resume_training": f"doctor_rank_0-1_{len(records) // 2}.ckpt"}
        for name, more in (("whole", {"load_checkpoint": ""}), ("resumed", half)):
            forget_context()
            with _quiet():
                run(copy.deepcopy(recipe), {**common, **more, "output_dir": str(folder / name)},
                    register_path=str(PLUGIN))
            last = folder / name / "checkpoint" / "rank_0" / f"doctor_rank_0-1_{len(records)}.ckpt"
            results.append({key: value.float().asnumpy() for key, value in ms.load_checkpoint(str(last)).items()
                            if is_weight(key) or key.startswith("adam_")})
    return results[0], results[1]


def write_records(path: Path, columns: Sequence[Array]) -> Path:
    """A MindRecord file of input_ids, labels and, if there are three, ends of documents, [records, ...] each."""
    from mindspore.mindrecord import FileWriter
    writer = FileWriter(str(path), 1, overwrite=True)
    names = COLUMNS[:len(columns)]
    writer.add_schema({name: {"type": "int32", "shape": [-1]} for name in names}, "made up")
    writer.write_raw_data([dict(zip(names, row)) for row in zip(*(one.astype(np.int32) for one in columns))])
    writer.commit()
    return path
