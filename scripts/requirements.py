"""Prints the requirements of setup.cfg that this interpreter lacks, one a line, as pip takes them.

For an interpreter that belongs to the user (see env.sh): a package that is there counts whatever its version, because
an Ascend image brings the MindSpore that fits its driver. Needs the standard library only.
"""
import configparser
import re
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import List

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):
    sys.path[0] = str(ROOT)
from research.telechat.common.versions import fitting_pair, installed_version


def requirements(extras: List[str]) -> List[str]:
    """The requirement lines of the project and of `extras`. Raises KeyError on an unknown extra."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    text = config["options"]["install_requires"]
    for extra in extras:
        text += "\n" + config["options.extras_require"][extra]
    return [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]


def is_installed(requirement: str) -> bool:
    """Whether a distribution of this name is there, or a module (a source checkout has no metadata)."""
    name = re.match(r"[A-Za-z0-9._-]+", requirement).group()
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return find_spec(name.replace("-", "_").lower()) is not None
    return True


def missing(extras: List[str]) -> List[str]:
    """The requirement lines that are not installed; of MindSpore and MindFormers the version that fits the other."""
    pair = fitting_pair(installed_version("mindformers"), installed_version("mindspore"))
    versions = dict(zip(("mindspore", "mindformers"), pair))
    return [f"{line}=={versions[line]}" if line in versions else line
            for line in requirements(extras) if not is_installed(line)]


if __name__ == "__main__":
    print(*missing(sys.argv[1:]), sep="\n")
