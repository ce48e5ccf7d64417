"""Megatron's data sets through MindFormers' loader: the records that training reads, and settings that are refused."""
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from megatron_fixtures import as_text, write_megatron
from mindformers.tools.register import MindFormerConfig
from training_fixtures import RECIPE, ROOT, SIZES, read_log, run, write_records

from research.telechat.common.errors import ConfigError
from research.telechat.run import megatron

N, END = 32, 2
STREAM = np.concatenate([np.random.default_rng(0).integers(3, 200, 4 * N), [END]])


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    return write_megatron(tmp_path_factory.mktemp("megatron") / "one", [STREAM])


def recipe(prefix, tmp_path, boundaries=False, section="train_dataset", **changes):
    keys = changes.pop("config", {})
    loader = {"type": megatron.THEIRS, "datasets_type": "GPTDataset", "sizes": [4, 0, 0],
              "config": {"split": "1,0,0", "data_path": [prefix], **keys}, **changes}
    config = MindFormerConfig(output_dir=str(tmp_path), **{section: {"data_loader": loader}})
    model = SimpleNamespace(seq_length=N, vocab_size=200, document_boundaries=boundaries)
    megatron.settle(config, section, model)
    return config[section].data_loader


def read(loader, columns=("input_ids", "labels"), **shares):
    settings = {key: value for key, value in loader.items() if key not in ("type", "datasets_type")}
    data = megatron.TelechatMegatronDataLoader(**settings, column_names=list(columns), batch_size=1, **shares)
    return [np.array(each) for each in zip(*data.create_tuple_iterator(num_epochs=1, output_numpy=True))]


def test_the_records_are_those_of_the_same_text(prefix, tmp_path):
    ids, labels = read(recipe(prefix, tmp_path))
    expected, targets = as_text(STREAM, N)
    order = [int(np.flatnonzero((expected == row).all(1))[0]) for row in ids]
    assert sorted(order) == [0, 1, 2, 3] and ids.dtype == np.int32
    assert (labels[:, 1:] == targets[order][:, 1:]).all() and (labels[:, 0] == -100).all()
    parts = [read(recipe(prefix, tmp_path), num_shards=2, shard_id=shard)[0] for shard in range(2)]
    assert sorted(map(tuple, np.concatenate(parts))) == sorted(map(tuple, expected))


def test_documents_and_the_loss_at_their_ends(tmp_path):
    rng = np.random.default_rng(1)
    documents = [np.append(rng.integers(3, 12, size), END) for size in (40, 5, 60, 30)]
    loader = recipe(write_megatron(tmp_path / "some", documents), tmp_path, boundaries=True,
                    config={"eod": END, "eod_mask_loss": True, "reset_attention_mask": True, "pad": 5})
    ids, labels, ends = read(loader, ("input_ids", "labels", "actual_seq_len"))
    assert (ids == END).any() and (ids == 5).any() and ends.shape == (4, 128)
    for row, targets, places in zip(ids, labels, ends):
        assert (row[:-1][places[places < N] - 1] == END).all() and (places < N).sum() >= (row[:N - 1] == END).sum()
        assert (targets[1:] == np.where(row[:-1] == END, -100, row[1:])).all()       # and those of id 5 count


def test_ranks_of_an_evaluation_read_each_sample_once(prefix, tmp_path):
    loader = recipe(prefix, tmp_path, section="eval_dataset", sizes=[0, 3, 0], phase="valid",
                    config={"data_path": None, "split": None, "valid_data_path": [prefix]})
    parts = [read(loader, num_shards=2, shard_id=shard) for shard in range(2)]
    counted = [tuple(row) for ids, labels in parts for row, target in zip(ids, labels) if (target >= 0).any()]
    assert len(counted) == len(set(counted)) == 3 and sum(len(ids) for ids, _ in parts) == 4


@pytest.mark.parametrize(("changes", "said"), [
    ({"config": {"seq_length": 64}}, "config.seq_length is 64, and model.model_config.seq_length is 32"),
    ({"config": {"create_compressed_eod_mask": True}}, "document_boundaries is False; set it to True"),
    ({"config": {"reset_position_ids": True}}, "positions begin again with each document"),
    ({"config": {"eod_mask_loss": True}}, r"config.eod: expected the id .*eod_mask_loss is True; found -1"),
    ({"config": {"eod": 200}, "boundaries": True}, "below 200, as model.model_config.document_boundaries .* found 200"),
    ({"config": {"split": "half"}}, "config.split: expected the shares"),
    ({"config": {"split": "9,1,0"}}, "for valid holds 0 tokens in 0 documents"),
    ({"config": {"data_path": []}}, "data_path: no data set is named"),
    ({"config": {"data_path": ["0.5", "nowhere"]}}, "nowhere is not a Megatron data set: there is no file nowhere.idx"),
    ({"sizes": [0, 1, 0]}, "one above 0 for train, found"),
    ({"phase": "dev"}, "phase: expected train, valid, test, found 'dev'"),
    ({"datasets_type": "BertDataset"}, "expected datasets_type: GPTDataset"),
    ({"dataset_dir": "other"}, "both other and train_dataset.data_loader.config name data sets"),
])
def test_settings_that_are_refused(prefix, tmp_path, changes, said):
    with pytest.raises(ConfigError, match=said) as error:
        recipe(prefix, tmp_path, **changes)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_training_has_the_losses_of_the_same_text(prefix, tmp_path):
    write_records(tmp_path / "text.mindrecord", as_text(STREAM, N)[0])
    loader = {"type": megatron.THEIRS, "datasets_type": "GPTDataset", "sizes": [4, 0, 0], "config": {"split": "1,0,0"}}
    (tmp_path / "megatron.yaml").write_text(yaml.safe_dump(
        {"base_config": str(ROOT / RECIPE), "train_dataset": {"data_loader": loader}}))
    losses = []
    for config, data in ((tmp_path / "megatron.yaml", prefix), (ROOT / RECIPE, tmp_path / "text.mindrecord")):
        run(["--config", str(config), "--register_path", "research/telechat", "--train_dataset", str(data),
             "--output_dir", str(tmp_path / config.stem), *SIZES, "--batch_size", "4", "--epochs", "2"])
        losses.append([(each["step"], each["loss"], each["global_norm"]) for each in read_log(tmp_path / config.stem)])
    assert np.shape(losses) == (2, 2, 3) and np.allclose(losses[0], losses[1], rtol=1e-6, atol=0)
