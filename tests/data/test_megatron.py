"""Megatron's data sets: the index, the order of samples, and labels that are shifted once."""
import random

import numpy as np
import pytest
from megatron_fixtures import as_text, write_megatron

from research.telechat.common.errors import ConfigError
from research.telechat.data.megatron import (
    build_blending_indices,
    build_exhaustive_blending_indices,
    build_sample_idx,
    check_tokens,
    document_ends,
    read_index,
    record_of,
)


def one_by_one(lengths, documents, length, extra):
    """Samples of `length` + `extra` tokens as (place in `documents`, token) pairs, counted token by token."""
    tokens = [(place, token) for place, document in enumerate(documents) for token in range(lengths[document])]
    return [tokens[start:start + length + extra] for start in range(0, len(tokens) - length - extra + 1, length)]


def taken(index, lengths, documents, extra):
    """The pairs that GPTDataset takes for each sample of an index."""
    for (first, offset), (last, end) in zip(index[:-1], index[1:]):
        yield [(place, token) for place in range(first, last + 1)
               for token in range(offset if place == first else 0,
                                  end + extra if place == last else lengths[documents[place]])]


def test_samples_are_the_tokens_one_after_the_other():
    chance = random.Random(0)
    for _ in range(300):
        lengths = np.array([chance.randrange(0, 20) for _ in range(chance.randrange(1, 8))] + [9], np.int32)
        epochs, length, extra = chance.randrange(1, 4), chance.randrange(2, 9), chance.randrange(2)
        documents = np.concatenate([chance.sample(range(len(lengths)), len(lengths)) for _ in range(epochs)])
        index = build_sample_idx(lengths, documents, length, epochs, int(lengths.sum()), True, extra)
        assert list(taken(index, lengths, documents, extra)) == one_by_one(lengths, documents, length, extra)


def test_blends_keep_to_their_shares():
    which, sample = np.zeros(1000, np.int16), np.zeros(1000, np.int64)
    build_blending_indices(which, sample, [0.5, 0.3, 0.2], 3, 1000)
    for number, share in enumerate((0.5, 0.3, 0.2)):
        assert (sample[which == number] == np.arange((which == number).sum())).all()
        counts = np.cumsum(which == number)
        assert np.abs(counts - share * np.arange(1, 1001)).max() < 2
    which, sample = np.zeros(60, np.int16), np.zeros(60, np.int64)
    build_exhaustive_blending_indices(which, sample, [10, 0, 50], 3)
    assert np.bincount(which).tolist() == [10, 0, 50]
    assert sorted(sample[which == 2]) == list(range(50)) and np.abs(np.cumsum(which == 0)[29] - 5) <= 1


def test_records_are_those_of_the_same_text_with_labels_shifted_once():
    stream, length = np.random.default_rng(0).integers(3, 200, 133), 32
    ids, labels = as_text(stream, length)
    assert len(ids) == 4
    for number, (expected, targets) in enumerate(zip(ids, labels)):
        sample = stream[number * length:(number + 1) * length + 1]
        found = record_of(sample[:-1], sample[1:], np.ones(length))
        assert (found[0] == expected).all() and (found[1][1:] == targets[1:]).all()
    counts = np.ones(length)
    counts[[3, 31]] = 0                                  # the tokens that follow inputs 3 and 31
    hidden = record_of(sample[:-1], sample[1:], counts)[1]
    assert np.flatnonzero(hidden == -100).tolist() == [0, 4, 32]


def test_ends_of_documents():
    tokens = np.array([7, 2, 8, 8, 2, 9, 2])
    assert document_ends(tokens, 2, 5).tolist() == [2, 5, 7, 7, 7]
    with pytest.raises(ConfigError, match=r"holds 3 documents, more than .*eod_pad_length \(2\); raise it"):
        document_ends(tokens, 2, 2)


def test_what_is_said_of_broken_sets(tmp_path):
    prefix = write_megatron(tmp_path / "set", [[5, 6, 7], [8, 199]])
    index = read_index(prefix)
    assert index.dtype is np.uint16 and index.lengths.tolist() == [3, 2]
    assert check_tokens(prefix, index, 200) == f"{prefix}: 2 documents, 5 tokens, highest id 199"
    with pytest.raises(ConfigError, match=r"set\.bin holds token id 199; the model's vocabulary has 199"):
        check_tokens(prefix, index, 199)
    with pytest.raises(ConfigError, match=r"there is no file .*set.idx.idx; leave the ending out"):
        read_index(f"{prefix}.idx")
    write_megatron(tmp_path / "negative", [[-1, 4]], np.int32)
    with pytest.raises(ConfigError, match="holds token id -1"):
        check_tokens(str(tmp_path / "negative"), read_index(str(tmp_path / "negative")), 200)
    write_megatron(tmp_path / "floats", [[1, 4]], np.float32)
    with pytest.raises(ConfigError, match="tokens that are whole numbers, found version 1 and type 7"):
        read_index(str(tmp_path / "floats"))
    good = (tmp_path / "set.idx").read_bytes()
    (tmp_path / "set.bin").write_bytes(b"\x05\x00")
    with pytest.raises(ConfigError, match=r"set.bin has 2 bytes, and its index asks for 10"):
        read_index(prefix)
    (tmp_path / "set.idx").write_bytes(good[:-20])
    with pytest.raises(ConfigError, match=r"set\.idx is incomplete: 2 sequences and 3 document ends"):
        read_index(prefix)
    (tmp_path / "set.idx").write_bytes(b"PK" + good)
    with pytest.raises(ConfigError, match="does not begin with MMIDIDX"):
        read_index(prefix)
