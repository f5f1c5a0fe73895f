"""Search: which engines, how many, in one pool or in two, keep what is asked; cheapest first.

Owns the enumeration and what makes one plan better than another: dollars where there are prices,
else devices. Capacities come from plan/capacity.py, engines from whoever calls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from twostroke.plan.capacity import (
    Capacity,
    Demand,
    Engine,
    Load,
    find_capacity,
    find_load,
    find_prefill_capacity,
    get_prefill_load,
    get_prefill_s,
    get_step_s,
)
from twostroke.spec.model import ModelSpec

HOURS_A_MONTH = 730
MOST_LINK_BUSY = 0.7


@dataclass(frozen=True, slots=True)
class Option:
    """An engine on `tp` × `pp` devices. price: dollars an hour for one device, 0 where unknown;
    kv_token_bytes: keys and values of one token; is_plain: in formats that change no answer."""

    spec: ModelSpec
    device: str
    weights: str
    kv: str
    tp: int
    engine: Engine
    price: float
    kv_token_bytes: int
    is_plain: bool = True
    pp: int = 1


@dataclass(frozen=True, slots=True)
class Pool:
    """Replicas of one engine. role: "all", "prefill" or "decode"; load: of one replica."""

    role: str
    option: Option
    replicas: int
    capacity: Capacity
    load: Load

    @property
    def devices(self) -> int:
        """Devices of all replicas."""
        return self.replicas * self.option.tp * self.option.pp

    @property
    def utilisation(self) -> float:
        """Share of the rate that its replicas keep at most."""
        return self.load.rate / self.capacity.load.rate


@dataclass(frozen=True, slots=True)
class Link:
    """KV from the prefill to the decode pool. request_bytes: of one request; bandwidth: bytes a
    second of each prefill replica's link; busy: share of its time; transfer_s: of one request;
    needed: the least bandwidth that is at most MOST_LINK_BUSY busy."""

    request_bytes: int
    bandwidth: float
    busy: float
    transfer_s: float
    needed: float


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan: one pool, or prefill and decode. ttft_s: 90th percentile, tpot_s: mean, predicted.

    growth: times the rate that it keeps; breaks: what does not, beyond.
    """

    pools: tuple[Pool, ...]
    link: Link | None
    ttft_s: float
    tpot_s: float
    growth: float
    breaks: str

    @property
    def devices(self) -> int:
        """Devices of all pools."""
        return sum(pool.devices for pool in self.pools)

    @property
    def hourly_cost(self) -> float:
        """Dollars an hour; 0 where a price is unknown."""
        costs = [pool.devices * pool.option.price for pool in self.pools]
        return sum(costs) if all(costs) else 0.0

    def get_token_cost(self, demand: Demand) -> float:
        """Dollars for a million drawn tokens at the rate that is asked."""
        return self.hourly_cost / 3600 / (demand.rate * demand.new_tokens) * 1e6


@dataclass(frozen=True, slots=True)
class Nearest:
    """The least times that any option can keep, and whose they are."""

    ttft_s: float
    ttft_of: str
    tpot_s: float
    tpot_of: str


def search(
    options: Sequence[Option], demand: Demand, link_bandwidth: float, most_replicas: int
) -> list[Candidate]:
    """Every plan that keeps the targets, the cheapest first; among equals the one that also grows
    most. link_bandwidth: of each prefill replica; 0 leaves two pools out."""
    pools = (_build_pool("all", option, demand) for option in options)
    found = [_stand_alone(pool, demand) for pool in pools if pool is not None]
    if link_bandwidth and demand.new_tokens > 1:
        found += _search_pools(options, demand, link_bandwidth)
    fitting = [each for each in found if all(p.replicas <= most_replicas for p in each.pools)]
    return sorted(fitting, key=get_rank)


def add_replicas(candidate: Candidate, demand: Demand, at: int, more: int) -> Candidate:
    """The plan with `more` replicas in its pool number `at`, each of which then has less to do."""
    pools = list(candidate.pools)
    pools[at] = _share(pools[at], demand, pools[at].replicas + more)
    if candidate.link is None:
        return _stand_alone(pools[0], demand)
    return _join(pools[0], pools[1], demand, candidate.link.bandwidth)


def get_rank(candidate: Candidate) -> tuple[float, ...]:
    """What is better is smaller: cost, devices, changed formats, the second pool, less growth."""
    changed = sum(not pool.option.is_plain for pool in candidate.pools)
    pools = len(candidate.pools)
    return (
        candidate.hourly_cost or math.inf,
        candidate.devices,
        changed,
        pools,
        -candidate.growth,
    )


