"""The wheel: what is in it, what it asks of pip, and (slow) that its commands work outside any checkout."""
import email
import shutil
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import standalone
from standalone import MODEL, ROOT, make_inputs, run

from research.telechat.common.errors import ConfigError
from research.telechat.recipe import read

SOURCES = ("setup.cfg", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "constraints.txt",
           "research", "configs")


def build(kind, source, target):
    """Build `source` by the backend that pyproject.toml names, without a network; the path of the result."""
    target.mkdir(parents=True, exist_ok=True)
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(target)!r}))"
    return target / run([sys.executable, "-c", code], source).splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, made as `python -m build` makes it: first the source distribution, and from that the wheel."""
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"                           # setuptools leaves files next to what it builds
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    packed = build("sdist", source, folder / "dist")
    shutil.unpack_archive(packed, folder / "unpacked")
    (unpacked,) = (folder / "unpacked").iterdir()
    return build("wheel", unpacked, folder / "dist")


def test_wheel_holds_the_plugin_its_recipes_and_their_bases_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        kept = (".py", ".yaml", ".html", ".cc", ".h")
        files = {path for path in (ROOT / "research/telechat").rglob("*") if path.suffix in kept}
        expected = {str(path.relative_to(ROOT)) for path in files}
        bases = {f"research/telechat/base/{path.name}" for path in (ROOT / "configs/telechat").glob("*.yaml")}
        assert names == expected | bases and len(bases) >= 5
        assert "research/__init__.py" not in names           # it would hide the plugins of a checkout
        for name in bases:
            assert archive.read(name) == (ROOT / "configs/telechat" / Path(name).name).read_bytes()


def test_pip_leaves_mindspore_and_mindformers_alone(wheel):
    """No requirement, and no extra but `cpu`, names them: those of an Ascend image survive every installation."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    required = metadata.get_all("Requires-Dist")
    ours = [line for line in required if line.lower().startswith(("mindspore", "mindformers"))]
    assert sorted(line.split(";")[0].strip() for line in ours) == ["mindformers", "mindspore"]
    assert all(line.split(";")[1].replace('"', "'").strip() == "extra == 'cpu'" for line in ours)
    # An upper bound would exchange what the image brings; lm-eval alone is pinned, by the extra that asks for it.
    assert not [line for line in required if "extra ==" not in line and any(sign in line.split(";")[0] for sign in
                                                                            ("<", "==", "~="))]


def test_bases_are_found_in_checkout_and_wheel(tmp_path, monkeypatch):
    """As in a wheel: no configs/telechat two folders up, and the bases in the plugin's folder `base`."""
    plugin = tmp_path / "site-packages/research/telechat"
    (plugin / "base").mkdir(parents=True)
    (plugin / "base/common.yaml").write_text("seed: 7\n")
    (plugin / "mine.yaml").write_text("base_config: ../../configs/telechat/common.yaml\nx: 1\n")
    (plugin / "other.yaml").write_text("base_config: ../common.yaml\n")
    monkeypatch.setattr(read, "PLUGIN", plugin)
    monkeypatch.setattr(read, "ROOT", plugin.parents[1])
    monkeypatch.chdir(tmp_path)
    for name in ("mine.yaml", "telechat/mine.yaml", "research/telechat/mine.yaml"):
        assert read.read_recipe(read.resolve_config(name)) == {"seed": 7, "x": 1}
    with pytest.raises(ConfigError, match=r"other\.yaml: base_config \.\./common\.yaml does not exist"):
        read.read_recipe(plugin / "other.yaml")
    checkout = tmp_path / "site-packages/configs/telechat"                      # what is there comes first
    checkout.mkdir(parents=True)
    (checkout / "common.yaml").write_text("seed: 8\n")
    assert read.read_recipe(plugin / "mine.yaml")["seed"] == 8


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Folder `bin` of a fresh venv with the wheel, in which the packages of this environment can be imported too."""
    folder = tmp_path_factory.mktemp("venv")
    run([sys.executable, "-m", "venv", "--without-pip", folder], folder)
    run([sys.executable, "-m", "pip", "--python", folder / "bin/python", "install", "--no-deps", "--no-index", wheel],
        folder)
    (site,) = folder.glob("lib/python*/site-packages")
    # A line is a folder of modules; its own .pth files, with the editable installation of a checkout, are not read.
    (site / "environment.pth").write_text("\n".join(dict.fromkeys(sysconfig.get_paths()[key]
                                                                  for key in ("purelib", "platlib"))) + "\n")
    return folder / "bin"


def location(python, cwd):
    """The folder from which `research.telechat` is imported by an interpreter that is started in `cwd`."""
    return Path(run([python, "-c", "import research.telechat as t; print(t.__file__)"], cwd).strip()).parent


def test_checkout_wins_over_an_installed_wheel(installed, tmp_path):
    """With a research/__init__.py (this repository, MindFormers) and without; elsewhere the wheel is there."""
    python = installed / "python"
    assert installed.parent in location(python, tmp_path).parents
    assert location(python, ROOT) == ROOT / "research/telechat"
    plain = tmp_path / "plain/research/telechat"
    plain.mkdir(parents=True)
    shutil.copy(ROOT / "research/telechat/__init__.py", plain)
    assert location(python, tmp_path / "plain") == plain
    # Other plugins of a MindFormers checkout stay visible, whether its research is a package or a mere folder.
    (tmp_path / "plain/research/other.py").write_text("")
    run([python, "-c", "import research.other"], tmp_path / "plain")


def test_command_of_the_wheel(installed, tmp_path):
    shown = run([installed / "telechat", "--help"], tmp_path)
    for command in ("run", "convert", "preprocess", "chat", "plan", "evaluate", "transform", "merge-lora", "peft"):
        assert f"  {command} " in shown
        assert "usage: telechat " in run([installed / "telechat", command, "--help"], tmp_path)


@pytest.mark.slow
def test_commands_of_the_wheel_work_in_an_empty_folder(installed, tmp_path):
    """Preprocess, convert both ways, plan, and two steps of fine-tuning."""
    inputs, work, telechat = make_inputs(tmp_path / "inputs"), tmp_path / "work", installed / "telechat"
    work.mkdir()
    run([telechat, "preprocess", *standalone.preprocess_options(inputs, Path("dataset"))], work)
    standalone.check_dataset(work / "dataset")
    run([telechat, "convert", "torch-to-ms", "--torch_path", inputs.official, "--mindspore_path", "x.ckpt",
         "--model_name", MODEL], work)
    run([telechat, "convert", "ms-to-torch", "--torch_path", "back", "--mindspore_path", "x.ckpt",
         "--model_name", MODEL, "--config", inputs.official / "config.json"], work)
    standalone.check_round_trip(inputs, work / "back")
    assert "error" not in run([telechat, "plan", "--config", "finetune_telechat2_115b.yaml", "--ranks", "64"], work)
    run([telechat, "run", "--config", "finetune_telechat_tiny_cpu.yaml",
         *standalone.finetune_options(Path("dataset"), Path("x.ckpt"), Path("output"))], work)
    standalone.check_training(work / "output")
