"""The graphs of a training step that goes layer by layer. Who calls them, and when: training/layerwise.py.

None of these cells owns a parameter: they hold the network's, the optimizer's, or those of a stand-in. Tensors are
passed one by one, as MindSpore takes a tuple of them for a constant and recompiles for each.
"""
from typing import Optional, Sequence, Tuple

from mindspore import Parameter, ParameterTuple, Tensor, nn
from mindspore.ops import composite as C
from mindspore.ops import functional as F

from research.telechat.training.optimizer import GradientsTimes, SquareSum, TelechatAdamW, clip_factor, is_overflow


class Stem(nn.Cell):
    """What precedes the layers of `network`, a TelechatForCausalLM."""

    def __init__(self, network: nn.Cell):
        super().__init__(auto_prefix=False)
        self.network = network

    def construct(self, input_ids: Tensor, labels: Optional[Tensor] = None, actual_seq_len: Optional[Tensor] = None
                  ) -> Tuple[Tensor, ...]:
        """The network's inputs -> tokens and targets, rows [B N]; x, cos, sin and mask as the layers take them."""
        ends = actual_seq_len if self.network.document_boundaries else None
        tokens, targets, _ = self.network.shifted(input_ids, labels, None)
        x, rope, mask = self.network.model.prepare(tokens, None, ends)
        return self.network.to_rows(tokens), targets, x, rope[0], rope[1], mask


class Tail(nn.Cell):
    """What follows the layers of `network`: final norm, head and loss."""

    def __init__(self, network: nn.Cell):
        super().__init__(auto_prefix=False)
        self.network = network

    def construct(self, x: Tensor, targets: Tensor) -> Tensor:
        """x: rows [T, H], targets: [T] -> loss, [] float32."""
        total, count = self.network.loss_of(self.network.model.norm_out(x), targets)
        return F.reshape(total / count, ())


class LayerForward(nn.Cell):
    """A layer, with the rotary tables one by one."""

    def __init__(self, layer: nn.Cell):
        super().__init__(auto_prefix=False)
        self.layer = layer

    def construct(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, shape: Tuple[int, int]) -> Tensor:
        """x: [B N, H], shape: (B, N); the others as the layer takes them -> [B N, H]."""
        return self.layer(x, shape, (cos, sin), mask)


class Gradient(nn.Cell):
    """Gradients of `cell` for its first input and for `trained`, some of its parameters."""

    def __init__(self, cell: nn.Cell, trained: Sequence[Parameter]):
        super().__init__(auto_prefix=False)
        self.cell = cell
        self.trained = ParameterTuple(trained)
        self.any_trained = len(trained) > 0
        self.grad = C.GradOperation(get_all=True, get_by_list=self.any_trained, sens_param=True)

    def construct(self, sens: Tensor, *inputs: object) -> Tuple[Tensor, ...]:
        """sens: gradient of the cell's value; inputs: the cell's -> gradient of the first, gradients of `trained`."""
        if self.any_trained:
            gradients = self.grad(self.cell, self.trained)(*inputs, sens)
            return gradients[0][0], gradients[1]
        return self.grad(self.cell)(*inputs, sens)[0], ()


class LossGradient(Gradient):
    """The loss as well."""

    def construct(self, sens: Tensor, *inputs: Tensor) -> Tuple[Tensor, ...]:
        """sens: the loss scale, [] float32; inputs: x and targets -> loss, gradient of x, gradients of `trained`."""
        loss = self.cell(*inputs)
        of_x, of_parameters = super().construct(sens, *inputs)
        return loss, of_x, of_parameters


class EmbeddingGradient(nn.Cell):
    """Gradient of the embedding table."""

    def __init__(self, embedding: nn.Cell, trained: Sequence[Parameter]):
        super().__init__(auto_prefix=False)
        self.embedding = embedding
        self.trained = ParameterTuple(trained)
        self.grad = C.GradOperation(get_by_list=True, sens_param=True)

    def construct(self, tokens: Tensor, sens: Tensor) -> Tuple[Tensor, ...]:
        """tokens: [T]; sens: gradient of their embeddings, [T, H]."""
        return self.grad(self.embedding, self.trained)(tokens, sens)


class Squares(nn.Cell):
    """Sum of the squares of a part's gradients without the loss scale; squares of scaled ones would overflow early."""

    def __init__(self, scaled: bool):
        super().__init__(auto_prefix=False)
        self.scaled = scaled
        self.unscale = GradientsTimes()
        self.square_sum = SquareSum()

    def construct(self, scale: Tensor, *gradients: Tensor) -> Tensor:
        """gradients times `scale`, [] float32; -> [1] float32."""
        if self.scaled:
            gradients = self.unscale(1 / scale, gradients)
        return self.square_sum(*gradients)


class Verdict(nn.Cell):
    """From the squares of all gradients to whether and how far the step is taken, as MindFormers' training step."""

    def __init__(self, step: nn.Cell):
        super().__init__(auto_prefix=False)
        self.max_norm = step.clip_grad_norm.max_norm if step.use_clip_grad else None
        self.manager, self.scale_sense = step.loss_scaling_manager, step.scale_sense
        self.dynamic_lr, self.learning_rate = step.optimizer.dynamic_lr, step.learning_rate
        self.count = step.optimizer.global_step

    def construct(self, scale: Tensor, *squares: Tensor) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
        """squares: [1] each; scale: [], of the loss -> overflow [] bool, norm [1], factor [1], rate []."""
        norm = F.sqrt(F.addn(squares))
        factor = F.ones_like(norm) if self.max_norm is None else clip_factor(norm, self.max_norm)
        rate = self.learning_rate
        if self.dynamic_lr:
            rate = self.learning_rate(self.count).reshape(())
        overflow = is_overflow(norm)
        if self.manager is not None:
            overflow = self.manager(self.scale_sense, overflow)
        return overflow, norm, factor / scale, rate


class Rates(nn.Cell):
    """The optimizer's rates for a step that is taken, which it counts."""

    def __init__(self, optimizer: TelechatAdamW):
        super().__init__(auto_prefix=False)
        self.optimizer = optimizer

    def construct(self) -> Tuple[Tensor, ...]:
        """As TelechatAdamW.rates."""
        return self.optimizer.rates()
