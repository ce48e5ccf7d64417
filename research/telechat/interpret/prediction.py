"""Prefill and decoding with the paged KV cache, of a plan and of the unsharded plan, with the same weights."""
from typing import Dict, List, NamedTuple, Optional, Sequence

import numpy as np

from research.telechat.common.errors import ExecutionError
from research.telechat.common.files import JsonObject
from research.telechat.interpret import collectives
from research.telechat.interpret.graphs import Compiled
from research.telechat.interpret.operators import Operator
from research.telechat.interpret.rank import Rank, Watch
from research.telechat.interpret.shrink import BLOCK_SIZE
from research.telechat.interpret.trace import Trace, first_difference
from research.telechat.interpret.training import LIMIT
from research.telechat.interpret.weights import Weights, cut, random_weights

PROMPTS = (21, 9)                            # tokens; the second reaches another block after two steps
_INPUTS = ("input_ids", "batch_valid_length", "block_tables", "slot_mapping")


class Generation(NamedTuple):
    """logits: per step [B, V]; tokens: prompts and generated tokens."""

    logits: List[np.ndarray]
    tokens: List[List[int]]


def _inputs(compiled: Compiled, graph: str, given: Dict[str, np.ndarray]) -> List[np.ndarray]:
    names = [name for name, _ in compiled.programs[0][graph].inputs]
    unknown = [name for name in names if name not in given]
    if unknown:
        raise ExecutionError(f"graph {graph} takes {', '.join(unknown)}, which the interpreter cannot make; supported "
                             f"inputs: {', '.join(_INPUTS)}")
    return [given[name] for name in names]


def generate(compiled: Compiled, weights: Weights, prompts: Sequence[Sequence[int]], steps: int,
             operators: Optional[Dict[str, Operator]] = None, watch: Optional[Watch] = None) -> Generation:
    """Prefill the prompts and decode `steps` - 1 more tokens greedily. Raises ExecutionError.

    operators: instead of OPERATORS; watch: called with each node of the last step and its result.
    """
    ranks = len(compiled.programs)
    held = [cut(weights, compiled, rank, "prefill") for rank in range(ranks)]
    tokens = [list(prompt) for prompt in prompts]
    blocks = compiled.plan.model.num_blocks // len(prompts)
    tables = np.arange(blocks * len(prompts), dtype=np.int32).reshape(len(prompts), blocks)
    logits = []
    for step in range(steps):
        graph = "decode" if step else "prefill"
        begins = [len(row) - 1 if step else 0 for row in tokens]
        slots = [tables[row, place // BLOCK_SIZE] * BLOCK_SIZE + place % BLOCK_SIZE
                 for row, begin in enumerate(begins) for place in range(begin, len(tokens[row]))]
        read = [row[-1:] for row in tokens] if step else [[token for row in tokens for token in row]]
        given = {"input_ids": np.array(read, np.int32), "block_tables": tables,
                 "batch_valid_length": np.array([[len(row) for row in tokens]], np.int32),
                 "slot_mapping": np.array(slots, np.int32)}
        box: collectives.Box = {}
        executing = [Rank(rank, ranks, compiled.programs[rank][graph], held[rank], box, operators=operators,
                          watch=watch if step == steps - 1 else None) for rank in range(ranks)]
        results = collectives.run({one.number: one.run(_inputs(compiled, graph, given)) for one in executing}, box)
        for one in executing:
            held[one.number].update(one.named())
        found = [np.asarray(results[rank]).reshape(len(prompts), -1) for rank in range(ranks)]
        if any(np.abs(other - found[0]).max() > LIMIT for other in found[1:]):
            raise ExecutionError(f"the ranks disagree on the logits of step {step}")
        logits.append(found[0])
        for row, scores in zip(tokens, found[0]):
            row.append(int(scores.argmax()))
    return Generation(logits, tokens)


class Comparison(NamedTuple):
    """The result of executing a prediction: largest differences relative to the largest logit."""

    steps: List[float]                       # from the unsharded plan: prefill, then each decoding step
    again: float                             # of decoding from reading prompt and answer at once, unsharded
    same_tokens: bool
    first: str = ""                          # the first operator that differs, in the first step that does

    @property
    def worst(self) -> float:
        """The largest difference."""
        return max(*self.steps, self.again)

    def fault(self) -> str:
        """What is wrong, in one line; '' if nothing is."""
        for step, gap in enumerate(self.steps):
            if not gap <= LIMIT:
                where = f"; the first operator that differs is {self.first}" if self.first else ""
                return (f"the logits of {'step ' + str(step) if step else 'the prompt'} differ from the unsharded "
                        f"model's by {gap:.1e} (limit {LIMIT:.0e}){where}")
        if not self.again <= LIMIT:
            return (f"decoding differs from one pass over prompt and answer by {self.again:.1e} (limit {LIMIT:.0e}): "
                    "the cache or the mask is wrong")
        return "" if self.same_tokens else "the plan generates different tokens from the unsharded model"

    def as_json(self) -> JsonObject:
        """As a JSON object."""
        return {**self._asdict(), "worst": self.worst, "fault": self.fault()}


def _gap(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def compare(compiled: Compiled, uncut: Compiled, steps: int = 3, seed: int = 0,
            operators: Optional[Dict[str, Operator]] = None) -> Comparison:
    """Execute both with the same random weights and prompts. Raises ExecutionError."""
    weights = random_weights(uncut.programs[0]["prefill"], seed)
    rng = np.random.default_rng(seed + 1)
    prompts = [rng.integers(6, compiled.plan.model.vocab_size, length).tolist() for length in PROMPTS]
    expected = generate(uncut, weights, prompts, steps)
    found = generate(compiled, weights, prompts, steps, operators)
    again = generate(uncut, weights, [row[:-1] for row in expected.tokens], 1)
    gaps = [_gap(one, other) for one, other in zip(found.logits, expected.logits)]
    result = Comparison(gaps, _gap(again.logits[0], expected.logits[-1]), found.tokens == expected.tokens)
    wrong = next((step for step, gap in enumerate(gaps) if not gap <= LIMIT), None)
    if wrong is None:
        return result
    traces = Trace(), Trace()
    generate(compiled, weights, prompts, wrong + 1, operators, traces[0])
    generate(uncut, weights, prompts, wrong + 1, watch=traces[1])
    return result._replace(first=str(first_difference(*traces) or ""))
