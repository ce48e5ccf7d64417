"""Reading a MindIR that is written here message by message."""
import os
import sys

import numpy as np
import pytest
from compile_fixtures import NO_PLUGIN
from needs import require

from research.telechat.ascend_sim.runtime import mindspore_folder
from research.telechat.common.errors import ExecutionError
from research.telechat.interpret.collectives import run
from research.telechat.interpret.ir import BFLOAT16, BOOL, FLOAT32, INT32, Closure, program_of
from research.telechat.interpret.rank import Rank


@pytest.fixture(scope="module")
def messages():
    """MindSpore's message classes, without MindSpore."""
    require(not NO_PLUGIN, NO_PLUGIN)
    os.environ.setdefault("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION", "python")
    sys.path.insert(0, str(mindspore_folder() / "train"))
    try:
        import mind_ir_pb2
    finally:
        sys.path.pop(0)
    return mind_ir_pb2


def tensor(target, dtype, shape, raw=b""):
    target.data_type, target.raw_data = dtype, raw
    target.dims.extend(shape)


def constant(graph, key, **fields):
    """A Constant node; `kind` is its type, `values` are fields of nested values."""
    node = graph.node.add(op_type="Constant", output=[key])
    value = node.attribute.add(name="value", type=fields.pop("kind"))
    for name, given in fields.items():
        if name == "values":
            for inner in given:
                value.values.add(**inner)
        elif name == "tensor":
            tensor(value.tensors.add(), *given)
        else:
            setattr(value, name, given)


def model_of(messages):
    """y = w + AllReduce(double(x)), called through a second graph."""
    model = messages.ModelProto()
    model.primitives.add(name="p0", op_type="InnerCommAllReduce", instance_name="sum_up").attribute.add(
        name="op", type=8, s=b"sum")
    model.primitives.add(name="p1", op_type="Add")
    model.primitives.add(name="p2", op_type="Load")
    model.graph.name = "main"
    tensor(model.graph.input.add(name="main:inputs0:3").tensor.add(), FLOAT32, (2,))
    tensor(model.graph.parameter.add(name="main:model.w:7"), FLOAT32, (2,))
    other = model.functions.add(name="double")
    other.input.add(name="double:a")
    other.node.add(op_type="REF::p1", input=["double:a", "double:a"], output=["double:r"])
    other.output.add(name="double:r")
    model.graph.node.add(op_type="REF::double", input=["main:inputs0:3"], output=["twice"])
    reduce = model.graph.node.add(op_type="REF::p0", input=["twice"], output=["sum"], domain="Default/cell")
    tensor(reduce.attribute.add(name="shape", type=19).tensors.add(), FLOAT32, (2,))
    model.graph.node.add(op_type="REF::p2", input=["main:model.w:7"], output=["w"])
    model.graph.node.add(op_type="REF::p1", input=["sum", "w"], output=["y"])
    model.graph.output.add(name="y")
    return model


def test_a_graph_is_read_and_executed(messages):
    program = program_of(model_of(messages))
    assert program.inputs == [("inputs0", (2,))]
    assert [tuple(one) for one in program.parameters.values()] == [("model.w", FLOAT32, (2,))]
    node = program.graphs["main"][2][1]
    assert (node.op, node.name, node.attrs, node.form, node.place) == (
        "AllReduce", "sum_up", {"op": "sum"}, (FLOAT32, (2,)), "Default/cell")
    assert program.constants["double"] == Closure("double", ())
    box = {}
    ranks = {number: Rank(number, 2, program, {"model.w": np.array([1.0, 2.0])}, box) for number in range(2)}
    results = run({number: rank.run([np.array([number, 10.0])]) for number, rank in ranks.items()}, box)
    assert [list(results[number]) for number in range(2)] == [[3, 42], [3, 42]]


@pytest.mark.parametrize("fields, expected", [
    ({"kind": 7, "i": 5}, 5), ({"kind": BOOL, "i": 1}, True), ({"kind": 1, "f": 0.5}, 0.5),
    ({"kind": 8, "s": b"x"}, "x"), ({"kind": 25}, None), ({"kind": 23}, ()), ({"kind": 20}, ()),
    ({"kind": 20, "values": [{"type": 7, "i": 2}, {"type": 7, "i": 3}]}, (2, 3)),
    ({"kind": 17, "tensor": (INT32, (2,), np.array([1, 2], np.int32).tobytes())}, [1, 2]),
    ({"kind": 17, "tensor": (FLOAT32, (2, 2), np.array([3], np.float32).tobytes())}, [[3, 3], [3, 3]]),
    ({"kind": 17, "tensor": (BFLOAT16, (1,), b"\xc0\x3f")}, [1.5]), ({"kind": 17, "tensor": (FLOAT32, (2,))}, None)])
def test_constants(messages, fields, expected):
    model = model_of(messages)
    constant(model.graph, "c", **fields)
    found = program_of(model).constants["c"]
    assert found.tolist() == expected if isinstance(found, np.ndarray) else found == expected
    assert isinstance(found, bool) == isinstance(expected, bool)


def test_values_outside_of_the_file_are_refused(messages):
    model = model_of(messages)
    constant(model.graph, "c", kind=17, tensor=(FLOAT32, (1,), b"\0\0\0\0"))
    model.graph.node[-1].attribute[0].tensors[0].external_data.location = "elsewhere"
    with pytest.raises(ExecutionError, match="external values cannot be read"):
        program_of(model)
