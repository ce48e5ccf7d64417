"""AdamW with a remainder for 16-bit parameters, and AdamW and gradient clipping from the kernels that a CPU has.

On Ascend MindFormers' own AdamW is used where nothing is stored in 16 bits, and its clipping. MindFormers composes both
of small operators, which Ascend's compiler fuses and a CPU runs one by one.
"""
from typing import Sequence, Tuple

import mindspore.common.dtype as mstype
import numpy as np
from mindformers.core.optim.adamw import AdamW
from mindspore import Parameter, ParameterTuple, Tensor, nn
from mindspore.ops import Primitive
from mindspore.ops import composite as C
from mindspore.ops import functional as F
from mindspore.ops import operations as P

from research.telechat.bridge.compat import MindFormerModuleType, plugin_class
from research.telechat.model import kernels
from research.telechat.training.remainder import joined, low_part, remainder_like

_update = C.MultitypeFuncGraph("telechat_adamw")
_update_master = C.MultitypeFuncGraph("telechat_adamw_master")
_square_sum = C.MultitypeFuncGraph("telechat_square_sum")
_scaled = C.MultitypeFuncGraph("telechat_scaled")
_product = P.MatMul(transpose_b=True)
_pow = P.Pow()


@_update.register("Function", "Tensor", "Tensor", "Tensor", "Tensor", "Tensor", "Tensor", "Tensor", "Tensor", "Tensor",
                  "Tensor", "Bool")
def _update_parameter(fused: Primitive, beta1: Tensor, beta2: Tensor, eps: Tensor, rate: Tensor, shrink: Tensor,
                      weight_decay: Tensor, parameter: Tensor, gradient: Tensor, mean: Tensor, square: Tensor,
                      trained: bool) -> bool:
    """One parameter's update; see TelechatAdamW."""
    if trained:
        fused(parameter, mean, square, rate, beta1, beta2, eps, weight_decay * shrink,
              F.cast(gradient, mstype.float32))
    return True


@_update_master.register("Function", "Tensor", "Tensor", "Tensor", "Tensor", "Tensor", "Tensor", "Tensor", "Tensor",
                         "Tensor", "Tensor", "Tensor", "Bool")
def _update_parameter_and_remainder(write: Primitive, beta1: Tensor, beta2: Tensor, eps: Tensor, step: Tensor,
                                     rate: Tensor, weight_decay: Tensor, parameter: Tensor, gradient: Tensor,
                                     mean: Tensor, square: Tensor, remainder: Tensor, trained: bool) -> Tensor:
    """One parameter's update in float32, and what of it does not fit into the parameter's type; see TelechatAdamW.

    remainder: float16; anything in float32 says that there is none. All have the parameter's shape or one element.
    """
    if not trained:
        return F.cast(gradient, F.dtype(parameter))
    gradient = F.cast(gradient, mstype.float32)
    new_mean = mean * beta1 + gradient * (1 - beta1)
    new_square = square * beta2 + gradient * gradient * (1 - beta2)
    step = F.cast(step, mstype.float32)
    denominator = F.sqrt(new_square / (1 - _pow(beta2, step))) + eps
    master = joined(parameter, remainder) * (1 - rate * weight_decay)
    master = master - new_mean / denominator * (rate / (1 - _pow(beta1, step)))
    stored = F.cast(master, F.dtype(parameter))
    if F.dtype(remainder) == mstype.float16:
        F.assign(remainder, low_part(master, stored))
    F.assign(mean, new_mean)
    F.assign(square, new_square)
    write(parameter, stored)
    return stored


