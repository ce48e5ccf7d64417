"""Which MindFormers and MindSpore belong together, and the check of those installed. Imports neither of them.

The import of a version that does not fit ends in the middle of a long traceback; the check says the same in one line,
within milliseconds. How the versions differ in code is in bridge/compat.py.
"""
import contextlib
import errno
import os
import re
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Tuple

from research.telechat.common.deferred import deferred_imports
from research.telechat.common.environment import rank
from research.telechat.common.errors import ConfigError, OldVersionError

# mindformers -> the mindspore versions it is tested with by scripts/test_matrix.sh, first the one its own docs name
TESTED: Dict[str, Tuple[str, ...]] = {
    "1.6.0": ("2.7.0", "2.7.2"),
    "1.7.0": ("2.7.1",),
    "1.8.0": ("2.7.2",),
    "1.9.0": ("2.9.0",),
}
OLDEST_PYTHON = (3, 9)
ANYWAY = "TELECHAT_ANY_VERSION"            # environment variable: continue despite a failed check
_PACKAGES = ("mindspore", "mindformers")
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR)


def release(version: str) -> Tuple[int, ...]:
    """(major, minor) of a version text such as 2.7.1.post1 or 2.9.0rc1; () where it does not begin with them."""
    match = re.match(r"v?(\d+)\.(\d+)", version)
    return tuple(int(number) for number in match.groups()) if match else ()


