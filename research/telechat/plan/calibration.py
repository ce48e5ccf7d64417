"""Published speeds with the plans they belong to, and the fit of the time model's constants to them.

Speeds: the tables of model performance on Atlas 800T A2 in MindFormers' pages of TeleChat (commit 647d8944), TeleChat2
(0ebebf8e) and Llama 2 (647d8944); plans: the recipes in the same commits. They are of MindFormers' own implementations
of that time. None was reproduced here.

What the sources leave open: the number of cards of each run (taken from the recipe's degrees), whether the recipe's
recomputation and `fine_grain_interleave: 2` were in effect (taken as so), and, for prediction, the length of the
answers (FILLED) and whether one sequence was answered at a time (taken as so).
"""
import math
from typing import Dict, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from research.telechat.common.files import JsonObject
from research.telechat.plan.cost import flops_per_token
from research.telechat.plan.plan import Plan, read_plan
from research.telechat.plan.timing import PEAK, Efficiency, StepTime, stage_work, time_of, token_work

START = Efficiency(0.7, 0.4, 0.6, 0.6, 30e-6)        # where the fit begins
FILLED = 0.5                       # of seq_length that a sequence fills on average while it is answered; an assumption
PULL = 0.03                        # weight of leaving START by a factor of e, compared with a relative error of 1

_COMMON: JsonObject = {"layernorm_compute_type": "float32", "res_dtype": "float32", "compute_dtype": "bfloat16",
                       "softmax_compute_type": "float16"}
_DROPOUT = {"embed_dropout_prob": 0.1, "hidden_dropout_prob": 0.1, "attention_dropout_prob": 0.1}


class Point(NamedTuple):
    """A published speed. degrees: data, model and pipeline parallelism."""

    name: str
    tokens_per_second: float           # of a card in training, of all cards in prediction
    degrees: Tuple[int, int, int]
    model: JsonObject
    batch: int = 1
    micro_batches: int = 1
    recompute: Optional[JsonObject] = None       # None: prediction
    interleaved: bool = False          # fine_grain_interleave 2

    @property
    def training(self) -> bool:
        """Whether it is of training."""
        return self.recompute is not None


def _llama(hidden: int, layers: int, heads: int, ffn: int, kv: Optional[int] = None) -> JsonObject:
    return {"hidden_size": hidden, "num_layers": layers, "num_heads": heads, "intermediate_size": ffn, "n_kv_heads": kv,
            "vocab_size": 32000, "seq_length": 4096, "out_proj_has_bias": False}


_WHOLE: JsonObject = {"recompute": True}
POINTS: Tuple[Point, ...] = (
    Point("TeleChat-7B", 3400, (8, 1, 1), {"net_name": "telechat_7b", "seq_length": 2048, **_DROPOUT}, 4, 1, _WHOLE),
    Point("TeleChat-12B", 1996, (8, 1, 1), {"net_name": "telechat_12b", "seq_length": 1024, **_DROPOUT}, 4, 1, _WHOLE),
    Point("TeleChat-52B", 364, (1, 8, 2), {"net_name": "telechat_52b", "seq_length": 4096}, 1, 32, _WHOLE),
    Point("TeleChat2-7B", 2950, (8, 1, 1), {"net_name": "telechat2_7b", "seq_length": 8192}, 1, 1, _WHOLE),
    Point("TeleChat2-35B", 516, (1, 4, 4), {"net_name": "telechat2_35b", "seq_length": 8192, "offset": [-1, 1, 1, -1]},
          1, 32, _WHOLE, True),
    Point("TeleChat2-115B", 158, (8, 8, 8), {
        "net_name": "telechat2_115b", "seq_length": 8192, "pp_interleave_num": 3,
        "offset": [[-1, -1, 0, 0, 0, 0, 0, 0], [-1, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1, -1]]}, 1, 8,
        {"recompute": False, "select_recompute": ["feed_forward\\.mul", "feed_forward\\.silu"],
         "select_comm_recompute": {"attention_norm\\.kernel\\.norm": [8, 8, 10, 11, 10, 7, 5, 4],
                                   "ffn_norm\\.kernel\\.norm": [8, 8, 10, 11, 10, 7, 5, 4]}}, True),
    Point("Llama2-7B", 4160, (8, 1, 1), _llama(4096, 32, 32, 11008), 1, 1, {"recompute": False}),
    Point("Llama2-13B", 1691, (8, 1, 1), _llama(5120, 40, 40, 13824), 4, 1, _WHOLE),
    Point("Llama2-70B", 337, (1, 4, 8), _llama(8192, 80, 64, 28672, 8), 1, 256, {
        "recompute": False, "select_recompute": {"feed_forward\\.mul": [8, 4, 4, 1, 1, 1, 1, 1],
                                                 "feed_forward\\.silu": [8, 4, 4, 1, 1, 1, 1, 1]},
        "select_comm_recompute": {"attention_norm\\.kernel\\.norm": [8, 4, 4, 1, 1, 1, 1, 1],
                                  "ffn_norm\\.kernel\\.norm": [8, 4, 4, 1, 1, 1, 1, 1]}}, True),
    Point("TeleChat-7B, predict", 67, (1, 1, 1), {"net_name": "telechat_7b", "seq_length": 2048}),
    Point("TeleChat-12B, predict", 40, (1, 1, 1), {"net_name": "telechat_12b", "seq_length": 1024}),
    Point("TeleChat-52B, predict", 32, (1, 4, 1), {"net_name": "telechat_52b", "seq_length": 4096}),
    Point("TeleChat2-7B, predict", 54.1, (1, 1, 1), {"net_name": "telechat2_7b", "seq_length": 8192}),
    Point("TeleChat2-35B, predict", 27.7, (1, 2, 1), {"net_name": "telechat2_35b", "seq_length": 8192}),
    Point("TeleChat2-115B, predict", 26.5, (1, 8, 1), {"net_name": "telechat2_115b", "seq_length": 8192}),
)


