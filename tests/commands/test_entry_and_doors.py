"""`python -m research.telechat COMMAND`: the table of commands, their help, what is imported for it."""
import inspect
import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from research.telechat import __main__ as entry
from research.telechat import __version__

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = ROOT / "research/telechat"
DOORS = [*(PLUGIN / name for name in ("convert_weight_torch_to_ms.py", "convert_weight_ms_to_torch.py",
                                      "telechat_preprocess.py", "run_telechat.py", "run_telechat_predict.py")),
         *(ROOT / "scripts" / name for name in ("plan.py", "evaluate.py", "transform_checkpoint.py", "merge_lora.py",
                                                "convert_lora.py")), ROOT / "run_mindformer.py"]
# Starts the command in a process and says afterwards which of these packages it has imported.
WATCHED = ("mindspore", "mindformers", "numpy", "torch", "yaml", "argparse")
PROBE = f"""
import json, sys
from research.telechat.__main__ import main
try:
    code = main(sys.argv[1:])
except SystemExit as err:
    code = err.code
print(json.dumps([code, sorted(set({WATCHED!r}) & set(sys.modules))]), file=sys.stderr)
"""


def start(*words, cwd=ROOT):
    """(exit code, packages imported, stdout, other lines of stderr)."""
    done = subprocess.run([sys.executable, "-c", PROBE, *words], cwd=cwd, capture_output=True, text=True, timeout=120,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    *lines, last = done.stderr.splitlines()
    return (*json.loads(last), done.stdout, lines)


def test_the_table_itself_imports_next_to_nothing(tmp_path):
    code, imported, out, err = start("--help", cwd=tmp_path)
    assert (code, imported, err) == (0, [], []) and all(f"  {name} " in out for name in entry.COMMANDS)


def test_every_entry_takes_the_words_and_gives_an_exit_code():
    for name, command in entry.COMMANDS.items():
        module, _, function = command.entry.partition(":")
        found = getattr(import_module(f"research.telechat.commands.{module}"), function)
        (parameter,) = inspect.signature(found).parameters.values()
        assert parameter.default is None, name


@pytest.mark.parametrize("words", [*([name] for name in entry.COMMANDS), ["convert", "torch-to-ms"],
                                   ["convert", "ms-to-torch"]], ids=" ".join)
def test_help_of_every_command_from_anywhere_without_mindspore(words, tmp_path):
    code, imported, out, err = start(*words, "--help", cwd=tmp_path)
    assert (code, err) == (0, []) and out.startswith(f"usage: telechat {' '.join(words)} ")
    assert not {"mindspore", "mindformers", "torch"} & set(imported)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("door", DOORS, ids=lambda path: path.name)
def test_doors_are_short_and_start_from_anywhere(door, tmp_path):
    assert len(door.read_text(encoding="utf-8").splitlines()) <= 15
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, str(door), "--help"], cwd=tmp_path, capture_output=True, text=True,
                          timeout=120, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith(f"usage: {door.name} ")


def test_what_is_no_command(capsys):
    assert entry.main(["--version"]) == 0
    assert capsys.readouterr().out == f"telechat {__version__}\n"
    assert entry.main([]) == 2
    assert "usage: telechat COMMAND" in capsys.readouterr().err
    assert entry.main(["evaluat", "--x"]) == 2
    assert "there is no command 'evaluat'; did you mean 'evaluate'?" in capsys.readouterr().err
    assert entry.main(["qqqq"]) == 2
    err = capsys.readouterr().err
    assert "did you mean" not in err and ", ".join(entry.COMMANDS) in err


def test_errors_of_commands_come_through(capsys):
    assert entry.main(["run", "--config", "none.yaml"]) == 1
    assert entry.main(["plan"]) == 1
    assert entry.main(["peft", "import", "--adapter", "a.ckpt", "--peft_dir", "no_such_folder"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith("error: ") for line in lines)
