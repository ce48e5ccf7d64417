"""The kernels of training on a CPU: cells around the fused operators of native/, which compute in float32.

Whether they are used, model/kernels.py says. Each equals the composed operators that it takes the place of, up to
rounding, and is differentiated by an operator of its own.
"""
from typing import Tuple

import mindspore.common.dtype as mstype
import numpy as np
from mindspore import Tensor, nn
from mindspore.ops import Primitive
from mindspore.ops import functional as F
from mindspore.ops import operations as P

from research.telechat.native.operators import operator


def linear_product() -> Primitive:
    """The operator (x [T, K], weight [N, K]), float32 -> x weight^T [T, N]."""
    of_input = operator("LinearInputGradient", ("dy", "weight"), (mstype.float32,))
    of_weight = operator("LinearWeightGradient", ("dy", "x"), (mstype.float32,))

    def bprop(x: Tensor, weight: Tensor, _out: Tensor, dy: Tensor) -> Tuple:
        """Gradients of x and weight."""
        return of_input(dy, weight), of_weight(dy, x)

    return operator("Linear", ("x", "weight"), (mstype.float32,), bprop)


def bias_add() -> Primitive:
    """The operator (x [T, N], bias [N]), float32 -> x + bias."""
    of_bias = operator("BiasGradient", ("dy",), (mstype.float32,))

    def bprop(_x: Tensor, _bias: Tensor, _out: Tensor, dy: Tensor) -> Tuple:
        """Gradients of x and bias."""
        return dy, of_bias(dy)

    return operator("AddBias", ("x", "bias"), (mstype.float32,), bprop)


def adamw() -> Primitive:
    """The operator that updates a parameter; arguments and formula as of MindSpore's AdamWeightDecay."""
    return operator("AdamW", ("parameter", "mean", "square", "rate", "beta1", "beta2", "eps", "decay", "gradient"),
                    (mstype.float32,), writes=("parameter", "mean", "square"))


class FusedRMSNorm(nn.Cell):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last axis."""

    def __init__(self, eps: float):
        super().__init__()
        backward = operator("RmsNormGradient", ("x", "weight", "inverse", "dy"), (mstype.float32, mstype.float32))

        def bprop(x: Tensor, weight: Tensor, eps: Tensor, out: Tuple, dy: Tuple) -> Tuple:
            """Gradients of x, weight and eps, which has none."""
            dx, dweight = backward(x, weight, out[1], dy[0])
            return dx, dweight, F.zeros_like(eps)

        self.norm = operator("RmsNorm", ("x", "weight", "eps"), (mstype.float32, mstype.float32), bprop)
        self.eps = Tensor(np.array([eps], np.float32))

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        """x: [..., H] and weight: [H], float32 -> [..., H]."""
        return self.norm(x, weight, self.eps)[0]

    def shard(self, _strategy: tuple) -> None:
        """Nothing is sharded where this is used."""


class FusedSwiGLU(nn.Cell):
    """silu(gate) * up."""

    def __init__(self) -> None:
        super().__init__()
        backward = operator("SwiGluGradient", ("gate", "up", "dy"), (mstype.float32, mstype.float32))

        def bprop(gate: Tensor, up: Tensor, _out: Tensor, dy: Tensor) -> Tuple:
            """Gradients of gate and up."""
            return backward(gate, up, dy)

        self.swiglu = operator("SwiGlu", ("gate", "up"), (mstype.float32,), bprop)

    def construct(self, gate: Tensor, up: Tensor) -> Tensor:
        """gate, up: [T, F] float32 -> [T, F]."""
        return self.swiglu(gate, up)


class FusedGroupedSwiGLU(nn.Cell):
    """silu(gate) * up of rows that hold both, group by group."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        backward = operator("GroupedSwiGluGradient", ("both", "groups", "dy"), (mstype.float32,))

        def bprop(both: Tensor, groups: Tensor, _out: Tensor, dy: Tensor) -> Tuple:
            """Gradients of both, and of groups, which have none."""
            return backward(both, groups, dy), F.zeros_like(groups)

        self.swiglu = operator("GroupedSwiGlu", ("both", "groups"), (mstype.float32,), bprop)
        self.groups = Tensor(np.zeros(groups, np.float32))         # its length counts

    def construct(self, both: Tensor) -> Tensor:
        """both: [T, 2 F] float32, in each group the columns of gate and then those of up -> [T, F]."""
        return self.swiglu(both, self.groups)


