"""The semantics of operators, from MindSpore's documentation: OPERATORS[name](node, *inputs) -> result.

Inputs are arrays, numbers, strings and tuples of these. Precision is not handled here: rank.py casts every result to
the required type and compares its shape with the one inferred by the compiler. Fused kernels have their own modules.
"""
from typing import Any, Callable, Dict, Optional, Sequence, Tuple, Union

import numpy as np

from research.telechat.common.errors import ExecutionError
from research.telechat.interpret import attention, cache, norm
from research.telechat.interpret.ir import Node

Array = np.ndarray
Axis = Union[None, int, Tuple[int, ...]]
Operator = Callable[..., object]


def _axes(axis: Axis, dimensions: int) -> Optional[Tuple[int, ...]]:
    """Axes to reduce; None for all, if axis is None or ()."""
    if axis is None or axis == ():
        return None
    return tuple(int(one) % dimensions for one in (axis if isinstance(axis, tuple) else (axis,)))


def _reduce(function: Callable[..., Array]) -> Operator:
    def reduce(_node: Node, x: Array, axis: Axis = None, keep: bool = False, *_rest: object) -> Array:
        return function(x, axis=_axes(axis, np.ndim(x)), keepdims=bool(keep))
    return reduce


def _reduce_sum(_node: Node, x: Array, axis: Axis = (), keep: bool = False, skip: bool = False) -> Array:
    """skip: without axes, return x itself."""
    return x if axis == () and skip else np.sum(x, axis=_axes(axis, np.ndim(x)), keepdims=bool(keep))


def _plain(function: Callable[..., object]) -> Operator:
    return lambda _node, *values: function(*values)


def _matmul(node: Node, x: Array, y: Array, transpose_x: bool = False, transpose_y: bool = False) -> Array:
    x = np.swapaxes(x, -1, -2) if transpose_x else x
    y = np.swapaxes(y, -1, -2) if transpose_y else y
    if node.op == "BatchMatMul" and x.shape[:-2] != y.shape[:-2] and 1 not in (*x.shape[:-2], *y.shape[:-2]):
        raise ExecutionError(f"{node}: batch shapes {x.shape[:-2]} and {y.shape[:-2]} do not match")
    return np.matmul(x, y)


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def _silu_grad(_node: Node, dy: Array, x: Array) -> Array:
    return dy * _sigmoid(x) * (1 + x * (1 - _sigmoid(x)))


def _softmax(node: Node, x: Array, axis: Axis = None) -> Array:
    where = _axes(node.attrs.get("axis", -1) if axis is None else axis, x.ndim)
    weights = np.exp(x - x.max(where, keepdims=True))
    return weights / weights.sum(where, keepdims=True)


def _attribute(node: Node, name: str, given: object, default: object = None) -> Any:
    """An argument that is an input in one version and an attribute in another."""
    return node.attrs.get(name, default) if given is None else given


def _concat(node: Node, parts: Sequence[Array], axis: Axis = None) -> Array:
    return np.concatenate(parts, int(_attribute(node, "axis", axis, 0)))


def _stack(node: Node, parts: Sequence[Array], axis: Axis = None) -> Array:
    return np.stack(parts, int(_attribute(node, "axis", axis, 0)))


def _split(node: Node, x: Array, axis: Axis = None, count: Optional[int] = None) -> Tuple[Array, ...]:
    return tuple(np.split(x, int(_attribute(node, "output_num", count)), int(_attribute(node, "axis", axis, 0))))


def _split_with_size(node: Node, x: Array, sizes: Sequence[int], axis: int = 0) -> Tuple[Array, ...]:
    if sum(sizes) != x.shape[axis]:
        raise ExecutionError(f"{node}: sizes {tuple(sizes)} do not add up to the axis of {x.shape[axis]}")
    return tuple(np.split(x, np.cumsum(sizes)[:-1], axis))


def _in_range(node: Node, index: Array, limit: int) -> None:
    if index.size and (index.min() < 0 or index.max() >= limit):
        raise ExecutionError(f"{node}: index {index.min()} to {index.max()} is outside axis size {limit}; a device may "
                             "return anything, or zeros")


