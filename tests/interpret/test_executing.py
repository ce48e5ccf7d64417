"""Ranks that meet, and graphs written by hand: what the interpreter executes, checks and refuses."""
from collections import deque

import numpy as np
import pytest

from research.telechat.common.errors import ExecutionError
from research.telechat.interpret.collectives import Arrival, Wanted, complete, run
from research.telechat.interpret.ir import BFLOAT16, FLOAT32, INT32, Node, Parameter, Program
from research.telechat.interpret.operators import OPERATORS
from research.telechat.interpret.rank import Rank, settle


def arrivals(kind, values, group=None, **attrs):
    group = group or tuple(range(len(values)))
    attrs = {name: value if isinstance(value, list) else [value] * len(values) for name, value in attrs.items()}
    return [Arrival(kind, group, {name: one[number] for name, one in attrs.items()}, value, f"{kind} {number}")
            for number, value in enumerate(values)]


# ---- collectives

ONE, TWO = np.arange(4.0).reshape(2, 2), 10 + np.arange(4.0).reshape(2, 2)


@pytest.mark.parametrize("op, attrs, first, second", [
    ("AllReduce", {"op": "sum"}, ONE + TWO, ONE + TWO), ("AllReduce", {"op": "max"}, TWO, TWO),
    ("AllGather", {}, np.vstack([ONE, TWO]), np.vstack([ONE, TWO])),
    ("ReduceScatter", {"op": "sum"}, (ONE + TWO)[:1], (ONE + TWO)[1:]), ("Broadcast", {"root_rank": 1}, TWO, TWO),
    ("AlltoAll", {"split_count": 2, "split_dim": 0, "concat_dim": 1}, np.hstack([ONE[:1], TWO[:1]]),
     np.hstack([ONE[1:], TWO[1:]]))])
def test_collectives(op, attrs, first, second):
    found = complete(arrivals(op, [ONE, TWO], **attrs))
    np.testing.assert_array_equal(found[0], first)
    np.testing.assert_array_equal(found[1], second)


def test_exchanges():
    ring = arrivals("NeighborExchange", [(ONE,), (TWO,)], (4, 6), send_rank_ids=[[6], [4]], recv_rank_ids=[[6], [4]])
    np.testing.assert_array_equal(complete(ring)[0][0], TWO)
    uneven = arrivals("AlltoAllV", [np.arange(3.0), np.arange(3.0, 8)], send_numel_list=[[1, 2], [3, 2]],
                      recv_numel_list=[[1, 3], [2, 2]])
    assert [list(part) for part in complete(uneven)] == [[0, 3, 4, 5], [1, 2, 6, 7]]
    wrong = arrivals("NeighborExchange", [(ONE,), (TWO,)], send_rank_ids=[[1], [1]], recv_rank_ids=[[1], [0]])
    with pytest.raises(ExecutionError, match=r"ranks \[1\] send nothing to it"):
        complete(wrong)


@pytest.mark.parametrize("second", [
    Arrival("AllReduce", (0, 1), {"op": "max"}, ONE, "b"), Arrival("AllGather", (0, 1), {"op": "sum"}, ONE, "b"),
    Arrival("AllReduce", (0, 1), {"op": "sum"}, ONE[:1], "b")])
def test_operations_that_do_not_fit_each_other_are_refused(second):
    first = Arrival("AllReduce", (0, 1), {"op": "sum"}, ONE, "a")
    with pytest.raises(ExecutionError, match="ranks meet in different operations: rank 0 AllReduce"):
        complete([first, second])


def ask(*requests):
    got = []
    for request in requests:
        got.append((yield request))
    return got


def arrive(value, group=(0, 1)):
    return Arrival("AllReduce", group, {"op": "sum"}, np.float64(value), f"place of {value}")


