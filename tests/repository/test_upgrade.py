"""docs/upgrade.md: its commands exist, its conversions work on checkpoints of the earlier form, its tables are true."""
import contextlib
import io
import json
import re
import shlex
from importlib import import_module
from pathlib import Path

import checkpoint_fixtures as checkpoints
import pytest
import yaml

from research.telechat.checkpoint.manifest import FOLDER_NAME, load_manifest, manifest_path
from research.telechat.commands import convert, plan, predict, preprocess, train_legacy, transform
from research.telechat.common.errors import ConfigError
from research.telechat.data.meta import check_dataset_meta, check_hashes, write_meta
from research.telechat.data.writer import DATASET_NAME
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


def options_of(main):
    """Options that --help shows."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    return set(re.findall(r"--\w+", said.getvalue()))


def converting(option):
    """The words behind the script of the page's only conversion with `option`."""
    (words,) = [words for words in COMMANDS if option in words]
    assert MAINS[words[1]] is convert.torch_to_mindspore
    return words[2:]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words[1:4]))
def test_options_of_the_commands_exist(words):
    assert {word for word in words if word.startswith("--")} <= options_of(MAINS[words[1]])


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


@pytest.mark.parametrize(("name", "main"), [
    ("run_telechat.py", train_legacy.main), ("run_telechat_predict.py", predict.main),
    ("convert_weight_torch_to_ms.py", convert.torch_to_mindspore), ("scripts/transform_checkpoint.py", transform.main)])
def test_options_of_the_table_of_commands_exist(name, main):
    """Of the same name as before where the row says so, else those in its last cell."""
    (row,) = [row for row in rows("Commands")[1:] if name in " ".join(row)]
    said = row[0] if "the same options" in row[1] else row[1]
    options = set(re.findall(r"--\w+", said + row[1])) - {"--output_chat"}
    assert options and options <= options_of(main)


def test_preprocessing_has_its_old_options():
    """Those of the README's commands, which are MindFormers'."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit):
        preprocess.parse_arguments(["--help"])
    for option in ("input_dataset_file", "output_path", "vocab_file_path", "max_length", "start_token", "user_token",
                   "bot_token", "end_token", "pad_token"):
        assert f"--{option}" in said.getvalue()
    assert any("telechat_preprocess.py" in row[0] and DATASET_NAME in row[1] for row in rows("Commands"))


def test_scripts_of_earlier_commits_are_there():
    (row,) = [row for row in rows("From earlier commits of this project") if row[0].startswith("`scripts/plan.py`")]
    for name in re.findall(r"[\w/]+\.py", row[0]):
        assert (ROOT / "scripts" / Path(name).name).is_file(), name
    commands = import_module(".__main__", "research.telechat").COMMANDS
    assert {"plan", *re.findall(r"`([\w-]+)`", row[1])} <= set(commands)


def test_prompts_are_those_of_the_templates():
    prompts = {row[0]: row for row in rows("Prompts")[1:]}
    assert "`<_user>question<_bot>`" in prompts["7B, 12B"][1]
    assert (TEMPLATES["telechat"].user, TEMPLATES["telechat"].bot) == ("<_user>", "<_bot>")
    start = TEMPLATES["telechat2_start"]
    assert f"`{start.prompt_start}{start.user}question{start.bot}`" in prompts[
        "TeleChat2, fine-tuned with `research/telechat2`"][1]
    assert TEMPLATES["telechat2"].default_for == "always"                    # the system prompt of the last row


def test_data_sets_of_earlier_commits(tmp_path):
    """Without hashes sizes are checked; a set of TeleChat2 has the template of that time."""
    (tmp_path / DATASET_NAME).write_bytes(b"12345")
    write_meta(tmp_path, {"records": 3, "record_length": 65, "max_token_id": 99, "pad_token_id": 3, "vocab_size": 100,
                          "tokenizer": "t.model", "columns": ["input_ids", "labels"], "template": "telechat2",
                          "files": {DATASET_NAME: 5}})
    fits = {"vocab_size": 100, "seq_length": 64, "pad_token_id": 3}
    assert check_hashes(tmp_path) == 0
    assert check_dataset_meta(tmp_path, **fits, template="telechat2_before") is None
    with pytest.raises(ConfigError, match="uses the chat template 'telechat2_before'"):
        check_dataset_meta(tmp_path, **fits, template="telechat2")
    (tmp_path / DATASET_NAME).write_bytes(b"1234")
    with pytest.raises(ConfigError, match="should have 5 bytes and has 4"):
        check_dataset_meta(tmp_path, **fits, template="telechat2_before")


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
