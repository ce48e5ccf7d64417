"""Training: steps of every kind of plan against one card, a step that overflows, and a resumed run."""
import copy
import zlib
from functools import lru_cache, partial
from typing import Dict, List, NamedTuple, Sequence, Tuple

import numpy as np

from research.telechat.common.files import JsonObject
from research.telechat.doctor.checks import Check, Outcome, Skip, gap
from research.telechat.doctor.device import Array, Device, TrainRun
from research.telechat.interpret.shrink import shrink, uncut
from research.telechat.plan.plan import read_plan
from research.telechat.recipe.legacy import translate
from research.telechat.recipe.read import read_recipe, resolve_config, set_key

COLUMNS = ("input_ids", "labels", "actual_seq_len")
STEPS, SEED = 3, 5
BROKEN = "model.norm_out.weight"             # gets an infinite element, for a step that overflows
IGNORED = -100
_HEAD_DIM = 64
_CPU_RECIPE = "research/telechat/finetune_telechat_tiny_cpu.yaml"


class Limits(NamedTuple):
    """Relative limits of losses and norms; for weights the root mean square error, relative to their change."""

    loss: float
    norm: float
    weights: float


# A step of Adam has the sign of the gradient, which rounding can flip if the gradient is almost zero.
LIMITS = {False: Limits(1e-5, 1e-4, 1e-3), True: Limits(1e-2, 3e-2, 0.3)}       # by whether the device has 16 bits


class Kind(NamedTuple):
    """A kind of plan: a recipe, keys set in it ("N" is the number of cards), and what not to use if it fails."""

    name: str
    recipe: str
    keys: JsonObject
    avoid: str
    cards: Sequence[int] = (2, 4, 8)


def _degrees(**degrees: object) -> JsonObject:
    every = {"data_parallel": 1, "model_parallel": 1, "pipeline_stage": 1, "context_parallel": 1}
    return {f"parallel_config.{key}": value for key, value in {**every, **degrees}.items()}


_7B, _12B, _GROUPED, _52B = (f"research/telechat/finetune_{name}.yaml" for name in (
    "telechat_7b", "telechat_12b", "telechat2_115b", "telechat_52b"))
_ULYSSES = {"parallel_config.context_parallel_algo": "ulysses_cp", "parallel.enable_alltoall": True}
_P = "parallel_config."
KINDS = (
    Kind("data parallel, sharded optimizer", _7B, _degrees(data_parallel="N"),
         "parallel.enable_parallel_optimizer: True"),
    Kind("data parallel, replicated optimizer", _7B, {**_degrees(data_parallel="N"),
                                                      "parallel.enable_parallel_optimizer": False},
         f"{_P}data_parallel over 1"),
    Kind("model parallel", _12B, {**_degrees(model_parallel="N"), f"{_P}use_seq_parallel": False},
         f"{_P}model_parallel over 1"),
    Kind("sequence parallel", _12B, {**_degrees(model_parallel="N"), f"{_P}use_seq_parallel": True},
         f"{_P}use_seq_parallel: True"),
    Kind("grouped heads, model parallel", _GROUPED, {**_degrees(model_parallel="N"), f"{_P}use_seq_parallel": True},
         f"{_P}model_parallel over 1 with n_kv_heads"),
    Kind("fused projections, model parallel", _52B, {**_degrees(model_parallel="N")},
         f"{_P}model_parallel over 1 with fused_projections"),
    Kind("pipeline", _12B, _degrees(pipeline_stage="N"), f"{_P}pipeline_stage over 1", (2, 4)),
    Kind("heads exchanged", _7B, {**_degrees(context_parallel="N"), **_ULYSSES},
         f"{_P}context_parallel_algo: ulysses_cp"),
    Kind("keys gathered", _7B, {**_degrees(context_parallel="N"), f"{_P}context_parallel_algo": "colossalai_cp",
                                "model.model_config.use_ring_attention": False},
         f"{_P}context_parallel over 1 with context_parallel_algo: colossalai_cp"),
    Kind("data and model parallel", _12B, _degrees(data_parallel=2, model_parallel=2), f"{_P}data_parallel and "
         "model_parallel over 1 together", (4,)),
    Kind("data, model and pipeline parallel", _12B, _degrees(data_parallel=2, model_parallel=2, pipeline_stage=2),
         f"{_P}data_parallel, model_parallel and pipeline_stage over 1 together", (8,)))
ON_CPU = Kind("data parallel", _CPU_RECIPE, {**_degrees(data_parallel="N"), "use_parallel": True},
              f"{_P}data_parallel over 1")


def is_weight(name: str) -> bool:
    """Whether a parameter of a training step is a model weight, not a moment, counter or scale."""
    return name.startswith(("model.", "lm_head."))


