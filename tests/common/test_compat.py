"""Versions: the check at start, with pretended packages; the matrix script; what docs/compatibility.md states."""
import ast
import configparser
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from research.telechat import __version__
from research.telechat.checkpoint.writer import OutTensor
from research.telechat.commands.convert import Sizes, mindspore_target
from research.telechat.common import versions as versions
from research.telechat.common.errors import ConfigError
from research.telechat.data import writer as dataset_writer
from research.telechat.spec.variants import get_variant
from scripts import matrix

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "research/telechat/predict_telechat_tiny_cpu.yaml"
JUNIT = ('<?xml version="1.0"?><testsuites><testsuite name="pytest" errors="{errors}" failures="{failures}" '
         'skipped="3" tests="20"/></testsuites>')


def pretend(folder, name, version, code="", metadata=True):
    """A package of that name and version, in front of the installed one for interpreters with PYTHONPATH=folder."""
    package = folder / name
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f'__version__ = "{version}"\n{code}\n')
    if metadata:
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def start(tmp_path, command=("run_mindformer.py", "--config", RECIPE), **env):
    """run_mindformer.py with the packages pretended in tmp_path."""
    return subprocess.run([sys.executable, *command], cwd=ROOT, text=True, capture_output=True, timeout=120,
                          env={**os.environ, "PYTHONPATH": str(tmp_path), "LOG_MF_PATH": str(tmp_path / "log"), **env})


def one_error(result):
    """The error line of a failed command; there must be nothing but it on stderr."""
    assert result.returncode == 1
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]


@pytest.mark.parametrize("mindformers", versions.TESTED)
def test_tested_pairs_pass_without_a_word(mindformers):
    for mindspore in versions.TESTED[mindformers]:
        assert versions.check_pair(mindformers, mindspore) == []
        assert versions.check_pair(f"{mindformers}.post1", mindspore) == []


@pytest.mark.parametrize(("mindformers", "mindspore", "said"), [
    ("1.5.0", "2.7.0", "mindformers 1.5.0 is too old"),
    ("0.8.0", "2.9.0", "mindformers 0.8.0 is too old"),
    ("1.6.0", "2.6.0rc1", "mindspore 2.6.0rc1 is too old"),
    ("1.9.0", None, "mindspore is not installed"),
    (None, "2.9.0", "mindformers is not installed"),
])
def test_what_cannot_work_is_an_error_with_the_way_out(mindformers, mindspore, said):
    with pytest.raises(ConfigError, match=said) as caught:
        versions.check_pair(mindformers, mindspore)
    assert "pip install mindspore==" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("mindformers", "mindspore", "said"), [
    ("2.0.0", "2.10.0", "never tested"),
    ("1.10.0", "2.9.0", "never tested"),
    ("", "", "unknown version"),
    ("1.9.0", "2.7.2", "mindformers 1.9.0 is tested with mindspore 2.9.0"),
    ("1.6.0", "2.8.0", "mindformers 1.6.0 is tested with mindspore 2.7.0 and 2.7.2"),
])
def test_what_nobody_tried_is_a_warning(mindformers, mindspore, said):
    (warning,) = versions.check_pair(mindformers, mindspore)
    assert said in warning and "pip install mindspore==" in warning


def test_python_38_is_named():
    with pytest.raises(ConfigError, match=r"this is Python 3\.8; Python 3\.9 to 3\.12 is needed"):
        versions.check_pair("1.9.0", "2.9.0", (3, 8))


@pytest.mark.parametrize(("given", "line"), [
    ((None, None), "mindspore==2.9.0 mindformers==1.9.0"),
    ((None, "2.7.1"), "mindspore==2.7.1 mindformers==1.7.0"),             # the driver's MindSpore stays
    ((None, "2.6.0"), "mindspore==2.9.0 mindformers==1.9.0"),
    (("1.6.0", None), "mindspore==2.7.0 mindformers==1.6.0"),
    (("1.6.0", "2.7.2"), "mindspore==2.7.2 mindformers==1.6.0"),
    (("1.8.1", "2.9.0"), "mindspore==2.7.2 mindformers==1.8.0"),
    (("2.0.0", "2.10.0"), "mindspore==2.9.0 mindformers==1.9.0"),
])
def test_advice(given, line):
    assert versions.install_line(*given) == f"pip install {line}"


