"""Two tenants on one replica, one of which sends ten times as many requests as the other.

Service is what the scheduler charges: tokens of prompts when they are admitted, and new tokens as
they are drawn, with the weights of the policy. The small tenant's time to the first token is
compared with the same arrivals alone on a replica of half the speed, which is its fair share, and
alone on a replica of the same speed.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from simulations import Scene, make_replica_spec
from step_costs import LinearStepCost
from twostroke.core.policy import Accounts, Policies
from twostroke.policies.accounts import INPUT_WEIGHT, OUTPUT_WEIGHT, VirtualTokenCounter
from twostroke.policies.names import PolicyChoice, build_policies
from twostroke.sim.arrivals import Arrival
from twostroke.sim.cluster import Cluster
from twostroke.sim.replica import ReplicaSpec
from twostroke.sim.routers import make_router

PROMPT_TOKENS, NEW_TOKENS = (40, 360), (4, 36)
NUM_BLOCKS, BLOCK_TOKENS = 2_000, 4
SMALL, BIG = "small", "big"


@dataclass
class WatchedAccounts:
    """The real accounts, and the difference of service after each charge while both wait."""

    inner: Accounts = field(default_factory=VirtualTokenCounter)
    waiting: dict[str, int] = field(default_factory=dict)
    served: dict[str, int] = field(default_factory=lambda: {SMALL: 0, BIG: 0})
    stretches: list[list[int]] = field(default_factory=lambda: [[]])
    lines: dict[str, list[object]] | None = None

    def lift(self, tenant: str, waiting: Iterable[str]) -> None:
        self.inner.lift(tenant, waiting)

    def get_debt(self, tenant: str) -> int:
        return self.inner.get_debt(tenant)

    def charge(self, tenant: str, prompt_tokens: int, new_tokens: int) -> None:
        self.inner.charge(tenant, prompt_tokens, new_tokens)
        self.served[tenant] += INPUT_WEIGHT * prompt_tokens + OUTPUT_WEIGHT * new_tokens
        assert self.lines is not None
        if len(self.lines) == 2:  # a tenant with nothing waiting has no line
            self.stretches[-1].append(self.served[SMALL] - self.served[BIG])
        elif self.stretches[-1]:
            self.stretches.append([])


def draw_arrivals(rate_per_ns: float, count: int, big: int = 10) -> tuple[Arrival, ...]:
    """Requests of both tenants at random times; the big one's are so many times as frequent."""
    rng, arrivals = random.Random(2), list[Arrival]()
    for tenant, times in ((SMALL, 1), (BIG, big)):
        time_ns = 0.0
        for _ in range(count * times):
            time_ns += rng.expovariate(rate_per_ns * times)
            lengths = rng.randint(*PROMPT_TOKENS), rng.randint(*NEW_TOKENS)
            arrivals.append(Arrival(int(time_ns), *lengths, tenant=tenant))
    return tuple(sorted(arrivals, key=lambda one: one.time_ns))


def make_spec(slower: int = 1, num_blocks: int = NUM_BLOCKS) -> ReplicaSpec:
    """A replica whose steps take so many times as long."""
    spec = make_replica_spec(
        num_blocks=num_blocks,
        block_tokens=BLOCK_TOKENS,
        step_tokens=64,
        max_rows=32,
        context_tokens=512,
        watermark_blocks=num_blocks // 16,
    )
    return replace(spec, cost=LinearStepCost(2_000 * slower, 100 * slower, 0))


def list_ttfts_ns(arrivals: Iterable[Arrival], order: str, slower: int = 1) -> list[int]:
    """The small tenant's times to the first token, ascending."""
    scene = Scene(make_spec(slower), tuple(arrivals), choice=PolicyChoice(order=order))
    records = scene.run(1_000).records
    columns, number = records.get_columns(), records.tenants.index(SMALL)
    times_ns = (columns["first_token_ns"] - columns["arrival_ns"])[columns["tenant"] == number]
    return sorted(times_ns.tolist())


def find_p99(arrivals: Iterable[Arrival], order: str, slower: int = 1) -> int:
    """Their 99th percentile."""
    times_ns = list_ttfts_ns(arrivals, order, slower)
    return times_ns[int(0.99 * len(times_ns))]


# Alone, the small tenant would use a tenth of the replica.
RATE_PER_NS = 1 / 300_000


def list_small(arrivals: Iterable[Arrival]) -> Iterator[Arrival]:
    """What the small tenant sends."""
    return (one for one in arrivals if one.tenant == SMALL)


def test_backlogged_tenants_are_served_alike_within_the_bound_of_the_paper() -> None:
    # Sheng et al. 2024, Theorem 4.4: 2 * max(w_p * L_input, w_q * M), M the tokens of the pool.
    num_blocks = 400
    arrivals = draw_arrivals(20 * RATE_PER_NS, 200)
    watched = WatchedAccounts()

    def make_policies() -> Policies:
        policies = build_policies(PolicyChoice(order="fair"), step_tokens=64)
        return replace(policies, accounts=watched)

    spec = replace(make_spec(num_blocks=num_blocks), make_policies=make_policies)
    cluster = Cluster(spec, 1, make_router("round-robin", 1))
    watched.lines = cluster.replicas[0].scheduler._roster.waiting.lanes
    records = cluster.run(arrivals)
    assert records.count_fates()["finished"] == len(arrivals)
    tokens = sum(INPUT_WEIGHT * one.prompt_tokens + OUTPUT_WEIGHT * one.new_tokens
                 for one in arrivals)  # fmt: skip
    assert sum(watched.served.values()) == tokens
    bound = 2 * max(INPUT_WEIGHT * PROMPT_TOKENS[1], OUTPUT_WEIGHT * num_blocks * BLOCK_TOKENS)
    stretches = [one for one in watched.stretches if one]
    assert max(map(len, stretches)) > 1_000
    assert max(max(one) - min(one) for one in stretches) <= bound


def test_a_small_tenant_waits_as_if_it_had_half_of_the_replica_alone() -> None:
    arrivals = draw_arrivals(RATE_PER_NS, 200)
    fair_ns = find_p99(arrivals, "fair")
    assert fair_ns <= 2 * find_p99(list_small(arrivals), "first-come", slower=2)
    assert fair_ns <= 3 * find_p99(list_small(arrivals), "first-come")
    # First come, first served it waits behind everything that the other has sent.
    assert find_p99(arrivals, "first-come") > 10 * fair_ns
