"""The process that compiles one plan for one rank: run_mindformer.py's own path up to the first step, then compile.

compile.py starts it in the simulated environment with a job file (JSON) as its only argument and reads the report that
it writes. Nothing of MindFormers is rebuilt here: its Trainer makes data set, network, optimizer and step; only the
training loop is replaced by "compile for the first batch and leave", and shortcuts.py leaves out what no graph shows.
"""
import json
import os
import resource
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):            # run by its path: not from this folder, whose modules have one name only
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from research.telechat.common.environment import PLUGIN
from research.telechat.common.files import JsonObject

if TYPE_CHECKING:
    from mindspore.dataset import Dataset
    from mindspore.nn import Cell
    from mindspore.train.model import Model


class _Compiled(BaseException):
    """Leaves the Trainer after compiling. No Exception, so that no `except Exception` on the way stops it."""


class Report:
    """What the process found out, written as JSON when it ends."""

    def __init__(self, path: Path):
        self.path = path
        self.data: JsonObject = {"ok": False, "seconds": {}, "graphs": {}}
        self._started = time.time()

    def timed(self, name: str, since: float) -> None:
        """Note the seconds from `since` until now."""
        self.data["seconds"][name] = round(time.time() - since, 1)

    def save(self) -> None:
        """Write it to a temporary file and rename it."""
        self.timed("total", self._started)
        self.data["compiler_memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps(self.data), encoding="utf-8")
        os.replace(beside, self.path)


def make_dataset(folder: Path, columns: list, length: int, rows: int) -> Path:
    """A MindRecord file with `rows` equal rows of `length` tokens in every column: it is only compiled for."""
    import numpy as np
    from mindspore.mindrecord import FileWriter
    path = folder / "made_up.mindrecord"
    writer = FileWriter(str(path), 1, overwrite=True)
    writer.add_schema({column: {"type": "int32", "shape": [-1]} for column in columns}, "made up, to compile with")
    tokens = (np.arange(length) % 7 + 4).astype(np.int32)
    ends = np.full(length, length - 1, np.int32)
    row = {column: ends if column == "actual_seq_len" else tokens for column in columns}
    for start in range(0, rows, 64):
        writer.write_raw_data([row] * min(64, rows - start))
    writer.commit()
    return path


def save_graph(network: "Cell", folder: Path, name: str, report: Report) -> None:
    """Write the compiled graph of `network` as MindIR; much cheaper than MindSpore's own dumps."""
    from mindspore.common.api import _cell_graph_executor
    key = f"{network.phase}.{network.create_time}.{id(network)}.{network.arguments_key}"
    data = _cell_graph_executor._get_func_graph_proto(network, key, "mind_ir")
    if not data:
        raise RuntimeError(f"MindSpore has no graph under the key {key}")
    path = folder / f"{name}.mindir"
    path.write_bytes(data)
    report.data["graphs"][name] = str(path)


def compile_training(job: JsonObject, report: Report) -> None:
    """Everything up to Model.train, then compile the step for the first batch."""
    started = time.time()
    from mindspore.train.model import Model

    from research.telechat.run.job import run
    report.timed("import", started)
    folder = Path(job["folder"])
    built = time.time()

    def compile_only(model: "Model", _epochs: int, train_dataset: "Dataset", *_args: object, **_kwargs: object) -> None:
        report.timed("build", built)
        batch = next(train_dataset.create_tuple_iterator(num_epochs=1))
        network = model._train_network
        network.set_train()
        begin = time.time()
        network.compile(*batch)
        report.timed("compile", begin)
        save_graph(network, folder, "step", report)
        raise _Compiled

    Model.train = compile_only
    recipe = job["recipe"]
    recipe["train_dataset"]["num_parallel_workers"] = 1                  # there may be fewer processors here
    data = make_dataset(folder, job["columns"], job["length"], job["rows"])
    run(recipe, {"run_mode": "finetune", "train_dataset.data_loader.dataset_dir": str(data), "load_checkpoint": "",
                 "output_dir": str(folder / "output"), "use_parallel": job["ranks"] > 1,
                 "check_free_disk": False,                               # no checkpoint is written
                 "runner_config.sink_mode": False}, register_path=str(PLUGIN))


def compile_prediction(job: JsonObject, report: Report) -> None:
    """Build the model as for prediction and compile reading a prompt and bringing one token."""
    started = time.time()
    import mindspore as ms
    import numpy as np
    from mindformers.core.context import build_context
    from mindformers.core.parallel_config import build_parallel_config
    from mindformers.models import build_network
    from mindformers.tools.register import MindFormerConfig
    from mindspore import Tensor

    from research.telechat.bridge.compat import set_output_path
    from research.telechat.run import job as run_job
    report.timed("import", started)
    folder = Path(job["folder"])
    config = MindFormerConfig(**job["recipe"])
    config.use_parallel = job["ranks"] > 1
    config.output_dir = str(folder / "output")
    run_job.forget_auto_register(config)
    set_output_path(config.output_dir)
    begin = time.time()
    build_context(config)
    build_parallel_config(config)
    config.model.model_config.parallel_config = config.parallel_config
    config.model.model_config.checkpoint_name_or_path = ""
    network = build_network(config.model, default_args={"parallel_config": config.parallel_config,
                                                        "moe_config": config.moe_config})
    network.set_train(False)
    report.timed("build", begin)
    sizes = network.config
    begin = time.time()
    for name, length in (("prefill", 32), ("decode", 1)):
        first = name == "prefill"
        if sizes.use_past:
            network.add_flags_custom(is_first_iteration=first)
            if sizes.is_dynamic:
                network.set_dynamic_inputs()
        elif not first:
            break
        network.phase = "prefill" if first else "increment"
        inputs = list(network.prepare_inputs_for_predict_layout(np.ones((sizes.batch_size, length), np.int32)))
        if sizes.use_past:                       # block tables as long as a sequence may become
            blocks = -(-sizes.seq_length // sizes.block_size)
            inputs[10] = Tensor(np.zeros((sizes.batch_size, blocks)), ms.int32)
        if not first:
            inputs[0] = Tensor(np.ones((sizes.batch_size, 1)), ms.int32)
        network.compile(*inputs)
        save_graph(network, folder, name, report)
    report.timed("compile", begin)
    raise _Compiled


def main() -> None:
    """Compile, write the report, and leave without tearing down a device that does not exist."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    report = Report(Path(job["report"]))
    try:
        import mindformers
        import mindspore
        report.data["versions"] = {"mindspore": mindspore.__version__, "mindformers": mindformers.__version__}
        from research.telechat.ascend_sim import shortcuts
        shortcuts.leave_out_random_numbers()
        if not job.get("all_stages", True):
            shortcuts.leave_out_other_stages()
        (compile_prediction if job["recipe"].get("run_mode") == "predict" else compile_training)(job, report)
    except _Compiled:
        report.data["ok"] = True
    except BaseException as error:
        report.data["error"] = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    report.save()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if report.data["ok"] else 1)


if __name__ == "__main__":
    main()
