"""Small models of every architecture against the NumPy forward pass: logits, loss, gradients, greedy tokens."""
from functools import lru_cache
from typing import Dict, List, NamedTuple, Sequence, Tuple, Union

import numpy as np

from research.telechat.common.files import JsonObject
from research.telechat.doctor.checks import Check, Outcome, gap, within
from research.telechat.doctor.device import Array, Device, ModelJob, ModelRun
from research.telechat.doctor.reference import cross_entropy, forward
from research.telechat.doctor.small_models import Weights, official_configs, random_official, to_mindspore
from research.telechat.spec.parameters import official_layout, parameters
from research.telechat.spec.variants import variant_from_hf

IGNORED = -100
_NEW = 6                                     # tokens of an answer
_STEP = 1e-5                                 # of finite differences of the loss, in units of the weights


class Precision(NamedTuple):
    """Settings of a recipe and their tolerances against float64, for logits, loss and gradients."""

    name: str
    keys: JsonObject
    logits: float
    loss: float
    gradients: float


_FLOAT32 = ("layernorm_compute_type", "softmax_compute_type", "rotary_dtype", "res_dtype", "param_init_type")
PLAIN = Precision("float32", {"amp_level": "O0", "use_flash_attention": False, "compute_dtype": "float32",
                              **dict.fromkeys(_FLOAT32, "float32")}, 5e-4, 1e-4, 2e-3)
FLASH = Precision("bfloat16, flash attention",
                  {"amp_level": "O1", "use_flash_attention": True, "compute_dtype": "bfloat16",
                   **dict.fromkeys(_FLOAT32, "float32")}, 5e-2, 1e-2, 1.5e-1)


class Sizes(NamedTuple):
    """Sizes of the models: hidden, feed-forward, vocabulary, tokens."""

    hidden: int = 256
    inner: int = 384
    vocabulary: int = 96
    seq: int = 24


@lru_cache(maxsize=16)
def job_of(family: str, sizes: Sizes) -> ModelJob:
    """The job of a family without keys; equal sizes return the same object."""
    config = official_configs(sizes.hidden, sizes.inner, sizes.vocabulary)[family]
    rng = np.random.default_rng(7)
    ids = rng.integers(4, sizes.vocabulary, (2, sizes.seq + 1)).astype(np.int32)
    labels = np.where(rng.random(ids.shape) < 0.4, IGNORED, ids).astype(np.int32)
    # Every matrix product has variance 1, so that attention is neither flat nor all on one key.
    weights = random_official(config, 3, sizes.hidden ** -0.5)
    return ModelJob(config, weights, {}, ids, labels, [int(token) for token in ids[0, :10]], _NEW)


def _index(config: JsonObject, weights: Weights) -> Dict[str, Tuple[List[str], Array]]:
    """For each MindSpore parameter its official names, and the index of each element in their concatenation."""
    variant = variant_from_hf(config)
    layout = official_layout(variant)
    places: Weights = {}
    names: Dict[str, List[str]] = {}
    for param in parameters(variant):
        names[param.ms_name], start = list(param.names(layout)), 0
        for name in names[param.ms_name]:
            places[name] = start + np.arange(weights[name].size, dtype=np.float32).reshape(weights[name].shape)
            start += weights[name].size
    return {name: (names[name], place.astype(np.int64)) for name, place in to_mindspore(config, places).items()}


def moved(job: ModelJob, place: Tuple[List[str], Array], direction: Array, by: float) -> Weights:
    """The official weights with `by` times a direction (in MindSpore's layout) added to one parameter."""
    names, index = place
    flat = np.zeros(index.size)
    flat[index.reshape(-1)] = direction.reshape(-1)
    result, start = dict(job.weights), 0
    for name in names:
        value = job.weights[name]
        result[name] = value + by * flat[start:start + value.size].reshape(value.shape)
        start += value.size
    return result


def _loss(job: ModelJob, weights: Weights) -> float:
    logits, _ = forward(job.config, weights, job.ids[:, :-1], half=False)
    return float(np.nanmean(cross_entropy(logits, job.labels)))


