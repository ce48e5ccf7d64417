"""The steps of generation on the device: prefill, then one token per sequence and step.

`DirectEngine` runs its own graphs, made for the composed cache: prompts back to back, a piece of a prompt after its
cached part, attention only over the blocks in use, argmax in the graph. `FrameworkEngine` goes through the `forward` of
MindFormers' generator and serves everything else: the fused kernels, and models without a cache. Both give the same
tokens. The scheduler decides what is computed when.
"""
from typing import Callable, Dict, Hashable, List, Optional, Sequence, Tuple, Union

import mindspore as ms
import mindspore.common.dtype as mstype
import numpy as np
from mindformers.tools.logger import logger
from mindspore import Tensor, nn

from research.telechat.common.files import JsonObject
from research.telechat.generation.batch import PREFILL_TOKENS, Reading, Row
from research.telechat.generation.blocks import BlockPool
from research.telechat.spec.rope import rope_scaling


class Step:
    """The result of a step: `tokens()`, the most likely next one of each sequence, and `logits()` [B, V] float32. Both
    are fetched from the device on first use."""

    def __init__(self, logits: Union[np.ndarray, Tensor],
                 tokens: Union[List[int], Tensor, Callable[[], List[int]]]):
        self._logits, self._tokens = logits, tokens

    def tokens(self) -> List[int]:
        """One per sequence."""
        if not isinstance(self._tokens, list):
            self._tokens = self._tokens() if callable(self._tokens) else self._tokens.tolist()
        return self._tokens

    def logits(self) -> np.ndarray:
        """[B, V] float32."""
        if not isinstance(self._logits, np.ndarray):
            self._logits = self._logits.asnumpy()
        return self._logits


def _tensor(array: np.ndarray) -> Tensor:
    """A copy of `array` as a tensor; from_numpy takes a sixth of the constructor's time."""
    return Tensor.from_numpy(np.array(array, order="C"))


def _without_graphs() -> bool:
    """Whether nothing is compiled (PyNative mode), so that the model's flags matter at every call."""
    return ms.get_context("mode") == ms.PYNATIVE_MODE


class _PromptGraph(nn.Cell):
    """Prefills prompts packed back to back."""

    def __init__(self, model: nn.Cell):
        super().__init__(auto_prefix=False)
        self.model = model
        self.set_inputs(Tensor(shape=[1, None], dtype=mstype.int32), Tensor(shape=[None], dtype=mstype.int32),
                        Tensor(shape=[None], dtype=mstype.int32))
        self.set_train(False)
        self.phase = "prefill"             # MindSpore runs this phase without checks once compiled

    def construct(self, tokens: Tensor, lengths: Tensor, slots: Tensor) -> Tuple[Tensor, Tensor]:
        """tokens: [1, T], lengths: [P], slots: [T] -> logits [P, V], most likely tokens [P]."""
        logits = self.model.next_token(tokens, None, lengths, None, slots)
        return logits, self.model.argmax(logits, -1)


class _PieceGraph(nn.Cell):
    """Prefills a piece of one prompt after its cached part."""

    def __init__(self, model: nn.Cell):
        super().__init__(auto_prefix=False)
        self.model = model
        any_1d = Tensor(shape=[None], dtype=mstype.int32)
        self.set_inputs(Tensor(shape=[1, None], dtype=mstype.int32), Tensor(shape=[1], dtype=mstype.int32),
                        Tensor(shape=[1], dtype=mstype.int32), Tensor(shape=[1, None], dtype=mstype.int32), any_1d,
                        any_1d)
        self.set_train(False)
        self.phase = "piece"

    def construct(self, tokens: Tensor, first: Tensor, total: Tensor, block_table: Tensor, slots: Tensor,
                  wanted: Tensor) -> Tuple[Tensor, Tensor]:
        """tokens: [1, S], first: [1], position of the first of them; total: [1], tokens of the whole prompt;
        block_table: [1, K], slots: [S], wanted: [R] token indices -> logits after these [R, V], most likely [R]."""
        decoder = self.model.model
        rope, mask, cached = decoder.step.piece(tokens, first, total, block_table, slots)
        hidden = decoder.tok_embeddings(decoder.to_rows(tokens))
        for layer in decoder.layers:
            hidden = layer(hidden, tokens.shape, rope, mask, cached)
        logits = self.model.logits(self.model.gather_rows(decoder.norm_out(hidden), wanted, 0))
        return logits, self.model.argmax(logits, -1)


