"""Location of the plugin, and facts about this process from the machine and the launcher."""
import os
from pathlib import Path

PLUGIN = Path(__file__).resolve().parents[1]               # research/telechat
ROOT = PLUGIN.parents[1]                                   # the repository, or the folder of installed packages


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def rank() -> int:
    """Number of this process among those of the job (RANK_ID, set by msrun); 0 without a launcher."""
    return int(os.environ.get("RANK_ID") or 0)


def writes() -> bool:
    """Whether this process writes for the job: the worker of rank 0, and not msrun's scheduler, which has no rank."""
    return rank() == 0 and os.environ.get("MS_ROLE") != "MS_SCHED"


def workers() -> int:
    """Processes of the job (MS_WORKER_NUM, set by msrun); 1 without a launcher."""
    return int(os.environ.get("MS_WORKER_NUM") or 1)