def test_an_old_mindformers_stops_at_once(tmp_path):
    pretend(tmp_path, "mindformers", "1.5.0", "raise SystemExit('imported')")
    pretend(tmp_path, "mindspore", "2.9.0", "raise SystemExit('imported')")
    assert "mindformers 1.5.0 is too old: the oldest supported is 1.6.0" in one_error(start(tmp_path))


def test_a_checkout_without_metadata_is_read(tmp_path):
    pretend(tmp_path, "mindformers_elsewhere", "1.5.0", metadata=False)
    sys.path.insert(0, str(tmp_path))
    try:
        assert versions.installed_version("mindformers_elsewhere") == "1.5.0"
        assert versions.installed_version("no_such_package_here") is None
    finally:
        sys.path.remove(str(tmp_path))


def test_a_version_that_cannot_be_imported_is_one_line(tmp_path):
    pretend(tmp_path, "mindformers", "2.0.0", "import hyper_parallel_that_is_not_there")
    pretend(tmp_path, "mindspore", "2.10.0", "class Tensor: pass\ndef set_context(*a, **k): pass")
    result = start(tmp_path)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    warning, error = result.stderr.splitlines()
    assert warning.startswith("warning: mindformers 2.0.0 with mindspore 2.10.0 was never tested")
    assert error.startswith("error: mindformers 2.0.0 with mindspore 2.10.0") and "cannot be imported (" in error
    assert "pip install mindspore==2.9.0 mindformers==1.9.0" in error


def test_a_missing_file_of_the_plugin_is_not_blamed_on_the_versions():
    with pytest.raises(ConfigError, match=r"this plugin is incomplete \(No module named 'research.telechat.gone'\)"), \
            versions.fitting_versions():
        import research.telechat.gone  # noqa: F401


def test_only_the_first_rank_warns_and_anyone_may_insist(tmp_path):
    pretend(tmp_path, "mindformers", "1.5.0", "import nothing_of_that_name")
    pretend(tmp_path, "mindspore", "2.6.0", "class Tensor: pass")
    insisted = start(tmp_path, TELECHAT_ANY_VERSION="1")
    assert "too old" in insisted.stderr.splitlines()[0] and insisted.stderr.splitlines()[0].startswith("warning: ")
    assert "cannot be imported" in one_error(start(tmp_path, TELECHAT_ANY_VERSION="1", RANK_ID="3"))


def test_prediction_by_its_own_script_checks_too(tmp_path):
    pretend(tmp_path, "mindformers", "1.3.2")
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"input": "你好"}\n', encoding="utf-8")
    result = start(tmp_path, ("research/telechat/run_telechat_predict.py", "--yaml_file", RECIPE, "--input_file",
                              str(questions)))
    assert "mindformers 1.3.2 is too old" in one_error(result)


def test_preprocessing_misses_mindspore_before_it_begins(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_writer, "installed_version", lambda name: None)
    with pytest.raises(ConfigError, match="mindspore, which writes the data set, is not installed"), \
            dataset_writer.DatasetWriter(tmp_path / "out", {"input_ids": 5}):
        raise AssertionError("begun")
    assert not (tmp_path / "out").exists()


