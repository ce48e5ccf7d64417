"""The computation of one step: which prompts are prefilled, whole or piece by piece, which sequences decode their next
token, and which cache blocks they use and share. The scheduler chooses the sequences. No MindSpore here.
"""
from dataclasses import dataclass
from typing import List, Tuple

import numpy as np

from research.telechat.common.errors import ConfigError
from research.telechat.generation.batch import PREFILL_TOKENS, Engine, Reading, Row, StepLike
from research.telechat.generation.choice import Scores


@dataclass(frozen=True)
class Settings:
    """How a scheduler works."""

    slots: int = 16                    # sequences at once
    buckets: Tuple[int, ...] = (1, 4, 16)      # batch sizes with a graph, ascending; batches are padded to the next one
    prefill_tokens: int = PREFILL_TOKENS       # prefill limit per step, and size of the pieces
    interleaved_prefill_tokens: int = 32    # of a prompt longer than prefill_tokens, per step while others decode
    max_queue: int = 64                # requests that may wait
    reuse: bool = True                 # share the cache of common prefixes
    together: bool = False             # sequences that start together keep their slots until all have finished
    deterministic: bool = False        # compute each sequence separately

    def __post_init__(self) -> None:
        counts = (self.slots, self.prefill_tokens, self.interleaved_prefill_tokens)
        ascending = list(self.buckets) == sorted(set(self.buckets))
        if not self.buckets or min(*counts, *self.buckets) < 1 or not ascending:
            raise ConfigError("scheduler: expected positive slots, prefill_tokens and interleaved_prefill_tokens, and "
                              f"ascending buckets, found {', '.join(map(str, counts))} and {self.buckets}")

    def bucket(self, count: int) -> int:
        """The smallest bucket for `count` sequences, or the largest."""
        return next((bucket for bucket in self.buckets if bucket >= count), self.buckets[-1])


class Passes:
    """Runs an engine over the sequences of a step."""

    def __init__(self, engine: Engine, settings: Settings):
        self.engine, self.settings = engine, settings

    def compute(self, running: List[Row]) -> List[Reading]:
        """One step: every prefilled sequence decodes its next token, the others are prefilled further. -> where the
        logits are; those of finished sequences are undefined."""
        growing = [row for row in running if row.cached and row.cached == row.length - 1]
        readings = self._read([row for row in running if not row.finished and row not in growing],
                              any(not row.finished for row in growing))
        return readings + self._advance(growing)

    def place(self, row: Row) -> bool:
        """Assign blocks to a sequence, reusing those of a cached prefix; False if there are too few."""
        engine, pool = self.engine, self.engine.pool
        row.scaling = engine.scaling(row.length)
        if pool is None:
            return True
        shared: List[int] = []
        if self.settings.reuse and engine.pieces and engine.scaling(row.limit) == row.scaling:
            row.root = ("prompt", row.scaling)
            if not row.request.prompt_logprobs:                    # these need the logits of every token
                shared = pool.match(row.root, row.sequence, row.length - 1)
        own = pool.take(pool.blocks_for(row.limit) - len(shared))
        if own is None:
            pool.give(shared)
            return False
        row.use(shared + own)
        row.cached = len(shared) * pool.block_size
        row.long = row.length - row.cached > self.settings.prefill_tokens
        return True

    def _read(self, rows: List[Row], beside: bool) -> List[Reading]:
        """Prefill prompts: short ones together; long ones, and those with a cached prefix, piece by piece.

        beside: other sequences decode in this step, and would wait.
        """
        left = left_of_long = self.settings.prefill_tokens
        if beside and not self.settings.deterministic:             # there, pieces may not depend on others
            left_of_long = min(left, self.settings.interleaved_prefill_tokens)
        whole: List[Row] = []
        readings: List[Reading] = []
        for row in rows:
            size = row.length - row.cached
            if not self.settings.together:
                size = min(size, self.settings.prefill_tokens) if self.engine.pieces else size
                if row.long and self.engine.pieces:
                    size = min(size, left_of_long)
                    left_of_long -= size
                    if not size:
                        continue
                if left < size and left < self.settings.prefill_tokens:
                    break                                          # the first one is prefilled, however long it is
            left -= size
            if self._is_read_whole(row):
                whole.append(row)
            else:
                readings += self._read_pieces(row, row.cached + size)
        return readings + self._read_whole(whole)

    def _is_read_whole(self, row: Row) -> bool:
        """Whether a prompt is prefilled whole, alone or with others, instead of after its cached part."""
        if not self.engine.pieces:
            return True
        return not row.cached and row.length <= self.settings.prefill_tokens and not row.request.prompt_logprobs

    def _read_whole(self, rows: List[Row]) -> List[Reading]:
        if not rows:
            return []
        groups = [[row] for row in rows] if self.settings.deterministic and not self.engine.together else [rows]
        readings = [reading for group in groups for reading in self.engine.read(group)]
        for row in rows:
            row.cached = row.length
            self._publish(row)
        return readings

    def _read_pieces(self, row: Row, end: int) -> List[Reading]:
        """Prefill a sequence up to `end`. Returns the reading with its next token once the prompt is complete."""
        every = row.request.prompt_logprobs and row.length == row.prompt_length
        if every and row.scores is None:
            row.scores = Scores(row.request.top_logprobs)
        readings: List[Reading] = []
        while row.cached < end:
            until = min(end, row.cached + self.settings.prefill_tokens)
            step = self.engine.read_piece(row, until, every)
            if every and row.scores is not None:
                row.scores.add(step.logits(), row.tokens[row.cached + 1:min(until + 1, row.prompt_length)])
            row.cached = until
            if until == row.length:
                readings = [Reading([row], _LastOf(step) if every else step)]
        if row.cached == row.length:
            self._publish(row)
        return readings

    def _publish(self, row: Row) -> None:
        """Share the cached blocks of a sequence."""
        if row.root is not None and self.engine.pool is not None:
            self.engine.pool.publish(row.root, row.tokens[:row.cached], row.blocks)

    def _advance(self, rows: List[Row]) -> List[Reading]:
        """Decode the next token of sequences with everything but the newest token cached."""
        finished = [row for row in rows if row.finished]
        stale = [row for row in rows if not row.finished and self.engine.scaling(row.length) != row.scaling]
        readings: List[Reading] = []
        if stale:
            self.engine.stale(max(row.length for row in stale))
            stale = rows if self.engine.together else stale
            rows = [row for row in rows if row not in stale]
            for row in stale:
                row.cached, row.scaling = 0, self.engine.scaling(row.length)
            long = [row for row in stale if not self._is_read_whole(row)]
            for row in long:
                readings += self._read_pieces(row, row.length)
            readings += self._read_whole([row for row in stale if row not in long])
        largest = self.settings.buckets[-1]
        for first in range(0, len(rows), largest):
            group = rows[first:first + largest]
            readings.append(Reading(group, self.engine.advance(group, self.settings.bucket(len(group)))))
            for row in group:
                row.cached = row.length
        for row in finished:
            row.cached = row.length - 1                            # recomputed in every step while others run
        return readings

    def leave(self, row: Row) -> None:
        """Release the blocks of a finished sequence. Their contents can still be shared."""
        if self.engine.pool is not None:
            row.cached = min(row.cached, row.length - 1)
            self._publish(row)
            self.engine.pool.give(row.blocks)


class _LastOf:
    """The last row of a step."""

    def __init__(self, step: StepLike):
        self._step = step

    def tokens(self) -> List[int]:
        """[1]."""
        return self._step.tokens()[-1:]

    def logits(self) -> np.ndarray:
        """[1, V]."""
        return self._step.logits()[-1:]
