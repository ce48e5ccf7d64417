"""Small trainings through run_mindformer.py: records, the command, and the ways to run it."""
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import prepared

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "research/telechat/finetune_telechat_tiny_cpu.yaml"
SEQ, VOCAB, BATCH = 32, 200, 2
SIZES = ["--model.model_config.seq_length", str(SEQ), "--model.model_config.vocab_size", str(VOCAB),
         "--model.model_config.num_layers", "2", "--model.model_config.hidden_size", "64",
         "--model.model_config.intermediate_size", "96", "--model.model_config.num_heads", "4",
         "--train_dataset.data_loader.shuffle", "False", "--batch_size", str(BATCH)]


def write_records(path, rows, labels=None):
    """A MindRecord file with input_ids `rows` [records, N + 1] and `labels`, without which they are the same."""
    from mindspore.mindrecord import FileWriter
    writer = FileWriter(str(path), 1, overwrite=True)
    writer.add_schema({"input_ids": {"type": "int32", "shape": [-1]}, "labels": {"type": "int32", "shape": [-1]}}, "t")
    labels = rows if labels is None else labels
    writer.write_raw_data([{"input_ids": row, "labels": label}
                           for row, label in zip(rows.astype(np.int32), labels.astype(np.int32))])
    writer.commit()
    return path


def read_log(folder):
    return [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]


def command(dataset, output, *more):
    return ["--config", RECIPE, "--register_path", "research/telechat", "--train_dataset", str(dataset),
            "--output_dir", str(output), *SIZES, *more]


def run_new(arguments, cwd=ROOT, script="run_mindformer.py"):
    """run_mindformer.py in an interpreter of its own; its exit code must be 0. For what others are compared with."""
    done = subprocess.run([sys.executable, str(ROOT / script), *arguments], cwd=cwd, text=True, capture_output=True,
                          env={**os.environ, "GLOG_v": "3"}, check=False, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def kept_graph(folder, arguments):
    """The environment of a training that takes its compiled graph from `folder` if one was there that differed in no
    more than where it wrote, whether it resumed, and its callbacks; it keeps it there for the next one.

    MindSpore does not ask whether a kept graph is the right one. So where trainings are compared, the one at the end
    must compile for itself: what a graph with the wrong constants would change, its numbers show.
    """
    words = [word for name, word in zip(["", *arguments], arguments)
             if not {name, word} & {"--output_dir", "--resume_training", "--callbacks"}]
    key = hashlib.sha256("\0".join(words).encode()).hexdigest()[:16]
    return {"MS_COMPILER_CACHE_ENABLE": "1", "MS_COMPILER_CACHE_PATH": f"{folder}/{key}"}


def run(arguments, script="run_mindformer.py", code=0, graphs=None, **env):
    """run_mindformer.py in a process that has its packages already (prepared.py); it must end with `code`. graphs:
    folder for its compiled graph, see kept_graph."""
    kept = kept_graph(graphs, arguments) if graphs else {}
    done = prepared.run([ROOT / script, *arguments], env={"GLOG_v": "3", **kept, **env})
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def run_on_full_disk(arguments, limit, graphs=None):
    """run_mindformer.py where no file may exceed `limit` bytes, as on a disk that fills up in the middle.
    graphs: see kept_graph."""
    kept = kept_graph(graphs, arguments) if graphs else {}
    return prepared.run([ROOT / "run_mindformer.py", *arguments], env={"GLOG_v": "3", **kept}, limit=limit)


def run_killed(what, number, arguments, graphs=None):
    """run_mindformer.py, which kill_driver.py must have killed at the `number`th `what`. graphs: see kept_graph."""
    run([what, str(number), *arguments], script="tests/support/kill_driver.py", code=-signal.SIGKILL,
        **(kept_graph(graphs, arguments) if graphs else {}))


def run_two(arguments, logs, script="run_mindformer.py", before=(), **env):
    """The launcher with two processes of run_mindformer.py; before: what starts the launcher."""
    words = ["python", str(ROOT / script), *(f"'{word}'" if " " in word else word for word in arguments)]
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    return subprocess.run(
        [*before, "bash", str(ROOT / "scripts/msrun_launcher.sh"), " ".join(words), "2", str(port), str(logs), "True",
         "300"], cwd=ROOT, text=True, capture_output=True, check=False, timeout=800,
        env={**os.environ, "GLOG_v": "3", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
             "PYTHONPATH": f"{ROOT / 'tests/support/without_torch'}:{os.environ.get('PYTHONPATH', '')}", **env})


DROPOUT = [word for name in ("embed", "hidden", "attention")
           for word in (f"--model.model_config.{name}_dropout_prob", "0.1")]
