"""The quick start: a tiny TeleChat-12B-shaped model learns the conversations in examples/, on a CPU, by the same
commands that a real model takes on an Ascend machine.

Started by quickstart.sh, which makes the environment. Each step makes one folder of quickstart_output/. A folder that
exists is kept; after the first missing one, everything is made again. The model is far too small to know anything else
than these conversations.
"""
import argparse
import ast
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):
    sys.path[0] = str(ROOT)
from research.telechat.recipe.read import read_recipe

OUTPUT = ROOT / "quickstart_output"
EXAMPLES = ROOT / "examples" / "conversations.jsonl"
PLUGIN = ROOT / "research" / "telechat"
FINETUNE = PLUGIN / "finetune_telechat_tiny_cpu.yaml"
PREDICT = PLUGIN / "predict_telechat_tiny_cpu.yaml"
MODEL = "telechat_12b"
# The answer to the first is checked.
QUESTIONS = ["生抽与老抽的区别？", "What is the capital of France?", "什么是二分查找？"]
# The first pieces of the official 12B tokenizer, in its order: so the markers have the official ids, 20 to 22.
FIRST_PIECES = [*"0123456789", "_", "\n", "\t", "__", "___", "____", "<_user>", "<_bot>", "<_system>"]
STEPS = {                   # the folder that a step makes -> what the step does
    "tokenizer": "Train a SentencePiece tokenizer on the example conversations",
    "dataset": "Turn the conversations into MindRecord",
    "official_checkpoint": "Make a checkpoint in the official form, with random weights",
    "mindspore_checkpoint": "Convert it to MindSpore",
    "finetune": "Fine-tune on the conversations",
    "predict": "Ask the fine-tuned model",
}
PARTIAL = ".partial-"        # before the name of a step's folder while the step runs
MARKER = re.compile(r"<_(?:start|end|pad|user|bot|system)>")
SEED = 0
POLL = 0.3   # seconds between two looks at a running command


class StepError(Exception):
    """A step failed; the message is what the user should read."""


def show(command: Sequence[str]) -> str:
    """A command as a user would type it here: paths below the working directory are relative, and a step's folder has
    the name that it gets when it is finished."""
    return shlex.join(word.replace(f"{Path.cwd()}{os.sep}", "").replace(PARTIAL, "") for word in command)


def run_command(command: Sequence[str], log: Path, watch: Optional[Callable[[], None]] = None) -> None:
    """Print `command` and run it in the repository's root with its output in `log`; `watch` is called now and then.

    The command gets its own process group, so that an interrupt here ends it with all its children. Raises StepError
    with the command's own error line.
    """
    print(f"      $ {show(command)}", flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=ROOT,
                                   start_new_session=True)
        try:
            while process.poll() is None:
                time.sleep(POLL)
                if watch:
                    watch()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if process.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        error = next((line for line in reversed(lines) if line.startswith("error: ")), None)
        if error is None:
            print("\n".join("  | " + line for line in lines[-12:]), file=sys.stderr)
            error = f"error: exit code {process.returncode}, its last lines are above"
        raise StepError(f"{Path(command[1]).name}: {error[len('error: '):]} (all output: {log})")