def _gather(node: Node, x: Array, index: Array, axis: int, batch_dims: int = 0) -> Array:
    if batch_dims:
        raise ExecutionError(f"{node}: the interpreter does not support batch_dims {batch_dims}")
    _in_range(node, np.asarray(index), x.shape[int(axis)])
    return np.take(x, index, int(axis))


def _gather_d(node: Node, x: Array, axis: int, index: Array, *_rest: object) -> Array:
    _in_range(node, index, x.shape[axis])
    return np.take_along_axis(x, index, axis)


def _one_hot(_node: Node, index: Array, depth: int, on: Array, off: Array, axis: int = -1) -> Array:
    return np.moveaxis(np.where(index[..., None] == np.arange(int(depth)), on, off), -1, axis)


def _segment_sum(_node: Node, x: Array, index: Array, count: int) -> Array:
    """Rows of x summed by segment; segments outside 0 to count - 1 are dropped."""
    tail = x.shape[index.ndim:]
    result = np.zeros((int(count), *tail), x.dtype)
    flat = index.reshape(-1)
    inside = (flat >= 0) & (flat < count)
    np.add.at(result, flat[inside], x.reshape(-1, *tail)[inside])
    return result


def _places(node: Node, begin: Sequence[int], end: Sequence[int], strides: Sequence[int], begin_mask: int = 0,
            end_mask: int = 0, ellipsis_mask: int = 0, new_axis_mask: int = 0, shrink_axis_mask: int = 0
            ) -> Tuple[Union[int, slice], ...]:
    if ellipsis_mask or new_axis_mask:
        raise ExecutionError(f"{node}: the interpreter does not support ellipsis_mask and new_axis_mask")
    places: list = []
    for axis, (first, last, step) in enumerate(zip(begin, end, strides)):
        if shrink_axis_mask >> axis & 1:
            places.append(int(first))
        else:
            places.append(slice(None if begin_mask >> axis & 1 else int(first),
                                None if end_mask >> axis & 1 else int(last), int(step)))
    return tuple(places)


def _strided_slice(node: Node, x: Array, *arguments: Any) -> Array:
    return x[_places(node, *arguments)]


def _strided_slice_grad(node: Node, dy: Array, shape: Sequence[int], *arguments: Any) -> Array:
    result = np.zeros(tuple(int(size) for size in shape), dy.dtype)
    result[_places(node, *arguments)] = dy
    return result


def _slice(_node: Node, x: Array, begin: Sequence[int], size: Sequence[int]) -> Array:
    return x[tuple(slice(first, None if count == -1 else first + count) for first, count in zip(begin, size))]


def _broadcast_to(_node: Node, x: Array, shape: Sequence[int]) -> Array:
    sizes = (1,) * (len(shape) - np.ndim(x)) + np.shape(x)
    return np.broadcast_to(x, [size if wanted == -1 else wanted for wanted, size in zip(shape, sizes)])


def _pad(node: Node, x: Array, paddings: Optional[Sequence[Sequence[int]]] = None, *_rest: object) -> Array:
    return np.pad(x, _attribute(node, "paddings", paddings))


def _squeeze(node: Node, x: Array, axis: Axis = None) -> Array:
    return np.squeeze(x, _axes(_attribute(node, "axis", axis), np.ndim(x)))


def _full(node: Node, *arguments: Any) -> Array:
    """Fill and FillV2: the value is the last argument. The shape is the one inferred by the compiler."""
    return np.full(node.form[1], arguments[-1])


def _filled(value: float) -> Operator:
    return lambda _node, shape, *_rest: np.full(shape, value)


def _arg_max_with_value(node: Node, x: Array, axis: Axis = None, keep: Optional[bool] = None) -> Tuple[Array, Array]:
    axis, keep = int(_attribute(node, "axis", axis, 0)), bool(_attribute(node, "keep_dims", keep, False))
    return np.expand_dims(x.argmax(axis), axis) if keep else x.argmax(axis), x.max(axis, keepdims=keep)


def _zeros_of_status(_node: Node, *_inputs: object) -> Array:
    return np.zeros(8, np.int32)                               # no overflow


def _switch(_node: Node, condition: Array, yes: object, no: object) -> object:
    return yes if bool(np.all(condition)) else no


