"""Random weights of the unsharded model, sharded for the ranks of a plan, merged again, and compared."""
from typing import Dict, List, NamedTuple, Sequence, Tuple

import numpy as np

from research.telechat.checkpoint.strategy import region
from research.telechat.common.errors import ExecutionError
from research.telechat.interpret.graphs import Compiled
from research.telechat.interpret.ir import FLOATING, Program

Weights = Dict[str, np.ndarray]
_COPIES_EQUAL = 1e-12                       # between ranks with the same shard


def random_weights(program: Program, seed: int = 0) -> Weights:
    """Values for all parameters of an unsharded graph: weights, non-zero moments, empty remainders and caches."""
    rng = np.random.default_rng(seed)
    result: Weights = {}
    for parameter in sorted(program.parameters.values(), key=lambda one: one.name):
        name, shape = parameter.name, parameter.shape
        if parameter.dtype not in FLOATING:
            result[name] = np.zeros(shape, np.int32)
        elif name == "scale_sense":
            result[name] = np.ones(shape)
        elif name.startswith(("adam_r.", "accu_grads")) or "cache" in name:
            result[name] = np.zeros(shape)
        elif name.startswith("adam_v."):
            result[name] = 1e-4 * (0.1 + np.abs(rng.normal(size=shape)))
        elif name.startswith("adam_m."):
            result[name] = 1e-2 * rng.normal(size=shape)
        elif "norm" in name:
            result[name] = 1 + 0.1 * rng.normal(size=shape)
        else:
            result[name] = 0.15 * rng.normal(size=shape)
    # Representable in float32, for the step on the CPU.
    return {name: value.astype(np.float32).astype(np.float64) if value.dtype.kind == "f" else value
            for name, value in result.items()}


def _place(compiled: Compiled, name: str, rank: int, shape: Sequence[int], held: Sequence[int]) -> Tuple[slice, ...]:
    """Where a rank's shard of shape `held` lies in a parameter.

    Parameters that the strategy files do not list (frozen ones, and all of a prediction) may be sharded along one axis
    over model parallelism, whose ranks are neighbours.
    """
    strategy, ways = compiled.strategy, compiled.plan.mp
    if strategy is not None and name in strategy.layouts:
        place = [tuple(ends) for ends in region(strategy.layouts[name], rank % strategy.stage_ranks, shape)]
    else:
        place = [(0, size) if size != part * ways else (rank % ways * part, (rank % ways + 1) * part)
                 for size, part in zip(shape, held)]
    if tuple(stop - start for start, stop in place) != tuple(held):
        raise ExecutionError(f"rank {rank}: {name} of {tuple(shape)} is {tuple(held)} in the graph, but {place} by the "
                             "strategy files")
    return tuple(slice(start, stop) for start, stop in place)


def cut(weights: Weights, compiled: Compiled, rank: int, graph: str) -> Weights:
    """A rank's shards; buffers that the unsharded model does not have (accumulated gradients) are 0."""
    result = {}
    for parameter in compiled.programs[rank][graph].parameters.values():
        if parameter.name not in weights:
            if not parameter.name.startswith("accu_grads"):
                raise ExecutionError(f"rank {rank} has a parameter {parameter.name} that the unsharded model lacks")
            result[parameter.name] = np.zeros(parameter.shape)
            continue
        value = weights[parameter.name]
        result[parameter.name] = value[_place(compiled, parameter.name, rank, value.shape, parameter.shape)]
    return result


class Merged(NamedTuple):
    """weights: of the whole model. stale: parameters of which a later pipeline stage has an older copy."""

    weights: Weights
    stale: List[str]


def merge(held: Sequence[Weights], weights: Weights, compiled: Compiled) -> Merged:
    """The ranks' shards, merged. held: per rank; weights: of the whole model, for names and shapes.

    If several pipeline stages have a parameter, the first stage's copy counts, as in scripts/transform_checkpoint.py:
    the last stage's table of tied embeddings is not used and goes stale.

    Raises ExecutionError: copies that should be equal within a stage are not; something is missing.
    """
    stage_ranks = len(held) // compiled.plan.pp
    result: Weights = {}
    stages: Dict[str, int] = {}
    stale = set()
    for rank, mine in enumerate(held):
        for name, value in mine.items():
            if name not in weights:
                continue
            whole = result.setdefault(name, np.full(weights[name].shape, np.nan))
            place = _place(compiled, name, rank, whole.shape, value.shape)
            known = whole[place]
            if known.size == 0 or np.isnan(known).any():
                whole[place] = value
                stages.setdefault(name, rank // stage_ranks)
            elif np.abs(known - value).max() > _COPIES_EQUAL:
                if stages[name] == rank // stage_ranks:
                    raise ExecutionError(f"{name}: rank {rank} differs from another rank that should hold the "
                                         f"same values, by up to {np.abs(known - value).max():.1e}")
                stale.add(name)
    missing = [name for name in weights if name not in result or np.isnan(result[name]).any()]
    if missing:
        raise ExecutionError(f"no rank holds the whole of {', '.join(missing[:3])}")
    return Merged(result, sorted(stale))


def differences(found: Weights, expected: Weights, before: Weights) -> Dict[str, float]:
    """For each parameter the largest difference of its change, relative to the largest change; absolute if nothing
    changes. In the order of `before`."""
    result = {}
    for name, start in before.items():
        if name not in found or name not in expected:
            continue
        largest = np.abs(expected[name] - start).max(initial=0)
        gap = np.abs(found[name].astype(np.float64) - expected[name]).max(initial=0)
        result[name] = float(gap / largest if largest else gap)
    return result
