"""Calling the C++ operators directly, without MindSpore."""
import ctypes
from typing import Any, List, Sequence

import numpy as np

from research.telechat.native.build import library, threads


def call(name: str, inputs: Sequence[np.ndarray], outputs: Sequence[Any], threads: int = threads(),
         fails: bool = False) -> List[np.ndarray]:
    """The outputs of an operator. outputs: shapes, of float32, or (shape, dtype); fails: whether it says that it
    failed."""
    found = library()
    assert found.path is not None, found.reason
    kernels = ctypes.CDLL(str(found.path))
    made = [np.full(*(shape, np.nan, np.float32) if not shape or np.isscalar(shape[0]) else (shape[0], -1, shape[1]))
            for shape in outputs]
    arrays = [*inputs, *made]
    assert all(array.flags.c_contiguous for array in arrays)
    count = len(arrays)
    pointers = (ctypes.c_void_p * count)(*[array.ctypes.data for array in arrays])
    ranks = (ctypes.c_int * count)(*[array.ndim for array in arrays])
    shapes = [(ctypes.c_int64 * max(array.ndim, 1))(*array.shape) for array in arrays]
    all_shapes = (ctypes.c_void_p * count)(*[ctypes.addressof(shape) for shape in shapes])
    kernels.UseThreads(threads)
    assert bool(getattr(kernels, name)(count, pointers, ranks, all_shapes, None, None, None)) == fails
    return made
