"""Every recipe and base loads, builds its config, and says only what makes it different."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from recipe_classes import unknown_arguments

from research.telechat.recipe.read import read_recipe, resolve_config
from research.telechat.spec.variants import VARIANTS
from research.telechat.telechat_config import TelechatConfig

pytestmark = pytest.mark.matrix

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "research/telechat").glob("*.yaml"))
_TELECHAT3 = ("telechat3_36b", "telechat3_coder")
CARDS = {"telechat_52b": 16, **{name: 16 if "35b" in name else 64 for name in VARIANTS if "5b" in name},
         **dict.fromkeys(_TELECHAT3, 16)}
PREDICT_CARDS = {"telechat_52b": 4, **{name: 2 if "35b" in name else 8 for name in CARDS if "5b" in name},
                 "telechat2_35b_32k": 4, **dict.fromkeys(_TELECHAT3, 2)}


def config_of(recipe):
    keys = {key: value for key, value in recipe["model"]["model_config"].items()
            if key not in ("type", "auto_register")}
    plan = {key: value for key, value in recipe["parallel_config"].items() if key != "seq_split_num"}
    return TelechatConfig(parallel_config=plan, **keys)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_builds_its_config(path):
    recipe = read_recipe(path)
    config = config_of(recipe)
    kind = path.stem.split("_")[0]
    assert recipe["run_mode"] == ("finetune" if kind == "pretrain" else kind)      # from weights, too
    assert recipe["trainer"]["model_name"] == recipe["model"]["model_config"]["net_name"]
    if "tiny" in path.stem:
        return
    name = path.stem.split("_", 1)[1]
    variant = VARIANTS[config.net_name]
    assert name == config.net_name or name.startswith(f"{config.net_name}_")
    assert (config.num_layers, config.hidden_size, config.intermediate_size, config.num_heads, config.n_kv_heads) == (
        variant.num_layers, variant.hidden_size, variant.intermediate_size, variant.num_heads, variant.kv_heads)
    assert config.extend_method == ("NTK" if "128k" in path.stem else variant.extend_method)
    assert config.theta == (4e7 if "128k" in path.stem else 1e6 if "32k" in path.stem else variant.theta)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_classes_take_the_keys_of_their_sections(path):
    """MindFormers finds a misspelt key of an optimizer, a schedule or a callback only when it builds it, if at all."""
    assert unknown_arguments(read_recipe(path)) == []


def test_misspelt_key_of_a_section_is_found():
    recipe = read_recipe(ROOT / "configs/telechat/finetune.yaml")
    recipe["lr_schedule"]["warmup_rat"] = 1
    recipe["callbacks"][2]["keep_max"] = 1
    assert unknown_arguments(recipe) == ["lr_schedule.warmup_rat", "callbacks.keep_max"]


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_has_recipes_for_the_cards_that_users_know(name):
    for stem, cards in ((f"finetune_{name}", CARDS.get(name, 8)), (f"predict_{name}", PREDICT_CARDS.get(name, 1))):
        plan = read_recipe(ROOT / f"research/telechat/{stem}.yaml")["parallel_config"]
        found = plan["data_parallel"] * plan["model_parallel"] * plan["pipeline_stage"] * plan["context_parallel"]
        assert found == cards, stem


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_short_and_repeats_nothing(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 45 and text.startswith("# ")
    own = yaml.safe_load(text)
    base = read_recipe((path.parent / own.pop("base_config")).resolve())

    def repeated(over, under, prefix=""):
        for key, value in over.items():
            if isinstance(value, dict) and isinstance(under.get(key), dict):
                yield from repeated(value, under[key], f"{prefix}{key}.")
            elif key in under and under[key] == value:
                yield prefix + key
    assert list(repeated(own, base)) == []


def test_bases_merge_key_by_key(tmp_path):
    (tmp_path / "a.yaml").write_text("x: {p: 1, q: [1, 2]}\ny: 1\n")
    (tmp_path / "b.yaml").write_text("x: {r: 3}\n")
    (tmp_path / "c.yaml").write_text("base_config: [a.yaml, b.yaml]\nx: {q: [3]}\n")
    assert read_recipe(tmp_path / "c.yaml") == {"x": {"p": 1, "q": [3], "r": 3}, "y": 1}


def test_old_command_finds_the_recipe_below_research():
    assert resolve_config("telechat/finetune_telechat_52b.yaml").is_file()


def result_of(script, folder):
    """What `script` prints as JSON behind RESULT, run where MindFormers registers classes as its own script does."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "REGISTER_PATH": str(ROOT / "research/telechat"), "GLOG_v": "3",
           "LOG_MF_PATH": str(folder / "log"), "HOME": str(folder)}
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, env=env, text=True, capture_output=True,
                          check=False, timeout=300)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert lines, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(lines[0].split(" ", 1)[1])


@pytest.fixture(scope="module")
def registered(tmp_path_factory):
    """[{name: module} of the registered classes before and after the model's was, whether MindFormers has the real
    classes]. MindFormers copies the files that `auto_register` names."""
    return result_of("""
import json
import mindformers
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
known = lambda: {name: cls.__module__ for group in MindFormerRegister.registry.values() for name, cls in group.items()}
before = known()
MindFormerRegister.auto_register("telechat.TelechatForCausalLM", module_type="models")
after = known()
for reference, kind in (("telechat_config.TelechatConfig", "config"),
                        ("telechat_tokenizer.TelechatTokenizer", "tokenizer"),
                        ("telechat_tokenizer_fast.TelechatTokenizerFast", "tokenizer")):
    MindFormerRegister.auto_register(reference, module_type=kind)
from research.telechat.telechat import TelechatForCausalLM
from research.telechat.telechat_config import TelechatConfig
from research.telechat.telechat_tokenizer import TelechatTokenizer
found = [MindFormerRegister.get_cls("config", "TelechatConfig") is TelechatConfig,
         MindFormerRegister.get_cls("models", "TelechatForCausalLM") is TelechatForCausalLM,
         MindFormerRegister.get_cls("tokenizer", "TelechatTokenizer") is TelechatTokenizer]
print("RESULT", json.dumps([before, after, found]))
""", tmp_path_factory.mktemp("registered"))


@pytest.mark.slow
def test_classes_exist_once_when_mindformers_copies_the_files(registered):
    """MindFormers' auto_register, as its own run_mindformer.py uses it on these recipes, yields the real classes."""
    assert registered[2] == [True, True, True]


@pytest.mark.slow
def test_everything_that_recipes_name_is_registered_with_the_model(registered):
    """MindFormers' own run_mindformer.py loads what `auto_register` names, nothing else of the plugin: the optimizer,
    the training step and the callbacks of a recipe, named by `type` alone, must come with the model's class."""
    def sections(value):
        for entry in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from sections(entry)
        if isinstance(value, dict) and "type" in value:
            yield value

    found = [section for path in [*RECIPES, *sorted((ROOT / "configs/telechat").glob("*.yaml"))]
             for section in sections(read_recipe(path))]
    # TelechatProcessor: of old recipes, kept for them; nothing makes one.
    alone = {section["type"] for section in found if "auto_register" not in section} - {"TelechatProcessor"}
    assert {"TelechatTrainOneStepCell", "TelechatTrainingLog", "CheckpointMonitor"} <= alone
    before, after, _ = registered
    assert sorted(alone - after.keys()) == []
    assert not before["CheckpointMonitor"].startswith("research"), "MindFormers' own, before the plugin replaces it"
    assert after["CheckpointMonitor"] == "research.telechat.training.saving"
