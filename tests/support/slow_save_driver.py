"""run_mindformer.py with checkpoints that take long to write: `python slow_save_driver.py SECONDS ARGUMENTS...`.

Every tensor takes SECONDS more. At the end it says how many steps began while a checkpoint was being written. Not a
test itself.
"""
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from research.telechat.commands import run


def main() -> int:
    import mindspore.train.serialization as saving

    from research.telechat.training import save_thread as thread
    from research.telechat.training.log import TelechatTrainingLog
    begun = [0]
    step_begin = TelechatTrainingLog.on_train_step_begin

    def counted(self, run_context):
        begun[0] += thread.writing()
        return step_begin(self, run_context)

    def slowed(write):
        def slow(*args, **kwargs):
            time.sleep(float(sys.argv[1]))
            return write(*args, **kwargs)
        return slow

    TelechatTrainingLog.on_train_step_begin = counted
    for name in ("_write_parameter_data", "_write_parameter_bytes_data"):
        setattr(saving, name, slowed(getattr(saving, name)))
    code = run.main(sys.argv[2:])
    print(f"steps begun while writing: {begun[0]}")
    return code


if __name__ == "__main__":
    sys.exit(main())
