"""Compare what this machine's device computes with NumPy, before you train on it.

    telechat doctor                                            one card, or a CPU
    telechat doctor --json doctor.json                         a file to attach to an issue
    telechat doctor --only attention cache                     checks whose names contain a word
    bash scripts/msrun_launcher.sh "-m research.telechat doctor" 8 8118 output/doctor True 600        eight cards

The exit code is 1 if something is wrong; the output then says what to avoid in a recipe (docs/doctor.md).
"""
import argparse
import logging
import os
import sys
import tempfile
import threading
from pathlib import Path
from typing import Dict, List, Optional, TextIO

import numpy as np

from research.telechat.commands import transform
from research.telechat.commands.help_text import HelpFormatter
from research.telechat.common.command import run_command
from research.telechat.common.console import only_own_warnings
from research.telechat.common.environment import writes
from research.telechat.common.errors import ConfigError
from research.telechat.doctor import report
from research.telechat.doctor.checkpoint_checks import Transform
from research.telechat.doctor.checks import WRONG, Check, Finding, Outcome, examine_all, shared
from research.telechat.doctor.device import Device
from research.telechat.doctor.registry import all_checks, chosen


def build_parser() -> argparse.ArgumentParser:
    """All options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--json", type=Path, help="file to write the results to")
    add("--overwrite", action="store_true", help="let --json replace a file that this command did not write")
    add("--only", nargs="+", default=[], metavar="WORD", help="only checks whose names contain one of these words")
    add("--list", action="store_true", help="print the names of all checks and exit")
    add("--timeout", type=float, default=300, help="seconds that one check may take; it ends the command")
    return parser


def _save(values: Dict[str, np.ndarray], path: Path) -> None:
    import mindspore as ms
    ms.save_checkpoint([{"name": name, "data": ms.Tensor(value)} for name, value in values.items()], str(path))


def _transform(words: List[str]) -> None:
    transform.run(transform.build_parser().parse_args(words))


TRANSFORM = Transform(
    _save, lambda source, target, strategy: _transform(
        ["--source", str(source), "--target", str(target), "--target_strategy", str(strategy)]),
    lambda source, target, strategy: _transform(
        ["--source", str(source), "--source_strategy", str(strategy), "--target", str(target)]))


SHARING = Check("findings of all cards", lambda _device: Outcome("", "", True), "several cards")


class Watch:
    """Shows which check is being made, and ends the process where one does not end: a rank may wait for another one
    for ever, where no Python runs."""

    def __init__(self, seconds: float, findings: List[Finding], args: argparse.Namespace, device: Device):
        self.seconds, self.findings, self.args, self.device = seconds, findings, args, device
        self.output = sys.stdout                             # checks replace it while MindFormers prints
        self.timer: Optional[threading.Timer] = None
        self.check: Optional[Check] = None

    def progress(self, number: int, count: int, check: Check) -> None:
        """The next check begins."""
        self.stop()
        self.check = check
        print(f"[{number + 1}/{count}] {check.name}", file=sys.stderr, flush=True)
        self.timer = threading.Timer(self.seconds, self.give_up)
        self.timer.daemon = True
        self.timer.start()

    def stop(self) -> None:
        """The last one has ended."""
        if self.timer is not None:
            self.timer.cancel()

    def give_up(self) -> None:
        """Say what hangs, write what is known, and end."""
        check = self.check
        if check is None:
            return
        self.findings.append(Finding(check.name, "an end", f"none within {self.seconds:g} s", WRONG, check.avoid,
                                     self.seconds))
        try:
            show(self.findings, self.args, self.device, False, self.output)
            self.output.flush()
        finally:
            os._exit(1)


def show(findings: List[Finding], args: argparse.Namespace, device: Device, complete: bool, output: TextIO) -> None:
    """Print the table to `output` and write the file."""
    print(report.text(findings), file=output)
    print(report.summary(findings), file=output)
    if args.json and writes():
        report.save(args.json, report.as_json(findings, device, complete))
        print(f"written: {args.json}", file=output)


def run(args: argparse.Namespace) -> int:
    """Carry out the command; returns the exit code. Raises ConfigError."""
    if args.timeout <= 0:
        raise ConfigError(f"--timeout: expected seconds, found {args.timeout:g}")
    if args.json and writes():
        report.check_target(args.json, args.overwrite)
    with tempfile.TemporaryDirectory(prefix="telechat-doctor-") as logs:
        given = "LOG_MF_PATH" in os.environ                  # where MindFormers logs
        os.environ.setdefault("LOG_MF_PATH", logs)
        try:
            return _examine(args)
        finally:
            if not given:
                del os.environ["LOG_MF_PATH"]


def _examine(args: argparse.Namespace) -> int:
    os.environ.setdefault("GLOG_v", "3")
    only_own_warnings()
    from research.telechat.doctor.hardware import Hardware
    from research.telechat.run.load import quieten
    quieten(logging.ERROR)
    device = Hardware()
    checks = chosen(all_checks(device.fused, device.dtypes, TRANSFORM), args.only)
    if args.list:
        print("\n".join(check.name for check in checks))
        return 0
    print(f"{device.name}, rank {device.rank} of {device.ranks}")
    findings: List[Finding] = []
    watch = Watch(args.timeout, findings, args, device)
    try:
        examine_all(checks, device, watch.progress, findings)
        if device.ranks > 1:
            watch.progress(len(checks), len(checks) + 1, SHARING)
            findings[:] = shared(findings, device)
    finally:
        watch.stop()
    show(findings, args, device, True, sys.stdout)
    return report.exit_code(findings)


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command; returns the exit code (common/command.py)."""
    return run_command(lambda: run(build_parser().parse_args(argv)))
