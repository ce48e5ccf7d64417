"""Head and loss in chunks of rows, so that the float32 logits of all rows never exist at once.

Each chunk leaves its tokens' losses and the gradient g of each loss by its logits, in the type of the matrix
multiplications, an eighth of what the loss of all rows needs; the logits are free again. With g [T, V] known, the
gradients of the sum of the losses are g W for the rows x and g^T x for the head's weights W, both over the tokens that
count. They are those of the scalar <x, g W> with g held constant, which is added to the sum of the losses and taken off
again: differentiation and sharding treat it as any other linear layer. No product is computed twice.
"""
from typing import Tuple

import mindspore.common.dtype as mstype
from mindspore import Tensor, nn
from mindspore.ops import operations as P
from mindspore.ops.functional import stop_gradient
from mindspore.ops.primitive import constexpr

from research.telechat.model import kernels, sharding
from research.telechat.model.loss import CrossEntropyLoss, unit
from research.telechat.spec.loss_chunks import MOST, rows_at_once
from research.telechat.telechat_config import TelechatConfig

_rows_at_once = constexpr(rows_at_once)                    # while the graph is compiled


class ChunkedLoss(nn.Cell):
    """The loss of rows under a head without bias.

    Args:
        head: TelechatHead; its `product`, `dtype` and `scale` are used.
        loss: CrossEntropyLoss.
    """

    def __init__(self, config: TelechatConfig, head: nn.Cell, loss: CrossEntropyLoss):
        super().__init__()
        mesh = sharding.Mesh(config)
        self.pieces = mesh.head_rows if mesh.in_effect else 1         # of rows, each on a device of its own
        self.vocab_size, self.vocab_pieces = config.vocab_size, mesh.vocab if mesh.in_effect else 1
        self.chunk_rows = kernels.loss_chunk_rows(config)
        self.head, self.loss = head, loss
        self.parts = loss.parts
        self.rows_of = P.StridedSlice()
        self.labels_of = P.StridedSlice()
        self.joins = [P.Concat(1) for _ in range(MOST + 1)]            # the strategy of one says how many it joins
        self.gradient_joins = [P.Concat(1) for _ in range(MOST + 1)]
        self.back = P.MatMul()
        self.of_counted = P.Mul()
        self.along = P.Mul()
        self.sum = P.ReduceSum()
        self.after = P.Depend()
        self.cast = P.Cast()
        self.reshape = P.Reshape()
        sharding.chunked_loss(self, mesh)

    def rows_of_chunk(self, rows: int) -> Tuple[int, int]:
        """(rows of a chunk, rows) on one device, of `rows` on all."""
        own = rows // self.pieces
        return _rows_at_once(own, self.vocab_size // self.vocab_pieces, self.chunk_rows), own

    def construct(self, x: Tensor, weight: Tensor, labels: Tensor) -> Tuple[Tensor, Tensor]:
        """x: rows [T, H], weight: [V, H], labels: [T] int32 -> sum [] and number [1], as CrossEntropyLoss."""
        all_rows, hidden = x.shape
        size, rows = self.rows_of_chunk(all_rows)
        pieces, vocab, dtype = self.pieces, self.vocab_size, self.head.dtype
        weight = self.cast(weight, dtype)
        fixed, labels = self.reshape(stop_gradient(x), (pieces, rows, hidden)), self.reshape(labels, (pieces, rows))
        losses: Tuple[Tensor, ...] = ()
        masks: Tuple[Tensor, ...] = ()
        gradients: Tuple[Tensor, ...] = ()
        for start in range(0, rows, size):
            stop = min(start + size, rows)
            part = self.rows_of(fixed, (0, start, 0), (pieces, stop, hidden), (1, 1, 1))
            if start > 0:                                  # one after the other, or all logits exist at once
                part = self.after(part, gradients[-1])
            targets = self.labels_of(labels, (0, start), (pieces, stop), (1, 1))
            logits = self.head.product(self.reshape(part, (-1, hidden)), weight)
            loss, mask, gradient = self.loss.with_gradient(stop_gradient(logits), self.reshape(targets, (-1,)))
            losses += (self.reshape(loss, (pieces, stop - start)),)
            masks += (self.reshape(mask, (pieces, stop - start)),)
            gradients += (self.reshape(self.cast(gradient, dtype), (pieces, stop - start, vocab)),)
        chunks = len(losses)
        gradient = stop_gradient(self.reshape(self.gradient_joins[chunks](gradients), (all_rows, vocab)))
        back = self.cast(self.back(gradient, weight), mstype.float32)                  # [T, H]
        loss, mask = self.reshape(self.joins[chunks](losses), (-1,)), self.reshape(self.joins[chunks](masks), (-1,))
        counted = self.of_counted(self.cast(x, mstype.float32), self.reshape(mask * self.head.scale, (-1, 1)))
        along = self.sum(self.along(counted, back))
        part = 1 / unit(all_rows * self.parts)
        total = stop_gradient(self.loss.total(loss))
        return (total + (along - stop_gradient(along))) * part, self.loss.total(mask) * part + self.loss.little
