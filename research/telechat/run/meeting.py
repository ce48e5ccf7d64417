"""How the ranks of a sharded model find rank 0: a collective tells them its address and a key made for this run."""
import os
import secrets
from multiprocessing.connection import Listener
from typing import Tuple

import numpy as np
from mindspore import Tensor, nn
from mindspore.ops import operations as P

from research.telechat.common.errors import ConfigError

_KEY = 32                                  # bytes


class _FromFirst(nn.Cell):
    """Rank 0's value on all ranks."""

    def __init__(self) -> None:
        super().__init__(auto_prefix=False)
        self.broadcast = P.Broadcast(0)

    def construct(self, value: Tensor) -> Tensor:
        """Any shape."""
        return self.broadcast((value,))[0]


def invite() -> Listener:
    """On rank 0: where the others connect. All of them must call `accept_invitation`. Raises ConfigError."""
    key = secrets.token_bytes(_KEY)
    try:
        listener = Listener((_host(), 0), backlog=1024, authkey=key)
    except OSError as err:
        raise ConfigError(f"MS_SCHED_HOST: {_host()} is not an address of this machine (rank 0: {err}); start "
                          "all ranks with scripts/msrun_launcher.sh on the machine that MASTER_ADDR names"
                          ) from err
    _FromFirst()(_tensor([listener.address[1], *key]))
    return listener


def accept_invitation() -> Tuple[Tuple[str, int], bytes]:
    """On the other ranks: (address, key) of rank 0."""
    port, *key = _FromFirst()(_tensor([0] * (1 + _KEY))).asnumpy().tolist()
    return (_host(), port), bytes(key)


def _tensor(values: list) -> Tensor:
    return Tensor(np.array(values, np.int32))


def _host() -> str:
    """Rank 0's machine, on which msrun's scheduler runs."""
    return os.environ.get("MS_SCHED_HOST") or "127.0.0.1"
