"""All benchmarks in one go, and the page that states them.

    python benchmarks/run_all.py --write docs/benchmarks.md                     everything, some 30 minutes on two cores
    python benchmarks/run_all.py --write docs/benchmarks.md --only generation   the others keep their last figures
    python benchmarks/run_all.py --tokenizer tokenizer.model --write ...        with an official tokenizer
    python benchmarks/run_all.py --vllm ENVIRONMENT/bin/python --write ...      compare with vLLM too
    python benchmarks/run_all.py --quick                                        tiny sizes: does everything run?

Each benchmark is a command of its own (listed on the page) and states, next to its figure, a limit measured in the
same run. One that fails has its error on the page and does not affect the others. Results are kept in
output/benchmarks.json (--json); benchmark_page.py shows them, published.py has what is not measured. Run it on a quiet
machine: what other programs used before and after is on the page.
"""
import argparse
import datetime
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence

ROOT = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(ROOT), str(ROOT / "benchmarks")]

import benchmark_page as page

TIMEOUT = 3600                             # seconds for one command


class Step(NamedTuple):
    """One benchmark: a command, in full and quick; `rows` makes lines of the page of the JSON that it wrote."""
    name: str
    title: str
    command: List[str]
    quick: List[str]
    rows: Callable[[Any], List[List[str]]]


# {work}: temporary folder, {conversations}: made of the examples' sentences, {tokenizer}: --tokenizer, or the quick
# start's, {vllm}: --vllm, without which such a step is left out.
# Every command also gets --json FILE.
_PREPROCESS = ["benchmarks/preprocess.py", "--input_dataset_file", "{conversations}",
               "--vocab_file_path", "{tokenizer}", "--work_dir", "{work}"]
_CONVERT = ["benchmarks/convert.py", "--work_dir", "{work}"]
_SEVEN = "research/telechat/finetune_telechat_7b.yaml"
_TINY = [word for key, size in (("hidden_size", 256), ("num_heads", 8), ("intermediate_size", 512),
                                ("vocab_size", 4096), ("seq_length", 128))
         for word in (f"--model.model_config.{key}", str(size))]
_LARGE = ["--batch", "1", "--new", "64", "--hidden", "1024", "--layers", "8", "--heads", "16", "--ffn", "2816"]
_SMALL = ["--hidden", "64", "--layers", "1", "--heads", "4", "--ffn", "128", "--vocab", "512", "--context", "64"]
_STREAMS = ["benchmarks/serve_streams.py", "--start", "--tokenizer", "{tokenizer}"]
STEPS = (
    Step("preprocessing", "Preprocessing: synthetic conversations to MindRecord", [*_PREPROCESS, "--repeat", "40"],
         [*_PREPROCESS, "--repeat", "1", "--rounds", "1", "--max_length", "256", "--num_workers", "1"],
         page.preprocessing_rows),
    Step("conversion", "Conversion of checkpoints", _CONVERT,
         [*_CONVERT, "--small", "--gigabytes", "0.01", "--repeat", "1", "--cases", "telechat_12b:safetensors"],
         page.conversion_rows),
    Step("training", "Training step", ["benchmarks/train.py"], ["benchmarks/train.py", "--rounds", "1", "--steps", "1"],
         page.training_rows),
    Step("compile", "Compilation of the training graph by depth", ["benchmarks/train.py", "--compile", "8", "64"],
         ["benchmarks/train.py", "--compile", "1", "2"], page.compile_rows),
    Step("by_layer", "A deep model on a CPU, trained as a whole and layer by layer",
         ["benchmarks/train.py", "--by_layer", "16"], ["benchmarks/train.py", "--by_layer", "1", "--steps", "1"],
         page.by_layer_rows),
    Step("loss", "A training step whose head and loss are computed for all tokens at once, and in eight chunks",
         ["benchmarks/train.py", "--loss", "2048"], ["benchmarks/train.py", "--loss", "32", "--steps", "1"],
         page.loss_rows),
    Step("master_weights", "How much of fine-tuning at a learning rate of 1e-5 reaches the weights",
         ["benchmarks/master_weights.py"],
         ["benchmarks/master_weights.py", "--steps", "20", "--size", "64", "--tune", "5", "--learn", "5"],
         page.master_weights_rows),
    Step("generation", "Generation with the KV cache", ["benchmarks/generate.py"],
         ["benchmarks/generate.py", "--batch", "1", "--new", "8", "--repeat", "1", *_SMALL], page.generation_rows),
    Step("large_generation", "Generation with weights beyond the caches", ["benchmarks/generate.py", *_LARGE],
         ["benchmarks/generate.py", "--batch", "1", "--new", "8", "--repeat", "1", *_SMALL], page.generation_rows),
    Step("beside_llama", "Compared with transformers' LlamaForCausalLM, on the same weights",
         ["benchmarks/beside_llama.py"],
         ["benchmarks/beside_llama.py", "--batch", "1", "--new", "8", "--rounds", "1", "--prompt", "8", "--prefill",
          "40", "--train", "1", "16", *_SMALL], page.beside_llama_rows),
    Step("beside_vllm", "Compared with vLLM's Llama on a CPU (without torch.compile), on the same weights",
         ["benchmarks/beside_llama.py", "--vllm", "{vllm}"], ["benchmarks/beside_llama.py", "--vllm", "{vllm}"],
         page.beside_llama_rows),
    Step("serving", "Concurrent requests, without HTTP", ["benchmarks/serve.py"],
         ["benchmarks/serve.py", "--requests", "4", "--clients", "2", "--prompt", "8", "--new", "8", "--slots", "4",
          "--buckets", "4", *_SMALL], page.serving_rows),
    Step("streams", "Streams of a server, half of them dropped by their clients",
         [*_STREAMS, "--seconds", "300"], [*_STREAMS, "--seconds", "1", "--streams", "4"], page.streams_rows),
    Step("planner", "Two layers of the 7B recipe compiled for one Ascend card of eight, by a simulated runtime",
         ["scripts/plan.py", "--config", _SEVEN, "--layers", "2", "--compile"],
         ["scripts/plan.py", "--config", _SEVEN, "--layers", "1", "--compile", *_TINY], page.planner_rows),
)
assert {step.name for step in STEPS} == set(page.HEADS)


