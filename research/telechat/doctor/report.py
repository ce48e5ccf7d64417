"""The findings as a table, as a summary, and as JSON to attach to an issue."""
import json
import platform
from importlib import metadata
from pathlib import Path
from typing import List, Sequence

from research.telechat import __version__
from research.telechat.common.errors import ConfigError
from research.telechat.common.files import JsonObject, check_output_folder, refuse_foreign, write_json
from research.telechat.common.table import table
from research.telechat.doctor.checks import VERDICTS, WRONG, Finding
from research.telechat.doctor.device import Device

FORM = "telechat doctor 1"                   # marks a file of this command


def text(findings: Sequence[Finding]) -> str:
    """The table."""
    return table([["verdict", "check", "expected", "found"],
                  *([one.verdict, one.name, one.expected, one.found] for one in findings)])


def summary(findings: Sequence[Finding]) -> str:
    """The number of each verdict, and what to avoid."""
    counts = [(sum(one.verdict == verdict for one in findings), verdict) for verdict in VERDICTS]
    lines = [", ".join(f"{count} {verdict}" for count, verdict in counts if count)]
    lines += [f"{one.name} is wrong: do not use {one.avoid}" for one in findings if one.verdict == WRONG]
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def as_json(findings: Sequence[Finding], device: Device, complete: bool) -> JsonObject:
    """complete: all checks have run."""
    return {"form": FORM, "complete": complete, "device": device.name, "ranks": device.ranks, "rank": device.rank,
            "versions": {"telechat": __version__, "python": platform.python_version(),
                         **{name: _version(name) for name in ("mindspore", "mindformers", "numpy")}},
            "machine": platform.machine(), "findings": [one._asdict() for one in findings]}


def is_ours(path: Path) -> bool:
    """Whether an earlier run of this command wrote the file."""
    try:
        found: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("form") == FORM


def check_target(path: Path, overwrite: bool) -> None:
    """Check up front that the file can be written and overwrites no other program's file. Raises ConfigError."""
    if path.is_dir():
        raise ConfigError(f"--json {path} is a folder; name a file")
    check_output_folder(path.resolve().parent, "--json:")
    refuse_foreign([path], is_ours, overwrite)


def save(path: Path, report: JsonObject) -> None:
    """Write the file."""
    write_json(path, report)


def exit_code(findings: List[Finding]) -> int:
    """1 if anything is wrong."""
    return int(any(one.verdict == WRONG for one in findings))
