"""The quick start: a tiny TeleChat-12B-shaped model learns the conversations in examples/, on a CPU, by the same
commands that a real model takes on an Ascend machine.

Started by quickstart.sh, which makes the environment. Everything goes to quickstart_output/; a step whose inputs have
not changed is reused (step_runner.py). The model is far too small to know anything else than these conversations.
"""
import argparse
import ast
import json
import re
import signal
import sys
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, Dict, Iterator, List

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)
from research.telechat.recipe.read import read_recipe
from scripts.step_runner import StepError, Workspace

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
MARKER = re.compile(r"<_(?:start|end|pad|user|bot|system)>")
SEED = 0


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
    """Follows the log of a training run, one JSON line per step: a bar on a terminal, else a line every ten seconds."""

    def __init__(self, log: Path, total: int):
        self.log, self.total, self.position, self.steps, self.loss = log, total, 0, 0, float("nan")
        self.start = self.shown = time.time()
        self.bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm
            self.bar = tqdm(total=total, unit="step", desc="      compiling", ncols=100)

    def __call__(self) -> None:
        """Read what is new, and show it."""
        new = 0
        if self.log.exists():
            with open(self.log, "rb") as lines:
                lines.seek(self.position)
                for line in lines:
                    if line.endswith(b"\n"):
                        self.position += len(line)
                        self.loss = json.loads(line)["loss"]
                        new += 1
        self.steps += new
        if self.bar is not None:
            if self.steps:
                self.bar.set_description("      training", refresh=False)
                self.bar.set_postfix(loss=f"{self.loss:.3f}", refresh=False)
            self.bar.update(new)
            self.bar.refresh()
        elif time.time() - self.shown > 10:
            self.shown = time.time()
            state = f"step {self.steps}/{self.total}, loss {self.loss:.3f}" if self.steps else "compiling"
            print(f"      {state}, {self.shown - self.start:.0f} s", flush=True)

    def close(self) -> None:
        """Show the last steps, and leave the bar as it is."""
        self()
        if self.bar is not None:
            self.bar.close()


def read_losses(folder: Path) -> List[float]:
    """The loss of every step of a training run."""
    log = folder / "training_log.jsonl"
    with open(log, encoding="utf-8") as lines:
        return [json.loads(line)["loss"] for line in lines]


def count_records(dataset: Path) -> int:
    """Records of a folder made by telechat_preprocess.py."""
    return int(json.loads((dataset / "meta.json").read_text(encoding="utf-8"))["records"])


