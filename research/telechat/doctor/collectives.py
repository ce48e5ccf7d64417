"""The collectives that plans use, one at a time, over all ranks."""
from typing import Callable, Dict

import numpy as np
from mindspore import Tensor, nn
from mindspore.ops import functional as F
from mindspore.ops import operations as P

from research.telechat.doctor.checks import Skip
from research.telechat.model import kernels


class _Primitive(nn.Cell):
    """One operator."""

    def __init__(self, operator: Callable[[Tensor], Tensor]):
        super().__init__(auto_prefix=False)
        self.operator = operator

    def construct(self, x: Tensor) -> Tensor:
        return self.operator(x)


class _Broadcast(nn.Cell):
    """From the last rank."""

    def __init__(self, root: int):
        super().__init__(auto_prefix=False)
        self.operator = P.Broadcast(root)

    def construct(self, x: Tensor) -> Tensor:
        return self.operator((x,))[0]


class _Passing(nn.Cell):
    """Even ranks send to the next rank, which returns what it received; even ranks return their own."""

    def __init__(self, rank: int, x: Tensor):
        super().__init__(auto_prefix=False)
        self.sends = rank % 2 == 0
        if self.sends:
            self.send = P.Send(sr_tag=0, dest_rank=rank + 1)
        else:
            self.receive = P.Receive(sr_tag=0, src_rank=rank - 1, shape=list(x.shape), dtype=x.dtype)

    def construct(self, x: Tensor) -> Tensor:
        if self.sends:
            return F.depend(x, self.send(x))
        return self.receive(x)


# What MindSpore's CPU backend has.
_ON_CPU = ("all-reduce, sum", "all-gather", "broadcast")


def run_collective(name: str, x: Tensor, rank: int, ranks: int) -> np.ndarray:
    """See device.Device.collective. Raises Skip."""
    if not kernels.use_paged_attention() and name not in _ON_CPU:
        raise Skip("MindSpore's CPU backend does not have it; plans that need it cannot run there")
    makers: Dict[str, Callable[[], nn.Cell]] = {
        "all-reduce, sum": lambda: _Primitive(P.AllReduce()),
        "all-reduce, largest": lambda: _Primitive(P.AllReduce("max")),
        "all-gather": lambda: _Primitive(P.AllGather()),
        "reduce-scatter": lambda: _Primitive(P.ReduceScatter()),
        "broadcast": lambda: _Broadcast(ranks - 1),
        "all-to-all": lambda: _Primitive(P.AlltoAll(ranks, 0, 1)),
        "send and receive": lambda: _Passing(rank, x)}
    if name == "send and receive" and ranks % 2 and rank == ranks - 1:
        return x.float().asnumpy()                               # with an odd number, the last rank has no successor
    return makers[name]()(x).float().asnumpy()
