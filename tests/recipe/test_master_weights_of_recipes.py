"""Which master weights a recipe has, and what is refused. The arithmetic: tests/training/test_master_weights.py."""
import copy
from pathlib import Path

import pytest

from research.telechat.common.errors import ConfigError
from research.telechat.plan.plan import read_plan
from research.telechat.recipe.master_weights import apply, choose, hand_over
from research.telechat.recipe.read import read_recipe, set_key
from research.telechat.recipe.settings import resolve

ROOT = Path(__file__).resolve().parents[2]
TRAINING = sorted([*(ROOT / "research/telechat").glob("finetune_*"), *(ROOT / "research/telechat").glob("pretrain_*")])
AMP, TYPE, TABLE, KIND = ("model.model_config.amp_level", "model.model_config.param_init_type",
                          "model.model_config.embedding_init_type", "optimizer.master_weights")


def recipe_of(*settings, name="finetune_telechat_7b"):
    recipe = copy.deepcopy(read_recipe(ROOT / f"research/telechat/{name}.yaml"))
    for key, value in settings:
        set_key(recipe, key, value)
    return recipe


def types(recipe):
    """(parameters, table, norms) of a recipe that `apply` has completed."""
    section = {key: value for key, value in recipe["model"]["model_config"].items() if key != "pet_config"}
    model = resolve(section)
    return model.param_init_type, model.embedding_init_type, model.norm_init_type


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.stem)
def test_every_recipe_keeps_its_updates(path):
    recipe = copy.deepcopy(read_recipe(path))
    chosen = choose(recipe)
    if recipe["model"]["model_config"].get("pet_config"):
        assert chosen is None and recipe["model"]["model_config"]["pet_config"].get(
            "param_init_type", "float32") == "float32"
        return
    assert chosen.kind in ("float32", "remainder")
    apply(recipe)
    assert choose(recipe).kind == chosen.kind                # what checks the completed recipe reads it alike
    hand_over(recipe)
    stored = types(recipe)
    assert stored == (("float32",) * 3 if chosen.kind == "float32" else ("bfloat16", "bfloat16", "float32"))
    assert recipe["optimizer"]["type"] == ("AdamW" if chosen.kind == "float32" else "TelechatAdamW")
    assert ("master_weights" in recipe["optimizer"]) == (chosen.kind == "remainder")


@pytest.mark.parametrize(("settings", "kind", "stored"), [
    ([], "float32", ("float32", "float32", "float32")),
    ([(AMP, "O1")], "float32", ("float32", "float32", "float32")),
    ([(AMP, "O2")], "remainder", ("bfloat16", "bfloat16", "float32")),
    ([(KIND, "remainder")], "remainder", ("bfloat16", "bfloat16", "float32")),
    ([(KIND, "remainder"), (TYPE, "float16")], "remainder", ("float16", "float16", "float32")),
    ([(KIND, "none"), (TYPE, "bfloat16")], "none", ("bfloat16", "bfloat16", "bfloat16")),
    ([(KIND, "none"), (AMP, "O2")], "none", ("bfloat16", "bfloat16", "bfloat16")),
    ([(TABLE, "bfloat16")], "remainder", ("float32", "bfloat16", "float32")),
    ([(AMP, None)], "float32", ("float32", "float32", "float32")),
])
def test_what_keys_mean(settings, kind, stored):
    recipe = recipe_of(*settings)
    assert choose(recipe).kind == kind
    assert read_plan(recipe).remainder == (kind == "remainder")
    apply(recipe)
    assert types(recipe) == stored
    assert choose(recipe).kind == kind and read_plan(recipe).remainder == (kind == "remainder")
    hand_over(recipe)
    assert ("master_weights" in recipe["optimizer"]) == (kind == "remainder")


@pytest.mark.parametrize(("settings", "words"), [
    ([(TYPE, "bfloat16")], ["param_init_type is bfloat16", "1/512", "1e-05", "optimizer.master_weights", "remainder",
                            "float32", "none"]),
    ([(TYPE, "float16")], ["param_init_type is float16", "1/4096"]),
    ([(KIND, "float32"), (AMP, "O2")], ["param_init_type is bfloat16", "most of the training would be lost"]),
    ([(KIND, "float32"), (TABLE, "bfloat16")], ["embedding_init_type is bfloat16"]),
    ([(KIND, "remainder"), (TYPE, "float32")], ["remainder", "float32", "lacks nothing"]),
    ([(KIND, "remainder"), ("optimizer.type", "Came")], ["Came", "AdamW"]),
    ([(AMP, "O2"), ("optimizer.use_fused", True)], ["use_fused"]),
    ([(KIND, "exact")], ["float32, remainder, none", "'exact'"]),
])
def test_what_would_lose_updates_is_refused_in_one_line(settings, words):
    for read in (choose, read_plan):                   # also by scripts/plan.py --check, before a launcher starts
        with pytest.raises(ConfigError) as caught:
            read(recipe_of(*settings))
        assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words)


def test_run_mindformer_refuses_before_the_start(capsys, tmp_path):
    from research.telechat.commands.run import main
    arguments = ["--config", "research/telechat/finetune_telechat_tiny_cpu.yaml", "--output_dir", str(tmp_path),
                 "--train_dataset", str(tmp_path), "--options", f"{TYPE}=bfloat16"]
    assert main(arguments) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "would be lost" in lines[0]


def test_adapters_evaluation_and_prediction_are_left_alone():
    lora = recipe_of(name="finetune_telechat_7b_lora")
    assert choose(lora) is None and types(lora)[0] == "bfloat16"
    for mode in ("eval", "predict"):
        recipe = recipe_of((TYPE, "bfloat16"), (KIND, "remainder"), ("run_mode", mode))
        assert choose(recipe) is None and apply(recipe) == [] and "master_weights" not in recipe["optimizer"]