def initial_value(name: str, shape: Sequence[int], seed: int) -> Array:
    """Random values of a whole parameter, float32: the same on all cards, whatever their shard."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    value = rng.normal(size=tuple(shape)).astype(np.float32)
    return 1 + np.float32(0.1) * value if "norm" in name else np.float32(0.06) * value


@lru_cache(maxsize=8)
def _recipe(name: str) -> JsonObject:
    return read_recipe(resolve_config(name))


def small(kind: Kind, cards: int) -> JsonObject:
    """The recipe of a kind of plan for `cards` cards, shrunk."""
    recipe = copy.deepcopy(_recipe(kind.recipe))
    for key, value in kind.keys.items():
        set_key(recipe, key, cards if value == "N" else value)
    translate(recipe)
    heads = read_plan(shrink(recipe, cards, {})).model.num_heads
    return shrink(recipe, cards, {"hidden_size": heads * _HEAD_DIM, "seq_length": 128})


def batches_of(recipe: JsonObject, steps: int) -> List[List[Array]]:
    """Tokens and labels of all cards per step; rows have different numbers of labels."""
    plan = read_plan(recipe)
    rows, length = plan.batch * plan.dp * plan.micro_batches, plan.model.seq_length + 1
    result = []
    for step in range(steps):
        rng = np.random.default_rng([SEED, step])
        ids = rng.integers(6, plan.model.vocab_size, (rows, length)).astype(np.int32)
        labels = ids.copy()
        for row in range(rows):
            labels[row, :1 + row * length // (rows + 1)] = IGNORED
        ends = np.tile(np.array([length // 3, length - 1], np.int32), (rows, 1))
        result.append([ids, labels, ends] if plan.model.document_boundaries else [ids, labels])
    return result


def weight_gap(plan: TrainRun, whole: TrainRun) -> Tuple[float, str]:
    """(root mean square of the difference relative to that of the change, parameter), the largest."""
    worst = (0.0, "")
    for name, held in plan.held.items():
        if name not in whole.held:
            return float("inf"), name
        expected, place = whole.held[name].astype(np.float64), plan.places[name]
        change = float(np.sqrt(np.mean(np.square(expected - initial_value(name, expected.shape, SEED)))))
        difference = float(np.sqrt(np.mean(np.square(held - expected[place])))) if held.shape == expected[
            place].shape else float("inf")
        share = difference / change if change else difference
        worst = max(worst, (share if np.isfinite(share) else float("inf"), name))
    return worst


def _largest(found: Sequence[float], expected: Sequence[float]) -> float:
    """Largest relative difference; infinite if one is not finite."""
    gaps = [abs(one - other) / abs(other) for one, other in zip(found, expected)]
    return max(gap if np.isfinite(gap) else float("inf") for gap in gaps)


class _Wholes:
    """Steps on one card, computed once for all plans of the same model."""

    def __init__(self) -> None:
        self.known: Dict[str, TrainRun] = {}

    def of(self, device: Device, recipe: JsonObject, batches: Sequence[Sequence[Array]]) -> TrainRun:
        alone = uncut(recipe)
        key = repr(sorted(alone.items(), key=str))
        if key not in self.known:
            self.known[key] = device.train(alone, batches, SEED)
        return self.known[key]


def _plan(device: Device, kind: Kind, wholes: _Wholes, fused: bool) -> Outcome:
    if device.ranks not in kind.cards:
        raise Skip(f"needs {', '.join(map(str, kind.cards))} cards, found {device.ranks}")
    recipe = small(kind, device.ranks)
    batches = batches_of(recipe, STEPS)
    whole = wholes.of(device, recipe, batches)
    plan = device.train(recipe, batches, SEED)
    limits = LIMITS[fused]
    loss, norm = _largest(plan.losses, whole.losses), _largest(plan.norms, whole.norms)
    weights, name = weight_gap(plan, whole)
    fine = loss <= limits.loss and norm <= limits.norm and weights <= limits.weights
    return Outcome(f"one card: loss {whole.losses[-1]:.5f} within {limits.loss:.0e}, norm within {limits.norm:.0e}, "
                   f"weights within {limits.weights:.0e} of their change",
                   f"{plan.losses[-1]:.5f}; {loss:.1e}, {norm:.1e}, {weights:.1e} ({name})", fine)


def _alone(fused: bool) -> JsonObject:
    """A recipe for one card."""
    if fused:
        return uncut(small(KINDS[1], 2))
    return uncut(small(ON_CPU._replace(keys=_degrees()), 1))


def _overflow(device: Device, fused: bool) -> Outcome:
    """With an infinite weight, the step is detected as an overflow and no weight changes."""
    recipe = _alone(fused)
    found = device.train(recipe, batches_of(recipe, 1), SEED, broken=True)
    changed = [name for name, value in found.held.items() if name != BROKEN and not (
        np.abs(value - initial_value(name, value.shape, SEED)).max() < 1e-2)]
    return Outcome("an overflow, no weight changed",
                   f"{'an' if found.overflows[0] else 'no'} overflow, {len(changed) or 'no'} "
                   f"weight{'s' * (len(changed) > 1)} changed", found.overflows == [True] and not changed)


def _resumed(device: Device, fused: bool) -> Outcome:
    """Four steps in one run, and the last two resumed from the checkpoint of the second."""
    if device.ranks > 1:
        raise Skip("needs a single card")
    recipe = _alone(fused)
    model = read_plan(recipe).model
    records = np.random.default_rng(SEED).integers(6, model.vocab_size, (4, model.seq_length + 1))
    whole, resumed = device.resume(recipe, records)
    limit = LIMITS[fused].loss
    missing = whole.keys() ^ resumed.keys()
    gaps = {name: gap(resumed[name], value) for name, value in whole.items() if name in resumed}
    worst = max(gaps, key=lambda name: gaps[name])
    found = f"differ by {gaps[worst]:.1e} ({worst})" if not missing else f"lack {', '.join(sorted(missing)[:3])}"
    return Outcome(f"weights and moments of an uninterrupted run, within {limit:.0e}", found,
                   not missing and gaps[worst] <= limit)


def checks(fused: bool) -> List[Check]:
    """Plans on several cards, and a step on one."""
    wholes = _Wholes()
    kinds = KINDS if fused else (ON_CPU,)
    return [Check("training, a step that overflows", partial(_overflow, fused=fused),
                  "float16 and a loss scale: steps with infinite gradients would spoil the weights"),
            Check("training, resumed", partial(_resumed, fused=fused), "resume_training: True"),
            *(Check(f"plan, {kind.name}", partial(_plan, kind=kind, wholes=wholes, fused=fused), kind.avoid,
                    cards=2) for kind in kinds)]
