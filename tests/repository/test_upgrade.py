"""docs/upgrade.md: its commands exist, its conversions work on checkpoints of the earlier form, its tables are true."""
import contextlib
import io
import json
import re
import shlex
from pathlib import Path

import checkpoint_fixtures as checkpoints
import pytest
import yaml

from research.telechat.checkpoint.manifest import FOLDER_NAME, load_manifest, manifest_path
from research.telechat.commands import convert, plan, transform
from research.telechat.recipe.options import build_parser
from research.telechat.recipe.read import read_recipe
from research.telechat.spec.hf_config import hf_config
from research.telechat.text.templates import TEMPLATES

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/upgrade.md").read_text(encoding="utf-8")
COMMANDS = [shlex.split(line) for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
            for line in block.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]
MAINS = {"research/telechat/convert_weight_torch_to_ms.py": convert.torch_to_mindspore,
         "scripts/transform_checkpoint.py": transform.main, "scripts/plan.py": plan.main}


def converting(option):
    """The words behind the script of the page's only conversion with `option`."""
    (words,) = [words for words in COMMANDS if option in words]
    assert MAINS[words[1]] is convert.torch_to_mindspore
    return words[2:]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words[1:4]))
def test_options_of_the_commands_exist(words):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit) as end:
        MAINS[words[1]](["--help"])
    assert end.value.code == 0
    assert {word for word in words if word.startswith("--")} <= set(re.findall(r"--\w+", said.getvalue()))


def test_52b_of_an_earlier_converter(tmp_path):
    variant = checkpoints.small_variant("telechat_52b", heads=8, head_dim=16, ffn=64)
    official = checkpoints.official_tensors(variant, "F32")
    old = tmp_path / "OLD.safetensors"
    checkpoints.write_safetensors(old, checkpoints.mindspore_tensors(variant, official, mp=8), {"format": "ms"})
    (tmp_path / "config.json").write_text(json.dumps(hf_config(variant)))
    words = [word.replace("OLD.ckpt", str(old)).replace("NEW.ckpt", str(tmp_path / "NEW.safetensors"))
             for word in converting("--source_mp")]
    assert convert.torch_to_mindspore(words) == 0
    found = checkpoints.read_safetensors(tmp_path / "NEW.safetensors")
    checkpoints.assert_same(found, checkpoints.mindspore_tensors(variant, official))


def test_a_complete_checkpoint_gets_a_manifest(tmp_path):
    variant = checkpoints.small_variant("telechat2_7b")
    tensors = checkpoints.mindspore_tensors(variant, checkpoints.official_tensors(variant, "F32"))
    checkpoints.write_safetensors(tmp_path / "OLD.safetensors", tensors, {"format": "ms"})
    (tmp_path / "OFFICIAL").mkdir()
    (tmp_path / "OFFICIAL/config.json").write_text(json.dumps(hf_config(variant)))
    (words,) = [words[2:] for words in COMMANDS if "OFFICIAL" in words]
    names = {"OLD.ckpt": "OLD.safetensors", "NEW.ckpt": "NEW.safetensors", "OFFICIAL": "OFFICIAL"}
    assert convert.torch_to_mindspore([str(tmp_path / names[word]) if word in names else word for word in words]) == 0
    checkpoints.assert_same(checkpoints.read_safetensors(tmp_path / "NEW.safetensors"), tensors)
    facts = load_manifest(manifest_path(tmp_path / "NEW.safetensors", False)).model
    assert facts.name == "telechat2_7b" and facts.to_variant().rms_norm_eps == 1e-5
    assert not (tmp_path / FOLDER_NAME).exists()


def test_fused_weights_of_telechat2_are_refused(tmp_path, capfd):
    """What `--qkv_concat True` made: w_qkv and w_gate_hidden in a model whose table has neither."""
    variant = checkpoints.small_variant("telechat2_7b")
    tensors = checkpoints.mindspore_tensors(variant, checkpoints.official_tensors(variant, "F32"))
    for layer in range(variant.num_layers):
        for old in ("attention.wq", "attention.wk_v", "feed_forward.w1", "feed_forward.w3"):
            del tensors[f"model.layers.{layer}.{old}.weight"]
        for new in ("attention.w_qkv", "feed_forward.w_gate_hidden"):
            tensors[f"model.layers.{layer}.{new}.weight"] = checkpoints.from_floats("F32", [0.0])
    checkpoints.write_safetensors(tmp_path / "old.safetensors", tensors, {"format": "ms"})
    (tmp_path / "config.json").write_text(json.dumps(hf_config(variant)))
    assert convert.torch_to_mindspore(["--from_mindspore", str(tmp_path / "old.safetensors"), "--mindspore_path",
                                       str(tmp_path / "new.ckpt"), "--model_name", "telechat2_7b"]) == 1
    assert "w_qkv" in capfd.readouterr().err


