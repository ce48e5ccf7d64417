"""Speed of generation: prompts, tokens, first token, and how near the memory's limit. Random weights, greedy, CPU.

    python benchmarks/generate.py                       hidden 256, 4 layers, vocabulary 8000, context 1024, float32
    python benchmarks/generate.py --torch               and PyTorch, the same formulas and sizes, on the same cores
    python benchmarks/generate.py --slow                and MindFormers' own loop, and without a cache

Everything goes through `model.generate` as users call it. A figure is the best of --repeat runs; the load of the
machine is printed, as other programs disturb such short steps. Measured figures are in docs/chat.md.
"""
import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List

os.environ.setdefault("GLOG_v", "3")
sys.path[:1] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import numpy as np

BLOCK = 16                                 # tokens per block of the cache


class Clock:
    """A streamer that notes when each token comes. The first call brings the prompts."""

    def __init__(self) -> None:
        self.times: List[float] = []

    def put(self, _value: Any) -> None:
        """Called by `generate`."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called by `generate`."""


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """The options that `build_model` reads, without --batch."""
    for name, size in (("hidden", 256), ("layers", 4), ("heads", 8), ("ffn", 768), ("vocab", 8000), ("context", 1024)):
        parser.add_argument(f"--{name}", type=int, default=size)


