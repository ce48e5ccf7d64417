"""Rotary arithmetic against a float64 computation from the formulas, and the rounding of its tables."""
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.telechat.common.bfloat16 import round_bfloat16
from research.telechat.spec.rope import RopeRule, ntk_alpha, rope_scaling, rope_table


@pytest.mark.parametrize(("seq", "length", "alpha"), [
    (1024, 8192, 1), (4096, 8192, 1), (4097, 8192, 1), (8192, 8192, 1), (8193, 8192, 3), (16384, 8192, 3),
    (16385, 8192, 7), (8192, 4096, 3), (32768, 8192, 7), (131072, 8192, 31)])
def test_alpha(seq, length, alpha):
    assert ntk_alpha(seq, length) == alpha


def test_7b_always_has_alpha_three():
    """training_seqlen 8192 and L 4096 of the real config: every length up to 8192 is scaled alike."""
    rule = RopeRule(head_dim=128, training_seqlen=8192, base_seqlen=4096)
    for seq in (1, 100, 4096, 8192):
        base, mscale = rope_scaling(rule, seq)
        assert base == pytest.approx(10000 * 3 ** (128 / 126)) and mscale == 1.0


def test_52b_scales_theta_without_power_and_mscale():
    rule = RopeRule(head_dim=128, training_seqlen=4096, base_seqlen=4096, base_power=False, mscale=False)
    assert rope_scaling(rule, 4096) == (10000.0, 1.0)
    assert rope_scaling(rule, 4097) == (30000.0, 1.0)


def test_mscale_past_training_length():
    rule = RopeRule(head_dim=128, training_seqlen=8192, base_seqlen=8192)
    assert rope_scaling(rule, 16384)[1] == pytest.approx(0.1 * math.log(2) + 1)


def test_other_extend_methods():
    old = RopeRule(head_dim=64, extend_method="None", training_seqlen=8192, base_seqlen=4096)
    assert rope_scaling(old, 8192) == (10000.0, 1.0)
    ntk = RopeRule(head_dim=64, extend_method="NTK", scaling_factor=2.0)
    assert rope_scaling(ntk, 100)[0] == pytest.approx(10000 * 2 ** (64 / 62))
    cos, _ = rope_table(RopeRule(head_dim=8, extend_method="PI", scaling_factor=4.0), 8)
    plain, _ = rope_table(RopeRule(head_dim=8, extend_method="None"), 2)
    np.testing.assert_allclose(cos[4], plain[1], atol=1e-7)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 64).map(lambda n: 2 * n + 2), st.integers(1, 300), st.sampled_from([16, 64, 256]),
       st.sampled_from([16, 64, 256]), st.booleans())
def test_tables_against_float64(dim, seq, training, length, power):
    rule = RopeRule(head_dim=dim, training_seqlen=training, base_seqlen=length, base_power=power, mscale=power)
    cos, sin = rope_table(rule, seq)
    effective = max(seq, training) if power else seq
    alpha = max(2 ** math.ceil(math.log2(effective / length) + 1) - 1, 1)
    base = 10000 * (alpha ** (dim / (dim - 2)) if power else alpha)
    grow = 0.1 * math.log(effective / training) + 1 if power and effective > training else 1
    angles = np.outer(np.arange(seq), base ** (-np.arange(0, dim, 2) / dim))
    assert cos.shape == sin.shape == (seq, dim) and cos.dtype == np.float32
    np.testing.assert_allclose(cos[:, :dim // 2], grow * np.cos(angles), atol=2e-4)
    np.testing.assert_allclose(sin[:, dim // 2:], grow * np.sin(angles), atol=2e-4)


def test_tables_are_rounded_to_their_dtype():
    half, _ = rope_table(RopeRule(head_dim=16, table_dtype="float16"), 64)
    assert np.array_equal(half, half.astype(np.float16).astype(np.float32))
    brain, _ = rope_table(RopeRule(head_dim=16, table_dtype="bfloat16"), 64)
    assert not (brain.view(np.uint32) & 0xFFFF).any()


def test_round_bfloat16_ties_to_even():
    one, ulp = np.float32(1.0), np.float32(2 ** -7)
    values = np.array([one + ulp / 2, one + 3 * ulp / 2, one + ulp / 2 + 2 ** -20], np.float32)
    np.testing.assert_array_equal(round_bfloat16(values), np.array([one, one + 2 * ulp, one + ulp], np.float32))