class _TokenGraph(nn.Cell):
    """Decodes one token for each of a fixed number of sequences."""

    def __init__(self, model: nn.Cell, batch: int):
        super().__init__(auto_prefix=False)
        self.model = model
        self.set_inputs(Tensor(shape=[batch, 1], dtype=mstype.int32), Tensor(shape=[batch], dtype=mstype.int32),
                        Tensor(shape=[batch, None], dtype=mstype.int32), Tensor(shape=[batch], dtype=mstype.int32))
        self.set_train(False)
        self.phase = "increment"

    def construct(self, tokens: Tensor, lengths: Tensor, block_tables: Tensor, slots: Tensor) -> Tuple[Tensor, Tensor]:
        """tokens: [B, 1], lengths and slots: [B], block_tables: [B, K] -> logits [B, V], argmax tokens [B]."""
        logits = self.model.next_token(tokens, None, lengths, block_tables, slots)
        return logits, self.model.argmax(logits, -1)


class _Engine:
    """The common part of both engines. `pool`: the blocks of the model's cache, None without one."""

    def __init__(self, model: nn.Cell):
        self.model, self.config = model, model.config
        self.vocab_size, self.context = model.config.vocab_size, model.config.seq_length
        self.pool = BlockPool(model.config.num_blocks, model.config.block_size) if model.use_past else None
        self._by_length = bool(model.use_past and model.model.by_length)
        self._told_stale = False

    def scaling(self, length: int) -> Hashable:
        """The rotary scaling of a sequence of `length` tokens: cached keys are valid for all sequences with the same
        scaling."""
        return rope_scaling(self.config.rope_rule, length) if self._by_length else None

    def stale(self, length: int) -> None:
        """Log once that a sequence of `length` tokens has to be recomputed."""
        if not self._told_stale:
            self._told_stale = True
            logger.warning("At %s tokens the rotary scaling depends on the length of the text: the KV cache is "
                           "refilled at each change, beyond training_seqlen (%s) at every token. "
                           "model_config.rope_length fixes the scaling.", length, self.config.training_seqlen)


