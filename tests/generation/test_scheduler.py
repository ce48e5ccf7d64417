"""The scheduler with an engine that computes nothing, but notices every slot that is lost, shared or not written."""
import threading
from collections import Counter

import numpy as np
import pytest
from scheduler_fixtures import VOCAB, FakeEngine, alone, logits_behind, random_request

from research.telechat.common.errors import ConfigError
from research.telechat.generation.batch import PREFILL_TOKENS, tokens_at_once
from research.telechat.generation.blocks import BlockPool
from research.telechat.generation.passes import Settings
from research.telechat.generation.requests import (
    Draining,
    Finished,
    PromptScores,
    QueueFull,
    Request,
    RequestTooLong,
    Started,
    Token,
)
from research.telechat.generation.sampling import Sampling
from research.telechat.generation.scheduler import Scheduler, choose_each


def run_schedule(seed):
    """Random requests at random times, some cancelled, until all have ended."""
    rng = np.random.RandomState(seed)
    border = int(rng.randint(8, 30)) if rng.rand() < 0.3 else None
    engine = FakeEngine(border=border, pieces=bool(rng.rand() < 0.9))
    settings = Settings(slots=int(rng.randint(1, 6)), buckets=tuple(sorted(set(rng.randint(1, 6, 2).tolist()))),
                        prefill_tokens=int(rng.choice([3, 8, 256])), reuse=bool(rng.rand() < 0.7),
                        interleaved_prefill_tokens=int(rng.choice([1, 5])))
    scheduler = Scheduler(engine, settings)
    events, requests, tickets, order = {}, {}, {}, []
    for number in range(rng.randint(1, 6)):
        request = random_request(rng)
        if request.prompt_logprobs and not engine.pieces:
            continue
        requests[number], events[number] = request, []

        def listen(event, number=number):
            events[number].append(event)
            if isinstance(event, Started):
                order.append(number)
        tickets[number] = scheduler.submit(request, listen)
        for _ in range(rng.randint(0, 4)):
            scheduler.step()
            assert scheduler.stats().running <= settings.slots
            if rng.rand() < 0.08:
                scheduler.cancel(tickets[rng.choice(list(tickets))])
    while scheduler.step():
        pass
    assert order == sorted(order)
    for number, request in requests.items():
        got = [event for event in events[number] if not isinstance(event, Started)]
        assert isinstance(got[-1], Finished) and sum(isinstance(event, Finished) for event in got) == 1
        wanted = alone(request)
        assert got == wanted if got[-1].reason != "cancelled" else got[:-1] == wanted[:len(got) - 1]
    stats = scheduler.stats()
    assert engine.pool.available == engine.pool.total and stats.blocks_used == 0
    assert sorted(engine.pool.take(engine.pool.total)) == list(range(engine.pool.total))
    assert stats.finished + stats.cancelled == stats.submitted == len(requests) and not stats.failed
    return stats, engine


def test_random_schedules():
    """Answers are those of each request alone, in order of arrival, and every block comes back: 1,000 schedules."""
    total = Counter()
    for seed in range(1000):
        stats, engine = run_schedule(seed)
        total.update(cancelled=stats.cancelled, finished=stats.finished, cached=stats.cached_tokens,
                     stale=engine.stale_lengths)
    assert min(total.values()) > 50, total                       # the schedules try what they are meant to


def test_second_turn_reads_only_what_is_new():
    engine = FakeEngine(num_blocks=30, context=60)
    scheduler = Scheduler(engine)
    first, second = [], []
    prompt = tuple(range(1, 11))
    scheduler.submit(Request(prompt, Sampling(), 9), first.append)
    while scheduler.step():
        pass
    answer = tuple(event.id for event in first if isinstance(event, Token))
    engine.read_tokens = 0
    again = (*prompt, *answer, 3, 3, 3)
    scheduler.submit(Request(again, Sampling(), 5), second.append)
    while scheduler.step():
        pass
    assert second[0] == Started(22, 16) and engine.read_tokens == 6           # 18 of the first turn are cached
    assert second[1:] == alone(Request(again, Sampling(), 5))


def test_long_prompt_does_not_stop_the_others():
    engine = FakeEngine(num_blocks=40, context=150)
    scheduler = Scheduler(engine, Settings(prefill_tokens=10))
    short, long = [], []
    scheduler.submit(Request((1, 2), Sampling(), 12), short.append)
    scheduler.step()
    scheduler.submit(Request(tuple(range(10)) * 10, Sampling(), 2), long.append)
    for _ in range(10):
        before = len(short)
        scheduler.step()
        assert len(short) == before + 1
    assert [type(event) for event in long] == [Started, Token]


