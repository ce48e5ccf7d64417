"""TeleChat3: config.json in Llama's words, the fields of its rotary rule, its names."""
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from golden import SHARED, needs_shared

from research.telechat.common.errors import ConfigError
from research.telechat.spec.hf_config import hf_config
from research.telechat.spec.llama_config import check_llama_config, llama_config, origin, rope_rule
from research.telechat.spec.parameters import LLAMA, match_llama, official_layout, parameters
from research.telechat.spec.rope import rope_scaling, rope_table, rule_is_constant, tables_by_length
from research.telechat.spec.variants import get_variant, read_hf_config, variant_from_hf

FACTOR = 0.07 * math.log(4) + 1
ROPE = {"rope_type": "telechat3-yarn", "factor": 4.0, "original_max_position_embeddings": 8192}
CONFIG = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
          "num_key_value_heads": 2, "vocab_size": 97, "max_position_embeddings": 32768, "rope_theta": 1e6,
          "rope_scaling": ROPE}


@needs_shared
def test_the_official_config_is_the_table_s_variant_and_is_written_again():
    official = read_hf_config(SHARED / "data/telechat3-36b")
    variant = variant_from_hf(official)
    assert variant == get_variant("telechat3_36b")
    written = hf_config(variant)
    assert {key: written.get(key) for key in official if key not in ("torch_dtype", "transformers_version")} == {
        key: value for key, value in official.items() if key not in ("torch_dtype", "transformers_version")}
    assert variant.attention_factor == pytest.approx(FACTOR) and variant.rms_norm_eps == 1e-5


def test_the_rotation_is_the_same_for_every_length():
    """So that the KV cache stays valid, also past the trained context; and the tables of generation have the factor."""
    rule = rope_rule(get_variant("telechat3_36b"))
    assert rope_scaling(rule, 1) == rope_scaling(rule, 200000) == (1e6, 1.0) and rule_is_constant(rule, 200000)
    tables = tables_by_length(rule, 64)
    np.testing.assert_array_equal(tables.cos, rope_table(rule, 64)[0])
    assert tables.cos[0, 0] == np.float32(FACTOR) and (tables.mscale == 1).all()


def test_the_factor_of_the_official_type_is_not_that_of_transformers():
    assert variant_from_hf(CONFIG).attention_factor == pytest.approx(FACTOR)
    plain = {**CONFIG, "rope_scaling": {**ROPE, "rope_type": "yarn"}}
    assert variant_from_hf(plain).attention_factor == pytest.approx(0.1 * math.log(4) + 1)
    given = {**CONFIG, "rope_scaling": {**ROPE, "rope_type": "yarn", "attention_factor": 1.25}}
    assert variant_from_hf(given).attention_factor == 1.25
    assert variant_from_hf(hf_config(variant_from_hf(given))) == variant_from_hf(given)


def test_spellings_of_transformers_5_are_read():
    new = {key: value for key, value in CONFIG.items() if key not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = {**ROPE, "rope_theta": 1e6}
    assert variant_from_hf(new) == variant_from_hf(CONFIG)


@pytest.mark.parametrize("change, words", [
    ({"rope_scaling": {**ROPE, "rope_type": "longrope"}}, "rope_scaling.rope_type is 'longrope'"),
    ({"rope_scaling": {**ROPE, "mscale_all_dim": 1.0}}, "rope_scaling.mscale_all_dim is 1.0"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "original_max_position_embeddings"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"), ({"attention_bias": True}, "attention_bias is True"),
    ({"sliding_window": 4096}, "sliding_window is 4096"), ({"head_dim": 32}, "head_dim (32)")])
def test_what_would_change_the_result_is_refused(change, words):
    with pytest.raises(ConfigError) as error:
        variant_from_hf({**CONFIG, **change})
    assert words in str(error.value)


def test_names_are_llama_s_and_keys_and_values_tensors_of_their_own():
    params = parameters(replace(get_variant("telechat3_36b"), num_layers=1))
    names = [name for param in params for name in param.llama_names]
    layer = "model.layers.0."
    assert names == [
        "model.embed_tokens.weight", f"{layer}input_layernorm.weight", f"{layer}self_attn.q_proj.weight",
        f"{layer}self_attn.k_proj.weight", f"{layer}self_attn.v_proj.weight", f"{layer}self_attn.o_proj.weight",
        f"{layer}post_attention_layernorm.weight", f"{layer}mlp.gate_proj.weight", f"{layer}mlp.up_proj.weight",
        f"{layer}mlp.down_proj.weight", "model.norm.weight", "lm_head.weight"]
    match = match_llama(params, {}, [name for name in names if "v_proj" not in name])
    assert match.missing == [f"{layer}self_attn.v_proj.weight"]
    assert "model.layers.0.attention.wk_v.weight" not in match.found
    assert sum(math.prod(param.shape) for param in parameters(get_variant("telechat3_36b"))) == 36_239_579_136
    assert official_layout(get_variant("telechat3_36b")) == LLAMA


def test_for_readers_of_llama_yarn_has_its_usual_name_and_the_factor_stands_there():
    variant = get_variant("telechat3_36b")
    config = json.loads(json.dumps(llama_config(variant, "bfloat16")))
    assert config["rope_scaling"] == {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192, "beta_fast": 32.0,
        "beta_slow": 1.0, "attention_factor": pytest.approx(FACTOR)}
    assert config["max_position_embeddings"] == 32768 and config["rope_theta"] == 1e6
    assert variant_from_hf(origin(config)) == variant
    check_llama_config(config, variant)
    config["rope_scaling"]["factor"] = 8.0
    with pytest.raises(ConfigError, match=r"has factor 8\.0"):
        check_llama_config(config, variant)
