"""Speed of concurrent requests: the scheduler compared with one request at a time. Random weights, CPU, one process.

    python benchmarks/serve.py                      hidden 256, 4 layers, vocabulary 8000, context 1024, float32
    python benchmarks/serve.py --long 4000 --context 4608          and what a long prompt does to the others
    python benchmarks/serve.py --vllm PYTHON            beside vLLM, of whose environment PYTHON is the interpreter

Rows: one by one (`model.stream`), all at once, and 1, 8, 16 and 32 clients, each of which asks again after a pause of
exponentially distributed length (Poisson arrivals). Half of the requests are greedy, half are sampled. Times are those
of `Scheduler.submit` and of the events, without HTTP.

vLLM loads a model of the same sizes that `telechat convert --to llama` wrote, in float32, and gets the same requests
and arrivals in its own process, without HTTP too. Both take turns, --rounds times, so that other load meets both; a
ratio is the median of the rounds' ratios.
"""
import argparse
import contextlib
import heapq
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

os.environ.setdefault("GLOG_v", "3")
sys.path[:1] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import numpy as np
from generate import add_sizes, build_model

from research.telechat.generation.passes import Settings
from research.telechat.generation.requests import Event, Finished, Request, Token
from research.telechat.generation.sampling import Sampling

SAMPLED = {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.95}


class Timed:
    """When a request came, and when its tokens did."""

    def __init__(self, then: Optional[Callable[[], None]] = None):
        self.submitted = time.perf_counter()
        self.tokens: List[float] = []
        self._then = then

    def __call__(self, event: Event) -> None:
        """Called by the scheduler."""
        if isinstance(event, Token):
            self.tokens.append(time.perf_counter())
        elif isinstance(event, Finished):
            assert event.reason in ("stop", "length"), event
            if self._then:
                self._then()


