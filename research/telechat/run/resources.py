"""What training needs of the machine besides the card: disk for its checkpoints, host memory to load and save them.

The disk is checked before anything is built, as a full one ends the training in the middle of its first save.
"""
import os
import shutil
from pathlib import Path
from typing import List, Optional

import psutil
from mindformers.tools.logger import logger
from mindformers.tools.register import MindFormerConfig

from research.telechat.checkpoint.resume import checkpoints
from research.telechat.common.errors import ConfigError
from research.telechat.common.files import JsonObject
from research.telechat.plan.checkpoints import checkpoints_at_once, saved_bytes, weight_bytes
from research.telechat.plan.cost import CARDS_PER_MACHINE
from research.telechat.plan.plan import Plan, read_plan

LARGE_CHECKPOINT = 50e9               # bytes from which reading the whole for every shard is worth a warning
_SHARED_TYPES = ("nfs", "nfs4", "dpc", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "cifs", "fuse.sshfs",
                 "fuse.juicefs", "fuse.glusterfs", "fuse.ceph")


def size(count: float) -> str:
    """Bytes in the unit that suits them."""
    for unit, bytes_each in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= bytes_each:
            return f"{count / bytes_each:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"


def existing_parent(path: Path) -> Path:
    """The nearest folder of `path` that is there already: its disk is where `path` will be."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def is_shared(path: Path) -> bool:
    """Whether all machines of a job write `path` to one disk: by its file system, or as SHARED_PATHS says."""
    path = path.resolve()
    named = [Path(name).resolve() for name in os.environ.get("SHARED_PATHS", "").split(",") if name]
    if any(folder == path or folder in path.parents for folder in named):
        return True
    mounts = [mount for mount in psutil.disk_partitions(all=True)
              if Path(mount.mountpoint) == path or Path(mount.mountpoint) in path.parents]
    return bool(mounts) and max(mounts, key=lambda mount: len(mount.mountpoint)).fstype.lower() in _SHARED_TYPES


def local_ranks(ranks: int) -> List[int]:
    """The ranks on this machine, from what scripts/msrun_launcher.sh says, or else eight to a machine."""
    here = int(os.environ.get("TELECHAT_LOCAL_WORKERS") or min(ranks, CARDS_PER_MACHINE))
    first = int(os.environ.get("RANK_ID", "0")) // here * here
    return [rank for rank in range(first, first + here) if rank < ranks] or [0]


def _monitor(config: MindFormerConfig) -> Optional[JsonObject]:
    found = [callback for callback in config.get("callbacks") or [] if callback.get("type") == "CheckpointMonitor"]
    return found[0] if found else None


def _kept_already(config: MindFormerConfig, monitor: JsonObject, ranks: List[int]) -> int:
    """Bytes of the resumed run's checkpoints, which make room for new ones."""
    if not config.get("resume_training") or not monitor.get("continue_run"):
        return 0
    found = 0
    for rank in ranks:
        folder = Path(str(config.output_dir)) / "checkpoint" / f"rank_{rank}"
        found += sum((folder / name.file(rank)).stat().st_size for name in checkpoints(folder, rank)[-_kept(monitor):])
    return found


def _kept(monitor: JsonObject) -> int:
    """Checkpoints that stay (training/saving.py)."""
    keep = int(monitor.get("keep_checkpoint_max", 5))
    return max(keep, 3 if monitor.get("async_save") else 2) if int(monitor.get("ranks", 1)) > 1 else keep


def check_resources(config: MindFormerConfig, steps: int) -> None:
    """Compare the free disk with what the training will write, and say what host memory it takes.

    Args:
        config: recipe with complete callbacks (`prepare_training`); its key `check_free_disk` is taken out.
        steps: of the whole training; 0: not known.

    Raises ConfigError where the disk is too small and `check_free_disk` is not False.
    """
    wanted = config.pop("check_free_disk", True)
    try:
        plan = read_plan(config.to_dict())
    except ConfigError as err:
        logger.warning("disk and host memory are not checked because the plan cannot be read: %s", err)
        return
    _tell_memory(config, plan)
    monitor = _monitor(config)
    if monitor is None or not wanted:
        return
    target = existing_parent(Path(str(config.output_dir)))
    shared = is_shared(target)
    ranks = list(range(plan.ranks)) if shared else local_ranks(plan.ranks)
    once = bool(monitor.get("remove_redundancy"))
    each = sum(saved_bytes(plan, rank, once) for rank in ranks)
    if monitor.get("save_network_params"):
        each += sum(weight_bytes(plan, rank) for rank in ranks)
    count = checkpoints_at_once(_kept(monitor), int(monitor.get("keep_every_n_steps", 0)),
                                int(monitor.get("save_checkpoint_steps") or 1), steps)
    cut = sum(weight_bytes(plan, rank) for rank in ranks) if config.get("auto_trans_ckpt") else 0
    needed = count * each + cut - _kept_already(config, monitor, ranks)
    free = shutil.disk_usage(target).free
    if needed > free:
        whose = "all" if len(ranks) == plan.ranks else "this machine's"
        raise ConfigError(
            f"output_dir: the training will write {size(needed)} to {target}, which has {size(free)} free: {count} "
            f"checkpoints at once of {size(each)} ({whose} {len(ranks)} ranks)"
            + (f", and {size(cut)} of shards that auto_trans_ckpt makes" if cut else "")
            + "; free space, use another --output_dir, lower CheckpointMonitor's keep_checkpoint_max, or disable this "
              "check with --check_free_disk False")
    logger.info("checkpoints: %s each on this disk, at most %d at once, %s; %s are free.", size(each), count,
                size(needed), size(free))


def checkpoint_size(config: MindFormerConfig) -> int:
    """Bytes of the files that `load_checkpoint` names; 0 where it names none."""
    path = Path(str(config.get("load_checkpoint") or ""))
    if not config.get("load_checkpoint") or not path.exists():
        return 0
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob(f"*.{config.get('load_ckpt_format') or 'ckpt'}"))


def _tell_memory(config: MindFormerConfig, plan: Plan) -> None:
    """Log the host memory that loading and saving take; warn if it is not available, or if there is a better way."""
    here = local_ranks(plan.ranks)
    share, whole = sum(saved_bytes(plan, rank) for rank in here), checkpoint_size(config)
    monitor = _monitor(config)
    items = []
    if whole and config.get("resume_training"):
        items.append((share, f"loading the shards of {len(here)} ranks"))
    elif whole and config.get("auto_trans_ckpt"):
        processes = int(config.get("transform_process_num") or 1)
        what = f"auto_trans_ckpt, which reads all of {config.load_checkpoint} in {processes} process(es)"
        items.append((whole * min(processes, len(here)), what))
        if whole >= LARGE_CHECKPOINT and config.get("load_ckpt_format") == "ckpt":
            logger.warning("auto_trans_ckpt: each rank loads the full checkpoint to take its shard: %s are read for "
                           "each of the %d ranks; shard it once beforehand with scripts/transform_checkpoint.py "
                           "(docs/parallel.md), or use safetensors, which are read in part.",
                           size(whole), plan.ranks)
    elif whole and plan.ranks == 1:
        items.append((whole, "loading the checkpoint"))
    if monitor is not None and monitor.get("async_save"):
        items.append((share, f"the copies that async_save writes from ({len(here)} ranks)"))
    free = psutil.virtual_memory().available
    for needed, what in items:
        (logger.warning if needed > free else logger.info)(
            "host memory: %s for %s; %s are free on this machine.", size(needed), what, size(free))