def installed_version(package: str) -> Optional[str]:
    """Version of an installed package; "" if it has none to read, None if it is not there. Nothing is imported."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        pass
    spec = find_spec(package)                     # a checkout of the sources on the path has no metadata
    if spec is None:
        return None
    for folder in spec.submodule_search_locations or ():
        for name in ("__init__.py", "version.py"):
            file = Path(folder) / name
            if file.is_file():
                match = re.search(r"^__version__\s*=\s*[\"']([^\"']+)", file.read_text(encoding="utf-8"), re.MULTILINE)
                if match:
                    return match.group(1)
    return ""


def fitting_pair(mindformers: Optional[str] = None, mindspore: Optional[str] = None) -> Tuple[str, str]:
    """(mindspore, mindformers): the tested pair for the release of `mindformers`, else `mindspore`, else the newest.

    An Ascend machine's driver decides the version of MindSpore, so that one which is there stays where it can.
    """
    chosen, partner = max(((key, value[0]) for key, value in TESTED.items()), key=lambda pair: release(pair[0]))
    for key, value in TESTED.items():
        if mindspore in value and not mindformers:
            chosen, partner = key, mindspore
        if mindformers and release(key) == release(mindformers):
            chosen, partner = key, mindspore if mindspore in value else value[0]
    return partner, chosen


def install_line(mindformers: Optional[str] = None, mindspore: Optional[str] = None) -> str:
    """The pip command for `fitting_pair`."""
    partner, chosen = fitting_pair(mindformers, mindspore)
    return f"pip install mindspore=={partner} mindformers=={chosen}"


def check_pair(mindformers: Optional[str], mindspore: Optional[str],
               python: Tuple[int, ...] = tuple(sys.version_info[:2])) -> List[str]:
    """Warnings about a pair of versions (as `installed_version` gives them); none for tested pairs.

    Patch releases count as their minor release. Raises ConfigError: a package is missing; OldVersionError.
    """
    if tuple(python) < OLDEST_PYTHON:
        raise ConfigError(f"this is Python {'.'.join(map(str, python))}; Python 3.9 to 3.12 is needed")
    for name, found in (("mindspore", mindspore), ("mindformers", mindformers)):
        if found is None:
            raise ConfigError(f"{name} is not installed in {sys.executable}; activate the environment that has it, or "
                              f"{install_line(mindformers, mindspore)}")
    assert mindformers is not None and mindspore is not None
    formers, spores = release(mindformers), release(mindspore)
    partners = {release(key): sorted({release(each) for each in value}) for key, value in TESTED.items()}
    oldest = min(partners), min(each for value in partners.values() for each in value)
    for name, found, known, least in (("mindformers", mindformers, formers, oldest[0]),
                                      ("mindspore", mindspore, spores, oldest[1])):
        if known and known < least:
            raise OldVersionError(f"{name} {found} is too old: the oldest supported is {'.'.join(map(str, least))}.0; "
                                  f"{install_line()} ({ANYWAY}=1 tries it anyway)")
    pair = f"mindformers {mindformers or 'of unknown version'} with mindspore {mindspore or 'of unknown version'}"
    if formers not in partners:
        return [f"{pair} was never tested (tested: mindformers {', '.join(TESTED)}); if anything fails, "
                f"{install_line()}"]
    if spores not in partners[formers]:
        fitting = next(key for key in TESTED if release(key) == formers)
        return [f"{pair} do not belong together: mindformers {fitting} is tested with mindspore "
                f"{' and '.join(TESTED[fitting])}; if anything fails, {install_line(fitting)}"]
    return []


def check_versions() -> None:
    """Check what is installed: warnings on stderr (once per job), ConfigError where it cannot work."""
    try:
        warnings = check_pair(installed_version("mindformers"), installed_version("mindspore"))
    except OldVersionError as err:
        if os.environ.get(ANYWAY) != "1":
            raise
        warnings = [str(err)]
    if rank() == 0:
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def fitting_versions() -> Iterator[None]:
    """Put around the imports of MindFormers and what is built on it: `check_versions`, no packages that are hardly ever
    used (common/deferred.py), and one line where they fail.

    Raises ConfigError: the versions are at fault (`versions_at_fault`; it says what to install), the log folder cannot
    be written, or a module is missing. Other errors pass.
    """
    check_versions()
    try:
        with deferred_imports():
            yield
    except (ImportError, AttributeError, OSError) as err:
        if versions_at_fault(err):
            formers, spores = installed_version("mindformers"), installed_version("mindspore")
            raise ConfigError(f"mindformers {formers} with mindspore {spores} in {sys.executable} cannot be imported "
                              f"({type(err).__name__}: {' '.join(str(err).split())}); "
                              f"{install_line(formers, spores)}") from err
        if isinstance(err, OSError) and err.errno in _UNWRITABLE and err.filename:
            raise ConfigError(f"{err.filename} cannot be written: {err.strerror}; MindFormers writes its log there: "
                              "name another folder with --output_dir or LOG_MF_PATH, or change its permissions"
                              ) from err
        name = str(getattr(err, "name", None))
        if isinstance(err, ImportError) and name.startswith("research"):
            raise ConfigError(f"this plugin is incomplete ({err}); copy all of its files again") from err
        if isinstance(err, ModuleNotFoundError):
            raise ConfigError(f"the Python package {name.split('.')[0]} is missing in {sys.executable} ({err}); "
                              "install it there") from err
        raise


def versions_at_fault(err: BaseException) -> bool:
    """Whether `err`, raised while something was imported, says that mindspore or mindformers does not fit.

    It does if a name of theirs is missing, or if one of their modules fails while it is loaded, for want of a module,
    a name or a shared library. A file or folder that cannot be used has other causes.
    """
    if isinstance(err, ImportError):
        return _theirs(err.name) or _while_loading(err)
    if isinstance(err, AttributeError):
        missing = re.match(r"(?:partially initialized )?module '([\w.]+)' has no attribute", str(err))
        return _theirs(missing and missing[1]) or _while_loading(err)
    # ctypes: a shared library that is missing or does not fit has no number
    return isinstance(err, OSError) and err.errno is None and _while_loading(err)


def _theirs(module: Optional[str]) -> bool:
    return str(module).split(".")[0] in _PACKAGES


def _while_loading(err: BaseException) -> bool:
    """Whether one of their modules was being executed when `err` was raised."""
    trace = err.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        if frame.f_code.co_name == "<module>" and _theirs(frame.f_globals.get("__name__")):
            return True
        trace = trace.tb_next
    return False
