"""Pools: prefill replicas, a link, and decode replicas, simulated with the scheduler that serves.

Owns how a request passes from one pool to the other. The prefill cluster computes every prompt and
draws one token; the hand-off moves its keys and values; the decode cluster attaches them and goes
on. Nothing flows back, so one runs after the other on the same virtual time. Left out: that a
prefill replica keeps a request's blocks until they have moved, which matters when its link is
nearly always busy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from twostroke.sim.arrivals import Arrival
from twostroke.sim.cluster import Cluster
from twostroke.sim.handoff import Handoff, LinkSpec
from twostroke.sim.records import FATES, Records
from twostroke.sim.replica import ReplicaSpec
from twostroke.sim.routers import make_router

_FINISHED = FATES.index("finished")


@dataclass(frozen=True, slots=True)
class PoolSpec:
    """Replicas of one pool."""

    replica: ReplicaSpec
    replicas: int
    router: str = "least-tokens"


@dataclass(frozen=True, slots=True)
class PoolTimes:
    """Times of every request, seconds, NaN where it has none: to its first token, between tokens in
    the mean, and from the first token until its KV had moved. link_busy: share of the time that the
    busiest link moved something."""

    ttft_s: NDArray[np.float64]
    tpot_s: NDArray[np.float64]
    moved_s: NDArray[np.float64]
    finished: int
    link_busy: float


def simulate_pools(
    prefill: PoolSpec,
    decode: PoolSpec,
    link: LinkSpec,
    kv_token_bytes: int,
    arrivals: Iterable[Arrival],
) -> PoolTimes:
    """Let every arrival pass through both pools. Raises InvalidParameter as `Cluster` does."""
    sent = list(arrivals)
    first = _run(prefill, [replace(arrival, new_tokens=1) for arrival in sent])
    columns = first.get_columns()
    handoff = Handoff(prefill.replicas, link)
    computed = [
        (int(columns["first_token_ns"][at]), at)
        for at, arrival in enumerate(sent)
        if columns["fate"][at] == _FINISHED and arrival.new_tokens > 1
    ]
    order: list[int] = []
    moved = dict[int, int]()
    for time_ns, at in _move(handoff, computed, columns["replica"], sent, kv_token_bytes):
        order.append(at)
        moved[at] = time_ns
    spec = replace(decode, replica=replace(decode.replica, is_computed=True))
    second = _run(spec, [_continue(sent[at], moved[at]) for at in order])
    ended = second.get_columns()
    for place, at in enumerate(order):
        (handoff.attach if ended["planned_ns"][place] else handoff.drop)(at)
    last_ns = np.zeros(len(sent), np.int64)
    for place, at in enumerate(order):
        if ended["fate"][place] == _FINISHED:
            last_ns[at] = ended["last_token_ns"][place]
    return _measure(sent, columns, last_ns, moved, handoff)


def _run(pool: PoolSpec, arrivals: Iterable[Arrival]) -> Records:
    router = make_router(pool.router, pool.replicas)
    return Cluster(pool.replica, pool.replicas, router).run(arrivals)


def _move(
    handoff: Handoff,
    computed: list[tuple[int, int]],
    senders: NDArray[np.int64],
    sent: list[Arrival],
    kv_token_bytes: int,
) -> Iterator[tuple[int, int]]:
    """(time, request) of every request's KV when it has moved, in that order."""
    for time_ns, at in sorted(computed):
        yield from handoff.take_arrived(time_ns)
        kv_bytes = sent[at].prompt_tokens * kv_token_bytes
        handoff.offer(at, int(senders[at]), kv_bytes, time_ns)
    while handoff.next_ns is not None:
        yield from handoff.take_arrived(handoff.next_ns)


def _continue(arrival: Arrival, time_ns: int) -> Arrival:
    """What is left to decode: the first token has joined the prompt, which is computed."""
    return replace(
        arrival,
        time_ns=time_ns,
        prompt_tokens=arrival.prompt_tokens + 1,
        new_tokens=arrival.new_tokens - 1,
        prefix=(),
    )


def _measure(
    sent: list[Arrival],
    columns: dict[str, NDArray[np.int64]],
    last_ns: NDArray[np.int64],
    moved: dict[int, int],
    handoff: Handoff,
) -> PoolTimes:
    first_ns = columns["first_token_ns"].astype(float)
    first_ns[first_ns == 0] = np.nan
    new_tokens = np.array([arrival.new_tokens for arrival in sent])
    ends = np.where(last_ns > 0, last_ns, np.nan)
    several = np.maximum(new_tokens - 1, 1)
    moved_ns = np.full(len(sent), np.nan)
    for at, time_ns in moved.items():
        moved_ns[at] = time_ns
    done = (columns["fate"] == _FINISHED) & ((last_ns > 0) | (new_tokens == 1))
    end_ns = max(1, int(last_ns.max(initial=0)))
    senders = int(columns["replica"].max(initial=0)) + 1
    busy = max(handoff.get_busy_ns(sender) for sender in range(senders)) / end_ns
    return PoolTimes(
        ttft_s=(first_ns - columns["arrival_ns"]) / 1e9,
        tpot_s=np.where(new_tokens > 1, (ends - first_ns) / several, np.nan) / 1e9,
        moved_s=(moved_ns - first_ns) / 1e9,
        finished=int(done.sum()),
        link_busy=busy,
    )
