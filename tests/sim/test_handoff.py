"""Laws of the hand-off: nothing is lost, links move one request at a time, pools go on from it."""

from __future__ import annotations

import random

import numpy as np
import pytest

from simulations import make_replica_spec
from twostroke.errors import InvalidParameter
from twostroke.sim.arrivals import Arrival
from twostroke.sim.handoff import Handoff, HandoffState, LinkSpec
from twostroke.sim.pools import PoolSpec, simulate_pools

LINK = LinkSpec(1e9, 100)


def test_a_request_arrives_when_its_bytes_have_passed() -> None:
    handoff = Handoff(1, LINK)
    handoff.offer(7, 0, 1_000, 50)
    assert handoff.next_ns == 50 + 100 + 1_000
    assert handoff.take_arrived(1_149) == []
    assert handoff.take_arrived(1_150) == [(1_150, 7)]


def test_a_link_moves_one_request_after_the_other_and_links_do_not_wait_for_each_other() -> None:
    handoff = Handoff(2, LINK)
    for request, sender in ((0, 0), (1, 0), (2, 1)):
        handoff.offer(request, sender, 1_000, 0)
    assert handoff.take_arrived(10_000) == [(1_100, 0), (1_100, 2), (2_200, 1)]


@pytest.mark.parametrize("act", ["offer", "attach", "drop"])
def test_what_has_not_arrived_or_is_gone_is_refused(act: str) -> None:
    handoff = Handoff(1, LINK)
    handoff.offer(0, 0, 10, 0)
    with pytest.raises(InvalidParameter):
        {"offer": lambda: handoff.offer(0, 0, 10, 0)}.get(act, lambda: getattr(handoff, act)(0))()
    assert handoff.get_state(0) is HandoffState.MOVING


@pytest.mark.parametrize("seed", range(30))
def test_no_request_is_lost_attached_twice_or_early(seed: int) -> None:
    print(f"seed {seed}")
    rng = random.Random(seed)
    senders = rng.randint(1, 4)
    handoff, now_ns = Handoff(senders, LINK), 0
    offered: dict[int, tuple[int, int, int]] = {}
    arrived: list[int] = []
    times = []
    ends = {HandoffState.ATTACHED: set[int](), HandoffState.DROPPED: set[int]()}
    for step in range(300):
        now_ns += rng.randint(0, 2_000)
        for time_ns, request in handoff.take_arrived(now_ns):
            begun_ns, _, size = offered[request]
            assert time_ns >= begun_ns + LINK.get_move_ns(size)
            arrived.append(request)
            times.append(time_ns)
        if rng.random() < 0.6:
            offered[step] = (now_ns, rng.randrange(senders), rng.randint(0, 3_000))
            handoff.offer(step, offered[step][1], offered[step][2], now_ns)
        if arrived and rng.random() < 0.5:
            request = arrived.pop(rng.randrange(len(arrived)))
            state = rng.choice(list(ends))
            (handoff.attach if state is HandoffState.ATTACHED else handoff.drop)(request)
            ends[state].add(request)
        assert handoff.count(HandoffState.MOVING) <= senders
        assert handoff.count(HandoffState.ARRIVED) == len(arrived)
        for state, requests in ends.items():
            assert handoff.count(state) == len(requests)
    while handoff.next_ns is not None:
        arrived += [request for _, request in handoff.take_arrived(handoff.next_ns)]
    assert times == sorted(times)
    assert sorted([*arrived, *(each for one in ends.values() for each in one)]) == sorted(offered)
    assert handoff.moved_bytes == sum(size for *_, size in offered.values())


def draw_arrivals(count: int, gap_ns: int) -> list[Arrival]:
    rng = random.Random(count)
    return [Arrival(at * gap_ns, rng.randint(20, 200), rng.randint(2, 30)) for at in range(count)]


def test_every_request_passes_through_both_pools() -> None:
    spec = make_replica_spec(256)
    times = simulate_pools(
        PoolSpec(spec, 2), PoolSpec(spec, 2), LinkSpec(1e9), 1_000, draw_arrivals(200, 10_000_000)
    )
    assert times.finished == 200
    assert np.all(times.ttft_s > 0)
    assert np.all(times.tpot_s > 0)
    assert np.all(times.moved_s >= 20 * 1_000 / 1e9)


def test_a_slow_link_lengthens_what_lies_between_tokens_and_not_the_first() -> None:
    spec = make_replica_spec(256)
    fast, slow = (
        simulate_pools(
            PoolSpec(spec, 1), PoolSpec(spec, 1), LinkSpec(rate), 1_000, draw_arrivals(60, 10**8)
        )
        for rate in (1e12, 1e6)
    )
    assert np.array_equal(fast.ttft_s, slow.ttft_s)
    assert np.all(slow.tpot_s > fast.tpot_s)
    assert slow.link_busy > fast.link_busy


def test_attached_prompts_are_not_computed_again() -> None:
    spec = make_replica_spec(256)
    arrivals = [Arrival(0, 200, 2)]
    one = simulate_pools(PoolSpec(spec, 1), PoolSpec(spec, 1), LinkSpec(1e15), 1, arrivals)
    cost = spec.cost
    decode_ns = cost.predict_ns(cost.get_row_totals(1, 200, 1))
    assert one.tpot_s[0] == pytest.approx(decode_ns / 1e9, abs=2e-9)
