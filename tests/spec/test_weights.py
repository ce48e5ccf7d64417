"""The table of names and layouts, and the number formats: pure arithmetic, no files, no MindSpore."""
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from golden import SHARED, needs_shared
from hypothesis import given
from hypothesis import strategies as st

from research.telechat.checkpoint.dtypes import RAW, cast, count_nonfinite
from research.telechat.common.errors import ConfigError
from research.telechat.spec import parameters as tw
from research.telechat.spec.hf_config import hf_config
from research.telechat.spec.variants import VARIANTS, get_variant, read_hf_config, variant_from_hf

OFFICIAL = {"telechat_7b": ("telechat-7b", "pytorch_model.bin.index.json"),
            "telechat_12b": ("telechat-12b", "pytorch_model.bin.index.json"),
            "telechat_52b": ("telechat-52b", "pytorch_model.bin.index.json"),
            "telechat2_115b": ("telechat2-115b", "model.safetensors.index.json")}


@needs_shared
@pytest.mark.parametrize("name", OFFICIAL)
def test_every_name_of_the_official_indexes_maps_both_ways(name):
    folder, file = OFFICIAL[name]
    index = json.loads((SHARED / "data" / folder / file).read_text())
    params, buffers = tw.parameters(get_variant(name)), tw.hf_buffers(get_variant(name))
    assert {param.hf_name for param in params} | set(buffers) == set(index["weight_map"])
    match = tw.match_official(params, index["weight_map"])
    assert not (match.missing or match.unknown or match.duplicate)
    assert sorted(match.ignored) == sorted(buffers)
    assert [match.found[param.ms_name] for param in params] == [param.hf_name for param in params]
    # The indexes give the size of all tensors: 2 bytes a number, 4 for 115B. So the shapes are right, too.
    numbers = sum(math.prod(param.hf_shape) for param in params) + len(buffers)
    assert index["metadata"]["total_size"] == numbers * (4 if name == "telechat2_115b" else 2)


@needs_shared
@pytest.mark.parametrize("name", OFFICIAL)
def test_official_configs_give_the_variants_of_the_table(name):
    variant = variant_from_hf(read_hf_config(SHARED / "data" / OFFICIAL[name][0]), name)
    assert tw.parameters(variant) == tw.parameters(get_variant(name))


@pytest.mark.parametrize("name", VARIANTS)
def test_names_are_those_of_existing_mindspore_checkpoints(name):
    variant = get_variant(name)
    shapes = {param.ms_name: param.shape for param in tw.parameters(variant)}
    hidden, ffn, kv = variant.hidden_size, variant.intermediate_size, 2 * variant.kv_heads * variant.head_dim
    expected = {"attention_norm.weight": (hidden,), "ffn_norm.weight": (hidden,),
                "attention.wo.weight": (hidden, hidden), "feed_forward.w2.weight": (hidden, ffn)}
    if name == "telechat_52b":
        expected.update({"attention.w_qkv.weight": (3 * hidden, hidden),
                         "feed_forward.w_gate_hidden.weight": (2 * ffn, hidden)})
    else:
        expected.update({"attention.wq.weight": (hidden, hidden), "attention.wk_v.weight": (kv, hidden),
                         "feed_forward.w1.weight": (ffn, hidden), "feed_forward.w3.weight": (ffn, hidden)})
    if variant.out_proj_has_bias:
        expected.update({"attention.wo.bias": (hidden,), "feed_forward.w2.bias": (hidden,)})
    for layer in (0, variant.num_layers - 1):
        prefix = f"model.layers.{layer}."
        assert {key[len(prefix):]: shape for key, shape in shapes.items() if key.startswith(prefix)} == expected
    outer = {"model.tok_embeddings.embedding_weight": (variant.vocab_size, hidden), "model.norm_out.weight": (hidden,)}
    if name != "telechat_7b":
        outer["lm_head.weight"] = (variant.vocab_size, hidden)
    assert {key: shape for key, shape in shapes.items() if not key.startswith("model.layers.")} == outer


def test_115b_has_the_published_size():
    assert sum(math.prod(param.shape) for param in tw.parameters(get_variant("telechat2_115b"))) == 113_282_916_352


@pytest.mark.parametrize("name", VARIANTS)
def test_a_config_written_for_a_variant_gives_its_parameters_again(name):
    variant = get_variant(name)
    again = variant_from_hf(json.loads(json.dumps(hf_config(variant))), name)
    assert again == variant


