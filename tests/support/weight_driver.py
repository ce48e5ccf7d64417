"""One step on sequences with very unequal numbers of answer tokens, in parts or not; as a script, a data-parallel rank.

    msrun ... tests/support/weight_driver.py FOLDER     writes FOLDER/rank_N/{plain,accumulated}.npz
"""
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/support")]

ROWS, LENGTH = 4, 33


def batch():
    """input_ids, labels [4, 33] and the ends of the packed documents [4, 3]: 1, 31, 0 and 8 tokens count."""
    rng = np.random.default_rng(5)
    ids = rng.integers(4, 97, (ROWS, LENGTH)).astype(np.int32)
    labels = ids.copy()
    labels[0, :20], labels[0, 21:], labels[1, 1], labels[2], labels[3, :25] = -100, -100, -100, -100, -100
    ends = np.array([[21, 32, 32], [7, 20, 32], [32, 32, 32], [10, 25, 32]], np.int32)
    return ids, labels, ends


def take_steps(rows=slice(None), steps=2, interleave=1, pipelined=1, parallel_mode="stand_alone", **settings):
    """{name of each value: array} after some steps: loss and norm of each, moments after the first, weights at last.

    Then comes a step in which no token counts: its loss and norm, and whether all weights are finite after it.

    rows: those of the batch; interleave, pipelined: micro-batches of MindSpore's and of MindFormers' cell around it.
    """
    import mindspore as ms
    from mindformers.wrapper.wrapper import PipelineCellWithTwoOutput
    from mindspore import Tensor, nn
    from model_fixtures import HF_CONFIGS, build_model, random_official

    from research.telechat.training.optimizer import TelechatAdamW
    from research.telechat.training.step import TelechatTrainOneStepCell, step_values
    ms.reset_auto_parallel_context()                   # MindFormers inlines lazily in every other mode
    hf_config = {**HF_CONFIGS["12b"], "n_layer": 1}
    network = build_model(hf_config, random_official(hf_config), document_boundaries=True).set_train(True)
    # eps: large, so that rounding near 0 does not turn steps around
    optimizer = TelechatAdamW(network.trainable_params(), 1e-2, weight_decay=0.01, eps=1e-4)
    network = nn.MicroBatchInterleaved(network, interleave) if interleave > 1 else network
    network = PipelineCellWithTwoOutput(network, pipelined) if pipelined > 1 else network
    ms.set_auto_parallel_context(parallel_mode=parallel_mode)
    step = TelechatTrainOneStepCell(network, optimizer, use_clip_grad=True, max_grad_norm=1.0, scale_sense=1.0,
                                    **settings).set_train()
    found = {}
    for number in range(steps):
        values = step_values(step(*(Tensor(each[rows]) for each in batch())))
        found.update({f"loss {number}": values["loss"], f"norm {number}": values["global_norm"]})
        if number == 0:
            found.update({parameter.name.replace("optimizer.", ""): parameter.asnumpy().copy()
                          for parameter in (*optimizer.exp_avg, *optimizer.exp_avg_sq)})
    found.update({parameter.name: parameter.asnumpy().copy() for parameter in optimizer._parameters})
    ids, labels, ends = (each[rows] for each in batch())
    values = step_values(step(Tensor(ids), Tensor(np.full_like(labels, -100)), Tensor(ends)))
    found.update({"loss of nothing": values["loss"], "norm of nothing": values["global_norm"]})
    found["finite"] = float(all(np.isfinite(parameter.asnumpy()).all() for parameter in optimizer._parameters))
    return found


def main():
    """Take the steps as one of two ranks."""
    import mindspore as ms
    from mindspore.communication import get_rank, init
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
    init()
    rank = get_rank()
    folder = Path(sys.argv[1]) / f"rank_{rank}"
    folder.mkdir(parents=True)
    rows = slice(2 * rank, 2 * rank + 2)
    np.savez(folder / "plain.npz", **take_steps(rows, parallel_mode="data_parallel"))
    np.savez(folder / "accumulated.npz", **take_steps(rows, parallel_mode="data_parallel", accumulation_steps=2))


if __name__ == "__main__":
    main()
