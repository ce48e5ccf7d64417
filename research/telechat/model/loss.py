"""Cross entropy over the labels that count. Only the loss; shifting of labels happens in the model."""
import mindspore.common.dtype as mstype
from mindspore import Tensor, nn
from mindspore.ops import operations as P
from mindspore.ops.functional import stop_gradient

from research.telechat.model import kernels, sharding
from research.telechat.telechat_config import TelechatConfig


class CrossEntropyLoss(nn.Cell):
    """Mean of -log softmax(logits)[label] over the labels that are not `ignore_token_id`; 0 if there is none.

    Computed as log(sum(exp(logits - max))) + max - logits[label], so that no matrix of probabilities is stored for the
    forward pass. Where a gather will do, no one-hot of the vocabulary exists either.
    """

    def __init__(self, config: TelechatConfig):
        super().__init__()
        self.ignore = config.ignore_token_id
        self.vocab_size = config.vocab_size
        self.by_gather = kernels.gather_labels()
        self.max = kernels.RowMax()
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
        self.total = P.ReduceSum()
        self.cast = P.Cast()
        self.reshape = P.Reshape()
        sharding.loss(self, sharding.Mesh(config))

    def construct(self, logits: Tensor, labels: Tensor) -> Tensor:
        """logits: [N, V] float32, labels: [N] int32 -> scalar float32."""
        loss, mask = self.token_losses(logits, labels)
        return self.total(loss) / (self.total(mask) + 1e-8)

    def token_losses(self, logits: Tensor, labels: Tensor):
        """Loss of each token (0 where the label does not count) and the mask, both [N] float32."""
        mask = self.cast(self.not_equal(labels, self.ignore), mstype.float32)      # [N]
        labels = self.select_label(labels, self.cast(mask, mstype.int32))          # ignored ones become 0
        shifted = self.sub(logits, stop_gradient(self.max(logits)))            # [N, V]
        log_sum = self.log(self.sum(self.exp(shifted), -1))                        # [N, 1]
        if self.by_gather:
            picked = self.picked(shifted, 1, self.reshape(labels, (-1, 1)))        # [N, 1]
        else:
            one_hot = self.one_hot(labels, self.vocab_size, self.on, self.off)     # [N, V], cut over the vocabulary
            picked = self.sum(self.one_hot_mul(shifted, one_hot), -1)              # [N, 1]
        loss = self.reshape(self.token_loss(log_sum, picked), (-1,))               # [N]
        return self.masked(loss, mask), mask