def _item(_node: Node, values: Tuple[object, ...], index: int) -> object:
    return values[int(index)]


_FUNCTIONS: Dict[str, Callable[..., object]] = {
    "Add": np.add, "Adds": np.add, "Sub": np.subtract, "Subs": np.subtract, "Mul": np.multiply,
    "Muls": np.multiply, "Div": np.divide, "Divs": np.divide, "RealDiv": np.divide, "FloorDiv": np.floor_divide,
    "FloorMod": np.mod, "Mod": np.mod, "Maximum": np.maximum, "Minimum": np.minimum, "Pow": np.power,
    "Exp": np.exp, "Log": np.log, "Sqrt": np.sqrt, "Rsqrt": lambda x: 1 / np.sqrt(x), "Square": np.square,
    "Neg": np.negative, "Abs": np.abs, "Reciprocal": lambda x: 1 / x, "Cos": np.cos, "Sin": np.sin,
    "ReLU": lambda x: np.maximum(x, 0), "SiLU": lambda x: x * _sigmoid(x), "Sigmoid": _sigmoid,
    "Equal": np.equal, "NotEqual": np.not_equal, "Greater": np.greater, "GreaterEqual": np.greater_equal,
    "Less": np.less, "LessEqual": np.less_equal, "LogicalNot": np.logical_not, "LogicalOr": np.logical_or,
    "LogicalAnd": np.logical_and, "BitwiseOr": np.bitwise_or, "IsFinite": np.isfinite, "Select": np.where,
    "ZerosLike": np.zeros_like, "OnesLike": np.ones_like, "Reshape": np.reshape, "ExpandDims": np.expand_dims,
    "Transpose": np.transpose, "Tile": np.tile, "Addcmul": lambda x, a, b, value: x + value * a * b,
    "AddN": lambda values: sum(values[1:], values[0]), "AccumulateNV2": lambda values: sum(values[1:], values[0]),
    "CumSum": lambda x, axis, *_rest: np.cumsum(x, int(axis)), "CumsumExt": lambda x, axis, *_: np.cumsum(x, axis),
    "TensorMove": lambda x: x, "Identity": lambda x: x, "StopGradient": lambda x: x, "Depend": lambda x, *_: x,
    "Cast": lambda x, *_rest: x, "ScalarToTensor": lambda x, *_rest: np.asarray(x), "Shape": np.shape,
    "DType": lambda _x: None, "TensorToTuple": lambda x: tuple(int(value) for value in np.ravel(x)),
    "TupleToTensor": lambda x, *_rest: np.asarray(x), "MakeTuple": lambda *values: values,
    "MakeList": lambda *values: values, "UpdateState": lambda *_values: ()}
OPERATORS: Dict[str, Operator] = {
    **{name: _plain(function) for name, function in _FUNCTIONS.items()},
    "MatMul": _matmul, "BatchMatMul": _matmul, "SiLUGrad": _silu_grad, "Softmax": _softmax,
    "ReduceSum": _reduce_sum, "SumExt": _reduce(np.sum), "ReduceMax": _reduce(np.max), "ReduceMin": _reduce(np.min),
    "ReduceMean": _reduce(np.mean), "ReduceAll": _reduce(np.all), "ReduceAny": _reduce(np.any),
    "Concat": _concat, "Stack": _stack, "Split": _split, "SplitWithSize": _split_with_size, "Gather": _gather,
    "GatherD": _gather_d, "OneHot": _one_hot, "UnsortedSegmentSum": _segment_sum, "StridedSlice": _strided_slice,
    "StridedSliceGrad": _strided_slice_grad, "Slice": _slice, "BroadcastTo": _broadcast_to, "Pad": _pad,
    "Squeeze": _squeeze, "Fill": _full, "FillV2": _full, "Zeros": _filled(0.0), "Ones": _filled(1.0),
    "ArgMaxWithValue": _arg_max_with_value, "NPUGetFloatStatusV2": _zeros_of_status,
    "NPUClearFloatStatusV2": _zeros_of_status, "NPUAllocFloatStatus": _zeros_of_status, "Switch": _switch,
    "TupleGetItem": _item, "ListGetItem": _item,
    **norm.OPERATORS, **cache.OPERATORS, **attention.operators()}
