"""Finds the error that brought a job down among the logs of all its workers and the scheduler, and prints it.

    python scripts/launcher_report.py output/msrun_log

One process fails, and then the others fail too because it is gone; what the user needs is the first. It is found by how
the processes ended, where msrun_launcher.sh has noted that (exits.json), and by the time stamps before each error;
messages about lost connections count only if there is nothing else, and processes that ended well not at all. A worker
that was killed writes nothing: then the report says so. Standard library only.
"""
import argparse
import json
import re
import sys
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Tuple

TIME = re.compile(r"(20\d\d)-(\d\d)-(\d\d)[-T ](\d\d):(\d\d):(\d\d)(?:[.,](\d{3})(?:\.(\d{3}))?)?")
# What a rank says when another one is gone, or when it is being stopped.
AFTERMATH = re.compile(r"connection|heartbeat|timed?[ -]?out|peer|scheduler|cluster|killed|terminated|hccl|"
                       r"KeyboardInterrupt|"
                       r"Launch kernel failed: \S*/(All|Reduce|Broadcast|Send|Receive|Neighbor)\w*-op", re.IGNORECASE)
# Errors by their level only: a job that ends well has these lines too, or they repeat their neighbours.
HARMLESS = re.compile(r"CPU device is not supported|if you are trying to run with a single device")
# What stops a job by itself although it speaks of connections, and what it means.
CAUSES = (("Failed to create the TCP server",
           "The scheduler could not listen on its port: something else does, perhaps the scheduler of a second "
           "launcher on this machine. Start one launcher per machine, or use another MASTER_PORT."),)
TIMED_OUT = re.compile(r"worker (\d+) is the first one timed out|The node: (\d+) is timed out")   # of the scheduler
STOPPED = 15               # the signal with which MindSpore ends a worker when another one is lost
NOT_COMPLETE = "some processes in the cluster are not successfully spawned"
CAUSE, OWN, LATER = range(3)
FATAL, CRITICAL, ERROR = range(3)
SCHEDULER = -1             # in place of a rank
TAIL = 14                  # lines of a traceback worth showing: its end
EXITS = "exits.json"       # made by launcher_watch.py


class Finding(NamedTuple):
    """One error of one process. Tuples compare in the order in which they should be believed."""

    weight: int             # CAUSE, OWN, or LATER: aftermath
    kind: int
    time: Tuple[str, ...]
    rank: int
    line: int               # counted from 1
    message: str
    lines: List[str]


def weigh(message: str) -> int:
    """Whether a message is a cause, an error of the process itself, or what follows from another one's."""
    if any(text in message for text, _ in CAUSES):
        return CAUSE
    return LATER if AFTERMATH.search(message) else OWN


def name_of(rank: int) -> str:
    """A process at the beginning of a sentence."""
    return "The scheduler" if rank == SCHEDULER else f"Rank {rank}"


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


def with_details(lines: List[str], end: int) -> str:
    """The message in line `end`; where an exception's own is empty, as MindSpore's of a kernel, what follows it."""
    message = lines[end].strip()
    if re.fullmatch(r"\w+(Error|Exception):", message):
        told = [line.strip() for line in lines[end + 1:end + 6] if line.strip() and not line.startswith("-")]
        message = " ".join([message, *told[:1]])
    return message


def findings(path: Path) -> List[Finding]:
    """The errors in the log of a worker or the scheduler, the first of each kind."""
    rank = rank_of(path)
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
        message = with_details(lines, end)
        if HARMLESS.search(message):
            continue
        key = (weigh(message), kind)
        if key not in kinds:
            kinds.add(key)
            shown = lines[max(index, end - TAIL + 1):end + 1]
            found.append(Finding(*key, now or ("9999",), rank, end + 1, message, shown))
    return found


def rank_of(path: Path) -> int:
    """The rank whose log `path` is."""
    number = re.search(r"(\d+)\.log$", path.name)
    return int(number.group(1)) if number else SCHEDULER


def job_logs(folder: Path, since: float = 0.0) -> List[Path]:
    """worker_*.log and scheduler.log of `folder` written at or after `since` (seconds of the epoch): older ones are of
    an earlier job."""
    found = [path for path in folder.glob("worker_*.log") if re.search(r"\d+\.log$", path.name)]
    found = [*sorted(found), *folder.glob("scheduler.log")]
    return [path for path in found if path.stat().st_mtime >= since - 1]


def read_exits(folder: Path, since: float = 0.0) -> Dict[int, Optional[int]]:
    """rank -> exit code (below 0: signal, None: not seen), in the order in which the processes ended."""
    path = folder / EXITS
    try:
        if path.stat().st_mtime < since - 1:
            return {}
        return {SCHEDULER if name == "scheduler" else int(name): code for name, code in json.loads(path.read_text())}
    except (OSError, ValueError):
        return {}


def first_failure(logs: List[Path], exits: Dict[int, Optional[int]]) -> Optional[Tuple[Path, Finding]]:
    """The log and the error to believe, or None where no process that failed has one."""
    every = [(path, finding) for path in logs if exits.get(rank_of(path)) != 0 for finding in findings(path)]
    return min(every, key=lambda pair: pair[1][:5]) if every else None


def killed_first(exits: Dict[int, Optional[int]], logs: List[Path]) -> Optional[Tuple[int, int]]:
    """(rank, signal) where the first process that did not end well was killed; msrun kills the others afterwards.

    The signal is 0 if it is unknown how the process ended, and its log has no error.
    """
    for rank, code in exits.items():
        if code is None and not any(findings(path) for path in logs if rank_of(path) == rank):
            return rank, 0
        if code != 0:
            return (rank, -code) if code is not None and code < 0 else None
    return None