def test_ranks_take_turns_until_all_have_ended():
    box = {(1, 0, "t"): deque([5.0])}
    results = run({0: ask(arrive(1), Wanted(1, "t", "x"), arrive(3)), 1: ask(arrive(2), arrive(4)), 2: ask()}, box)
    assert results == {0: [3, 5, 7], 1: [3, 7], 2: []}


def test_who_waits_for_whom():
    with pytest.raises(ExecutionError) as caught:
        run({0: ask(arrive(1, (0, 1))), 1: ask(arrive(2, (1, 2))), 2: ask(Wanted(0, 7, "stage 1")), 3: ask()}, {})
    assert str(caught.value) == (
        "every rank waits: rank 0 waits in AllReduce at place of 1 for ranks [1]; rank 1 waits in AllReduce at place "
        "of 2 for ranks [2]; rank 2 waits for tag 7 of rank 0 at stage 1; ranks [3] have finished")
    with pytest.raises(ExecutionError, match=r"never received .*\(0, 1, 'a'\) 1 times"):
        run({0: ask()}, {(0, 1, "a"): deque([1.0])})


# ---- graphs

def node(op, inputs, output, form=None, callee="", **attrs):
    return Node(op, inputs, output, attrs, form, callee, "", "cell")


def program(nodes, output, constants=None, parameters=None, graphs=None):
    return Program({"main": (["x"], [output], nodes), **(graphs or {})}, constants or {}, parameters or {}, "main",
                   [("x", (2, 2))])


def execute(graph, x=ONE, parameters=None, precise=True):
    box = {}
    rank = Rank(0, 1, graph, parameters or {}, box, precise)
    return run({0: rank.run([x])}, box)[0], rank


def test_parameters_are_read_and_written():
    graph = program([node("Load", ["p"], "before", (FLOAT32, (2, 2))), node("Add", ["before", "x"], "sum"),
                     node("Assign", ["p", "sum"], "done"), node("MakeTuple", ["sum", "p"], "all"),
                     node("TupleGetItem", ["all", "zero"], "first")], "first", {"zero": 0},
                    {"p": Parameter("w", FLOAT32, (2, 2))})
    result, rank = execute(graph, parameters={"w": TWO})
    np.testing.assert_array_equal(result, ONE + TWO)
    np.testing.assert_array_equal(rank.named()["w"], ONE + TWO)
    with pytest.raises(ExecutionError, match=r"w has the shape \(2, 2\) in the graph, found \(4, 2\)"):
        execute(graph, parameters={"w": np.vstack([ONE, TWO])})
    with pytest.raises(ExecutionError, match="parameter w of the graph is missing"):
        execute(graph)


def test_graphs_are_called_and_branches_taken():
    double = (["y", "z"], ["r"], [node("Add", ["y", "z"], "r")])
    halve = (["y"], ["r"], [node("Muls", ["y", "half"], "r")])
    graph = program([node("Partial", ["double", "x"], "with_x"), node("Switch", ["flag", "halve", "with_x"], "chosen"),
                     node("", ["x"], "result", callee="chosen")], "result", {"flag": False, "half": 0.5},
                    graphs={"double": double, "halve": halve})
    from research.telechat.interpret.ir import Closure
    graph.constants.update(double=Closure("double", ()), halve=Closure("halve", ()))
    np.testing.assert_array_equal(execute(graph)[0], 2 * ONE)
    graph.constants["flag"] = True
    np.testing.assert_array_equal(execute(graph)[0], ONE / 2)


def test_shapes_are_compared_with_the_compilers():
    graph = program([node("Transpose", ["x", "order"], "y", (FLOAT32, (2, 3)))], "y", {"order": (1, 0)})
    with pytest.raises(ExecutionError, match=r"rank 0: Transpose .*in cell.* returns .*, the graph expects \(2, 3\)"):
        execute(graph)