@pytest.mark.parametrize(("deterministic", "expected"), [(False, [8, 2, 2, 2]), (True, [8, 8, 8, 6])])
def test_a_long_prompt_takes_smaller_pieces_beside_others(deterministic, expected):
    """And those that come behind it are not kept waiting; where pieces may not depend on others, they do not."""
    engine = FakeEngine(num_blocks=40)
    scheduler = Scheduler(engine, Settings(prefill_tokens=8, interleaved_prefill_tokens=2, deterministic=deterministic))
    scheduler.submit(Request((1,) * 4, Sampling(), 20))
    scheduler.step()
    events = []
    scheduler.submit(Request((2,) * 30, Sampling(), 2))
    scheduler.submit(Request((3,) * 6, Sampling(), 2), events.append)
    read = []
    for _ in range(4):
        before = engine.read_tokens
        scheduler.step()
        read.append(engine.read_tokens - before)
    assert read == expected
    assert any(isinstance(event, Token) for event in events) is not deterministic


def test_whole_prompts_are_read_a_few_at_a_time():
    """Where an engine cannot read pieces, a step still reads no more than it must."""
    engine = FakeEngine(num_blocks=20, pieces=False)
    scheduler = Scheduler(engine, Settings(prefill_tokens=10))
    for length in (12, 6, 4, 2):
        scheduler.submit(Request((1,) * length, Sampling(), 5))
    read = []
    for _ in range(3):
        scheduler.step()
        read.append(engine.read_tokens)
    assert read == [12, 22, 24]


def test_requests_that_cannot_be_answered():
    scheduler = Scheduler(FakeEngine(num_blocks=5), Settings(max_queue=2, slots=1))
    with pytest.raises(RequestTooLong, match=r"21 tokens.*2, but the KV cache .* holds 20") as caught:
        scheduler.submit(Request((1,) * 21, Sampling(), 2))
    assert caught.value.limit == 20
    with pytest.raises(RequestTooLong, match="seq_length is 40"):
        Scheduler(FakeEngine(num_blocks=50)).submit(Request((1,) * 39, Sampling(), 2))
    for request in (Request((VOCAB,), Sampling(), 2), Request((1,), Sampling(logit_bias=((VOCAB, 1.0),)), 2)):
        with pytest.raises(ConfigError, match="token 13"):
            scheduler.submit(request)
    for _ in range(2):
        scheduler.submit(Request((1,), Sampling(), 2))
    with pytest.raises(QueueFull) as full:
        scheduler.submit(Request((1,), Sampling(), 2))
    assert full.value.retry_after >= 1
    scheduler.drain()
    with pytest.raises(Draining):
        scheduler.submit(Request((1,), Sampling(), 2))


def test_tokens_are_chosen_in_order_of_arrival():
    """Rows of one batch may share their random numbers, also in steps that read some of them again."""
    orders = []

    def choose(places):
        orders.append([place.row.number for place in places])
        return choose_each(places)
    engine = FakeEngine(border=8)
    scheduler = Scheduler(engine, Settings(slots=3, together=True, buckets=(3,)), choose)
    for length in (2, 7, 3):
        scheduler.submit(Request(tuple(range(length)), Sampling(), 5))
    while scheduler.step():
        pass
    assert orders == [[1, 2, 3]] * 5 and engine.stale_lengths and set(engine.batches) == {3}


def test_failure_of_the_engine_ends_every_request():
    engine = FakeEngine()
    scheduler = Scheduler(engine)
    events = [[], []]
    for each in events:
        scheduler.submit(Request((1, 2, 3, 4, 5), Sampling(), 5), each.append)
    scheduler.step()
    engine.fail = True
    with pytest.raises(RuntimeError, match="no memory"):
        scheduler.step()
    assert [each[-1] for each in events] == [Finished("error", "RuntimeError: no memory")] * 2
    assert scheduler.stats().failed == 2 and scheduler.stats().blocks_cached == 0 and not scheduler.busy


def test_listener_that_fails_ends_its_own_request_only():
    scheduler = Scheduler(FakeEngine())
    good = []

    def bad(event):
        if isinstance(event, Token):
            raise OSError("gone")
    request = Request((1, 2, 3), Sampling(), 5)
    scheduler.submit(request, bad)
    scheduler.submit(request, good.append)
    while scheduler.step():
        pass
    assert good[1:] == alone(request) and scheduler.stats().failed == 1 and scheduler.stats().finished == 1


class OnlyDigits:
    """Allows 5 and 7 in turn, then nothing, or fails."""

    def __init__(self, then="nothing"):
        self.count, self.then = 0, then

    def allowed(self):
        mask = np.zeros(VOCAB, bool)
        if self.count == 4 and self.then == "failure":
            raise KeyError("state")
        mask[[5, 7][self.count % 2]] = self.count < 4
        return mask

    def advance(self, token):
        self.count += 1


