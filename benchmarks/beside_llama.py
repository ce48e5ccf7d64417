"""Benchmark: ours beside transformers' LlamaForCausalLM on the exported Llama form of the same weights, on a CPU.

    python benchmarks/beside_llama.py                                     decoding, prompts and a training step
    python benchmarks/beside_llama.py --tasks decode --batch 1 --rounds 5
    python benchmarks/beside_llama.py --hidden 1024 --layers 8 --ffn 2816 --heads 16         weights beyond the caches
    python benchmarks/beside_llama.py --vllm ENVIRONMENT/bin/python          beside vLLM, from its own environment

A checkpoint of random weights in the shape of TeleChat-12B is made in a temporary folder and converted by the command
that users run, to MindSpore and to Llama, in float32. Each side has a process of its own, and they take turns with
every measurement, so that other load meets both; a ratio is the median of the rounds' ratios, over 1 where ours is
faster. Before anything counts, both must answer the same prompts with the same tokens. Greedy, through `generate` of
each as users call it; a training step is forward pass, backward pass, clipping by the global norm and AdamW.
"""
import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

ROOT = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(ROOT), str(ROOT / "benchmarks")]
os.environ.setdefault("GLOG_v", "3")

import numpy as np
import serve_vllm
from generate import Clock

from research.telechat.spec.variants import Variant, get_variant

SIDES = ("telechat", "transformers", "vllm")
TASKS = ("decode", "prefill", "train")
TOLERANCE = 1e-3                           # between the losses of a training step of both


