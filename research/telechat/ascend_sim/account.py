"""What one rank does in a step, counted from its compiled graph: operators, communication, memory of parameters.

The graph is MindSpore's MindIR at the end of the front end: sharded shapes, gradients, recomputation, optimizer
parallelism and pipeline transfers are in it; what the backend fuses later changes the number of launches, not the
bytes. Needs protobuf and the files of MindSpore, but does not import MindSpore.

Bytes are those that one rank sends when collectives run as rings over n ranks: AllReduce 2 S (n - 1) / n, AllGather and
ReduceScatter S (n - 1) / n of the whole S, AlltoAll S (n - 1) / n, Send S.
"""
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence, Set, Tuple, Union

from research.telechat.ascend_sim import mind_ir
from research.telechat.common.files import JsonObject
from research.telechat.spec.precision import REMAINDER_PREFIX

_BYTES = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 14: 8, 15: 16, 16: 2, 17: 8}
_TYPES = {1: "float32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 9: "bool", 10: "float16", 11: "float64",
          16: "bfloat16"}
_SENDS = {"Send", "NeighborExchange", "NeighborExchangeV2", "BatchISendIRecv"}
_COLLECTIVES = {"AllReduce", "AllGather", "ReduceScatter", "Broadcast", "AlltoAll", "AlltoAllV", "AllToAll",
                "AllToAllV", "AlltoAllVC", "CollectiveGather", "CollectiveScatter", "Reduce"}
_COUNTED = ("MatMul", "BatchMatMul", "FlashAttentionScore", "FlashAttentionScoreGrad", "PagedAttention",
            "ReshapeAndCache")
# FlashAttentionScore: inputs behind query, key and value, and MindSpore's numbers for the layouts (str_to_enum).
_ATTENTION_MASK = 6
_ATTENTION_SETTINGS = {10: "head_num", 11: "keep_prob", 12: "scale", 13: "pre_tokens", 14: "next_tokens",
                       16: "layout", 17: "sparse_mode"}
_LAYOUTS = ("BSH", "BNSD", "SBH", "BSND", "TND", "TH")
_FLOAT = 1                                               # type of an attribute: AttributeProto.FLOAT
_STATE = re.compile(r"(adam_[mv]|moments?\d?|exp_avg\w*|fp32_\w+|state\d?|[mv])\.")


class Mesh(NamedTuple):
    """Degrees of parallelism; ranks count pipeline stages first, then dp, cp and mp."""

    pp: int = 1
    dp: int = 1
    cp: int = 1
    mp: int = 1

    def axes(self, ranks: Sequence[int]) -> str:
        """Which axes `ranks` extend over, as 'dp+mp'; '' for a single rank."""
        places = []
        for rank in ranks:
            place = []
            for size in reversed(self):
                place.append(rank % size)
                rank //= size
            places.append(place[::-1])
        varying = [name for name, values in zip(self._fields, zip(*places)) if len(set(values)) > 1]
        return "+".join(varying)


def load(path: Path, mindspore: Path) -> mind_ir.Model:
    """The MindIR in `path`, as MindSpore's protobuf classes have it. mindspore: its folder."""
    os.environ.setdefault("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION", "python")   # the classes are of an older protobuf
    sys.path.insert(0, str(mindspore / "train"))
    try:
        import mind_ir_pb2  # type: ignore[import-not-found]    # in MindSpore's folder
    finally:
        sys.path.pop(0)
    message = mind_ir_pb2.ModelProto()
    message.ParseFromString(path.read_bytes())
    model: mind_ir.Model = message
    return model


def _value(attribute: mind_ir.Attribute) -> object:
    """An attribute as int, text or list of these."""
    if attribute.values:
        return [_value(value) for value in attribute.values]
    if attribute.ints:
        return list(attribute.ints) if len(attribute.ints) > 1 else attribute.ints[0]
    if attribute.s:
        return _text(attribute.s)
    return attribute.f if attribute.type == _FLOAT else attribute.i


def _text(value: Union[str, bytes]) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _tensors(abstract: mind_ir.Attribute) -> List[mind_ir.Tensor]:
    found = list(abstract.tensors)
    for value in abstract.values:
        found += _tensors(value)
    return found