def busy_processors(seconds: float) -> Optional[float]:
    """How many processors other programs use now, averaged over `seconds`; None where the system does not say."""
    def ticks() -> List[int]:
        return [int(word) for word in Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
    try:
        before = ticks()
        time.sleep(seconds)
        spent = [after - earlier for earlier, after in zip(before, ticks())]
    except (OSError, ValueError):
        return None
    idle = spent[3] + spent[4]                           # idle, and waiting for disks
    busy = 1 - idle / max(sum(spent), 1)                 # Linux may take waiting for disks back: keep to 0 .. 1
    return round((os.cpu_count() or 1) * min(max(busy, 0.0), 1.0), 1)


def run_step(step: Step, quick: bool, places: Dict[str, str], work: Path) -> Dict[str, Any]:
    """Run one benchmark; its result, with "error" instead of "rows" where it failed. Nothing is raised."""
    words = [word.format(**places) for word in (step.quick if quick else step.command)]
    target = work / f"{step.name}.json"
    result: Dict[str, Any] = {"title": step.title, "quick": quick, "load": round(os.getloadavg()[0], 1),
                              "date": datetime.date.today().isoformat(), "versions": page.versions(),
                              "command": " ".join(["python", *(step.quick if quick else step.command)])}
    watched = 0.2 if quick else 2.0
    busy = busy_processors(watched)
    started = time.monotonic()
    try:
        done = subprocess.run([sys.executable, *words, "--json", str(target)], cwd=ROOT, timeout=TIMEOUT, text=True,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        if not target.is_file():             # a missed target is exit code 1 as well, but has written its figures
            lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
            named = [line for line in lines if line.lower().startswith("error")]
            raise ValueError(f"exit code {done.returncode}: {(named or lines or ['no output'])[-1][:300]}")
        figures = json.loads(target.read_text(encoding="utf-8"))
        result.update(rows=step.rows(figures), figures=figures)
    except subprocess.TimeoutExpired:
        result["error"] = f"stopped after {TIMEOUT} s"
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as err:
        result["error"] = f"{err}" if isinstance(err, ValueError) else f"{type(err).__name__}: {err}"
    result["seconds"] = round(time.monotonic() - started)
    after = busy_processors(watched)
    result["busy"] = None if busy is None or after is None else max(busy, after)
    return result


def write(path: Path, text: str) -> None:
    """Write a file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.part")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def read_results(path: Path) -> Dict[str, Any]:
    """The results of the last run; none where there is no file, or a broken one (which is said)."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {step.name: found[step.name] for step in STEPS if step.name in found}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as err:
        print(f"warning: {path} cannot be read and is started over: {err}", file=sys.stderr)
        return {}


def make_tokenizer(folder: Path) -> Path:
    """The tokenizer of the quick start, trained on the example conversations."""
    from research.telechat.recipe.read import read_recipe
    from scripts import quickstart
    quickstart.train_tokenizer(folder, read_recipe(quickstart.FINETUNE)["model"]["model_config"]["vocab_size"])
    return folder / "tokenizer.model"


def tokenizer_text(given: Optional[Path]) -> str:
    """What to say about the tokenizer that was used."""
    if given is None:
        return "that of the quick start"
    from research.telechat.text.vocab import Vocab
    return f"of an official checkpoint, {Vocab.load(str(given)).size:,} tokens"


def make_conversations(path: Path, count: int) -> None:
    """Write `count` conversations of about 500 tokens: three turns of the examples' sentences, drawn with seed 0."""
    from scripts import quickstart
    texts = [part for record in quickstart.conversations() for text in record.values()
             for part in quickstart.MARKER.split(text) if part]
    draw = random.Random(0)

    def turn(sentences: int) -> str:
        return " ".join(draw.choices(texts, k=sentences))
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            earlier = "".join(f"<_user>{turn(2)}<_bot>{turn(10)}" for _ in range(2))
            file.write(json.dumps({"input": f"{earlier}<_user>{turn(2)}", "output": turn(10)}, ensure_ascii=False)
                       + "\n")


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Entry point; exit code 1 where a benchmark failed."""
    names = [step.name for step in STEPS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write the page there: docs/benchmarks.md")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME",
                        help=f"run only these, the others keep what --json holds: {', '.join(names)}")
    parser.add_argument("--render", action="store_true", help="run nothing, only write the page again")
    parser.add_argument("--tokenizer", type=Path, help="of an official checkpoint (default: that of the quick start, "
                        "which is small and quick)")
    parser.add_argument("--vllm", metavar="PYTHON", help="interpreter of an environment with vLLM, as "
                        "scripts/check_vllm.py makes it")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, for a test of the benchmarks themselves")
    parser.add_argument("--json", type=Path, help="results (default: output/benchmarks.json, or benchmarks-quick.json)")
    parser.add_argument("--work_dir", type=Path, help="where 15 GB of temporary files go")
    args = parser.parse_args(argv)
    if args.tokenizer and not args.tokenizer.is_file():
        parser.error(f"--tokenizer: {args.tokenizer} is no file; give tokenizer.model or tokenizer.json")
    store = args.json or ROOT / "output" / f"benchmarks{'-quick' if args.quick else ''}.json"
    results = read_results(store)
    with tempfile.TemporaryDirectory(dir=args.work_dir, prefix="telechat-benchmarks-") as folder:
        work = Path(folder)
        places = {"work": folder, "conversations": str(work / "conversations.jsonl"), "tokenizer": "",
                  "vllm": args.vllm or ""}
        for step in () if args.render else STEPS:
            if step.name not in args.only or ("{vllm}" in step.command and not args.vllm):
                continue
            if "{tokenizer}" in step.command and not places["tokenizer"]:
                places["tokenizer"] = str(args.tokenizer or make_tokenizer(work))
            if step.name == "preprocessing":
                make_conversations(work / "conversations.jsonl", 100 if args.quick else 1000)
            print(f"== {step.name}", flush=True)
            results[step.name] = run_step(step, args.quick, places, work)
            if step.name == "preprocessing":
                results[step.name]["note"] = f"Tokenizer: {tokenizer_text(args.tokenizer)}."
            print(page.step_text(step.name, results[step.name]), flush=True)
            write(store, json.dumps({"machine": page.machine(), **results}, indent=1) + "\n")
    if args.write:
        write(args.write, page.page(results, page.machine(), {step.name: step.title for step in STEPS},
                                    {step.name: " ".join(["python", *step.command]) for step in STEPS}))
    failed = [step.name for step in STEPS if "rows" not in results.get(step.name, {})
              and (args.vllm or "{vllm}" not in step.command)]
    if failed:
        print(f"error: without figures: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
