"""The plugin dropped into a checkout of MindFormers: research/telechat and configs/telechat copied there, nothing else.

run_mindformer.py is MindFormers' own there; a stub with the same signature takes its place.
"""
import shutil
import sys

import pytest
import standalone
from standalone import MODEL, ROOT, make_inputs, run

from research.telechat.recipe.read import resolve_config
from scripts import quickstart

DOORS = ("convert_weight_torch_to_ms", "convert_weight_ms_to_torch", "telechat_preprocess", "run_telechat",
         "run_telechat_predict")
# MindFormers 1.6 to 1.9: `main` takes the finished config; the options are read where the file is run.
UPSTREAM = '''"""Run MindFormers from a recipe."""
def main(config):
    raise AssertionError("the plugin has no use for this function")


if __name__ == "__main__":
    raise SystemExit("run as a program")
'''


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A checkout of MindFormers, in a folder of its own, with the plugin."""
    root = tmp_path_factory.mktemp("drop_in") / "mindformers"
    for name in ("research/telechat", "configs/telechat"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "research/__init__.py").write_text("")
    (root / "run_mindformer.py").write_text(UPSTREAM)
    return root


def folders(checkout):
    """Where users start a door from, with its path from there."""
    return {checkout: "research/telechat/", checkout.parent: "mindformers/research/telechat/",
            checkout / "research/telechat": ""}


def test_the_copy_is_what_runs(checkout):
    """This repository is out of reach of the processes of these tests."""
    code = "import research.telechat as t, run_mindformer as r; print(t.__file__, r.__file__)"
    assert run([sys.executable, "-c", code], checkout).split() == [
        str(checkout / "research/telechat/__init__.py"), str(checkout / "run_mindformer.py")]


@pytest.mark.parametrize("door", DOORS)
def test_doors_open_from_every_folder(checkout, door):
    for folder, path in folders(checkout).items():
        assert "usage: " in run([sys.executable, f"{path}{door}.py", "--help"], folder)


def test_commands_open_from_the_root(checkout):
    for command in ("run", "convert", "preprocess", "chat", "plan", "evaluate", "transform", "merge-lora", "peft"):
        assert "usage: " in run([sys.executable, "-m", "research.telechat", command, "--help"], checkout)


def test_own_runner_finds_recipes_from_research(monkeypatch):
    """`cd research; python ../run_mindformer.py --config telechat/...`, as MindFormers' documents have it."""
    monkeypatch.chdir(ROOT / "research")
    recipe = "finetune_telechat_tiny_cpu.yaml"
    assert resolve_config(f"telechat/{recipe}") == resolve_config(recipe) == ROOT / "research/telechat" / recipe
    assert "usage: " in run([sys.executable, "../run_mindformer.py", "--help"], ROOT / "research")


def test_folders_of_the_plugin_hide_no_library(checkout):
    """MindFormers appends --register_path to sys.path, and an old command has it first: `import datasets` and its like
    must find the same as without."""
    libraries = ("datasets", "evaluate", "mindformers", "mindspore", "numpy", "safetensors", "sentencepiece",
                 "tokenizers", "transformers", "torch", "yaml", "tqdm", "matplotlib", "zstandard", "lm_eval", "peft")
    code = ("import importlib.util as u, sys\n"
            f"found = lambda: [(s := u.find_spec(name)) and s.origin for name in {libraries}]\n"
            f"before = found(); sys.path.append({str(checkout / 'research/telechat')!r}); assert found() == before\n"
            "sys.path.insert(0, sys.path.pop()); assert found() == before, (found(), before)")
    run([sys.executable, "-c", code], checkout.parent)
    rooms = {path.parent.name for path in (checkout / "research/telechat").glob("*/__init__.py")}
    assert len(rooms) >= 15 and not rooms & {*libraries, *getattr(sys, "stdlib_module_names", ())}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Files that the commands take."""
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def converted(checkout, inputs, tmp_path_factory):
    """(checkpoint, data set), each made by a door from another folder."""
    folder = tmp_path_factory.mktemp("converted")
    run([sys.executable, "mindformers/research/telechat/convert_weight_torch_to_ms.py", "--torch_path", inputs.official,
         "--mindspore_path", folder / "x.ckpt", "--model_name", MODEL], checkout.parent)
    run([sys.executable, "research/telechat/telechat_preprocess.py",
         *standalone.preprocess_options(inputs, folder / "dataset")], checkout)
    return folder / "x.ckpt", folder / "dataset"


@pytest.mark.slow
def test_convert_and_preprocess(checkout, inputs, converted, tmp_path):
    checkpoint, dataset = converted
    run([sys.executable, "convert_weight_ms_to_torch.py", "--torch_path", tmp_path / "back",
         "--mindspore_path", checkpoint, "--model_name", MODEL, "--config", inputs.official / "config.json"],
        checkout / "research/telechat")
    standalone.check_round_trip(inputs, tmp_path / "back")
    standalone.check_dataset(dataset)


def test_plan(checkout):
    shown = run([sys.executable, "-m", "research.telechat", "plan", "--config",
                 "research/telechat/finetune_telechat2_115b.yaml", "--ranks", "64"], checkout)
    assert "telechat2_115b" in shown and "tokens" in shown


@pytest.mark.slow
def test_finetune_and_predict(checkout, inputs, converted, tmp_path):
    """Two steps by run_telechat.py from the plugin's folder; an answer, and a chat, by run_telechat_predict.py."""
    checkpoint, dataset = converted
    run([sys.executable, "run_telechat.py", "--config", "finetune_telechat_tiny_cpu.yaml", "--run_mode", "finetune",
         "--use_parallel", "False", *standalone.finetune_options(dataset, checkpoint, tmp_path / "output")],
        checkout / "research/telechat")
    trained = standalone.check_training(tmp_path / "output")
    predict = ["--yaml_file", "research/telechat/predict_telechat_tiny_cpu.yaml", "--vocab_file_path", inputs.tokenizer,
               "--checkpoint_path", trained, "--output_dir", tmp_path / "predict", *standalone.KEYS,
               "--model.model_config.max_decode_length", "140"]
    question = quickstart.QUESTIONS[0]
    shown = run([sys.executable, "mindformers/research/telechat/run_telechat_predict.py", "--interactive",
                 *[f"mindformers/{word}" if str(word).startswith("research/") else word for word in predict]],
                checkout.parent, stdin=f"{question}\n")
    assert shown.strip()
