"""TelechatConfig: variants, presets, official configs, and one clear line for every mistake.

Keys of earlier recipes: test_old_recipes.
"""
import json
import math
import re
from dataclasses import replace

import mindspore.common.dtype as mstype
import pytest
from golden import SHARED, needs_shared
from model_fixtures import HF_CONFIGS

from research.telechat.common.errors import ConfigError
from research.telechat.spec.config_keys import unknown_keys
from research.telechat.spec.hf_config import config_notes
from research.telechat.spec.parameters import parameters
from research.telechat.spec.variants import GENERATION, VARIANTS, read_hf_config, same_config, variant_from_hf
from research.telechat.telechat_config import TelechatConfig

pytestmark = pytest.mark.matrix


@pytest.mark.parametrize("name", VARIANTS)
def test_net_name_brings_sizes_and_conventions(name):
    config, variant = TelechatConfig(net_name=name), VARIANTS[name]
    assert (config.num_layers, config.hidden_size, config.vocab_size) == (
        variant.num_layers, variant.hidden_size, variant.vocab_size)
    assert config.tie_word_embeddings == variant.tie_word_embeddings and config.n_kv_heads == variant.kv_heads
    assert TelechatConfig(net_name=name, num_layers=2).num_layers == 2
    named = [(param.ms_name, param.shape) for param in parameters(config.to_variant())]
    assert named == [(param.ms_name, param.shape) for param in parameters(variant)]


@pytest.mark.parametrize(("keys", "words"), [
    ({"hiden_size": 3}, ["hiden_size", "hidden_size"]),
    ({"num_heads": 7}, ["hidden_size", "4096", "num_heads", "7"]),
    ({"n_kv_heads": 5}, ["num_heads", "n_kv_heads", "5"]),
    ({"compute_dtype": "fp8"}, ["compute_dtype", "fp8", "bfloat16"]),
    ({"seq_length": "long"}, ["seq_length", "whole number", "long"]),
    ({"seq_length": 0}, ["seq_length", "positive", "0"]),
    ({"seq_length": True}, ["seq_length", "True"]),
    ({"hidden_dropout_prob": 1.5}, ["hidden_dropout_prob", "1.5"]),
    ({"extend_method": "LONGROPE"}, ["extend_method", "LONGROPE", "NTK", "YARN"]),
    ({"net_name": "telechat_13b"}, ["telechat_13b", "telechat_12b"]),
    ({"rms_norm_eps": math.nan}, ["rms_norm_eps"]),
    ({"ffn_dim_multiplier": "wide"}, ["ffn_dim_multiplier", "positive", "wide"]),
    ({"use_mup": True, "mup_scale_factor": 0}, ["mup_scale_factor", "positive", "0"]),
    ({"fused_projections": True, "n_kv_heads": 8}, ["fused_projections", "n_kv_heads"]),
    ({"hidden_size": 4064, "num_heads": 32}, ["even"]),
    ({"parallel_config": {"model_parallel": 3}}, ["num_heads", "model_parallel", "3"]),
    ({"parallel_config": {"pipeline_stage": 40}, "num_layers": 32}, ["pipeline_stage", "40"]),
])
def test_mistakes_are_named(keys, words):
    with pytest.raises(ConfigError) as err:
        TelechatConfig(**keys)
    assert "\n" not in str(err.value)
    for word in words:
        assert word in str(err.value)


def test_amp_presets():
    o1 = TelechatConfig(amp_level="O1")
    assert (o1.compute_dtype, o1.param_init_type, o1.res_dtype) == (mstype.float16, mstype.float32, mstype.float32)
    o2 = TelechatConfig(amp_level="O2", compute_dtype="bfloat16", res_dtype="float32")
    assert (o2.compute_dtype, o2.param_init_type, o2.res_dtype) == (mstype.bfloat16, mstype.bfloat16, mstype.float32)
    assert TelechatConfig(amp_level="O0").compute_dtype == mstype.float32


def test_numbers_that_yaml_reads_as_text():
    assert TelechatConfig(rms_norm_eps="1e-6").rms_norm_eps == 1e-6


def test_missing_ffn_width_follows_the_earlier_rule():
    assert TelechatConfig(hidden_size=4096).intermediate_size == 11008
    assert TelechatConfig(hidden_size=4096, multiple_of=512).intermediate_size == 11264
    assert TelechatConfig(hidden_size=4096, ffn_dim_multiplier=1.5).intermediate_size == 16384
    assert TelechatConfig(hidden_size=4096, ffn_dim_multiplier=12288).intermediate_size == 12288    # a width


