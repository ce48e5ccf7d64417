"""Operations that a token costs, and what chips can do by their makers' word. For the planner, the training log and the
benchmarks; nothing here was measured.
"""
from typing import Dict, NamedTuple, Optional


class Chip(NamedTuple):
    """Published figures of a card."""

    name: str
    memory_gb: float
    teraflops: float                   # 16-bit, dense


# By the name that MindSpore gives the chip. One that is not here has no MFU, unless the recipe gives its peak.
CHIPS: Dict[str, Chip] = {"Ascend910B3": Chip("Ascend 910B3 (Atlas 800T A2)", 64, 313)}


def flops_per_token(matmul_weights: int, layers: int, hidden: int, seq_length: int, frozen: bool = False) -> float:
    """Floating-point operations of forward and backward pass for one token, without recomputation.

    6 for each weight that is multiplied with, and 12 layers hidden seq_length for attention, whose causal half is
    counted like the other (Chowdhery et al., 2022, appendix B). Frozen weights (LoRA) need no gradient: 4.
    """
    return (4.0 if frozen else 6.0) * matmul_weights + 12.0 * layers * hidden * seq_length


def peak_flops(chip: str, given_tflops: Optional[float] = None) -> Optional[float]:
    """Peak of `chip` in FLOP/s: `given_tflops` from the recipe, else the table; None for unknown chips."""
    teraflops = given_tflops or (CHIPS[chip].teraflops if chip in CHIPS else None)
    return teraflops * 1e12 if teraflops else None