def test_unknown_operators_are_named():
    with pytest.raises(ExecutionError, match=r"does not know the operator FancyNorm .*operators\.py"):
        execute(program([node("FancyNorm", ["x"], "y")], "y"))
    with pytest.raises(ExecutionError, match=r"rank 0: MatMul .*\(3, 3\)"):
        execute(program([node("MatMul", ["x", "c"], "y")], "y", {"c": np.ones((3, 3))}))


def test_declared_types_round_and_precise_ones_do_not():
    graph = program([node("Muls", ["x", "third"], "y", (BFLOAT16, (2, 2)))], "y", {"third": 1 / 3})
    np.testing.assert_array_equal(execute(graph)[0], ONE / 3)
    rounded = execute(graph, precise=False)[0]
    assert rounded[0, 1] == 0.333984375 and rounded.dtype == np.float32          # 1 / 3 in 8 bits
    assert settle(2.7, INT32, True) == 2


# ---- operators that are more than a function of NumPy

@pytest.mark.parametrize("op, inputs, expected", [
    ("MatMul", (ONE, TWO, True, False), ONE.T @ TWO), ("ReduceSum", (ONE, (), False, True), ONE),
    ("ReduceSum", (ONE, (-1,), True, False), [[1], [5]]), ("SumExt", (ONE, None, False), 6),
    ("ReduceMax", (ONE, (-1,), True), [[1], [3]]), ("Split", (np.arange(6.0), 0, 3), [[0, 1], [2, 3], [4, 5]]),
    ("SplitWithSize", (np.arange(3.0), (1, 2), 0), [[0], [1, 2]]),
    ("Gather", (TWO, np.array([1, 0, 1]), 0), TWO[[1, 0, 1]]),
    ("OneHot", (np.array([1, 3]), 3, 1.0, 0.0, -1), [[0, 1, 0], [0, 0, 0]]),
    ("UnsortedSegmentSum", (ONE, np.array([1, 1]), 3), [[0, 0], [2, 4], [0, 0]]),
    ("UnsortedSegmentSum", (ONE, np.array([-1, 3]), 3), np.zeros((3, 2))),
    ("StridedSlice", (np.arange(6.0), (1,), (5,), (2,)), [1, 3]),
    ("StridedSlice", (ONE, (1, 0), (2, 2), (1, 1), 0, 2, 0, 0, 1), [2, 3]),
    ("StridedSliceGrad", (np.ones(2), (5,), (1,), (5,), (2,)), [0, 1, 0, 1, 0]),
    ("Slice", (np.arange(6.0), (2,), (-1,)), [2, 3, 4, 5]), ("Addcmul", (ONE, ONE, ONE, 2.0), ONE + 2 * ONE * ONE),
    ("BroadcastTo", (np.ones((1, 2)), (3, -1)), np.ones((3, 2))), ("CumSum", (ONE, 1), [[0, 1], [2, 5]]),
    ("AddN", ((ONE, TWO, ONE),), 2 * ONE + TWO), ("Squeeze", (np.ones((1, 2, 1)), 0), np.ones((2, 1)))])
def test_operators(op, inputs, expected):
    found = OPERATORS[op](node(op, [], "y"), *inputs)
    if isinstance(found, tuple):
        assert [list(part) for part in found] == expected
    else:
        np.testing.assert_allclose(found, expected)


def test_gradient_of_silu():
    x = np.linspace(-3, 3, 7)
    silu = OPERATORS["SiLU"]
    expected = (silu(None, x + 1e-6) - silu(None, x - 1e-6)) / 2e-6
    np.testing.assert_allclose(OPERATORS["SiLUGrad"](None, np.ones(7), x), expected, atol=1e-8)


@pytest.mark.parametrize("op, inputs", [("Gather", (ONE, np.array([2]), 0)),
                                        ("GatherD", (ONE, 1, np.array([[-1], [0]])))])
def test_an_index_out_of_range_is_refused(op, inputs):
    with pytest.raises(ExecutionError, match="outside axis size 2"):
        OPERATORS[op](node(op, [], "y"), *inputs)
