"""A server beside its plan: what was planned and seen, and whose fault a difference is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from twostroke.errors import InvalidParameter
from twostroke.plan.advice import Snapshot
from twostroke.plan.beside import Expected, compare, conclude, read_expected

PLAN: dict[str, Any] = {
    "demand": {"rate": 8.0, "prompt_tokens": 100, "new_tokens": 50},
    "plans": [
        {
            "pools": [{"role": "all", "replicas": 2, "rows": 10.0}],
            "tpot_mean_s": 0.02,
            "growth": 1.5,
            "breaks_first": "rows",
        }
    ],
}
# 4 a second for 100 s, as planned: 400 requests, 20 ms a token, 10 sequences a step.
AS_PLANNED = Snapshot(
    steps=2_000,
    wall_seconds=100.0,
    requests=400,
    prompt_tokens=40_000,
    generation_tokens=20_000,
    decode_seconds=0.02 * (20_000 - 400),
)


def conclude_of(snapshot: Snapshot) -> list[str]:
    expected = read_expected(PLAN)
    return list(conclude(compare(snapshot, expected), expected))


def test_a_plan_is_of_all_replicas_and_a_server_one_of_them() -> None:
    assert read_expected(PLAN) == Expected(4.0, 6.0, 100.0, 50.0, 0.02, 10.0, "rows")


def test_what_is_as_planned_differs_nowhere() -> None:
    found = compare(AS_PLANNED, read_expected(PLAN))
    assert len(found) == 5
    assert all(abs(one.excess) < 1e-9 for one in found)
    assert conclude_of(AS_PLANNED) == []


def test_before_a_request_has_ended_there_is_nothing_to_compare() -> None:
    assert compare(Snapshot(), read_expected(PLAN)) == []
    assert conclude_of(Snapshot()) == []


def test_other_lengths_are_a_load_to_plan_again() -> None:
    [word] = conclude_of(replace(AS_PLANNED, prompt_tokens=80_000, decode_seconds=999.0))
    assert "200 prompt tokens" in word
    assert "plan again" in word


def test_more_requests_than_a_replica_keeps_ask_for_replicas() -> None:
    [word] = conclude_of(replace(AS_PLANNED, wall_seconds=50.0))
    assert "add replicas" in word
    assert "6" in word


def test_slow_tokens_are_the_loads_fault_where_more_share_a_step() -> None:
    slow = replace(AS_PLANNED, decode_seconds=2 * AS_PLANNED.decode_seconds)
    [word] = conclude_of(slow)
    assert "100% longer" in word
    assert "no heavier load" in word
    [word] = conclude_of(replace(slow, steps=1_000))
    assert "not the server slower" in word


@pytest.mark.parametrize("plan", [{}, [], None, {"demand": 1}, {**PLAN, "plans": [{}]}])
def test_what_is_no_plan_is_refused(plan: Any) -> None:
    with pytest.raises(InvalidParameter, match="plan"):
        read_expected(plan)


def test_a_question_without_an_answer_is_refused() -> None:
    with pytest.raises(InvalidParameter, match="none kept"):
        read_expected({**PLAN, "plans": []})
