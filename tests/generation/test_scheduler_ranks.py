"""The scheduler of several ranks, with engines that compute nothing: the others do what rank 0 orders."""
import multiprocessing
import threading
from dataclasses import replace

import numpy as np
import pytest
from scheduler_fixtures import FakeEngine, alone, random_request

from research.telechat.common.errors import ConfigError, WorkerError
from research.telechat.generation.passes import Settings
from research.telechat.generation.ranks import Follower, Leader
from research.telechat.generation.requests import Request, Started
from research.telechat.generation.sampling import Sampling
from research.telechat.generation.scheduler import Scheduler


def follow(address, pipe):
    """A rank that is not the first, in a process of its own."""
    engine = FakeEngine()
    with Follower(address, b"key", timeout=20) as follower:
        scheduler = Scheduler(engine, Settings(slots=3, prefill_tokens=4), exchange=follower)
        follower.run(scheduler)
    pipe.send((engine.slots, scheduler.stats()))


def test_two_processes_compute_the_same(tmp_path):
    """Rank 0 takes the requests, cancels one, and draws a seed; the other writes the same tokens to the same slots."""
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    process = context.Process(target=follow, args=(str(tmp_path / "ranks"), theirs))
    process.start()
    engine, rng, events = FakeEngine(), np.random.RandomState(0), [[] for _ in range(8)]
    with Leader(str(tmp_path / "ranks"), b"key", 1) as leader:
        scheduler = Scheduler(engine, Settings(slots=3, prefill_tokens=4), exchange=leader)
        requests = [replace(random_request(rng), seed=None if number == 3 else number) for number in range(8)]
        for request, mine_events in zip(requests, events):
            ticket = scheduler.submit(request, mine_events.append)
            scheduler.step()
        scheduler.cancel(ticket)
        while scheduler.step():
            pass
        with pytest.raises(ConfigError, match="cannot be sent"):
            scheduler.submit(replace(requests[0], constraint=lambda: None))
    slots, stats = mine.recv()
    process.join(20)
    assert process.exitcode == 0 and (slots == engine.slots).all()
    assert stats.finished == scheduler.stats().finished == 7 and stats.generated_tokens > 20
    for number, request in enumerate(requests[:7]):
        if number != 3:
            assert [event for event in events[number] if not isinstance(event, Started)] == alone(request)


def test_rank_that_ends_is_noticed(tmp_path):
    path = str(tmp_path / "ranks")
    started = threading.Thread(target=lambda: Follower(path, b"key", timeout=20).__exit__())
    started.start()
    leader = Leader(path, b"key", 1)
    started.join()
    scheduler, events = Scheduler(FakeEngine(), exchange=leader), []
    scheduler.submit(Request((1,), Sampling(), 5), events.append)
    with pytest.raises(WorkerError, match="a rank does not take orders"):
        while scheduler.step():
            pass
    assert events[-1].reason == "error"
    with pytest.raises(WorkerError, match="rank 0 does not answer"):
        Follower(str(tmp_path / "nobody"), b"key", timeout=0)
