"""The steps of generation with the fused operators of a CPU: one graph for prompts, pieces of prompts and tokens."""
from typing import Dict, List, Optional, Sequence, Tuple

import mindspore.common.dtype as mstype
import numpy as np
from mindspore import Tensor, nn

from research.telechat.generation.batch import Row
from research.telechat.generation.engine import DirectEngine, Step


class _StepGraph(nn.Cell):
    """Computes the next tokens of any sequences. batch: one token of each of that many; None: any number of tokens."""

    def __init__(self, decoder: nn.Cell, batch: Optional[int], width: Optional[int]):
        super().__init__(auto_prefix=False)
        self.decoder = decoder
        if batch is None:                  # MindSpore launches graphs of fixed sizes faster
            shapes = ([None], [1, None], [1, None], [3, None], [None, width], [None])
            self.set_inputs(*(Tensor(shape=shape, dtype=mstype.int32) for shape in shapes))
        self.set_train(False)
        self.phase = "increment"           # MindSpore runs this phase without checks once compiled

    def construct(self, tokens: Tensor, positions: Tensor, totals: Tensor, rows: Tensor, block_tables: Tensor,
                  wanted: Tensor) -> Tuple[Tensor, Tensor]:
        """As model.native_decoder.NativeDecoder."""
        return self.decoder(tokens, positions, totals, rows, block_tables, wanted)


class NativeEngine(DirectEngine):
    """A DirectEngine whose graphs hold one operator per layer. decoder: the model's `native_decoder()`."""

    def __init__(self, model: nn.Cell, decoder: nn.Cell):
        super().__init__(model)
        self._decoder = decoder
        self._steps: Dict[Optional[int], _StepGraph] = {}
        self._width = -(-self.context // self.config.block_size)

    def _read_group(self, rows: List[Row]) -> Step:
        """Prefill sequences at once."""
        size = self.config.block_size
        lengths = [row.length for row in rows]
        return self._run(None, np.concatenate([row.sequence for row in rows]),
                         np.concatenate([np.arange(length) for length in lengths]), np.repeat(lengths, lengths),
                         np.repeat(np.arange(len(rows)), lengths),
                         np.concatenate([row.slots(0, row.length, size) for row in rows]),
                         self._tables(rows, len(rows)), np.cumsum(lengths) - 1)

    def read_piece(self, row: Row, end: int, every: bool) -> Step:
        """As in DirectEngine."""
        size, count = self.config.block_size, end - row.cached
        wanted = np.arange(count) if every else np.array([count - 1])
        return self._run(None, row.tokens[row.cached:end], np.arange(row.cached, end), np.full(count, row.length),
                         np.zeros(count), row.slots(row.cached, end, size), self._tables([row], 1), wanted)

    def advance(self, rows: Sequence[Row], batch: int) -> Step:
        """As in DirectEngine."""
        size = self.config.block_size
        last, lengths, slots = np.zeros(batch, np.int32), np.ones(batch, np.int32), np.full(batch, -1, np.int32)
        for place, row in enumerate(rows):
            newest = row.length - 1
            last[place] = row.tokens[newest]
            lengths[place] = row.length
            slots[place] = row.blocks[newest // size] * size + newest % size
        every = np.arange(batch)
        return self._run(batch, last, lengths - 1, lengths, every, slots, self._tables(rows, batch), every)

    def _tables(self, rows: Sequence[Row], count: int) -> np.ndarray:
        """Which blocks hold the sequences, [count, blocks of the context] int32, -1 where there is none."""
        tables = np.full((count, self._width), -1, np.int32)
        for place, row in enumerate(rows):
            tables[place, :len(row.table)] = row.table
        return tables

    def _run(self, batch: Optional[int], tokens: np.ndarray, positions: np.ndarray, totals: np.ndarray,
             sequences: np.ndarray, slots: np.ndarray, tables: np.ndarray, wanted: np.ndarray) -> Step:
        """One step. tokens, positions, totals, sequences, slots: [T] each; tables: [B, K]; wanted: [R]."""
        graph = self._steps.get(batch)
        if graph is None:
            graph = self._steps[batch] = _StepGraph(self._decoder, batch, self._width)
        arrays = (tokens, positions[None], totals[None], np.stack((positions, sequences, slots)), tables, wanted)
        return Step(*graph(*(Tensor.from_numpy(np.array(array, np.int32, order="C")) for array in arrays)))
