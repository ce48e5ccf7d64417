"""A command that kills itself with SIGKILL: `python kill_driver.py WHAT N [SCRIPT] ARGUMENTS...`.

WHAT: step (beginning of the Nth step), tensor (Nth tensor written to a checkpoint), rename (before the Nth checkpoint
gets its name), replace (before the Nth os.replace), rank (before the Nth rank is transformed), stop (SIGSTOP at the Nth
step). SCRIPT: ends with .py; default run_mindformer.py. RANK_ID must be KILL_RANK if set. Not a test itself.
"""
import os
import runpy
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from research.telechat.commands import run


def main() -> int:
    what, number, arguments = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
    calls = [0]

    def deadly(function):
        def wrapped(*args, **kwargs):
            calls[0] += 1
            if calls[0] == number:
                os.kill(os.getpid(), signal.SIGSTOP if what == "stop" else signal.SIGKILL)
            return function(*args, **kwargs)
        return wrapped

    if os.environ.get("KILL_RANK", os.environ.get("RANK_ID")) == os.environ.get("RANK_ID"):
        import mindspore.train.serialization as saving

        from research.telechat.training.log import TelechatTrainingLog
        if what in ("step", "stop"):
            TelechatTrainingLog.on_train_step_begin = deadly(TelechatTrainingLog.on_train_step_begin)
        elif what == "tensor":
            for name in ("_write_parameter_data", "_write_parameter_bytes_data"):
                setattr(saving, name, deadly(getattr(saving, name)))
        elif what == "rank":
            import mindspore
            mindspore.transform_checkpoint_by_rank = deadly(mindspore.transform_checkpoint_by_rank)
        else:
            setattr(os, what, deadly(getattr(os, what)))
    if arguments[0].endswith(".py"):
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")
    return run.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
