"""Disk and host memory that a training will take, by the recipes' own plans; the disk itself is pretended."""
import shutil
from pathlib import Path

import pytest
from mindformers.tools.register import MindFormerConfig

from research.telechat.common.errors import ConfigError
from research.telechat.plan.checkpoints import checkpoints_at_once, saved_bytes, weight_bytes
from research.telechat.plan.plan import read_plan
from research.telechat.recipe.read import read_recipe
from research.telechat.run import resources

ROOT = Path(__file__).resolve().parents[2]
LARGE = ROOT / "research/telechat/finetune_telechat2_115b.yaml"
TB = 10**12


@pytest.fixture
def told(monkeypatch):
    """What is logged, as 'LEVEL text'."""
    lines = []
    for level in ("info", "warning"):
        monkeypatch.setattr(resources.logger, level,
                            lambda text, *values, level=level: lines.append(f"{level} {text % values}"))
    return lines


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A function from (free bytes, settings) to the recipe for 64 cards, on a machine of eight."""
    monkeypatch.setenv("TELECHAT_LOCAL_WORKERS", "8")
    monkeypatch.setenv("RANK_ID", "11")

    def get(free, shared=True, **settings):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9 * TB, 0, free))
        monkeypatch.setenv("SHARED_PATHS", str(tmp_path) if shared else "")
        config = MindFormerConfig(**{**read_recipe(LARGE), "output_dir": str(tmp_path / "new" / "out")})
        config.callbacks[2]["ranks"] = 64                        # as training_setup.complete_monitor does
        for key, value in settings.items():
            (config.callbacks[2] if key in ("keep_checkpoint_max", "async_save") else config)[key] = value
        return config
    return get


def test_a_checkpoint_of_the_largest_model():
    """96 layers of hidden 8192 and feed-forward 40960: 115 billion parameters, with two float32 moments each."""
    plan = read_plan(read_recipe(LARGE))
    whole = sum(saved_bytes(plan, rank) for rank in range(64))
    weights = sum(weight_bytes(plan, rank) for rank in range(64))
    assert 1.1 * TB < whole < 1.45 * TB
    assert whole == pytest.approx(weights * (1 + 8 / (weights / 115.7e9)), rel=0.2)
    tiny = read_plan(read_recipe(ROOT / "research/telechat/finetune_telechat_tiny_cpu.yaml"))
    assert saved_bytes(tiny, 0) == 3 * weight_bytes(tiny, 0)       # float32, two moments
    medium = read_plan(read_recipe(ROOT / "research/telechat/finetune_telechat_52b.yaml"))
    assert saved_bytes(medium, 0) == pytest.approx(6 * weight_bytes(medium, 0), rel=1e-3)    # 16 bits, remainders


def test_what_several_ranks_hold_alike_is_saved_once():
    recipe = read_recipe(LARGE)
    recipe["parallel_config"].update(data_parallel=2)
    recipe["parallel"]["enable_parallel_optimizer"] = False
    plan = read_plan(recipe)
    assert saved_bytes(plan, 0, once=True) == pytest.approx(saved_bytes(plan, 0) / 2, rel=1e-3)


@pytest.mark.parametrize("arguments, count", [
    ((3, 0, 100, 0), 4), ((3, 0, 100, 1000), 4), ((3, 0, 100, 250), 3), ((3, 0, 100, 100), 1),
    ((2, 500, 100, 2000), 7), ((2, 150, 100, 2000), 9), ((5, 1, 1, 2), 2)])
def test_checkpoints_at_once(arguments, count):
    assert checkpoints_at_once(*arguments) == count


def test_a_disk_that_is_too_small(job, told):
    with pytest.raises(ConfigError) as fault:
        resources.check_resources(job(2 * TB), 0)
    text = str(fault.value)
    assert "\n" not in text and "which has 2 TB free" in text and "4 checkpoints at once" in text
    assert "all 64 ranks" in text and "--check_free_disk False" in text
    resources.check_resources(job(6 * TB), 0)
    assert "at most 4 at once" in told[-1] and "6 TB are free" in told[-1]
    resources.check_resources(job(2 * TB), 400)                    # one save, at the end
    config = job(2 * TB, check_free_disk=False)
    resources.check_resources(config, 0)
    assert "check_free_disk" not in config


def test_a_disk_of_each_machine_takes_its_ranks_alone(job, told):
    resources.check_resources(job(TB, shared=False), 0)
    with pytest.raises(ConfigError, match="this machine's 8 ranks"):
        resources.check_resources(job(0.3 * TB, shared=False), 0)


def test_checkpoints_of_the_resumed_run_make_room(job, tmp_path, monkeypatch):
    config = job(0.55 * TB, shared=False, resume_training="telechat_rank_0-2_100.ckpt")
    config.callbacks[2]["continue_run"] = "telechat_rank_11"
    with pytest.raises(ConfigError):
        resources.check_resources(config, 0)
    for rank in range(8, 16):
        folder = tmp_path / "new/out/checkpoint" / f"rank_{rank}"
        folder.mkdir(parents=True)
        with (folder / f"telechat_rank_{rank}-2_100.ckpt").open("wb") as file:
            file.truncate(20 * 10**9)                             # a hole, which takes no room
    resources.check_resources(config, 0)


def test_memory_of_the_host_is_named(job, told, tmp_path, monkeypatch):
    whole = tmp_path / "whole.ckpt"
    with whole.open("wb") as file:
        file.truncate(226 * 10**9)
    resources.check_resources(job(9 * TB, auto_trans_ckpt=True, load_checkpoint=str(whole)), 0)
    advice = next(line for line in told if line.startswith("warning auto_trans_ckpt"))
    assert "226 GB are read for each of the 64 ranks" in advice and "scripts/transform_checkpoint.py" in advice
    memory = [line for line in told if "host memory: " in line]
    assert "226 GB for auto_trans_ckpt" in memory[0] and "async_save" in memory[1]
    told.clear()
    resources.check_resources(job(9 * TB, auto_trans_ckpt=True, load_checkpoint=str(whole), async_save=False,
                                  load_ckpt_format="safetensors"), 0)
    assert not [line for line in told if "transform_checkpoint" in line]


def test_shared_disks(tmp_path, monkeypatch):
    mount = type("Mount", (), {"mountpoint": str(tmp_path), "fstype": "lustre", "opts": ""})
    monkeypatch.delenv("SHARED_PATHS", raising=False)
    assert not resources.is_shared(tmp_path)
    monkeypatch.setattr(resources.psutil, "disk_partitions", lambda all: [
        mount, type("Root", (), {"mountpoint": "/", "fstype": "ext4", "opts": ""})])
    assert resources.is_shared(tmp_path / "x") and not resources.is_shared(Path("/"))