def plan_of(point: Point) -> Plan:
    """The plan of a published speed."""
    dp, mp, pp = point.degrees
    model = {**_COMMON, **point.model, "param_init_type": "float32" if point.training else "bfloat16"}
    recipe: JsonObject = {
        "run_mode": "finetune" if point.training else "predict", "use_parallel": True,
        "runner_config": {"batch_size": point.batch}, "model": {"model_config": model},
        "parallel": {"parallel_mode": 1, "enable_parallel_optimizer": True,
                     "parallel_optimizer_config": {"parallel_optimizer_threshold": 64},
                     "pipeline_config": {"pipeline_interleave": "pp_interleave_num" in model}},
        "parallel_config": {"data_parallel": dp, "model_parallel": mp, "pipeline_stage": pp, "use_seq_parallel":
                            point.training, "micro_batch_num": point.micro_batches, "vocab_emb_dp": False},
        "recompute_config": {"mp_comm_recompute": True, **(point.recompute or {})},
        "context": {"max_device_memory": "58GB"}, "optimizer": {"master_weights": "none"}}
    return read_plan(recipe)


class Prepared:
    """A published speed with the work of its plan, so that the constants can be changed quickly."""

    def __init__(self, point: Point):
        self.point, self.plan = point, plan_of(point)
        self._stages = [stage_work(self.plan, stage, point.interleaved) for stage in range(self.plan.pp)
                        ] if point.training else []
        self._token = None if point.training else token_work(self.plan, int(FILLED * self.plan.model.seq_length))

    def time(self, reached: Efficiency) -> StepTime:
        """Of a step, or of a token."""
        if self._token is not None:
            return StepTime(0, self._token.parts(reached), self.plan.batch, self.plan.ranks)
        return time_of(self.plan, self._stages, reached)

    def error(self, reached: Efficiency) -> float:
        """Natural logarithm of estimated over published speed."""
        speed = self.time(reached).tokens_per_second / (self.plan.ranks if self.point.training else 1)
        return math.log(speed / self.point.tokens_per_second)


def fit(points: Sequence[Prepared], rounds: int = 20) -> Efficiency:
    """The constants with the least squared errors (Levenberg-Marquardt on their logarithms).

    Shares stay below 1. A weak pull towards START decides where the points do not.
    """
    start = np.log(START.values())
    now, damping = start.copy(), 1e-2

    def residuals(values: np.ndarray) -> np.ndarray:
        shares = np.minimum(values, [*np.zeros(4), np.inf])
        reached = Efficiency(*np.exp(shares))
        return np.array([*(point.error(reached) for point in points), *(PULL * (values - start))])
    found = residuals(now)
    for _ in range(rounds):
        slopes = np.stack([(residuals(now + 1e-4 * unit) - found) / 1e-4 for unit in np.eye(len(now))], axis=1)
        normal = slopes.T @ slopes
        step = np.linalg.solve(normal + damping * np.diag(np.diag(normal) + 1e-9), -slopes.T @ found)
        tried = residuals(now + step)
        if tried @ tried < found @ found:
            now, found, damping = now + step, tried, damping / 3
        else:
            damping *= 4
    return Efficiency(*np.exp(np.minimum(now, [*np.zeros(4), np.inf])))


def leave_one_out(points: Sequence[Prepared]) -> Dict[str, float]:
    """Relative error of each speed, by constants that are fitted to all others."""
    return {point.point.name: math.expm1(point.error(fit([other for other in points if other is not point])))
            for point in points}


def one_share(points: Sequence[Prepared]) -> Dict[str, float]:
    """Relative error of each training speed by one model FLOPs utilisation for all, the mean of the others' published
    ones: what the time model has to be better than."""
    training = [point for point in points if point.point.training]
    shares = [point.point.tokens_per_second * flops_per_token(point.plan) / PEAK for point in training]
    return {point.point.name: (sum(shares) - share) / (len(shares) - 1) / share - 1
            for point, share in zip(training, shares)}
