"""docs/recipes.md explains every key, once, and truly: defaults are compared with the installed MindFormers."""
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import mindformers
import pytest
import yaml
from mindformers.pet.pet_config import LoraConfig
from mindformers.tools.register import MindFormerRegister
from recipe_classes import KINDS, arguments

from research.telechat.bridge.compat import first_import
from research.telechat.common.errors import ConfigError
from research.telechat.recipe.settings import resolve
from scripts import generated, recipe_table

ROOT = Path(__file__).resolve().parents[2]
ENTRIES = recipe_table.explanations()
PET = f"{recipe_table.MODEL}.pet_config."


def test_document_is_current():
    text = recipe_table.DOCUMENT.read_text(encoding="utf-8")
    part = generated.with_part(text, "recipe_table.py", recipe_table.table())
    assert part == text, "run: python scripts/recipe_table.py --write"


def test_command_checks_and_prints():
    command = [sys.executable, str(ROOT / "scripts/recipe_table.py")]
    assert subprocess.run([*command, "--check"], check=False, timeout=60).returncode == 0
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.rstrip("\n") == recipe_table.table()


def test_key_without_explanation_is_named():
    keys = {**recipe_table.used(), "runner_config.warp": {"finetune_x": 9}, "model.model_config.colour": {"y": 1}}
    found = recipe_table.faults(keys, ENTRIES)
    assert len(found) == 2 and "runner_config.warp" in found[0] and "finetune_x" in found[0]
    assert "model.model_config.colour" in found[1] and "recipe/fields.py" in found[1]


def test_explanation_without_key_is_named():
    entries = {**ENTRIES, "optimizer.warp": recipe_table.Entry("nothing", "", False)}
    found = recipe_table.faults(recipe_table.used(), entries)
    assert len(found) == 1 and "optimizer.warp" in found[0]
    entries["optimizer.warp"] = recipe_table.Entry("nothing", "", True)
    assert recipe_table.faults(recipe_table.used(), entries) == []


def test_new_recipe_is_seen(tmp_path, monkeypatch):
    for folder in ("configs/telechat", "research/telechat"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "research/telechat/finetune_new.yaml").write_text(
        "a: {b: [1, 2], c: {}}\ncallbacks: [{type: Watch, every: 3}]\n")
    monkeypatch.setattr(recipe_table, "ROOT", tmp_path)
    assert recipe_table.used() == {"a.b": {"finetune_new": [1, 2]}, "callbacks.Watch": {"finetune_new": ""},
                                   "callbacks.Watch.every": {"finetune_new": 3}}


def test_table_is_markdown():
    rows = [line for line in recipe_table.table().splitlines() if line.startswith("|")]
    head = len(rows) - len(recipe_table._earlier())
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 5 for row in rows[:head])
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows[head:])


def test_document_without_marks_is_refused():
    with pytest.raises(ValueError, match="marks"):
        generated.with_part("# nothing", "recipe_table.py", "x")


def test_errors_point_to_the_document():
    with pytest.raises(ConfigError, match=r"docs/recipes\.md"):
        resolve({"zzzzzz": 1})
    assert recipe_table.DOCUMENT.is_file()


# ---- against MindFormers

def template_sections():
    """{section: class of MindFormers' template with its keys and defaults}."""
    return first_import("mindformers.tools.register.template:CONFIG_NAME_TO_CLASS",
                        "mindformers.utils.config:CONFIG_NAME_TO_CLASS")


def default_of(cls, name):
    """Default of an argument, of the class or of the parents that it passes it to; `...` without one."""
    for each in cls.__mro__[:-1]:
        made_by = each.__new__ if "__new__" in vars(each) else each.__init__
        parameter = inspect.signature(inspect.unwrap(made_by)).parameters.get(name)
        if parameter is not None:
            return ... if parameter.default is parameter.empty else parameter.default
    return ...