def make_requests(args: argparse.Namespace, count: int) -> List[Request]:
    """Prompts of 8 to --prompt tokens, answers of a quarter of --new tokens to all of them."""
    rng = np.random.RandomState(args.seed)
    return [Request(tuple(rng.randint(10, args.vocab, rng.randint(8, args.prompt + 1)).tolist()),
                    Sampling(**SAMPLED) if number % 2 else Sampling(), int(rng.randint(args.new // 4, args.new + 1)),
                    seed=number) for number in range(count)]


def one_by_one(model: Any, requests: List[Request]) -> List[Timed]:
    """As users of `model.stream` wait for each answer."""
    results = []
    for request in requests:
        timed = Timed()
        sampling = vars(request.sampling)
        settings = {name: sampling[name] for name in ("do_sample", "temperature", "top_k", "top_p")}
        for _ in model.stream(request.prompt, max_new_tokens=request.max_new_tokens, seed=request.seed,
                              eos_token_id=-1, **{**settings, "top_k": settings["top_k"] or 0,
                                                  "top_p": settings["top_p"] or 1.0}):
            timed.tokens.append(time.perf_counter())
        results.append(timed)
    return results


def at_once(scheduler: Any, requests: List[Request]) -> List[Timed]:
    """All requests wait from the beginning."""
    results = []
    for request in requests:
        results.append(Timed())
        scheduler.submit(request, results[-1])
    while scheduler.step():
        pass
    return results


def from_clients(scheduler: Any, requests: List[Request], clients: int, pause: float, seed: int) -> List[Timed]:
    """Each client asks, waits for the answer, pauses for `pause` seconds on average, and asks again."""
    rng = np.random.RandomState(seed)
    waiting = list(requests)
    due: List[Tuple[float, int]] = [(time.perf_counter() + rng.exponential(pause), client) for client in range(clients)]
    heapq.heapify(due)
    results: List[Timed] = []
    while due or scheduler.busy:
        now = time.perf_counter()
        while due and due[0][0] <= now:
            _, client = heapq.heappop(due)
            if waiting:
                def again(client: int = client) -> None:
                    heapq.heappush(due, (time.perf_counter() + rng.exponential(pause), client))
                results.append(Timed(again))
                scheduler.submit(waiting.pop(0), results[-1])
        if not waiting:
            due.clear()
        if scheduler.busy:
            scheduler.step()
        elif due:
            time.sleep(max(due[0][0] - time.perf_counter(), 0))
    return results


def figures(results: List[Timed], started: float) -> Dict[str, float]:
    """What the table shows; times in seconds."""
    first = [timed.tokens[0] - timed.submitted for timed in results]
    between = np.concatenate([np.diff(timed.tokens) for timed in results])
    seconds = max(timed.tokens[-1] for timed in results) - started
    tokens = sum(len(timed.tokens) for timed in results)
    return {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds,
            "first_token_median": float(np.median(first)), "first_token_p99": float(np.percentile(first, 99)),
            "between_median": float(np.median(between)), "between_p99": float(np.percentile(between, 99))}


def beside_long_prompt(model: Any, args: argparse.Namespace, pieces: int, beside: int = 8) -> Dict[str, float]:
    """Time between the tokens of `beside` answers before a prompt of --long tokens comes, and while it is read."""
    scheduler = model.scheduler(Settings(slots=beside + 1, interleaved_prefill_tokens=pieces, reuse=False))
    rng = np.random.RandomState(args.seed)
    results = [Timed() for _ in range(beside)]
    for timed in results:
        scheduler.submit(Request(tuple(rng.randint(10, args.vocab, 16).tolist()), Sampling(), args.new), timed)
    for _ in range(args.new // 4):
        scheduler.step()
    long = Timed()
    scheduler.submit(Request(tuple(rng.randint(10, args.vocab, args.long).tolist()), Sampling(), 2), long)
    while not long.tokens:
        scheduler.step()
    scheduler.close()
    end = long.tokens[0]
    gaps = [(at, gap) for timed in results for at, gap in zip(timed.tokens[1:], np.diff(timed.tokens))]
    alone = np.median([gap for at, gap in gaps if at < long.submitted])
    reading = [gap for at, gap in gaps if long.submitted < at <= end]
    return {"interleaved_prefill_tokens": pieces, "between_alone_median": float(alone),
            "first_token": end - long.submitted, "between_median": float(np.median(reading)),
            "between_p99": float(np.percentile(reading, 99))}


class Vllm:
    """vLLM, in a process of its own (benchmarks/serve_vllm.py)."""

    def __init__(self, process: "subprocess.Popen[str]"):
        self._process = process
        assert process.stdin is not None and process.stdout is not None
        self._input, self._output = process.stdin, process.stdout

    def ask(self, requests: List[Request], clients: int, args: argparse.Namespace) -> Dict[str, float]:
        """Its figures. SystemExit: it has ended."""
        def settings(sampling: Sampling) -> Dict[str, Any]:
            return {name: SAMPLED[name] for name in ("temperature", "top_k", "top_p")} if sampling.do_sample else {
                "temperature": 0}
        job = {"requests": [[request.prompt, request.max_new_tokens, settings(request.sampling), request.seed]
                            for request in requests], "clients": clients, "pause": args.pause, "seed": args.seed}
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(job), file=self._input, flush=True)
        line = self._output.readline()
        if not line:
            raise SystemExit(f"error: vLLM has ended with exit code {self._process.wait()}; what it said is above")
        answer = json.loads(line)
        results = []
        for times in answer["results"]:
            timed = Timed()
            timed.submitted, timed.tokens = times["submitted"], times["tokens"]
            results.append(timed)
        return figures(results, answer["started"])


@contextlib.contextmanager
def started_vllm(args: argparse.Namespace) -> Iterator[Vllm]:
    """vLLM with an exported model of the sizes in `args`. SystemExit."""
    from beside_llama import make_checkpoints

    from research.telechat.spec.variants import get_variant
    variant = replace(get_variant("telechat_12b"), num_layers=args.layers, hidden_size=args.hidden,
                      num_heads=args.heads, intermediate_size=args.ffn, vocab_size=args.vocab,
                      base_seqlen=args.context, training_seqlen=args.context)
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoints(variant, Path(folder), ("llama",))
        command = [args.vllm, str(Path(__file__).with_name("serve_vllm.py")), f"{folder}/llama", "--slots",
                   str(args.slots), "--context", str(args.context), *(["--eager"] if args.eager else [])]
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        assert process.stdin is not None and process.stdout is not None
        try:
            if process.stdout.readline() != "ready\n":
                raise SystemExit(f"error: vLLM did not start (exit code {process.wait()}); what it said is above")
            yield Vllm(process)
        finally:
            process.stdin.close()
            process.wait(60)


def parse(argv: Any = None) -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(description="Measure many requests at a time on a CPU.")
    add = parser.add_argument
    add("--requests", type=int, default=48, help="in each row")
    add("--clients", type=int, nargs="*", default=[1, 8, 16, 32])
    add("--pause", type=float, default=0.1, help="seconds a client pauses, on average")
    add("--slots", type=int, default=16, help="sequences at once")
    add("--buckets", type=int, nargs="+", default=[1, 4, 16], help="batches that have a graph")
    add("--prompt", type=int, default=64, help="tokens of the longest prompt")
    add("--new", type=int, default=64, help="tokens of the longest answer")
    add("--long", type=int, default=0, help="tokens of a long prompt that comes while others are answered")
    add("--pieces", type=int, nargs="*", default=[32, 256], help="with --long, tokens of it that are read in a step")
    add_sizes(parser)
    add("--seed", type=int, default=0)
    add("--vllm", metavar="PYTHON", help="interpreter of an environment with vLLM, to measure it as well")
    add("--eager", action="store_true", help="with --vllm: without torch.compile")
    add("--rounds", type=int, default=1, help="how often each row is measured")
    add("--json", help="write the figures there")
    return parser.parse_args(argv)


def measure(runs: List[Tuple[str, Optional[int], Callable[[], List[Timed]]]], vllm: Optional[Vllm],
            requests: List[Request], args: argparse.Namespace) -> List[Dict[str, Any]]:
    """Measure and print the rows; where vLLM is measured too (not one by one), its rows follow ours."""
    found: Dict[str, List[Dict[str, float]]] = {}
    loads = {}
    for _ in range(args.rounds):
        for name, clients, run in runs:
            loads[name] = loads[f"vLLM, {name}"] = os.getloadavg()[0]
            started = time.perf_counter()
            found.setdefault(name, []).append(figures(run(), started))
            if vllm and clients is not None:
                found.setdefault(f"vLLM, {name}", []).append(vllm.ask(requests, clients, args))
    results: List[Dict[str, Any]] = []
    for name, rounds in found.items():
        row: Dict[str, Any] = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
        for key, other in (("times_one_by_one", "one by one"), ("times_vllm", f"vLLM, {name}")):
            if other in found and other != name:
                row[key] = statistics.median(mine["tokens_per_second"] / theirs["tokens_per_second"]
                                             for mine, theirs in zip(rounds, found[other]))
        results.append({"name": name, "load": loads[name], **row})
        ratios = "".join(f", {row[key]:.2f} times {what}" for key, what in (
            ("times_one_by_one", "one by one"), ("times_vllm", "vLLM")) if key in row)
        print(f"{name:25} {row['tokens_per_second']:9.0f} "
              f"{1000 * row['first_token_median']:13.1f} ms {1000 * row['first_token_p99']:9.1f} ms "
              f"{1000 * row['between_median']:13.1f} ms {1000 * row['between_p99']:9.1f} ms{ratios}", flush=True)
    return results


def main(argv: Any = None) -> int:
    """Measure and print."""
    args = parse(argv)
    args.batch = [args.slots + 1]
    model = build_model(args)
    settings = Settings(slots=args.slots, buckets=tuple(args.buckets), max_queue=args.requests)
    started = time.perf_counter()
    model.scheduler(settings).warm_up()
    list(model.stream([5, 6, 7], max_new_tokens=2, do_sample=False))
    print(f"compiled {len(args.buckets) + 2} graphs in {time.perf_counter() - started:.1f} s; load "
          f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    requests = make_requests(args, args.requests)
    runs: List[Tuple[str, Optional[int], Callable[[], List[Timed]]]] = [
        ("one by one", None, lambda: one_by_one(model, requests)),
        ("all at once", 0, lambda: at_once(model.scheduler(settings), requests))]
    for clients in args.clients:
        runs.append((f"{clients} clients", clients, lambda clients=clients: from_clients(
            model.scheduler(settings), requests, clients, args.pause, args.seed)))
    with contextlib.ExitStack() as stack:
        vllm = stack.enter_context(started_vllm(args)) if args.vllm else None
        if vllm:
            vllm.ask(requests, 0, args)                                  # warms it up
        print("                           tokens/s   first token, median and p99    between tokens, median and p99")
        results = measure(runs, vllm, requests, args)
    for pieces in args.pieces if args.long else ():
        beside_long_prompt(model, args, pieces)                          # the first time, memory is taken
        found = beside_long_prompt(model, args, pieces)
        results.append({"name": f"beside {args.long} tokens", "load": os.getloadavg()[0], **found})
        print(f"beside a prompt of {args.long} tokens, {pieces} in a step: between tokens "
              f"{1000 * found['between_alone_median']:.1f} ms before it, then median "
              f"{1000 * found['between_median']:.1f} ms and p99 {1000 * found['between_p99']:.1f} ms; its first token "
              f"after {found['first_token']:.2f} s", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps({"options": vars(args), "results": results}, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
