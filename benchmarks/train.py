"""Benchmark: one training step on the CPU compared with PyTorch, and how compilation grows with the number of layers.

    python benchmarks/train.py [--rounds 5] [--steps 4] [--json FILE]            step time
    python benchmarks/train.py --compile 8 64 [--json FILE]                      compile time of N layers
    python benchmarks/train.py --by_layer 16 [--json FILE]  N layers, as a whole and layer by layer
    python benchmarks/train.py --loss 2048 [--json FILE]    N tokens, loss at once and in chunks

One step is forward pass, backward pass, clipping by the global norm and AdamW, in float32, of a model of TeleChat-12B's
shape (hidden 256, 4 layers, 8 heads, feed-forward 768, vocabulary 8000, sequence 256, batch 4). The PyTorch model is
written here from the same formulas, as a user would write it: scaled_dot_product_attention, cross_entropy, fused AdamW
where there is one. The two take turns; medians are shown. The peak is the best of square float32 matrix products in the
same framework and process. Compile times come from fresh processes, one for each number of layers. Time and memory of
the two ways in which a deep model can be trained on a CPU come from fresh processes, too; so do those of a step of one
layer and a vocabulary of 64,000 whose loss is computed for all tokens at once and in chunks.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
os.environ.setdefault("GLOG_v", "3")

import numpy as np

SHAPE = {"hidden_size": 256, "num_layers": 4, "num_heads": 8, "intermediate_size": 768, "vocab_size": 8000,
         "seq_length": 256}
BATCH = 4
VOCABULARY = 64000                         # of the step whose loss is computed in two ways
SMALL = {**SHAPE, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "vocab_size": 200, "seq_length": 32}


def batch_of(shape: Dict[str, int]) -> np.ndarray:
    """Token ids [BATCH, seq + 1]."""
    return np.random.default_rng(0).integers(4, shape["vocab_size"], (BATCH, shape["seq_length"] + 1)).astype(np.int32)


def flops_of_step(shape: Dict[str, int]) -> float:
    """Floating-point operations of the matrix products of one step."""
    from research.telechat.spec.flops import flops_per_token
    hidden, ffn, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_layers"]
    weights = layers * (4 * hidden * hidden + 3 * hidden * ffn) + shape["vocab_size"] * hidden
    return flops_per_token(weights, layers, hidden, shape["seq_length"]) * BATCH * shape["seq_length"]


def best_matmul(multiply: Callable[[int], Callable[[], Any]]) -> float:
    """Best FLOP/s of square products. multiply: size -> a function that computes one product and waits for it."""
    best = 0.0
    for size in (512, 1024, 2048):
        run = multiply(size)
        run()
        for _ in range(5):
            started = time.perf_counter()
            run()
            best = max(best, 2.0 * size ** 3 / (time.perf_counter() - started))
    return best


def mindspore_step(shape: Dict[str, Any]) -> Callable[[], float]:
    """A function that runs one step of this project's model and returns the loss; shape: keys of the model's config."""
    import mindspore as ms

    from research.telechat.telechat import TelechatForCausalLM
    from research.telechat.telechat_config import TelechatConfig
    from research.telechat.training.optimizer import TelechatAdamW
    from research.telechat.training.step import TelechatTrainOneStepCell
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU", max_call_depth=10000)
    ms.set_seed(0)
    model = TelechatForCausalLM(TelechatConfig(net_name="telechat_12b", amp_level="O0", **shape))
    model.set_train(True)
    optimizer = TelechatAdamW(model.trainable_params(), learning_rate=1e-4)
    step = TelechatTrainOneStepCell(model, optimizer, use_clip_grad=True, max_grad_norm=1.0)
    step.set_train(True)
    ids = ms.Tensor(batch_of(shape))
    return lambda: step(ids, ids)[0].asnumpy().item()


def mindspore_matmul(size: int) -> Callable[[], Any]:
    """One product of [size, size] float32 matrices in MindSpore."""
    import mindspore as ms
    matrix = ms.Tensor(np.random.default_rng(0).normal(size=(size, size)).astype(np.float32))
    multiply = ms.ops.MatMul()

    def run() -> None:
        multiply(matrix, matrix)
        ms.runtime.synchronize()
    return run


def torch_step(shape: Dict[str, int]) -> Callable[[], float]:
    """The same in PyTorch."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Norm(nn.Module):
        def __init__(self, size: int):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(size))

        def forward(self, x):
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight

    hidden, heads = shape["hidden_size"], shape["num_heads"]
    dim = hidden // heads
    angles = torch.outer(torch.arange(shape["seq_length"]).float(), 10000.0 ** (-torch.arange(0, dim, 2) / dim))
    angles = torch.cat([angles, angles], -1)
    cos, sin = angles.cos(), angles.sin()

    def rotate(x):
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = Norm(hidden), Norm(hidden)
            self.q, self.kv = nn.Linear(hidden, hidden, False), nn.Linear(hidden, 2 * hidden, False)
            self.o = nn.Linear(hidden, hidden)
            self.gate = nn.Linear(hidden, shape["intermediate_size"], False)
            self.up = nn.Linear(hidden, shape["intermediate_size"], False)
            self.down = nn.Linear(shape["intermediate_size"], hidden)

        def forward(self, x):
            size, length, _ = x.shape
            h = self.norm1(x)
            q = self.q(h).view(size, length, heads, dim).transpose(1, 2)
            k, v = self.kv(h).view(size, length, heads, 2 * dim).transpose(1, 2).split(dim, -1)
            h = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
            x = x + self.o(h.transpose(1, 2).reshape(size, length, hidden))
            h = self.norm2(x)
            return x + self.down(F.silu(self.gate(h)) * self.up(h))

    torch.manual_seed(0)
    embedding = nn.Embedding(shape["vocab_size"], hidden)
    model = nn.Sequential(embedding, *[Layer() for _ in range(shape["num_layers"])], Norm(hidden),
                          nn.Linear(hidden, shape["vocab_size"], False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.from_numpy(batch_of(shape)).long()

    def run() -> float:
        logits = model(ids[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss)
    return run


def torch_matmul(size: int) -> Callable[[], Any]:
    """One product of [size, size] float32 matrices in PyTorch."""
    import torch
    matrix = torch.randn(size, size)
    return lambda: matrix @ matrix


def worker(kind: str, steps: int) -> None:
    """Answer each line on stdin with the median seconds of `steps` steps; the first answer is the peak."""
    step = mindspore_step(SHAPE) if kind == "mindspore" else torch_step(SHAPE)
    step()
    print("PEAK", best_matmul(mindspore_matmul if kind == "mindspore" else torch_matmul), flush=True)
    for _ in sys.stdin:
        step()
        times = []
        for _ in range(steps):
            started = time.perf_counter()
            step()
            times.append(time.perf_counter() - started)
        print("STEP", statistics.median(times), flush=True)


def answer(process: subprocess.Popen, word: str) -> float:
    """The number behind the next line that begins with `word`."""
    for line in process.stdout:
        if line.startswith(f"{word} "):
            return float(line.split()[1])
    raise SystemExit(f"the measured process ended early:\n{process.stderr.read()[-2000:]}")


def measure_steps(rounds: int, steps: int) -> List[Dict[str, float]]:
    """One entry for each framework; they take turns, so that other load meets both."""
    kinds = ["mindspore", "torch"]
    try:
        import torch  # noqa: F401
    except ImportError:
        kinds = kinds[:1]
    processes = {kind: subprocess.Popen([sys.executable, __file__, "--worker", kind, "--steps", str(steps)],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                        text=True) for kind in kinds}
    peaks = {kind: answer(process, "PEAK") for kind, process in processes.items()}
    times: Dict[str, List[float]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind, process in processes.items():
            process.stdin.write("\n")
            process.stdin.flush()
            times[kind].append(answer(process, "STEP"))
    for process in processes.values():
        process.stdin.close()
        process.wait(timeout=60)
    flops = flops_of_step(SHAPE)
    return [{"framework": kind, "seconds": statistics.median(times[kind]), "lowest": min(times[kind]),
             "peak_gflops": peaks[kind] / 1e9, "share_of_peak": flops / statistics.median(times[kind]) / peaks[kind]}
            for kind in kinds]


def figures_of_worker(what: str, *arguments: str) -> List[float]:
    """The numbers that a fresh process of this file prints behind FIGURES; `what` it measures, for the error."""
    done = subprocess.run([sys.executable, __file__, "--worker", *arguments], text=True, capture_output=True,
                          check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("FIGURES ")]
    if not lines:
        raise SystemExit(f"{what} failed:\n{done.stdout[-1000:]}{done.stderr[-2000:]}")
    return [float(word) for word in lines[0].split()[1:]]


def measure_compile(layers: List[int]) -> List[Dict[str, float]]:
    """Seconds until the end of the first step, building not counted, of small models of `layers` layers."""
    results = []
    for count in layers:
        (seconds,) = figures_of_worker(f"{count} layers", "compile", "--steps", str(count))
        results.append({"layers": count, "seconds": seconds})
        print(f"{count:4} layers  {results[-1]['seconds']:7.2f} s to the end of the first step  "
              f"{results[-1]['seconds'] / results[0]['seconds']:5.2f} times", flush=True)
    return results


def measure_by_layer(layers: int, steps: int) -> List[Dict[str, Any]]:
    """First step, further steps and memory of a model of SHAPE's width in both ways, one after the other."""
    results = []
    for name in ("as a whole", "layer by layer"):
        first, further, memory = figures_of_worker(f"{layers} layers {name}", name, "--steps", str(steps), "--layers",
                                                   str(layers))
        results.append({"way": name, "layers": layers, "first": first, "seconds": further, "gigabytes": memory})
        print(f"{layers} layers {name:15} first step {first:6.1f} s, further {further:6.2f} s each, memory "
              f"{memory:5.2f} GB", flush=True)
    return results


def measure_loss(tokens: int, steps: int) -> List[Dict[str, Any]]:
    """Time and memory of a step of `tokens` tokens with head and loss of all at once and in chunks, one after the
    other."""
    results = []
    for name in ("loss at once", "loss in chunks"):
        _, further, memory = figures_of_worker(name, name, "--steps", str(steps), "--tokens", str(tokens))
        results.append({"way": name, "tokens": tokens, "seconds": further, "gigabytes": memory})
        print(f"{tokens} tokens, {name:15} {further:6.2f} s each, memory {memory:5.2f} GB", flush=True)
    return results


def worker_in_full(shape: Dict[str, Any], steps: int) -> None:
    """Print seconds of the first step, of further ones (median), and the most memory in GB."""
    import resource
    step = mindspore_step(shape)
    times = []
    for _ in range(steps + 1):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)
    print("FIGURES", times[0], statistics.median(times[1:]), memory)


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="steps per round and framework")
    parser.add_argument("--compile", type=int, nargs="+", metavar="LAYERS", help="measure compile time instead")
    parser.add_argument("--by_layer", type=int, metavar="LAYERS", help="measure both ways to train deep models instead")
    parser.add_argument("--loss", type=int, metavar="TOKENS", help="measure both ways to compute the loss instead")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--worker", choices=("mindspore", "torch", "compile", "as a whole", "layer by layer",
                                             "loss at once", "loss in chunks"),
                        help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.layers:
        by_layer = args.worker == "layer by layer"
        worker_in_full({**SHAPE, "num_layers": args.layers, "train_layer_by_layer": by_layer}, args.steps)
        return 0
    if args.tokens:
        chunk = args.tokens // 8 if args.worker == "loss in chunks" else 0
        worker_in_full({**SHAPE, "num_layers": 1, "vocab_size": VOCABULARY, "seq_length": args.tokens // BATCH,
                        "loss_chunk_rows": chunk}, args.steps)
        return 0
    if args.worker == "compile":
        step = mindspore_step({**SMALL, "num_layers": args.steps})
        started = time.perf_counter()
        step()
        print("FIGURES", time.perf_counter() - started)
        return 0
    if args.worker:
        worker(args.worker, args.steps)
        return 0
    if args.compile:
        results = measure_compile(args.compile)
    elif args.by_layer:
        results = measure_by_layer(args.by_layer, args.steps)
    elif args.loss:
        results = measure_loss(args.loss, args.steps)
    else:
        results = measure_steps(args.rounds, args.steps)
        for row in results:
            print(f"{row['framework']:>10}: {row['seconds'] * 1e3:7.1f} ms per step (lowest {row['lowest'] * 1e3:.1f})"
                  f", {row['share_of_peak']:.0%} of its own matrix-product peak of {row['peak_gflops']:.0f} GFLOP/s")
        if len(results) == 2:
            print(f"     ratio: {results[0]['seconds'] / results[1]['seconds']:.2f}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
