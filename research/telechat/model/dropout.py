"""Dropout whose mask is a function of the step, so that a resumed training draws what it would have drawn.

MindSpore's kernel draws from a generator inside the process, which is reset with it. Here nothing is kept: the mask
follows from seed, rank, name of the cell, optimizer step and position of the element. The optimizer counts the steps,
and a checkpoint has its counter anyway. A step that is skipped (overflow, norm) leaves counter and weights as they are.

Element (i, j) of x, as rows [R, C], is kept where h = r_i c_j + s_i d_j mod 2^32 is at least p 2^32: the inner product
of random words of row and column, a universal hash (Carter and Wegman, 1979) of three cheap operators per element. The
words are counters mixed with the finalizer of MurmurHash3 (Appleby), once per row and column.

Only for training steps without micro-batches, which would all get one mask: with them MindSpore's kernel is kept.
"""
import hashlib
from typing import Tuple

import mindspore as ms
import mindspore.common.dtype as mstype
import numpy as np
from mindspore import Parameter, Tensor, nn
from mindspore.ops import functional as F
from mindspore.ops import operations as P
from mindspore.ops.primitive import constexpr

_WORD = 2**32
_STRIDE = 0x9E3779B9                                       # 2^32 / golden ratio: spreads neighbouring counters


def key_words(*parts: object) -> Tuple[int, ...]:
    """Four words of 32 bits that represent `parts`."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return tuple(int.from_bytes(digest[4 * number:4 * number + 4], "little") for number in range(4))


@constexpr
def _counters(count: int, as_column: bool) -> Tensor:
    """One counter for each of `count` rows [R, 1] or columns [1, C], uint32."""
    counters = (np.arange(count, dtype=np.uint64) * _STRIDE % _WORD).astype(np.uint32)
    return Tensor(counters.reshape((-1, 1) if as_column else (1, -1)))


class CountedDropout(nn.Dropout):
    """x / (1 - p) where the mask is 1, else 0; x itself in evaluation. An nn.Dropout, so that it is found as one.

    p: probability that an element is dropped; key: what the mask depends on besides `step`; step: Parameter [1] int32,
    which whoever owns it counts. It belongs to the optimizer, so it is not a parameter of this cell.
    """

    def __init__(self, p: float, key: Tuple[int, ...], step: Parameter):
        super().__init__(p=p)
        # Past Cell's own administration: neither step nor key may become a parameter of the network.
        self.__dict__.update(step=step, key=Tensor(np.array(key, np.uint32)))                      # key: [4]
        self.stride = Tensor(_STRIDE, mstype.uint32)
        self.factors = (Tensor(0x85EBCA6B, mstype.uint32), Tensor(0xC2B2AE35, mstype.uint32))
        self.shifts = tuple(Tensor(bits, mstype.uint32) for bits in (16, 13, 16))
        self.threshold = Tensor(min(round(p * _WORD), _WORD - 1), mstype.uint32)
        self.scale = 1.0 / (1.0 - p)
        self.word_mul, self.word_add, self.xor, self.shift = P.Mul(), P.Add(), P.BitwiseXor(), P.RightShift()
        self.split = P.Split(axis=0, output_num=4)
        self.is_kept, self.cast, self.reshape, self.mul = P.GreaterEqual(), P.Cast(), P.Reshape(), P.Mul()

    def key_tensor(self) -> Tensor:
        """What tells this cell's mask from those of others, [4] uint32."""
        return self.key

    def key_as_parameter(self) -> Parameter:
        """Make the key a Parameter and return it, for a graph that is used for several cells in turn."""
        name = "dropout_key_" + "".join(f"{word:08x}" for word in self.key.asnumpy())
        self.__dict__["key"] = Parameter(self.key, name=name, requires_grad=False)
        return self.key

    def construct(self, x: Tensor) -> Tensor:
        """x: [..., C] of any floating-point type -> as x."""
        if not self.training:
            return x
        shape = x.shape
        columns = shape[-1]
        rows = 1
        for size in shape[:-1]:
            rows = rows * size
        keep = F.stop_gradient(self.cast(self.kept(rows, columns), x.dtype))
        return self.mul(x, self.mul(self.reshape(keep, shape), self.cast(self.scale, x.dtype)))

    def kept(self, rows: int, columns: int) -> Tensor:
        """Which elements stay, [R, C] bool."""
        step = self.word_mul(self.cast(self.step, mstype.uint32), self.stride)              # [1]
        r, c, s, d = self.split(self.mix(self.word_add(self.key, step)))                    # [1] each
        row, column = _counters(rows, True), _counters(columns, False)
        one = self.word_mul(self.mix(self.word_add(row, r)), self.mix(self.word_add(column, c)))
        two = self.word_mul(self.mix(self.word_add(row, s)), self.mix(self.word_add(column, d)))
        return self.is_kept(self.word_add(one, two), self.threshold)

    def mix(self, x: Tensor) -> Tensor:
        """A bijection of words in which every bit depends on every other."""
        x = self.word_mul(self.xor(x, self.shift(x, self.shifts[0])), self.factors[0])
        x = self.word_mul(self.xor(x, self.shift(x, self.shifts[1])), self.factors[1])
        return self.xor(x, self.shift(x, self.shifts[2]))


def count_dropout(network: nn.Cell, step: Parameter, rank: int) -> int:
    """Replace every nn.Dropout of `network` by one that counts with `step`; returns how many there are.

    step: [1] int32, the optimizer's global_step; rank: of this process among those that train on other data. The seed
    is MindSpore's (`set_seed`), 0 where none is set.
    """
    found = [(path, cell, name) for path, cell in network.cells_and_names()
             for name, child in cell._cells.items() if type(child) is nn.Dropout and child.p]
    for path, cell, name in found:
        dropout = CountedDropout(cell._cells[name].p, key_words(ms.get_seed() or 0, rank, path, name), step)
        dropout.set_train(cell._cells[name].training)
        setattr(cell, name, dropout)
    return len(found)
