"""Watches a job of several workers, names the rank that died or hangs, ends the job, and restarts it if asked to.

    python scripts/supervise.py --max_restarts 3 --hang_timeout 1800 --log_dir output/msrun_log -- \
        bash scripts/msrun_launcher.sh "python run_mindformer.py ... --use_parallel True --resume_training True" \
        8 8118 output/msrun_log True 7200

The command after -- must wait for its workers (JOIN True) and write their logs to --log_dir. With `--resume_training
True` every start resumes from the newest complete checkpoint, the first one at the beginning. Of a job that failed, the
first rank whose process vanished is named; the job hangs when no worker has written to its log for --hang_timeout
seconds, which must exceed the longest pause of a healthy job (compiling, saving). That msrun ends the others when one
of them fails is its own doing. Linux only; standard library only.
"""
import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Dict, List, Optional, Sequence

POLL = 0.05                   # seconds between two looks at the workers, so that the first to die is seen first
SEARCH = 1.0                  # seconds between two searches for workers among all processes


def process_table() -> Dict[int, int]:
    """pid -> parent of every process."""
    table = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            table[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    return table


def descendants(root: int, table: Dict[int, int]) -> List[int]:
    """All processes below `root`, parents before children."""
    found, frontier = [], [root]
    while frontier:
        frontier = [pid for pid, parent in table.items() if parent in frontier]
        found += frontier
    return found


def environment(pid: int) -> Dict[str, str]:
    """Environment of a process; empty if it is gone."""
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return {}
    return dict(entry.decode(errors="replace").partition("=")[::2] for entry in entries)


def state(pid: int) -> str:
    """State of a process: R, S, D, T (stopped), Z (ended), "" if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def find_workers(root: int, known: Dict[int, int]) -> Dict[int, int]:
    """rank -> pid of the job's workers: the topmost processes below `root` with MS_ROLE worker and a rank.

    known: what is known already; only new ranks are looked for.
    """
    workers = dict(known)
    for pid in descendants(root, process_table()):
        if pid in known.values():
            continue
        values = environment(pid)
        rank = values.get("RANK_ID", "")
        if values.get("MS_ROLE") == "MS_WORKER" and rank.isdigit():
            workers.setdefault(int(rank), pid)
    return workers


def last_output(log_dir: Path, since: float) -> float:
    """When any worker last wrote to its log; `since` if none did after it."""
    times = [since]
    for path in log_dir.glob("worker_*.log"):
        with contextlib.suppress(OSError):
            times.append(path.stat().st_mtime)
    return max(times)


def last_lines(log_dir: Path, rank: int, count: int = 3) -> str:
    """The end of a rank's log."""
    try:
        lines = (log_dir / f"worker_{rank}.log").read_text(errors="replace").splitlines()
    except OSError:
        return "  (no log)"
    return "\n".join(f"  {line[:300]}" for line in lines[-count:])


def end_job(child: subprocess.Popen, workers: Dict[int, int]) -> None:
    """Kill the job with all its processes."""
    pids = [*descendants(child.pid, process_table()), *workers.values()]
    for pid in [*pids, child.pid]:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    child.wait()


def exit_code(pid: int) -> Optional[int]:
    """How a process that has not been waited for ended, as waitpid gives it; None if that cannot be seen."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[49]) if fields[0] == "Z" else None       # field 52 of proc(5)
    except (OSError, IndexError, ValueError):
        return None


def death(ended: Dict[int, Optional[int]], log_dir: Path) -> Optional[str]:
    """Text about the rank that failed first. ended: rank -> exit code or None, in the order in which they ended."""
    suspects = [rank for rank, code in ended.items() if code != 0]
    if not suspects:
        return None
    rank, code = suspects[0], ended[suspects[0]]
    how = "" if code is None else f" of signal {code & 127}" if code & 127 else f" with exit code {code >> 8}"
    return f"rank {rank} died{how}. End of its log:\n{last_lines(log_dir, rank)}"


def run_once(command: Sequence[str], log_dir: Path, hang_timeout: float) -> Optional[str]:
    """Run the job once. None if it ended well, else what happened, naming the rank where it is known."""
    started = time.time()
    child = subprocess.Popen(command, start_new_session=True)
    workers: Dict[int, int] = {}
    ended: Dict[int, Optional[int]] = {}
    stopped: List[int] = []
    searched = 0.0
    try:
        while child.poll() is None:
            if time.time() - searched > SEARCH:
                workers, searched = find_workers(child.pid, workers), time.time()
            ended.update({rank: exit_code(pid) for rank, pid in sorted(workers.items())
                          if rank not in ended and state(pid) in ("", "Z")})
            stopped = [rank for rank, pid in sorted(workers.items()) if state(pid) == "T"] or stopped
            if time.time() - last_output(log_dir, started) > hang_timeout:
                text = hang(log_dir, workers, hang_timeout)
                end_job(child, workers)
                return text
            time.sleep(POLL)
    except BaseException:
        end_job(child, workers)
        raise
    if child.returncode == 0:
        return None
    end_job(child, workers)
    if stopped:                                                    # the others gave up waiting for it
        return (f"rank {stopped[0]} is stopped, and the others failed waiting for it. End of its log:\n"
                f"{last_lines(log_dir, stopped[0])}")
    return death(ended, log_dir) or f"the job ended with {child.returncode}"


def hang(log_dir: Path, workers: Dict[int, int], timeout: float) -> str:
    """Text about a job that hangs: the stopped rank, or else the one that fell silent first."""
    stopped = [rank for rank, pid in sorted(workers.items()) if state(pid) == "T"]
    quiet = stopped or sorted(workers, key=lambda rank: _written(log_dir, rank))[:1]
    if not quiet:
        return f"the job hangs: no worker has written for {timeout:g} s; no worker started"
    who = f"rank {quiet[0]} {'is stopped' if stopped else 'was the first to fall silent'}"
    return (f"the job hangs: no worker has written for {timeout:g} s; {who}. End of its log:\n"
            f"{last_lines(log_dir, quiet[0])}")


def _written(log_dir: Path, rank: int) -> float:
    try:
        return (log_dir / f"worker_{rank}.log").stat().st_mtime
    except OSError:
        return 0.0


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Entry point; 0 if the job ended well, at the first or a later start."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max_restarts", type=int, default=0, help="number of restarts (default: 0)")
    parser.add_argument("--hang_timeout", type=float, default=1800, help="seconds without output of any worker")
    parser.add_argument("--log_dir", type=Path, default=Path("output/msrun_log"), help="where worker_N.log are")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="the command to run, after --")
    args = parser.parse_args(argv)
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        parser.error("no command; pass it after --")
    if args.max_restarts < 0 or args.hang_timeout <= 0:
        parser.error("--max_restarts must not be negative, --hang_timeout must be positive")
    if args.max_restarts and not any("--resume_training" in word for word in command):
        parser.error("--max_restarts needs --resume_training True in the command, or every start would begin from "
                     "scratch")
    signal.signal(signal.SIGTERM, _interrupt)
    for attempt in range(args.max_restarts + 1):
        try:
            fault = run_once(command, args.log_dir, args.hang_timeout)
        except KeyboardInterrupt:
            print("supervise: interrupted; the job is ended", file=sys.stderr)
            return 130
        except OSError as err:
            print(f"error: {command[0]} cannot be started: {err}", file=sys.stderr)
            return 1
        if fault is None:
            return 0
        left = args.max_restarts - attempt
        print(f"supervise: {fault}", file=sys.stderr, flush=True)
        if left:
            print(f"supervise: starting again ({left} restarts left)", file=sys.stderr, flush=True)
    print(f"error: the job failed {args.max_restarts + 1} times; the first line above that names a rank says why",
          file=sys.stderr)
    return 1


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
