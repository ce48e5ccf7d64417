"""What a test needs of the machine: without it the test is skipped, or fails with CI=true, as nothing may miss."""
import os
import shutil
from typing import Any

import pytest


def require(found: Any, why: str) -> None:
    """Go on if `found` is true. Otherwise skip the test because of `why`, or fail with CI=true in the environment."""
    if found:
        return
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(f"{why}; with CI=true nothing may be missing")
    pytest.skip(why)


def program(name: str) -> str:
    """Path of a program, which is required."""
    path = shutil.which(name)
    require(path, f"needs the program {name}, which is not on PATH")
    return str(path)