def build_model(args: argparse.Namespace, use_past: bool = True) -> Any:
    """A model of the sizes in `args` with random weights."""
    import mindspore as ms

    from research.telechat.run.load import quieten
    from research.telechat.telechat import TelechatForCausalLM
    from research.telechat.telechat_config import TelechatConfig
    quieten()
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
    blocks = max(args.batch) * -(-args.context // BLOCK)
    model = TelechatForCausalLM(TelechatConfig(
        num_layers=args.layers, hidden_size=args.hidden, intermediate_size=args.ffn, num_heads=args.heads,
        vocab_size=args.vocab, seq_length=args.context, use_past=use_past, block_size=BLOCK, num_blocks=blocks,
        compute_dtype="float32", param_init_type="float32", res_dtype="float32", training_seqlen=args.context,
        base_seqlen=args.context, eos_token_id=-1))
    model.set_train(False)
    return model


def measure(generate: Callable[[list, int, Clock], Any], prompts: list, new: int, repeat: int) -> Dict[str, Any]:
    """Tokens per second and the time to the first token, best of `repeat`. `generate(prompts, new tokens, clock)`."""
    generate(prompts, 3, Clock())                                        # compiles
    best: Dict[str, Any] = {}
    decoding: List[float] = []
    for _ in range(repeat):
        clock = Clock()
        started = time.perf_counter()
        generate(prompts, new, clock)
        steps = np.diff(clock.times[1:])
        first = clock.times[1] - started
        quarter = max(len(steps) // 4, 1)
        run = {"tokens_per_second": len(prompts) * (len(steps) + 1) / (clock.times[-1] - started),
               "decode_tokens_per_second": len(prompts) * len(steps) / steps.sum(),
               "decode_tokens_per_second_median": len(prompts) / float(np.median(steps)),
               "last_quarter_over_first": float(np.median(steps[-quarter:]) / np.median(steps[:quarter])),
               "first_token_seconds": first, "prefill_tokens_per_second": sum(map(len, prompts)) / first}
        decoding.append(float(run["decode_tokens_per_second"]))
        if not best or run["tokens_per_second"] > best["tokens_per_second"]:
            best = {**run, "first_token_seconds": min(first, best.get("first_token_seconds", first))}
    return {**best, "all_decode_tokens_per_second": decoding}


def read_bandwidth(size: int) -> float:
    """Bytes per second at which a matrix of `size` bytes is read in a product with a vector; best of 30."""
    matrix = np.ones((max(size // 4 // 1024, 1), 1024), np.float32)
    vector = np.ones(1024, np.float32)
    best = float("inf")
    for _ in range(30):
        started = time.perf_counter()
        matrix @ vector
        best = min(best, time.perf_counter() - started)
    return matrix.nbytes / best


def report(name: str, batch: int, figures: Dict[str, float]) -> None:
    """One line of the table."""
    limit = f"{100 * figures['share_of_limit']:5.0f} %" if "share_of_limit" in figures else "      -"
    print(f"{name:22} {batch:5} {figures['prefill_tokens_per_second']:10.0f} "
          f"{1000 * figures['first_token_seconds']:9.1f} ms {figures['decode_tokens_per_second']:9.0f} "
          f"{figures['decode_tokens_per_second_median']:9.0f} {figures['last_quarter_over_first']:8.2f} {limit}",
          flush=True)


def parse(argv: Any = None) -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(description="Measure generation on a CPU.")
    add = parser.add_argument
    add("--batch", type=int, nargs="+", default=[1, 4, 16], help="sequences at once")
    add("--prompt", type=int, default=32, help="tokens of each prompt")
    add("--new", type=int, default=256, help="tokens of each answer")
    add_sizes(parser)
    add("--repeat", type=int, default=3, help="runs of which the best counts")
    add("--torch", action="store_true", help="measure PyTorch as well")
    add("--slow", action="store_true", help="also measure MindFormers' own loop, and generation without a cache")
    add("--json", help="write the figures there")
    return parser.parse_args(argv)


def main(argv: Any = None) -> int:
    """Measure and print."""
    args = parse(argv)
    rng = np.random.RandomState(0)
    prompts = {batch: rng.randint(10, args.vocab, (batch, args.prompt)).tolist() for batch in args.batch}
    model = build_model(args)
    weights = sum(param.nbytes for param in model.trainable_params())
    weights -= 4 * args.vocab * args.hidden                              # the embedding: a few rows are read
    per_token = 2 * 4 * args.layers * args.hidden                        # bytes of keys and values
    cache = sum(param.nbytes for param in model.get_parameters() if "_cache" in param.name)
    print(f"weights read per step {weights / 1e6:.1f} MB; cache {per_token} bytes per token, "
          f"{cache / 1e6:.1f} MB for {max(args.batch)} x {args.context} tokens; load {os.getloadavg()[0]:.1f} "
          f"on {os.cpu_count()} cores")
    print("                       batch  prompt t/s  first token decode t/s   median   growth  limit", flush=True)
    results: List[Dict[str, Any]] = []

    def run(name: str, generate: Callable, batch: int, new: int) -> None:
        figures = measure(generate, prompts[batch], new, args.repeat)
        if name == "telechat":
            read = weights + batch * per_token * (args.prompt + new / 2)
            figures["share_of_limit"] = read / read_bandwidth(int(read)) * figures["decode_tokens_per_second"] / batch
        report(name, batch, figures)
        results.append({"name": name, "batch": batch, "load": os.getloadavg()[0], **figures})

    def with_model(measured: Any, function: Callable) -> Callable:
        return lambda prompts, new, clock: function(measured, prompts, max_new_tokens=new, do_sample=False,
                                                    streamer=clock)

    for batch in args.batch:
        run("telechat", with_model(model, type(model).generate), batch, args.new)
    if args.torch:
        from generate_torch import TorchTelechat
        reference = TorchTelechat(args.hidden, args.layers, args.heads, args.ffn, args.vocab, args.context)
        for batch in args.batch:
            run("PyTorch", reference.generate, batch, args.new)
    if args.slow:
        from mindformers.generation.text_generator import GenerationMixin
        for batch in args.batch:
            model._name_phases(batch)
            run("MindFormers' loop", with_model(model, GenerationMixin.generate), batch, min(args.new, 64))
        without = build_model(args, use_past=False)
        run("without cache", with_model(without, type(without).generate), args.batch[0], 8)
    if args.json:
        Path(args.json).write_text(json.dumps({"options": vars(args), "results": results}, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