@pytest.mark.parametrize("name", HF_CONFIGS)
def test_from_hf_config(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIGS[name]))
    config = TelechatConfig.from_hf_config(tmp_path, seq_length=48)
    assert config.seq_length == 48 and config.compute_dtype == mstype.float32
    assert config.tie_word_embeddings == (name == "7b") and config.fused_projections == (name == "52b")
    assert config.rotary_dtype == (mstype.float32 if name == "52b" else mstype.float16)
    assert config.logits_scale == (0.125 if name == "52b" else 1.0)


@pytest.mark.parametrize(("content", "words"), [
    ("{", ["not valid JSON"]), ("[]", ["object"]), ("{}", ["n_layer", "missing"]),
    ('{"n_layer": -1, "hidden_size": 8, "ffn_hidden_size": 8, "n_head": 2, "vocab_size": 9}', ["n_layer", "positive"]),
])
def test_bad_hf_config(content, words, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ConfigError) as err:
        TelechatConfig.from_hf_config(path)
    for word in words:
        assert word in str(err.value)
    with pytest.raises(ConfigError, match=r"missing\.json"):
        TelechatConfig.from_hf_config(tmp_path / "missing.json")


@needs_shared
@pytest.mark.parametrize("folder", ["telechat-7b", "telechat-12b", "telechat-12b-v2", "telechat-52b",
                                    "telechat2-115b-hub", "telechat2-3b", "telechat2-7b", "telechat2-7b-32k"])
def test_table_equals_official_configs(folder):
    name = folder.replace("-hub", "").replace("-", "_")
    config = read_hf_config(SHARED / "data" / folder)
    assert variant_from_hf(config, name) == VARIANTS[name]
    assert name in same_config(variant_from_hf(config))
    for key, other in (("layer_norm_epsilon", 1e-8), ("rope_theta", 2e6), ("training_seqlen", 512)):
        if "n_embd" not in config or key == "layer_norm_epsilon":
            assert variant_from_hf({**config, key: other}, name) != VARIANTS[name]


@needs_shared
@pytest.mark.parametrize("folder", ["telechat-7b", "telechat-12b", "telechat-12b-v2", "telechat-52b", "telechat2-115b",
                                    "telechat2-3b", "telechat2-7b"])
def test_table_equals_official_generation_settings(folder):
    published = json.loads((SHARED / "data" / folder / "generation_config.json").read_text())
    variant = VARIANTS[folder.replace("-", "_")]
    assert {key: published[key] for key in GENERATION} == {key: getattr(variant, key) for key in GENERATION}


@needs_shared
def test_the_code_repository_has_115b_with_another_epsilon():
    config = read_hf_config(SHARED / "data" / "telechat2-115b")
    assert variant_from_hf(config) == replace(VARIANTS["telechat2_115b"], rms_norm_eps=1e-8)


@pytest.mark.parametrize(("name", "eps", "theta", "lengths", "template"), [
    ("telechat_12b_v2", 1e-5, 1e4, (8192, 8192), "telechat_system"),
    ("telechat2_3b", 1e-5, 1e4, (8192, 8192), "telechat2"), ("telechat2_7b", 1e-5, 1e4, (8192, 8192), "telechat2"),
    ("telechat2_35b", 1e-5, 1e4, (8192, 8192), "telechat2"),
    ("telechat2_115b", 1e-5, 1e4, (8192, 8192), "telechat2_start"),
    ("telechat2_7b_32k", 1e-5, 1e6, (32768, 32768), "telechat2"),
    ("telechat2_35b_32k", 1e-5, 1e6, (32768, 32768), "telechat2"),
    ("telechat2_5_35b", 1e-5, 1e4, (8192, 8192), "telechat2"),
    ("telechat2_5_115b", 1e-5, 1e4, (8192, 8192), "telechat2"),
    ("telechat_t1_35b", 1e-5, 1e4, (8192, 8192), "telechat2_think"),
    ("telechat_t1_115b", 1e-5, 1e4, (8192, 8192), "telechat2_think")])
