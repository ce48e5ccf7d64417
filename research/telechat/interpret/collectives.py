"""Communication: what ranks wait for, and what they receive. From the documentation of mindspore.ops.

A rank yields an `Arrival` at a collective and a `Wanted` at a receive. `run` lets the ranks take turns, completes what
can be completed, and on a deadlock reports which rank waits for what.
"""
from collections import deque
from typing import Any, Callable, Deque, Dict, Generator, List, NamedTuple, Sequence, Tuple, Union

import numpy as np

from research.telechat.common.errors import ExecutionError

COLLECTIVES = ("AllReduce", "AllGather", "ReduceScatter", "Broadcast", "AlltoAll", "AllToAll", "AlltoAllV",
               "AllToAllv", "NeighborExchange")
_REDUCTIONS: Dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "sum": np.add, "max": np.maximum, "min": np.minimum, "prod": np.multiply}


class Arrival(NamedTuple):
    """A rank at a collective."""

    op: str
    group: Tuple[int, ...]
    attrs: Dict[str, Any]
    value: Any
    place: str


class Wanted(NamedTuple):
    """A rank waiting for a message from `source` with `tag`."""

    source: int
    tag: Any
    place: str


Request = Union[Arrival, Wanted]
Execution = Generator[Request, Any, Any]
Box = Dict[Tuple[int, int, Any], Deque[Any]]              # sent messages: (from, to, tag)


def _several(value: Any) -> Tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _kind(arrival: Arrival) -> Tuple[Any, ...]:
    """What must match between the ranks of a group; for exchanges, shapes may differ."""
    shape = np.shape(arrival.value) if isinstance(arrival.value, np.ndarray) else None
    if arrival.op in ("AlltoAllV", "AllToAllv", "NeighborExchange"):
        shape = None
    named = tuple(str(arrival.attrs.get(key)) for key in ("op", "root_rank", "split_count", "split_dim", "concat_dim"))
    return (arrival.op, *named, shape)


def _exchange(arrivals: Sequence[Arrival]) -> List[Any]:
    """NeighborExchange: piece i goes to send_rank_ids[i]; result i comes from recv_rank_ids[i]."""
    sent: Dict[Tuple[int, int], Any] = {}
    for rank, arrival in zip(arrivals[0].group, arrivals):
        for target, piece in zip(_several(arrival.attrs["send_rank_ids"]), arrival.value):
            sent[rank, target] = piece
    results = []
    for rank, arrival in zip(arrivals[0].group, arrivals):
        sources = _several(arrival.attrs["recv_rank_ids"])
        missing = [source for source in sources if (source, rank) not in sent]
        if missing:
            raise ExecutionError(f"rank {rank} at {arrival.place}: ranks {missing} send nothing to it")
        results.append(tuple(sent[source, rank] for source in sources))
    return results


def _all_to_all_v(arrivals: Sequence[Arrival]) -> List[Any]:
    """AlltoAllV: flat values, of which send_numel_list[j] go to rank j of the group."""
    pieces = []
    for arrival in arrivals:
        counts = [int(count) for count in _several(arrival.attrs["send_numel_list"])]
        flat = np.ravel(arrival.value)
        if sum(counts) != flat.size:
            raise ExecutionError(f"{arrival.place}: send_numel_list {counts} for {flat.size} elements")
        pieces.append(np.split(flat, np.cumsum(counts)[:-1]))
    results = []
    for number, arrival in enumerate(arrivals):
        got = [piece[number] for piece in pieces]
        counts = [int(count) for count in _several(arrival.attrs["recv_numel_list"])]
        if [part.size for part in got] != counts:
            raise ExecutionError(f"{arrival.place}: recv_numel_list {counts}, but sent: {[part.size for part in got]}")
        results.append(np.concatenate(got))
    return results