def test_all_source_is_python_39():
    """The oldest Python that is supported has to understand every file, whichever Python runs the tests."""
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, text=True, capture_output=True, check=False).stdout
    files = listed.split() or [str(path.relative_to(ROOT)) for folder in ("research", "scripts", "tests", "benchmarks")
                               for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 50
    for name in files:
        if (ROOT / name).exists():
            ast.parse((ROOT / name).read_text(encoding="utf-8"), name, feature_version=(3, 9))


def test_version_of_the_plugin_is_written_in_one_place(tmp_path):
    """setup.cfg takes it from the package; a converted checkpoint names it (data sets: test_dataset_meta)."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    assert setup["metadata"]["version"] == "attr: research.telechat.__version__"
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)
    sizes = Sizes(get_variant("telechat_12b"), None)
    target = mindspore_target(tmp_path / "x.safetensors", "safetensors", [OutTensor("a", "F32", (2,))], sizes, None)
    assert f'"telechat_version":"{__version__}"'.encode() in target.layouts[0].literals[0][1]


def test_pairs_of_the_matrix():
    pairs = matrix.parse_pairs([], "3.11")
    assert [(pair.mindformers, pair.mindspore) for pair in pairs] == [
        (key, each) for key, value in versions.TESTED.items() for each in value]
    assert matrix.parse_pairs(["1.7.0", "2.0.0:2.10.0"], "3.9") == [("1.7.0", "2.7.1", "3.9"),
                                                                    ("2.0.0", "2.10.0", "3.9")]
    with pytest.raises(ValueError, match=r"mindformers 2\.0\.0 is not in the matrix"):
        matrix.parse_pairs(["2.0.0"], "3.11")
    assert {"tests/training/test_training.py", "tests/recipe/test_config.py"} < set(matrix.TESTS)


@pytest.mark.parametrize(("xml", "counts"), [
    (JUNIT.format(errors=0, failures=0), (17, 0, 3)),
    (JUNIT.format(errors=2, failures=4), (11, 6, 3)),
    (None, (0, 1, 0)),                                                     # pytest did not get so far
])
def test_results_are_counted(tmp_path, xml, counts):
    if xml:
        (tmp_path / "results.xml").write_text(xml)
    assert matrix.count_results(tmp_path / "results.xml") == counts


def test_a_new_result_replaces_the_old_one_of_the_same_versions():
    def row(mindformers, passed, python="3.11"):
        cells = (mindformers, "2.7.2", python, "passed", passed, "0", "1", "2.5", "2026-01-01")
        return dict(zip(matrix.COLUMNS, cells))
    text = matrix.update_table(f"# Head\n{matrix.BEGIN}\n{matrix.END}\ntail\n", [row("1.8.0", "7"), row("1.10.0", "9")])
    changed = matrix.update_table(text, [row("1.8.0", "8"), row("1.8.0", "6", "3.9")])
    assert [(line["mindformers"], line["Python"], line["passed"]) for line in matrix.read_table(changed)] == [
        ("1.8.0", "3.9", "6"), ("1.8.0", "3.11", "8"), ("1.10.0", "3.11", "9")]
    assert changed.startswith("# Head\n") and changed.endswith("\ntail\n")
    with pytest.raises(ValueError, match="end of results"):
        matrix.update_table("no marks", [])


@pytest.mark.parametrize(("arguments", "said"), [
    (["9.9.9"], "not in the matrix"), (["--python", "python0.0"], "python0.0 is not found"),
    (["--write"], "unset TELECHAT_MATRIX_TESTS"),
])
def test_the_script_refuses_wrong_arguments(arguments, said):
    result = subprocess.run(["bash", "scripts/test_matrix.sh", *arguments], cwd=ROOT, text=True, capture_output=True,
                            timeout=60, env={**os.environ, "TELECHAT_MATRIX_TESTS": "tests/none.py",
                                             "TELECHAT_PYTHON": sys.executable})
    assert result.returncode == 2 and said in result.stderr and "Traceback" not in result.stderr


def test_the_document_states_a_result_for_every_tested_pair():
    rows = matrix.read_table(matrix.DOCUMENT.read_text(encoding="utf-8"))
    stated = {(row["mindformers"], row["mindspore"]) for row in rows}
    assert stated >= {(key, each) for key, value in versions.TESTED.items() for each in value}
    for row in rows:
        assert row["result"] == "passed" and row["failed"] == "0" and int(row["passed"]) > 100, row