def _size(tensors: Sequence[mind_ir.Tensor]) -> int:
    """Bytes; a dynamic axis counts as 1."""
    total = 0
    for tensor in tensors:
        count = _BYTES.get(tensor.data_type, 4)
        for dim in tensor.dims:
            count *= max(dim, 1)
        total += count
    return total


class Program:
    """A MindIR model with its subgraphs, the values they pass, and how often each subgraph is called in a step.

    Subgraphs stay apart for branches and for what is compiled once and called for each micro-batch. Both branches of a
    switch count as called; that of the optimizer is the step without overflow.
    """

    def __init__(self, model: mind_ir.Model):
        self.graphs = {graph.name: graph for graph in [model.graph, *model.functions]}
        self.entry = model.graph.name
        self.parameters = model.graph.parameter
        self.primitives = {primitive.name: primitive for primitive in model.primitives}
        self._values: Dict[str, List[mind_ir.Tensor]] = {}
        self.constants: JsonObject = {}
        self._closures: Dict[str, Set[str]] = {}
        partial = {node.output[0]: node.input[0] for graph in self.graphs.values() for node in graph.node
                   if self.operator(node) == "Partial" and node.input}
        for graph in self.graphs.values():
            self._values.update((parameter.name, [parameter]) for parameter in graph.parameter)
            for item in graph.input:
                self._note([item.name], list(item.tensor) or _tensors(item.attr_info), item.attr_info, partial)
            for node in graph.node:
                for attribute in node.attribute:
                    if node.op_type == "Constant" and attribute.name == "value":
                        self.constants[node.output[0]] = _value(attribute)
                        if attribute.tensors:
                            self._values[node.output[0]] = list(attribute.tensors)
                    if attribute.name == "shape":
                        self._note(node.output, _tensors(attribute), attribute, partial)
        self.unresolved = 0
        self.calls = self._count_calls()

    def _note(self, keys: Sequence[str], tensors: List[mind_ir.Tensor], abstract: mind_ir.Attribute,
              partial: Dict[str, str]) -> None:
        closures = self._closures_in(abstract, partial)
        for key in keys:
            self._values[key] = tensors
            self._closures.setdefault(key, set()).update(closures)

    def _closures_in(self, abstract: mind_ir.Attribute, partial: Dict[str, str]) -> Set[str]:
        names = [_text(name) for name in (abstract.s, *abstract.strings)]
        found = {partial.get(name, name) for name in names} & self.graphs.keys()
        for value in abstract.values:
            found |= self._closures_in(value, partial)
        return found

    @staticmethod
    def _target(node: mind_ir.Node) -> str:
        return node.op_type[5:] if node.op_type.startswith("REF::") else node.op_type

    def primitive(self, node: mind_ir.Node) -> Optional[mind_ir.Primitive]:
        """The primitive that a node applies; None for a call."""
        return self.primitives.get(self._target(node))

    def operator(self, node: mind_ir.Node) -> str:
        """Name of the operator of a node; '' for a call or a constant."""
        primitive = self.primitive(node)
        return re.sub("^(InnerComm|Inner)(?=[A-Z])", "", primitive.op_type) if primitive is not None else ""

    def size(self, key: str) -> int:
        """Bytes of the value called `key`."""
        return _size(self._values.get(key, []))

    def form(self, key: str) -> Optional[List[object]]:
        """[dtype, shape] of the tensor called `key`; None where there is none."""
        tensors = self._values.get(key)
        return [_TYPES.get(tensors[0].data_type, "other"), list(tensors[0].dims)] if tensors else None

    def _count_calls(self) -> Counter:
        called: Dict[str, Counter] = {name: Counter() for name in self.graphs}
        for name, graph in self.graphs.items():
            for node in graph.node:
                if not node.op_type.startswith("REF::") or self.primitive(node) is not None:
                    continue
                target = self._target(node)
                targets = {target} if target in self.graphs else self._closures.get(target, set())
                self.unresolved += not targets
                called[name].update(targets)
        done, order = set(), []
        stack = [(self.entry, iter(called[self.entry]))]
        done.add(self.entry)
        while stack:                                   # callees before callers; graphs do not call themselves
            name, rest = stack[-1]
            following = next((other for other in rest if other not in done), None)
            if following is None:
                order.append(name)
                stack.pop()
            else:
                done.add(following)
                stack.append((following, iter(called[following])))
        times = Counter({self.entry: 1})
        for name in reversed(order):
            for callee, count in called[name].items():
                times[callee] += times[name] * count
        return times


