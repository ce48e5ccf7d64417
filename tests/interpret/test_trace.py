"""The first operator that differs, in traces written by hand."""
import numpy as np
import pytest

from research.telechat.interpret.ir import Node
from research.telechat.interpret.trace import Trace, first_difference, gap, key_of

WRAPPED = "Default/network-Step/network-TelechatForCausalLM/"


def node(op, cell, inputs, output, number=0):
    return Node(op, inputs, output, {}, None, "", op, f"{WRAPPED}{cell}/{op}-op{number}")


def trace(*steps):
    """steps: (op, cell, inputs, output, values)."""
    result = Trace()
    for *what, values in steps:
        result(node(*what), np.asarray(values, np.float64))
    return result


def test_operators_are_known_by_their_cells():
    cell = "model-TelechatModel/layers-CellList/0-TelechatDecodeLayer/wq-TelechatLinear"
    key = key_of(node("MatMul", cell, [], "a", 3))
    assert key == ("model/layers/0/wq", "MatMul", "3") and str(key) == "MatMul in model/layers/0/wq"
    assert key_of(node("MatMul", "head-TelechatHead/Grad_MatMul", [], "a")) is None
    assert key_of(Node("MatMul", [], "a", {}, None, "", "", "Default/optimizer-AdamW/MatMul-op0")) is None


UNCUT = [("MatMul", "wo-Linear", [], "p", [1.0, 2, 3, 4]), ("Add", "wo-Linear", ["p"], "s", [2.0, 3, 4, 5]),
         ("RmsNorm", "norm-RMSNorm", ["s"], "n", [0.2, 0.3, 0.4, 0.5]),
         ("Mul", "w2-Linear", ["n"], "m", [7.0, 8, 9, 6])]


def of_ranks(**changed):
    """Two ranks: partial sums of the product, halves of all the rest, in another order."""
    steps = []
    for half, partial in ((slice(2, 4), [0.5, 1.5, 1, 3]), (slice(0, 2), [0.5, 0.5, 2, 1])):
        for op, cell, inputs, output, values in UNCUT:
            mine = partial if op == "MatMul" else np.array(values)[half]
            steps.append((op, cell, inputs, output, mine + np.array(changed.get(op, 0.0))))
    return trace(*steps)


def test_cuts_orders_and_partial_sums_are_no_difference():
    assert first_difference(of_ranks(), trace(*UNCUT)) is None


def test_the_first_is_named():
    found = first_difference(of_ranks(RmsNorm=1e-3, Mul=1e-2), trace(*UNCUT))
    assert str(found) == "RmsNorm in norm, by 2.0e-03 of its largest value"
    assert first_difference(of_ranks(Mul=1e-6), trace(*UNCUT)).key.op == "Mul"
    assert first_difference(of_ranks(MatMul=1, Add=1, RmsNorm=1, Mul=1), trace(*UNCUT)).key.op == "MatMul"


@pytest.mark.parametrize("found, expected, size", [
    ([1.0, 2], [2.0, 1, 1], 0), ([1.0], [1.0, 4], 0.75), ([1.0, 4.4], [1.0, 4], 0.1), ([np.nan], [np.nan], 0),
    ([np.nan], [1.0], np.inf), ([0.0], [0.0], 0)])
def test_gap_of_sets_of_numbers(found, expected, size):
    """Both ways: numbers that are not among the expected ones, and expected ones that no rank has."""
    assert gap([np.array(found)], [np.array(expected)]) == pytest.approx(size)
