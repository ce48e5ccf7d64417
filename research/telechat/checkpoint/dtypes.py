"""Floating-point formats of checkpoints as raw numbers: casts between them, and counts of NaN and infinity.

NumPy alone: it has no bfloat16, so that 16-bit formats travel as uint16 and float32 as uint32 wherever bytes are only
moved. Not for computing with weights. Formats are called by their safetensors codes F16, BF16 and F32.
"""
from typing import Dict

import numpy as np

from research.telechat.common.bfloat16 import to_bfloat16

CODES: Dict[str, str] = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}          # as users write them
NAMES: Dict[str, str] = {code: name for name, code in CODES.items()}
ITEM_SIZE: Dict[str, int] = {"F16": 2, "BF16": 2, "F32": 4}                                # bytes
RAW: Dict[str, type] = {"F16": np.uint16, "BF16": np.uint16, "F32": np.uint32}
_EXPONENT = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F800000}                             # all ones: NaN or infinity
_BLOCK = 1 << 17                                                                           # elements; stays in cache


def cast(raw: np.ndarray, source: str, target: str) -> np.ndarray:
    """Numbers of format `source` in format `target`, rounded to nearest even. NaN stays NaN, infinity infinity.

    raw: any shape, dtype RAW[source], C-contiguous; the result has the same shape and dtype RAW[target]; it is `raw`
    itself where the formats are equal. Values beyond the range of `target` become infinity (count_nonfinite tells).
    """
    if source == target:
        return raw
    if target == "BF16":
        return to_bfloat16(cast(raw, source, "F32"))
    if source == "BF16":
        raw = raw.astype(np.uint32)
        raw <<= 16                                        # bfloat16 is the upper half of float32
        source = "F32"
        if target == "F32":
            return raw
    values = raw.view(np.float16 if source == "F16" else np.float32)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        return values.astype(np.float16 if target == "F16" else np.float32).view(RAW[target])


def count_nonfinite(raw: np.ndarray, code: str) -> Dict[str, int]:
    """{"nan": n, "inf": m} of `raw` (any shape, dtype RAW[code], C-contiguous)."""
    exponent = raw.dtype.type(_EXPONENT[code])
    magnitude = raw.dtype.type(np.iinfo(raw.dtype).max >> 1)              # everything but the sign
    counts = {"nan": 0, "inf": 0}
    flat = raw.reshape(-1)
    for start in range(0, flat.size, _BLOCK):
        block = flat[start:start + _BLOCK] & magnitude
        if block.max() < exponent:                                        # the one pass that healthy weights need
            continue
        counts["inf"] += int(np.count_nonzero(block == exponent))
        counts["nan"] += int(np.count_nonzero(block > exponent))
    return counts
