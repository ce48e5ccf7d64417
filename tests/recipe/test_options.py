"""Options of the commands as {dotted key: value}: one reading, one table."""
from pathlib import Path

import pytest

from research.telechat.commands import plan, predict, run, train_legacy
from research.telechat.common.errors import ConfigError
from research.telechat.recipe.options import (
    OPTION_KEYS,
    all_overrides,
    build_parser,
    overrides_of,
    parse_further,
)
from research.telechat.recipe.read import parse_overrides, read_recipe, set_key

ROOT = Path(__file__).resolve().parents[2]
LEGACY = "research/telechat/finetune_telechat_7b.yaml"


def read(parser, *words):
    return all_overrides(*parser.parse_known_args(["--config", "r.yaml", *words]))


def test_options_set_keys_of_the_recipe():
    assert read(build_parser(), "--epochs", "3", "--use_parallel", "False", "--resume_training", "True",
                "--train_dataset_dir", "data", "--load_checkpoint", "", "--a.b", "1e-5", "--options", "c.d=[1, 2]",
                "e=x") == {
        "runner_config.epochs": 3, "use_parallel": False, "resume_training": True, "load_checkpoint": "",
        "train_dataset.data_loader.dataset_dir": "data", "c.d": [1, 2], "e": "x", "a.b": 1e-5}
    assert read(build_parser()) == {}


def test_every_key_of_the_table_is_in_the_recipes_or_new_at_their_top():
    """set_key refuses a key whose section no recipe has."""
    recipes = [read_recipe(ROOT / f"configs/telechat/{name}.yaml") for name in ("finetune", "predict")]
    for key in OPTION_KEYS.values():
        taken = 0
        for recipe in recipes:
            try:
                set_key(recipe, key, 1)
                taken += 1
            except ConfigError:
                continue
        assert taken, key


def test_every_option_of_run_goes_into_the_recipe_or_to_the_job():
    """No option is read and forgotten, but modal_type, which only MindFormers' own script has a use for."""
    names = {action.dest for action in build_parser()._actions} - {"help"}
    assert names - set(OPTION_KEYS) == {"config", "register_path", "predict_data", "raw", "options", "modal_type"}


def test_the_last_of_equal_keys_counts_and_has_the_last_place():
    overrides = parse_overrides(["a=1", "b=2"], ["--a", "{}", "--a.c", "3"])
    assert list(overrides.items()) == [("b", 2), ("a", {}), ("a.c", 3)]
    assert read(build_parser(), "--epochs", "3", "--runner_config.epochs", "4") == {"runner_config.epochs": 4}


def test_words_of_another_command_are_read_as_run_mindformer_reads_them():
    words = ["--device_target", "CPU", "--batch_size", "2", "--model.model_config.seq_length", "64"]
    assert parse_further(words) == read(build_parser(), *words)
    with pytest.raises(ConfigError, match="unexpected word 'stray'"):
        parse_further(["stray"])


def test_only_named_options_are_taken():
    """--seed and --batch_size of an evaluation are not the recipe's."""
    args, _ = build_parser().parse_known_args(["--config", "r.yaml", "--seed", "1", "--output_dir", "out"])
    assert overrides_of(args, ["output_dir", "use_parallel"]) == {"output_dir": "out"}


@pytest.mark.parametrize(("words", "expected"), [
    ([], {"run_mode": "train", "use_parallel": True}),
    (["--use_parallel", "", "--resume", "", "--load_checkpoint", "", "--auto_trans_ckpt", ""], {"run_mode": "train"}),
    (["--run_mode", "finetune", "--use_parallel", "False", "--seq_length", "64", "--vocab_file", "t.model",
      "--src_strategy", "s", "--resume", "True", "--train_dataset", "d", "--epochs", "2", "--x.y", "1"],
     {"run_mode": "finetune", "use_parallel": False, "model.model_config.seq_length": 64,
      "processor.tokenizer.vocab_file": "t.model", "src_strategy_path_or_dir": "s", "resume_training": True,
      "train_dataset.data_loader.dataset_dir": "d", "runner_config.epochs": 2, "x.y": 1}),
])
def test_the_earlier_script(words, expected, monkeypatch):
    seen = []
    monkeypatch.setattr(train_legacy, "start", lambda *args: seen.append(args))
    assert train_legacy.main(["--config", LEGACY, *words]) == 0
    ((config, overrides, register_path, _, raw),) = seen
    assert (config, overrides, raw) == (LEGACY, expected, False)
    assert Path(register_path) == ROOT / "research/telechat"


def test_the_command_of_a_job_is_planned_with_all_that_it_sets():
    config, overrides = plan.read_command("python run_mindformer.py --config r.yaml --batch_size 4 --epochs 2 --mode 0 "
                                          "--parallel_config.model_parallel 2")
    assert config == "r.yaml"
    assert overrides == {"runner_config.batch_size": 4, "runner_config.epochs": 2, "context.mode": 0,
                         "parallel_config.model_parallel": 2}


def test_an_empty_checkpoint_of_predict_leaves_that_of_the_recipe():
    args = predict.build_parser().parse_args(["--checkpoint_path", "", "--use_past", "False"])
    assert overrides_of(args, ["load_checkpoint", "use_past"]) == {"model.model_config.use_past": False}


def test_an_output_folder_that_cannot_be_written_is_named(tmp_path, capsys, monkeypatch):
    """A file where the folder should be: refused for everybody, root included. No word about versions."""
    monkeypatch.delenv("LOG_MF_PATH", raising=False)
    (tmp_path / "file").touch()
    recipe = "research/telechat/finetune_telechat_tiny_cpu.yaml"
    for words in (["--output_dir", str(tmp_path / "file")], ["--options", f"output_dir={tmp_path}/file/below"]):
        assert run.main(["--config", recipe, *words]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: --output_dir: {tmp_path}/file") and "cannot be written" in line
        assert "pip install" not in line
