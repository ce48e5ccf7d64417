"""Training steps of a plan and of the unsharded plan, executed with the same weights and batches, and compared."""
import re
from typing import Dict, List, NamedTuple, Optional, Sequence

import numpy as np

from research.telechat.common.errors import ExecutionError
from research.telechat.common.files import JsonObject
from research.telechat.interpret import collectives
from research.telechat.interpret.graphs import Compiled
from research.telechat.interpret.operators import Operator
from research.telechat.interpret.rank import Rank, Watch
from research.telechat.interpret.trace import Trace, first_difference
from research.telechat.interpret.weights import Weights, cut, differences, merge, random_weights

LIMIT = 1e-10                                # largest difference from the unsharded plan, in float64
ROUNDING_LIMIT = 5.0                         # of differences between plans in declared types, in rounding errors
ROUNDING_FLOOR = 1e-6                        # if everything is float32
AGREE = {True: 1e-10, False: 1e-5}           # between ranks on loss and norm: in float64, in the declared types
IGNORED = -100                               # label of a token without loss
_MOMENT = r"^(adam_[mvr]|accu_grads)\."   # prefix of a parameter's name
_SPREAD = 10                                 # differences smaller by this factor are side effects of clipping
_LOSS, _NORM = 0, 4                          # indices in the results of a step
Batch = List[np.ndarray]


class Steps(NamedTuple):
    """losses, norms: per step. weights: after the last step. stale: see weights.merge."""

    losses: List[float]
    norms: List[float]
    weights: Weights
    stale: List[str]
    executed: Dict[str, int]                 # number of executions by operator, all ranks