def test_prefix_may_be_added_or_dropped():
    for name in ("telechat_7b", "telechat_12b", "telechat_52b"):
        params = tw.parameters(replace(get_variant(name), num_layers=2))
        names = [param.hf_name for param in params]
        bare = [tw._bare(key) for key in names]
        assert tw.match_official(params, bare).found == dict(zip((p.ms_name for p in params), bare))
        added = [key if key == "lm_head.weight" else f"transformer.{key}" for key in bare]
        assert tw.match_official(params, added).found == dict(zip((p.ms_name for p in params), added))
        both = tw.match_official(params, names + [key for key in bare + added if key not in names])
        assert len(both.duplicate) == len(params) - (name != "telechat_7b") and not both.unknown


def test_unknown_missing_ignored_and_tied_entries_are_told_apart():
    params = tw.parameters(replace(get_variant("telechat_7b"), num_layers=1))
    names = [param.hf_name for param in params][1:]
    match = tw.match_official(params, [*names, "h.0.mlp.gate_proj.bias", "h.0.self_attention.rotary_emb.inv_freq",
                                       "lm_head.weight"])
    assert match.missing == ["word_embeddings.weight"] and match.unknown == ["h.0.mlp.gate_proj.bias"]
    assert match.ignored == ["h.0.self_attention.rotary_emb.inv_freq"] and match.tied_head == "lm_head.weight"
    training = ["global_step", "epoch_num", "adam_m.model.norm_out.weight", "scale_sense", "other.thing"]
    match = tw.match_mindspore(params, [*(param.ms_name for param in params), *training])
    assert match.unknown == ["other.thing"] and match.ignored == training[:-1] and not match.missing


def test_summary_lists_every_layer_once():
    names = [f"model.layers.{n}.attention.wq.weight" for n in (0, 1, 2, 5, 11)] + ["lm_head.weight", "h.3.ln_1.weight"]
    assert tw.summarise(names) == "model.layers.{0-2,5,11}.attention.wq.weight, lm_head.weight, h.3.ln_1.weight"


@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 3))
def test_w_qkv_holds_head_after_head(heads, head_dim, columns):
    hidden = heads * head_dim
    query, key, value = np.arange(3 * hidden * columns).reshape(3, hidden, columns)
    fused = tw.group_rows(np.concatenate([query, key, value]), 3, heads)
    rows = []
    for head in range(heads):
        for matrix in (query, key, value):
            rows.extend(matrix[head * head_dim:(head + 1) * head_dim])
    np.testing.assert_array_equal(fused, rows)
    for part, again in zip((query, key, value), np.split(tw.ungroup_rows(fused, 3, heads), 3)):
        np.testing.assert_array_equal(part, again)
    np.testing.assert_array_equal(np.concatenate([query, key, value])[tw.grouped_order(3 * hidden, 3, heads)], fused)


