"""The records behind a loss that is not finite: which a step has read, in sink mode, shuffled, by rank, resumed."""
import json
import sys

import numpy as np
import pytest
from training_fixtures import SEQ, VOCAB, command, read_log, run, run_two, write_records

from research.telechat.training.records import describe_records, record_numbers, step_batches

RECORDS, BATCH, SEED = 11, 2, 0                        # 5 steps per epoch, one record left out of each
SINK = "tests/support/sink_driver.py"
POISON = VOCAB - 1                                     # a token whose embedding is NaN


def test_one_step_is_named_by_its_records():
    assert describe_records({5: [4, 5]}) == "records 4, 5 of the training data"
    assert describe_records({5: [4, None]}, " by rank 1") == "records 4, unknown of the training data, read by rank 1"


def test_several_steps_are_told_apart_and_counted():
    text = describe_records({9: [16, 3], 10: [2, 7]})
    assert "one of the steps 9 to 10," in text and text.endswith("step 9: 16, 3; step 10: 2, 7")
    text = describe_records({step: list(range(20)) for step in range(1, 101)}, " by rank 3")
    assert "which read by rank 3" in text and text.count("15 and 4 more") == 8
    assert text.endswith("92 more steps in training_report.json")


def pipeline(path, shard=None, shards=None):
    """The data set as MindFormers builds it for training."""
    import mindspore.dataset as ds
    ds.config.set_seed(SEED)
    data = ds.MindDataset(str(path), columns_list=["input_ids", "labels"], shuffle=True, num_shards=shards,
                          shard_id=shard)
    return data.batch(BATCH, drop_remainder=True).project(["input_ids", "labels"])


def true_order(path, epochs, shard=None, shards=None):
    """Records of every step, by reading from the very beginning; needs records that differ."""
    from mindspore.dataset import MindDataset
    plain = MindDataset(str(path), columns_list=["input_ids"], shuffle=False)
    numbers = {row[0].tobytes(): number for number, row in enumerate(plain.create_tuple_iterator(output_numpy=True))}
    batches = pipeline(path, shard, shards).create_tuple_iterator(num_epochs=epochs, output_numpy=True)
    return [[numbers[row.tobytes()] for row in batch[0]] for _ in range(epochs) for batch in batches]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rows = np.random.default_rng(0).integers(4, POISON, (RECORDS, SEQ + 1))
    return write_records(tmp_path_factory.mktemp("records") / "data.mindrecord", rows), rows


@pytest.mark.parametrize(("shard", "shards"), [(None, None), (0, 2), (1, 2)])
def test_any_steps_are_read_again_in_the_order_of_the_training(data, shard, shards):
    path, _ = data
    order = true_order(path, 4, shard, shards)
    assert order[:5] != order[5:10]                    # every epoch has its own
    training = pipeline(path, shard, shards)
    training.set_init_step(3)                          # as a resumed training has it
    for first in range(1, len(order) + 1):
        last = min(first + 3, len(order))
        assert record_numbers(step_batches(training, first, last), [str(path)]) == order[first - 1:last], first
    assert training.get_init_step() == 3


def test_equal_and_unknown_records(data, tmp_path):
    _, rows = data
    path = write_records(tmp_path / "twice.mindrecord", np.concatenate([rows, rows[::-1]]))
    batch = np.stack([rows[7], rows[0], rows[7] + 1]).astype(np.int32)
    assert record_numbers([batch], [str(path)]) == [[7, 0, None]]


def test_rows_of_the_log_stand_for_the_steps_between_two_returns(data, tmp_path, monkeypatch):
    """The callback alone, with steps as sink mode counts them: 4 at once, resumed at step 8."""
    from types import SimpleNamespace

    import mindspore as ms

    from research.telechat.common.errors import TrainingStopped
    from research.telechat.training import log as log
    path, _ = data
    order = true_order(path, 4)
    monkeypatch.setattr(log, "get_output_root_path", lambda: str(tmp_path))
    callback = log.TelechatTrainingLog(run_info={"first_step": 8, "data_files": [str(path)], "cards": 1})
    params = SimpleNamespace(cur_step_num=0, cur_epoch_num=3, epoch_num=2, batch_num=4, list_callback=[],
                             train_dataset=pipeline(path), train_dataset_element=(), net_outputs=None)
    context = SimpleNamespace(original_args=lambda: params)
    callback.on_train_begin(context)
    for loss in (2.0, float("nan")):
        params.cur_step_num += 4
        params.net_outputs = (ms.Tensor(loss), ms.Tensor(False), ms.Tensor(1.0), ms.Tensor(1e-3), ms.Tensor(1.0))
        if loss == 2.0:
            callback.on_train_step_end(context)
    with pytest.raises(TrainingStopped, match="step 16: the loss is nan") as caught:
        callback.on_train_step_end(context)
    expected = "; ".join(f"step {step}: {order[step - 1][0]}, {order[step - 1][1]}" for step in range(13, 17))
    assert f"one of the steps 13 to 16, which read these records of the training data: {expected};" in str(caught.value)
    report = json.loads((tmp_path / "training_report.json").read_text())
    assert report["records_of_steps"] == {str(step): order[step - 1] for step in range(13, 17)}


