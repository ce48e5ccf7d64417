"""The check of a data set against the recipe, before the first step of training."""
import numpy as np
import pytest

from research.telechat.telechat_dataset_meta import check_dataset, check_dataset_meta, check_records, write_meta
from research.telechat.telechat_dataset_writer import DATASET_NAME, DatasetWriter
from research.telechat.telechat_variants import ConfigError


def data_set(folder, **changes):
    folder.mkdir(exist_ok=True)
    (folder / DATASET_NAME).write_bytes(b"12345")
    write_meta(folder, {"records": 3, "record_length": 65, "max_token_id": 99, "pad_token_id": 3, "vocab_size": 100,
                        "tokenizer": "t.model", "columns": ["input_ids", "labels"], "files": {DATASET_NAME: 5},
                        **changes})
    return folder


FITS = {"vocab_size": 100, "seq_length": 64, "pad_token_id": 3}


def test_data_set_that_fits(tmp_path):
    folder = data_set(tmp_path / "d")
    assert check_dataset_meta(folder, **FITS) is None
    assert check_dataset_meta(folder / DATASET_NAME, **{**FITS, "pad_token_id": None}) is None


@pytest.mark.parametrize("recipe,changes,words", [
    ({"vocab_size": 99}, {}, "holds token id 99, the recipe's vocab_size is 99"),
    ({"seq_length": 128}, {}, "records of 65 tokens, the recipe's seq_length 128 needs 129; it was made with --max"),
    ({"pad_token_id": 0}, {}, "padded with id 3, the recipe's pad_token_id is 0"),
    ({}, {"records": 0}, "is empty"),
    ({}, {"format_version": 99}, "format version 99"),
    ({"document_boundaries": True}, {}, "no column actual_seq_len"),
    ({}, {"files": {DATASET_NAME: 6}}, f"the file {DATASET_NAME} should have 6 bytes and has 5"),
    ({}, {"files": {"new_dataset_1.mindrecord": 6}}, "is missing"),
])
def test_data_set_that_does_not_fit(tmp_path, recipe, changes, words):
    folder = data_set(tmp_path / "d", **changes)
    with pytest.raises(ConfigError, match=words) as caught:
        check_dataset_meta(folder, **{**FITS, **recipe})
    assert "\n" not in str(caught.value)


def test_data_set_without_meta(tmp_path):
    out = tmp_path / "out"
    row = np.arange(535, 600, dtype=np.int32)
    with DatasetWriter(out, {"input_ids": 65, "labels": 65}) as writer:
        writer.add({"input_ids": row, "labels": row})
        writer.finish({})
    (out / "meta.json").unlink()
    assert "has no meta.json" in check_dataset(out, vocab_size=600, seq_length=64)
    with pytest.raises(ConfigError, match="records of 65 tokens, the recipe's seq_length 32"):
        check_dataset(out, vocab_size=600, seq_length=32)
    with pytest.raises(ConfigError, match="the recipe's vocab_size is 100"):
        check_records(out / DATASET_NAME, vocab_size=100, seq_length=64)
    (out / DATASET_NAME).write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match="is not a readable MindRecord file"):
        check_records(out, vocab_size=600, seq_length=64)


def test_data_set_that_is_not_there(tmp_path):
    for path, words in ((tmp_path / "gone", "data set not found"), (tmp_path, "holds no .mindrecord file")):
        with pytest.raises(ConfigError, match=words):
            check_dataset_meta(path, **FITS)
    folder = data_set(tmp_path / "d")
    (folder / "meta.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        check_dataset_meta(folder, **FITS)