# In the form of the recipes of MindFormers 1.8; tests/recipe/test_old_recipes.py has every key.
OLD_RECIPE = {
    "run_mode": "finetune", "trainer": {"type": "CausalLanguageModelingTrainer", "model_name": "telechat_7b"},
    "runner_config": {"epochs": 10, "batch_size": 1, "sink_mode": True, "sink_size": 1}, "use_parallel": True,
    "optimizer": {"type": "AdamW", "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1},
    "parallel": {"parallel_mode": 1, "full_batch": True, "enable_parallel_optimizer": True,
                 "parallel_optimizer_config": {"parallel_optimizer_threshold": 64}},
    "parallel_config": {"data_parallel": 8, "model_parallel": 1, "pipeline_stage": 1, "use_seq_parallel": True,
                        "micro_batch_num": 1, "vocab_emb_dp": False},
    "callbacks": [{"type": "MFLossMonitor"}, {"type": "ObsMonitor"}],
    "context": {"device_target": "Ascend", "max_device_memory": "58GB", "enable_graph_kernel": False},
    "model": {"arch": {"type": "TelechatForCausalLM"}, "model_config": {
        "type": "TelechatConfig", "seq_length": 8192, "hidden_size": 4096, "num_layers": 30, "num_heads": 32,
        "vocab_size": 131072, "rms_norm_eps": 1e-5, "intermediate_size": 12288, "compute_dtype": "bfloat16",
        "param_init_type": "float32", "pretrain_seqlen": 4096, "extend_method": "None", "use_flash_attention": True}}}


def test_an_old_recipe_is_checked(tmp_path, capfd):
    (words,) = [words[2:] for words in COMMANDS if words[1] == "scripts/plan.py"]
    path = tmp_path / "old.yaml"
    path.write_text(yaml.safe_dump(OLD_RECIPE))
    words = [str(path) if word == "OLD.yaml" else word for word in words]
    assert plan.main(words) == 0 and capfd.readouterr().err == ""
    path.write_text(yaml.safe_dump({**OLD_RECIPE, "parallel_config": {"data_parallel": 8, "model_parallel": 3}}))
    assert plan.main(words) == 1


def rows(heading):
    """The cells of the rows of the tables below a heading."""
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)[1]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines()
            if line.startswith("|") and not line.startswith("|---")]


def test_modules_have_moved_as_the_table_says():
    moved = [row for row in rows("From earlier commits of this project") if row[0].startswith("`telechat_")]
    assert len(moved) >= 9
    for old, new in moved:
        olds, news = re.findall(r"`([\w/.]+)`", old), re.findall(r"`([\w/.]+)`", new)
        assert len(olds) == len(news)
        assert not any((ROOT / "research/telechat" / name).exists() for name in olds)
        assert all((ROOT / "research/telechat" / name).is_file() for name in news)


def test_settings_that_keep_the_old_numbers_exist():
    """Options are the command's, keys of model_config and optimizer are those of a recipe, templates are known."""
    known = {option for action in build_parser()._actions for option in action.option_strings}
    recipe = read_recipe(ROOT / "research/telechat/finetune_telechat_7b.yaml")
    fields = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    table = rows("What changes the numbers")[1:]
    assert len(table) >= 10 and all(len(row) == 4 and row[3] for row in table)
    for option in {option for row in table for option in re.findall(r"--[\w.]+", row[3])}:
        if "." in option:
            section, key = option[2:].split(".", 1)
            assert section in recipe and f"`{key.rpartition('.')[2]}`" in fields, option
        else:
            assert option in known, option
    templates = set(re.findall(r"\btelechat2_(?:start|before)\b", PAGE))
    assert len(templates) == 2 and templates <= set(TEMPLATES)