@given(st.integers(1, 6), st.integers(1, 5), st.data())
def test_any_degree_cuts_w_gate_hidden_into_matching_halves(groups, run, data):
    ffn = groups * run
    gate, up = np.arange(ffn)[:, None], 1000 + np.arange(ffn)[:, None]
    fused = tw.group_rows(np.concatenate([gate, up]), 2, groups)
    degree = data.draw(st.sampled_from([n for n in range(1, groups + 1) if groups % n == 0]))
    for rank, shard in enumerate(np.split(fused, degree)):
        mine_gate, mine_up = np.split(tw.ungroup_rows(shard, 2, groups // degree), 2)
        expected = np.arange(rank * ffn // degree, (rank + 1) * ffn // degree)[:, None]
        np.testing.assert_array_equal(mine_gate, expected)
        np.testing.assert_array_equal(mine_up, expected + 1000)


def test_52b_groups_fit_heads_and_feed_forward():
    variant = get_variant("telechat_52b")
    groups = tw.gate_up_groups(variant)
    assert groups == 64 and variant.num_heads % groups == 0 and variant.intermediate_size % groups == 0
    assert {param.groups for param in tw.parameters(variant) if param.parts > 1} == {64}


def test_impossible_groups_and_degrees_are_refused():
    variant = get_variant("telechat_52b")
    fused = next(param for param in tw.parameters(variant) if param.parts == 3)
    with pytest.raises(ConfigError, match="--source_mp 7 does not divide"):
        tw.source_groups(fused, variant, 7)
    with pytest.raises(ConfigError, match="cannot be split"):
        tw.group_rows(np.zeros((7, 2)), 3, 1)


def test_grouping_is_recognised_by_the_sizes_of_rows():
    rng = np.random.default_rng(0)
    norms = np.concatenate([rng.lognormal(mean, 0.3, 64 * 8) for mean in (0.0, 0.1, -0.8)])
    for truth in (1, 2, 8, 64):
        grouped = tw.group_rows(norms, 3, truth)
        shares = {n: tw.explained_by_groups(grouped, 3, n) for n in (1, 2, 4, 8, 16, 32, 64)}
        assert max(shares, key=shares.get) == truth and shares[truth] > 0.5
    assert tw.explained_by_groups(rng.lognormal(0, 0.3, 3 * 512), 3, 8) < 0.02
    assert tw.explained_by_groups(np.ones(24), 3, 2) == 0.0


# --- number formats -------------------------------------------------------------------------------------------------


def test_bfloat16_is_the_upper_half_of_float32():
    every = np.arange(1 << 16, dtype=np.uint16)
    wide = cast(every, "BF16", "F32")
    assert wide.dtype == np.uint32 and np.array_equal(wide >> 16, every) and not (wide & 0xFFFF).any()
    again = cast(wide, "F32", "BF16")
    nan = np.isnan(wide.view(np.float32))
    assert np.array_equal(again[~nan], every[~nan])
    assert np.array_equal(again[nan], every[nan] | 0x40)                  # still NaN, now quiet


def test_float16_survives_float32():
    every = np.arange(1 << 16, dtype=np.uint16)
    again = cast(cast(every, "F16", "F32"), "F32", "F16")
    nan = np.isnan(every.view(np.float16))
    assert np.array_equal(again[~nan], every[~nan]) and np.isnan(again[nan].view(np.float16)).all()


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50))
def test_rounding_to_bfloat16_is_to_the_nearest_even(bits):
    wide = np.array(bits, np.uint32)
    values = wide.view(np.float32).astype(np.float64)
    result = cast(wide, "F32", "BF16")
    back = cast(result, "BF16", "F32").view(np.float32).astype(np.float64)
    for value, code, rounded in zip(values, result, back):
        if math.isnan(value):
            assert math.isnan(rounded)
        elif math.isinf(rounded):                             # halfway beyond the largest bfloat16 and further
            assert abs(value) >= 2.0**127 * (2 - 2.0**-8)
        else:
            others = [cast(np.array([(int(code) + step) & 0xFFFF], np.uint16), "BF16", "F32").view(np.float32)[0]
                      for step in (-1, 1)]
            distances = [abs(float(other) - value) for other in others if np.isfinite(other)]
            assert all(abs(rounded - value) <= distance for distance in distances)
            if any(abs(rounded - value) == distance != 0 for distance in distances):
                assert int(code) % 2 == 0


def test_casts_agree_with_torch():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    wide = rng.integers(0, 2**32, 20_000, np.uint64).astype(np.uint32)
    types = {"F16": (torch.float16, torch.int16), "BF16": (torch.bfloat16, torch.int16),
             "F32": (torch.float32, torch.int32)}
    for source in types:
        raw = wide if source == "F32" else wide.astype(np.uint16)
        tensor = torch.from_numpy(raw.view(np.int32 if source == "F32" else np.int16)).view(types[source][0])
        for target, (dtype, integer) in types.items():
            theirs = tensor.to(dtype)
            ours = torch.from_numpy(cast(raw, source, target).view(np.int32 if target == "F32" else np.int16))
            nan = torch.isnan(theirs)
            assert torch.equal(ours[~nan], theirs.view(integer)[~nan]), (source, target)
            assert torch.isnan(ours.view(dtype)[nan]).all()


@pytest.mark.parametrize("code", ["F16", "BF16", "F32"])
def test_nan_and_infinity_are_counted(code):
    values = np.zeros(300_000, np.float32)
    values[[3, 200_000]] = np.nan
    values[[5, 131_071, 131_072]] = [np.inf, -np.inf, np.inf]
    raw = cast(values.view(np.uint32), "F32", code)
    assert raw.dtype == RAW[code] and count_nonfinite(raw, code) == {"nan": 2, "inf": 3}
    assert count_nonfinite(raw[10:100], code) == {"nan": 0, "inf": 0}
