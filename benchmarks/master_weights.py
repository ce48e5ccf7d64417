"""Benchmark: how much of a fine-tuning at 1e-5 arrives in the weights, by how the optimizer keeps them. On a CPU.

    python benchmarks/master_weights.py                                  the table, then the curves
    python benchmarks/master_weights.py --steps 300 --size 512 --tune 0  a short table alone
    python benchmarks/master_weights.py --picture docs/master_weights.png --json FILE

The table: TelechatAdamW, the optimizer of the recipes, takes 1000 steps with a cosine from 1e-5 on weights of standard
deviation 0.02 and gradients of noise with a drift, all of which bfloat16 holds exactly, so that every kind starts alike
and is pushed alike. The reference is AdamW in float64. Share: the distance travelled, projected on the exact one.
Relative error: the distance from the exact end, as a part of the exact distance.

The curves: a small model learns a made-up language, then is tuned on another one at 1e-5 with each kind.
"""
import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Tuple

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
os.environ.setdefault("GLOG_v", "3")

import numpy as np

RATE, BETAS, EPS = 1e-5, (0.9, 0.95), 1e-8
SHAPE = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "intermediate_size": 192, "vocab_size": 256,
         "seq_length": 64}
BATCH = 8                                  # sequences of a step


class Kind(NamedTuple):
    """How weights are stored, and what the optimizer keeps of them."""

    dtype: str
    master_weights: str


KINDS = {"float32": Kind("float32", "float32"), "bfloat16 and remainder": Kind("bfloat16", "remainder"),
         "float16 and remainder": Kind("float16", "remainder"), "bfloat16": Kind("bfloat16", "none")}


def bfloat16(values: np.ndarray) -> np.ndarray:
    """`values` rounded to bfloat16, float32."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000).view(np.float32)


def exact_adamw(start: np.ndarray, gradients: np.ndarray) -> np.ndarray:
    """Where AdamW without weight decay ends in float64 with a cosine from RATE. gradients: [steps, size]."""
    weights, mean, square = start.astype(np.float64), np.zeros(start.shape), np.zeros(start.shape)
    for step, gradient in enumerate(gradients.astype(np.float64)):
        mean = BETAS[0] * mean + (1 - BETAS[0]) * gradient
        square = BETAS[1] * square + (1 - BETAS[1]) * gradient ** 2
        rate = RATE / 2 * (1 + np.cos(np.pi * step / len(gradients)))
        mean_hat, square_hat = mean / (1 - BETAS[0] ** (step + 1)), square / (1 - BETAS[1] ** (step + 1))
        weights -= rate * mean_hat / (np.sqrt(square_hat) + EPS)
    return weights


def master_values(optimizer: Any) -> List[np.ndarray]:
    """The float32 value of each parameter of a TelechatAdamW, its remainder included."""
    import mindspore as ms

    from research.telechat.spec.precision import REMAINDER_SCALE
    values = []
    for parameter, remainder in zip(optimizer.parameters, optimizer.remainders):
        value = parameter.astype(ms.float32).asnumpy()
        if remainder.dtype == ms.float16:
            value = value + remainder.asnumpy().astype(np.float32) / np.float32(REMAINDER_SCALE)
        values.append(value)
    return values


def distances(steps: int, size: int) -> Dict[str, Tuple[float, float]]:
    """(share, relative error) of each kind after `steps` steps of `size` weights, by the optimizer's own graph."""
    import mindspore as ms
    from mindspore import Parameter, Tensor, nn

    from research.telechat.training.optimizer import TelechatAdamW
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
    rng = np.random.default_rng(0)
    start = bfloat16(rng.normal(0, 0.02, size))
    gradients = bfloat16(rng.normal(0, 1, (steps, size)) + rng.choice([-0.3, 0.0, 0.3], size))
    optimizers = [TelechatAdamW([Parameter(Tensor(start).astype(getattr(ms, kind.dtype)), name=f"weight{number}")],
                                learning_rate=nn.CosineDecayLR(0.0, RATE, steps), betas=BETAS, eps=EPS,
                                master_weights=kind.master_weights) for number, kind in enumerate(KINDS.values())]

    class AllKinds(nn.Cell):
        """One step of every kind."""

        def __init__(self) -> None:
            super().__init__()
            self.optimizers = nn.CellList(optimizers)

        def construct(self, gradient: Tensor) -> Tensor:
            for optimizer in self.optimizers:
                optimizer((gradient,))
            return gradient

    step = AllKinds()
    for gradient in gradients:
        step(Tensor(gradient))
    exact = exact_adamw(start, gradients) - start
    moved = {name: master_values(optimizer)[0].astype(np.float64) - start for name, optimizer in zip(KINDS, optimizers)}
    return {name: (float(way @ exact / (exact @ exact)), float(np.linalg.norm(way - exact) / np.linalg.norm(exact)))
            for name, way in moved.items()}


