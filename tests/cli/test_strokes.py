"""Laws of the two strokes: rates, floors and shares."""

from __future__ import annotations

import json

import pytest

from twostroke.cli.strokes import (
    Measured,
    StrokeFloor,
    add_floors,
    build_table,
    describe,
    get_strokes,
    measure,
)
from twostroke.engine.metrics import EngineMetrics
from twostroke.engine.outputs import RequestTimings
from twostroke.spec.work import Floor, PartFloor


def make_measured(new_tokens: int = 11) -> Measured:
    """100 prompt tokens in 50 ms after 10 ms of waiting, then 100 ms to the end."""
    return Measured(
        prompt_tokens=100, new_tokens=new_tokens, ttft_s=0.060, prefill_s=0.050, decode_s=0.100
    )


def test_what_ran_between_two_snapshots_is_measured() -> None:
    metrics, ms = EngineMetrics(), 1_000_000
    metrics.record_ended("stop", RequestTimings(1, 2, 3, 4, 5, 6, 0, 0), 1)
    before = metrics.get_stats()
    metrics.record_step(100, 100, 50 * ms)
    metrics.record_emitted(11, [])
    timings = RequestTimings(
        submitted_ns=1 * ms,
        first_planned_ns=11 * ms,
        first_token_ns=61 * ms,
        ended_ns=161 * ms,
        prefill_tokens=100,
        decode_tokens=11,
        cached_tokens=0,
        preemptions=0,
    )
    metrics.record_ended("stop", timings, 1)
    found = measure(before, metrics.get_stats())
    assert (found.prompt_tokens, found.new_tokens) == (100, 11)
    assert (found.ttft_s, found.prefill_s, found.decode_s) == pytest.approx((0.060, 0.050, 0.100))


def test_prefill_is_timed_from_its_first_step_and_ttft_from_submission() -> None:
    prefill, _ = get_strokes(make_measured(), None, None)
    assert prefill.latency_s == pytest.approx(0.060)
    assert prefill.tokens_per_s == pytest.approx(100 / 0.050)


def test_decode_counts_the_tokens_after_the_first() -> None:
    _, decode = get_strokes(make_measured(), None, None)
    assert decode.tokens == 10
    assert decode.latency_s == pytest.approx(0.010)
    assert decode.tokens_per_s == pytest.approx(100)


@pytest.mark.parametrize("new_tokens", [0, 1])
def test_a_request_of_one_token_has_no_decode(new_tokens: int) -> None:
    _, decode = get_strokes(make_measured(new_tokens), None, StrokeFloor(0.0, "memory"))
    assert (decode.tokens, decode.tokens_per_s, decode.share) == (0, 0.0, None)


def test_a_share_is_the_floor_over_the_measured_time() -> None:
    prefill, decode = get_strokes(
        make_measured(), StrokeFloor(0.025, "compute"), StrokeFloor(0.08, "memory")
    )
    assert prefill.share == pytest.approx(0.5)
    assert prefill.limit_tokens_per_s == pytest.approx(4000)
    assert decode.share == pytest.approx(0.8)


def test_the_floor_of_steps_is_their_sum_and_names_what_sets_most_of_it() -> None:
    first = Floor(
        5.0, "memory", (PartFloor("ffn", 3.0, "memory"), PartFloor("head", 2.0, "compute"))
    )
    second = Floor(2.0, "compute", (PartFloor("ffn", 2.0, "compute"),))
    assert add_floors([first]) == StrokeFloor(5.0, "memory")
    assert add_floors([first, second]) == StrokeFloor(7.0, "compute")


def test_strokes_become_json() -> None:
    prefill, decode = get_strokes(make_measured(), StrokeFloor(0.025, "compute"), None)
    assert json.loads(json.dumps(describe(prefill)))["share_of_limit"] == pytest.approx(0.5)
    assert json.loads(json.dumps(describe(decode)))["share_of_limit"] is None


@pytest.mark.parametrize("floor", [None, StrokeFloor(0.025, "compute")])
def test_the_table_has_both_strokes_and_names_limits_only_when_known(
    floor: StrokeFloor | None,
) -> None:
    table = build_table(*get_strokes(make_measured(), floor, floor))
    assert [column.header for column in table.columns] == ["", "prefill", "decode"]
    assert ("bound by" in list(table.columns[0].cells)) == (floor is not None)
