"""Laws of where requests come from: a replay keeps what the trace holds, changes are counted."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from places import SHARED
from twostroke.errors import InvalidParameter
from twostroke.sim.arrivals import Arrival
from twostroke.sim.sources import Fitted, Source, SourceChoice, Targets, build_source

CONV = str(SHARED / "traces" / "azure2023_conv.csv")
MOONCAKE = str(SHARED / "traces" / "mooncake_conversation_trace.jsonl")
WIDE = Targets(context_tokens=10_000_000)


def arrive(source: Source, targets: Targets = WIDE) -> tuple[list[Arrival], Fitted]:
    """All arrivals of a source, and what was changed about them."""
    fitted = Fitted()
    return list(source.arrive(targets, fitted)), fitted


def write_trace(folder: Path, *requests: tuple[int, int, int]) -> str:
    """A JSON lines trace of (ms, prompt tokens, new tokens)."""
    path = folder / "small.jsonl"
    keys = ("timestamp", "input_length", "output_length")
    path.write_text("\n".join(json.dumps(dict(zip(keys, one, strict=True))) for one in requests))
    return str(path)


@pytest.mark.parametrize(
    ("name", "count", "prompt_tokens", "new_tokens"),
    [
        ("azure2023_conv.csv", 19_366, 22_361_870, 4_088_665),
        ("azure2023_code.csv", 8_819, 18_059_974, 245_896),
        ("mooncake_conversation_trace.jsonl", 12_031, 144_793_823, 4_122_048),
    ],
)
def test_a_replay_keeps_counts_and_sums(
    name: str, count: int, prompt_tokens: int, new_tokens: int
) -> None:
    source = build_source(SourceChoice(trace=str(SHARED / "traces" / name)))
    arrivals, fitted = arrive(source)
    assert source.expected == len(arrivals) == fitted.requests == count
    assert sum(one.prompt_tokens for one in arrivals) == prompt_tokens
    assert sum(one.new_tokens for one in arrivals) == new_tokens
    assert fitted.clipped == 0


def test_prefixes_of_a_trace_reach_the_arrivals() -> None:
    arrivals, _ = arrive(
        build_source(SourceChoice(trace=MOONCAKE, requests="3", prompt_tokens="0.5x"))
    )
    assert [one.prefix[0] for one in arrivals] == [0, 0, 0]
    assert {one.prefix_tokens for one in arrivals} == {256}
    assert arrivals[0].prompt_tokens == 3379


def test_what_exceeds_the_context_is_cut_and_counted(tmp_path: Path) -> None:
    path = write_trace(tmp_path, (0, 90, 10), (1, 95, 10), (2, 300, 400), (3, 10, 95))
    arrivals, fitted = arrive(build_source(SourceChoice(trace=path)), Targets(context_tokens=100))
    lengths = [(one.prompt_tokens, one.new_tokens) for one in arrivals]
    assert lengths == [(90, 10), (90, 10), (50, 50), (10, 90)]
    assert (fitted.clipped, fitted.clipped_tokens) == (3, 5 + 600 + 5)


def test_targets_reach_every_arrival(tmp_path: Path) -> None:
    targets = Targets(context_tokens=100, ttft_ns=7, itl_ns=9)
    arrivals, _ = arrive(
        build_source(SourceChoice(trace=write_trace(tmp_path, (0, 1, 1)))), targets
    )
    assert (arrivals[0].ttft_ns, arrivals[0].itl_ns) == (7, 9)


def test_a_trace_is_played_faster() -> None:
    plain, _ = arrive(build_source(SourceChoice(trace=CONV, requests="200")))
    double, _ = arrive(build_source(SourceChoice(trace=CONV, requests="200", rate="2x")))
    assert [one.time_ns for one in double] == [round(one.time_ns / 2) for one in plain]
    by_rate = build_source(SourceChoice(trace=CONV, rate="10"))
    arrivals, _ = arrive(by_rate)
    assert (len(arrivals) - 1) / arrivals[-1].time_ns * 1e9 == pytest.approx(10)
    assert by_rate.seconds == pytest.approx(1936.5)


def test_seconds_cut_a_trace_and_a_workload_alike() -> None:
    for choice in (
        SourceChoice(trace=CONV, requests="600s"),
        SourceChoice(workload="poisson", rate="5", requests="600s"),
    ):
        arrivals, _ = arrive(build_source(choice))
        assert 595e9 < arrivals[-1].time_ns < 600e9
        assert 2500 < len(arrivals) < 4000


def test_a_trace_repeats_at_its_own_rate_with_prefixes_of_its_own(tmp_path: Path) -> None:
    path = write_trace(tmp_path, (0, 5, 1), (10, 6, 1), (20, 7, 1))
    arrivals, _ = arrive(build_source(SourceChoice(trace=path, requests="3x")))
    assert [one.time_ns // 10**6 for one in arrivals] == [*range(0, 90, 10)]
    assert [one.prompt_tokens for one in arrivals] == [5, 6, 7] * 3
    twice, _ = arrive(build_source(SourceChoice(trace=MOONCAKE, requests="2x")))
    half = len(twice) // 2
    first = {each for one in twice[:half] for each in one.prefix}
    assert first.isdisjoint(each for one in twice[half:] for each in one.prefix)


def test_a_workload_draws_lengths_from_a_trace() -> None:
    source = build_source(SourceChoice(trace=CONV, workload="poisson", requests="5000"))
    arrivals, _ = arrive(source)
    mean = sum(one.prompt_tokens for one in arrivals) / 5000
    assert mean == pytest.approx(22_361_870 / 19_366, rel=0.06)
    assert source.seconds == pytest.approx(5000 / 5.53, rel=0.01)


def test_every_choice_has_its_reason() -> None:
    for choice in (
        SourceChoice(trace=CONV, new_tokens="0.1x"),
        SourceChoice(workload="gamma:tenants=3,prefix=0.25", rate="3"),
        SourceChoice(trace=CONV, workload="constant"),
    ):
        notes = build_source(choice).notes
        assert all(all(part for part in note) for note in notes)
        assert len(notes) == 5


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "workload: give a --trace FILE, or --workload"),
        ({"workload": "poisson"}, "rate: give requests a second"),
        ({"workload": "poisson", "rate": "0"}, "rate: must be above 0"),
        ({"workload": "poisson", "rate": "-2"}, "rate: must be above 0"),
        ({"workload": "poisson", "rate": "nan"}, "rate: must be above 0"),
        ({"workload": "poisson", "rate": "fast"}, "rate: must be above 0"),
        ({"workload": "poisson", "rate": "2s"}, "rate: must be above 0"),
        ({"workload": "poisson", "rate": "2x"}, "rate: 2x speeds up a trace"),
        ({"workload": "poisson", "rate": "1e9"}, "rate: must be above 0 and at most"),
        ({"workload": "poisson", "rate": "1e-9"}, "rate: 1e-09 a second would take"),
        ({"workload": "poisson", "rate": "2", "requests": "0"}, "requests: must be above 0"),
        ({"workload": "poisson", "rate": "2", "requests": "1.5"}, "requests: must be a whole"),
        ({"workload": "poisson", "rate": "2", "requests": "1e12"}, "requests: must be at most"),
        ({"workload": "poisson", "rate": "2", "requests": "3x"}, "requests: a factor such as 3x"),
        ({"workload": "poisson", "rate": "1e6", "requests": "9999s"}, "requests: 1e\\+06 a second"),
        ({"workload": "poisson", "rate": "2", "prompt_tokens": "2x"}, "prompt_tokens: a factor"),
        ({"trace": CONV, "prompt_tokens": "512"}, "prompt_tokens: a trace has lengths"),
        ({"trace": CONV, "rate": "0x"}, "rate: must be above 0"),
        ({"trace": CONV, "requests": "0.5x"}, "requests: must be a whole"),
        ({"trace": "none.csv"}, "trace: none.csv cannot be read"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, str], expected: str) -> None:
    with pytest.raises(InvalidParameter, match=f"^{expected}"):
        build_source(dataclasses.replace(SourceChoice(), **changes))


def test_a_trace_whose_requests_come_at_once_has_no_rate(tmp_path: Path) -> None:
    path = write_trace(tmp_path, (0, 5, 1), (0, 6, 1))
    with pytest.raises(InvalidParameter, match="rate: all requests"):
        build_source(SourceChoice(trace=path, rate="2x"))
    assert len(arrive(build_source(SourceChoice(trace=path, requests="2x")))[0]) == 4
