"""What a checkpoint's manifest says of its model reaches the recipe, or the run stops with both values."""
from dataclasses import replace

import pytest
from mindformers.tools.register import MindFormerConfig

from research.telechat.checkpoint.manifest import Manifest, ModelFacts, facts_of, manifest_path, write_manifest
from research.telechat.common.errors import ConfigError
from research.telechat.recipe.options import all_overrides, build_parser
from research.telechat.run import published
from research.telechat.run.manifests import settle_with_checkpoint
from research.telechat.run.preflight import model_config
from research.telechat.spec.variants import VARIANTS

SEVEN, LONG = VARIANTS["telechat2_7b"], VARIANTS["telechat2_7b_32k"]


@pytest.fixture
def settled(tmp_path):
    """settled(facts, model_config keys, recipe keys): the model's config once the checkpoint is settled."""
    def settle(facts=None, keys=None, **recipe):
        path = tmp_path / "model.ckpt"
        path.touch()
        if facts is not None:
            facts = facts if isinstance(facts, ModelFacts) else facts_of(facts)
            write_manifest(manifest_path(path, False), Manifest("mindspore", model=facts))
        section = {"net_name": "telechat2_7b", "seq_length": 128, "type": "TelechatConfig", **(keys or {})}
        config = MindFormerConfig(load_checkpoint=str(path), model={"model_config": section}, **recipe)
        settle_with_checkpoint(config)
        settle_with_checkpoint(config)                       # as when a training is resumed
        return model_config(config)
    return settle


def test_values_of_the_checkpoint_run(settled):
    config = settled(facts_of(replace(LONG, rms_norm_eps=1e-8), "telechat2_7b"))
    assert (config.theta, config.training_seqlen, config.base_seqlen, config.rms_norm_eps) == (1e6, 32768, 32768, 1e-8)
    assert settled(facts_of(replace(SEVEN, num_heads=16), "telechat2_7b")).num_heads == 16
    assert settled(SEVEN).theta == 1e4


def test_a_recipe_that_says_otherwise_stops(settled):
    facts = facts_of(LONG, "telechat2_7b")
    with pytest.raises(ConfigError, match=r"theta is 10000.0 here and 1000000.0 in the .*checkpoint_conflict"):
        settled(facts, {"theta": 10000})
    assert settled(facts, {"theta": 10000}, checkpoint_conflict="recipe").theta == 1e4
    assert settled(facts, {"theta": 10000}, checkpoint_conflict="checkpoint").theta == 1e6
    assert settled(facts, {"theta": 1e6}).theta == 1e6
    with pytest.raises(ConfigError, match="chat_template is 'telechat2_start' here and 'telechat2'"):
        settled(facts, {"chat_template": "telechat2_start"})
    with pytest.raises(ConfigError, match="expected stop, recipe, checkpoint"):
        settled(facts, checkpoint_conflict="mine")


def test_another_member(settled):
    facts = facts_of(replace(SEVEN, rms_norm_eps=2e-5), "telechat2_7b")
    with pytest.raises(ConfigError, match="net_name is 'telechat2_7b_32k' here and 'telechat2_7b' in the checkpoint"):
        settled(facts, {"net_name": "telechat2_7b_32k"})
    config = settled(facts, {"net_name": "telechat2_7b_32k"}, checkpoint_conflict="recipe")
    assert (config.theta, config.training_seqlen, config.rms_norm_eps) == (1e6, 32768, 2e-5)
    config = settled(facts, {"net_name": "telechat2_7b_32k"}, checkpoint_conflict="checkpoint")
    assert (config.theta, config.training_seqlen, config.net_name) == (1e4, 8192, "telechat2_7b")
    # converted without a name: config.json does not tell members of the same sizes apart
    config = settled(facts_of(VARIANTS["telechat2_35b"]), {"net_name": "telechat_t1_35b"})
    assert config.chat_template == "telechat2_think" and config.repetition_penalty == 1.05
    with pytest.raises(ConfigError, match="net_name is 'telechat_t1_35b' here and 'telechat2_35b'"):
        settled(facts_of(VARIANTS["telechat2_35b"], "telechat2_35b"), {"net_name": "telechat_t1_35b"})


def test_generation_settings_of_the_checkpoint_are_defaults(settled):
    facts = replace(facts_of(SEVEN, "telechat2_7b"), generation={"repetition_penalty": 1.2, "top_k": 7,
                                                                "eos_token_id": [2, 5], "max_new_tokens": 9})
    config = settled(facts)
    assert (config.repetition_penalty, config.top_k, config.top_p, config.temperature) == (1.2, 7, 0.85, 0.3)
    assert config.eos_token_id == [2, 5] and config.max_new_tokens is None
    assert settled(facts, {"top_k": 2}).top_k == 2


def test_a_model_that_has_changed_is_asked_about_once(settled, tmp_path):
    with pytest.raises(ConfigError, match=r"no manifest.*rms_norm_eps 1e-05 instead of 1e-08.*'telechat2_before'.*"
                                          "--as_published.*--as_before"):
        settled()
    config = settled(checkpoint_meaning="as_published")
    assert (config.rms_norm_eps, config.chat_template) == (1e-5, "telechat2")
    config = settled(checkpoint_meaning="as_before")
    assert (config.rms_norm_eps, config.chat_template) == (1e-8, "telechat2_before")
    config = settled(None, {"rms_norm_eps": 1e-6, "chat_template": "telechat2_start"})
    assert (config.rms_norm_eps, config.chat_template) == (1e-6, "telechat2_start")
    config = settled(None, {"net_name": "telechat_12b"})
    assert config.chat_template == "telechat"
    assert settled(SEVEN, checkpoint_meaning="as_before").rms_norm_eps == 1e-5       # a manifest knows
    with pytest.raises(ConfigError, match="expected as_published or as_before"):
        settled(checkpoint_meaning="yes")
    args, rest = build_parser().parse_known_args(["--config", "x", "--as_before"])
    assert all_overrides(args, rest) == {"checkpoint_meaning": "as_before"}


def test_the_rule_of_another_length_is_said(settled, monkeypatch):
    lines = []
    for level in ("info", "warning"):
        monkeypatch.setattr(published.logger, level, lambda text, *values: lines.append(text % values))
    settled(facts_of(SEVEN, "telechat2_7b"), {"seq_length": 32768, "theta": 1e6, "training_seqlen": 32768,
                                              "base_seqlen": 32768}, checkpoint_conflict="recipe")
    text = "\n".join(lines)
    assert "extend_method TELECHAT, theta 1e+06, alpha 1, mscale 1" in text and "8192 tokens" in text
    settled(facts_of(SEVEN, "telechat2_7b"), {"seq_length": 32768})
    assert "theta 10000, alpha 7, mscale 1.139" in lines[-1]
