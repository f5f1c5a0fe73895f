"""`twostroke explain`: what it shows sums to the request's time, and a run can be written down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fakes import FakeExecutor, make_parts
from twostroke.cli.explain import (
    build_life_table,
    build_stroke_table,
    choose_request,
    draw_timeline,
    list_stroke,
    run_explain,
    split_strokes,
    write_trace,
)
from twostroke.cli.insight_options import ExplainOptions
from twostroke.cli.options import MachineOptions
from twostroke.engine.account_report import build_report
from twostroke.engine.llm import OfflineLLM
from twostroke.engine.params import SamplingParams
from twostroke.errors import InvalidParameter
from twostroke.spec.device import DeviceSpec

DEVICE = DeviceSpec("cpu", 1e10, (("int8", 1e12), ("fp32", 1e11)), 2, 2**33)


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    executor = FakeExecutor(step_ns=1000)
    executor.behave = executor.answer_threaded
    with OfflineLLM(make_parts(executor)) as llm:
        llm.attribution.set_limits(DEVICE)
        llm.generate(["abcdef", "gh"], SamplingParams(max_tokens=9, temperature=0.0))
        written: dict[str, Any] = json.loads(json.dumps(build_report(llm.attribution)))
    return written


def test_a_strokes_lines_sum_to_its_steps(report: dict[str, Any]) -> None:
    request = choose_request(report, None)
    strokes = split_strokes(request["request"], report["steps"])
    assert all(strokes.values())
    for steps in strokes.values():
        expected = sum(
            step["ended_ns"] - step["begin_ns"] - step["parts"]["idle"] for step in steps
        )
        assert sum(line.ns for line in list_stroke(steps)) == expected


def test_a_request_is_found_by_the_begin_of_its_id(report: dict[str, Any]) -> None:
    assert choose_request(report, "offline-0")["request"] == "offline-0"
    with pytest.raises(InvalidParameter, match="offline-77"):
        choose_request(report, "offline-77")


def test_a_timeline_has_its_marks_in_order(report: dict[str, Any]) -> None:
    request = {
        "request": "a",
        "submitted_ns": 0,
        "first_planned_ns": 250,
        "ended_ns": 1000,
    }
    own = {"request": "a", "prompt": 5}
    steps = [
        {"begin_ns": 200, "ended_ns": 500, "rows": [own]},
        {"begin_ns": 500, "ended_ns": 750, "rows": [{**own, "prompt": 0}]},
        {
            "begin_ns": 750,
            "ended_ns": 1000,
            "rows": [{**own, "prompt": 0}, {**own, "request": "b"}],
        },
    ]
    line = draw_timeline(request, steps).splitlines()[0]
    assert line == "|" + "." * 18 + "#" * 18 + "=" * 18 + "%" * 18 + "|"


def test_tables_have_a_line_for_each_part_and_one_for_all(report: dict[str, Any]) -> None:
    request = choose_request(report, None)
    assert build_life_table(request).row_count == 7
    for name, steps in split_strokes(request["request"], report["steps"]).items():
        assert build_stroke_table(name, steps).row_count == len(list_stroke(steps)) + 1


def test_a_trace_is_written_or_refused_by_name(report: dict[str, Any], tmp_path: Path) -> None:
    write_trace(tmp_path / "t.json", report)
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    with pytest.raises(InvalidParameter, match="trace_output"):
        write_trace(tmp_path / "no" / "t.json", report)


def test_it_must_be_told_whom_to_ask() -> None:
    with pytest.raises(InvalidParameter, match="url"):
        run_explain(ExplainOptions(), MachineOptions())
    with pytest.raises(InvalidParameter, match="prompt"):
        run_explain(ExplainOptions(model="smollm2-135m"), MachineOptions())


@pytest.mark.real_model
def test_a_real_requests_account_sums_and_its_steps_fill_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ExplainOptions(
        model="smollm2-135m", prompt="The sea is " * 40, max_tokens=8, json=True
    )
    run_explain(options, MachineOptions())
    report = json.loads(capsys.readouterr().out)
    request = report["requests"][0]
    life = request["ended_ns"] - request["submitted_ns"]
    account = request["account"]
    spans = ("queued_ns", "prefill_ns", "decode_ns", "others_ns", "python_ns", "waited_ns")
    assert sum(account[name] for name in spans) == life
    strokes = split_strokes(request["request"], report["steps"])
    busy = sum(line.ns for steps in strokes.values() for line in list_stroke(steps))
    assert busy == pytest.approx(life, rel=0.02)
    assert 0 < request["limit_share"] < 1.5
