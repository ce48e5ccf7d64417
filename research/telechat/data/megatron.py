"""Megatron's data sets, files NAME.bin and NAME.idx: what is in them, and their samples as the records of this project.

NAME.idx: `MMIDIDX\\0\\0`, version (uint64, 1), code of the token type (uint8), number of sequences and of document ends
(uint64 each), then per sequence its length (int32) and the byte in NAME.bin where it begins (int64), and the document
ends (int64). NAME.bin: the tokens. Source: IndexedDataset of Megatron-LM
(https://github.com/NVIDIA/Megatron-LM/blob/main/megatron/core/datasets/indexed_dataset.py). The order of samples is
that of MindFormers' copy of GPTDataset; the functions it has compiled are here in NumPy: no compiler is needed.
"""
import struct
from pathlib import Path
from typing import NamedTuple, Sequence, Tuple

import numpy as np

from research.telechat.common.errors import ConfigError

MAGIC = b"MMIDIDX\x00\x00"
IGNORED = -100                                         # label that does not count
_TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}    # 6 and 7 are floats
_HEADER = struct.Struct("<QBQQ")                       # version, type, sequences, document ends
_PART = 1 << 24                                        # tokens looked at together
_MOST = 1 << 30                                        # tokens of a file that are read before training


class Index(NamedTuple):
    """What NAME.idx says."""

    dtype: type
    lengths: np.ndarray                                # [sequences] int32


