"""Gradient accumulation where MindFormers has none: on a CPU, with and without data-parallel ranks.

A batch is split into parts. One graph takes the gradients of a part's sum and adds them to those of the parts before,
so that only one part's activations are kept at a time; the training step divides by the number of tokens of all parts.
"""
from typing import Tuple

import numpy as np
from mindspore import Tensor, nn
from mindspore.ops import composite as C
from mindspore.ops import functional as F

_add = C.MultitypeFuncGraph("telechat_accumulate")


@_add.register("Tensor", "Tensor")
def _plus(one: Tensor, other: Tensor) -> Tensor:
    """Gradients of the same parameter, in float32."""
    return one + F.cast(other, F.dtype(one))


class Part(nn.Cell):
    """Sum, number and gradients of one part, added to those of the parts before it."""

    def __init__(self, step: nn.Cell):
        super().__init__(auto_prefix=False)
        self.network, self.weights, self.grad = step.network, step.weights, step.grad
        self.hyper_map = C.HyperMap()
        self.weight_count = len(step.weights)

    def construct(self, scale: Tensor, total: Tensor, count: Tensor, *others: Tensor) -> Tuple[Tensor, ...]:
        """scale: [], of the loss; total [], count [1], and in `others` the gradients so far, then the network's inputs.

        -> total, count, and the gradients, which are times `scale`.
        """
        gradients, inputs = others[:self.weight_count], others[self.weight_count:]
        more, number = self.network(*inputs)
        sens = (F.ones_like(more) * scale, F.zeros_like(number))
        new = self.grad(self.network, self.weights)(*inputs, sens)
        return (total + more, count + number, *self.hyper_map(_add, gradients, new))


class Accumulation:
    """Takes a batch in `parts`; `step` is a TelechatTrainOneStepCell. No cell, so that nothing of it is saved."""

    def __init__(self, step: nn.Cell, parts: int):
        self.scale_sense, self.parts = step.scale_sense, parts
        self.part = Part(step).set_train()
        self.shapes = [parameter.shape for parameter in step.weights]

    def __call__(self, *inputs: Tensor) -> Tuple[Tensor, ...]:
        """inputs: the network's, of the whole batch -> sum [], number [1], gradients of the sum times the loss scale.

        Raises:
            ValueError: the batch cannot be split into that many parts.
        """
        rows = inputs[0].shape[0]
        if rows % self.parts:
            raise ValueError(f"a batch of {rows} sequences cannot be split into {self.parts} equal parts")
        size = rows // self.parts
        arrays = [each.asnumpy() for each in inputs]
        scale = Tensor(np.float32(self.scale_sense.asnumpy().item()))
        sums = [Tensor(np.zeros(shape, np.float32)) for shape in ((), (1,), *self.shapes)]
        for start in range(0, rows, size):
            sums = self.part(scale, *sums, *(Tensor(array[start:start + size]) for array in arrays))
        return tuple(sums)
