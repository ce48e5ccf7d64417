"""Every command of README.md does what it says: run as it stands, in one folder, on tiny models and on the CPU.

A command changes in three ways only: placeholders become names of this test's files, sizes and device are set behind
it, as users set keys of a recipe, and questions are fewer where a benchmark has thousands. What needs a cluster is
planned by test_readme.py, and what another test runs already is named in ELSEWHERE. A command in none of these, or in
two, fails here. The first command of each program starts Python as a user does; later ones are forked from a process
that has MindSpore imported (prepared.py).
"""
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Sequence

import numpy as np
import prepared
import pytest
import reference
from checkpoint_fixtures import (
    assert_same,
    from_floats,
    mindspore_tensors,
    read_safetensors,
    small_variant,
    write_official,
)
from convert_fixtures import read_ckpt
from evaluation_fixtures import PUBLISHED, needs_harness, write_published
from model_fixtures import random_official
from preprocess_fixtures import read_records
from readme_fixtures import ALL, ROOT
from vocab_fixtures import train_families

from research.telechat.checkpoint.lora import read_adapter
from research.telechat.common.printable import printable
from research.telechat.data.meta import read_meta
from research.telechat.spec.hf_config import hf_config
from research.telechat.text.renderer import Renderer, get_template
from research.telechat.text.vocab import Vocab

PLANNED = ("bash scripts/msrun_launcher.sh ", "python scripts/supervise.py ")        # test_readme.py
ELSEWHERE = {                     # how a command begins: the test that runs the like
    "bash scripts/quickstart.sh": "tests/repository/test_scripts.py::test_quickstart_starts_in_the_environment",
    "bash scripts/run_tests.sh": "tests/repository/test_scripts.py::test_run_tests_reports_lint_and_tests",
    "python scripts/transform_checkpoint.py":
        "tests/checkpoint/test_transform_checkpoint.py::test_eight_ranks_to_one_to_four",
    "python scripts/doctor.py": "tests/doctor/test_doctor_command.py::test_a_file_to_attach_to_an_issue",
    "python scripts/serve.py": "tests/serve/test_server.py::test_answers_equal_those_of_the_model_alone",
    "pip install": "tests/repository/test_readme.py::test_command_has_known_options_and_files",
}
SIZES = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48, "vocab_size": 600}
ON_CPU = [*(word for key, value in {**SIZES, "use_flash_attention": False, "compute_dtype": "float32",
                                    "param_init_type": "float32", "res_dtype": "float32"}.items()
            for word in (f"--model.model_config.{key}", str(value))),
          "--context.device_target", "CPU", "--context.max_device_memory", "1024GB"]
PREDICT = [*ON_CPU, "--model.model_config.num_blocks", "16", "--model.model_config.max_decode_length", "48"]
QUESTION = "生抽与老抽的区别？"


class Run(NamedTuple):
    """How a command of the README is run, and what must have come of it."""

    words: Sequence[str]                         # that the command has, and no other one
    check: Callable[["Place", str], None]        # of what it printed and wrote
    change: Dict[str, str]                       # placeholders, and their values
    more: Sequence[str]                          # options behind it
    needs: Sequence[str]                         # runs before it
    stdin: str


RUNS: Dict[str, Run] = {}


