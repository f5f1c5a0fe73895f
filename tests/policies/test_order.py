"""Laws of the orders: who may overtake whom, what they remember, and that they forget it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from step_costs import LinearStepCost
from twostroke.core.policy import Order, Rank
from twostroke.core.types import Request
from twostroke.errors import InvalidParameter
from twostroke.policies.order import (
    AgeingPriority,
    EarliestDeadline,
    FirstCome,
    ShortestRemaining,
)

SECOND_NS = 1_000_000_000


def make(id: str, prompt_tokens: int = 4, max_new_tokens: int = 100, **fields: Any) -> Request:
    """A request with a prompt of so many tokens."""
    return Request(id, (1,) * prompt_tokens, max_new_tokens, **fields)


def serve_one_by_one(order: Order, arrivals: list[tuple[int, Request]], each_ns: int) -> list[str]:
    """Ids in the order in which a server that takes each_ns a request begins them."""
    coming, now = list(arrivals), 0
    line: list[Request] = []
    begun: list[str] = []
    ranks: dict[str, tuple[Rank, int]] = {}
    while coming or line:
        if not line:
            now = max(now, coming[0][0])
        while coming and coming[0][0] <= now:
            at, request = coming.pop(0)
            ranks[request.id] = (order.rank(request, 0, 0, at), len(ranks))
            line.append(request)
        line.sort(key=lambda request: ranks[request.id])
        head = line.pop(0)
        begun.append(head.id)
        order.end(head, 1)
        now += each_ns
    return begun


def test_first_come_ranks_all_alike() -> None:
    order = FirstCome()
    assert order.rank(make("a", priority=-5), 0, 0, 7) == order.rank(make("b"), 9, 9, 1) == ()


def test_ageing_puts_the_urgent_first_among_equals_in_age() -> None:
    order = AgeingPriority()
    assert order.rank(make("urgent", priority=-1), 0, 0, 5) < order.rank(make("plain"), 0, 0, 5)


def test_an_ageing_rank_never_changes() -> None:
    order, request = AgeingPriority(), make("a", priority=3)
    first = order.rank(request, 0, 0, 100)
    assert order.rank(request, 0, 17, 5 * SECOND_NS) == first


@given(
    p=st.integers(-5, 5),
    q=st.integers(-5, 5),
    arrival=st.integers(0, 10**12),
    later=st.integers(0, 10**12),
    age_ns=st.integers(1, 10**11),
)
def test_whoever_arrives_beyond_the_ageing_bound_goes_behind(
    p: int, q: int, arrival: int, later: int, age_ns: int
) -> None:
    order = AgeingPriority(age_ns)
    old = order.rank(make("old", priority=p), 0, 0, arrival)
    new = order.rank(make("new", priority=q), 0, 0, arrival + later)
    if later > (p - q) * age_ns:
        assert old < new


def test_a_flood_of_urgent_requests_does_not_starve_an_ageing_one() -> None:
    # One urgent request a second for ever, each a second of work; the plain one came first by two
    # levels of five seconds, so at most the ten urgent ones of that time go before it.
    flood = [(at * SECOND_NS, make(f"urgent{at}", priority=-2)) for at in range(60)]
    order = AgeingPriority(5 * SECOND_NS)
    begun = serve_one_by_one(order, [(0, make("plain")), *flood], SECOND_NS)
    assert begun.index("plain") <= 11


def test_a_level_must_be_worth_some_time() -> None:
    with pytest.raises(InvalidParameter, match="age_ns: must be at least 1, not 0"):
        AgeingPriority(0)


def test_a_remainder_is_what_the_caller_expects_less_what_came() -> None:
    order, request = ShortestRemaining(), make("a", expected_tokens=30)
    assert [order.rank(request, 0, new, 0) for new in (0, 10, 29)] == [(30,), (20,), (1,)]


def test_an_underestimate_counts_as_nearly_done() -> None:
    order = ShortestRemaining()
    assert order.rank(make("a", expected_tokens=30), 0, 80, 0) == (1,)


def test_no_remainder_is_above_the_most_that_may_come() -> None:
    order = ShortestRemaining()
    assert order.rank(make("a", max_new_tokens=8, expected_tokens=30), 0, 0, 0) == (8,)


def test_a_length_is_predicted_by_the_tenant_then_by_everybody_then_by_the_limit() -> None:
    order = ShortestRemaining()
    request = Request("a", (1,), 100, tenant="x")
    assert order.rank(request, 0, 0, 0) == (100,)
    order.end(request, 40)
    assert order.rank(Request("b", (1,), 100, tenant="y"), 0, 0, 0) == (40,)
    order.end(Request("b", (1,), 100, tenant="y"), 8)
    assert order.rank(Request("c", (1,), 100, tenant="x"), 0, 0, 0) == (40,)
    assert order.rank(Request("d", (1,), 100, tenant="y"), 0, 0, 0) == (8,)
    assert order.rank(Request("e", (1,), 100, tenant="z"), 0, 0, 0) == (36,)


def test_a_prediction_is_made_once() -> None:
    order, request = ShortestRemaining(), make("a")
    before = order.rank(request, 0, 0, 0)
    order.end(make("b"), 3)
    assert order.rank(request, 0, 0, 1) == before


@given(st.lists(st.integers(1, 4_000), min_size=30, max_size=60))
def test_the_running_mean_stays_between_the_shortest_and_the_longest(lengths: list[int]) -> None:
    order = ShortestRemaining()
    for index, length in enumerate(lengths):
        order.end(make(f"{index}"), length)
    (predicted,) = order.rank(make("next", max_new_tokens=10_000), 0, 0, 0)
    assert min(lengths) <= predicted <= max(lengths)


def test_thousands_of_tenants_are_not_all_remembered() -> None:
    order = ShortestRemaining()
    for index in range(5_000):
        order.end(Request(f"r{index}", (1,), 9, tenant=f"t{index}"), 5)
    assert len(order._tenants) == 1_024
    assert "t4999" in order._tenants


# The fake takes 1000 ns a step, 100 a token and 1 a pair: four prompt tokens take 1410 ns.
def test_the_earlier_deadline_goes_first() -> None:
    order = EarliestDeadline(LinearStepCost())
    tight = order.rank(make("tight", ttft_ns=5_000), 0, 0, 1_000)
    assert tight < order.rank(make("loose", ttft_ns=9_000), 0, 0, 0)


def test_a_deadline_that_can_no_longer_be_met_goes_behind_those_that_can() -> None:
    order, request = EarliestDeadline(LinearStepCost()), make("late", ttft_ns=5_000)
    order.rank(request, 0, 0, 0)
    other = order.rank(make("other", ttft_ns=9_000), 0, 0, 3_590)
    assert order.rank(request, 0, 0, 5_000 - 1_410) < other
    assert order.rank(request, 0, 0, 5_000 - 1_409) > other


def test_a_prompt_that_is_computed_in_part_is_late_later() -> None:
    order, request = EarliestDeadline(LinearStepCost()), make("a", ttft_ns=5_000)
    due = order.rank(request, 0, 0, 0)
    # Its last token takes 1000 + 100 + 4 ns.
    assert order.rank(request, 3, 0, 5_000 - 1_104) == due
    assert order.rank(request, 3, 0, 5_000 - 1_103) > due


def test_a_request_with_its_first_token_is_not_late() -> None:
    order, request = EarliestDeadline(LinearStepCost()), make("a", ttft_ns=5_000)
    first = order.rank(request, 0, 0, 0)
    assert order.rank(request, 0, 0, 90_000) > first
    assert order.rank(request, 0, 1, 90_000) == first


def test_a_request_without_a_deadline_is_due_after_the_horizon() -> None:
    order = EarliestDeadline(LinearStepCost(), horizon_ns=50_000)
    plain = make("plain")
    assert order.rank(plain, 0, 0, 0) > order.rank(make("soon", ttft_ns=5_000), 0, 0, 44_999)
    assert order.rank(plain, 0, 0, 90_000) < order.rank(make("later", ttft_ns=5_000), 0, 0, 45_001)


@given(
    ttft_ns=st.integers(0, 10**11), other=st.integers(1, 10**11), later=st.integers(0, 3 * 10**11)
)
def test_whoever_arrives_beyond_the_deadline_bound_goes_behind(
    ttft_ns: int, other: int, later: int
) -> None:
    order = EarliestDeadline(LinearStepCost(), horizon_ns=10**10)
    request = make("old", ttft_ns=ttft_ns)
    order.rank(request, 0, 0, 0)
    new = order.rank(make("new", ttft_ns=other), 0, 0, later)
    if later > ttft_ns + order.horizon_ns:
        assert order.rank(request, 0, 0, later) < new


def test_a_horizon_must_lie_ahead() -> None:
    with pytest.raises(InvalidParameter, match="horizon_ns: must be at least 1, not -4"):
        EarliestDeadline(LinearStepCost(), -4)


def test_orders_forget_a_request_with_its_last_continuation() -> None:
    deadline = EarliestDeadline(LinearStepCost())
    ageing, shortest = AgeingPriority(), ShortestRemaining()
    request = make("a", n=3, ttft_ns=7)
    for order, notes in (
        (deadline, deadline._deadlines),
        (ageing, ageing._arrivals),
        (shortest, shortest._predicted),
    ):
        order.rank(request, 0, 0, 0)
        order.end(request, 5)
        order.end(request, 0)
        assert len(notes) == 1
        order.end(request, 5)
        assert len(notes) == 0
