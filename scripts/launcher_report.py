"""Finds the error that brought a job down among the logs of all its workers, and prints it.

    python scripts/launcher_report.py output/msrun_log

One rank fails, and then the others fail too because it is gone; what the user needs is the first. It is told by the
time stamps before each error, and messages about lost connections count only if there is nothing else. A worker that
was killed writes nothing: then the report says so. Standard library only.
"""
import argparse
import re
import sys
from pathlib import Path
from typing import List, NamedTuple, Optional, Tuple

TIME = re.compile(r"(20\d\d)-(\d\d)-(\d\d)[-T ](\d\d):(\d\d):(\d\d)(?:[.,](\d{3})(?:\.(\d{3}))?)?")
# What a rank says when another one is gone, or when it is being stopped.
AFTERMATH = re.compile(r"connection|heartbeat|timed?[ -]?out|peer|scheduler|cluster|killed|terminated|hccl|"
                       r"KeyboardInterrupt", re.IGNORECASE)
FATAL, CRITICAL, ERROR = range(3)
TAIL = 14   # lines of a traceback worth showing: its end


class Finding(NamedTuple):
    """One error of one rank. Tuples compare in the order in which they should be believed."""

    aftermath: bool
    kind: int
    time: Tuple[str, ...]
    rank: int
    line: int               # counted from 1
    message: str
    lines: List[str]


def traceback_end(lines: List[str], start: int) -> int:
    """Index of the line with the exception itself, for a traceback from line `start`; chained ones count as one."""
    end = start + 1
    while end < len(lines) and (not lines[end].strip() or lines[end][0].isspace()):
        end += 1
    following = " ".join(lines[end + 1:end + 4])
    if "the above exception" in following.lower() or "During handling of the above" in following:
        for index in range(end + 1, min(end + 6, len(lines))):
            if lines[index].startswith("Traceback"):
                return traceback_end(lines, index)
    return min(end, len(lines) - 1)


def findings(path: Path) -> List[Finding]:
    """The errors in one worker's log, the first of each kind."""
    rank = int(re.search(r"(\d+)\.log$", path.name).group(1))
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    now: Tuple[str, ...] = ()
    found, kinds = [], set()
    for index, line in enumerate(lines):
        stamp = TIME.search(line)
        if stamp:
            now = tuple(part or "000" for part in stamp.groups())
        end = index
        if "Traceback (most recent call last)" in line:
            kind, end = FATAL, traceback_end(lines, index)
        elif re.match(r"(\w+: )?error: ", line):
            kind = FATAL
        elif "[CRITICAL]" in line:
            kind = CRITICAL
        elif "[ERROR]" in line or " - ERROR - " in line:
            kind = ERROR
        else:
            continue
        message = lines[end].strip()
        key = (bool(AFTERMATH.search(message)), kind)
        if key not in kinds:
            kinds.add(key)
            shown = lines[max(index, end - TAIL + 1):end + 1]
            found.append(Finding(*key, now or ("9999",), rank, end + 1, message, shown))
    return found


def worker_logs(folder: Path, since: float = 0.0) -> List[Path]:
    """worker_*.log of `folder` written at or after `since` (seconds of the epoch): older ones are of an earlier job."""
    return [path for path in sorted(folder.glob("worker_*.log")) if re.search(r"\d+\.log$", path.name)
            and path.stat().st_mtime >= since - 1]


def first_failure(logs: List[Path]) -> Optional[Tuple[Path, Finding]]:
    """The log and the error to believe, or None where no log has one."""
    every = [(path, finding) for path in logs for finding in findings(path)]
    return min(every, key=lambda pair: pair[1][:5]) if every else None


def report(folder: Path, since: float = 0.0) -> str:
    """Text about the first failure in the logs of `folder`."""
    logs = worker_logs(folder, since)
    if not logs:
        return f"{folder} has no worker_*.log of this job: no worker was started."
    failure = first_failure(logs)
    if failure is None:
        text = [f"No worker's log in {folder} holds an error.",
                "A worker that was killed, for want of memory perhaps, writes none: see `dmesg | tail`.",
                f"The end of {logs[-1].name}:"]
        return "\n".join(text + ["  " + line for line in logs[-1].read_text(errors="replace").splitlines()[-8:]])
    path, finding = failure
    head = f"Rank {finding.rank} failed first ({path}, line {finding.line}): {finding.message}"
    return "\n".join([head] + (["  " + line for line in finding.lines] if len(finding.lines) > 1 else []))


def main() -> int:
    """Print the report; 0 even if it found an error, 1 if there is no such folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log_dir", type=Path, help="the LOG_DIR of msrun_launcher.sh")
    parser.add_argument("--since", type=float, default=0.0, help="leave out logs older than this (epoch, s)")
    args = parser.parse_args()
    if not args.log_dir.is_dir():
        print(f"error: log folder not found: {args.log_dir}; give the LOG_DIR of msrun_launcher.sh", file=sys.stderr)
        return 1
    print(report(args.log_dir, args.since))
    return 0


if __name__ == "__main__":
    sys.exit(main())
