"""Speed of generated answers in an evaluation: through the scheduler, and in batches that wait for the longest.

    python benchmarks/evaluation.py                       the quick start's model with random weights, 64 requests, CPU
    python benchmarks/evaluation.py --requests 16 --json figures.json

Prompts and answers have mixed lengths, as those of a benchmark have: most are short, a few take the whole limit. The
same requests go once through `TelechatLM`, as `telechat evaluate` sends them, and once through `model.generate` in
batches of the same size, each of which ends with its longest answer. Both compile before the clock starts. Passes
through the weights are counted as well: they do not depend on what else the machine does.
"""
import argparse
import functools
import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, Tuple
from typing import Counter as Counts

os.environ.setdefault("GLOG_v", "3")
sys.path[:1] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import numpy as np
from run_all import make_tokenizer

BLOCK = 16                                 # tokens per block of the cache


def build_model(args: argparse.Namespace, vocab_size: int) -> Any:
    """A model of the quick start's sizes with random weights that never ends an answer by itself."""
    import mindspore as ms

    from research.telechat.run.load import quieten
    from research.telechat.telechat import TelechatForCausalLM
    from research.telechat.telechat_config import TelechatConfig
    quieten()
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
    model = TelechatForCausalLM(TelechatConfig(
        num_layers=4, hidden_size=256, intermediate_size=768, num_heads=8, vocab_size=vocab_size,
        seq_length=args.context, use_past=True, is_dynamic=True, block_size=BLOCK,
        num_blocks=args.batch_size * -(-args.context // BLOCK), compute_dtype="float32", param_init_type="float32",
        res_dtype="float32", training_seqlen=args.context, base_seqlen=args.context, eos_token_id=-1))
    model.set_train(False)
    return model


def mixed(args: argparse.Namespace) -> List[Tuple[List[int], int]]:
    """(prompt, tokens of the answer) of each request: exponentially distributed lengths."""
    rng = np.random.default_rng(args.seed)
    found = []
    for _ in range(args.requests):
        prompt = int(min(16 + rng.exponential(48), args.context // 4))
        answer = int(min(8 + rng.exponential(args.answer / 4), args.answer))
        found.append((rng.integers(10, 400, prompt).tolist(), answer))
    return found


def by_scheduler(lm: Any, requests: List[Tuple[List[int], int]]) -> None:
    """As the command sends them."""
    prompts = {str(number): ids for number, (ids, _) in enumerate(requests)}
    lm.tok_encode = lambda text, **_: prompts[text]
    lm.generate_until([SimpleNamespace(args=(str(number), {"until": [], "max_gen_toks": answer}))
                       for number, (_, answer) in enumerate(requests)])


def by_batches(model: Any, requests: List[Tuple[List[int], int]], size: int) -> None:
    """In batches of `size`, sorted by the length of the prompt; each takes as long as its longest answer."""
    ordered = sorted(requests, key=lambda each: -len(each[0]))
    for start in range(0, len(ordered), size):
        batch = ordered[start:start + size]
        longest = max(len(ids) for ids, _ in batch)
        padded = np.array([[0] * (longest - len(ids)) + ids for ids, _ in batch], np.int64)
        mask = np.array([[0] * (longest - len(ids)) + [1] * len(ids) for ids, _ in batch], np.int64)
        model.generate(padded, attention_mask=mask, max_new_tokens=max(answer for _, answer in batch), do_sample=False)


def passes_of(engine: Any, way: Callable[[], None]) -> int:
    """Passes through the model's weights while `way` runs: prompts or pieces of them, and steps of all answers."""
    counted: Counts[str] = Counter()
    kept = {name: getattr(engine, name) for name in ("read", "read_piece", "advance")}

    def counting(name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            counted[name] += 1
            return kept[name](*args)
        return call
    for name in kept:
        setattr(engine, name, counting(name))
    try:
        way()
    finally:
        for name in kept:
            delattr(engine, name)
    return sum(counted.values())


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="Requests per second of an evaluation.")
    add = parser.add_argument
    add("--requests", type=int, default=64)
    add("--answer", type=int, default=256, help="tokens of the longest answers")
    add("--context", type=int, default=512)
    add("--batch_size", type=int, default=8)
    add("--repeat", type=int, default=2)
    add("--seed", type=int, default=0)
    add("--tokenizer", default="", help="default: one trained on the examples, as in the quick start")
    add("--json", help="file for the figures")
    args = parser.parse_args()
    from research.telechat.evaluation.harness import TelechatLM
    from research.telechat.telechat_tokenizer import TelechatTokenizer
    with tempfile.TemporaryDirectory() as work:
        tokenizer = TelechatTokenizer(args.tokenizer or str(make_tokenizer(Path(work))))
    model = build_model(args, len(tokenizer.vocab))
    lm = TelechatLM(model, tokenizer, args.batch_size, progress=False)
    requests = mixed(args)
    ways = {"scheduler": lambda some: by_scheduler(lm, some),
            "batches": lambda some: by_batches(model, some, args.batch_size)}
    figures: Dict[str, float] = {}
    for name, way in ways.items():
        # The first time compiles every shape.
        figures[f"{name}_passes"] = passes_of(model.scheduler().engine, functools.partial(way, requests))
        times = []
        for _ in range(args.repeat):
            started = time.perf_counter()
            way(requests)
            times.append(time.perf_counter() - started)
        figures[f"{name}_requests_per_second"] = args.requests / min(times)
    figures["ratio"] = figures["scheduler_requests_per_second"] / figures["batches_requests_per_second"]
    figures["ratio_of_passes"] = figures["batches_passes"] / figures["scheduler_passes"]
    figures["load"] = os.getloadavg()[0]
    for key, value in figures.items():
        print(f"{key}: {value:.2f}")
    if args.json:
        Path(args.json).write_text(json.dumps({**vars(args), **figures}), encoding="utf-8")


if __name__ == "__main__":
    main()