@plugin_class(MindFormerModuleType.OPTIMIZER)
class TelechatAdamW(AdamW):
    """MindFormers' AdamW (Loshchilov and Hutter, 2019), same state, same arguments, with exact updates in 16 bits.

    With `master_weights` "remainder", each parameter that is stored in 16 bits has a third state in addition to its
    moments: what is missing to its float32 value (training/remainder.py). It is sharded over ranks and saved as the
    moments are, as `adam_r.NAME`, and updated where it is: nothing of it travels.

    On a CPU float32 parameters are updated by one kernel each, which has no bias correction: m, v <- moments;
    p <- p - a (m / (sqrt(v) + e) + d p). With c1 = 1 - beta1^t and c2 = 1 - beta2^t, AdamW's
    p - lr d p - lr (m / c1) / (sqrt(v / c2) + eps) is that of a = lr sqrt(c2) / c1, e = eps sqrt(c2) and
    d' = d c1 / sqrt(c2). What the kernel does not know (16 bits, learning rates by group) is composed of operators, as
    MindFormers does it on Ascend.

    Args:
        master_weights: "remainder", or anything else: parameters are written back in their own type.
        *args, **kwargs: of MindFormers' AdamW.
    """

    def __init__(self, *args: object, master_weights: str = "float32", **kwargs: object):
        super().__init__(*args, **kwargs)
        plain_kernels, low = kernels.gradient_kernels_of_cpu(), [p.dtype != mstype.float32 for p in self.parameters]
        self.has_remainder = master_weights == "remainder" and any(low)
        self.fused = plain_kernels and not self.is_group_lr and not any(low)
        self.composed = self.has_remainder or (plain_kernels and any(low))
        self.remainders = self.exp_avg                   # where there is no remainder, a moment holds its place
        if self.has_remainder:
            swap = getattr(self, "swap", False)          # MindFormers 1.9 has it
            self.remainders = ParameterTuple([remainder_like(p, swap) if is_low else mean for p, is_low, mean in
                                              zip(self.parameters, low, self.exp_avg)])
        self.write = kernels.writer() if self.composed else None
        self.update = kernels.adamw() if self.fused else None
        self.pow, self.sqrt, self.reshape = P.Pow(), P.Sqrt(), P.Reshape()

    def construct(self, gradients: Tuple[Tensor, ...]) -> Tensor:
        """gradients: one for each parameter, of its shape."""
        if self.composed:
            return self.update_masters(gradients)
        if not self.fused:
            return super().construct(gradients)
        weight_decay = self.get_weight_decay()
        beta1, beta2, eps, rate, shrink = self.rates()
        if self.is_group:
            return self.hyper_map(F.partial(_update, self.update, beta1, beta2, eps, rate, shrink), weight_decay,
                                  self._parameters, gradients, self.exp_avg, self.exp_avg_sq, self.optim_filter)
        return self.hyper_map(F.partial(_update, self.update, beta1, beta2, eps, rate, shrink, weight_decay),
                              self._parameters, gradients, self.exp_avg, self.exp_avg_sq, self.optim_filter)

    def update_masters(self, gradients: Tuple[Tensor, ...]) -> Tensor:
        """The step where some parameters are stored in 16 bits."""
        weight_decay, rate = self.get_weight_decay(), self.get_lr()
        self.assignadd(self.global_step, self.global_step_increase_tensor)
        if self.is_group_lr:
            result = self.hyper_map(
                F.partial(_update_master, self.write, self.beta1, self.beta2, self.eps, self.global_step), rate,
                weight_decay, self._parameters, gradients, self.exp_avg, self.exp_avg_sq, self.remainders,
                self.optim_filter)
        elif self.is_group:
            result = self.hyper_map(
                F.partial(_update_master, self.write, self.beta1, self.beta2, self.eps, self.global_step, rate),
                weight_decay, self._parameters, gradients, self.exp_avg, self.exp_avg_sq, self.remainders,
                self.optim_filter)
        else:
            result = self.hyper_map(
                F.partial(_update_master, self.write, self.beta1, self.beta2, self.eps, self.global_step, rate,
                          weight_decay), self._parameters, gradients, self.exp_avg, self.exp_avg_sq, self.remainders,
                self.optim_filter)
        if self.use_parallel:
            self.broadcast_params(result)
        return result

    def rates(self) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """beta1, beta2, e, a, c1 / sqrt(c2) of the next step, each [] float32; counts the step."""
        lr = self.get_lr()
        self.assignadd(self.global_step, self.global_step_increase_tensor)
        correction1 = 1 - self.pow(self.beta1, self.global_step)                   # [1]
        root = self.sqrt(1 - self.pow(self.beta2, self.global_step))
        return (self.scalar(self.beta1), self.scalar(self.beta2), self.scalar(self.eps * root),
                self.scalar(lr * root / correction1), self.scalar(correction1 / root))

    def scalar(self, x: Tensor) -> Tensor:
        """[1] or [] -> []."""
        return self.reshape(x, ())


