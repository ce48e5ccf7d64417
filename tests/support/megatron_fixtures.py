"""Megatron's data sets, written as its documentation describes them, and the same tokens as text would be split."""
import struct
from pathlib import Path

import numpy as np

from research.telechat.data.documents import cut_document

CODES = {np.uint8: 1, np.int32: 4, np.uint16: 8, np.float32: 7}


def write_megatron(prefix, documents, dtype=np.uint16):
    """PREFIX.bin and PREFIX.idx of `documents`, lists of ids; the prefix."""
    lengths = np.array([len(document) for document in documents], np.int32)
    starts = (np.cumsum(lengths, dtype=np.int64) - lengths) * np.dtype(dtype).itemsize
    Path(f"{prefix}.bin").write_bytes(np.concatenate(documents).astype(dtype).tobytes())
    Path(f"{prefix}.idx").write_bytes(
        b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, CODES[dtype], len(documents), len(documents) + 1)
        + lengths.tobytes() + starts.tobytes() + np.arange(len(documents) + 1, dtype=np.int64).tobytes())
    return str(prefix)


def as_text(stream, length):
    """(ids, labels) of the whole records that preprocessing cuts from a long document, [records, N + 1] each."""
    marked = np.asarray(stream, np.int64)
    pieces = [piece for piece in cut_document(marked, length + 1).pieces if len(piece) == length + 1]
    ids = np.array([np.where(piece < 0, ~piece, piece) for piece in pieces])
    return ids, np.where(np.array(pieces) < 0, -100, ids)