class Telechat:
    """This project's model."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        import mindspore as ms

        from research.telechat.run.load import quieten
        from research.telechat.telechat_config import TelechatConfig
        quieten()
        ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
        self._ms, self._args = ms, args
        self._weights = next((folder / "mindspore").glob("*.safetensors"))
        self._config = json.loads((folder / "official" / "config.json").read_text(encoding="utf-8"))
        self._sizes = TelechatConfig
        self._answering: Any = None
        self._step: Any = None

    def _model(self, **changes: Any) -> Any:
        from research.telechat.telechat import TelechatForCausalLM
        model = TelechatForCausalLM(self._sizes.from_hf_config(
            self._config, seq_length=self._args.context, compute_dtype="float32", param_init_type="float32",
            res_dtype="float32", **changes))
        missing, _ = self._ms.load_param_into_net(model, self._ms.load_checkpoint(str(self._weights),
                                                                                  format="safetensors"))
        assert all("_cache" in name for name in missing), missing
        return model

    def generate(self, prompts: List[List[int]], new: int, clock: Any) -> List[List[int]]:
        """Greedy answers of `new` tokens."""
        if self._answering is None:
            blocks = max(self._args.batch) * -(-self._args.context // 16)
            self._answering = self._model(use_past=True, block_size=16, num_blocks=blocks)
            self._answering.set_train(False)
        found = self._answering.generate(prompts, max_new_tokens=new, do_sample=False, eos_token_id=-1, streamer=clock)
        return [answer[-new:].tolist() for answer in found]

    def train(self, ids: np.ndarray) -> float:
        """One step on ids [B, S + 1]; the loss."""
        if self._step is None:
            from research.telechat.training.optimizer import TelechatAdamW
            from research.telechat.training.step import TelechatTrainOneStepCell
            model = self._model()
            model.set_train(True)
            optimizer = TelechatAdamW(model.trainable_params(), learning_rate=1e-4)
            self._step = TelechatTrainOneStepCell(model, optimizer, use_clip_grad=True, max_grad_norm=1.0)
            self._step.set_train(True)
        tensor = self._ms.Tensor(ids)
        return float(self._step(tensor, tensor)[0].asnumpy().item())


class Transformers:
    """transformers' Llama."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        import torch
        import transformers
        transformers.logging.set_verbosity_error()
        self._torch = torch
        self._model = transformers.LlamaForCausalLM.from_pretrained(folder / "llama", torch_dtype=torch.float32)
        self._model.generation_config = transformers.GenerationConfig(pad_token_id=0)
        self._optimizer: Any = None

    def generate(self, prompts: List[List[int]], new: int, clock: Any) -> List[List[int]]:
        """Greedy answers of `new` tokens."""
        ids = self._torch.tensor(prompts)
        watching = _Watching(clock)
        found = self._model.eval().generate(
            ids, attention_mask=self._torch.ones_like(ids), max_new_tokens=new, do_sample=False, use_cache=True,
            stopping_criteria=[watching])
        return found[:, ids.shape[1]:].tolist()

    def train(self, ids: np.ndarray) -> float:
        """One step on ids [B, S + 1]; the loss."""
        torch = self._torch
        if self._optimizer is None:
            self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-4, fused=True)
        model, tokens = self._model.train(), torch.from_numpy(ids).long()
        logits = model(tokens[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        self._optimizer.step()
        return float(loss)


class Vllm:
    """vLLM's Llama, without torch.compile, in the interpreter of --vllm."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        serve_vllm.prepare()
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")          # the engine is stepped here
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine
        self._engine: Any = LLMEngine.from_engine_args(EngineArgs(
            model=str(folder / "llama"), skip_tokenizer_init=True, dtype="float32", max_model_len=args.context,
            block_size=32, max_num_seqs=max(args.batch), max_num_batched_tokens=max(args.context, 2048),
            enforce_eager=True, enable_prefix_caching=False))

    def generate(self, prompts: List[List[int]], new: int, clock: Any) -> List[List[int]]:
        """Greedy answers of `new` tokens."""
        from vllm import SamplingParams
        params = SamplingParams(max_tokens=new, min_tokens=new, ignore_eos=True, detokenize=False, temperature=0)
        clock.put(None)
        for number, prompt in enumerate(prompts):
            self._engine.add_request(str(number), {"prompt_token_ids": prompt}, params)
        found: Dict[str, List[int]] = {}
        while self._engine.has_unfinished_requests():
            outputs = self._engine.step()
            if len(outputs) == len(prompts):          # not a step that has read some of the prompts only
                clock.put(None)
            for output in outputs:
                found[output.request_id] = list(output.outputs[0].token_ids)
        return [found[str(number)] for number in range(len(prompts))]


class _Watching:
    """A stopping criterion that never stops: transformers streams one sequence only, and asks this for any number."""

    def __init__(self, clock: Clock):
        self._clock = clock
        clock.put(None)

    def __call__(self, input_ids: Any, _scores: Any, **_kwargs: Any) -> Any:
        self._clock.put(None)
        return input_ids.new_zeros(input_ids.shape[0], dtype=bool)


def prompts_of(vocab: int, batch: int, length: int) -> List[List[int]]:
    """The same for both."""
    return np.random.default_rng(length).integers(10, vocab, (batch, length)).tolist()


def carry_out(side: Any, args: argparse.Namespace, job: Dict[str, Any]) -> Dict[str, Any]:
    """What one side answers to a job."""
    if job["task"] == "train":
        ids = np.random.default_rng(0).integers(4, args.vocab, (args.train[0], args.train[1] + 1)).astype(np.int32)
        times, loss = [], 0.0
        for _ in range(job["steps"]):
            started = time.perf_counter()
            loss = side.train(ids)
            times.append(time.perf_counter() - started)
        return {"seconds": statistics.median(times), "loss": loss}
    clock = Clock()
    prompts = prompts_of(args.vocab, job["batch"], job["prompt"])
    started = time.perf_counter()
    tokens = side.generate(prompts, job["new"], clock)
    steps = np.diff(clock.times[1:])
    answer = {"first": clock.times[1] - started, "tokens": tokens}
    if len(steps) > 3:
        quarter = len(steps) // 4
        answer["growth"] = float(np.median(steps[-quarter:]) / np.median(steps[:quarter]))
        answer["tokens_per_second"] = job["batch"] * len(steps) / float(steps.sum())
    return answer


def worker(args: argparse.Namespace) -> None:
    """Answer each job on stdin, one JSON a line, by one on stdout."""
    with contextlib.redirect_stdout(sys.stderr):
        side = {"telechat": Telechat, "transformers": Transformers, "vllm": Vllm}[args.worker](args, Path(args.folder))
    for line in sys.stdin:
        with contextlib.redirect_stdout(sys.stderr):
            answer = carry_out(side, args, json.loads(line))
        print("ANSWER", json.dumps(answer), flush=True)


class Side:
    """A process that measures one side, by `interpreter`."""

    def __init__(self, name: str, folder: str, options: Sequence[str], interpreter: str = sys.executable):
        self.name = name
        self._log = open(Path(folder) / f"{name}.log", "w+", encoding="utf-8")   # noqa: SIM115 (closed with it)
        self._process = subprocess.Popen([interpreter, __file__, *options, "--worker", name, "--folder", folder],
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True)

    def ask(self, **job: Any) -> Dict[str, Any]:
        """Its answer to a job."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("ANSWER "):
                answer: Dict[str, Any] = json.loads(line[len("ANSWER "):])
                return answer
        self._log.seek(0)
        raise SystemExit(f"error: the process of {self.name} ended early:\n{self._log.read()[-2000:]}")

    def end(self) -> None:
        """End it."""
        if self._process.stdin:
            self._process.stdin.close()
        self._process.wait(timeout=60)
        self._log.close()


def shape_of(args: argparse.Namespace) -> Variant:
    """TeleChat-12B in the sizes of `args`."""
    return replace(get_variant("telechat_12b"), num_layers=args.layers, hidden_size=args.hidden,
                   intermediate_size=args.ffn, num_heads=args.heads, vocab_size=args.vocab,
                   training_seqlen=args.context, base_seqlen=args.context)


def make_checkpoints(variant: Variant, folder: Path, layouts: Sequence[str] = ("llama", "mindspore")) -> None:
    """official/ in `folder`, of random weights, and a folder of them in float32 for each layout. SystemExit."""
    from convert import make_checkpoint
    make_checkpoint(folder / "official", variant, "safetensors", 100 << 30)
    for layout in layouts:
        done = subprocess.run([sys.executable, "-m", "research.telechat", "convert", "--from", str(folder / "official"),
                               "--to", layout, str(folder / layout), "--dtype", "float32"], cwd=ROOT, text=True,
                              capture_output=True, check=False)
        if done.returncode:
            raise SystemExit(f"error: {(done.stderr or done.stdout).strip()[-500:]}")


def compare(sides: List[Side], rounds: int, job: Dict[str, Any], figure: str, less_is_better: bool) -> Dict[str, Any]:
    """Medians of `figure` of both sides, which take turns, and of the ratio, over 1 where the first is faster."""
    found: Dict[str, List[Dict[str, Any]]] = {side.name: [] for side in sides}
    for number in range(rounds):
        for side in sides if number % 2 else reversed(sides):
            found[side.name].append(side.ask(**job))
    ours, theirs = ([answer[figure] for answer in found[side.name]] for side in sides)
    ratios = [b / a if less_is_better else a / b for a, b in zip(ours, theirs)]
    result = {key: value for key, value in job.items() if key != "steps"}
    result.update(ours=statistics.median(ours), theirs=statistics.median(theirs), ratio=statistics.median(ratios),
                  lowest_ratio=min(ratios), highest_ratio=max(ratios))
    if "growth" in found[sides[0].name][0]:
        result["growth"], result["growth_of_theirs"] = (
            statistics.median([answer["growth"] for answer in found[side.name]]) for side in sides)
    return result


def check_equal(sides: List[Side], batch: int, prompt: int) -> int:
    """Compile and warm up both; how many of the first tokens of both are equal. SystemExit where the first differs.

    Two tokens that are nearly as likely as each other may change places by rounding, and all that follows with them.
    """
    answers = [side.ask(task="decode", batch=batch, prompt=prompt, new=5)["tokens"] for side in sides]
    equal = sum(a == b for ours, theirs in zip(*answers) for a, b in zip(ours, theirs))
    if answers[0][0][0] != answers[1][0][0] or equal < 0.6 * 5 * batch:
        raise SystemExit(f"error: the two sides answer differently: {answers[0]} and {answers[1]}")
    return equal


def jobs(args: argparse.Namespace) -> List[Dict[str, Any]]:
    """What is measured."""
    found: List[Dict[str, Any]] = []
    if "decode" in args.tasks:
        found += [{"task": "decode", "batch": batch, "prompt": args.prompt, "new": args.new} for batch in args.batch]
    if "prefill" in args.tasks:
        found += [{"task": "prefill", "batch": 1, "prompt": length, "new": 1} for length in args.prefill]
    if "train" in args.tasks and not args.vllm:
        found.append({"task": "train", "batch": args.train[0], "prompt": args.train[1], "steps": 3})
    return found


def measure(args: argparse.Namespace, options: Sequence[str]) -> List[Dict[str, Any]]:
    """One row for each job."""
    rows = []
    with tempfile.TemporaryDirectory(dir=args.work_dir) as folder:
        make_checkpoints(shape_of(args), Path(folder))
        peer = Side("vllm", folder, options, args.vllm) if args.vllm else Side("transformers", folder, options)
        sides = [Side("telechat", folder, options), peer]
        try:
            for job in jobs(args):
                if job["task"] == "train":
                    losses = [side.ask(**{**job, "steps": 1})["loss"] for side in sides]
                    if abs(losses[0] - losses[1]) > TOLERANCE * abs(losses[1]):
                        raise SystemExit(f"error: the first step has the loss {losses[0]} here and {losses[1]} there")
                    row = compare(sides, args.rounds, job, "seconds", True)
                else:
                    check_equal(sides, job["batch"], job["prompt"])
                    row = compare(sides, args.rounds, job, *(("tokens_per_second", False) if job["task"] == "decode"
                                                             else ("first", True)))
                rows.append(row)
                print(line(row, peer.name), flush=True)
        finally:
            for side in sides:
                side.end()
    return rows


def line(row: Dict[str, Any], peer: str) -> str:
    """One row as text."""
    spread = f"{row['ratio']:.2f} times as fast ({row['lowest_ratio']:.2f} to {row['highest_ratio']:.2f})"
    if row["task"] == "decode":
        return (f"decode, batch {row['batch']:3}: {row['ours']:7.0f} tokens/s, {peer} {row['theirs']:7.0f}: "
                f"{spread}; growth {row['growth']:.2f}, {peer} {row['growth_of_theirs']:.2f}")
    what = "prompt" if row["task"] == "prefill" else "train "
    return (f"{what} of {row['batch']} x {row['prompt']:4}: {row['ours'] * 1e3:7.1f} ms, {peer} "
            f"{row['theirs'] * 1e3:7.1f} ms: {spread}")


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    add("--batch", type=int, nargs="+", default=[1, 4, 16], help="sequences at once, in decoding")
    add("--prompt", type=int, default=32, help="tokens of each prompt, in decoding")
    add("--new", type=int, default=256, help="tokens of each answer")
    add("--prefill", type=int, nargs="+", default=[512, 2048], help="tokens of the prompts that are read")
    add("--train", type=int, nargs=2, default=[4, 256], metavar=("BATCH", "LENGTH"), help="of the training step")
    add("--hidden", type=int, default=256)
    add("--layers", type=int, default=4)
    add("--heads", type=int, default=8)
    add("--ffn", type=int, default=768)
    add("--vocab", type=int, default=8000)
    add("--context", type=int, help="tokens of the longest sequence (default: 1024, or what the prompts need)")
    add("--rounds", type=int, default=5, help="turns of which the medians count")
    add("--vllm", metavar="PYTHON", help="compare with vLLM, which this interpreter can import, not with transformers; "
        "without a training step")
    add("--work_dir", help="where the temporary folder is made")
    add("--json", type=Path, help="write the figures there")
    add("--worker", choices=SIDES, help=argparse.SUPPRESS)
    add("--folder", help=argparse.SUPPRESS)
    options = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(options)
    longest = max([1024 if args.context is None else 1, args.prompt + args.new, args.train[1],
                   *([length + 8 for length in args.prefill] if "prefill" in args.tasks else [])])
    args.context = args.context or -(-longest // 128) * 128
    if args.worker:
        worker(args)
        return 0
    load = os.getloadavg()[0]
    print(f"float32, hidden {args.hidden}, {args.layers} layers, vocabulary {args.vocab}, load {load:.1f} on "
          f"{os.cpu_count()} cores; medians of {args.rounds} turns", flush=True)
    rows = measure(args, options)
    if args.json:
        args.json.write_text(json.dumps({"load": load, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
