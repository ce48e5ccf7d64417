"""Notes how each worker of a job on this machine ended, and in which order, for launcher_report.py.

msrun tells only that one failed. This looks at the processes below msrun until it is gone, and keeps exits.json in the
log folder: [name, code] in the order in which they ended; name is a rank, or "scheduler"; code is that of Python's
subprocess, below 0 for a signal, or null where msrun was too quick to be seen. Linux only; standard library only.
"""
import argparse
import json
import sys
import time
from pathlib import Path
from typing import Dict, List, Optional, Tuple

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from scripts.supervise import POLL, SEARCH, descendants, environment, exit_code, process_table, state

EXITS = "exits.json"


def find_processes(root: int, known: Dict[str, int]) -> Dict[str, int]:
    """name -> pid of the workers and the scheduler below `root`; those in `known` stay as they are."""
    found = dict(known)
    for pid in descendants(root, process_table()):
        if pid in known.values():
            continue
        values = environment(pid)
        role, rank = values.get("MS_ROLE"), values.get("RANK_ID", "")
        name = "scheduler" if role == "MS_SCHED" else rank if role == "MS_WORKER" and rank.isdigit() else ""
        if name:
            found.setdefault(name, pid)
    return found


def code_of(pid: int) -> Optional[int]:
    """Exit code of a process that has ended; None if it is no longer known."""
    status = exit_code(pid)
    return None if status is None else -(status & 127) if status & 127 else status >> 8


def watch(msrun: int, folder: Path, workers: int) -> List[Tuple[str, Optional[int]]]:
    """Look until the process `msrun` has ended; write what is seen. Returns it."""
    processes: Dict[str, int] = {}
    ended: List[Tuple[str, Optional[int]]] = []
    searched = 0.0
    while state(msrun) not in ("", "Z"):
        if time.time() - searched > SEARCH and len(processes.keys() - {"scheduler"}) < workers:  # which starts first
            processes, searched = find_processes(msrun, processes), time.time()
        for name, pid in processes.items():
            if state(pid) in ("", "Z") and name not in [entry[0] for entry in ended]:
                ended.append((name, code_of(pid)))
                (folder / EXITS).write_text(json.dumps(ended))
        time.sleep(POLL)
    return ended


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("msrun", type=int, help="process id of msrun")
    parser.add_argument("log_dir", type=Path, help="where exits.json goes")
    parser.add_argument("--workers", type=int, required=True, help="workers on this machine")
    args = parser.parse_args()
    watch(args.msrun, args.log_dir, args.workers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
