"""Reading the options that change a recipe: what would have no effect is refused, with what to write instead."""
import pytest

from research.telechat.common.errors import ConfigError
from research.telechat.recipe.read import resolve_config, set_key


def recipe():
    return {"seed": 0, "parallel_config": {"model_parallel": 1}, "optimizer": {"learning_rate": 1e-5},
            "lr_schedule": {"learning_rate": 1e-5}, "model": {"model_config": {"seq_length": 8}}}


@pytest.mark.parametrize("dotted", ["seed", "parallel_config.model_parallel", "model.model_config.seq_length",
                                    "model.model_config.new", "predict_batch_size"])
def test_keys_are_set_where_they_are_read(dotted):
    config = recipe()
    set_key(config, dotted, 7)
    for name in dotted.split("."):
        config = config[name]
    assert config == 7


@pytest.mark.parametrize(("dotted", "words"), [
    ("model_parallel", ["--parallel_config.model_parallel"]),
    ("seq_length", ["--model.model_config.seq_length"]),
    ("learning_rate", ["--optimizer.learning_rate or --lr_schedule.learning_rate"]),
    ("modle.model_config.seq_length", ["'modle'", "did you mean 'model'?"]),       # codespell:ignore modle
    ("model.config.seq_length", ["'model.config'", "'model_config'"]),
    ("zzz.seq_length", ["'zzz'", "sections there are: parallel_config, optimizer, lr_schedule, model"]),
    ("seed.x", ["'seed'"]),
])
def test_keys_without_effect_are_refused(dotted, words):
    config = recipe()
    with pytest.raises(ConfigError) as err:
        set_key(config, dotted, 7)
    assert all(word in str(err.value) for word in words), err.value
    assert config == recipe()


def test_a_recipe_of_a_similar_name_is_offered():
    with pytest.raises(ConfigError, match=r"did you mean research/telechat/finetune_telechat_7b\.yaml"):
        resolve_config("research/telechat/finetune_telechat_8b.yaml")
    with pytest.raises(ConfigError, match="recipes are in research/telechat"):
        resolve_config("x.yaml")