def explained_defaults():
    """(key, default) of scripts/recipe_keys.yaml."""
    def walk(section, prefix):
        for key, value in section.items():
            if isinstance(value.get("meaning"), str):
                yield prefix + key, value.get("default", ...)
            else:
                yield from walk(value, f"{prefix}{key}.")
    return list(walk(yaml.safe_load(recipe_table.EXPLANATIONS.read_text(encoding="utf-8")), ""))


@pytest.mark.skipif(not mindformers.__version__.startswith("1.9"), reason="the document is for MindFormers 1.9")
@pytest.mark.parametrize(("key", "default"), [pytest.param(*row, id=row[0]) for row in explained_defaults()])
def test_default_is_mindformers_own(key, default):
    section, _, name = key.rpartition(".")
    types = {"optimizer": "AdamW", "lr_schedule": "CosineWithWarmUpLR", "runner_wrapper": "MFTrainOneStepCell"}
    if section in types and name != "type":
        expected = default_of(MindFormerRegister.get_cls(KINDS[section], types[section]), name)
    elif section.startswith("callbacks.") and name != "self":
        expected = default_of(MindFormerRegister.get_cls(KINDS["callbacks"], section.split(".")[1]), name)
    elif section == PET[:-1]:
        expected = default_of(LoraConfig, name)
    else:
        template = template_sections().get(section or "general_config")
        expected = getattr(template, name, ...) if template else ...
    expected = OWN_DEFAULT.get(key, expected)
    if default is ...:
        assert expected in (..., None, "") or section in ("optimizer", "lr_schedule") or name == "type", (key, expected)
        return
    if expected is ... and key in READ_WITH_DEFAULT:
        expected = READ_WITH_DEFAULT[key]
    expected = list(expected) if isinstance(expected, tuple) else expected
    assert default == expected, key


# Defaults of this project, where MindFormers has no such key or another default.
OWN_DEFAULT = {
    "check_free_disk": True,                       # run/resources.py
    "checkpoint_conflict": "stop",                 # run/manifests.py
    "check_hashes": True,                          # run/manifests.py
    "checkpoint_meaning": "",                      # run/published.py
    "calculate_per_token_loss": True,              # run/batches.py
}

# Defaults that are set in the code that reads them: MindFormers' context, trainer, and data sets.
READ_WITH_DEFAULT = {
    "use_skip_data_by_global_norm": False,
    **{f"{name}_dataset.{key}": value for name in ("train", "eval") for key, value in (
        ("num_parallel_workers", 1), ("python_multiprocessing", False), ("repeat", 1), ("numa_enable", False),
        ("prefetch_size", 1))},
}


def test_optional_keys_exist():
    """A key that no recipe sets is one that MindFormers, MindSpore or the plugin reads."""
    plugin = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "research/telechat").rglob("*.py"))
    general = set(template_sections()["general_config"].keys())
    trainer = Path(importlib.import_module("mindformers.trainer.trainer").__file__).read_text(encoding="utf-8")
    general |= set(re.findall(r"self\.config\.(\w+)", trainer))
    for key, entry in ENTRIES.items():
        name = key.rpartition(".")[2]
        if not entry.optional or key.startswith(f"{recipe_table.MODEL}."):
            continue
        section = key.split(".")[0]
        known = set(general if section == key else ())
        if section in template_sections():
            known |= set(template_sections()[section].keys())
        if section in KINDS:
            classes = {"lr_schedule": "CosineWithWarmUpLR", "optimizer": "TelechatAdamW"}
            kind = key.split(".")[1] if section == "callbacks" else classes[section]
            known |= arguments(MindFormerRegister.get_cls(KINDS[section], kind))
        elsewhere = {"mempool_block_size", "memory_optimize_level", "save_graphs", "save_graphs_path"}   # of MindSpore
        assert name in known | elsewhere or f'"{name}"' in plugin or name == "pipeline_scheduler", key
