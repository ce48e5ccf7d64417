"""The real model's steps on the CPU, in float32, with given weights and batches: the reference of the unsharded graph.

`real_steps` starts this file in its own process, as MindSpore uses one device per process. The step is the one that
run_mindformer.py would train with; only the training loop is replaced.
"""
import contextlib
import copy
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Callable, Dict, List, Sequence, Tuple

import numpy as np

if __package__ in (None, ""):            # run by path: keep this folder off sys.path, its modules are no top-level ones
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from research.telechat.common.environment import PLUGIN
from research.telechat.common.errors import ExecutionError
from research.telechat.common.files import JsonObject

LIMIT = 5e-5                             # relative to the largest change of a parameter: float32 against float64
Runner = Callable[[List[str], Path, Dict[str, str]], "subprocess.CompletedProcess[str]"]


def for_cpu(whole: JsonObject) -> JsonObject:
    """An unsharded recipe for a CPU: float32, composed attention, no recomputation."""
    recipe = copy.deepcopy(whole)
    recipe["context"] = {**recipe["context"], "device_target": "CPU", "max_device_memory": "1024GB"}
    recipe["runner_config"]["sink_mode"] = False
    recipe["recompute_config"] = {"recompute": False, "recompute_slice_activation": False}
    recipe["runner_wrapper"]["type"] = "TelechatTrainOneStepCell"
    recipe["optimizer"].pop("master_weights", None)
    recipe["model"]["model_config"].update(
        amp_level="O0", compute_dtype="float32", param_init_type="float32", res_dtype="float32",
        use_flash_attention=False)
    return recipe


def _run(words: List[str], folder: Path, env: Dict[str, str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, *words], cwd=folder, env={**os.environ, **env}, capture_output=True,
                          text=True, check=False)


def real_steps(whole: JsonObject, weights: Dict[str, np.ndarray], batches: Sequence[Sequence[np.ndarray]],
               run: Runner = _run) -> Tuple[List[float], Dict[str, np.ndarray]]:
    """Losses and the parameters after one step per batch.

    Args:
        whole: the unsharded recipe (shrink.uncut).
        weights: of the whole model, including moments.
        batches: tokens, labels, and ends of documents.
        run: starts Python with a script and its arguments, in a folder and with additional variables.

    Raises:
        ExecutionError: the process fails; the end of its output is in the message.
    """
    with tempfile.TemporaryDirectory(prefix="telechat-cpu-") as name:
        folder = Path(name)
        arrays = {f"{step}.{place}": array for step, batch in enumerate(batches) for place, array in enumerate(batch)}
        np.savez(folder / "weights.npz", **weights)
        np.savez(folder / "batches.npz", **arrays)
        columns = ["input_ids", "labels", "actual_seq_len"][:len(batches[0])]
        job = {"folder": name, "recipe": for_cpu(whole), "rows": len(batches[0][0]), "length": batches[0][0].shape[1],
               "columns": columns, "steps": len(batches)}
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        done = run([str(Path(__file__).resolve()), str(folder / "job.json")], folder,
                   {"LOG_MF_PATH": str(folder / "log"), "GLOG_v": "3", "OMP_NUM_THREADS": "1"})
        result = folder / "result.npz"
        if not result.is_file():
            said = (done.stderr or done.stdout).strip().splitlines() or ["nothing"]
            raise ExecutionError(f"the step on the CPU failed; its last output: {said[-1][:300]}")
        with np.load(result) as found:
            values = dict(found)
    return [float(value) for value in values.pop("__losses")], values


class _Done(BaseException):
    """Leaves the Trainer after the steps. Not an Exception, so that no `except Exception` on the way catches it."""


def _steps(job: JsonObject) -> None:
    from mindspore import Tensor
    from mindspore.train.model import Model

    from research.telechat.ascend_sim.worker import make_dataset
    from research.telechat.run.job import run
    folder = Path(job["folder"])

    def given_steps(model: Model, *_args: object, **_kwargs: object) -> None:
        network = model._train_network
        network.set_train()
        parameters = {parameter.name: parameter for parameter in network.get_parameters()}
        weights = dict(np.load(folder / "weights.npz"))
        for name, value in weights.items():
            if name in parameters:
                own = parameters[name].asnumpy()
                parameters[name].set_data(Tensor(value.reshape(own.shape).astype(own.dtype)))
        batches, losses = np.load(folder / "batches.npz"), []
        for step in range(job["steps"]):
            results = network(*(Tensor(batches[f"{step}.{place}"]) for place in range(len(job["columns"]))))
            losses.append(float(results[0].asnumpy()))
        found = {name: parameters[name].asnumpy() for name in weights if name in parameters}
        np.savez(folder / "beside.npz", __losses=np.array(losses), **found)
        os.replace(folder / "beside.npz", folder / "result.npz")
        raise _Done

    Model.train = given_steps
    recipe = job["recipe"]
    data = make_dataset(folder, job["columns"], job["length"], job["rows"])
    run(recipe, {"run_mode": "finetune", "train_dataset.data_loader.dataset_dir": str(data), "load_checkpoint": "",
                 "train_dataset.input_columns": job["columns"], "output_dir": str(folder / "output"),
                 "use_parallel": False}, register_path=str(PLUGIN))


def main() -> None:
    """Run the job in the given file."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    with contextlib.suppress(_Done):
        _steps(job)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