TRACKER = """
calls = []
def init(**named): calls.append(("init", named))
def log(values, step): calls.append(("log", step, values)); 1 / (step != 3)
def finish(): calls.append(("finish",))
"""


def test_rows_go_to_tensorboard_and_to_a_tracker(tmp_path, monkeypatch):
    """All figures arrive; a tracker that fails does not end the training; a step that is saved is marked."""
    from types import SimpleNamespace

    import mindspore as ms

    from research.telechat.common.errors import ConfigError
    from research.telechat.training import log
    (tmp_path / "own_tracker.py").write_text(TRACKER)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(log, "get_output_root_path", lambda: str(tmp_path))
    board = []
    writer = SimpleNamespace(add_scalar=lambda name, value, global_step: board.append((name, global_step, value)))
    monkeypatch.setattr(log, "get_tensorboard_writer", lambda: writer)
    info = {"tokens_per_step_per_card": 100, "flops_per_token": 1e3, "cards": 1}
    callback = log.TelechatTrainingLog(run_info=info, tracker="own_tracker", tracker_args={"project": "p"},
                                       peak_tflops=1.0)
    params = SimpleNamespace(cur_step_num=0, cur_epoch_num=1, epoch_num=1, batch_num=4, list_callback=[])
    context = SimpleNamespace(original_args=lambda: params)
    callback.on_train_begin(context)
    for step in range(1, 5):
        params.cur_step_num = step
        params.net_outputs = (ms.Tensor(2.0), ms.Tensor(False), ms.Tensor(1.0), ms.Tensor(1e-3), ms.Tensor(1.0))
        (callback.before_saving if step == 4 else callback.on_train_step_end)(context)
    callback.on_train_end(context)
    rows = [json.loads(line) for line in (tmp_path / "training_log.jsonl").read_text().splitlines()]
    assert [row.get("checkpoint", False) for row in rows] == [False, False, False, True]
    calls = sys.modules["own_tracker"].calls
    assert calls[0] == ("init", {"config": info, "project": "p"}) and calls[-1] == ("finish",)
    sent = [call for call in calls if call[0] == "log"]
    assert [call[1] for call in sent] == [1, 2, 3, 4, 4] and sent[1][2]["loss"] == 2.0 and "mfu" in sent[1][2]
    assert {(name, step) for name, step, _ in board} == {(name, step) for name in (
        "tokens per second per card", "mfu", "memory (GB)") for step in range(1, 5)}
    with pytest.raises(ConfigError, match=r"no_such_tracker.*install it"):
        log.TelechatTrainingLog(tracker="no_such_tracker")
    with pytest.raises(ConfigError, match=r"'json' has no function log\(values"):
        log.TelechatTrainingLog(tracker="json")


def test_data_that_cannot_be_read_again_do_not_hide_the_stop(tmp_path, monkeypatch):
    from types import SimpleNamespace

    import mindspore as ms

    from research.telechat.common.errors import TrainingStopped
    from research.telechat.training import log as log
    monkeypatch.setattr(log, "get_output_root_path", lambda: str(tmp_path))
    callback = log.TelechatTrainingLog(run_info={"data_files": [str(tmp_path / "gone.mindrecord")]})
    params = SimpleNamespace(cur_step_num=1, cur_epoch_num=1, epoch_num=1, batch_num=1, train_dataset=None,
                             train_dataset_element=(), net_outputs=(ms.Tensor(float("nan")),))
    with pytest.raises(TrainingStopped, match=r"step 1: the loss is nan.*records could not be found"):
        callback.on_train_step_end(SimpleNamespace(original_args=lambda: params))


@pytest.fixture(scope="module")
def poisoned(data, tmp_path_factory):
    """(checkpoint in which one token's embedding is NaN, function that writes the data with it in one record)."""
    import mindspore as ms

    from research.telechat.telechat import TelechatForCausalLM
    from research.telechat.telechat_config import TelechatConfig
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
    model = TelechatForCausalLM(TelechatConfig(net_name="telechat_12b", amp_level="O0", seq_length=SEQ,
                                               vocab_size=VOCAB, num_layers=2, hidden_size=64, intermediate_size=96,
                                               num_heads=4))
    table = model.model.tok_embeddings.embedding_weight
    values = table.asnumpy().copy()
    values[POISON] = np.nan
    table.set_data(ms.Tensor(values))
    folder = tmp_path_factory.mktemp("poisoned")
    ms.save_checkpoint(model, str(folder / "base.ckpt"))

    def write(record):
        rows = data[1].copy()
        rows[record, 3] = POISON
        return write_records(folder / f"poisoned_{record}.mindrecord", rows)
    return folder / "base.ckpt", write