def gradient_gap(job: ModelJob, gradients: Dict[str, Array]) -> Tuple[float, str]:
    """(largest difference, parameter) from finite differences of the NumPy loss, along each gradient and in a random
    direction, relative to the slope expected in such a direction."""
    worst = (0.0, "")
    rng = np.random.default_rng(11)
    for name, place in _index(job.config, job.weights).items():
        gradient = gradients.get(name)
        if gradient is None or gradient.shape != place[1].shape or not np.isfinite(gradient).all():
            return float("inf"), name
        norm = float(np.linalg.norm(gradient)) or 1.0
        anywhere = rng.normal(size=gradient.shape)
        along = gradient / norm * np.linalg.norm(anywhere)
        for direction, usual in ((along, norm * np.linalg.norm(anywhere)), (anywhere, norm)):
            slope = (_loss(job, moved(job, place, direction, _STEP)) - _loss(
                job, moved(job, place, direction, -_STEP))) / (2 * _STEP)
            worst = max(worst, (float(abs(slope - np.sum(gradient * direction)) / usual), name))
    return worst


@lru_cache(maxsize=16)
def _expected(family: str, sizes: Sizes) -> Tuple[Array, float]:
    job = job_of(family, sizes)
    return forward(job.config, job.weights, job.ids[:, :-1], half=False)[0], _loss(job, job.weights)


def token_gap(job: ModelJob, tokens: Sequence[int]) -> float:
    """How far the logits of a greedy answer's tokens are below the maximum, in units of the largest logit."""
    text, worst = list(job.prompt), 0.0
    if len(tokens) != job.new:
        return float("inf")
    for token in tokens:
        logits = forward(job.config, job.weights, np.array([text]), half=False)[0][0, -1]
        worst = max(worst, float(logits.max() - logits[token]) / float(np.abs(logits).max()))
        text.append(int(token))
    return worst


def answers(fused: bool, precision: Precision) -> bool:
    """Whether to check a greedy answer: the paged cache kernels compute in 16 bits only."""
    return not fused or precision is not PLAIN


class _Runs:
    """The device's results for a job, computed once for all its checks."""

    def __init__(self) -> None:
        self.known: Dict[Tuple[str, str], Union[ModelRun, Exception]] = {}

    def of(self, device: Device, family: str, precision: Precision, sizes: Sizes) -> ModelRun:
        key = family, precision.name
        if key not in self.known:
            try:
                job = job_of(family, sizes)
                new = job.new if answers(device.fused, precision) else 0
                self.known[key] = device.model(job._replace(keys=precision.keys, new=new))
            except Exception as error:                # the other checks of this model fail with it, too
                self.known[key] = error
        found = self.known[key]
        if isinstance(found, Exception):
            raise found
        return found


def checks(fused: bool, sizes: Sizes) -> List[Check]:
    """Four for every architecture and precision; no greedy tokens where the cache has no kernel for it."""
    result: List[Check] = []
    runs = _Runs()
    for precision in ((FLASH, PLAIN) if fused else (PLAIN,)):
        for family in official_configs(sizes.hidden, sizes.inner, sizes.vocabulary):
            made = _of_model(runs, family, precision, sizes)
            result += made if answers(fused, precision) else made[:-1]
    return result


def _of_model(runs: _Runs, family: str, precision: Precision, sizes: Sizes) -> List[Check]:
    def logits(device: Device) -> Outcome:
        return within([(runs.of(device, family, precision, sizes).logits, _expected(family, sizes)[0])],
                      precision.logits)

    def loss(device: Device) -> Outcome:
        expected = _expected(family, sizes)[1]
        found = runs.of(device, family, precision, sizes).loss
        return Outcome(f"{expected:.5f} within {precision.loss:.0e}", f"{found:.5f}",
                       gap(np.array(found), np.array(expected)) <= precision.loss)

    def gradients(device: Device) -> Outcome:
        worst, name = gradient_gap(job_of(family, sizes), runs.of(device, family, precision, sizes).gradients)
        return Outcome(f"slopes of the loss within {precision.gradients:.0e}", f"differs by {worst:.1e} ({name})",
                       worst <= precision.gradients)

    def tokens(device: Device) -> Outcome:
        found = runs.of(device, family, precision, sizes).tokens
        worst = token_gap(job_of(family, sizes), found)
        return Outcome(f"the likeliest within {precision.logits:.0e}",
                       f"{' '.join(map(str, found))}, off by {worst:.1e}", worst <= precision.logits)

    avoid = f"models of this kind ({family}) with {precision.name}"
    head = f"model, {family} ({precision.name})"
    return [Check(f"{head}: {name}", run, f"{avoid}{more}") for name, run, more in (
        ("logits", logits, ""), ("loss", loss, " for training"), ("gradients", gradients, " for training"),
        ("greedy tokens", tokens, " for prediction with use_past"))]