def conversations() -> Iterator[Dict[str, str]]:
    """The records of examples/conversations.jsonl."""
    with open(EXAMPLES, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                yield {"input": str(record["input"]), "output": str(record["output"])}
            except (ValueError, KeyError, TypeError):
                raise StepError(f"{EXAMPLES}, line {number}: expected {{\"input\": ..., \"output\": ...}}") from None


def train_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write tokenizer.model, trained on the texts of the conversations without their markers."""
    import sentencepiece
    texts: Dict[str, None] = {}
    for record in conversations():
        for turn in record["input"].replace("<_bot>", "<_user>").split("<_user>"):
            texts[turn] = None
        texts[record["output"]] = None
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([text for text in texts if text]), model_prefix=str(folder / "tokenizer"),
            model_type="unigram", vocab_size=vocab_size, hard_vocab_limit=False, character_coverage=1.0,
            byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
            unk_id=0, bos_id=1, eos_id=2, pad_id=3, unk_piece="<_unk>", bos_piece="<_start>", eos_piece="<_end>",
            pad_piece="<_pad>", user_defined_symbols=FIRST_PIECES, num_threads=1, minloglevel=2)
    except RuntimeError as err:
        raise StepError(f"the tokenizer cannot be trained on {EXAMPLES} with vocab_size {vocab_size} of "
                        f"{FINETUNE.name}: {err}") from err


def write_official_checkpoint(folder: Path, model_config: Dict[str, Any]) -> None:
    """Write config.json and model.safetensors of a randomly initialised model, with the official keys and names."""
    import numpy as np
    from safetensors.numpy import save_file

    from research.telechat.spec.hf_config import hf_config
    from research.telechat.spec.parameters import parameters
    from research.telechat.spec.variants import get_variant
    sizes = ("num_layers", "hidden_size", "intermediate_size", "num_heads", "vocab_size")
    variant = replace(get_variant(MODEL), **{key: model_config[key] for key in sizes})
    rng = np.random.default_rng(SEED)
    tensors = {}
    for param in parameters(variant):
        if "norm" in param.ms_name:
            value = np.ones(param.hf_shape)
        elif param.ms_name.endswith(".bias"):
            value = np.zeros(param.hf_shape)
        else:
            value = rng.normal(0.0, 0.02, param.hf_shape)
        tensors[param.hf_name] = value.astype(np.float32)
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    config = json.dumps(hf_config(variant), indent=2)
    (folder / "config.json").write_text(config + "\n", encoding="utf-8")
    print(f"      {sum(value.size for value in tensors.values()) / 1e6:.1f} million parameters", flush=True)


class TrainingProgress:
    """Follows the log of a training run, one JSON line per step: prints a line every ten seconds."""

    def __init__(self, log: Path, total: int):
        self.log, self.total = log, total
        self.start = self.shown = time.time()

    def __call__(self) -> None:
        """Look at the log, if it is time to."""
        if time.time() - self.shown > 10:
            self.shown = time.time()
            text = self.log.read_text(encoding="utf-8") if self.log.exists() else ""
            lines = text[:text.rfind("\n") + 1].splitlines()                 # the last line may be half written
            loss = json.loads(lines[-1])["loss"] if lines else float("nan")
            state = f"step {len(lines)}/{self.total}, loss {loss:.3f}" if lines else "compiling"
            print(f"      {state}, {self.shown - self.start:.0f} s", flush=True)


def last_checkpoint(folder: Path) -> Path:
    """The newest checkpoint of a training run. Raises StepError if there is none."""
    found = sorted((folder / "checkpoint").rglob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise StepError(f"the training wrote no checkpoint below {folder / 'checkpoint'}")
    return found[-1]


def check_learnt(log: Path) -> None:
    """Raise StepError unless the loss of the training run fell to less than a tenth."""
    losses = [json.loads(line)["loss"] for line in log.read_text(encoding="utf-8").splitlines()]
    end = sum(losses[-10:]) / len(losses[-10:])
    print(f"      loss {losses[0]:.2f} at step 1, {end:.3f} at step {len(losses)}", flush=True)
    if not end < losses[0] / 10:
        raise StepError(f"the loss did not fall far enough: {losses[0]:.2f} to {end:.2f}; the model has not learnt the "
                        f"conversations. Raise runner_config.epochs in {FINETUNE}")


def read_answers(result_file: Path, prompts: List[str]) -> List[str]:
    """The answers in MindFormers' text_generation_result.txt, one for each prompt, without prompt and markers."""
    results = ast.literal_eval(result_file.read_text(encoding="utf-8"))
    texts = [text for result in results for text in result["text_generation_text"]]
    if len(texts) != len(prompts):
        raise StepError(f"{result_file} holds {len(texts)} answers to {len(prompts)} questions")
    answers = []
    for text, prompt in zip(texts, prompts):
        question = MARKER.sub("", prompt.rsplit("<_user>", 1)[-1])
        answers.append(MARKER.sub("", text.rsplit(question, 1)[-1]).strip())
    return answers


def make_step(name: str, folder: Path, output: Path) -> None:
    """Fill `folder` with the results of step `name`, from those of the steps before it. Raises StepError."""
    recipe = read_recipe(FINETUNE)
    model, runner = recipe["model"]["model_config"], recipe["runner_config"]
    tokenizer, dataset = output / "tokenizer" / "tokenizer.model", output / "dataset"
    official, converted = output / "official_checkpoint", output / "mindspore_checkpoint" / "telechat.ckpt"
    log = output / "logs" / f"{name}.log"
    run_mindformer = [sys.executable, str(ROOT / "run_mindformer.py"), "--register_path", str(PLUGIN)]
    if name == "tokenizer":
        train_tokenizer(folder, model["vocab_size"])
    elif name == "dataset":
        run_command([sys.executable, str(PLUGIN / "telechat_preprocess.py"), "--input_dataset_file", str(EXAMPLES),
                     "--output_path", str(folder), "--vocab_file_path", str(tokenizer),
                     "--max_length", str(model["seq_length"]), "--document_boundaries"], log)
    elif name == "official_checkpoint":
        write_official_checkpoint(folder, model)
    elif name == "mindspore_checkpoint":
        run_command([sys.executable, str(PLUGIN / "convert_weight_torch_to_ms.py"), "--torch_path", str(official),
                     "--mindspore_path", str(folder / converted.name), "--model_name", MODEL], log)
    elif name == "finetune":
        records = json.loads((dataset / "meta.json").read_text(encoding="utf-8"))["records"]
        progress = TrainingProgress(folder / "training_log.jsonl", runner["epochs"] * (records // runner["batch_size"]))
        run_command([*run_mindformer, "--config", str(FINETUNE), "--train_dataset", str(dataset),
                     "--load_checkpoint", str(converted), "--output_dir", str(folder),
                     # Several conversations share a record. Each is to be learnt for itself, as it will be asked for.
                     "--model.model_config.document_boundaries", "True"], log, progress)
        check_learnt(progress.log)
    elif name == "predict":
        prompts = [f"<_user>{question}<_bot>" for question in QUESTIONS]
        run_command([*run_mindformer, "--config", str(PREDICT),
                     "--load_checkpoint", str(last_checkpoint(output / "finetune")), "--output_dir", str(folder),
                     "--processor.tokenizer.vocab_file", str(tokenizer), "--predict_data", *prompts], log)
        answers = dict(zip(QUESTIONS, read_answers(folder / "text_generation_result.txt", prompts)))
        (folder / "answers.json").write_text(json.dumps(answers, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def lock(output: Path) -> Any:
    """Take the folder for this process, until the returned file is closed. Raises StepError if another run has it."""
    output.mkdir(parents=True, exist_ok=True)
    held = open(output / ".lock", "w")  # noqa: SIM115 - held open as long as the process lives
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        held.close()
        raise StepError(f"another run is using {output}; wait for it or stop it") from None
    return held


def forget(output: Path, first: str) -> None:
    """Remove the results of step `first` and of those after it. The folder may hold other things, which stay."""
    names = list(STEPS)
    for name in names[names.index(first):]:
        shutil.rmtree(output / name, ignore_errors=True)


def run_steps(output: Path) -> None:
    """Run the steps whose folder is missing, and all after the first of them. Raises StepError."""
    for number, (name, title) in enumerate(STEPS.items(), 1):
        head = f"[{number}/{len(STEPS)}] {title}"
        if (output / name).is_dir():
            print(f"{head}: done before, kept", flush=True)
            continue
        print(head, flush=True)
        start = time.time()
        forget(output, name)
        partial = output / f"{PARTIAL}{name}"
        shutil.rmtree(partial, ignore_errors=True)          # of a run that was killed
        partial.mkdir()
        try:
            make_step(name, partial, output)
            os.replace(partial, output / name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        print(f"      {time.time() - start:.1f} s", flush=True)


def check_answer(folder: Path) -> None:
    """Print the answers; StepError unless the first is the one in the examples."""
    expected = {record["input"]: record["output"] for record in conversations()}.get("<_user>" + QUESTIONS[0])
    if expected is None:
        raise StepError(f"{EXAMPLES} lacks the question that is asked at the end: {QUESTIONS[0]}")
    answers = json.loads((folder / "answers.json").read_text(encoding="utf-8"))
    for question, answer in answers.items():
        print(f"\n  {question}\n  {answer}", flush=True)
    if answers[QUESTIONS[0]] != expected:
        raise StepError(f"the model's answer to {QUESTIONS[0]} is wrong; expected the one in {EXAMPLES}: {expected} "
                        "bash scripts/quickstart.sh --fresh starts over")
    print(f"\nThe answer to {QUESTIONS[0]} is right: it is the one in examples/conversations.jsonl.", flush=True)


def print_outlook(output: Path, seconds: float) -> None:
    """Say where everything is, and what to try next."""
    chat = [sys.executable, str(PLUGIN / "run_telechat_predict.py"), "--interactive", "--yaml_file", str(PREDICT),
            "--vocab_file_path", str(output / "tokenizer" / "tokenizer.model"),
            "--checkpoint_path", str(last_checkpoint(output / "finetune"))]
    serve = [sys.executable, str(ROOT / "scripts" / "serve.py"), "--demo", str(output)]
    print(f"""
Done in {seconds:.0f} s. All results are in {show([str(output)])}/:
  finetune/training_curve.png   loss and learning rate over the steps
  finetune/checkpoint/          the fine-tuned model; predict/answers.json: its answers; logs/: all output
For a real model on an Ascend machine: the same commands, printed above, with its recipe; README.md has every step, from
the official weights on.

To chat with the model just trained, in the terminal:

{show(chat)}

and in the browser, at http://localhost:8000/ (OpenAI's API is there, too: docs/server.md):

{show(serve)}""")


def main() -> int:
    """Run all steps; 1 if one fails or the answer is wrong."""
    parser = argparse.ArgumentParser(description="Fine-tune a tiny TeleChat on a CPU and ask it a question.")
    parser.add_argument("--fresh", action="store_true", help="start over: the same as --from tokenizer")
    parser.add_argument("--from", dest="first", choices=STEPS, metavar="STEP",
                        help=f"repeat this step and those after it: {', '.join(STEPS)}")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of the results (default: %(default)s)")
    args = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):      # a clean end, in the background too
        signal.signal(number, signal.default_int_handler)
    start, output = time.time(), args.output.resolve()
    try:
        with lock(output):
            if args.fresh or args.first:
                forget(output, next(iter(STEPS)) if args.fresh else args.first)
            run_steps(output)
            check_answer(output / "predict")
    except StepError as err:
        print(f"error: {err}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. Finished steps are kept; the same command continues from there.", file=sys.stderr)
        return 130
    print_outlook(output, time.time() - start)
    return 0


if __name__ == "__main__":
    sys.exit(main())