def make_batch(whole: Compiled, seed: int) -> Batch:
    """Tokens, labels and, if the graph takes them, ends of documents; the number of labels differs between rows."""
    inputs = whole.programs[0]["step"].inputs
    rows, length = inputs[0][1]
    rng = np.random.default_rng(seed)
    ids = rng.integers(6, whole.plan.model.vocab_size, (rows, length)).astype(np.int32)
    labels = ids.copy()
    for row in range(rows):
        labels[row, : 1 + (row * length) // (rows + 1)] = IGNORED
    batch = [ids, labels]
    if len(inputs) > 2:
        ends = np.full(inputs[2][1], length - 1, np.int32)
        for row in range(rows):
            cuts = np.sort(rng.choice(np.arange(1, length - 1), 3, replace=False))
            ends[row, :3] = cuts
        batch.append(ends)
    return batch


def _scalar(results: Sequence[Sequence[object]], number: int, limit: float) -> float:
    """A scalar result of a step, on which all ranks must agree."""
    values = [float(np.ravel(np.asarray(result[number]))[0]) for result in results]
    if max(values) - min(values) > limit * max(1.0, abs(values[0])):
        raise ExecutionError(f"the ranks disagree on the {'loss' if number == _LOSS else 'norm'}: {values}")
    return values[0]


def execute(compiled: Compiled, weights: Weights, batches: Sequence[Batch], precise: bool = True,
            operators: Optional[Dict[str, Operator]] = None, watch: Optional[Watch] = None) -> Steps:
    """One step per batch, on all ranks. weights: of the whole model; batches: the input of every rank; watch: called
    with each node and its result.

    Raises ExecutionError: something cannot be executed, or ranks that should agree do not.
    """
    box: collectives.Box = {}
    ranks = [Rank(number, len(compiled.programs), programs["step"], cut(weights, compiled, number, "step"), box,
                  precise, operators, watch) for number, programs in enumerate(compiled.programs)]
    losses, norms = [], []
    for batch in batches:
        results = collectives.run({rank.number: rank.run(batch) for rank in ranks}, box)
        outputs = [results[rank.number] for rank in ranks]
        losses.append(_scalar(outputs, _LOSS, AGREE[precise]))
        norms.append(_scalar(outputs, _NORM, AGREE[precise]))
    merged = merge([rank.named() for rank in ranks], weights, compiled)
    executed: Dict[str, int] = {}
    for rank in ranks:
        for name, count in rank.executed.items():
            executed[name] = executed.get(name, 0) + count
    return Steps(losses, norms, merged.weights, merged.stale, executed)


def causality(compiled: Compiled, weights: Weights, batch: Batch,
              operators: Optional[Dict[str, Operator]] = None) -> float:
    """How much the loss of the first half of the labels changes with the tokens of the second half; 0 if causal."""
    ids, labels = batch[0], batch[1].copy()
    half = ids.shape[1] // 2
    labels[:, 1:half] = ids[:, 1:half]
    labels[:, half:] = IGNORED
    other = ids.copy()
    other[:, half:] = ids[:, half:][:, ::-1]
    losses = [execute(compiled, weights, [[tokens, labels, *batch[2:]]], operators=operators).losses[0]
              for tokens in (ids, other)]
    return abs(losses[0] - losses[1])


class Comparison(NamedTuple):
    """The result of executing a plan. Differences are those of weights.differences."""

    steps: int
    losses: List[float]
    norms: List[float]
    loss_gap: float                          # largest relative difference of losses and norms
    differences: Dict[str, float]
    leak: float                              # see `causality`
    stale: List[str]
    first: str = ""                          # the first operator that differs, if the error is in the forward pass

    @property
    def worst(self) -> float:
        """The largest difference."""
        return max([self.loss_gap, self.leak, *self.differences.values()])

    def first_parameter(self) -> str:
        """The parameter that differs first, or its moment; '' if none does.

        In model order if the forward pass differs; else in reverse order, as gradients are computed, among those that
        differ most: clipping spreads the error of one gradient thinly over all parameters.
        """
        wrong = {name: gap for name, gap in self.differences.items() if not gap <= LIMIT}
        if not wrong:
            return ""
        order = list(dict.fromkeys(re.sub(_MOMENT, "", name) for name in self.differences))
        most = max(wrong.values())
        near = wrong if self.first else [name for name, gap in wrong.items() if not gap < most / _SPREAD]
        places = {name: order.index(re.sub(_MOMENT, "", name)) for name in near}
        place = (min if self.first else max)(places.values())
        return min((name for name in near if places[name] == place), key=len)

    def fault(self) -> str:
        """What is wrong, in a line; '' where nothing is."""
        where = f"; the first operator that differs is {self.first}" if self.first else ""
        if self.leak > LIMIT:
            return (f"the loss of the first half of a sequence changes by {self.leak:.1e} with the tokens of the "
                    f"second half: attention sees future tokens{where}")
        name = self.first_parameter()
        if name:
            return (f"{name} is the first parameter that differs from the unsharded model's, by "
                    f"{self.differences[name]:.1e} of its largest change (limit {LIMIT:.0e}); the largest difference "
                    f"is {self.worst:.1e}{where or '; the forward pass is right'}")
        if not self.loss_gap <= LIMIT:
            return f"loss or norm differ from the unsharded model's by {self.loss_gap:.1e} (limit {LIMIT:.0e}){where}"
        return ""

    def as_json(self) -> JsonObject:
        """For a file."""
        return {**self._asdict(), "worst": self.worst, "fault": self.fault()}


def compare(compiled: Compiled, uncut: Compiled, steps: int = 2, seed: int = 0,
            operators: Optional[Dict[str, Operator]] = None) -> Comparison:
    """Execute both with the same random weights, moments and batches. Raises ExecutionError."""
    weights = random_weights(uncut.programs[0]["step"], seed)
    batches = [make_batch(uncut, seed + 1 + step) for step in range(steps)]
    expected = execute(uncut, weights, batches)
    found = execute(compiled, weights, batches, operators=operators)
    result = Comparison(steps, found.losses, found.norms, _gap(found, expected),
                        differences(found.weights, expected.weights, _in_order(uncut, weights)),
                        causality(compiled, weights, batches[0], operators), found.stale)
    if not result.fault():
        return result
    traces = Trace(), Trace()
    execute(compiled, weights, batches[:1], operators=operators, watch=traces[0])
    execute(uncut, weights, batches[:1], watch=traces[1])
    first = first_difference(*traces)
    return result._replace(first=str(first or ""))


class Rounding(NamedTuple):
    """Steps in the declared types: largest relative differences of losses and norms over the steps."""

    of_types: float                          # unsharded, declared types against float64
    between_plans: float                     # declared types, the plan against the unsharded one

    def fault(self) -> str:
        """What is wrong, in a line; '' where nothing is."""
        if self.between_plans <= ROUNDING_LIMIT * self.of_types + ROUNDING_FLOOR:
            return ""
        return (f"in the declared types loss or norm differ between the plan and one rank by {self.between_plans:.1e}, "
                f"more than rounding explains ({self.of_types:.1e})")


def rounding(compiled: Compiled, uncut: Compiled, steps: int = 2, seed: int = 0) -> Rounding:
    """Execute both with every result rounded to its declared type. Raises ExecutionError."""
    weights = random_weights(uncut.programs[0]["step"], seed)
    batches = [make_batch(uncut, seed + 1 + step) for step in range(steps)]
    exact, whole, plan = (execute(one, weights, batches, precise) for one, precise in (
        (uncut, True), (uncut, False), (compiled, False)))
    return Rounding(_gap(whole, exact), _gap(plan, whole))


def _gap(found: Steps, expected: Steps) -> float:
    """Largest relative difference of losses and norms."""
    return max(abs(one - other) / abs(other) for one, other in zip(found.losses + found.norms,
                                                                   expected.losses + expected.norms))


def _in_order(uncut: Compiled, weights: Weights) -> Weights:
    """The weights in model order."""
    return {parameter.name: weights[parameter.name] for parameter in uncut.programs[0]["step"].parameters.values()}