def language(seed: int, sequences: int) -> np.ndarray:
    """Token ids [sequences, seq + 1] in which each token has four possible successors, one of them likely."""
    rng = np.random.default_rng(seed)
    vocab, length = SHAPE["vocab_size"], SHAPE["seq_length"] + 1
    followers = rng.integers(0, vocab, (vocab, 4))
    text = np.empty((sequences, length), np.int32)
    text[:, 0] = rng.integers(0, vocab, sequences)
    for place in range(1, length):
        text[:, place] = followers[text[:, place - 1], rng.choice(4, sequences, p=[0.7, 0.1, 0.1, 0.1])]
    return text


def train(kind: Kind, rate: float, text: np.ndarray, start: Dict[str, np.ndarray]) -> Tuple[List[float], Any]:
    """(loss of each step, model) of the small model on `text`, BATCH sequences a step; start: values by name."""
    import mindspore as ms

    from research.telechat.telechat import TelechatForCausalLM
    from research.telechat.telechat_config import TelechatConfig
    from research.telechat.training.optimizer import TelechatAdamW
    from research.telechat.training.step import TelechatTrainOneStepCell
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU", max_call_depth=10000)
    ms.set_seed(0)
    model = TelechatForCausalLM(TelechatConfig(net_name="telechat_12b", amp_level="O0", param_init_type=kind.dtype,
                                               norm_init_type="float32", **SHAPE)).set_train()
    for parameter in model.get_parameters():
        if parameter.name in start:
            parameter.set_data(ms.Tensor(start[parameter.name]).astype(parameter.dtype))
    optimizer = TelechatAdamW(model.trainable_params(), learning_rate=rate, betas=BETAS, eps=EPS,
                              master_weights=kind.master_weights)
    step = TelechatTrainOneStepCell(model, optimizer, use_clip_grad=True, max_grad_norm=1.0).set_train()
    losses = []
    for first in range(0, len(text), BATCH):
        batch = ms.Tensor(text[first:first + BATCH])
        losses.append(float(step(batch, batch)[0].asnumpy()))
    return losses, model


def curves(steps: int, learned: int) -> Dict[str, List[float]]:
    """Loss of each step of the tuning, by kind; all begin with the weights of one training, rounded to bfloat16."""
    _, model = train(KINDS["float32"], 3e-3, language(0, BATCH * learned), {})
    start = {parameter.name: bfloat16(parameter.asnumpy()) for parameter in model.get_parameters()}
    text = language(1, BATCH * steps)
    return {name: train(kind, RATE, text, start)[0] for name, kind in KINDS.items() if kind.dtype != "float16"}


def smoothed(losses: List[float]) -> np.ndarray:
    """Means of up to 20 neighbouring steps."""
    width = max(1, min(20, len(losses) // 3))
    return np.convolve(losses, np.ones(width) / width, "valid")


def summary(losses: Dict[str, List[float]]) -> Dict[str, Dict[str, float]]:
    """Of each curve: loss at its ends (means of some steps), share of float32's fall, largest gap to float32."""
    truth = np.array(losses["float32"])
    fall = smoothed(losses["float32"])[0] - smoothed(losses["float32"])[-1]
    return {name: {"first": float(smoothed(values)[0]), "last": float(smoothed(values)[-1]),
                   "share": float((smoothed(values)[0] - smoothed(values)[-1]) / fall),
                   "gap": float(np.abs(np.array(values) - truth).max())} for name, values in losses.items()}


def draw(losses: Dict[str, List[float]], path: Path) -> None:
    """The curves, as a PNG."""
    from research.telechat.common.picture import drawing, save
    with drawing((7, 4), {}) as (figure, _):
        axes = figure.subplots()
        for (name, values), style in zip(losses.items(), ("-", "--", "-")):
            axes.plot(smoothed(values), style, linewidth=2.2 if style == "-" else 1.4, label=name)
        axes.set_xlabel("step")
        axes.set_ylabel("loss (mean of 20 steps)")
        axes.set_title("Fine-tuning a small model at a learning rate of 1e-5, on a CPU")
        axes.legend()
        save(figure, path)


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000, help="of the table; 0: no table")
    parser.add_argument("--size", type=int, default=4096, help="weights of the table")
    parser.add_argument("--tune", type=int, default=600, help="steps of the curves; 0: no curves")
    parser.add_argument("--learn", type=int, default=200, help="steps in which the first language is learned")
    parser.add_argument("--picture", type=Path, help="draw the curves there")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    results: Dict[str, Any] = {}
    if args.steps:
        results["distances"] = distances(args.steps, args.size)
        for name, (share, error) in results["distances"].items():
            print(f"{name:24} share of the exact distance {share:8.5f}   relative error {error:8.5f}")
    if args.tune:
        losses = curves(args.tune, args.learn)
        results["curves"] = summary(losses)
        for name, row in results["curves"].items():
            print(f"{name:24} loss {row['first']:.4f} to {row['last']:.4f}, {row['share']:7.2%} of float32's fall, "
                  f"at most {row['gap']:.4f} from float32")
        if args.picture:
            draw(losses, args.picture)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
