"""CONTRIBUTING.md and the checks before a commit: versions, files and links are those of the project."""
import configparser
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
REPOS = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
HOOKS = {hook["id"]: hook for repo in REPOS for hook in repo["hooks"]}


def pinned():
    """{distribution: version} of the extra `dev`."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    return dict(re.findall(r"^([\w-]+)==([\w.]+)$", setup["options.extras_require"]["dev"], re.MULTILINE))


def test_checks_before_a_commit_are_those_of_the_tests():
    """A hook with an environment of its own installs the version that `dev` pins; the others run in that of `dev`."""
    assert set(HOOKS) == {"ruff", "codespell", "mypy"} <= set(pinned())
    for name, hook in HOOKS.items():
        if hook["language"] == "python":
            assert hook["additional_dependencies"] == [f"{name}=={pinned()[name]}"], f".pre-commit-config.yaml: {name}"
        else:
            assert hook["language"] == "system" and hook["entry"].startswith(f"python -m {name}")


def test_hooks_need_no_other_host():
    assert [repo["repo"] for repo in REPOS] == ["local"]


def headings(path):
    """Anchors of a page, as GitHub makes them."""
    return {re.sub(r"[^\w -]", "", line.lstrip("# ")).strip().lower().replace(" ", "-")
            for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")}


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([\w./]+)(?:#([\w-]+))?\)", TEXT)
    assert len(links) > 4
    for file, anchor in links:
        assert (ROOT / file).exists(), file
        assert not anchor or anchor in headings(ROOT / file), f"{file} has no heading #{anchor}"


@pytest.mark.parametrize("name", ["README.md", "README_CN.md"])
def test_readmes_link_to_it(name):
    assert "](CONTRIBUTING.md)" in (ROOT / name).read_text(encoding="utf-8")


def test_named_tests_exist():
    """Examples of commands select tests that there are."""
    chosen = re.findall(r"^python -m pytest (\S+)(?: -k (\w+))?", TEXT, re.MULTILINE)
    assert chosen
    for path, word in chosen:
        assert (ROOT / path).exists()
        assert not word or re.search(rf"def test_\w*{word}", (ROOT / path).read_text(encoding="utf-8"))
