"""RmsNorm and its gradient, from the documentation of aclnnRmsNorm and aclnnRmsNormGrad (CANN)."""
from typing import Callable, Dict, Tuple

import numpy as np

from research.telechat.interpret.ir import Node


def rms_norm(_node: Node, x: np.ndarray, weight: np.ndarray, eps: float) -> Tuple[np.ndarray, np.ndarray]:
    """x: [..., H], weight: [H] -> x / sqrt(mean(x^2) + eps) * weight, and 1 / sqrt(mean(x^2) + eps) [..., 1]."""
    inverse = 1 / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + eps)
    return x * inverse * weight, inverse


def rms_norm_grad(_node: Node, dy: np.ndarray, x: np.ndarray, inverse: np.ndarray, weight: np.ndarray
                  ) -> Tuple[np.ndarray, np.ndarray]:
    """Gradients of x and weight; inverse: the second result of `rms_norm`."""
    normed, scaled = x * inverse, dy * weight
    dx = inverse * (scaled - normed * np.mean(scaled * normed, -1, keepdims=True))
    return dx, np.sum(dy * normed, tuple(range(x.ndim - weight.ndim)))


OPERATORS: Dict[str, Callable[..., object]] = {"RmsNorm": rms_norm, "RmsNormGrad": rms_norm_grad}
