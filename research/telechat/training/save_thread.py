"""The threads that write a checkpoint in the background (async_save): whether they write, which error they met.

MindSpore's thread writes the file and leaves its exceptions to Python, which prints them and continues; one of ours
waits for it and brings the file to disk. What makes either fail is kept for training/saving.py, which decides what a
failed save means; if training fails for another reason before that, it is reported when the process ends. No MindSpore
here.
"""
import atexit
import os
import sys
import threading
from typing import Callable, List, Optional

_WRITER = "asyn_save_ckpt"                     # as MindSpore calls its thread
_SYNCER = "sync_checkpoint"
_faults: List[BaseException] = []
_path = ""                                     # of the file that was begun last


def watch() -> None:
    """From now on keep what makes the threads fail. Other threads' exceptions go where they went before."""
    if getattr(threading.excepthook, "keeps_faults_of_saving", False):
        return
    before: Callable[[threading.ExceptHookArgs], object] = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None and args.thread is not None and args.thread.name in (_WRITER, _SYNCER):
            _faults.append(args.exc_value)
        else:
            before(args)

    vars(hook)["keeps_faults_of_saving"] = True
    threading.excepthook = hook
    atexit.unregister(_tell)
    atexit.register(_tell)                     # Python waits for the threads before


def sync(path: str) -> None:
    """Sync a file to disk, so that a power failure cannot empty it. Raises OSError if it does not exist."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_behind(path: str) -> None:
    """Bring `path`, which MindSpore's thread has begun to write, to disk as soon as it is whole."""
    global _path
    _path = path
    writers = [thread for thread in threading.enumerate() if thread.name == _WRITER]

    def work() -> None:
        for thread in writers:
            thread.join()
        if not _faults:
            sync(path)

    threading.Thread(target=work, name=_SYNCER).start()


def writing() -> bool:
    """Whether a checkpoint is being written or brought to disk."""
    return any(thread.name in (_WRITER, _SYNCER) for thread in threading.enumerate())


def wait() -> None:
    """Return when no checkpoint is being written or brought to disk."""
    for thread in threading.enumerate():
        if thread.name in (_WRITER, _SYNCER):
            thread.join()


def take_fault() -> Optional[BaseException]:
    """Wait; then the error of the last write, reported once; None if it succeeded."""
    wait()
    fault = _faults[0] if _faults else None
    _faults.clear()
    return fault


def _tell() -> None:
    """Report an error that has not been reported."""
    fault = take_fault()
    if fault is not None:
        print(f"error: the checkpoint {_path} could not be saved: {fault}", file=sys.stderr, flush=True)