def lost_rank(logs: List[Path]) -> Optional[Tuple[int, Path, int]]:
    """(rank, log, line) where the scheduler says which rank it has lost first."""
    for path in logs:
        if rank_of(path) == SCHEDULER:
            for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
                match = TIMED_OUT.search(line)
                if match:
                    return int(match.group(1) or match.group(2)), path, number
    return None


def last_lines(path: Path, count: int = 8) -> List[str]:
    """The end of a log."""
    return ["  " + line for line in path.read_text(errors="replace").splitlines()[-count:]]


def report_killed(rank: int, signal: int, logs: List[Path]) -> str:
    """Text about a process that was killed."""
    text = [(f"{name_of(rank)} failed first: it was killed by signal {signal} and could write no error." if signal else
             f"{name_of(rank)} failed first: it ended without writing an error, so it was killed perhaps.")
            + (" Usually the host ran out of memory: see `dmesg | tail`." if signal == 9 else "")]
    for path in logs:
        if rank_of(path) == rank:
            text += [f"The end of {path.name}:", *last_lines(path)]
    return "\n".join(text)


def report_gone(logs: List[Path], killed: Optional[Tuple[int, int]]) -> Optional[str]:
    """Text about a process that vanished without an error of its own, or None. killed: what `killed_first` gave."""
    if killed and killed[1] != STOPPED:
        return report_killed(*killed, logs)
    lost, here = lost_rank(logs), {rank_of(path) for path in logs}
    if lost and lost[0] not in here:
        return (f"Rank {lost[0]} failed first, on another machine: the scheduler has lost it ({lost[1]}, line "
                f"{lost[2]}). Look at the launcher's last lines there.")
    if lost and killed:
        return f"Rank {lost[0]} failed first: the scheduler has lost it, and it fell silent ({lost[1]}, line {lost[2]})"
    return report_killed(*killed, logs) if killed else None


def report_elsewhere(ranks: List[Path], failure: Optional[Tuple[Path, Finding]], workers: int) -> Optional[str]:
    """Text if this machine only shows the consequences of a failure on another one, or None."""
    if failure is None or failure[1].weight != LATER or workers <= len(ranks) or NOT_COMPLETE in failure[1].message:
        return None
    return (f"No process of this machine (rank {spans(sorted(map(rank_of, ranks)))}) failed by itself; look at the "
            f"launcher's last lines on the others. The first sign of it here ({failure[0]}, line {failure[1].line}): "
            f"{failure[1].message}")


def report_incomplete(logs: List[Path], path: Path, workers: int) -> str:
    """Text about a job whose workers did not all come: none of those that did has failed."""
    here = sorted(rank_of(log) for log in logs if rank_of(log) != SCHEDULER)
    text = "No rank failed, but the job was not complete: not all workers came within CLUSTER_TIME_OUT."
    if workers > len(here) > 0:
        absent = sorted(set(range(workers)) - set(here))
        text += (f" Of {workers}, rank {spans(here)} started here; look for rank {spans(absent)} on the other "
                 "machines: were they started with the same MASTER_ADDR and MASTER_PORT, each with its own NODE_RANK, "
                 "and do they reach the master?")
    return f"{text} ({path})"


def spans(numbers: List[int]) -> str:
    """Sorted numbers as '0-7, 16-23'."""
    runs: List[List[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def report(folder: Path, since: float = 0.0, workers: int = 0) -> str:
    """Text about the first failure in the logs of `folder`. workers: of the whole job; 0: not known."""
    logs = job_logs(folder, since)
    ranks = [path for path in logs if rank_of(path) != SCHEDULER]
    if not ranks:
        return f"{folder} has no worker_*.log of this job: no worker was started."
    exits = read_exits(folder, since)
    failure, killed = first_failure(logs, exits), killed_first(exits, logs)
    if failure is None or failure[1].weight == LATER or failure[1].kind == ERROR:
        text = report_gone(logs, killed) or report_elsewhere(ranks, failure, workers)
        if text:
            return text
    if failure is None:
        text = [f"No worker's log in {folder} holds an error.",
                "A killed worker writes none; perhaps the host ran out of memory: see `dmesg | tail`.",
                f"The end of {ranks[-1].name}:"]
        return "\n".join(text + last_lines(ranks[-1]))
    path, finding = failure
    if NOT_COMPLETE in finding.message:
        return report_incomplete(logs, path, workers)
    head = f"{name_of(finding.rank)} failed first ({path}, line {finding.line}): {finding.message}"
    advice = [text for cause, text in CAUSES if cause in finding.message]
    return "\n".join([head, *advice] + (["  " + line for line in finding.lines] if len(finding.lines) > 1 else []))


def main() -> int:
    """Print the report; 0 even if it found an error, 1 if there is no such folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log_dir", type=Path, help="the LOG_DIR of msrun_launcher.sh")
    parser.add_argument("--since", type=float, default=0.0, help="ignore logs older than this (Unix time)")
    parser.add_argument("--workers", type=int, default=0, help="workers of the whole job, on all machines")
    args = parser.parse_args()
    if not args.log_dir.is_dir():
        print(f"error: log folder not found: {args.log_dir}; pass the LOG_DIR of msrun_launcher.sh", file=sys.stderr)
        return 1
    print(report(args.log_dir, args.since, args.workers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
