"""What is read of MindSpore's message classes for compiled graphs (mind_ir.proto), which exist only once MindSpore's
module is loaded: their fields, as types."""
from typing import Protocol, Sequence, Union


class Tensor(Protocol):
    """TensorProto: a constant, or a type."""

    name: str
    dims: Sequence[int]
    data_type: int
    raw_data: bytes


class Attribute(Protocol):
    """AttributeProto: a named value, or the type of one."""

    name: str
    type: int
    i: int
    f: float
    s: Union[str, bytes]
    ints: Sequence[int]
    strings: Sequence[Union[str, bytes]]
    tensors: Sequence[Tensor]
    values: Sequence["Attribute"]


class Input(Protocol):
    """ValueInfoProto: an input or output of a graph."""

    name: str
    tensor: Sequence[Tensor]
    attr_info: Attribute


class Node(Protocol):
    """NodeProto: the application of a primitive, a call, or a constant."""

    op_type: str
    domain: str
    input: Sequence[str]
    output: Sequence[str]
    attribute: Sequence[Attribute]
    node_attr: Sequence[Attribute]


class Primitive(Protocol):
    """PrimitiveProto."""

    name: str
    op_type: str
    instance_name: str
    attribute: Sequence[Attribute]


class Graph(Protocol):
    """GraphProto."""

    name: str
    input: Sequence[Input]
    output: Sequence[Input]
    node: Sequence[Node]
    parameter: Sequence[Tensor]


class Model(Protocol):
    """ModelProto."""

    graph: Graph
    functions: Sequence[Graph]
    primitives: Sequence[Primitive]
