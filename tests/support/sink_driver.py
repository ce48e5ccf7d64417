"""run_mindformer.py on a CPU, with callbacks called as in sink mode: `python sink_driver.py ARGUMENTS...`.

A CPU cannot sink (MindSpore then runs every step from Python). Here steps run from Python too, but callbacks see what
they see on an Ascend: they are called once in sink_size steps, an "epoch" is that many, and the batch is not at hand.
The token ids of every step go to the file $READ_LOG.RANK, one JSON list a line. Not a test itself.
"""
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from research.telechat.commands import run


def sunk_process(self, epoch, dataset, list_callback=None, cb_params=None, initial_epoch=0, valid_infos=None):
    """Model._train_dataset_sink_process with steps that run from Python."""
    from mindspore.train.callback import RunContext
    size = cb_params.batch_num
    helper, _ = self._exec_preprocess(is_train=True, dataset=dataset, dataset_sink_mode=False, epoch_num=epoch)
    cb_params.dataset_sink_mode = True
    context = RunContext(cb_params)
    list_callback.on_train_begin(context)

    def endless():
        while True:
            for batch in helper:
                with open(f"{os.environ['READ_LOG']}.{os.environ.get('RANK_ID', '0')}", "a") as log:
                    log.write(json.dumps(batch[0].asnumpy().tolist()) + "\n")
                yield batch

    batches = endless()
    for number in range(initial_epoch, epoch):
        cb_params.cur_epoch_num = number + 1
        list_callback.on_train_epoch_begin(context)
        cb_params.cur_step_num += size
        cb_params.train_dataset_element = ()
        list_callback.on_train_step_begin(context)
        for _ in range(size):
            self._check_network_mode(self._train_network, True)
            cb_params.net_outputs = self._train_network(*next(batches))
        list_callback.on_train_step_end(context)
        list_callback.on_train_epoch_end(context)
    list_callback.on_train_end(context)


def main() -> int:
    from mindspore.train.model import Model

    from research.telechat.run import job as run_job
    adapt = run_job.adapt_to_cpu

    def adapt_and_sink(config):
        adapt(config)
        config.runner_config.sink_mode = True

    run_job.adapt_to_cpu = adapt_and_sink
    Model._train_process = sunk_process
    return run.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