def sunk(dataset, output, *more):
    """Arguments of a training on shuffled data."""
    return command(
        dataset, output, "--train_dataset.data_loader.shuffle", "True", "--callbacks", "[{type: TelechatTrainingLog}, "
        "{type: CheckpointMonitor, prefix: t, save_checkpoint_steps: 1, keep_checkpoint_max: 99}]", *more)


def start(arguments, log, code=0):
    """Train with callbacks called as in sink mode; the error lines."""
    done = run(arguments, script=SINK, code=code, READ_LOG=str(log))
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


def records_read(log, rows):
    """Numbers of the records of every step, as the training read them; the last two tokens tell records apart."""
    numbers = {tuple(row[-2:]): number for number, row in enumerate(rows.tolist())}
    return [[numbers[tuple(row[-2:])] for row in json.loads(line)] for line in log.read_text().splitlines()]


@pytest.fixture(scope="module")
def order(data, tmp_path_factory):
    """Records of the steps of six epochs, as they are read."""
    folder = tmp_path_factory.mktemp("order")
    start(sunk(data[0], folder / "out", "--epochs", "6"), folder / "read")
    return records_read(folder / "read.0", data[1])


@pytest.mark.slow
@pytest.mark.parametrize("sink_size", [1, 2])
def test_sink_mode_names_the_record_that_makes_the_loss_nan(sink_size, order, data, poisoned, tmp_path):
    """The NaN comes when the shuffle reaches the one bad record, with sink_size 1 the one that epoch 1 leaves out.

    With sink_size 2 it must be in the later step of the two, as the loss of the other one is never seen.
    """
    base, write = poisoned
    reached = {}
    for step, batch in enumerate(order, 1):
        for record in batch:
            reached.setdefault(record, step)
    step, record = max((step, record) for record, step in reached.items() if step % sink_size == 0)
    assert step > 5 or sink_size == 2
    line, = start(sunk(write(record), tmp_path / "out", "--load_checkpoint", str(base), "--epochs", "6",
                       "--runner_config.sink_size", str(sink_size)), tmp_path / "read", code=1)
    read = records_read(tmp_path / "read.0", data[1])
    assert read == order[:step] and record in read[-1]
    assert [row["step"] for row in read_log(tmp_path / "out")] == list(range(sink_size, step + 1, sink_size))
    assert line.startswith(f"error: step {step}: the loss is nan")
    batches = [f"{one}, {two}" for one, two in read[-sink_size:]]
    if sink_size == 1:
        assert f"(records {batches[0]} of the training data; last good checkpoint: " in line
    else:
        assert (f"(it began in one of the steps {step - 1} to {step}, which read these records of the training data: "
                f"step {step - 1}: {batches[0]}; step {step}: {batches[1]}; last good checkpoint: ") in line
    assert f"t_rank_0-{step // sink_size - 1}_{sink_size}.ckpt)" in line


@pytest.mark.slow
def test_sink_mode_resumed_counts_from_the_beginning(data, tmp_path):
    """The resumed half learns at a rate that destroys the weights within a few steps."""
    half = ["--runner_config.sink_size", "2"]
    start(sunk(data[0], tmp_path / "out", *half, "--epochs", "2"), tmp_path / "one")
    line, = start(sunk(data[0], tmp_path / "out", *half, "--epochs", "4", "--resume_training", "True",
                       "--lr_schedule.learning_rate", "1e36", "--lr_schedule.warmup_ratio", "0.0"),
                  tmp_path / "two", code=1)
    step = read_log(tmp_path / "out")[-1]["step"]
    read = [batch for name in ("one.0", "two.0") for batch in records_read(tmp_path / name, data[1])]
    assert len(read) == step > 10 and f"error: step {step}: the loss is" in line
    assert "; ".join(f"step {one}: {read[one - 1][0]}, {read[one - 1][1]}" for one in (step - 1, step)) in line


@pytest.mark.slow
def test_each_rank_names_the_records_that_it_has_read(data, poisoned, tmp_path):
    base, write = poisoned
    arguments = sunk(write(4), tmp_path / "out", "--load_checkpoint", str(base), "--epochs", "3", "--use_parallel",
                     "True", "--runner_config.sink_size", "1")
    done = run_two(arguments, tmp_path / "logs", script=SINK, READ_LOG=str(tmp_path / "read"))
    assert done.returncode == 1
    read = [records_read(tmp_path / f"read.{rank}", data[1]) for rank in range(2)]
    step, rank = min((step, rank) for rank in range(2) for step, batch in enumerate(read[rank], 1) if 4 in batch)
    text = (tmp_path / f"logs/worker_{rank}.log").read_text(errors="replace")
    one, two = read[rank][step - 1]
    assert f"step {step}: the loss is nan" in text
    assert f"(records {one}, {two} of the training data, read by rank {rank}; " in text