def find_nearest(options: Sequence[Option], demand: Demand) -> Nearest:
    """What is possible where nothing keeps the targets: a request alone on the quickest engine."""
    ttft = [(get_prefill_s(each.engine, demand), name_option(each)) for each in options]
    tpot = [(get_step_s(each.engine, demand, 1, 0), name_option(each)) for each in options]
    return Nearest(*min(ttft), *min(tpot))


def name_option(option: Option) -> str:
    """An option in a few words."""
    devices = option.tp * option.pp
    return f"{devices} × {option.device}, {option.weights} weights, {option.kv} KV"


def find_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of the points that no other is at least as good as in both, smaller being better."""
    front: list[int] = []
    least = math.inf
    for at in sorted(range(len(points)), key=lambda at: points[at]):
        if points[at][1] < least:
            least = points[at][1]
            front.append(at)
    return front


def _stand_alone(pool: Pool, demand: Demand) -> Candidate:
    load, capacity = pool.load, pool.capacity
    growth = capacity.load.rate * pool.replicas / demand.rate
    return Candidate((pool,), None, load.ttft_s, load.tpot_s, growth, capacity.breaks)


def _search_pools(
    options: Sequence[Option], demand: Demand, link_bandwidth: float
) -> list[Candidate]:
    """The best prefill and the best decode pool of every device and format."""
    found = []
    for kind in dict.fromkeys((each.device, each.weights, each.kv) for each in options):
        same = [each for each in options if (each.device, each.weights, each.kv) == kind]
        prefill = [_build_pool("prefill", each, demand) for each in same]
        decode = [_build_pool("decode", each, demand) for each in same]
        first = min((each for each in prefill if each), key=_weigh_pool, default=None)
        second = min((each for each in decode if each), key=_weigh_pool, default=None)
        if first is None or second is None:
            continue
        candidate = _join(first, second, demand, link_bandwidth)
        if not demand.tpot_s or candidate.tpot_s <= demand.tpot_s:
            found.append(candidate)
    return found


def _weigh_pool(pool: Pool) -> tuple[float, ...]:
    return pool.devices, pool.load.ttft_s + pool.load.tpot_s


def _build_pool(role: str, option: Option, demand: Demand) -> Pool | None:
    """The fewest replicas that take the whole rate; None where one alone breaks a limit."""
    if role == "prefill":
        capacity = find_prefill_capacity(option.engine, demand)
    else:
        capacity = find_capacity(option.engine, demand, is_decode_only=role == "decode")
    if capacity.load.breaks or capacity.load.rate <= 0:
        return None
    pool = Pool(role, option, 1, capacity, capacity.load)
    return _share(pool, demand, math.ceil(demand.rate / capacity.load.rate))


def _share(pool: Pool, demand: Demand, replicas: int) -> Pool:
    """The pool with so many replicas, and the load of each."""
    engine, rate = pool.option.engine, demand.rate / replicas
    if pool.role == "prefill":
        load = get_prefill_load(engine, demand, rate)
    else:
        most, is_decode_only = pool.capacity.load, pool.role == "decode"
        load = find_load(engine, demand, rate, most, is_decode_only)
    return replace(pool, replicas=replicas, load=load)


def _join(prefill: Pool, decode: Pool, demand: Demand, bandwidth: float) -> Candidate:
    request_bytes = prefill.option.kv_token_bytes * demand.prompt_tokens
    sent = prefill.load.rate * request_bytes
    link = Link(
        request_bytes=request_bytes,
        bandwidth=bandwidth,
        busy=sent / bandwidth,
        transfer_s=request_bytes / bandwidth,
        needed=sent / MOST_LINK_BUSY,
    )
    tpot_s = decode.load.tpot_s + link.transfer_s / max(1, demand.new_tokens - 1)
    limits = [
        (pool.capacity.load.rate * pool.replicas / demand.rate, f"{pool.role}: {reason}")
        for pool in (prefill, decode)
        for reason in (pool.capacity.breaks,)
    ]
    limits.append((MOST_LINK_BUSY / link.busy, "the link between the pools is full"))
    growth, breaks = min(limits)
    return Candidate((prefill, decode), link, prefill.load.ttft_s, tpot_s, growth, breaks)