def complete(arrivals: Sequence[Arrival]) -> List[Any]:
    """The result of each rank of a group; arrivals in group order. Raises ExecutionError."""
    first, ranks = arrivals[0], len(arrivals)
    if len({_kind(arrival) for arrival in arrivals}) > 1:
        raise ExecutionError("ranks meet in different operations: " + "; ".join(
            f"rank {rank} {arrival.op} of {np.shape(arrival.value)} at {arrival.place}"
            for rank, arrival in zip(first.group, arrivals)))
    values = [arrival.value for arrival in arrivals]
    if first.op in ("AllReduce", "ReduceScatter"):
        reduction = _REDUCTIONS[first.attrs.get("op", "sum")]
        total = values[0]
        for value in values[1:]:
            total = reduction(total, value)
        return [total] * ranks if first.op == "AllReduce" else np.split(total, ranks, 0)
    if first.op == "AllGather":
        return [np.concatenate([np.atleast_1d(value) for value in values], 0)] * ranks
    if first.op == "Broadcast":
        return [values[first.group.index(first.attrs["root_rank"])]] * ranks
    if first.op in ("AlltoAll", "AllToAll"):
        if first.attrs["split_count"] != ranks:
            raise ExecutionError(f"{first.place}: split_count {first.attrs['split_count']} for {ranks} ranks")
        pieces = [np.split(value, ranks, first.attrs["split_dim"]) for value in values]
        return [np.concatenate([piece[number] for piece in pieces], first.attrs["concat_dim"])
                for number in range(ranks)]
    if first.op == "NeighborExchange":
        return _exchange(arrivals)
    if first.op in ("AlltoAllV", "AllToAllv"):
        return _all_to_all_v(arrivals)
    raise ExecutionError(f"{first.place}: the interpreter does not support the collective {first.op}")


def _stuck(waiting: Dict[int, Request], ended: Sequence[int]) -> str:
    lines = []
    for rank, request in sorted(waiting.items()):
        if isinstance(request, Wanted):
            lines.append(f"rank {rank} waits for tag {request.tag} of rank {request.source} at {request.place}")
        else:
            here = {other: waiting.get(other) for other in request.group}
            away = [other for other, its in here.items()
                    if not (isinstance(its, Arrival) and its.group == request.group)]
            lines.append(f"rank {rank} waits in {request.op} at {request.place} for ranks {away}")
    over = f"; ranks {list(ended)} have finished" if ended else ""
    return "every rank waits: " + "; ".join(lines) + over


def run(ranks: Dict[int, Execution], box: Box) -> Dict[int, Any]:
    """Execute all ranks until they finish.

    Args:
        ranks: what each rank executes.
        box: messages in flight, (from, to, tag): values in order; must be empty at the end.

    Returns:
        What each rank's graph returns.

    Raises:
        ExecutionError: ranks deadlock, meet in different operations, or send what is never received.
    """
    results: Dict[int, Any] = {}
    waiting: Dict[int, Request] = {}
    ready: Deque[Tuple[int, Any]] = deque((rank, None) for rank in ranks)
    while len(results) < len(ranks):
        while ready:
            rank, value = ready.popleft()
            try:
                waiting[rank] = ranks[rank].send(value)
            except StopIteration as end:
                results[rank] = end.value
        for rank, request in list(waiting.items()):
            if rank not in waiting:                        # continued with its group
                continue
            if isinstance(request, Wanted):
                if box.get((request.source, rank, request.tag)):
                    del waiting[rank]
                    ready.append((rank, box[request.source, rank, request.tag].popleft()))
                continue
            group = request.group
            here = [waiting.get(other) for other in group]
            met = [other for other in here if isinstance(other, Arrival) and other.group == group]
            if len(met) == len(group):
                for other in group:
                    del waiting[other]
                ready.extend(zip(group, complete(met)))
        if not ready and len(results) < len(ranks):
            raise ExecutionError(_stuck(waiting, sorted(results)))
    left = {key: len(values) for key, values in box.items() if values}
    if left:
        raise ExecutionError("sent but never received (from, to, tag): " + ", ".join(
            f"{key} {count} times" for key, count in left.items()))
    return results
