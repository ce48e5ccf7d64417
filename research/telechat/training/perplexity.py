"""Perplexity of a whole set: exp of the sum of its tokens' losses divided by their number (model/loss.py)."""
import math
from typing import Dict

import mindspore as ms
import numpy as np
from mindformers.core.metric import metric
from mindformers.tools.register import MindFormerModuleType
from mindspore import Tensor, nn
from mindspore.communication import get_group_size
from mindspore.ops import operations as P

from research.telechat.bridge.compat import plugin_class


class _Sum(nn.Cell):
    """The sum of a tensor over all processes."""

    def __init__(self) -> None:
        super().__init__(auto_prefix=False)
        self.all_reduce = P.AllReduce()

    def construct(self, x: Tensor) -> Tensor:
        """x: of any shape, the same everywhere."""
        return self.all_reduce(x)


def over_processes(values: np.ndarray) -> np.ndarray:
    """The sum of `values`, float32, over all processes of the job."""
    mode = ms.get_auto_parallel_context("parallel_mode")
    if mode == "stand_alone" or get_group_size() == 1:
        return values
    full = ms.get_auto_parallel_context("full_batch")
    by_plan = mode in ("semi_auto_parallel", "auto_parallel")
    if by_plan:                                        # the sum is no part of the plan
        ms.set_auto_parallel_context(parallel_mode="data_parallel", full_batch=False)
    try:
        return _Sum()(Tensor(values, ms.float32)).asnumpy()
    finally:
        if by_plan:
            ms.set_auto_parallel_context(parallel_mode=mode, full_batch=full)


@plugin_class(MindFormerModuleType.METRIC)
class PerplexityMetric(metric.PerplexityMetric):
    """MindFormers' metric of this name, in which every token of the set weighs the same, whatever the batches.

    MindFormers' own is the mean of the batches' means, of the last stage's or this process's batches only.
    """

    def clear(self) -> None:
        """Reset."""
        super().clear()
        self.sum = self.tokens = 0.0

    def update(self, *inputs: Tensor) -> None:
        """inputs: logits [B, S, V], labels [B, S] and mask [B, S], which tells the labels that count."""
        self.total_loss, self.num_data = 0.0, 0
        super().update(*inputs)                        # the mean of this batch, where this stage has logits
        if self.num_data:
            tokens = float(inputs[2].asnumpy()[:, 1:].sum(dtype=np.float64))
            self.sum += self.total_loss * tokens
            self.tokens += tokens

    def eval(self) -> Dict[str, float]:
        """{"loss": mean over all tokens of the set, "PPL": its exponential}; NaN where no token counts.

        Ranks that have read the same batches add the same to both sums, which leaves the quotient alone.
        """
        total, tokens = (float(value) for value in over_processes(np.array([self.sum, self.tokens])))
        loss = total / tokens if tokens else math.nan
        return {"loss": loss, "PPL": math.exp(loss) if loss < 700 else math.inf}
