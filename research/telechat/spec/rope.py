"""Rotary position embedding: frequencies, the official long-context rules and the cos/sin tables. NumPy only.

Formulas, d = head_dim, S = tokens in the sequence, L = base_seqlen (source: the official modeling code, checked against
its tables):

- TeleChat (7B, 12B, TeleChat2): S' = max(S, training_seqlen); alpha = max(2^ceil(log2(S'/L) + 1) - 1, 1);
  base = theta * alpha^(d/(d-2)) (NTK-aware scaling); mscale = 0.1 ln(S'/training_seqlen) + 1 if S' > training_seqlen,
  else 1; cos and sin are multiplied by mscale.
- TeleChat-52B: alpha as above with S' = S; base = theta * alpha; no mscale.
- NTK, PI, None: what earlier MindSpore plugins offered. NTK: base = theta * scaling_factor^(d/(d-2)); PI: positions
  divided by scaling_factor; None: neither.
- YARN (TeleChat3; Peng et al., 2023): frequencies that turn more than beta_fast times within L tokens stay, those that
  turn less than beta_slow times are divided by scaling_factor, those between are blended linearly by their index; cos
  and sin are multiplied by attention_factor. The same for every S.
"""
import math
from dataclasses import dataclass, replace
from typing import NamedTuple, Tuple

import numpy as np

from research.telechat.common.bfloat16 import round_bfloat16


@dataclass(frozen=True)
class RopeRule:
    """Everything the cos/sin tables of one model depend on, besides the sequence length."""

    head_dim: int                    # elements of one head, even
    theta: float = 10000.0           # base of the frequencies
    extend_method: str = "TELECHAT"  # or None, PI, NTK, YARN
    scaling_factor: float = 1.0      # for PI, NTK and YARN
    training_seqlen: int = 8192      # tokens; context the weights were trained with
    base_seqlen: int = 8192          # tokens; L of the rule
    base_power: bool = True          # base = theta * alpha^(d/(d-2)); False: theta * alpha, and S' = S
    mscale: bool = True              # scale cos and sin past training_seqlen
    length: int = 0                  # tokens; not 0: scale as for a sequence of this length, whatever its own is
    table_dtype: str = "float32"     # cos and sin are rounded to it: "float16", "bfloat16" or "float32"
    beta_fast: float = 32.0          # YARN: turns within base_seqlen tokens, above which a frequency stays
    beta_slow: float = 1.0           # YARN: turns within base_seqlen tokens, below which it is stretched fully
    attention_factor: float = 1.0    # factor on cos and sin at every length


def ntk_alpha(seq_length: int, base_seqlen: int) -> float:
    """alpha of the official rule for a sequence of `seq_length` tokens; 1, 3, 7, 15, ..."""
    return max(2.0 ** math.ceil(math.log2(seq_length / base_seqlen) + 1) - 1, 1.0)


def rope_scaling(rule: RopeRule, seq_length: int) -> Tuple[float, float]:
    """(base of the frequencies, factor on cos and sin) for a sequence of `seq_length` tokens."""
    power = rule.head_dim / (rule.head_dim - 2)
    seq_length = rule.length or seq_length
    if rule.extend_method == "TELECHAT":
        effective = max(seq_length, rule.training_seqlen) if rule.base_power else seq_length
        alpha = ntk_alpha(effective, rule.base_seqlen)
        base = rule.theta * (alpha ** power if rule.base_power else alpha)
        grown = rule.mscale and effective > rule.training_seqlen
        return base, 0.1 * math.log(effective / rule.training_seqlen) + 1.0 if grown else 1.0
    if rule.extend_method == "NTK":
        return rule.theta * rule.scaling_factor ** power, 1.0
    return rule.theta, 1.0


def describe(rule: RopeRule, seq_length: int) -> str:
    """The rule in words, with the numbers that follow from it for sequences of `seq_length` tokens."""
    base, mscale = rope_scaling(rule, seq_length)
    length = rule.length or seq_length
    effective = max(length, rule.training_seqlen) if rule.base_power else length
    alpha = f"alpha {ntk_alpha(effective, rule.base_seqlen):g}, " if rule.extend_method == "TELECHAT" else (
        f"scaling_factor {rule.scaling_factor:g}, " if rule.extend_method in ("NTK", "PI", "YARN") else "")
    return (f"extend_method {rule.extend_method}, theta {rule.theta:g}, {alpha}mscale "
            f"{mscale * rule.attention_factor:.4g}, frequencies from {base:.6g} at {seq_length} tokens")