def files_of(prefix: str) -> Tuple[Path, Path]:
    """The two files of a set. prefix: their name without the ending, as Megatron names sets."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")


def read_index(prefix: str) -> Index:
    """What the index of a set says, checked against the size of its tokens.

    Raises:
        ConfigError: a file is missing, no index, of another version, incomplete, or not of these tokens.
    """
    tokens, index = files_of(prefix)
    for file in (index, tokens):
        if not file.is_file():
            more = "; leave the ending out" if Path(prefix).is_file() else ""
            raise ConfigError(f"data_path: {prefix} is not a Megatron data set: there is no file {file}{more}")
    data = index.read_bytes() if index.stat().st_size < 1 << 12 else np.memmap(index, np.uint8, "r")
    head = len(MAGIC) + _HEADER.size
    if len(data) < head or bytes(data[:len(MAGIC)]) != MAGIC:
        raise ConfigError(f"{index} is no index of Megatron's IndexedDataset: it does not begin with MMIDIDX; make the "
                          "set again with Megatron's preprocess_data.py")
    version, code, sequences, ends = _HEADER.unpack(bytes(data[len(MAGIC):head]))
    if version != 1 or code not in _TYPES:
        raise ConfigError(f"{index}: expected version 1 and tokens that are whole numbers, found version {version} and "
                          f"type {code}; make the set again with Megatron's preprocess_data.py")
    if len(data) < head + 12 * sequences + 8 * ends:
        raise ConfigError(f"{index} is incomplete: {sequences} sequences and {ends} document ends need "
                          f"{head + 12 * sequences + 8 * ends} bytes, it has {len(data)}; copy it again")
    lengths = np.frombuffer(data, np.int32, sequences, head)
    starts = np.frombuffer(data, np.int64, sequences, head + 4 * sequences)
    size = np.dtype(_TYPES[code]).itemsize
    needed = int((starts + lengths.astype(np.int64) * size).max()) if sequences else 0
    if sequences and (lengths.min() < 0 or starts.min() < 0 or needed > tokens.stat().st_size):
        raise ConfigError(f"{tokens} has {tokens.stat().st_size} bytes, and its index asks for {needed}: one of both "
                          "is incomplete or of another set; copy them again")
    return Index(_TYPES[code], lengths)


def check_tokens(prefix: str, index: Index, vocab_size: int) -> str:
    """What ids the set holds, for the log. Of a larger set, evenly spaced parts of 2**30 tokens in all are read.

    Raises ConfigError: ids below 0 or outside the vocabulary.
    """
    data = np.memmap(files_of(prefix)[0], index.dtype, "r") if index.lengths.sum() else np.zeros(0, index.dtype)
    parts = max(-(-len(data) // _PART), 1)
    some = range(parts) if len(data) <= _MOST else np.linspace(0, parts - 1, _MOST // _PART).astype(int)
    lowest, highest = 0, -1
    for part in some:
        tokens = data[part * _PART:(part + 1) * _PART]
        if len(tokens):
            lowest, highest = min(lowest, int(tokens.min())), max(highest, int(tokens.max()))
    if lowest < 0 or highest >= vocab_size:
        raise ConfigError(f"{files_of(prefix)[0]} holds token id {lowest if lowest < 0 else highest}; the model's "
                          f"vocabulary has {vocab_size} (0 to {vocab_size - 1}): the set was made with another "
                          "tokenizer, make it again")
    return f"{prefix}: {len(index.lengths):,} documents, {len(data):,} tokens, highest id {highest}"


def record_of(tokens: np.ndarray, labels: np.ndarray, counts: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """A sample of GPTDataset as a record of data sets here, whose labels the model shifts.

    Args:
        tokens: [N], the inputs.
        labels: [N], the id that follows each input.
        counts: [N], 0 where the loss does not count.

    Returns:
        input_ids [N + 1] and labels [N + 1] int32: position i is trained to give labels[i + 1].
    """
    ids = np.concatenate([tokens, labels[-1:]])
    targets = np.concatenate([[IGNORED], np.where(counts > 0, labels, IGNORED)])
    return ids.astype(np.int32), targets.astype(np.int32)


def document_ends(tokens: np.ndarray, end_id: int, count: int) -> np.ndarray:
    """[count] int32: the position behind each `end_id` in `tokens` [N], the rest filled up with N (data.md).

    Raises ConfigError: more documents than `count`.
    """
    ends = np.flatnonzero(tokens == end_id) + 1
    if len(ends) > count:
        raise ConfigError(f"a sample of the Megatron data set holds {len(ends)} documents, more than "
                          f"train_dataset.data_loader.config.eod_pad_length ({count}); raise it")
    return np.pad(ends, (0, count - len(ends)), constant_values=len(tokens)).astype(np.int32)


# What MindFormers compiles from helpers.cpp, with the arguments it calls it with.

def build_sample_idx(lengths: np.ndarray, documents: np.ndarray, seq_length: int, epochs: int, tokens_per_epoch: int,
                     drop_last: bool = True, extra: int = 1) -> np.ndarray:
    """Where samples begin in the documents put one after the other.

    Args:
        lengths: [sequences], tokens of each.
        documents: their numbers in the order of training, all epochs.
        seq_length: tokens from one sample's beginning to the next one's.
        epochs, tokens_per_epoch: how many tokens there are.
        drop_last: leave the rest out that fills no sample.
        extra: 1 if samples have one more token, which is the next one's first.

    Returns:
        [samples + 1, 2] int64: place in `documents`, and the token there; the last is the end.
    """
    tokens = epochs * tokens_per_epoch - extra
    samples = tokens // seq_length if drop_last else -(-tokens // seq_length)
    ends = np.cumsum(lengths[documents], dtype=np.int64)
    begins = np.arange(samples + 1, dtype=np.int64) * seq_length
    last = begins + extra - 1                          # the token by which a sample that ends here is complete
    last[0] = 0
    place = np.minimum(np.searchsorted(ends, last, side="right"), len(documents) - 1)
    offset = np.minimum(begins, ends[-1] - extra) - (ends - lengths[documents])[place]
    place[0], offset[0] = 0, 0
    return np.stack([place, offset], axis=1)


def build_blending_indices(which: np.ndarray, sample: np.ndarray, weights: Sequence[float], count: int, size: int,
                           verbose: bool = False) -> None:
    """Fill `which` and `sample` [size]: from which of `count` sets each sample comes, and its number there, so that
    after every sample the one whose share of `weights` is missing most is next."""
    del verbose
    _blend(which, sample, list(weights), [size] * count, size)


def build_exhaustive_blending_indices(which: np.ndarray, sample: np.ndarray, sizes: Sequence[int], count: int) -> None:
    """The same, until each of the `count` sets has given its `sizes` samples."""
    total = sum(sizes)
    _blend(which, sample, [size / total for size in sizes], [int(size) for size in sizes[:count]], total)


def _blend(which: np.ndarray, sample: np.ndarray, weights: Sequence[float], most: Sequence[int], size: int) -> None:
    taken, left = [0] * len(most), [number for number, each in enumerate(most) if each]
    for place in range(size):
        reached = max(float(place), 1.0)
        chosen = max(left, key=lambda number: weights[number] * reached - taken[number])
        which[place], sample[place] = chosen, taken[chosen]
        taken[chosen] += 1
        if taken[chosen] == most[chosen] and len(left) > 1:
            left.remove(chosen)
