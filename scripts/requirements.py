"""Prints the requirements of setup.cfg that this interpreter lacks, one a line, as pip takes them.

For an interpreter that belongs to the user (see env.sh): a package that is there counts whatever its version, because
an Ascend image brings the MindSpore that fits its driver. Standard library only.
"""
import configparser
import re
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import List

SETUP = Path(__file__).resolve().parents[1] / "setup.cfg"


def requirements(extras: List[str]) -> List[str]:
    """The requirement lines of the project and of `extras`. Raises KeyError on an unknown extra."""
    config = configparser.ConfigParser()
    config.read(SETUP, encoding="utf-8")
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


if __name__ == "__main__":
    for line in requirements(sys.argv[1:]):
        if not is_installed(line):
            print(line)
