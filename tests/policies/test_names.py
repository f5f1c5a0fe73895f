"""Laws of composition by name: what each name makes, and what a refusal tells."""

from __future__ import annotations

import re

import pytest

from step_costs import LinearStepCost
from twostroke.core.policy import Policies
from twostroke.errors import InvalidParameter
from twostroke.policies.accounts import VirtualTokenCounter
from twostroke.policies.draft import PromptLookup
from twostroke.policies.names import ORDERS, PACES, PolicyChoice, build_policies
from twostroke.policies.order import (
    AgeingPriority,
    EarliestDeadline,
    FirstCome,
    ShortestRemaining,
)
from twostroke.policies.pace import FixedPace, LoadHeuristicPace, StaticBatchPace
from twostroke.policies.target import TargetPace


def build(cost: bool = True, **fields: object) -> Policies:
    """Policies of the choice with these fields."""
    choice = PolicyChoice(**fields)  # type: ignore[arg-type]
    return build_policies(
        choice, step_tokens=512, block_bytes=1_300, cost=LinearStepCost() if cost else None
    )


def check_refusal(parameter: str, message: str, cost: bool = True, **fields: object) -> None:
    """The choice is refused for this parameter in these words."""
    with pytest.raises(InvalidParameter, match=re.escape(message)) as refusal:
        build(cost, **fields)
    assert refusal.value.parameter == parameter


def test_every_order_has_its_class() -> None:
    kinds = [type(build(order=name).order) for name in ORDERS]
    assert kinds == [FirstCome, AgeingPriority, ShortestRemaining, FirstCome, EarliestDeadline]
    counted = [type(build(order=name).accounts) for name in ORDERS]
    assert counted.count(type(None)) == 4
    assert counted[ORDERS.index("fair")] is VirtualTokenCounter


def test_every_pace_has_its_class() -> None:
    kinds = [type(build(pace=name).pace) for name in PACES]
    assert kinds == [type(None), LoadHeuristicPace, TargetPace, StaticBatchPace]
    assert isinstance(build(fixed_tokens=99).pace, FixedPace)


def test_policies_are_never_shared() -> None:
    choice = PolicyChoice(order="fair", pace="static", drafts=True)
    first, second = (build_policies(choice, step_tokens=512) for _ in range(2))
    assert first.order is not second.order
    assert first.accounts is not second.accounts
    assert first.pace is not second.pace
    assert first.drafter is not second.drafter


def test_numbers_reach_their_objects() -> None:
    order = build(order="priority", age_ns=77).order
    assert isinstance(order, AgeingPriority)
    assert order.age_ns == 77
    order = build(order="deadline", horizon_ns=78).order
    assert isinstance(order, EarliestDeadline)
    assert order.horizon_ns == 78
    pace = build(pace="target", itl_ns=5_000).pace
    assert isinstance(pace, TargetPace)
    assert (pace.itl_ns, pace.step_tokens) == (5_000, 512)
    pace = build(pace="static", batch_size=3, batch_timeout_ns=4).pace
    assert isinstance(pace, StaticBatchPace)
    assert (pace.size, pace.timeout_ns) == (3, 4)
    pace = build(pace="load", chunk_tokens=640).pace
    assert isinstance(pace, LoadHeuristicPace)
    assert pace.chunk_tokens == 640


def test_drafts_are_off_unless_asked_for() -> None:
    assert build().drafter is None
    assert isinstance(build(drafts=True).drafter, PromptLookup)


def test_swaps_are_weighed_where_costs_are_known() -> None:
    assert not build().prefers_swap(16, 2)
    assert build().prefers_swap(160, 2)
    assert build(cost=False).prefers_swap(16, 2)


def test_unknown_names_are_refused_with_those_that_exist() -> None:
    check_refusal(
        "order",
        "order: there is no 'lifo'; choose from first-come, priority, shortest, fair, deadline",
        order="lifo",
    )
    check_refusal(
        "pace", "pace: there is no 'warp'; choose from fixed, load, target, static", pace="warp"
    )


def test_an_impossible_target_is_refused_with_the_smallest_possible() -> None:
    check_refusal("itl_ns", "the smallest possible target", pace="target", itl_ns=1_100)
    check_refusal("itl_ns", "1101 ns", pace="target", itl_ns=1_100)


def test_a_target_that_would_be_ignored_is_refused() -> None:
    check_refusal("itl_ns", "the pace 'fixed' keeps no target; choose the pace 'target'", itl_ns=9)


def test_predictions_are_needed_where_they_are_used() -> None:
    check_refusal("order", "'deadline' needs predicted step times", False, order="deadline")
    check_refusal("pace", "'target' needs predicted step times", False, pace="target")


def test_bad_numbers_are_refused_by_name() -> None:
    check_refusal("age_ns", "at least 1", order="priority", age_ns=0)
    check_refusal("horizon_ns", "at least 1", order="deadline", horizon_ns=0)
    check_refusal("fixed_tokens", "at least 0", fixed_tokens=-1)
    check_refusal("chunk_tokens", "at least 2", pace="load", chunk_tokens=0)
    check_refusal("batch_size", "at least 1", pace="static", batch_size=0)
    check_refusal("batch_timeout_ns", "at least 0", pace="static", batch_timeout_ns=-1)