@pytest.mark.parametrize(("then", "message"), [("nothing", "allows no token"), ("failure", "KeyError")])
def test_constraint(then, message):
    events = []
    scheduler = Scheduler(FakeEngine())
    scheduler.submit(Request((1,), Sampling(do_sample=True), 9, constraint=OnlyDigits(then), seed=1), events.append)
    while scheduler.step():
        pass
    assert [event.id for event in events if isinstance(event, Token)] == [5, 7, 5, 7]
    assert events[-1].reason == "error" and message in events[-1].message


def test_log_probabilities():
    prompt = (1, 2, 3, 4, 5, 6)
    sampling = Sampling(temperature=0.5, do_sample=True)
    request = Request(prompt, sampling, 1, seed=1, top_logprobs=3, prompt_logprobs=True)
    scores, token, _ = alone(request)
    assert isinstance(scores, PromptScores) and scores.logprobs[0] is None and scores.top[0] == ()
    for end in range(1, 7):
        logits = logits_behind(prompt[:end]).astype(np.float64)
        expected = logits - np.log(np.exp(logits).sum())
        given, best = (scores.logprobs[end], scores.top[end]) if end < 6 else (token.logprob, token.top)
        assert given == pytest.approx(expected[prompt[end] if end < 6 else token.id], abs=1e-5)
        assert [i for i, _ in best] == np.argsort(-expected)[:3].tolist()
        assert [value for _, value in best] == pytest.approx(np.sort(expected)[:-4:-1].tolist(), abs=1e-5)
    only = alone(Request(prompt, Sampling(), 0, top_logprobs=3, prompt_logprobs=True))
    assert only == [scores, Finished("length")]


def test_run_in_a_thread():
    """Requests from another thread, cancellation when `run` is stopped, and the end after `drain`."""
    scheduler = Scheduler(FakeEngine())
    stop, ended = threading.Event(), threading.Event()
    thread = threading.Thread(target=scheduler.run, args=(stop,))
    thread.start()
    events = []

    def listen(event):
        events.append(event)
        if isinstance(event, Finished):
            ended.set()
    request = Request((1, 2), Sampling(), 6)
    scheduler.submit(request, listen)
    assert ended.wait(10)
    assert events[1:] == alone(request)
    scheduler.drain()
    thread.join(10)
    assert not thread.is_alive()


def test_answers_that_were_put_aside_go_on():
    engine, events = FakeEngine(), []
    scheduler = Scheduler(engine)
    request = Request((1, 2, 3, 4, 5), Sampling(do_sample=True), 9, seed=3)
    scheduler.submit(request, events.append)
    for _ in range(4):
        scheduler.step()
    scheduler.put_aside()
    assert engine.pool.available == engine.pool.total
    engine.slots[:] = -1
    engine.pool.forget()
    while scheduler.step():
        pass
    assert events[1:] == alone(request) and sum(isinstance(event, Started) for event in events) == 1


def test_deterministic_answers_are_computed_one_by_one():
    engine = FakeEngine()
    scheduler = Scheduler(engine, Settings(deterministic=True))
    for _ in range(3):
        scheduler.submit(Request((1, 2, 3, 4, 5), Sampling(), 5))
    while scheduler.step():
        pass
    assert set(engine.batches) == {1} and scheduler.stats().cached_tokens == 0


def test_blocks_are_shared_and_given_to_others_when_they_are_needed():
    pool = BlockPool(4, 2)
    tokens = np.array([1, 2, 3, 4, 5], np.int32)
    mine = pool.take(3)
    pool.publish("a", tokens, mine)
    assert pool.match("b", tokens, 4) == [] and pool.match("a", tokens[1:], 4) == []
    shared = pool.match("a", tokens, 4)
    assert shared == mine[:2] and pool.match("a", tokens, 3) == mine[:1]
    pool.give(mine[:1])
    pool.give(mine)
    assert pool.available == 2 and pool.kept == 0
    pool.give(shared)
    assert pool.available == 4 and pool.kept == 2 and pool.take(5) is None
    taken = pool.take(3)                                             # the end of the sequence is forgotten first
    assert pool.match("a", tokens, 4) == mine[:1] and mine[1] in taken
    with pytest.raises(AssertionError, match="but not in use"):
        pool.give([*taken, taken[0]])


def test_tokens_read_at_once_keep_the_scores_bounded():
    """Whole prompts of small models, pieces of those of large ones, never less than next to others."""
    assert tokens_at_once(8, 1024) == tokens_at_once(8, 2048) == 2048
    assert tokens_at_once(40, 1024) == 819 and tokens_at_once(32, 8192) == PREFILL_TOKENS
    for heads in (1, 8, 40, 64):
        for length in (16, 1000, 32768):
            tokens = tokens_at_once(heads, length)
            assert tokens == PREFILL_TOKENS or heads * tokens * length <= 1 << 25
