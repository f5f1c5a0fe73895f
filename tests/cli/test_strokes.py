"""Laws of the two strokes: rates, floors and shares."""

from __future__ import annotations

import json

import pytest

from twostroke.cli.strokes import (
    Demand,
    Floor,
    Limits,
    build_table,
    describe,
    get_floor,
    get_strokes,
)
from twostroke.engine.outputs import RequestTimings

MS = 1_000_000
LIMITS = Limits(read_bytes_per_s=1e9, int8_ops_per_s=1e12, fp32_flops_per_s=1e11)


def make_timings(decode_tokens: int = 11) -> RequestTimings:
    """100 prompt tokens in 50 ms after 10 ms of waiting, then 100 ms to the end."""
    return RequestTimings(
        submitted_ns=1 * MS,
        first_planned_ns=11 * MS,
        first_token_ns=61 * MS,
        ended_ns=161 * MS,
        prefill_tokens=100,
        decode_tokens=decode_tokens,
        cached_tokens=0,
        preemptions=0,
    )


def test_prefill_is_timed_from_its_first_step_and_ttft_from_submission() -> None:
    prefill, _ = get_strokes(make_timings(), None, None)
    assert prefill.latency_s == pytest.approx(0.060)
    assert prefill.tokens_per_s == pytest.approx(100 / 0.050)


def test_decode_counts_the_tokens_after_the_first() -> None:
    _, decode = get_strokes(make_timings(), None, None)
    assert decode.tokens == 10
    assert decode.latency_s == pytest.approx(0.010)
    assert decode.tokens_per_s == pytest.approx(100)


@pytest.mark.parametrize("decode_tokens", [0, 1])
def test_a_request_of_one_token_has_no_decode(decode_tokens: int) -> None:
    _, decode = get_strokes(make_timings(decode_tokens), None, Floor(0.0, "memory"))
    assert (decode.tokens, decode.tokens_per_s, decode.share) == (0, 0.0, None)


def test_a_share_is_the_floor_over_the_measured_time() -> None:
    prefill, decode = get_strokes(make_timings(), Floor(0.025, "arithmetic"), Floor(0.08, "memory"))
    assert prefill.share == pytest.approx(0.5)
    assert prefill.limit_tokens_per_s == pytest.approx(4000)
    assert decode.share == pytest.approx(0.8)


def test_a_floor_is_the_slower_of_memory_and_arithmetic_per_step() -> None:
    reading, computing = Demand(2e9, 1e12, 0.0), Demand(1e9, 1e12, 3e11)
    assert get_floor([reading], LIMITS) == Floor(2.0, "memory")
    assert get_floor([computing], LIMITS) == Floor(4.0, "arithmetic")
    assert get_floor([reading, computing], LIMITS) == Floor(6.0, "arithmetic")


def test_strokes_become_json() -> None:
    prefill, decode = get_strokes(make_timings(), Floor(0.025, "arithmetic"), None)
    assert json.loads(json.dumps(describe(prefill)))["share_of_limit"] == pytest.approx(0.5)
    assert json.loads(json.dumps(describe(decode)))["share_of_limit"] is None


@pytest.mark.parametrize("floor", [None, Floor(0.025, "arithmetic")])
def test_the_table_has_both_strokes_and_names_limits_only_when_known(floor: Floor | None) -> None:
    table = build_table(*get_strokes(make_timings(), floor, floor))
    assert [column.header for column in table.columns] == ["", "prefill", "decode"]
    assert ("bound by" in list(table.columns[0].cells)) == (floor is not None)