@_square_sum.register("Tensor")
def _sum_of_squares(x: Tensor) -> Tensor:
    """Sum of squares, [1, 1] float32, as a product of the vector with itself: one operator, which rounds little."""
    row = F.reshape(F.cast(x, mstype.float32), (1, -1))
    return _product(row, row)


@_scaled.register("Tensor", "Tensor")
def _times(factor: Tensor, x: Tensor) -> Tensor:
    """x * factor in x's type."""
    return F.cast(F.cast(x, mstype.float32) * factor, F.dtype(x))


class SquareSum(nn.Cell):
    """Sum of the squares of some gradients, [1] float32."""

    def __init__(self):
        super().__init__()
        self.hyper_map = C.HyperMap()

    def construct(self, *gradients: Tensor) -> Tensor:
        """gradients: of any shape and floating-point type -> [1]; infinity or NaN where a gradient is."""
        return F.reshape(F.addn(self.hyper_map(_square_sum, gradients)), (1,))


class GradientsTimes(nn.Cell):
    """Gradients times a number, in their own types."""

    def __init__(self):
        super().__init__()
        self.hyper_map = C.HyperMap()

    def construct(self, factor: Tensor, gradients: Tuple[Tensor, ...]) -> Tuple[Tensor, ...]:
        """factor: [1] or [] float32."""
        return self.hyper_map(F.partial(_scaled, factor), gradients)


def clip_factor(norm: Tensor, max_norm: Tensor) -> Tensor:
    """min(1, max_norm / norm), both [1] float32."""
    return F.minimum(max_norm / (F.maximum(norm, max_norm) + 1e-6), 1.0)


class ClipGradNorm(nn.Cell):
    """Gradients times min(1, max_norm / norm), norm being that of all of them together; as MindFormers' cell."""

    def __init__(self, max_norm: float):
        super().__init__()
        self.max_norm = Tensor(np.array([max_norm], np.float32))
        self.times = GradientsTimes()
        self.square_sum = SquareSum()

    def norm(self, gradients: Tuple[Tensor, ...]) -> Tensor:
        """[1] float32; infinity or NaN where a gradient is."""
        return F.sqrt(self.square_sum(*gradients))

    def construct(self, gradients: Tuple[Tensor, ...]) -> Tuple[Tuple[Tensor, ...], Tensor]:
        """(clipped gradients, norm before clipping [1])."""
        norm = self.norm(gradients)
        return self.times(clip_factor(norm, self.max_norm), gradients), norm


class AdamWPart(nn.Cell):
    """The update of some of the parameters of a TelechatAdamW, whose rates are given."""

    def __init__(self, parameters: Sequence[Parameter], means: Sequence[Parameter], squares: Sequence[Parameter],
                 decays: Sequence[float]):
        super().__init__(auto_prefix=False)
        self.parameters = ParameterTuple(parameters)
        self.means, self.squares = ParameterTuple(means), ParameterTuple(squares)
        self.decays = tuple(Tensor(decay, mstype.float32) for decay in decays)
        self.all = (True,) * len(decays)
        self.update = kernels.adamw()
        self.hyper_map, self.times = C.HyperMap(), GradientsTimes()

    def construct(self, factor: Tensor, beta1: Tensor, beta2: Tensor, eps: Tensor, rate: Tensor, shrink: Tensor,
                  *gradients: Tensor) -> Tensor:
        """factor: [1], what the gradients are to be multiplied by; then the rates of the step, and the gradients."""
        gradients = self.times(factor, gradients)
        return self.hyper_map(F.partial(_update, self.update, beta1, beta2, eps, rate, shrink), self.decays,
                              self.parameters, gradients, self.means, self.squares, self.all)


def is_overflow(norm: Tensor) -> Tensor:
    """Whether the norm of all gradients is infinite or NaN, [] bool: then one of them is."""
    return F.logical_not(F.isfinite(F.reshape(norm, ())))
