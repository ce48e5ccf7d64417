"""Finds the first operator of the forward pass whose result differs from the unsharded plan.

Operators are matched by kind and cell. Sharding and row order of their results do not matter: each number that a plan's
ranks compute must be among those that the unsharded plan computes at the same place, and all of those must be found.
Partial sums fail this test, but what is computed from them does not; so an operator counts as different only if all its
successors do too. Gradients cannot be traced like this: the compiler does not record which cell they belong to.
"""
import re
from typing import Dict, List, NamedTuple, Optional, Set

import numpy as np

from research.telechat.interpret.ir import Node

_LIMIT = 1e-10                              # relative to the largest number of the same operator
_MODEL = "TelechatForCausalLM/"
# Operators that compute nothing and are added where ranks exchange parts.
_MOVES = {"AllGather", "Concat", "Depend", "Load", "MakeTuple", "Reshape", "Split", "StridedSlice", "Transpose",
          "TupleGetItem"}


class Key(NamedTuple):
    """An operator: its cell, without wrappers of the model, its kind, and its index among those of this kind there."""

    cell: str
    op: str
    number: str

    def __str__(self) -> str:
        return f"{self.op} in {self.cell or 'the model'}"


def key_of(node: Node) -> Optional[Key]:
    """None for a node outside the model's forward pass."""
    _, model, cell = node.place.rpartition(_MODEL)
    if not model or "Grad_" in cell or not node.op:
        return None
    cell, _, number = cell.rpartition("-op")
    return Key("/".join(re.sub(r"-[A-Z]\w*$", "", part) for part in cell.split("/")[:-1]), node.op, number)


class Trace:
    """Records what the ranks of a plan compute: call it with each node and its result."""

    def __init__(self) -> None:
        self.values: Dict[Key, List[np.ndarray]] = {}          # in the order of execution
        self.followers: Dict[Key, Set[Key]] = {}               # operators that use its result
        self.made: Dict[Key, None] = {}                        # all operators of the forward pass
        self._maker: Dict[str, Key] = {}                       # by the name of the result

    def __call__(self, node: Node, result: object) -> None:
        key = key_of(node)
        if key is None:
            return
        for name in node.inputs:
            before = self._maker.get(name)
            if before is not None and before != key:
                self.followers.setdefault(before, set()).add(key)
        self._maker[node.output] = key
        self.made.setdefault(key)
        arrays = [one for one in (result if isinstance(result, tuple) else (result,))
                  if isinstance(one, np.ndarray) and one.dtype.kind == "f" and one.size > 1]
        if arrays and node.op not in _MOVES:
            self.values.setdefault(key, []).extend(one.ravel() for one in arrays)


def _apart(found: np.ndarray, known: np.ndarray) -> float:
    """The largest distance of a number in `found` to the nearest in `known`, which is sorted."""
    place = np.clip(np.searchsorted(known, found), 1, len(known) - 1) if len(known) > 1 else np.zeros(len(found), int)
    below = np.abs(found - known[np.maximum(place - 1, 0)])
    return float(np.minimum(below, np.abs(found - known[place])).max())


def gap(found: List[np.ndarray], expected: List[np.ndarray]) -> float:
    """Distance of two sets of numbers, relative to the largest; infinite if one has nothing but NaN."""
    one, other = (np.unique(np.concatenate(arrays)) for arrays in (found, expected))
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        return 0.0 if np.array_equal(one, other, equal_nan=True) else float("inf")
    return max(_apart(one, other), _apart(other, one)) / max(float(np.abs(other).max()), 1e-300)


class Difference(NamedTuple):
    """An operator and its difference, relative to its largest number."""

    key: Key
    gap: float

    def __str__(self) -> str:
        return f"{self.key}, by {self.gap:.1e} of its largest value"


def first_difference(plan: Trace, uncut: Trace) -> Optional[Difference]:
    """The first operator that differs, in the order of the unsharded plan; None if the forward pass is the same."""
    gaps = {key: gap(plan.values[key], values) for key, values in uncut.values.items() if key in plan.values}
    right = {key for key, size in gaps.items() if size <= _LIMIT}
    for key in reversed(list(uncut.made)):                       # before a correct result there are only partial sums
        if right & uncut.followers.get(key, set()):
            right.add(key)
    return next((Difference(key, gaps[key]) for key in uncut.values if key in gaps and key not in right), None)
