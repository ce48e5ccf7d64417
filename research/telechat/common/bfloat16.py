"""Rounding to bfloat16, which NumPy does not have: the upper half of a float32."""
import numpy as np

_INFINITY = 0x7F800000                     # all bits of the exponent of a float32; a magnitude above it is a NaN


def to_bfloat16(bits: np.ndarray) -> np.ndarray:
    """Bits of float32 numbers, uint32, as bits of bfloat16 numbers, uint16 of the same shape, rounded to nearest even.

    Adding 0x7FFF and the lowest kept bit does that; the sum would carry a NaN into its sign, so that NaNs keep their
    upper half and get the quiet bit instead.
    """
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits                                       # wraps only for NaNs, which are replaced below
    rounded >>= 16
    result = rounded.astype(np.uint16)
    nan = (bits & 0x7FFFFFFF) > _INFINITY
    if nan.any():
        result[nan] = ((bits[nan] >> 16) | 0x0040).astype(np.uint16)
    return result


def round_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 values rounded to the nearest bfloat16, as float32."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return (to_bfloat16(bits).astype(np.uint32) << 16).view(np.float32)
