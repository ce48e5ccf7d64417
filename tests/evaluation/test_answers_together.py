"""Answers of an evaluation, many at once: in how many steps of the model they are there."""
from types import SimpleNamespace as Space

import numpy as np
import pytest
from scheduler_fixtures import FakeEngine, FakeStep
from vocab_fixtures import train_sentencepiece

from research.telechat.generation.scheduler import Scheduler

SLOTS, CONTEXT = 8, 512


class Counting(FakeEngine):
    """Never ends an answer, and counts its passes."""

    def __init__(self, size):
        super().__init__(SLOTS * CONTEXT // 16, 16, CONTEXT)
        self.vocab_size, self.reads, self.steps = size, 0, 0

    def look(self, row, end):
        return np.arange(self.vocab_size) == 0

    def read(self, rows):
        self.reads += 1
        return super().read(rows)

    def advance(self, rows, batch):
        self.steps += 1
        for row in rows:
            self.write(row, row.length - 1, row.length)
        return FakeStep([self.look(row, row.length) for row in rows])


def test_mixed_lengths_take_half_the_passes_of_batches(tmp_path):
    """As benchmarks/evaluation.py: exponential lengths, and batches that wait for their longest answer."""
    pytest.importorskip("lm_eval")
    from research.telechat.evaluation.harness import TelechatLM
    from research.telechat.telechat_tokenizer import TelechatTokenizer
    tokenizer = TelechatTokenizer(str(train_sentencepiece(tmp_path / "tokenizer.model")))
    engine = Counting(len(tokenizer.vocab))
    config = Space(parallel_config=Space(data_parallel=1, context_parallel=1, pipeline_stage=1), seq_length=CONTEXT,
                   chat_template="telechat", eos_token_id=-1)
    model = Space(config=config, scheduler=lambda settings=None: Space(engine=engine) if settings is None else
                  Scheduler(engine, settings))
    lm, rng = TelechatLM(model, tokenizer, SLOTS, progress=False), np.random.default_rng(0)
    prompts = [rng.integers(10, 40, int(16 + min(rng.exponential(48), 112))).tolist() for _ in range(64)]
    answers = [int(min(8 + rng.exponential(64), 256)) for _ in prompts]
    lm.tok_encode = lambda text, **_: prompts[int(text)]
    lm.generate_until([Space(args=(str(number), {"until": [], "max_gen_toks": answer}))
                       for number, answer in enumerate(answers)])
    longest_first = sorted(range(64), key=lambda number: -len(prompts[number]))
    batches = [longest_first[start:start + SLOTS] for start in range(0, 64, SLOTS)]
    waiting = sum(max(answers[number] for number in batch) for batch in batches) + len(batches)
    assert engine.steps + engine.reads <= waiting / 2
    assert engine.steps <= sum(answers) / SLOTS * 1.05           # no slot stays empty at the end
