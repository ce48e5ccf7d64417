"""Norm, rotation, matrix products, dropout and overflow detection."""
from functools import partial
from typing import List, Sequence

import numpy as np

from research.telechat.doctor.attention_checks import rounded
from research.telechat.doctor.checks import LIMITS, Check, Outcome, within
from research.telechat.doctor.device import Device
from research.telechat.interpret import norm
from research.telechat.interpret.ir import Node

_SHARES = (0.1, 0.5)                         # of dropout
_NODE = Node("RmsNorm", [], "", {}, None, "", "", "")


def _norm(device: Device, dtype: str, eps: float, size: float) -> Outcome:
    """size: scale of the numbers; if it is small, epsilon dominates."""
    rng = np.random.default_rng(1)
    x, dy = (rounded(rng.normal(size=(64, 512)), dtype) for _ in range(2))
    x, weight = rounded(size * x, dtype), rounded(1 + 0.2 * rng.normal(size=512), dtype)
    y, inverse = norm.rms_norm(_NODE, x.astype(np.float64), weight.astype(np.float64), eps)
    dx, dweight = norm.rms_norm_grad(_NODE, dy, x, inverse, weight)
    found = device.rms_norm(dtype, eps, x, weight, dy)
    return within(list(zip(found, (y, dx, dweight))), LIMITS[dtype], "result and gradients")


def _rotation(device: Device, dtype: str) -> Outcome:
    rng = np.random.default_rng(2)
    x = rounded(rng.normal(size=(2, 4, 32, 64)), dtype)
    angles = np.tile(rng.uniform(0, 6, (1, 1, 32, 32)), 2)
    cos, sin = (rounded(table, dtype) for table in (np.cos(angles), np.sin(angles)))
    first, second = np.split(x.astype(np.float64), 2, -1)
    return within([(device.rotate(dtype, x, cos, sin), x * cos + np.concatenate([-second, first], -1) * sin)],
                  LIMITS[dtype])


def _product(device: Device, dtype: str) -> Outcome:
    """Products of 4096 positive numbers, whose sum in 16 bits would stop growing at a few hundred."""
    rng = np.random.default_rng(3)
    a, b = (rounded(rng.uniform(0.5, 1.5, (64, 4096)), dtype) for _ in range(2))
    return within([(device.matmul(dtype, a, b), a.astype(np.float64) @ b.T)], LIMITS[dtype])


def _dropout(device: Device, share: float) -> Outcome:
    x = np.ones((512, 512), np.float32)
    found = device.dropout(share, x)
    dropped = float((found == 0).mean())
    kept = found[found != 0]
    spread = 5 * (share * (1 - share) / x.size) ** 0.5
    scaled = float(kept.mean()) if kept.size else 0.0
    fine = abs(dropped - share) < spread and kept.size and np.abs(kept * (1 - share) - 1).max() < 1e-2
    return Outcome(f"{share:.3f} +- {spread:.3f} dropped, the others times {1 / (1 - share):.3f}",
                   f"{dropped:.3f}, times {scaled:.3f}", bool(fine))


def _overflow(device: Device) -> Outcome:
    ones = np.ones((8, 16), np.float32)
    cases = []
    for bad in (None, np.inf, -np.inf, np.nan):
        other = ones.copy()
        if bad is not None:
            other[3, 5] = bad
        cases.append(device.finite([ones, other]))
    words = ["finite" if case else "not finite" for case in cases]
    return Outcome("1: finite; inf, -inf, nan: not", f"1: {words[0]}; inf, -inf, nan: {', '.join(words[1:])}",
                   cases == [True, False, False, False])


def checks(dtypes: Sequence[str]) -> List[Check]:
    """All checks of this file. The norm is computed in layernorm_compute_type, float32 in all recipes."""
    result = [Check(f"RMS norm, {words} (float32)", partial(_norm, dtype="float32", eps=eps, size=size),
                    "model_config.layernorm_compute_type: float32")
              for words, eps, size in (("epsilon 1e-5", 1e-5, 1.0), ("epsilon 1e-6, small numbers", 1e-6, 1e-3))]
    result += [Check(f"RMS norm ({dtype})", partial(_norm, dtype=dtype, eps=1e-5, size=1.0),
                     f"model_config.layernorm_compute_type: {dtype}") for dtype in dtypes if dtype != "float32"]
    result += [Check(f"rotary embedding ({dtype})", partial(_rotation, dtype=dtype),
                     f"model_config.rotary_dtype: {dtype}") for dtype in dict.fromkeys(("float32", *dtypes))]
    result += [Check(f"matrix product ({dtype})", partial(_product, dtype=dtype),
                     f"model_config.compute_dtype: {dtype}")
               for dtype in dict.fromkeys(("float32", "bfloat16", *dtypes))]
    result += [Check(f"dropout of {share:g}", partial(_dropout, share=share),
                     "model_config.hidden_dropout_prob and embed_dropout_prob over 0") for share in _SHARES]
    return [*result, Check("overflow in gradients", _overflow, "float16 and a loss scale (runner_wrapper.scale_sense); "
                           "a step with infinite gradients would not be left out")]