def last_checkpoint(folder: Path) -> Path:
    """The newest checkpoint of a training run. Raises StepError if there is none."""
    found = sorted((folder / "checkpoint").rglob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise StepError(f"the training wrote no checkpoint below {folder / 'checkpoint'}")
    return found[-1]


def check_learnt(losses: List[float]) -> None:
    """Raise StepError unless the loss fell to less than a tenth."""
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


def ask(space: Workspace, folder: Path, recipe_options: List[str]) -> None:
    """Predict the answers to QUESTIONS with run_mindformer.py, and write them to answers.json."""
    prompts = [f"<_user>{question}<_bot>" for question in QUESTIONS]
    space.run("predict", [*recipe_options, "--output_dir", str(folder), "--predict_data", *prompts], ROOT)
    pairs = dict(zip(QUESTIONS, read_answers(folder / "text_generation_result.txt", prompts)))
    (folder / "answers.json").write_text(json.dumps(pairs, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def check_answer(folder: Path, expected: str) -> None:
    """Print the answers; StepError unless the first is the one in the examples."""
    answers = json.loads((folder / "answers.json").read_text(encoding="utf-8"))
    for question, answer in answers.items():
        print(f"\n  {question}\n  {answer}", flush=True)
    if answers[QUESTIONS[0]] != expected:
        raise StepError(f"the model's answer to {QUESTIONS[0]} is wrong; expected the one in {EXAMPLES}: {expected} "
                        "bash scripts/quickstart.sh --fresh trains anew")
    print(f"\nThe answer to {QUESTIONS[0]} is right: it is the one in examples/conversations.jsonl.", flush=True)


def main() -> int:
    """Run all steps; 1 if one fails or the answer is wrong."""
    parser = argparse.ArgumentParser(description="Fine-tune a tiny TeleChat on a CPU and ask it a question.")
    parser.add_argument("--fresh", action="store_true", help="remove the results and start over")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of the results (default: %(default)s)")
    args = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):     # a clean end, in the background too
        signal.signal(number, signal.default_int_handler)
    start = time.time()
    try:
        quickstart(Workspace(args.output.resolve(), steps=6, fresh=args.fresh))
    except StepError as err:
        print(f"error: {err}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. Finished steps are kept; the same command goes on from there.", file=sys.stderr)
        return 130
    print_outlook(args.output, time.time() - start)
    return 0


def quickstart(space: Workspace) -> None:
    """All steps, each from the results of those before. Raises StepError."""
    recipe = read_recipe(FINETUNE)
    model, runner = recipe["model"]["model_config"], recipe["runner_config"]
    expected = {record["input"]: record["output"] for record in conversations()}.get("<_user>" + QUESTIONS[0])
    if expected is None:
        raise StepError(f"{EXAMPLES} lacks the question that is asked at the end: {QUESTIONS[0]}")
    versions = " ".join(metadata.version(name) for name in ("mindspore", "mindformers"))
    code = [versions, Path(__file__), ROOT / "run_mindformer.py", *sorted(PLUGIN.rglob("*.py"))]
    bases = sorted((ROOT / "configs" / "telechat").glob("*.yaml"))
    tokenizer, dataset = space.folder / "tokenizer" / "tokenizer.model", space.folder / "dataset"
    official, converted = space.folder / "official_checkpoint", space.folder / "mindspore_checkpoint" / "telechat.ckpt"
    trained = space.folder / "finetune"

    tokenizer_key = space.step(
        "tokenizer", "Train a SentencePiece tokenizer on the example conversations",
        [EXAMPLES, Path(__file__), str(model["vocab_size"])],
        lambda folder: train_tokenizer(folder, model["vocab_size"]))
    dataset_key = space.step(
        "dataset", "Turn the conversations into MindRecord", [tokenizer_key, EXAMPLES, *code],
        lambda folder: space.run("preprocess", [
            sys.executable, str(PLUGIN / "telechat_preprocess.py"), "--input_dataset_file", str(EXAMPLES),
            "--output_path", str(folder), "--vocab_file_path", str(tokenizer),
            "--max_length", str(model["seq_length"]), "--document_boundaries"], ROOT))
    official_key = space.step(
        "official_checkpoint", "Make a checkpoint in the official form, with random weights", [FINETUNE, *code],
        lambda folder: write_official_checkpoint(folder, model))
    converted_key = space.step(
        "mindspore_checkpoint", "Convert it to MindSpore", [official_key],
        lambda folder: space.run("convert", [
            sys.executable, str(PLUGIN / "convert_weight_torch_to_ms.py"), "--torch_path", str(official),
            "--mindspore_path", str(folder / converted.name), "--model_name", MODEL], ROOT))

    def train(folder: Path) -> None:
        total = runner["epochs"] * (count_records(dataset) // runner["batch_size"])
        progress = TrainingProgress(folder / "training_log.jsonl", total)
        try:
            space.run("finetune", [
                sys.executable, "run_mindformer.py", "--config", str(FINETUNE), "--register_path", str(PLUGIN),
                "--train_dataset", str(dataset), "--load_checkpoint", str(converted),
                # Several conversations share a record. Each is to be learnt for itself, as it will be asked for.
                "--model.model_config.document_boundaries", "True", "--output_dir", str(folder)], ROOT, progress)
        finally:
            progress.close()
        check_learnt(read_losses(folder))

    trained_key = space.step("finetune", "Fine-tune on the conversations",
                             [dataset_key, converted_key, FINETUNE, *bases], train)
    space.step(
        "predict", "Ask the fine-tuned model", [trained_key, PREDICT, *bases],
        lambda folder: ask(space, folder, [
            sys.executable, "run_mindformer.py", "--config", str(PREDICT), "--register_path", str(PLUGIN),
            "--load_checkpoint", str(last_checkpoint(trained)), "--processor.tokenizer.vocab_file", str(tokenizer)]))
    check_answer(space.folder / "predict", expected)


def print_outlook(output: Path, seconds: float) -> None:
    """Where everything lies, and what to try next."""
    if ROOT in output.resolve().parents:
        output = output.resolve().relative_to(ROOT)
    print(f"""
Done in {seconds:.0f} s. All results are in {output}/:
  finetune/training_curve.png   loss and learning rate over the steps
  finetune/checkpoint/          the fine-tuned model; predict/answers.json: its answers; logs/: all output
Next: the same commands, printed above, with the recipe of a real model on an Ascend machine, for example
  bash scripts/msrun_launcher.sh "python run_mindformer.py --config research/telechat/finetune_telechat_12b.yaml \\
    --register_path research/telechat --train_dataset DATASET --load_checkpoint CHECKPOINT --auto_trans_ckpt True \\
    --use_parallel True" 8
README.md has every step, from the official weights on.""")


if __name__ == "__main__":
    sys.exit(main())
