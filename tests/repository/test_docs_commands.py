"""Commands in docs/*.md: programs, options, files, recipes and their keys exist, and jobs of several cards are planned.

They are checked as the README's are by test_readme.py, but not run: what they do is tested where it is implemented.
"""
import re
import shlex
from importlib import import_module

import pytest
from readme_fixtures import BLOCK, ROOT, help_of, launched, watched

from research.telechat.commands import plan as plan_command
from research.telechat.recipe.read import read_recipe, resolve_config

ENTRY = import_module(".__main__", "research.telechat")
PAGES = sorted(path.stem for path in ROOT.glob("docs/*.md"))
OURS = ("python", "bash", "telechat")
FOREIGN = ("cp", "curl", "docker", "export", "kubectl", "lm_eval", "pip", "sbatch", "vllm", "vllm-mindspore")
INDENTED = re.compile(rf"^    ((?:{'|'.join((*OURS, *FOREIGN))}) .*)", re.MULTILINE)
INLINE = re.compile(rf"`((?:{'|'.join(OURS)})\s[^`]+)`")
PATH = re.compile(r"^(?:\./)?(?:research|scripts|configs|docker|docs|examples|benchmarks)/[\w./-]*\w$")


def commands_of(page):
    """Commands of bash blocks, indented lines and sentences; continued lines joined, comments left out."""
    text = (ROOT / f"docs/{page}.md").read_text(encoding="utf-8")
    found = [line for language, block in BLOCK.findall(text) if language == "bash"
             for line in block.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]
    prose = BLOCK.sub("", text).replace("\\\n", " ")
    found += INDENTED.findall(prose) + INLINE.findall(prose)
    return list(dict.fromkeys(" ".join(command.split()) for command in found))


ALL = {page: commands_of(page) for page in PAGES}


def options_of(*words):
    """Options of a program of this repository, from its --help. Shell scripts, and benchmarks, which import MindSpore,
    are not started: any word of their text may be an option."""
    if words[0].startswith("benchmarks/") or words[0].endswith(".sh"):
        return frozenset(f"--{word}" for word in re.findall(r"\w+", (ROOT / words[0]).read_text(encoding="utf-8")))
    return frozenset(re.findall(r"--\w+", help_of(*words)))


def program_of(words):
    """(program and subcommands, the words behind them) of a command without `python` or `bash`."""
    if words[0] == "telechat" or words[:2] == ["-m", "research.telechat"]:
        rest = words[1:] if words[0] == "telechat" else words[2:]
        names = {*ENTRY.COMMANDS, "torch-to-ms", "ms-to-torch"}
        count = next((at for at, word in enumerate(rest) if word not in names), len(rest))
        return ("telechat", *rest[:count]), rest[count:]
    return (words[0],), words[1:]


def check_keys(name, dotted):
    """The recipe exists and has these keys. Returns it, or None for a placeholder."""
    if re.fullmatch(r"[A-Z]+\.yaml|\.\.\.", name):
        return None
    recipe = read_recipe(resolve_config(name))
    for option in dotted:
        section = recipe
        for key in option[2:].split(".")[:-1]:
            assert key in section, f"{name} has no section for {option}"
            section = section[key]
    return recipe


def check_plan(words, recipe, ranks):
    """A job of run_mindformer.py, of `telechat run` or of train.sh runs on as many cards as its recipe is for."""
    plan = recipe["parallel_config"]
    cards = plan["data_parallel"] * plan["model_parallel"] * plan["pipeline_stage"] * plan["context_parallel"]
    if recipe["use_parallel"] or ranks > 1:
        assert ranks == cards, f"{ranks} processes, but the recipe is for {cards} cards"
        command = shlex.join(["python", "run_mindformer.py", *words])
        assert plan_command.main(["--command", command, "--ranks", str(ranks), "--check"]) == 0


@pytest.mark.parametrize("page", [page for page in PAGES if ALL[page]])
def test_commands(page):
    for command in ALL[page]:
        check(command)


def check(command):
    words = shlex.split(command, comments=True)
    variables = dict(word.split("=", 1) for word in words if re.match(r"^[A-Z_]+=", word))
    words = [word for word in words if word != "..." and word.split("=")[0] not in variables]
    supervisor, job = watched(shlex.join(words))
    if supervisor:
        assert {word for word in supervisor if word.startswith("--")} - {"--"} <= options_of(supervisor[1]), command
    words, launcher = launched(shlex.join(job))
    words = [word for word in words if word != "..."]
    launcher = None if launcher is None else [word for word in launcher if word != "..."]
    if words[0] in FOREIGN:
        assert all((ROOT / word).exists() for word in words if PATH.match(word)), command
        return
    if words[0] in ("python", "bash", ".venv/bin/python"):
        words = words[1:]
    program, rest = program_of(words)
    if program[0] in ("-m", "-c"):                                            # of Python or another package
        return
    assert program[0] == "telechat" or (ROOT / program[0]).is_file(), command
    options = {word: value for word, value in zip(rest, [*rest[1:], ""]) if re.match("--[a-z]", word)}
    dotted = {option for option in options if "." in option}
    inner = ("run_mindformer.py",) if program[0] == "examples/cluster/train.sh" else program
    unknown = set(options) - dotted - options_of(*inner) - {"--help", "--version"}
    assert not unknown, f"{command}\n{program} has no {unknown}"
    assert all((ROOT / word).exists() for word in rest if PATH.match(word)), command
    recipe = check_keys(options["--config"], dotted) if options.get("--config", "").endswith(".yaml") else None
    trains = program in (("run_mindformer.py",), ("telechat", "run"), ("examples/cluster/train.sh",))
    if recipe is None or not trains:
        return
    if program[0] == "examples/cluster/train.sh":
        rest, ranks = [*rest, "--use_parallel", "True"], 8 * int(variables["MACHINES"])
    else:
        ranks = int(launcher[0] if launcher else 8) if launcher is not None else 1
    check_plan(rest, recipe, ranks)


def test_pages_with_commands_are_read():
    """Blocks, indented lines, sentences: one of each."""
    assert sum(map(len, ALL.values())) >= 80
    assert "python scripts/plan.py --config OLD.yaml --check" in ALL["upgrade"]
    assert any(command.startswith("python scripts/merge_lora.py") for command in ALL["training"])
    assert any(command.startswith("python benchmarks/serve.py") for command in ALL["server"])


@pytest.mark.parametrize("command", [
    "python scripts/plan.py --confg research/telechat/finetune_telechat_7b.yaml",
    "telechat convert --source DIR",
    "python scripts/gone.py",
    "bash scripts/msrun_launcher.sh 'python run_mindformer.py --config research/telechat/finetune_telechat_7b.yaml' 4",
    "python run_mindformer.py --config research/telechat/finetune_telechat_7b.yaml --modl.x 3"])
def test_wrong_commands_are_noticed(command):
    with pytest.raises(AssertionError):
        check(command)
