"""Laws of traces: the format's fields are there, spans are sorted and nest, none ends early."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

import pytest

from fakes import FakeExecutor, make_parts
from twostroke.engine.account_report import build_report
from twostroke.engine.llm import OfflineLLM
from twostroke.engine.params import SamplingParams
from twostroke.engine.trace_events import ENGINE, REQUESTS, build_trace


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    executor = FakeExecutor(step_ns=1)
    executor.behave = executor.answer_threaded
    with OfflineLLM(make_parts(executor)) as llm:
        llm.generate(["abcdef", "gh", "i"], SamplingParams(max_tokens=9, temperature=0.0))
        written: dict[str, Any] = json.loads(json.dumps(build_report(llm.attribution)))
    return written


def get_spans(trace: dict[str, Any]) -> list[dict[str, Any]]:
    return [event for event in trace["traceEvents"] if event["ph"] == "X"]


def test_every_event_has_what_the_format_asks_for(report: dict[str, Any]) -> None:
    trace = json.loads(json.dumps(build_trace(report)))
    assert trace["displayTimeUnit"] in ("ms", "ns")
    for event in trace["traceEvents"]:
        assert event["ph"] in ("X", "M")
        assert {"name", "pid", "tid", "ts"} <= set(event)
        if event["ph"] == "X":
            assert event["dur"] >= 0
            assert event["ts"] >= 0
        else:
            assert event["args"]["name"]


def test_events_are_sorted_by_time(report: dict[str, Any]) -> None:
    times = [event["ts"] for event in get_spans(build_trace(report))]
    assert times == sorted(times)


def test_spans_of_a_thread_nest_or_follow_one_another(report: dict[str, Any]) -> None:
    open_ends: dict[tuple[int, int], list[float]] = defaultdict(list)
    for event in get_spans(build_trace(report)):
        ends = open_ends[event["pid"], event["tid"]]
        while ends and ends[-1] <= event["ts"] + 1e-3:
            ends.pop()
        end = event["ts"] + event["dur"]
        assert not ends or end <= ends[-1] + 1e-3, event
        ends.append(end)


def test_every_step_and_request_is_there_once(report: dict[str, Any]) -> None:
    spans = get_spans(build_trace(report))
    steps = [event["args"]["step"] for event in spans if "step" in event.get("args", {})]
    assert steps == [step["step"] for step in report["steps"]]
    lives = [event["name"] for event in spans if event["pid"] == REQUESTS and "args" in event]
    assert sorted(lives) == sorted(one["request"] for one in report["requests"])


def test_a_requests_strokes_fill_its_life(report: dict[str, Any]) -> None:
    spans = [event for event in get_spans(build_trace(report)) if event["pid"] == REQUESTS]
    for life in (event for event in spans if "args" in event):
        parts = [one for one in spans if one["tid"] == life["tid"] and "args" not in one]
        assert sum(one["dur"] for one in parts) == pytest.approx(life["dur"], abs=0.01)


def test_tracks_are_named(report: dict[str, Any]) -> None:
    names = {
        (event["pid"], event["tid"])
        for event in build_trace(report)["traceEvents"]
        if event["ph"] == "M" and event["name"] == "thread_name"
    }
    used = {(event["pid"], event["tid"]) for event in get_spans(build_trace(report))}
    assert used <= names
    assert (ENGINE, 1) in names


def test_an_engine_that_did_nothing_has_an_empty_trace() -> None:
    trace = build_trace({"steps": [], "requests": []})
    assert get_spans(trace) == []
