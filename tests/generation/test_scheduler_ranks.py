"""The scheduler of several ranks, with engines that compute nothing: the others do what rank 0 orders."""
import multiprocessing
import threading
import time
from dataclasses import replace
from multiprocessing.connection import Listener

import numpy as np
import pytest
from scheduler_fixtures import FakeEngine, alone, random_request

from research.telechat.common.errors import WorkerError
from research.telechat.generation.passes import Settings
from research.telechat.generation.ranks import DRAIN, Follower, Leader
from research.telechat.generation.requests import Request, Started
from research.telechat.generation.sampling import Sampling
from research.telechat.generation.scheduler import Scheduler

SETTINGS = Settings(slots=3, prefill_tokens=4)


class Third:
    """A constraint that only rank 0 can have: it cannot be pickled."""

    def __init__(self):
        self.lock = threading.Lock()

    def allowed(self):
        return np.arange(FakeEngine().vocab_size) == 3

    def advance(self, token):
        assert token == 3


def follow(address, pipe):
    """A rank that is not the first, in a process of its own."""
    engine = FakeEngine()
    with Follower(address, b"key", timeout=20) as follower:
        scheduler = Scheduler(engine, SETTINGS, ranks=follower)
        follower.run(scheduler)
    pipe.send((engine.slots, scheduler.stats(), follower.noted()))


def test_two_processes_compute_the_same(tmp_path):
    """Rank 0 takes the requests and cancels one; the other launches the same and writes the same tokens."""
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    process = context.Process(target=follow, args=(str(tmp_path / "ranks"), theirs))
    process.start()
    engine, rng, events = FakeEngine(), np.random.RandomState(0), [[] for _ in range(9)]
    with Leader(Listener(str(tmp_path / "ranks"), authkey=b"key"), 1) as leader:
        scheduler = Scheduler(engine, SETTINGS, ranks=leader)
        requests = [replace(random_request(rng), seed=None if number == 3 else number) for number in range(8)]
        requests.insert(0, Request((1, 2), Sampling(), 2, constraint=Third()))
        for request, mine_events in zip(requests, events):
            ticket = scheduler.submit(request, mine_events.append)
            scheduler.step()
        scheduler.cancel(ticket)
        while scheduler.step():
            pass
    slots, stats, launches = mine.recv()
    process.join(20)
    assert process.exitcode == 0 and (slots == engine.slots).all()
    assert launches == leader.noted() and launches[0] > 20
    assert stats.finished == scheduler.stats().finished == 8 and stats.generated_tokens > 20
    assert [event.id for event in events[0][1:-1]] == [3, 3]
    for number, request in enumerate(requests[1:8], 1):
        if request.seed is not None:
            assert [event for event in events[number] if not isinstance(event, Started)] == alone(request)


def connected(tmp_path, **how):
    """(leader, follower) in one process."""
    path = str(tmp_path / "ranks")
    listener, found = Listener(path, authkey=b"key"), []
    thread = threading.Thread(target=lambda: found.append(Leader(listener, 1, **how)))
    thread.start()
    follower = Follower(path, b"key", timeout=20)
    thread.join()
    return found[0], follower


def until(condition):
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    assert condition()


def test_rank_that_ends_is_noticed(tmp_path):
    lost = []
    leader, follower = connected(tmp_path, on_loss=lost.append)
    follower.__exit__()
    until(lambda: lost)                                     # whatever the steps wait for
    assert "another rank of the model" in lost[0]
    scheduler, events = Scheduler(FakeEngine(), ranks=leader), []
    scheduler.submit(Request((1,), Sampling(), 5), events.append)
    with pytest.raises(WorkerError, match="a rank stopped responding"):
        while scheduler.step():
            pass
    assert events[-1].reason == "error"
    with pytest.raises(WorkerError, match="rank 0 did not answer"):
        Follower(str(tmp_path / "nobody"), b"key", timeout=0)


@pytest.mark.parametrize("well", [True, False])
def test_end_of_rank_0_ends_the_others(tmp_path, well):
    leader, follower = connected(tmp_path)
    lost = []
    follower._on_loss = lambda: lost.append(1)
    threading.Thread(target=leader.close, args=(well,)).start()
    if well:
        follower.run(Scheduler(FakeEngine(), ranks=follower))
        follower.__exit__()
        assert not lost
    else:
        with pytest.raises(WorkerError, match="rank 0 is gone"):
            follower.run(Scheduler(FakeEngine(), ranks=follower))
        until(lambda: lost)


def test_other_ranks_may_ask_to_drain(tmp_path):
    words = []
    leader, follower = connected(tmp_path, on_word=words.append)
    follower.say(DRAIN)
    until(lambda: words == [DRAIN])
    leader.close(False)


def test_rank_that_would_compute_something_else_ends(tmp_path):
    """With other options, say: it must not wait for the collective of a graph that the others do not run."""
    leader, follower = connected(tmp_path)
    scheduler = Scheduler(FakeEngine(), SETTINGS, ranks=leader)
    scheduler.submit(Request((1, 2, 3, 4, 5, 6), Sampling(), 3))
    thread = threading.Thread(target=lambda: [scheduler.step() for _ in range(3)])
    thread.start()
    with pytest.raises(WorkerError, match="this rank diverged from rank 0"):
        follower.run(Scheduler(FakeEngine(), replace(SETTINGS, prefill_tokens=6), ranks=follower))
    thread.join()
    leader.close(False)