def runs(*words: str, change: Any = None, more: Sequence[str] = (), needs: Sequence[str] = (), stdin: str = ""
         ) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The check that follows is of the command with these words."""
    def enter(check: Callable[..., None]) -> Callable[..., None]:
        RUNS[check.__name__] = Run(words, check, change or {}, more, needs, stdin)
        return check
    return enter


class Place:
    """A folder that looks like the root of the repository, with small models; each command is run there once."""

    def __init__(self, root: Path):
        self.root, self.path, self.done, self.started = root, root / "path/to", set(), set()
        self.path.mkdir(parents=True)
        for name in ("research", "scripts", "configs", "examples", "run_mindformer.py"):
            (root / name).symlink_to(ROOT / name)
        shutil.copy(ROOT / "examples/conversations.jsonl", root / "multi_turn_example.jsonl")
        self.programs = {}
        for kind in ("new", "forked"):
            self.programs[kind] = root / f"programs_{kind}/python"
            self.programs[kind].parent.mkdir()
        self.programs["new"].write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
        self.programs["new"].chmod(0o755)
        prepared.put_python(self.programs["forked"])
        self.vocab_files = train_families(self.path)
        self.models = {name: self.model(name) for name in ("telechat_7b", "telechat_12b", "telechat_52b",
                                                           "telechat2_7b")}
        for name in ("telechat_7b", "telechat2_7b"):              # as 12B, the README says
            command = of_words(["torch_to_ms", "telechat_12b"]).replace("TORCH_CKPT_DIR", name)
            self.call(command.replace("telechat_12b", name))
        write_published(root / "questions", solved=5)             # as many as those data sets have
        (root / "output/msrun_log").mkdir(parents=True)
        for rank, line in enumerate(("RuntimeError: Connection to peer rank 1 is lost", "ValueError: no column")):
            (root / f"output/msrun_log/worker_{rank}.log").write_text(
                f"2026-01-02 10:00:0{9 - rank},000 - mindformers - INFO - step 4\nTraceback (most recent call last):\n"
                f'  File "run.py", line 9, in step\n{line}\n')

    def model(self, name: str) -> Any:
        """(variant, official config, float weights, the same as written) of the small model in the folder `name`."""
        variant = small_variant(name, heads=4, head_dim=8, ffn=48, vocab=600)
        config = hf_config(variant)
        raw = {key: from_floats("F16", value) for key, value in random_official(config).items()}
        write_official(self.root / name, variant, raw, shards=2)
        return variant, config, {key: value.bits.view(np.float16).astype(np.float32) for key, value in raw.items()}, raw

    def call(self, command: str, stdin: str = "") -> str:
        """What a command prints; its exit code must be 0."""
        program = command.split()[1]
        kind = "forked" if program in self.started else "new"
        self.started.add(program)
        path = f"{self.programs[kind].parent}:{os.environ['PATH']}"
        env = {**os.environ, "PATH": path, "GLOG_v": "3", "HF_HUB_OFFLINE": "1"}
        if kind == "new" and "evaluate" not in command:                 # which is what needs torch
            env["PYTHONPATH"] = str(ROOT / "tests/support/without_torch")
        done = subprocess.run(["bash", "-c", command], cwd=self.root, text=True, capture_output=True, check=False,
                              timeout=600, input=stdin, env=env)
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        assert "Traceback" not in done.stderr
        return done.stdout

    def run(self, name: str) -> None:
        """Run and check what `name` needs, and then the command itself."""
        if name in self.done:
            return
        run = RUNS[name]
        for need in run.needs:
            self.run(need)
        command = of_words(run.words)
        for old, new in run.change.items():
            assert old in command, f"{command} has no {old}"
            command = command.replace(old, new)
        run.check(self, self.call(" ".join([command, *map(shlex.quote, run.more)]), run.stdin))
        self.done.add(name)

    def answer(self, name: str, family: str, count: int = 12) -> str:
        """The beginning of the likeliest answer to QUESTION under the model's published penalty of repetition, from the
        official formulas in NumPy."""
        variant, config, weights, _ = self.models[name]
        vocab = Vocab.load(self.vocab_files[family])
        template = get_template("telechat2" if family == "telechat2" else "telechat")
        ids = start = Renderer(template, vocab).prompt([{"role": "user", "content": QUESTION}])
        for _ in range(count):
            logits = reference.forward(config, weights, np.array([ids]))[0][0, -1]
            seen, penalty = np.unique(ids), variant.repetition_penalty
            logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
            ids = [*ids, int(logits.argmax())]
        return vocab.decode(ids[len(start):])


def of_words(words: Sequence[str]) -> str:
    """The only command of the README with all of `words`."""
    found = [command for command in ALL if all(word in command for word in words)]
    assert len(found) == 1, f"{words} stand in {len(found)} commands of README.md: {found}"
    return found[0]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("readme"))


# ---- conversion


@runs("torch_to_ms", "telechat_12b", change={"TORCH_CKPT_DIR": "telechat_12b"})
def converts_12b(place, said):
    variant, _, _, raw = place.models["telechat_12b"]
    assert_same(read_ckpt(place.path / "telechat_12b.ckpt"), mindspore_tensors(variant, raw))


@runs("torch_to_ms", "telechat_52b", "--mp 8", change={"TORCH_CKPT_DIR": "telechat_52b"})
def converts_52b(place, said):
    variant, _, _, raw = place.models["telechat_52b"]
    assert_same(read_ckpt(place.path / "telechat_52b.ckpt"), mindspore_tensors(variant, raw))


@runs("ms_to_torch", "telechat_12b", change={"path/to/telechat_12b_export": "back"}, more=["--config", "telechat_12b"],
      needs=["converts_12b"])
def converts_12b_back(place, said):
    assert_same(read_safetensors(*(place.root / "back").glob("*.safetensors")), place.models["telechat_12b"][3])
    assert json.loads((place.root / "back/config.json").read_text()) == place.models["telechat_12b"][1]


# ---- data


def check_data(place, name, family, length, template):
    """Records of the length that was asked for, which hold every answer of the example."""
    folder = place.path / name
    meta = read_meta(folder)
    assert (meta["seq_length"], meta["template"]) == (length, template)
    records, vocab = read_records(folder), Vocab.load(place.vocab_files[family])
    assert records and all(len(record["input_ids"]) == length + 1 for record in records)
    text = "".join(vocab.decode(record["input_ids"].tolist()) for record in records)
    lines = (place.root / "multi_turn_example.jsonl").read_text(encoding="utf-8").splitlines()
    assert all(json.loads(line)["output"] in text for line in lines)


def data_of(name, family, suffix):
    return {"path/to/dataset_dir": f"path/to/data_{name}", f"path/to/tokenizer.{suffix}": f"path/to/{family}.{suffix}"}


@runs("telechat_preprocess.py", "tokenizer.json", change=data_of("7b", "7b", "json"))
def prepares_7b(place, said):
    check_data(place, "data_7b", "7b", 2048, "telechat")


@runs("telechat_preprocess.py", "--max_length 1024", change=data_of("12b", "12b", "model"))
def prepares_12b(place, said):
    check_data(place, "data_12b", "12b", 1024, "telechat")


@runs("telechat_preprocess.py", "<reserve3>", change=data_of("52b", "52b", "model"))
def prepares_52b(place, said):
    check_data(place, "data_52b", "52b", 4096, "telechat_52b")


@runs("telechat_preprocess.py", "--max_length 8192", change=data_of("telechat2", "telechat2", "model"))
def prepares_telechat2(place, said):
    check_data(place, "data_telechat2", "telechat2", 8192, "telechat2")


# ---- prediction and chat


def check_answer(place, said, name, family):
    answer = re.search(r"^answer: (.*)", said, flags=re.MULTILINE | re.DOTALL)[1]
    assert answer.startswith(printable(place.answer(name, family)).strip()[:-3])


@runs("predict_telechat_7b.yaml", change={"path/to/tokenizer.json": "path/to/7b.json"}, more=PREDICT)
def predicts_7b(place, said):
    check_answer(place, said, "telechat_7b", "7b")


@runs("predict_telechat_12b.yaml", "run_mindformer", change={"path/to/tokenizer.model": "path/to/12b.model"},
      more=PREDICT, needs=["converts_12b"])
def predicts_12b(place, said):
    check_answer(place, said, "telechat_12b", "12b")


@runs("predict_telechat2_7b.yaml", change={"path/to/tokenizer.model": "path/to/telechat2.model"},
      more=[*PREDICT, "--model.model_config.max_decode_length", "190"])       # the system prompt is long
def predicts_telechat2_7b(place, said):
    check_answer(place, said, "telechat2_7b", "telechat2")


@runs("--input_file", change={"path/to/tokenizer.model": "path/to/12b.model"},
      more=[*PREDICT, "--max_new_tokens", "16"], needs=["converts_12b"])
def answers_a_file(place, said):
    lines = [json.loads(line) for line in (place.root / "output/telechat_predict.jsonl").read_text(
        encoding="utf-8").splitlines()]
    questions = (place.root / "examples/input.json").read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(questions) and all(line["new_tokens"] <= 16 for line in lines)
    assert lines[0]["output"].startswith(place.answer("telechat_12b", "12b")[:-3])


@runs("--interactive", change={"path/to/tokenizer.model": "path/to/12b.model"},
      more=[*PREDICT, "--max_new_tokens", "16"], needs=["converts_12b"], stdin=f"{QUESTION}\n/history\n/exit\n")
def chats(place, said):
    assert f"user: {QUESTION}" in said
    assert printable(place.answer("telechat_12b", "12b"))[:-3] in said


# ---- LoRA


ADAPTER = "output/checkpoint_trainable/rank_0/adapter.ckpt"


@runs("telechat_7b_lora.yaml", change={"path/to/dataset_dir": "path/to/data_7b"}, needs=["prepares_7b"],
      more=[*ON_CPU, "--epochs", "1", "--num_samples", "2", "--batch_size", "1"])
def tunes_an_adapter(place, said):
    log = [json.loads(line) for line in (place.root / "output/training_log.jsonl").read_text().splitlines()]
    assert len(log) == 2 and all(np.isfinite(row["loss"]) and row["global_norm"] > 0 for row in log)
    saved = list((place.root / ADAPTER).parent.glob("*.ckpt"))
    assert len(saved) == 1
    saved[0].rename(place.root / ADAPTER)
    pairs = read_adapter(place.root / ADAPTER).pairs
    assert len(pairs) == 6 and all(np.abs(b).max() > 0 for _, b in pairs.values())


@runs("merge_lora.py", change={"path/to/adapter.ckpt": ADAPTER}, needs=["tunes_an_adapter"])
def merges_the_adapter(place, said):
    """What is adapted is the sum, and the rest is as it was, bit for bit."""
    base, merged = (read_ckpt(place.path / name) for name in ("telechat_7b.ckpt", "merged.ckpt"))
    adapter = read_adapter(place.root / ADAPTER)
    for name, (a, b) in adapter.pairs.items():
        weight, result = (file.pop(name).bits.view(np.float16).astype(np.float32) for file in (base, merged))
        np.testing.assert_allclose(result, weight + adapter.alpha / adapter.rank * b @ a, rtol=2e-3, atol=1e-6)
    assert_same(merged, base)


@runs("convert_lora.py", "export", change={"path/to/adapter.ckpt": ADAPTER}, more=["--config", "telechat_7b"],
      needs=["tunes_an_adapter"])
def exports_the_adapter(place, said):
    """And imports it again, by the same command."""
    config = json.loads((place.path / "peft_dir/adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 8, 16)
    command = of_words(["convert_lora.py", "export"]).replace("export", "import")
    place.call(command.replace("path/to/adapter.ckpt", "path/to/back/adapter.ckpt") + " --config telechat_7b")
    one, two = read_adapter(place.root / ADAPTER), read_adapter(place.path / "back/adapter.ckpt")
    assert one.pairs.keys() == two.pairs.keys() and one.alpha == two.alpha
    for name, pair in one.pairs.items():
        assert all(np.array_equal(*both) for both in zip(pair, two.pairs[name])), name


# ---- planning, evaluation, reports


@runs("scripts/plan.py")
def plans(place, said):
    assert "64 cards" in said and "tokens/s" in said


@runs("scripts/evaluate.py", needs=["converts_12b"],
      change={"path/to/tokenizer.model": "path/to/12b.model", "ceval-valid,cmmlu,mmlu": ",".join(PUBLISHED[:3])},
      more=[*ON_CPU, "--data", "questions", "--model.model_config.seq_length", "512"])
def evaluates(place, said):
    report = json.loads((place.root / "output/evaluation.json").read_text(encoding="utf-8"))
    assert report["tasks"] == PUBLISHED[:3] == list(report["results"])
    assert report["num_fewshot"] == 5 and set(report["n-shot"].values()) == {5}
    assert all(0 <= result["acc,none"] <= 1 for result in report["results"].values())


@runs("scripts/launcher_report.py")
def reports_a_failed_job(place, said):
    assert said.startswith("Rank 1 failed first") and "ValueError: no column" in said


# ---- all of them


def classes_of(command: str) -> List[str]:
    """What covers a command: names of runs, beginnings of commands planned or run elsewhere."""
    return [*(name for name, run in RUNS.items() if all(word in command for word in run.words)),
            *(start for start in (*PLANNED, *ELSEWHERE) if f"{command} ".startswith(start))]


@pytest.mark.parametrize("command", ALL)
def test_every_command_is_covered_once(command):
    found = classes_of(command)
    assert found, f"no test covers this command of README.md; add a check of it, with @runs, to {__file__}:\n{command}"
    assert len(found) == 1, f"{command}\nis covered by {found}; make the words of each fit one command only"


def test_what_covers_no_command_goes():
    covered = {name for command in ALL for name in classes_of(command)}
    assert covered == {*RUNS, *PLANNED, *ELSEWHERE}


def test_a_new_command_is_noticed():
    assert classes_of("python scripts/evaluate_all.py --config x.yaml") == []


@pytest.mark.parametrize(("start", "test"), ELSEWHERE.items())
def test_tests_named_for_commands_exist(start, test):
    """The test is there, and its file names the program."""
    file, name = test.split("::")
    source = (ROOT / file).read_text(encoding="utf-8")
    assert re.search(rf"^def {name}\(", source, flags=re.MULTILINE), f"{file} has no {name}"
    assert (Path(start).name if "/" in start else start) in source


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(name, marks=needs_harness if name == "evaluates" else ())
                                  for name in RUNS])
def test_command(place, name):
    place.run(name)