class FusedCrossEntropy(nn.Cell):
    """-log softmax(logits)[label] of each row, 0 where the label is `ignored`."""

    def __init__(self, ignored: int):
        super().__init__()
        inputs = ("logits", "labels", "ignored")
        backward = operator("CrossEntropyGradient", (*inputs, "lse", "dloss"), (mstype.float32,))

        def bprop(logits: Tensor, labels: Tensor, ignored: Tensor, out: Tuple, dy: Tuple) -> Tuple:
            """Gradients of the logits, and of the others, which have none."""
            return (backward(logits, labels, ignored, out[1], dy[0]), F.zeros_like(labels), F.zeros_like(ignored))

        self.forward = operator("CrossEntropy", inputs, (mstype.float32, mstype.float32), bprop)
        self.backward = backward
        self.ignored = Tensor(np.array([ignored], np.int32))
        self.cast, self.ones_like = P.Cast(), P.OnesLike()

    def construct(self, logits: Tensor, labels: Tensor) -> Tensor:
        """logits: [T, V] float32, labels: [T] -> losses [T] float32. Fails where another label is below 0 or not below
        V."""
        return self.forward(logits, self.cast(labels, mstype.int32), self.ignored)[0]

    def with_gradient(self, logits: Tensor, labels: Tensor) -> Tuple[Tensor, Tensor]:
        """As `construct`, and the gradients of the losses by the logits, [T, V] float32."""
        labels = self.cast(labels, mstype.int32)
        loss, lse = self.forward(logits, labels, self.ignored)
        return loss, self.backward(logits, labels, self.ignored, lse, self.ones_like(loss))


class FusedAttention(nn.Cell):
    """Causal attention with rotary embedding, from the rows of the projections to those of the context.

    one: whether there is one projection, with rows [q | k | v] per head, and not one for queries and one for keys and
    values, with rows [k | v] per key/value head.
    """

    def __init__(self, one: bool):
        super().__init__()
        name = "AttentionOfOne" if one else "Attention"
        inputs = ("query", "key_value", "cos", "sin", "documents")[:4 if one else 5]
        both = (mstype.float32, mstype.float32)
        backward = operator(f"{name}Gradient", (*inputs, "context", "lse", "dcontext"), both[:1 if one else 2])

        def of_one(rows: Tensor, cos: Tensor, sin: Tensor, documents: Tensor, out: Tuple, dy: Tuple) -> Tuple:
            """Gradients of the rows, and of the others, which have none."""
            drows = backward(rows, cos, sin, documents, out[0], out[1], dy[0])
            return drows, F.zeros_like(cos), F.zeros_like(sin), F.zeros_like(documents)

        def of_two(query: Tensor, key_value: Tensor, cos: Tensor, sin: Tensor, documents: Tensor, out: Tuple,
                   dy: Tuple) -> Tuple:
            """Gradients of the rows, and of the others, which have none."""
            dquery, dkey_value = backward(query, key_value, cos, sin, documents, out[0], out[1], dy[0])
            return dquery, dkey_value, F.zeros_like(cos), F.zeros_like(sin), F.zeros_like(documents)

        self.attend = operator(name, inputs, both, of_one if one else of_two)

    def construct(self, projections: Tuple[Tensor, ...], rope: Tuple[Tensor, Tensor], documents: Tensor) -> Tensor:
        """projections: rows [B S, ...]; rope: cos and sin, [1 or B, 1, S, D]; all float32. documents: [1 or B, S]
        int32, number of the document of each token, rising -> context [B S, N D]."""
        return self.attend(*projections, *rope, documents)[0]
