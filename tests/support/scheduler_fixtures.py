"""An engine that computes nothing, but notices every slot that is lost, shared or not written; and random requests."""
import zlib
from collections import Counter

import numpy as np

from research.telechat.generation.batch import Reading, Row
from research.telechat.generation.blocks import BlockPool
from research.telechat.generation.choice import Scores, pick
from research.telechat.generation.requests import Finished, Request, Token
from research.telechat.generation.sampling import Sampling

VOCAB = 13
TABLE = np.random.RandomState(0).normal(0, 2, (997, VOCAB)).astype(np.float32)


class FakeStep:
    """Logits that are already there."""

    def __init__(self, logits):
        self._logits = np.array(logits, np.float32)

    def tokens(self):
        return self._logits.argmax(-1).tolist()

    def logits(self):
        return self._logits


def logits_behind(tokens):
    """Some function of all tokens so far."""
    return TABLE[zlib.crc32(np.asarray(tokens, np.int32).tobytes()) % len(TABLE)]


class FakeEngine:
    """Keeps the token and its scaling in every slot of a cache, and looks at all of them before it answers."""

    vocab_size, together = VOCAB, False

    def __init__(self, num_blocks=12, block_size=4, context=40, border=None, pieces=True):
        self.pool, self.context, self.border, self.pieces = BlockPool(num_blocks, block_size), context, border, pieces
        self.slots = np.full((num_blocks * block_size, 2), -1)
        self.read_tokens = self.stale_lengths = 0
        self.batches = Counter()
        self.fail = False

    def scaling(self, length):
        return 0 if self.border is None or length <= self.border else length - self.border

    def stale(self, length):
        self.stale_lengths += 1

    def write(self, row, first, end):
        slots = row.slots(first, end, self.pool.block_size)
        self.slots[slots, 0] = row.tokens[first:end]
        self.slots[slots, 1] = self.scaling(row.length)

    def look(self, row, end):
        found = self.slots[row.slots(0, end, self.pool.block_size)]
        assert (found[:, 0] == row.tokens[:end]).all(), "the cache holds other tokens"
        assert (found[:, 1] == self.scaling(row.length)).all(), "keys are rotated otherwise"
        return logits_behind(row.tokens[:end])

    def read(self, rows):
        for row in rows:
            self.write(row, 0, row.length)
            self.read_tokens += row.length
        return [Reading(list(rows), FakeStep([self.look(row, row.length) for row in rows]))]

    def read_piece(self, row, end, every):
        first = row.cached
        assert first < end <= row.length
        self.write(row, first, end)
        self.read_tokens += end - first
        return FakeStep([self.look(row, last) for last in range(first + 1 if every else end, end + 1)])

    def advance(self, rows, batch):
        assert len(rows) <= batch
        if self.fail:
            raise RuntimeError("no memory")
        self.batches[batch] += 1
        for row in rows:
            self.write(row, row.length - 1, row.length)
        return FakeStep([self.look(row, row.length) for row in rows])


def alone(request):
    """The events of a request that nobody else disturbs, without a scheduler."""
    row, events = Row(1, request), []
    if request.prompt_logprobs:
        scores = Scores(request.top_logprobs)
        scores.add([logits_behind(row.tokens[:end]) for end in range(1, row.length)], row.tokens[1:row.length])
        events.append(scores.event())
    while row.length < row.limit and not row.finished:
        logits = logits_behind(row.sequence)
        events.append(Token(int(logits.argmax())) if row.plain else pick(row, logits))
        row.append(events[-1].id)
    return [*events, Finished("stop" if row.tokens[row.length - 1] in row.ends and row.finished else "length")]


def random_request(rng):
    head = (1, 2, 3, 4, 5, 6, 7, 8, 9)[:rng.choice([0, 4, 9])]               # some begin alike
    prompt = head + tuple(rng.randint(0, VOCAB, rng.randint(1, 12)).tolist())
    sampling = Sampling() if rng.rand() < 0.5 else Sampling(
        do_sample=True, temperature=0.7, top_k=int(rng.choice([0, 5])), top_p=0.9, repetition_penalty=1.1,
        presence_penalty=float(rng.choice([0, 0.3])), min_new_tokens=int(rng.randint(0, 3)))
    return Request(prompt, sampling, int(rng.randint(1, 18)), frozenset({0, 11}),
                   seed=int(rng.randint(1000)), top_logprobs=int(rng.choice([-1, -1, 0, 2])),
                   prompt_logprobs=bool(rng.rand() < 0.1))
