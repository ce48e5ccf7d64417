"""The plugin outside its repository: what a user has (a vocabulary, conversations, official weights), and the
commands run on it in a process of their own, where nothing of this repository is on the path."""
import json
import os
import subprocess
from pathlib import Path
from typing import List, NamedTuple, Sequence

from checkpoint_fixtures import assert_same, read_safetensors

from scripts import quickstart

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48, "vocab_size": 2000}
MODEL = "telechat_12b"
# of run_mindformer.py, on top of finetune_telechat_tiny_cpu.yaml and predict_telechat_tiny_cpu.yaml
KEYS = [word for key, value in SIZES.items() for word in (f"--model.model_config.{key}", str(value))]
STEPS = 2


class Inputs(NamedTuple):
    """Files for the commands."""
    tokenizer: Path
    conversations: Path
    official: Path


def make_inputs(folder: Path) -> Inputs:
    """A trained vocabulary, the first example conversations, and a checkpoint in the official form."""
    official, tokenizer = folder / "official", folder / "tokenizer"
    for each in (official, tokenizer):
        each.mkdir(parents=True)
    quickstart.train_tokenizer(tokenizer, SIZES["vocab_size"])
    quickstart.write_official_checkpoint(official, SIZES)
    records = list(quickstart.conversations())[:40]
    (folder / "talks.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records), encoding="utf-8")
    return Inputs(tokenizer / "tokenizer.model", folder / "talks.jsonl", official)


def run(words: Sequence[str], cwd: Path, stdin: str = "") -> str:
    """stdout of a command that must succeed, without the variables by which this repository could be found."""
    names = ("PYTHONPATH", "REGISTER_PATH", "RUN_MODE", "LOG_MF_PATH")
    env = {key: value for key, value in os.environ.items() if key not in names}
    done = subprocess.run([str(word) for word in words], cwd=cwd, text=True, capture_output=True, input=stdin,
                          env={**env, "GLOG_v": "3"}, check=False, timeout=600)
    assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    assert str(ROOT) not in done.stderr, done.stderr
    return done.stdout


def preprocess_options(inputs: Inputs, output: Path) -> List[str]:
    """Of telechat_preprocess.py, for the sequence length of the tiny recipes."""
    return ["--input_dataset_file", str(inputs.conversations), "--output_path", str(output),
            "--vocab_file_path", str(inputs.tokenizer), "--max_length", "128"]


def finetune_options(dataset: Path, checkpoint: Path, output: Path) -> List[str]:
    """Of run_mindformer.py and run_telechat.py, for STEPS steps of the tiny recipe."""
    return [*KEYS, "--train_dataset", str(dataset), "--load_checkpoint", str(checkpoint), "--output_dir", str(output),
            "--runner_config.epochs", "1", "--train_dataset.data_loader.num_samples", str(STEPS * 4)]


def check_dataset(folder: Path) -> None:
    """The folder holds as many sequences as two steps need."""
    assert json.loads((folder / "meta.json").read_text(encoding="utf-8"))["records"] >= STEPS * 4


def check_round_trip(inputs: Inputs, back: Path) -> None:
    """The checkpoint that was converted to MindSpore and back is the official one, bit by bit."""
    assert_same(read_safetensors(*back.glob("*.safetensors")), read_safetensors(inputs.official / "model.safetensors"))


def check_training(output: Path) -> Path:
    """The training took STEPS steps; its last checkpoint."""
    log = (output / "training_log.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in log] == list(range(1, STEPS + 1))
    return quickstart.last_checkpoint(output)
