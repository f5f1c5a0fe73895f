"""The simulator's word on a plan: the same requests, through the scheduler that serves.

Owns how a candidate becomes replicas, how many requests are enough, and what is done where the
closed form was too hopeful: a replica more in the pool that failed, a few times over.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from twostroke.cli.simulated import MAX_ITERATIONS
from twostroke.core.ports import ExecutorInfo
from twostroke.core.types import SchedulerConfig
from twostroke.plan.capacity import Demand
from twostroke.plan.search import Candidate, Option, add_replicas
from twostroke.policies.names import PolicyChoice, build_policies
from twostroke.policies.watermark import choose_watermark
from twostroke.sim.arrivals import Arrival
from twostroke.sim.cluster import Cluster
from twostroke.sim.handoff import LinkSpec
from twostroke.sim.pools import PoolSpec, simulate_pools
from twostroke.sim.records import FATES
from twostroke.sim.replica import ReplicaSpec
from twostroke.sim.results import get_times
from twostroke.sim.routers import make_router
from twostroke.sim.sources import Fitted, Source, Targets

_BLOCK_TOKENS = 16
_LEAST, _MOST = 500, 2000  # requests
_EACH = 80  # requests for each replica
_LATENCIES = 4  # a steady state takes several requests' times
TRIES = 3
_KEPT = 0.9
_FINISHED = FATES.index("finished")


@dataclass(frozen=True, slots=True)
class Checked:
    """A candidate as it was simulated, with the replicas it took. Times are percentiles of all
    requests; share: of requests that finished within both targets; is_kept: 9 of 10 did.
    steady_requests: as many as a steady state takes, which may be more than were simulated."""

    candidate: Candidate
    requests: int
    steady_requests: int
    ttft_p50_s: float
    ttft_p90_s: float
    tpot_p50_s: float
    tpot_p90_s: float
    share: float
    link_busy: float

    @property
    def is_kept(self) -> bool:
        """True when nine of ten requests kept both targets."""
        return self.share >= _KEPT


def check_candidate(
    candidate: Candidate, demand: Demand, source: Source, tries: int = TRIES
) -> Checked:
    """Simulate it, with more replicas where it does not keep the targets, at most `tries` times."""
    for _ in range(tries):
        checked = _simulate(candidate, demand, source)
        if checked.is_kept:
            break
        candidate = _grow(candidate, demand, checked)
    return checked


def _grow(candidate: Candidate, demand: Demand, checked: Checked) -> Candidate:
    """A tenth more replicas, at least one, of the pool whose target was missed."""
    at = 0
    if len(candidate.pools) > 1 and demand.tpot_s and checked.tpot_p90_s > demand.tpot_s:
        at = 1
    return add_replicas(candidate, demand, at, max(1, candidate.pools[at].replicas // 10))


def _simulate(candidate: Candidate, demand: Demand, source: Source) -> Checked:
    steady = _count_steady(candidate, demand)
    arrivals = list(islice(_draw(candidate, source, demand), min(_MOST, steady)))
    link_busy = 0.0
    if candidate.link is None:
        (pool,) = candidate.pools
        router = make_router("least-tokens", pool.replicas)
        records = Cluster(_build_replica(pool.option), pool.replicas, router).run(arrivals)
        columns = records.get_columns()
        times = get_times(columns)
        ttft, tpot = times["ttft_s"], times["tpot_s"]
        ttft = np.where(columns["fate"] == _FINISHED, ttft, np.nan)
    else:
        prefill, decode = (
            PoolSpec(_build_replica(pool.option), pool.replicas) for pool in candidate.pools
        )
        link = LinkSpec(candidate.link.bandwidth)
        token_bytes = candidate.pools[0].option.kv_token_bytes
        found = simulate_pools(prefill, decode, link, token_bytes, arrivals)
        ttft, tpot, link_busy = found.ttft_s, found.tpot_s, found.link_busy
        is_whole = np.array([each.new_tokens > 1 for each in arrivals])
        ttft = np.where(is_whole & np.isnan(tpot), np.nan, ttft)
    share = float(np.mean(_is_within(ttft, demand.ttft_s) & _is_good(tpot, demand.tpot_s)))
    ttft_p50, ttft_p90 = _get_percentiles(ttft)
    tpot_p50, tpot_p90 = _get_percentiles(tpot)
    return Checked(
        candidate, len(arrivals), steady, ttft_p50, ttft_p90, tpot_p50, tpot_p90, share, link_busy
    )


def _is_within(seconds: NDArray[np.float64], target_s: float) -> NDArray[np.bool_]:
    """Requests that have a time, within the target where there is one."""
    return ~np.isnan(seconds) & ((seconds <= target_s) if target_s else True)


def _is_good(seconds: NDArray[np.float64], target_s: float) -> NDArray[np.bool_]:
    """The same, where one token alone has no time between tokens and keeps any target."""
    return np.isnan(seconds) | ((seconds <= target_s) if target_s else True)


def _get_percentiles(seconds: NDArray[np.float64]) -> tuple[float, float]:
    known = seconds[~np.isnan(seconds)]
    if not len(known):
        return math.inf, math.inf
    middle, most = np.percentile(known, (50, 90))
    return float(middle), float(most)


def _count_steady(candidate: Candidate, demand: Demand) -> int:
    replicas = sum(pool.replicas for pool in candidate.pools)
    latency_s = candidate.ttft_s + demand.new_tokens * candidate.tpot_s
    return max(_LEAST, _EACH * replicas, round(_LATENCIES * latency_s * demand.rate))


def _draw(candidate: Candidate, source: Source, demand: Demand) -> Iterator[Arrival]:
    pool = candidate.pools[0]
    spec = pool.option.spec
    targets = Targets(
        context_tokens=spec.context_tokens,
        ttft_ns=round(demand.ttft_s * 1e9),
        itl_ns=round(demand.tpot_s * 1e9),
    )
    return source.arrive(targets, Fitted())


def _build_replica(option: Option) -> ReplicaSpec:
    """What each replica is made of, as `simulate` makes it."""
    engine, spec = option.engine, option.spec
    block_bytes = _BLOCK_TOKENS * option.kv_token_bytes
    num_blocks = engine.pool_tokens // _BLOCK_TOKENS
    config = SchedulerConfig(
        num_blocks=num_blocks,
        block_tokens=_BLOCK_TOKENS,
        step_tokens=engine.step_tokens,
        max_rows=engine.max_rows,
        context_tokens=spec.context_tokens,
        vocab_size=spec.vocab_size,
        watermark_blocks=choose_watermark(num_blocks, engine.max_rows),
    )
    info = ExecutorInfo(
        device=option.device,
        backend="simulated",
        threads=0,
        num_blocks=num_blocks,
        block_tokens=_BLOCK_TOKENS,
        kv_bytes=num_blocks * block_bytes,
        weight_bytes=spec.weight_bytes,
        max_step_tokens=engine.step_tokens,
    )
    make_policies = partial(
        build_policies,
        PolicyChoice(),
        step_tokens=engine.step_tokens,
        block_bytes=block_bytes,
        cost=engine.cost,
    )
    return ReplicaSpec(
        config, info, engine.cost, make_policies=make_policies, max_iterations=MAX_ITERATIONS
    )