class Transfer(NamedTuple):
    """One kind of communication at one place of the model."""

    operator: str
    axes: str                  # of the mesh: 'mp', 'dp+cp', ...
    ranks: int                 # that take part
    phase: str                 # forward, recompute, backward, step
    purpose: str               # parameters, gradients, activations, attention, pipeline, status
    place: str                 # cell of the model


def _phase(node: mind_ir.Node, primitive: Optional[mind_ir.Primitive], trains: bool) -> str:
    if not trains:
        return "forward"
    if any(attribute.name == "duplicated" and attribute.i for attribute in node.node_attr):
        return "recompute"
    ring = next((_value(attribute) for attribute in getattr(primitive, "attribute", ())
                 if attribute.name == "RING_ATTENTION_INDEX"), "")
    if node.domain.startswith("Gradients/") or str(ring).endswith("grad"):
        return "backward"
    if getattr(primitive, "instance_name", "").startswith("recompute_slice"):    # a kept activation is put together
        return "recompute"
    in_model = re.match(r"(recompute_)?Default/((network|_backbone|backbone)|Send|Receive)|recompute_", node.domain)
    return "forward" if in_model else "step"


def _place(domain: str) -> str:
    """The cells of a scope as model.layers.*.attention.wo, without the wrappers around the model."""
    parts = [part for part in domain.split("/") if part not in ("Gradients", "Default", "recompute_Default")]
    cells = [part.split("-")[0] for part in parts[:-1] if not part.startswith("Grad_")]
    names = ["*" if name.isdigit() else name for name in cells if name not in ("network", "_backbone", "backbone")]
    return ".".join(names)


def _purpose(operator: str, node: mind_ir.Node, attributes: JsonObject, instance: str, phase: str) -> str:
    if operator == "Send":
        return "attention" if "RING_ATTENTION_INDEX" in attributes else "pipeline"
    if "parallel_optimizer" in instance:
        return "parameters" if operator == "AllGather" else "gradients"
    if "irror" in instance or "irror" in node.domain or "grad_accu" in instance.lower():
        return "gradients"
    if phase == "step" or "GLOBALNORM" in instance.upper() or "clip_grad" in node.domain:
        return "status"
    return "attention" if "/attend-" in node.domain or operator.lower().startswith("alltoall") else "activations"


def _bytes_sent(operator: str, payload: int, ranks: int) -> int:
    """payload: bytes that enter the operator on one rank."""
    if operator in _SENDS:
        return payload
    if ranks <= 1:
        return 0
    if operator == "AllGather":
        return payload * (ranks - 1)
    return payload * (ranks - 1) // ranks * (2 if operator == "AllReduce" else 1)


def _transfers(program: Program, mesh: Mesh, rank: int, trains: bool) -> Dict[Transfer, Counter]:
    found: Dict[Transfer, Counter] = {}
    world = list(range(mesh.pp * mesh.dp * mesh.cp * mesh.mp))
    for name, graph in program.graphs.items():
        times = program.calls[name]
        for node in graph.node:
            operator = program.operator(node)
            primitive = program.primitive(node)
            if not times or primitive is None or operator not in _COLLECTIVES | _SENDS:
                continue
            attributes: JsonObject = {attribute.name: _value(attribute) for attribute in primitive.attribute}
            group = attributes.get("group_rank_ids") or attributes.get("rank_list") or world
            group = group if isinstance(group, list) else [group]
            ranks = len(group)
            if operator == "Send":
                target = attributes.get("dst_global_rank", attributes.get("dest_rank", rank))
                group, ranks = [rank, target], 2
            payload = sum(program.size(key) for key in node.input[:1])
            if operator == "AllGather" and not payload:                   # the input is a constant or a view
                payload = program.size(node.output[0]) // ranks
            phase = _phase(node, primitive, trains)
            purpose = _purpose(operator, node, attributes, primitive.instance_name, phase)
            place = attributes.get("mirror_user_id") or _place(node.domain)
            place = re.sub(r"\.\d+\.", ".*.", str(place))
            key = Transfer(operator, mesh.axes(group), ranks, phase, purpose, place)
            found.setdefault(key, Counter()).update(calls=times, bytes=times * _bytes_sent(operator, payload, ranks))
    return found


