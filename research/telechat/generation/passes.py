"""What is computed in one step: which prompts are read, whole or piece by piece, which sequences get their next token,
and what of the cache they use and share. Who is among them is the scheduler's matter. No MindSpore here.
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
    buckets: Tuple[int, ...] = (1, 4, 16)      # batches that have a graph, ascending; a batch takes the next one
    prefill_tokens: int = PREFILL_TOKENS       # of prompts, read in one step at most; so long are the pieces
    max_queue: int = 64                # requests that may wait
    reuse: bool = True                 # share the cache of prompts that begin alike
    together: bool = False             # those that begin together keep their places until all of them have ended
    deterministic: bool = False        # compute each sequence by itself

    def __post_init__(self) -> None:
        if self.slots < 1 or self.prefill_tokens < 1 or list(self.buckets) != sorted(set(self.buckets)) or (
                not self.buckets or self.buckets[0] < 1):
            raise ConfigError(f"scheduler: expected slots and prefill_tokens over 0 and ascending buckets, found "
                              f"{self.slots}, {self.prefill_tokens} and {self.buckets}")

    def bucket(self, count: int) -> int:
        """The smallest that holds `count` sequences, or the largest."""
        return next((bucket for bucket in self.buckets if bucket >= count), self.buckets[-1])


class Passes:
    """Runs an engine over the sequences of a step."""

    def __init__(self, engine: Engine, settings: Settings):
        self.engine, self.settings = engine, settings

    def compute(self, running: List[Row]) -> List[Reading]:
        """One step: every sequence whose prompt is read gets its next token, the others are read further. -> where the
        logits are; those of finished sequences mean nothing."""
        growing = [row for row in running if row.cached and row.cached == row.length - 1]
        readings = self._read([row for row in running if not row.finished and row not in growing])
        return readings + self._advance(growing)

    def place(self, row: Row) -> bool:
        """Give a sequence its blocks, those that hold the beginning of its prompt first; False if there are too few."""
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
        return True

    def _read(self, rows: List[Row]) -> List[Reading]:
        """Read prompts: short ones together, long ones, and those whose beginning is cached, piece by piece."""
        left = self.settings.prefill_tokens
        whole: List[Row] = []
        readings: List[Reading] = []
        for row in rows:
            size = row.length - row.cached
            if not self.settings.together:
                size = min(size, self.settings.prefill_tokens) if self.engine.pieces else size
                if left < size and left < self.settings.prefill_tokens:
                    break                                          # the first one is read, however long it is
            left -= size
            if self._is_read_whole(row):
                whole.append(row)
            else:
                readings += self._read_pieces(row, row.cached + size)
        return readings + self._read_whole(whole)

    def _is_read_whole(self, row: Row) -> bool:
        """Whether a prompt is read by itself or beside others, not behind what the cache holds of it."""
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
        """Read a sequence on to `end`. The reading is the one that gives its next token, if that is reached."""
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
        """Let others use what the cache holds of a sequence."""
        if row.root is not None and self.engine.pool is not None:
            self.engine.pool.publish(row.root, row.tokens[:row.cached], row.blocks)

    def _advance(self, rows: List[Row]) -> List[Reading]:
        """The next token of sequences whose cache lacks only their newest one."""
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
            row.cached = row.length - 1                            # while others run, it is computed again and again
        return readings

    def leave(self, row: Row) -> None:
        """A sequence has ended: its blocks are given back. What they hold can be shared."""
        if self.engine.pool is not None:
            row.cached = min(row.cached, row.length - 1)
            self._publish(row)
            self.engine.pool.give(row.blocks)


class _LastOf:
    """A step for its last row only."""

    def __init__(self, step: StepLike):
        self._step = step

    def tokens(self) -> List[int]:
        """[1]."""
        return self._step.tokens()[-1:]

    def logits(self) -> np.ndarray:
        """[1, V]."""
        return self._step.logits()[-1:]