def test_members(name, eps, theta, lengths, template):
    for config in (TelechatConfig(net_name=name), VARIANTS[name]):
        assert (config.rms_norm_eps, config.theta, config.training_seqlen, config.base_seqlen, config.chat_template
                ) == (eps, theta, *lengths, template)


OFFICIAL = {"n_layer": 2, "hidden_size": 16, "ffn_hidden_size": 8, "n_head": 2, "vocab_size": 9, "base_seqlen": 8192}


@pytest.mark.parametrize(("keys", "words"), [
    ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling asks for the type 'linear' with factor 4.0"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2}}, "'dynamic' with factor 2"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4}}, "rope_parameters asks for the type 'yarn'"),
    ({"rope_scaling": 4}, "expected an object with rope_type"), ({"rope_theta": "10000"}, "expected a positive number"),
    ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}, "contradict each other"),
    ({"num_hidden_layers": 3}, "n_layer 2 and num_hidden_layers 3 contradict"),
    ({"rms_norm_eps": 1e-6, "layer_norm_epsilon": 1e-5}, "layer_norm_epsilon 1e-05 and rms_norm_eps 1e-06 contradict"),
    ({"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm is True"),
    ({"sliding_window": 4096}, "sliding_window is 4096"), ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"activation_function": "gelu_new"}, "activation_function is 'gelu_new'"), ({"head_dim": 16}, "head_dim is 16"),
    ({"embed_layernorm": True}, "embed_layernorm is True"), ({"n_inner": 4}, "n_inner is 4"),
    ({"num_experts": 16}, "num_experts is 16"), ({"quantization_config": {"bits": 4}}, "quantization_config is"),
    ({"layer_norm_epsilon": True}, "layer_norm_epsilon"), ({"vocab_size": 9.5}, "vocab_size"),
])
def test_config_keys_that_are_not_supported(keys, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        variant_from_hf({**OFFICIAL, **keys})


def test_other_spellings_of_a_config(tmp_path):
    plain = variant_from_hf(OFFICIAL)
    assert plain.theta == 1e4
    for keys in ({"rope_theta": 1000000}, {"rotary_theta": 1e6}, {"rope_parameters": {"rope_theta": 1e6}},
                 {"rope_theta": 1e6, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}}):
        assert variant_from_hf({**OFFICIAL, **keys}) == replace(plain, theta=1e6)
    odd = {**OFFICIAL, "n_layer": 2.0, "layer_norm_epsilon": None, "num_key_value_heads": None, "sliding_window": 8,
           "use_sliding_window": False, "rope_scaling": None, "training_seqlen": None, "n_inner": None}
    assert variant_from_hf(odd) == plain
    (tmp_path / "config.json").write_text("\ufeff" + json.dumps({**OFFICIAL, "dtype": "bfloat16"}), encoding="utf-8")
    config = TelechatConfig.from_hf_config(tmp_path)
    assert config.compute_dtype == mstype.bfloat16 and config.repetition_penalty == 1.0
    assert unknown_keys({**odd, "surprise": 1, "nothing": None, "flash_attn": True}) == ["surprise"]
    # Llama's word is not read here, unless it says the same.
    assert unknown_keys({**OFFICIAL, "rms_norm_eps": 1e-6}) == ["rms_norm_eps"]
    assert unknown_keys({**OFFICIAL, "layer_norm_epsilon": 1e-6, "rms_norm_eps": 1e-6}) == []


@needs_shared
@pytest.mark.parametrize("folder", sorted(path.parent.name for path in SHARED.glob("data/telechat[2-]*/config.json")))
def test_every_key_of_the_official_configs_is_known(folder):
    assert unknown_keys(read_hf_config(SHARED / "data" / folder)) == []


def test_what_conversion_says_of_a_config():
    config = {**OFFICIAL, "surprise": 1, "rope_theta": 1e6, "layer_norm_epsilon": 1e-8}
    said, unknown = config_notes(config, variant_from_hf(config), None)
    assert "epsilon 1e-08, theta 1e+06, training_seqlen 8192, base_seqlen 8192; chat template telechat2" in said
    assert unknown.endswith("without effect: surprise")
    (_, alike) = config_notes(OFFICIAL, VARIANTS["telechat2_35b"], None)
    assert "telechat2_35b, telechat2_5_35b, telechat_t1_35b have the same" in alike
    assert len(config_notes(OFFICIAL, VARIANTS["telechat2_35b"], "telechat2_35b")) == 1
