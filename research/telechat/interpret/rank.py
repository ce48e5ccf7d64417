"""Executes the graph of one rank, node by node, up to the next communication.

With `precise`, everything that the graph declares as floating point is computed in float64: a plan and the unsharded
model then differ only by the order of summation, about 1e-15, not by 16-bit rounding. Otherwise every result is rounded
to its declared type.
"""
from collections import deque
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np

from research.telechat.common.bfloat16 import round_bfloat16
from research.telechat.common.errors import ExecutionError
from research.telechat.interpret import cache
from research.telechat.interpret.collectives import COLLECTIVES, Arrival, Box, Execution, Wanted
from research.telechat.interpret.ir import BFLOAT16, DTYPES, FLOATING, Closure, Node, Program
from research.telechat.interpret.operators import OPERATORS, Operator

Watch = Callable[[Node, Any], None]          # called with each node and its result
# Operators that take parameters, not their values.
_BY_REFERENCE = {"ReshapeAndCache", "Load", "Assign", "AssignAdd", "AssignSub", "InplaceCopy", "Partial", "MakeTuple",
                 "TupleGetItem", "Depend", "UpdateState", "Switch"}
_ASSIGNMENTS: Dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "Assign": lambda _old, value: value, "InplaceCopy": lambda _old, value: value, "AssignAdd": np.add,
    "AssignSub": np.subtract}


class Reference:
    """A reference to a parameter."""

    __slots__ = ("key",)

    def __init__(self, key: str):
        self.key = key


def settle(value: Any, dtype: int, precise: bool) -> np.ndarray:
    """`value` as an array of the declared `dtype` (a number of ir.DTYPES), or as float64 if `precise`."""
    if dtype in FLOATING:
        if precise:
            return np.asarray(value, np.float64)
        if dtype == BFLOAT16:
            return round_bfloat16(np.asarray(value, np.float32)).reshape(np.shape(value))
    return np.asarray(value).astype(DTYPES[dtype], copy=False)