_ROUND = {"float32": lambda x: x, "float16": lambda x: x.astype(np.float16).astype(np.float32),
          "bfloat16": round_bfloat16}


def rope_table(rule: RopeRule, seq_length: int, num_positions: int = 0) -> Tuple[np.ndarray, np.ndarray]:
    """cos and sin for the rotate-half layout, as float32 arrays [positions, head_dim] rounded to rule.table_dtype.

    `seq_length` decides the scaling; `num_positions` (0: seq_length) how many rows the tables have.
    Angles are computed in float32, as the official code does, so that long positions round alike.
    """
    base, mscale = rope_scaling(rule, seq_length)
    positions = np.arange(num_positions or seq_length, dtype=np.float32)
    if rule.extend_method == "PI":
        positions = positions / np.float32(rule.scaling_factor)
    exponents = np.arange(0, rule.head_dim, 2, dtype=np.float32) / np.float32(rule.head_dim)
    inv_freq = (1.0 / np.power(np.float32(base), exponents)).astype(np.float32)
    if rule.extend_method == "YARN":
        inv_freq = _stretched(inv_freq, rule)
    angles = np.outer(positions, inv_freq)                     # [positions, head_dim / 2]
    angles = np.concatenate([angles, angles], axis=-1)         # [positions, head_dim]
    rounded = _ROUND[rule.table_dtype]
    factor = np.float32(mscale * rule.attention_factor)
    return rounded(factor * rounded(np.cos(angles))), rounded(factor * rounded(np.sin(angles)))


def _stretched(inv_freq: np.ndarray, rule: RopeRule) -> np.ndarray:
    """YaRN's frequencies from the plain ones, both [head_dim / 2] float32."""
    def index(turns: float) -> float:                          # of the frequency that turns so often in L tokens
        return rule.head_dim * math.log(rule.base_seqlen / (turns * 2 * math.pi)) / (2 * math.log(rule.theta))
    low, high = max(math.floor(index(rule.beta_fast)), 0), min(math.ceil(index(rule.beta_slow)), rule.head_dim - 1)
    width = high - low if high != low else 0.001
    share = np.clip((np.arange(len(inv_freq), dtype=np.float32) - low) / width, 0, 1).astype(np.float32)
    stretched: np.ndarray = inv_freq / np.float32(rule.scaling_factor) * share + inv_freq * (1 - share)
    return stretched


class LengthTables(NamedTuple):
    """Tables for sequences that grow while they are read, as in generation. P = longest sequence, D = head_dim.

    The cos at position p in a sequence of n tokens is rounded(mscale[n] * cos[level[n] * P + p]), rounded to the
    rule's table_dtype; sin likewise.
    """

    cos: np.ndarray                  # float32 [levels * P, D], one block of P rows per base of the frequencies
    sin: np.ndarray                  # float32 [levels * P, D]
    level: np.ndarray                # int32 [P + 1], by number of tokens
    mscale: np.ndarray               # float32 [P + 1], by number of tokens


def rule_is_constant(rule: RopeRule, max_length: int) -> bool:
    """Whether all sequences of up to `max_length` tokens have the same tables, so that rotated keys stay valid while a
    sequence grows. (Both results of rope_scaling never fall with the length.)"""
    return rope_scaling(rule, 1) == rope_scaling(rule, max_length)


def tables_by_length(rule: RopeRule, max_length: int) -> LengthTables:
    """The tables of every sequence length from 1 to `max_length` tokens."""
    scalings = [rope_scaling(rule, max(length, 1)) for length in range(max_length + 1)]
    bases = sorted({base for base, _ in scalings})
    index = {base: number for number, base in enumerate(bases)}
    first = {base: length for length, (base, _) in reversed(list(enumerate(scalings)))}
    plain = replace(rule, mscale=False)
    tables = [rope_table(plain, max(first[base], 1), max_length) for base in bases]
    return LengthTables(
        np.concatenate([cos for cos, _ in tables]), np.concatenate([sin for _, sin in tables]),
        np.array([index[base] for base, _ in scalings], np.int32),
        np.array([mscale for _, mscale in scalings], np.float32))
