"""The thread in which MindSpore writes a checkpoint beside the training (async_save): whether it writes, what it met.

MindSpore starts it and leaves its exceptions to Python, which prints them and goes on; here they are kept for
telechat_checkpoint_monitor, which decides what a failed save means. No MindSpore here.
"""
import threading
from typing import Any, Callable, List, Optional

_NAME = "asyn_save_ckpt"                       # as MindSpore calls it
_faults: List[BaseException] = []


def watch() -> None:
    """From now on keep what makes the thread fail. Other threads' exceptions go where they went before."""
    if getattr(threading.excepthook, "keeps_faults_of_saving", False):
        return
    before: Callable[[Any], Any] = threading.excepthook

    def hook(args: Any) -> None:
        if args.thread is not None and args.thread.name == _NAME:
            _faults.append(args.exc_value)
        else:
            before(args)

    hook.keeps_faults_of_saving = True         # type: ignore[attr-defined]
    threading.excepthook = hook


def writing() -> bool:
    """Whether a checkpoint is being written."""
    return any(thread.name == _NAME for thread in threading.enumerate())


def wait() -> None:
    """Return when no checkpoint is being written."""
    for thread in threading.enumerate():
        if thread.name == _NAME:
            thread.join()


def take_fault() -> Optional[BaseException]:
    """Wait; then what made the last write fail, told once; None if nothing did."""
    wait()
    fault = _faults[-1] if _faults else None
    _faults.clear()
    return fault