class Rank:
    """One rank: its program, its parameters {name: array}, and its sent messages."""

    def __init__(self, number: int, ranks: int, program: Program, parameters: Dict[str, np.ndarray], box: Box,
                 precise: bool = True, operators: Optional[Dict[str, Operator]] = None, watch: Optional[Watch] = None):
        self.number, self.ranks, self.program, self.precise, self.box = number, ranks, program, precise, box
        self.operators = operators or OPERATORS
        self.watch = watch
        self.values: Dict[str, np.ndarray] = {}
        for key, parameter in program.parameters.items():
            if parameter.name not in parameters:
                raise ExecutionError(f"rank {number}: parameter {parameter.name} of the graph is missing")
            value = settle(parameters[parameter.name], parameter.dtype, precise)
            if value.shape != parameter.shape:
                raise ExecutionError(f"rank {number}: {parameter.name} has the shape {parameter.shape} in the graph, "
                                     f"found {value.shape}")
            self.values[key] = value
        self.references = {key: Reference(key) for key in self.values}
        self.executed: Dict[str, int] = {}                       # number of executions by operator

    def named(self) -> Dict[str, np.ndarray]:
        """The parameters by name."""
        return {self.program.parameters[key].name: value for key, value in self.values.items()}

    def run(self, inputs: Sequence[np.ndarray]) -> Execution:
        """Execute the entry graph; see collectives.run."""
        expected = self.program.inputs
        if len(inputs) != len(expected):
            raise ExecutionError(f"rank {self.number}: the graph takes {[name for name, _ in expected]}, found "
                                 f"{len(inputs)} inputs")
        return self._call(self.program.entry, tuple(inputs))

    def _call(self, graph: str, args: Tuple[Any, ...]) -> Execution:
        names, outputs, nodes = self.program.graphs[graph]
        if len(names) != len(args):
            raise ExecutionError(f"rank {self.number}: graph {graph} takes {len(names)} inputs, found {len(args)}")
        frame = dict(zip(names, args))
        last_use = self._last_uses(graph)
        for number, node in enumerate(nodes):
            inputs = [self._look_up(frame, key, graph) for key in node.inputs]
            if node.op and node.op not in _BY_REFERENCE:
                inputs = [self._by_value(value) for value in inputs]
            self.executed[node.op] = self.executed.get(node.op, 0) + 1
            if not node.op:
                callee = (Closure(node.callee, ()) if node.callee in self.program.graphs
                          else self._look_up(frame, node.callee, graph))
                result = yield from self._call(callee.graph, (*callee.args, *inputs))
            elif node.op in COLLECTIVES:
                result = yield self._arrive(node, inputs[0])
            elif node.op == "Receive":
                source: int = node.attrs.get("src_global_rank", node.attrs.get("src_rank", -1))
                result = yield Wanted(source, node.attrs["sr_tag"], str(node))
            else:
                result = self._compute(node, inputs)
            frame[node.output] = self._checked(node, result, node.form)
            if self.watch is not None:
                self.watch(node, frame[node.output])
            for key in last_use[number]:                         # frees memory early
                frame.pop(key, None)
        found = tuple(self._look_up(frame, key, graph) for key in outputs)
        return found[0] if len(found) == 1 else found

    def _last_uses(self, graph: str) -> List[List[str]]:
        """For each node the values that no later node needs."""
        _, outputs, nodes = self.program.graphs[graph]
        uses: List[List[str]] = [[] for _ in nodes]
        seen = set(outputs)
        for number in range(len(nodes) - 1, -1, -1):
            for key in {*nodes[number].inputs, nodes[number].callee} - seen:
                uses[number].append(key)
                seen.add(key)
        return uses

    def _look_up(self, frame: Dict[str, Any], key: str, graph: str) -> Any:
        if key in frame:
            return frame[key]
        if key in self.references:
            return self.references[key]
        if key not in self.program.constants:
            raise ExecutionError(f"rank {self.number}: {key} is undefined in graph {graph}")
        value = self.program.constants[key]
        if self.precise and isinstance(value, np.ndarray) and value.dtype.kind == "f":
            return value.astype(np.float64)
        return value

    def _by_value(self, value: Any) -> Any:
        if isinstance(value, Reference):
            return self.values[value.key]
        if isinstance(value, tuple) and not isinstance(value, Closure):
            return tuple(self._by_value(one) for one in value)
        return value

    def _compute(self, node: Node, inputs: List[Any]) -> Any:
        """The result of a node that involves no other rank."""
        if node.op == "Partial":
            return Closure(inputs[0].graph, (*inputs[0].args, *inputs[1:]))
        if node.op == "Load":
            return self._by_value(inputs[0])
        if node.op in _ASSIGNMENTS:
            return self._assign(node, inputs[0], self._by_value(inputs[1]))
        if node.op == "ReshapeAndCache":
            return self._fill_cache(node, inputs)
        if node.op == "Send":
            target: int = node.attrs.get("dst_global_rank", node.attrs.get("dest_rank", -1))
            self.box.setdefault((self.number, target, node.attrs["sr_tag"]), deque()).append(inputs[0])
            return inputs[0]
        if node.op not in self.operators:
            raise ExecutionError(f"rank {self.number}: the interpreter does not know the operator {node.op} "
                                 f"({node.place}, attributes {sorted(node.attrs)}); add it to "
                                 "research/telechat/interpret/operators.py, or use a plan that does not need it")
        try:
            with np.errstate(all="ignore"):
                return self.operators[node.op](node, *inputs)
        except ExecutionError:
            raise
        except Exception as error:                               # any NumPy error about inputs that do not match
            shapes = [np.shape(value) if isinstance(value, np.ndarray) else value for value in inputs]
            raise ExecutionError(f"rank {self.number}: {node} of {str(shapes)[:300]}: {error}") from error

    def _assign(self, node: Node, target: Any, value: Any) -> np.ndarray:
        if not isinstance(target, Reference):
            raise ExecutionError(f"rank {self.number}: {node} writes to something that is not a parameter")
        old, parameter = self.values[target.key], self.program.parameters[target.key]
        new = settle(_ASSIGNMENTS[node.op](old, value), parameter.dtype, self.precise)
        if new.size != old.size:
            raise ExecutionError(f"rank {self.number}: {node} writes {new.shape} to {parameter.name} of {old.shape}")
        self.values[target.key] = new.reshape(old.shape)
        return self.values[target.key]

    def _fill_cache(self, node: Node, inputs: List[Any]) -> Any:
        key, value, keys, values, slots = inputs[:5]
        for x, target in ((key, keys), (value, values)):
            if not isinstance(target, Reference):
                raise ExecutionError(f"rank {self.number}: {node} writes to something that is not a parameter")
            self.values[target.key] = cache.store(self._by_value(x), self.values[target.key], self._by_value(slots))
        return self._by_value(key)

    def _arrive(self, node: Node, value: Any) -> Arrival:
        group = node.attrs.get("group_rank_ids") or node.attrs.get("rank_list") or tuple(range(self.ranks))
        group = tuple(group) if isinstance(group, (tuple, list)) else (group,)
        if self.number not in group:
            raise ExecutionError(f"rank {self.number} is not in the group {group} of {node}")
        return Arrival(node.op, group, node.attrs, value, str(node))

    def _checked(self, node: Node, value: Any, form: Any) -> Any:
        """`value` in the type inferred by the compiler; another shape than the inferred one is refused."""
        if form is None or value is None or isinstance(value, (Closure, Reference)):
            return value
        if isinstance(form, list):
            if not isinstance(value, tuple) or node.op == "TensorToTuple":     # length known only at run time
                return value
            if len(form) != len(value):
                raise ExecutionError(f"rank {self.number}: {node} returns {len(value)} results, the graph expects "
                                     f"{len(form)}")
            return tuple(self._checked(node, one, its) for one, its in zip(value, form))
        if isinstance(value, tuple):
            return value
        dtype, shape = form
        value = settle(value, dtype, self.precise)
        unused = node.op == "FlashAttentionScore" and (1,) in (shape[-1:], value.shape)      # not given in its layout
        if min(shape, default=0) >= 0 and value.shape != shape and not unused:
            raise ExecutionError(f"rank {self.number}: {node} returns shape {value.shape}, the graph expects {shape}")
        return value
