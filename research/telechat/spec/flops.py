"""Floating-point operations of a token, and published figures of devices: for the planner, the training log and the
benchmarks. Nothing here was measured.
"""
from typing import Dict, NamedTuple, Optional


class Chip(NamedTuple):
    """Published figures of a device, as MindSpore counts devices: a card, or one of the two dies of an A3 module."""

    name: str
    memory_gb: float
    teraflops: float                   # 16-bit, dense
    hbm: float = 1.6e12                # bytes/s of its memory
    link: float = 28e9                 # bytes/s and direction to each device within the machine (HCCS)
    links: float = 196e9               # bytes/s and direction to all of them together
    joined: int = 8                    # devices that these links join
    network: float = 25e9              # bytes/s and direction of its network port (RoCE)
    bfloat16: bool = True


# By the name that MindSpore gives the chip. One that is not here has no MFU, unless the recipe gives its peak.
CHIPS: Dict[str, Chip] = {"Ascend910B3": Chip("Ascend 910B3 (Atlas 800T A2)", 64, 313)}
# What a plan can be made for (`plan --device`). docs/cluster.md has the sources.
DEVICES: Dict[str, Chip] = {
    "A2": CHIPS["Ascend910B3"],
    "A3": Chip("one die of Ascend 910C (Atlas 800T A3)", 64, 376, link=196e9, joined=16),
    "910B4": Chip("Ascend 910B4 (32 GB)", 32, 280, hbm=0.8e12),
    "910A": Chip("Ascend 910A (Atlas 800, model 9000)", 32, 256, hbm=1.2e12, link=30e9, links=90e9, joined=4,
                 network=12.5e9, bfloat16=False),
}
DEFAULT_DEVICE = "A2"                  # that the recipes are for


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
