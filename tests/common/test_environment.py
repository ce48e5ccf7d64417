"""What launcher and machine say about a process."""
import pytest

from research.telechat.common import environment


def test_places():
    assert environment.PLUGIN == environment.ROOT / "research/telechat"
    assert (environment.PLUGIN / "telechat.py").is_file()


@pytest.mark.parametrize(("value", "rank", "workers"), [(None, 0, 1), ("", 0, 1), ("3", 3, 3)])
def test_rank_and_workers(monkeypatch, value, rank, workers):
    for name in ("RANK_ID", "MS_WORKER_NUM"):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert (environment.rank(), environment.workers()) == (rank, workers)


@pytest.mark.parametrize(("rank", "role", "expected"), [
    (None, None, True), ("0", "MS_WORKER", True), ("1", "MS_WORKER", False), (None, "MS_SCHED", False)])
def test_one_process_of_a_job_writes(monkeypatch, rank, role, expected):
    for name, value in (("RANK_ID", rank), ("MS_ROLE", role)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert environment.writes() is expected


def test_cores_are_those_the_process_may_use(monkeypatch):
    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda _: {0, 5, 6}, raising=False)
    assert environment.cores() == 3
    monkeypatch.delattr(environment.os, "sched_getaffinity")
    monkeypatch.setattr(environment.os, "cpu_count", lambda: None)
    assert environment.cores() == 1