class DirectEngine(_Engine):
    """Graphs of a model with the composed cache, compiled once: one for short prompts, one for long ones, one for
    pieces of prompts, one per batch size.

    Raises TypeError for a model with the fused cache kernels: these read the lengths of the sequences on the host from
    the graph input named `batch_valid_length`. The graphs here call it `lengths`, so the kernels would not find it.
    """

    pieces = True
    together = False

    def __init__(self, model: nn.Cell):
        paged = [name for name, cell in model.cells_and_names() if getattr(cell, "paged", False)]
        if paged:
            raise TypeError(f"the direct engine's graphs have no input `batch_valid_length`, which the fused attention "
                            f"kernels in {paged[0]} (one of {len(paged)}) read; FrameworkEngine serves them")
        super().__init__(model)
        self._prompts: Dict[bool, _PromptGraph] = {}
        self._piece: Optional[_PieceGraph] = None
        self._tokens: Dict[int, _TokenGraph] = {}

    def read(self, rows: Sequence[Row]) -> List[Reading]:
        """Prefill sequences from the beginning, several at once."""
        return [Reading(group, self._read_group(group)) for group in _groups(rows)]

    def _read_group(self, rows: List[Row]) -> Step:
        """Prefill sequences at once. A long one is padded, so that its queries can be computed in blocks."""
        ids = np.concatenate([row.sequence for row in rows])[None]
        slots = np.concatenate([row.slots(0, row.length, self.config.block_size) for row in rows])
        lengths = np.array([row.length for row in rows], np.int32)
        long, step = ids.shape[1] > PREFILL_TOKENS, self.model.model.step
        if long:
            padding = -ids.shape[1] % step.query_blocks
            ids, slots = np.pad(ids, ((0, 0), (0, padding))), np.pad(slots, (0, padding), constant_values=-1)
        graph = self._prompts.get(long)
        flagged = graph is None or _without_graphs()
        if flagged:
            self.model.add_flags_custom(is_first_iteration=True)
            step.add_flags(flat_prefill=True, in_blocks=long)
        if graph is None:
            graph = self._prompts[long] = _PromptGraph(self.model)
        result = Step(*graph(_tensor(ids), _tensor(lengths), _tensor(slots)))
        if flagged:
            step.add_flags(flat_prefill=self.config.is_dynamic, in_blocks=False)
        return result

    def read_piece(self, row: Row, end: int, every: bool) -> Step:
        """Prefill the tokens of a sequence from the cached ones up to `end`. every: logits after each of them, not only
        after the last."""
        if self._piece is None or _without_graphs():
            self.model.add_flags_custom(is_first_iteration=False)
        if self._piece is None:
            self._piece = _PieceGraph(self.model)
        size = self.config.block_size
        count = end - row.cached
        wanted = np.arange(count, dtype=np.int32) if every else np.array([count - 1], np.int32)
        arrays = (row.tokens[None, row.cached:end], np.array([row.cached], np.int32), np.array([row.length], np.int32),
                  row.table[None, :-(-end // size)], row.slots(row.cached, end, size), wanted)
        return Step(*self._piece(*map(_tensor, arrays)))

    def advance(self, rows: Sequence[Row], batch: int) -> Step:
        """Decode one step for each sequence in the graph for `batch` sequences; the rest of the batch is dummy rows
        whose results are discarded."""
        graph = self._tokens.get(batch)
        if graph is None or _without_graphs():
            self.model.add_flags_custom(is_first_iteration=False)
        if graph is None:
            graph = self._tokens[batch] = _TokenGraph(self.model, batch)
        size = self.config.block_size
        width = -(-max(row.length for row in rows) // size)
        last, lengths = np.zeros((batch, 1), np.int32), np.ones(batch, np.int32)
        tables, slots = np.full((batch, width), -1, np.int32), np.full(batch, -1, np.int32)
        for place, row in enumerate(rows):
            newest = row.length - 1
            last[place, 0] = row.tokens[newest]
            lengths[place] = row.length
            tables[place, :len(row.blocks)] = row.table[:width]
            slots[place] = row.blocks[newest // size] * size + newest % size
        return Step(*graph(*map(Tensor.from_numpy, (last, lengths, tables, slots))))


def _groups(rows: Sequence[Row]) -> List[List[Row]]:
    """Rows that are prefilled together: up to PREFILL_TOKENS tokens, or a single longer one."""
    groups: List[List[Row]] = []
    total = 0
    for row in rows:
        if not groups or total + row.length > PREFILL_TOKENS:
            groups.append([])
            total = 0
        groups[-1].append(row)
        total += row.length
    return groups


class FrameworkEngine(_Engine):
    """Steps through `forward` of MindFormers' generator, with and without a cache.

    `together`: its shapes are fixed, or everything is recomputed at each step, so sequences start and finish together.
    """

    pieces = False

    def __init__(self, model: nn.Cell):
        super().__init__(model)
        self.together = not (model.use_past and self.config.is_dynamic)

    def read(self, rows: Sequence[Row]) -> List[Reading]:
        """Prefill all sequences from the beginning."""
        if self.config.is_dynamic and self.model.use_past:
            self.model.set_dynamic_inputs()
        return [Reading(list(rows), self._forward(rows, prefill=True))]

    def advance(self, rows: Sequence[Row], batch: int) -> Step:
        """Decode one step for each sequence; without a cache, recompute them. `batch` is only their number: the graphs
        are dynamic, or there is one per batch size."""
        return self._forward(rows, prefill=False)

    def read_piece(self, row: Row, end: int, every: bool) -> Step:
        """Not supported: MindFormers' generator prefills whole prompts."""
        raise NotImplementedError(f"{type(self).__name__} reads whole prompts")

    def _forward(self, rows: Sequence[Row], prefill: bool) -> Step:
        context, size = self.config.seq_length, self.config.block_size
        ids = np.full((len(rows), context), self.config.pad_token_id, np.int32)
        lengths = np.array([row.length for row in rows], np.int32)
        for place, row in enumerate(rows):
            ids[place, :row.length] = row.sequence
        inputs: JsonObject = {}
        if self.pool is not None:
            tables = np.full((len(rows), -(-context // size)), -1, np.int32)
            for place, row in enumerate(rows):
                tables[place, :len(row.blocks)] = row.table
            if prefill:
                slots = np.full(ids.shape, -1, np.int32)
                for place, row in enumerate(rows):
                    slots[place, :row.length] = row.slots(0, row.length, size)
                inputs["origin_inputs"] = ids
            else:
                slots = np.concatenate([row.slots(row.length - 1, row.length, size) for row in rows])
            inputs.update(block_tables=tables, slot_mapping=slots.reshape(-1))
        result, _ = self.model.forward(input_ids=ids, valid_length_each_example=lengths, prefill=prefill,
                                       use_past=self.pool is not None, **inputs)
        logits = result[0] if isinstance(result, tuple) else result
        return Step(logits, lambda: self.model.argmax(logits, -1).tolist())
