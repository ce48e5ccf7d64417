"""The check of a data set against the recipe, before the first step of training."""
import json
import os
import random

import numpy as np
import pytest

from research.telechat import __version__
from research.telechat.common.errors import ConfigError
from research.telechat.data import scan as scan
from research.telechat.data import writer as dataset_writer
from research.telechat.data.meta import check_dataset_meta, check_hashes, read_meta, write_meta
from research.telechat.data.scan import check_dataset, check_records
from research.telechat.data.writer import DATASET_NAME, DatasetWriter


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
    assert read_meta(folder)["telechat_version"] == __version__
    assert check_dataset_meta(folder / DATASET_NAME, **{**FITS, "pad_token_id": None}) is None


@pytest.mark.parametrize("recipe,changes,words", [
    ({"vocab_size": 99}, {}, "contains token id 99, but the recipe's vocab_size is 99"),
    ({"seq_length": 128}, {}, "records of 65 tokens, but the recipe's seq_length 128 needs 129; it was created with"),
    ({"pad_token_id": 0}, {}, "padded with 3, but the recipe's pad_token_id is 0"),
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
    with pytest.raises(ConfigError, match="records of 65 tokens, but the recipe's seq_length 32"):
        check_dataset(out, vocab_size=600, seq_length=32)
    with pytest.raises(ConfigError, match="the recipe's vocab_size is 100"):
        check_records(out / DATASET_NAME, vocab_size=100, seq_length=64)
    (out / DATASET_NAME).write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match="is not a readable MindRecord file"):
        check_records(out, vocab_size=600, seq_length=64)


def small(out, overwrite=False):
    """A data set of three records."""
    with DatasetWriter(out, {"input_ids": 65, "labels": 65}, overwrite=overwrite) as writer:
        for first in range(3):
            row = np.arange(first, first + 65, dtype=np.int32)
            writer.add({"input_ids": row, "labels": row})
        writer.finish({"record_length": 65, "pad_token_id": 3}, {"lengths.png": b"a picture"})
    return out


def test_no_flipped_bit_of_a_data_set_is_accepted(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "umask", None)                   # nobody may change it for a moment
    out = small(tmp_path / "out")
    assert check_hashes(out) == check_hashes(out / DATASET_NAME) == 2
    rng = random.Random(0)
    for turn in range(100):
        path = out / rng.choice([DATASET_NAME, f"{DATASET_NAME}.db"])
        data = bytearray(path.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        before = path.read_bytes()
        path.write_bytes(data)
        with pytest.raises(ConfigError, match=r"has the SHA-256 .* preprocess again"):
            check_hashes(out, remember=bool(turn % 2))
        path.write_bytes(before)


def test_reading_does_not_change_the_files(tmp_path):
    out = small(tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "meta.json").rename(tmp_path / "meta.json")
    check_records(out, vocab_size=600, seq_length=64)        # reads it with MindSpore
    (tmp_path / "meta.json").rename(out / "meta.json")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert check_hashes(out, remember=False) == 2


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_follow_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        out = small(tmp_path / "out")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o666 & ~mask}
    assert len(list(out.iterdir())) == 4


def test_foreign_files_stay_and_own_ones_go(tmp_path):
    out = small(tmp_path / "out")
    small(out)                                               # its own
    for name in (DATASET_NAME, f"{DATASET_NAME}.db", "lengths.png", "meta.json", "report.json"):
        whole = (out / name).read_bytes() if (out / name).exists() else None
        (out / name).write_bytes(b"foreign")
        with pytest.raises(ConfigError, match=rf"(?:{name}|and \d more).* would be replaced"):
            small(out)
        assert (out / name).read_bytes() == b"foreign" and not (out / ".telechat.lock").exists()
        (out / name).unlink()
        if whole is not None:
            (out / name).write_bytes(whole)
    (out / "lengths.png").write_bytes(b"foreign")
    small(out, overwrite=True)
    assert check_hashes(out, remember=False) == 2


def test_a_run_that_died_while_it_replaced_the_files_is_repeated(tmp_path, monkeypatch):
    out = small(tmp_path / "out")
    real, calls = os.replace, []

    def dying(source, target):
        calls.append(target)
        if len(calls) == 4:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(dataset_writer.os, "replace", dying)
    monkeypatch.setattr(dataset_writer.shutil, "rmtree", lambda *_, **__: None)     # as after SIGKILL
    with pytest.raises(KeyboardInterrupt):
        small(out)
    monkeypatch.undo()
    assert not (out / "meta.json").exists() and (out / DATASET_NAME).exists()
    left = next(out.glob(".unfinished-*"))
    left.rename(out / f".unfinished-{2 ** 22 + 1}")                                 # of a process that is gone
    small(out)
    assert check_hashes(out, remember=False) == 2 and not list(out.glob(".unfinished-*"))


def test_what_training_would_read_besides_the_data_set_is_named(tmp_path):
    out = data_set(tmp_path / "d")
    for other in ("new_dataset_7.mindrecord", "sub/x.mindrecord0"):
        (out / other).parent.mkdir(exist_ok=True)
        (out / other).write_bytes(b"")
        with pytest.raises(ConfigError, match=rf"{other} is not listed in its meta\.json"):
            check_dataset_meta(out, **FITS)
        (out / other).unlink()
    (out / ".unfinished-99").mkdir()
    for name in ("whole", "without meta.json"):
        with pytest.raises(ConfigError, match=r"is writing to this folder, or was killed \(\.unfinished-99 is there\)"):
            check_dataset_meta(out, **FITS)
        if name == "whole":
            check_dataset_meta(out / DATASET_NAME, **FITS)
            (out / "meta.json").unlink()


def without_meta(out, count=2100, changed=None, value=0, column="input_ids", length=65):
    """A data set of `count` records with ids up to 599 and no meta.json; record `changed` holds `value` in `column`."""
    with DatasetWriter(out, {"input_ids": length, "labels": length}, file_bytes=1 << 17, overwrite=True) as writer:
        for number in range(count):
            row = np.arange(600 - length, 600, dtype=np.int32)
            record = {"input_ids": row, "labels": row.copy()}
            if number == changed:
                record[column] = np.where(row == row[7], value, row).astype(np.int32)
            writer.add(record)
        writer.finish({})
    (out / "meta.json").unlink()
    return out


@pytest.mark.parametrize(("changed", "value", "column", "words"), [
    (2099, 600, "input_ids", "contains token id 600, but the recipe's vocab_size is 600"),
    (300, 70000, "labels", "contains token id 70000"),
    (2099, -5, "input_ids", "contains token id -5 in input_ids; ids start at 0"),
])
def test_one_wrong_id_anywhere_is_found(tmp_path, changed, value, column, words):
    out = without_meta(tmp_path / "out", changed=changed, value=value, column=column)
    with pytest.raises(ConfigError, match=words):
        check_records(out, vocab_size=600, seq_length=64)


def test_ignored_labels_may_be_negative(tmp_path):
    out = without_meta(tmp_path / "out", 20, changed=3, value=-100, column="labels")
    assert check_records(out, vocab_size=600, seq_length=64) == "All 20 records were read: token ids 535 to 599"


def test_reading_is_remembered_until_a_file_changes(tmp_path, monkeypatch):
    out, remember = without_meta(tmp_path / "out"), tmp_path / "output" / "checks.json"
    text = check_records(out, vocab_size=600, seq_length=64, remember=remember)
    assert text == "All 2,100 records were read: token ids 535 to 599" and len(list(out.glob("*.mindrecord"))) > 1

    def again(*_):
        raise AssertionError("read again")
    monkeypatch.setattr(scan, "_read", again)
    assert check_records(out, vocab_size=600, seq_length=64, remember=remember) == text
    with pytest.raises(ConfigError, match="the recipe's vocab_size is 599"):
        check_records(out, vocab_size=599, seq_length=64, remember=remember)
    monkeypatch.undo()
    without_meta(out, changed=500, value=700)
    with pytest.raises(ConfigError, match="contains token id 700"):
        check_records(out, vocab_size=600, seq_length=64, remember=remember)
    for content in ("{", "[]", '{"x": 1, "y": {"records": "many"}}'):
        remember.write_text(content)
        with pytest.raises(ConfigError, match="contains token id 700"):
            check_records(out, vocab_size=600, seq_length=64, remember=remember)
    without_meta(out)
    remember.unlink()
    remember.mkdir()                                          # cannot be written: only slower next time
    assert check_records(out, vocab_size=600, seq_length=64, remember=remember) == text


def test_of_a_large_data_set_evenly_spread_parts_are_read(tmp_path):
    out, remember = without_meta(tmp_path / "out", changed=2099, value=600), tmp_path / "checks.json"
    bound = 64 * 8 * 65
    with pytest.raises(ConfigError, match="contains token id 600"):          # the last record is among the parts
        check_records(out, vocab_size=600, seq_length=64, most_bytes=bound)
    assert check_records(out, vocab_size=601, seq_length=64, most_bytes=bound, remember=remember) == (
        "64 of 2,100 records were read: token ids 535 to 600")
    (found,) = json.loads(remember.read_text()).values()
    assert found == {"records": 2100, "read": 64, "lowest": 535, "highest": 600}
    assert "2 of 2,100" in check_records(out, vocab_size=601, seq_length=64, most_bytes=2 * 8 * 65)


def test_only_rank_0_reads_all(tmp_path, monkeypatch):
    out = without_meta(tmp_path / "out", changed=500, value=700)
    monkeypatch.setenv("RANK_ID", "1")
    assert check_records(out, vocab_size=600, seq_length=64) == "Rank 0 reads its records"
    with pytest.raises(ConfigError, match="records of 65 tokens"):
        check_records(out, vocab_size=600, seq_length=32)


def test_records_that_differ_in_length(tmp_path):
    from mindspore.mindrecord import FileWriter
    writer = FileWriter(str(tmp_path / DATASET_NAME), 1)         # as of another program
    writer.add_schema({name: {"type": "int32", "shape": [-1]} for name in ("input_ids", "labels")}, "other")
    writer.write_raw_data([dict.fromkeys(("input_ids", "labels"), np.zeros(length, np.int32))
                           for length in (65, 65, 70)])
    writer.commit()
    with pytest.raises(ConfigError, match="its records differ in length") as caught:
        check_records(tmp_path, vocab_size=600, seq_length=64)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("held", [1 << 18, 32 << 20])
def test_several_files_are_read_as_one_data_set(tmp_path, monkeypatch, held):
    """Also where the last file is begun with few records left: MindDataset wants all files of one layout."""
    from mindspore.dataset import MindDataset
    monkeypatch.setattr(dataset_writer, "_HELD_BYTES", held)
    out = without_meta(tmp_path / "out", 3 * 1008 + 5)
    files = sorted(map(str, out.glob("*.mindrecord")))
    assert len(files) == 4 and MindDataset(files, shuffle=False).get_dataset_size() == 3 * 1008 + 5


def test_data_set_that_is_not_there(tmp_path):
    for path, words in ((tmp_path / "gone", "data set not found"), (tmp_path, "contains no .mindrecord file")):
        with pytest.raises(ConfigError, match=words):
            check_dataset_meta(path, **FITS)
    folder = data_set(tmp_path / "d")
    (folder / "meta.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        check_dataset_meta(folder, **FITS)
