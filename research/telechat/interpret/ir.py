"""Reading a MindIR: the graphs of one rank as nodes, constants and parameters, without MindSpore's classes.

A `Program` contains only Python and NumPy values, so it can be pickled; parsing one from the file takes seconds.
"""
import re
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import numpy as np

from research.telechat.ascend_sim.account import load
from research.telechat.common.errors import ExecutionError

# Numbers of AttributeProto.AttributeType and TensorProto.DataType in MindSpore's mind_ir.proto.
FLOAT32, INT32, BOOL, FLOAT16, DOUBLE, BFLOAT16, FLOAT64 = 1, 6, 9, 10, 11, 16, 17
DTYPES: Dict[int, Any] = {1: np.float32, 2: np.uint8, 3: np.int8, 4: np.uint16, 5: np.int16, 6: np.int32, 7: np.int64,
                          9: np.bool_, 10: np.float16, 11: np.float64, 12: np.uint32, 13: np.uint64, 17: np.float64}
FLOATING = (FLOAT32, FLOAT16, DOUBLE, BFLOAT16, FLOAT64)
_TENSOR, _TENSORS, _TUPLE, _LIST, _DICT, _MONADS, _NONE = 17, 19, 20, 21, 22, (23, 24), 25
Form = Tuple[int, Tuple[int, ...]]           # number of the dtype, shape; -1 and -2 for dynamic axes


class Closure(NamedTuple):
    """A graph with its first arguments bound."""

    graph: str
    args: Tuple[Any, ...]


class Node(NamedTuple):
    """One operation."""

    op: str                      # operator; '' for a call to `callee`
    inputs: List[str]
    output: str
    attrs: Dict[str, Any]        # of the primitive
    form: Any                    # Form of the result, a list of forms for a tuple, None if it is not a tensor
    callee: str
    name: str                    # instance name of the primitive
    place: str                   # cell of the model

    def __str__(self) -> str:
        return f"{self.op or 'call'} {self.name} in {self.place or 'the graph'} ({self.output.split(':')[-1]})"


class Parameter(NamedTuple):
    """A rank's shard of a parameter."""

    name: str
    dtype: int
    shape: Tuple[int, ...]


class Program(NamedTuple):
    """The graphs of one rank. graphs: {name: (inputs, outputs, nodes)}; inputs: of the entry graph, [(name, shape)]."""

    graphs: Dict[str, Tuple[List[str], List[str], List[Node]]]
    constants: Dict[str, Any]
    parameters: Dict[str, Parameter]
    entry: str
    inputs: List[Tuple[str, Tuple[int, ...]]]


def _plain(name: str) -> str:
    """'7:model.norm.weight:3' -> 'model.norm.weight'."""
    return re.sub(r":\d+$", "", name.split(":", 1)[-1])


def _tensor(message: Any) -> Optional[np.ndarray]:
    """The value of a TensorProto; None if it is only a type. bfloat16 becomes float32."""
    shape = tuple(message.dims)
    if not message.raw_data and 0 not in shape:
        return None
    if message.compression_type or message.external_data.ByteSize():
        raise ExecutionError(f"constant {message.name}: compressed or external values cannot be read; export the graph "
                             "without them")
    if message.data_type == BFLOAT16:
        values = (np.frombuffer(message.raw_data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        values = np.frombuffer(message.raw_data, DTYPES[message.data_type])
    count = int(np.prod(shape))
    if len(values) == 1 and count != 1:                      # a uniform constant, stored once
        values = np.full(count, values[0])
    return values.reshape(shape)


def _several(values: List[Any]) -> Any:
    return values[0] if len(values) == 1 else tuple(values)


def _constant(message: Any) -> Any:
    """The value of an AttributeProto: number, string, array, tuple, or None."""
    kind = message.type
    if kind in (_TENSOR, _TENSORS) or (message.tensors and kind != _TUPLE):
        return _several([_tensor(tensor) for tensor in message.tensors])
    if kind in (_TUPLE, _LIST, _DICT):
        return tuple(_constant(value) for value in message.values)
    if kind == _NONE:
        return None
    if kind in _MONADS:
        return ()
    for field in ("i", "f", "d", "s"):
        if message.HasField(field):
            value = getattr(message, field)
            if isinstance(value, bytes):
                return value.decode("utf-8", "replace")
            return bool(value) if kind == BOOL else value
    if message.ints:
        return _several([bool(value) if kind == BOOL else value for value in message.ints])
    for field in ("floats", "doubles"):
        if getattr(message, field):
            return _several(list(getattr(message, field)))
    if message.strings:
        return _several([text.decode("utf-8", "replace") if isinstance(text, bytes) else text
                         for text in message.strings])
    return tuple(_constant(value) for value in message.values) if message.values else None


def _form(message: Any) -> Any:
    """Form of a node's result."""
    if message.tensors and message.type == _TENSORS:
        return message.tensors[0].data_type, tuple(message.tensors[0].dims)
    if message.type in (_TUPLE, _LIST):
        return [_form(value) for value in message.values]
    return None


def program_of(model: Any) -> Program:
    """The Program of a ModelProto."""
    primitives = {primitive.name: (re.sub("^(InnerComm|Inner)(?=[A-Z])", "", primitive.op_type),
                                   primitive.instance_name,
                                   {attribute.name: _constant(attribute) for attribute in primitive.attribute})
                  for primitive in model.primitives}
    constants: Dict[str, Any] = {}
    graphs = {}
    for graph in [model.graph, *model.functions]:
        nodes = []
        for message in graph.node:
            if message.op_type == "Constant":
                value = next(attribute for attribute in message.attribute if attribute.name == "value")
                constants[message.output[0]] = _constant(value)
                continue
            target = message.op_type[5:] if message.op_type.startswith("REF::") else message.op_type
            form = next((_form(attribute) for attribute in message.attribute if attribute.name == "shape"), None)
            op, name, attrs = primitives.get(target, ("", "", {}))
            nodes.append(Node(op, list(message.input), message.output[0] if message.output else "", attrs, form, target,
                              name, message.domain))
        graphs[graph.name] = ([item.name for item in graph.input], [item.name for item in graph.output], nodes)
    constants.update((name, Closure(name, ())) for name in graphs)
    parameters = {item.name: Parameter(_plain(item.name), item.data_type, tuple(item.dims))
                  for item in model.graph.parameter}
    inputs = [(_plain(item.name), tuple(item.tensor[0].dims) if item.tensor else ()) for item in model.graph.input]
    return Program(graphs, constants, parameters, model.graph.name, inputs)


def read_program(path: Path, mindspore: Path) -> Program:
    """The graphs in a .mindir file. mindspore: MindSpore's folder, which has the message classes."""
    return program_of(load(path, mindspore))
