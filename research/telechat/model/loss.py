"""The definition of the loss: the sum of the losses of all tokens that count, divided by the number of these tokens.

It holds for the global batch, in however many parts it is computed (ranks, micro-batches, accumulated steps), and for a
whole set in evaluation. A mean of means would give the tokens of short answers more weight. So the model returns sum
and number, whoever joins parts adds both, and the division comes last. Shifting of labels happens in the model.
"""
from typing import Optional, Tuple

import mindspore.common.dtype as mstype
from mindspore import Tensor, nn
from mindspore.ops import operations as P
from mindspore.ops.functional import stop_gradient
from mindspore.ops.primitive import constexpr

from research.telechat.model import kernels, sharding
from research.telechat.model.cpu_kernels import FusedCrossEntropy
from research.telechat.telechat_config import TelechatConfig

_LITTLE = 1e-20                            # 0 / _LITTLE is 0, and the number of tokens + _LITTLE is itself in float32


@constexpr
def unit(tokens: int) -> float:
    """The least power of two that is at least `tokens`: dividing by it never rounds."""
    return float(2 ** (tokens - 1).bit_length())


class CrossEntropyLoss(nn.Cell):
    """Sum of -log softmax(logits)[label] over the labels that are not `ignore_token_id`, and how many these are.

    Both are divided by `unit` of all labels in the step of this process, counted or not, so that gradients of the sum
    stay in the range of those of the mean, which float16 needs; the quotient is the mean.

    Computed as log(sum(exp(logits - max))) + max - logits[label], so that no matrix of probabilities is stored for the
    forward pass. Where a gather will do, no one-hot of the vocabulary exists either.
    """

    def __init__(self, config: TelechatConfig):
        super().__init__()
        self.ignore = config.ignore_token_id
        self.vocab_size = config.vocab_size
        plan = config.parallel_config
        self.parts = plan.micro_batch_num if plan.pipeline_stage > 1 else 1
        self.by_gather = kernels.gather_labels()
        self.max = kernels.RowMax()
        self.spread = kernels.Spread()
        self.sub = P.Sub()
        self.exp = P.Exp()
        self.sum = P.ReduceSum(keep_dims=True)
        self.log = P.Log()
        self.picked = P.GatherD()
        self.one_hot = P.OneHot()
        self.one_hot_mul = P.Mul()
        self.on, self.off = Tensor(1.0, mstype.float32), Tensor(0.0, mstype.float32)
        self.not_equal = P.NotEqual()
        self.select_label = P.Mul()
        self.token_loss = P.Sub()
        self.masked = P.Mul()
        self.probability = P.RealDiv()                 # Div keeps indices on the CPU even for equal shapes
        self.minus_label = P.Sub()
        self.total = P.ReduceSum()
        self.little = Tensor([_LITTLE], mstype.float32)
        self.cast = P.Cast()
        self.reshape = P.Reshape()
        self.in_one = kernels.fused_on_cpu(config)
        if self.in_one:
            self.of_rows = FusedCrossEntropy(self.ignore)
        sharding.loss(self, sharding.Mesh(config))

    def construct(self, logits: Tensor, labels: Tensor) -> Tuple[Tensor, Tensor]:
        """logits: [N, V] float32, labels: [N] int32 -> sum [] and number [1] of the tokens that count, in units.

        Both float32, in the shapes that MindFormers' steps expect. Where no token counts, their quotient is 0.
        """
        loss, mask = self.token_losses(logits, labels)
        part = 1 / unit(labels.shape[0] * self.parts)
        return self.total(loss) * part, self.total(mask) * part + self.little

    def counted(self, labels: Tensor) -> Tuple[Tensor, Tensor]:
        """Which labels count, [N] float32, and the labels with 0 for those that do not."""
        mask = self.cast(self.not_equal(labels, self.ignore), mstype.float32)
        return mask, self.select_label(labels, self.cast(mask, mstype.int32))

    def token_losses(self, logits: Tensor, labels: Tensor) -> Tuple[Tensor, Tensor]:
        """Loss of each token (0 where the label does not count) and the mask, both [N] float32."""
        mask, counted = self.counted(labels)
        if self.in_one:
            return self.of_rows(logits, labels), mask
        labels = counted
        shifted = self.sub(logits, self.spread(stop_gradient(self.max(logits)), logits))       # [N, V]
        log_sum = self.log(self.sum(self.exp(shifted), -1))                        # [N, 1]
        loss = self.reshape(self.token_loss(log_sum, self.of_label(shifted, labels, None)), (-1,))
        return self.masked(loss, mask), mask

    def with_gradient(self, logits: Tensor, labels: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        """As `token_losses`, and softmax(logits) - one_hot(label), [N, V] float32: the gradient of a token's loss by
        its logits if the label counts."""
        mask, counted = self.counted(labels)
        if self.in_one:
            loss, gradient = self.of_rows.with_gradient(logits, labels)
            return loss, mask, gradient
        labels = counted
        one_hot = self.one_hot(labels, self.vocab_size, self.on, self.off)
        shifted = self.sub(logits, self.spread(self.max(logits), logits))          # [N, V]
        exponentials = self.exp(shifted)
        total = self.sum(exponentials, -1)                                         # [N, 1]
        loss = self.token_loss(self.log(total), self.of_label(shifted, labels, one_hot))
        gradient = self.minus_label(self.probability(exponentials, self.spread(total, logits)), one_hot)
        return self.masked(self.reshape(loss, (-1,)), mask), mask, gradient

    def of_label(self, shifted: Tensor, labels: Tensor, one_hot: Optional[Tensor]) -> Tensor:
        """The element of each row of `shifted` [N, V] that its label names, [N, 1]. one_hot: [N, V] or None."""
        if self.by_gather:
            return self.picked(shifted, 1, self.reshape(labels, (-1, 1)))
        if one_hot is None:
            one_hot = self.one_hot(labels, self.vocab_size, self.on, self.off)     # sharded over the vocabulary
        return self.sum(self.one_hot_mul(shifted, one_hot), -1)
