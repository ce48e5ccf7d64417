"""The steps of generation on the device: read prompts, then one token per sequence and step.

`DirectEngine` runs graphs of its own, made for the composed cache: prompts back to back, attention over the blocks in
use only, the likeliest token found in the graph. `FrameworkEngine` goes through the `forward` of MindFormers' generator
and serves everything else: the fused kernels, and models without a cache. Which tokens come out is the same.
"""
from typing import Any, Dict, List, Optional, Tuple

import mindspore as ms
import mindspore.common.dtype as mstype
import numpy as np
from mindspore import Tensor, nn

from research.telechat.common.files import JsonObject
from research.telechat.generation.batch import Batch, Blocks
from research.telechat.spec.rope import RopeRule, rope_scaling

PREFILL_TOKENS = 256                   # prompts are read together up to so many tokens: attention is over all pairs


class Step:
    """What a step gave: `tokens()`, the likeliest next one of each sequence, and `logits()` [B, V] float32."""

    def __init__(self, logits: Any, tokens: Any):
        self._logits, self._tokens = logits, tokens

    def tokens(self) -> List[int]:
        """One for each sequence."""
        return self._tokens() if callable(self._tokens) else self._tokens.tolist()

    def logits(self) -> np.ndarray:
        """[B, V] float32."""
        return self._logits if isinstance(self._logits, np.ndarray) else self._logits.asnumpy()


def _tensor(array: np.ndarray) -> Tensor:
    """A copy of `array` as a tensor; from_numpy costs a sixth of what the constructor does."""
    return Tensor.from_numpy(np.array(array, order="C"))


def _without_graphs() -> bool:
    """Whether nothing is compiled (PyNative mode), so that the flags of the model count at every call."""
    return ms.get_context("mode") == ms.PYNATIVE_MODE


class _PromptGraph(nn.Cell):
    """Reads prompts that stand back to back."""

    def __init__(self, model: nn.Cell):
        super().__init__(auto_prefix=False)
        self.model = model
        self.set_inputs(Tensor(shape=[1, None], dtype=mstype.int32), Tensor(shape=[None], dtype=mstype.int32),
                        Tensor(shape=[None], dtype=mstype.int32))
        self.set_train(False)
        self.phase = "prefill"             # MindSpore runs this phase without checks once compiled

    def construct(self, tokens: Tensor, lengths: Tensor, slots: Tensor) -> Tuple[Tensor, Tensor]:
        """tokens: [1, T], lengths: [P], slots: [T] -> logits [P, V], likeliest tokens [P]."""
        logits = self.model.next_token(tokens, None, lengths, None, slots)
        return logits, self.model.argmax(logits, -1)


class _TokenGraph(nn.Cell):
    """Brings one token to each of a fixed number of sequences."""

    def __init__(self, model: nn.Cell, batch: int):
        super().__init__(auto_prefix=False)
        self.model = model
        self.set_inputs(Tensor(shape=[batch, 1], dtype=mstype.int32), Tensor(shape=[batch], dtype=mstype.int32),
                        Tensor(shape=[batch, None], dtype=mstype.int32), Tensor(shape=[batch], dtype=mstype.int32))
        self.set_train(False)
        self.phase = "increment"

    def construct(self, tokens: Tensor, lengths: Tensor, block_tables: Tensor, slots: Tensor) -> Tuple[Tensor, Tensor]:
        """tokens: [B, 1], lengths and slots: [B], block_tables: [B, K] -> logits [B, V], likeliest tokens [B]."""
        logits = self.model.next_token(tokens, None, lengths, block_tables, slots)
        return logits, self.model.argmax(logits, -1)