def _attention(program: Program) -> List[JsonObject]:
    """The different ways in which the graph calls FlashAttentionScore: its settings, and [dtype, shape] of the query
    and the mask."""
    found: List[JsonObject] = []
    for name, graph in program.graphs.items():
        for node in graph.node:
            if program.calls[name] and program.operator(node) == "FlashAttentionScore":
                way = {setting: program.constants.get(node.input[place])
                       for place, setting in _ATTENTION_SETTINGS.items()}
                if isinstance(way["layout"], int):
                    way["layout"] = _LAYOUTS[way["layout"]]
                way.update(query=program.form(node.input[0]), mask=program.form(node.input[_ATTENTION_MASK]))
                if way not in found:
                    found.append(way)
    return found


def _memory(program: Program) -> Dict[str, Dict[str, int]]:
    """Parameters of the rank by kind: {kind: {count, elements, bytes, dtype...}}."""
    kinds: Dict[str, Counter] = {}
    for parameter in program.parameters:
        name = re.sub(r":\d+$", "", parameter.name.split(":", 1)[-1])
        elements = 1
        for dim in parameter.dims:
            elements *= dim
        if name.startswith("accu_grad"):
            kind = "gradients"
        elif _STATE.match(name):
            kind = "optimizer"
        elif name.startswith(REMAINDER_PREFIX):
            kind = "remainder"
        elif name.endswith(("key_cache", "value_cache")):
            kind = "kv_cache"
        elif "." in name:
            kind = "parameters"
        else:
            kind = "other"
        size = elements * _BYTES.get(parameter.data_type, 4)
        kinds.setdefault(kind, Counter()).update({"count": 1, "elements": elements, "bytes": size,
                                                  _TYPES.get(parameter.data_type, "other"): elements})
    return {kind: dict(values) for kind, values in sorted(kinds.items())}


def _sum_by(transfers: Dict[Transfer, Counter], field: str) -> Dict[str, int]:
    sums: Counter = Counter()
    for key, counts in transfers.items():
        sums[getattr(key, field)] += counts["bytes"]
    return dict(sums.most_common())


def account(model: mind_ir.Model, mesh: Mesh, rank: int, places: int = 20) -> JsonObject:
    """Count one rank's step. places: how many of the costliest places of communication to list.

    Returns {"communication": {"bytes", "calls", "by_phase", "by_purpose", "by_axes", "by_operator", "places"},
    "memory": {kind: {"count", "elements", "bytes", dtype: elements}}, "attention": the ways in which flash attention is
    called, "operators": {name: {phase: count}},
    "nodes", "subgraphs", "unresolved_calls"}; all bytes are those of one rank and one step.
    """
    program = Program(model)
    trains = any(node.domain.startswith("Gradients/") for graph in program.graphs.values() for node in graph.node)
    transfers = _transfers(program, mesh, rank, trains)
    operators: Dict[str, Counter] = {}
    nodes = 0
    for name, graph in program.graphs.items():
        times = program.calls[name]
        for node in graph.node:
            operator = program.operator(node)
            nodes += times * bool(operator)
            if times and operator in _COUNTED:
                operators.setdefault(operator, Counter())[_phase(node, program.primitive(node), trains)] += times
    costliest: List[Tuple[Transfer, Counter]] = sorted(transfers.items(), key=lambda item: -item[1]["bytes"])
    return {
        "communication": {
            "bytes": sum(counts["bytes"] for counts in transfers.values()),
            "calls": sum(counts["calls"] for counts in transfers.values()),
            **{f"by_{field}": _sum_by(transfers, field) for field in ("phase", "purpose", "axes", "operator")},
            "places": [{**key._asdict(), **counts} for key, counts in costliest[:places]]},
        "memory": _memory(program), "attention": _attention(program),
        "operators": {name: dict(counts) for name, counts in sorted(operators.items())},
        "nodes": nodes, "subgraphs": len(program.graphs), "unresolved_calls": program.unresolved}
