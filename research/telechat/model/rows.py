"""Between tokens [B, S], rows [B S, H] of the residual stream and heads [B, N, S, D] of attention.

The rows are in the order of the tokens, except with context parallelism and several sequences per device: then they
stand device by device, on each its sequences, of each its part of the tokens. Thus the rows of one device are side by
side, and no tensor moves between devices on the way from one form to another.
"""
from mindspore import Tensor, nn
from mindspore.ops import functional as F
from mindspore.ops import operations as P

from research.telechat.model import kernels, sharding
from research.telechat.telechat_config import TelechatConfig


class _Rows(nn.Cell):
    """What the four ways have in common."""

    def __init__(self, config: TelechatConfig):
        super().__init__()
        self.dp, self.cp = config.parallel_config.data_parallel, config.parallel_config.context_parallel
        self.transpose = P.Transpose()
        self.by_device = P.Transpose()
        self.reshape = P.Reshape()
        self.reshape_one_token = kernels.reshape_one_token()

    def is_one_token(self, seq: int) -> bool:
        """Whether a reshape suffices, known when the graph is compiled. A length of any size is no constant."""
        if self.reshape_one_token and F.isconstant(seq):
            return seq == 1
        return False


class TokensToRows(_Rows):
    """Token ids or labels [B, S] -> [B S]."""

    def __init__(self, config: TelechatConfig):
        super().__init__(config)
        sharding.tokens_to_rows(self, sharding.Mesh(config))

    def construct(self, x: Tensor) -> Tensor:
        """x: [B, S] -> [B S]."""
        batch, seq = x.shape
        if self.cp > 1 and batch > self.dp:
            x = self.by_device(self.reshape(x, (self.dp, batch // self.dp, self.cp, seq // self.cp)), (0, 2, 1, 3))
        return self.reshape(x, (-1,))


class RowsToTokens(_Rows):
    """Logits [B S, V] -> [B, S, V]."""

    def __init__(self, config: TelechatConfig):
        super().__init__(config)
        sharding.rows_to_tokens(self, sharding.Mesh(config))

    def construct(self, x: Tensor, batch: int, seq: int) -> Tensor:
        """x: [B S, V] -> [B, S, V]."""
        features = x.shape[-1]
        if self.cp > 1 and batch > self.dp:
            x = self.reshape(x, (self.dp, self.cp, batch // self.dp, seq // self.cp, features))
            x = self.by_device(x, (0, 2, 1, 3, 4))
        return self.reshape(x, (batch, seq, features))


class RowsToHeads(_Rows):
    """Projections [B S, N D] -> [B, N, S, D]."""

    def __init__(self, config: TelechatConfig):
        super().__init__(config)
        sharding.rows_to_heads(self, sharding.Mesh(config))

    def construct(self, x: Tensor, batch: int, seq: int, heads: int) -> Tensor:
        """x: [B S, N D] -> [B, N, S, D]."""
        dim = x.shape[-1] // heads
        if self.is_one_token(seq):
            return self.reshape(x, (batch, heads, 1, dim))
        if self.cp > 1 and batch > self.dp:
            x = self.reshape(x, (self.dp, self.cp, batch // self.dp, seq // self.cp, heads, dim))
            x = self.by_device(x, (0, 2, 4, 1, 3, 5))                              # [dp, B / dp, N, cp, S / cp, D]
            return self.reshape(x, (batch, heads, seq, dim))
        return self.transpose(self.reshape(x, (batch, seq, heads, dim)), (0, 2, 1, 3))


class HeadsToRows(_Rows):
    """The result of attention [B, N, S, D] -> [B S, N D]."""

    def __init__(self, config: TelechatConfig):
        super().__init__(config)
        sharding.heads_to_rows(self, sharding.Mesh(config))

    def construct(self, x: Tensor) -> Tensor:
        """x: [B, N, S, D] -> [B S, N D]."""
        batch, heads, seq, dim = x.shape
        if self.is_one_token(seq):
            return self.reshape(x, (batch, heads * dim))
        if self.cp > 1 and batch > self.dp:
            x = self.reshape(x, (self.dp, batch // self.dp, heads, self.cp, seq // self.cp, dim))
            x = self.by_device(x, (0, 3, 1, 4, 2, 5))                              # [dp, cp, B / dp, S / cp, N, D]
        else:
            x = self.transpose(x, (0, 2, 1, 3))
        return self.reshape(x, (-1, heads * dim))