class DirectEngine:
    """Graphs of a model with the composed cache, compiled once: one for prompts, one for each batch size.

    Raises TypeError for a model with the fused kernels of the cache: these take the lengths of the sequences from the
    graph's input of the name `batch_valid_length`, on the host. The graphs here call it `lengths`, and the kernels
    would find nothing.
    """

    def __init__(self, model: nn.Cell):
        paged = [name for name, cell in model.cells_and_names() if getattr(cell, "paged", False)]
        if paged:
            raise TypeError(f"the direct engine's graphs have no input `batch_valid_length`, which the fused attention "
                            f"kernels in {paged[0]} (one of {len(paged)}) read; FrameworkEngine serves them")
        self.model = model
        self._prompts: Optional[_PromptGraph] = None
        self._tokens: Dict[int, _TokenGraph] = {}

    def read(self, batch: Batch, blocks: Blocks) -> Step:
        """Read all sequences that are not finished from their beginning."""
        flagged = self._prompts is None or _without_graphs()
        if flagged:
            self.model.add_flags_custom(is_first_iteration=True)
            self.model.model.step.add_flags(flat_prefill=True)
        if self._prompts is None:
            self._prompts = _PromptGraph(self.model)
        rows = np.flatnonzero(~batch.finished)
        tokens = np.zeros(len(batch), np.int32)
        logits: List[Tuple[np.ndarray, Tensor]] = []
        for group in self._groups(rows, batch.lengths):
            ids = np.concatenate([batch.sequence(row) for row in group])[None]
            slots = np.concatenate([blocks.slots(row, batch.lengths[row]) for row in group])
            result = self._prompts(_tensor(ids), _tensor(batch.lengths[group]), _tensor(slots))
            logits.append((group, result[0]))
            tokens[group] = result[1].asnumpy()
        if flagged:
            self.model.model.step.add_flags(flat_prefill=self.model.config.is_dynamic)
        return Step(_Scattered(len(batch), logits), tokens.tolist)

    def advance(self, batch: Batch, blocks: Blocks) -> Step:
        """Bring the newest token of each sequence."""
        graph = self._tokens.get(len(batch))
        if graph is None or _without_graphs():
            self.model.add_flags_custom(is_first_iteration=False)
        if graph is None:
            graph = self._tokens[len(batch)] = _TokenGraph(self.model, len(batch))
        result = graph(_tensor(batch.last_tokens[:, None]), _tensor(batch.lengths),
                       _tensor(blocks.used(int(batch.lengths.max()))), _tensor(blocks.newest(batch.lengths)))
        return Step(*result)

    @staticmethod
    def _groups(rows: np.ndarray, lengths: np.ndarray) -> List[np.ndarray]:
        groups: List[List[int]] = []
        total = 0
        for row in rows:
            if not groups or total + lengths[row] > PREFILL_TOKENS:
                groups.append([])
                total = 0
            groups[-1].append(row)
            total += lengths[row]
        return [np.array(group) for group in groups]


class _Scattered:
    """Logits of groups of sequences, put together when they are asked for."""

    def __init__(self, batch: int, parts: List[Tuple[np.ndarray, Tensor]]):
        self._batch, self._parts = batch, parts

    def asnumpy(self) -> np.ndarray:
        """[B, V] float32; zeros for sequences that were not read."""
        result = np.zeros((self._batch, self._parts[0][1].shape[-1]), np.float32)
        for rows, logits in self._parts:
            result[rows] = logits.asnumpy()
        return result


class FrameworkEngine:
    """Steps through `forward` of MindFormers' generator, with and without a cache."""

    def __init__(self, model: nn.Cell):
        self.model, self.config = model, model.config

    def read(self, batch: Batch, blocks: Optional[Blocks]) -> Step:
        """Read all sequences from their beginning."""
        if self.config.is_dynamic and self.model.use_past:
            self.model.set_dynamic_inputs()
        return self._forward(batch, blocks, prefill=True)

    def advance(self, batch: Batch, blocks: Optional[Blocks]) -> Step:
        """Bring the newest token of each sequence; without a cache, read them again."""
        return self._forward(batch, blocks, prefill=False)

    def _forward(self, batch: Batch, blocks: Optional[Blocks], prefill: bool) -> Step:
        context = self.config.seq_length
        ids = np.full((len(batch), context), self.config.pad_token_id, np.int32)
        ids[:, :batch.tokens.shape[1]] = batch.tokens
        inputs: JsonObject = {}
        if blocks is not None:
            slots = blocks.newest(batch.lengths)
            if prefill:
                slots = np.full(ids.shape, -1, np.int32)
                for row, length in enumerate(batch.lengths):
                    slots[row, :length] = blocks.slots(row, length)
                inputs["origin_inputs"] = ids
            inputs.update(block_tables=blocks.tables, slot_mapping=slots.reshape(-1))
        result, _ = self.model.forward(input_ids=ids, valid_length_each_example=batch.lengths, prefill=prefill,
                                       use_past=blocks is not None, **inputs)
        logits = result[0] if isinstance(result, tuple) else result
        return Step(logits, lambda: self.model.argmax(logits, -1).tolist())


def scaling_changes(rule: RopeRule, lengths: np.ndarray) -> bool:
    """Whether the rotary rule rotates any sequence of `lengths` tokens otherwise than when it was one token shorter, so
    that what the cache holds of it is no longer what the model computes without a cache."""
    return any(rope_scaling(rule, int(length)) != rope_scaling(rule, max(int(length) - 1, 1)) for length in lengths)
