"""A batch of growing sequences: tokens, lengths, limits, and the blocks of the KV cache they occupy. NumPy only.

Cache slots are given out for a whole request at once, so that a request that cannot fit is refused before it starts.
"""
from typing import Any, Container, List, Optional, Sequence

import numpy as np

from research.telechat.common.errors import ConfigError


def read_prompts(input_ids: Any, pad_token_id: Optional[int], vocab_size: int) -> List[np.ndarray]:
    """Prompts as int32 arrays without the padding at their end.

    input_ids: token ids of one prompt, or a list of prompts, of equal length (padded on the right) or not.

    Raises:
        ConfigError: no ids, an empty prompt, or an id that the model's vocabulary does not have.
    """
    if isinstance(input_ids, np.ndarray) or not isinstance(input_ids, (list, tuple)):
        input_ids = np.asarray(input_ids).tolist()
    rows = input_ids if input_ids and isinstance(input_ids[0], (list, tuple, np.ndarray)) else [input_ids]
    prompts = []
    for number, row in enumerate(rows):
        ids = np.asarray(row)
        if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
            raise ConfigError(f"prompt {number}: expected a list of token ids, found {str(row)[:80]}")
        if pad_token_id is not None:
            kept = np.flatnonzero(ids != pad_token_id)
            ids = ids[:kept[-1] + 1 if kept.size else 0]
        if not ids.size:
            raise ConfigError(f"prompt {number} is empty (or holds nothing but padding); give it one token at least")
        if ids.min() < 0 or ids.max() >= vocab_size:
            wrong = ids[(ids < 0) | (ids >= vocab_size)][0]
            raise ConfigError(f"prompt {number} holds token {wrong}, but the model's vocabulary has {vocab_size} "
                              "tokens: the tokenizer belongs to another model; take the checkpoint's own")
        prompts.append(ids.astype(np.int32))
    return prompts


class Batch:
    """Sequences that grow together.

    Attributes: `tokens` [B, longest limit] int32; `lengths`, `prompt_lengths`, `limits` [B] int32, tokens;
    `finished` [B] bool.
    """

    def __init__(self, prompts: Sequence[np.ndarray], limits: Sequence[int], pad_token_id: int, context: int):
        """
        Args:
            prompts: int32 ids of each.
            limits: tokens of prompt and answer together, for each.
            pad_token_id: fills `tokens` where there is nothing yet.
            context: the model's seq_length.

        Raises:
            ConfigError: a prompt leaves no room for an answer.
        """
        for number, (prompt, limit) in enumerate(zip(prompts, limits)):
            if len(prompt) >= context:
                raise ConfigError(f"prompt {number} has {len(prompt)} tokens, but the model's seq_length is {context}: "
                                  "shorten it, or set a longer seq_length")
            if len(prompt) >= limit:
                raise ConfigError(f"prompt {number} has {len(prompt)} tokens, but max_length is {limit}: "
                                  "raise max_length, or give max_new_tokens instead")
        self.prompt_lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        self.lengths = self.prompt_lengths.copy()
        self.limits = np.minimum(np.array(limits, np.int32), context)
        self.tokens = np.full((len(prompts), int(self.limits.max())), pad_token_id, np.int32)
        for row, prompt in zip(self.tokens, prompts):
            row[:len(prompt)] = prompt
        self.finished = np.zeros(len(prompts), bool)
        self._rows = np.arange(len(prompts))

    def __len__(self) -> int:
        return len(self.lengths)

    def sequence(self, row: int) -> np.ndarray:
        """Tokens of prompt and answer so far."""
        return self.tokens[row, :self.lengths[row]]

    @property
    def last_tokens(self) -> np.ndarray:
        """The newest token of each sequence, [B]."""
        return self.tokens[self._rows, self.lengths - 1]

    def append(self, tokens: Sequence[int], eos: Container[int]) -> None:
        """Add one of `tokens` [B] to each sequence that is not finished; an end token or the limit finishes it."""
        for row, token in enumerate(tokens):          # quicker than NumPy on so few numbers
            if not self.finished[row]:
                length = self.lengths[row]
                self.tokens[row, length] = token
                self.lengths[row] = length + 1
                self.finished[row] = token in eos or length + 1 >= self.limits[row]


class Blocks:
    """Which blocks and slots of the cache the sequences of a batch use. `tables`: [B, width] int32, -1 for no block."""

    def __init__(self, limits: np.ndarray, num_blocks: int, block_size: int, width: int):
        """limits: [B] tokens. Raises ConfigError where the cache is too small."""
        counts = -(-limits // block_size)
        if counts.sum() > num_blocks:
            raise ConfigError(f"{len(limits)} sequences of up to {limits.max()} tokens need {counts.sum()} blocks of "
                              f"{block_size} tokens in the KV cache, but num_blocks is {num_blocks}: raise num_blocks, "
                              "or ask for fewer sequences or tokens")
        self.block_size = block_size
        self.tables = np.full((len(limits), width), -1, np.int32)
        first = 0
        for row, count in zip(self.tables, counts):
            row[:count] = np.arange(first, first + count)
            first += count
        self._starts = (self.tables[:, 0] * block_size).astype(np.int32)           # blocks of a sequence are neighbours

    def slots(self, row: int, length: int) -> np.ndarray:
        """Slots of the first `length` tokens of a sequence, [length] int32."""
        return self._starts[row] + np.arange(length, dtype=np.int32)

    def newest(self, lengths: np.ndarray) -> np.ndarray:
        """Slot of the newest token of each sequence, [B] int32."""
        return self._starts + lengths - 1

    def used(self, length: int) -> np.ndarray:
        """The columns of `tables` that sequences of up to `length` tokens need."""
        return np.ascontiguousarray(self.tables[:, :-(-length // self.block_size)])
