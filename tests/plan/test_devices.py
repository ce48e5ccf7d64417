"""Hardware other than the recipes': memory, speed and types that the planner knows of it, and what is refused."""
from dataclasses import replace
from pathlib import Path

import pytest
from mindformers.tools.register import MindFormerConfig

from research.telechat.commands.plan import main
from research.telechat.common.errors import ConfigError
from research.telechat.plan.cost import link_of
from research.telechat.plan.plan import chip_faults, read_plan, usable_gb
from research.telechat.plan.timing import bandwidth, step_time
from research.telechat.recipe.read import read_recipe
from research.telechat.run import preflight
from research.telechat.spec.flops import DEVICES

ROOT = Path(__file__).resolve().parents[2]
SEVEN = ["--config", "research/telechat/finetune_telechat_7b.yaml"]


@pytest.fixture(scope="module")
def plan():
    return read_plan(read_recipe(ROOT / "research/telechat/finetune_telechat2_115b.yaml"))


def test_links_of_each(plan):
    """8 dies of an A3 share a switch; of a 910A four cards are joined; both rules are those of the table."""
    a3, first = (replace(plan, chip=DEVICES[name]) for name in ("A3", "910A"))
    assert bandwidth(a3, "mp") == bandwidth(replace(a3, mp=2), "mp") == 196e9
    assert link_of(replace(a3, mp=8, dp=2, pp=4), "dp") == "machine"                 # 16 dies
    assert link_of(first, "mp") == "network" and bandwidth(first, "mp") == 12.5e9
    assert bandwidth(replace(first, mp=4), "mp") == 90e9


def test_slower_hardware_is_slower(plan):
    seconds = {name: step_time(replace(plan, chip=chip)).seconds for name, chip in DEVICES.items()}
    assert seconds["A3"] < seconds["A2"] < seconds["910B4"] < seconds["910A"]
    assert step_time(plan).seconds == seconds["A2"]


def test_memory_of_the_card_is_the_limit(plan, capsys):
    assert {name: usable_gb(chip) for name, chip in DEVICES.items()} == {"A2": 58, "A3": 58, "910B4": 29, "910A": 29}
    assert [*chip_faults(plan), *chip_faults(replace(plan, chip=DEVICES["A3"]))] == []
    (fault,) = chip_faults(replace(plan, chip=DEVICES["910B4"]))
    assert "context.max_device_memory is 58GB, but Ascend 910B4 (32 GB) has 32 GB: set it to 29GB" in fault
    assert main([*SEVEN, "--device", "910B4"]) == 0
    out = capsys.readouterr().out
    assert "of 29 GB" in out and "280 TFLOP/s" in out and "of a card's 32" in out
    assert main([*SEVEN, "--device", "910B4", "--context.max_device_memory", "40GB", "--check"]) == 1


def test_910a_is_planned_in_float16_only(capsys, tmp_path, monkeypatch):
    assert main([*SEVEN, "--device", "910A", "--check"]) == 1
    assert main([*SEVEN, "--search", "--device", "910A", "--cards", "8"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all("has no bfloat16: set model_config.compute_dtype to float16" in line for line in lines)
    assert main([*SEVEN, "--device", "910A", "--model.model_config.compute_dtype", "float16", "--check"]) == 0


def test_a_searched_recipe_keeps_the_options_of_its_search(capsys, tmp_path, monkeypatch):
    """Limit, length and types that the search was given are in the recipe that it writes."""
    path = tmp_path / "found.yaml"
    assert main([*SEVEN, "--search", "--cards", "8", "--device", "910A", "--seq_length", "1024", "--write_recipe",
                 str(path), "--model.model_config.compute_dtype", "float16"]) == 0
    assert "(Ascend 910A" in capsys.readouterr().out
    written = read_recipe(path)
    keys = written["model"]["model_config"]
    assert (written["context"]["max_device_memory"], keys["seq_length"], keys["compute_dtype"]) == (
        "29GB", 1024, "float16")
    assert "planned_for" not in written
    assert main(["--config", str(path), "--device", "910A", "--ranks", "8", "--check"]) == 0


@pytest.mark.parametrize(("name", "refused"), [("Ascend910A", True), ("Ascend910", True), ("Ascend910ProB", True),
                                               ("Ascend910B3", False), ("Ascend910_9392", False), ("CPU", False),
                                               ("", False)])
def test_a_job_on_910a_is_refused_before_it_starts(name, refused, monkeypatch):
    monkeypatch.setattr(preflight, "chip_name", lambda: name)
    job = MindFormerConfig(model={"model_config": {"compute_dtype": "bfloat16", "rotary_dtype": "float32"}})
    if refused:
        with pytest.raises(ConfigError, match=rf"^{name} has no bfloat16: set model_config.compute_dtype to float16"):
            preflight.check_bfloat16(job)
    else:
        preflight.check_bfloat16(job)
    preflight.check_bfloat16(MindFormerConfig(model={"model_config": {"compute_dtype": "float16"}}))
