"""README.md and README_CN.md: the files they name exist, their commands are the same, and their options are known.

Nothing is started here but --help and the planner; test_readme_commands.py runs the commands.
"""
import configparser
import re
import shlex

import pytest
from readme_fixtures import ALL, READMES, ROOT, commands_of, help_of, launched, text_of, watched

from research.telechat.commands import plan as plan_command
from research.telechat.recipe.read import read_recipe
from research.telechat.spec.variants import VARIANTS, get_variant
from research.telechat.text.templates import get_template


def check_options(words, dotted):
    """The script exists and has these options; keys of a recipe are `dotted`."""
    assert (ROOT / words[1]).is_file(), words[1]
    options = {word for word in words if word.startswith("--")} - dotted
    unknown = options - set(re.findall(r"--[a-z_]+", help_of(words[1])))
    assert not unknown, f"{words[1]} has no {unknown}"


def test_there_are_commands():
    assert len(ALL) >= 15 and "bash scripts/quickstart.sh" in ALL


def test_both_readmes_have_the_same_commands():
    assert commands_of("README_CN.md") == ALL


def test_both_readmes_have_the_same_figures():
    """Tables of models and measured times agree."""
    figures = [re.findall(r"\d+\.\d+|\d{3,}", text_of(name)) for name in READMES]
    assert set(figures[0]) == set(figures[1])


@pytest.mark.parametrize("name", READMES)
def test_named_files_exist(name):
    text = text_of(name)
    linked = [target for target in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in target]
    folders = r"(?:research|scripts|configs|docs|tests|benchmarks|examples|\.ci)/"
    named = re.findall(rf"(?<![\w/])(?:\./)?({folders}[\w./*-]*|run_mindformer\.py|[A-Z_]+\.md|LICENSE)", text)
    modules = [f"research/telechat/{module}" for module in re.findall(r"(?<![\w/])(telechat_\w+\.py)", text)]
    assert linked and len(named) > 20
    for file in {*linked, *named, *modules}:
        assert list(ROOT.glob(file.rstrip("/"))), f"{name} names {file}, which does not exist"


@pytest.mark.parametrize("command", ALL)
def test_command_has_known_options_and_files(command):
    """Options, subcommands, keys of recipes; and, for a job of several cards, what the planner says to it."""
    if command.startswith("pip "):
        check_installation(command)
        return
    supervisor, job = watched(command)
    if supervisor:
        check_options(supervisor, set())
        assert job[:2] == ["bash", "scripts/msrun_launcher.sh"]
    words, launcher = launched(command)
    assert words[0] in ("python", "bash"), command
    if words[0] == "bash":
        assert len(words) == 2 and (ROOT / words[1]).is_file()
        return
    options = {word: value for word, value in zip(words, [*words[1:], ""]) if word.startswith("--")}
    dotted = {option for option in options if "." in option}
    check_options(words, dotted)
    check_subcommand(words)
    if launcher is not None:
        assert len(launcher) in (0, 1, 5, 8)
    if supervisor:                       # as supervise.py says: the launcher waits, and its logs are those watched
        assert launcher[2:4] == [supervisor[supervisor.index("--log_dir") + 1], "True"]
    if "--config" not in options:
        assert not dotted
        return
    recipe = read_recipe((ROOT / options["--config"]).resolve())
    for option in dotted:
        section = recipe
        for key in option[2:].split("."):
            assert key in section, f"{options['--config']} has no key {option}"
            section = section[key]
    if words[1] != "scripts/transform_checkpoint.py":            # takes from the recipe what the shapes are, no plan
        check_plan(words, recipe, [options["--ranks"]] if "--ranks" in options else launcher)


def check_installation(command):
    """What `pip install` names is this project with an extra that it has."""
    match = re.fullmatch(r"pip install -e '\.\[(\w+)\]'", command)          # zsh takes unquoted brackets for a pattern
    assert match, f"expected pip install -e '.[EXTRA]', found {command}"
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    assert match[1] in setup["options.extras_require"], f"setup.cfg has no extra {match[1]}"


def check_subcommand(words):
    """A word right behind the script is one of the choices that --help shows, or a path."""
    if len(words) > 2 and not words[2].startswith("--") and "/" not in words[2]:
        choices = re.search(r"^ +\{([\w,]+)\}", help_of(words[1]), flags=re.MULTILINE)
        assert choices and words[2] in choices[1].split(","), f"{words[1]} knows no {words[2]!r}"


def check_plan(words, recipe, launcher):
    """The launcher starts as many workers as the recipe's plan has cards, and the planner finds no fault."""
    plan = recipe["parallel_config"]
    cards = plan["data_parallel"] * plan["model_parallel"] * plan["pipeline_stage"] * plan["context_parallel"]
    if launcher is None:
        assert not recipe["use_parallel"] or (recipe["run_mode"] == "predict" and cards == 1)
    else:
        assert int(launcher[0] if launcher else 8) == cards
    if words[1] == "run_mindformer.py":
        assert plan_command.main(["--command", shlex.join(words), "--ranks", str(cards), "--check"]) == 0


@pytest.mark.parametrize("model", ["7b", "12b", "52b"])
def test_sequence_lengths_fit_the_recipes(model):
    """Data made by the README's command have the length that the recipe trains with."""
    commands = [command for command in ALL if "telechat_preprocess" in command]
    lengths = [int(re.search(r"--max_length (\d+)", command).group(1)) for command in commands]
    recipe = read_recipe(ROOT / f"research/telechat/finetune_telechat_{model}.yaml")
    assert recipe["model"]["model_config"]["seq_length"] == lengths[["7b", "12b", "52b"].index(model)]


@pytest.mark.parametrize("command", [command for command in ALL if "--predict_data" in command])
def test_prompts_are_written_as_the_models_have_seen_them(command):
    """52B is asked with the markers of the earlier recipe, as its section says; a model that always has a system
    prompt with a question, which is then written by its template."""
    words, _ = launched(command)
    recipe = read_recipe((ROOT / words[words.index("--config") + 1]).resolve())
    template = get_template(get_variant(recipe["trainer"]["model_name"]).chat_template)
    start, user, bot = (("<reserve3>", "<reserve1>", "<reserve2>") if template.name == "telechat_52b" else
                        (template.prompt_start or "", template.user, template.bot))
    prompt = words[words.index("--predict_data") + 1]
    raw = template.default_for != "always" or template.system is None
    assert re.fullmatch(f"{start}{user}[^<>]+{bot}" if raw else "[^<>]+", prompt)


def test_table_of_models_agrees_with_the_variants():
    for name in READMES:
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text_of(name).splitlines()
                if re.match(r"\| (TeleChat[\d.]*|T1)-", line)]
        assert [row[1] for row in rows] == list(VARIANTS)
        for row, variant in zip(rows, VARIANTS.values()):
            assert row[2] == f"{variant.num_layers} / {variant.hidden_size} / {variant.intermediate_size}"
            assert row[3] == f"{variant.num_heads} / {variant.kv_heads}"


def test_no_npu_is_said_plainly():
    assert "Nothing here has run on an NPU" in text_of("README.md")
    assert "没有在 NPU 上运行过" in text_of("README_CN.md")


def test_number_of_examples_is_the_one_named():
    count = len(text_of("examples/conversations.jsonl").splitlines())
    assert all(re.search(rf"\b{count}\b", text_of(name)) for name in (*READMES, "CHANGELOG.md"))
