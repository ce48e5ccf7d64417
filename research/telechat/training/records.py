"""Finds the records that a training step has read, to identify the one that made the loss NaN.

The order of the data is a function of seed, epoch and step, so that the batches of any step can be read once more, also
where the device fetched them by itself (sink mode). MindSpore is imported by the function that reads the files.
"""
import hashlib
from typing import TYPE_CHECKING, Dict, Iterable, Iterator, List, Optional

import numpy as np

if TYPE_CHECKING:
    from mindspore.dataset import Dataset

_STEPS, _NUMBERS = 8, 16                   # steps, and numbers of a step, that a message names; the report has all


def step_batches(dataset: "Dataset", first: int, last: int) -> Iterator[np.ndarray]:
    """The token ids [B, N + 1] that this process read in each of the steps `first` to `last`, counted from 1.

    dataset: the pipeline of the training (MindSpore Dataset), which stays as it is. Steps count from the beginning of
    the training, also where it was resumed. Raises ValueError where there are fewer.
    """
    kept = dataset._global_step
    dataset.set_init_step(first - 1)                       # as a resumption does: the shuffle of the epoch is repeated
    try:
        rows = dataset.create_dict_iterator(num_epochs=-(-last // dataset.get_dataset_size()), output_numpy=True)
    finally:
        dataset._global_step = kept
    step = first
    while step <= last:                                    # an iterator ends with every epoch and then continues
        before = step
        for row in rows:
            yield row["input_ids"]
            step += 1
            if step > last:
                return
        if step == before:
            raise ValueError(f"the data end before step {last}")


def record_numbers(batches: Iterable[np.ndarray], files: List[str]) -> List[List[Optional[int]]]:
    """For each batch [B, N + 1] the numbers of its records, from 0 in the order of the MindRecord `files`.

    Of records with the same tokens the first is named; None: no record has these tokens. Reads all data once.
    """
    from mindspore.dataset import MindDataset
    wanted = [[_digest(row) for row in batch] for batch in batches]
    found: Dict[bytes, Optional[int]] = {row: None for batch in wanted for row in batch}
    data = MindDataset(files, columns_list=["input_ids"], shuffle=False)
    for number, row in enumerate(data.create_tuple_iterator(num_epochs=1, output_numpy=True)):
        tokens = _digest(row[0])
        if tokens in found and found[tokens] is None:
            found[tokens] = number
    return [[found[row] for row in batch] for batch in wanted]


def _digest(tokens: np.ndarray) -> bytes:
    return hashlib.blake2b(tokens.astype(np.int32).tobytes(), digest_size=16).digest()


def describe_records(records: Dict[int, List[Optional[int]]], reader: str = "") -> str:
    """One clause about the records of one or several steps.

    records: numbers by step. reader: which process read them, " by rank 1"; "" where there is one only.
    """
    steps = sorted(records)
    if len(steps) == 1:
        return f"records {_listed(records[steps[0]])} of the training data{reader and f', read{reader}'}"
    parts = [f"step {step}: {_listed(records[step])}" for step in steps[:_STEPS]]
    if len(steps) > _STEPS:
        parts.append(f"{len(steps) - _STEPS} more steps in training_report.json")
    return (f"it began in one of the steps {steps[0]} to {steps[-1]}, which read{reader} these records of the training "
            f"data: {'; '.join(parts)}")


def _listed(numbers: List[Optional[int]]) -> str:
    """Numbers with commas; those beyond the limit are counted."""
    shown = ["unknown" if number is None else str(number) for number in numbers[:_NUMBERS]]
    rest = len(numbers) - _NUMBERS
    return ", ".join(shown) + (f" and {rest} more" if rest > 0 else "")
