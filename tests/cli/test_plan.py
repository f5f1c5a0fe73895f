"""Laws of `twostroke plan` and `roofline`: what is shown is kept, mistakes say what is valid."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from places import SHARED
from twostroke.cli.plan import ask, check, find, run_plan
from twostroke.cli.plan_check import check_candidate
from twostroke.cli.plan_table import describe_plan, print_plan
from twostroke.cli.question_options import PlanOptions, RooflineOptions
from twostroke.cli.roofline import run_roofline
from twostroke.errors import InvalidParameter, TwostrokeError

ASKED = PlanOptions(
    model="llama-2-7b",
    device=["l4:captured,a100-80gb:captured"],
    rate="4",
    prompt_tokens="300",
    new_tokens="100",
    ttft_target_ms=800.0,
    itl_target_ms=60.0,
    price=1.0,
)


def run(capsys: pytest.CaptureFixture[str], options: PlanOptions) -> dict[str, Any]:
    """The answer as JSON, which is the last line printed."""
    run_plan(replace(options, json=True))
    answer: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return answer


def test_plans_are_shown_with_everything_that_is_asked_of_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    answer = run(capsys, replace(ASKED, check=False))
    for plan in answer["plans"]:
        assert plan["ttft_p90_s"] <= 0.8
        assert plan["tpot_mean_s"] <= 0.06
        assert plan["growth"] >= 1
        assert plan["monthly_cost"] == pytest.approx(plan["devices"] * 730)
        tokens = 4 * 100 * 3600
        assert plan["million_new_tokens_cost"] == pytest.approx(plan["devices"] / tokens * 1e6)
        assert plan["breaks_first"]


def test_a_plan_that_is_simulated_keeps_its_targets_there() -> None:
    answer = check(find(ask(replace(ASKED, rate="2"))))
    assert answer.checked[0].is_kept
    assert answer.checked[0].ttft_p90_s <= 0.8
    assert answer.checked[0].tpot_p90_s <= 0.06
    assert all(each.share > 0.5 for each in answer.checked)


def test_a_fleet_too_large_to_be_simulated_until_it_is_steady_is_said_to_be(
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = replace(ASKED, rate="300", device=["a100-80gb:captured"], kv="f16")
    answer = find(ask(asked))
    question, (best, *_) = answer.question, answer.shown
    assert question.source is not None
    checked = check_candidate(best, question.demand, question.source, 1)
    assert checked.requests == 2000 < checked.steady_requests
    print_plan(replace(answer, checked=(checked,)), 0.0)
    assert "fewer than a steady state takes" in capsys.readouterr().out


def test_the_closed_form_is_near_what_is_simulated() -> None:
    answer = check(find(ask(ASKED)))
    for each in answer.checked:
        assert each.tpot_p50_s == pytest.approx(each.candidate.tpot_s, rel=0.3)


def test_a_plain_format_is_among_the_plans_where_one_keeps_the_targets() -> None:
    shown = find(ask(ASKED)).shown
    assert any(pool.option.is_plain for each in shown for pool in each.pools)


def test_the_same_question_has_the_same_answer() -> None:
    one, other = (describe_plan(check(find(ask(ASKED))), 0.0) for _ in range(2))
    one["seconds"] = other["seconds"] = 0
    assert one == other


def test_a_trace_is_planned_for_by_its_own_lengths_and_rate() -> None:
    trace = str(SHARED / "traces" / "azure2023_conv.csv")
    question = ask(PlanOptions(model="llama-2-7b", device=["h100-sxm"], trace=trace))
    assert question.demand.rate == pytest.approx(5.4, rel=0.1)
    assert question.demand.prompt_tokens > question.demand.new_tokens > 100


def test_stages_are_taken_where_tensor_parallelism_alone_does_not_do() -> None:
    question = ask(PlanOptions(model="llama-3.1-405b:bf16", device=["a100-80gb"], rate="0.1"))
    assert {(each.tp, each.pp) for each in question.options} == {(8, 2)}


def test_without_a_price_nothing_costs_anything(capsys: pytest.CaptureFixture[str]) -> None:
    answer = run(capsys, replace(ASKED, device=["l4:captured"], price=None, check=False))
    assert all(each["monthly_cost"] is None for each in answer["plans"])


def test_requests_beyond_the_context_are_planned_for_as_they_are_simulated(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_plan(replace(ASKED, prompt_tokens="60000", ttft_target_ms=None, check=False))
    lines = capsys.readouterr().out.splitlines()
    assert "of 3,996 + 100 tokens" in lines[0]
    assert lines[1] == "cut to the model's context: 2,000 of 2,000 requests"


def test_what_one_engine_cannot_keep_alone_is_refused_with_the_limit() -> None:
    (option, *_) = ask(ASKED).options
    small = replace(option, engine=replace(option.engine, pool_tokens=300))
    asked = ask(replace(ASKED, ttft_target_ms=None, itl_target_ms=None))
    with pytest.raises(InvalidParameter, match=r"300 \+ 100 tokens at a time: the KV pool is full"):
        find(replace(asked, options=(small,)))


def test_a_rate_beyond_all_replicas_is_refused_with_what_they_keep() -> None:
    question = replace(ask(ASKED), most_replicas=1)
    with pytest.raises(InvalidParameter, match=r"at most .* requests/s are kept here") as refused:
        find(replace(question, demand=replace(question.demand, rate=1000.0)))
    kept = float(str(refused.value).split("at most ")[1].split()[0])
    assert find(replace(question, demand=replace(question.demand, rate=0.99 * kept))).candidates


def test_every_formula_is_explained_with_its_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    run_plan(replace(ASKED, check=False, explain=True))
    text = capsys.readouterr().out
    for word in ("KV a request =", "(Little) =", "M/D/1", "⌈", "Young", "Daly", "token log"):
        assert word in text


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rate": "-3"}, "must be above 0"),
        ({"device": ["a100-80"]}, "did you mean a100-80gb"),
        ({"model": "llama-2-8b"}, "did you mean llama-2-7b"),
        ({"model": "llama-3.1-405b:f32", "device": ["t4"]}, "64 × t4 has .* 16 × b200"),
        ({"itl_target_ms": 0.1}, "itl_target_ms: cannot be kept .* ms is the least, with"),
        ({"ttft_target_ms": 0.1}, "ttft_target_ms: cannot be kept .* ms is the least, with"),
        ({"ttft_target_ms": -1.0}, "must be above 0"),
        ({"price": -1.0}, "must be 0 or more"),
        ({"kv": "f8"}, "choose from f32"),
        ({"kv_link_gbits": 0.0}, "must be above 0"),
        ({"device": ["this,l4"]}, "planned for alone"),
        ({"output": ["plan.pdf"]}, "must end in one of .png, .svg"),
        ({"device": None}, "give one with --device"),
        ({"rate": None}, "give requests a second"),
    ],
)
def test_a_mistake_is_answered_with_what_is_possible(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(TwostrokeError, match=message):
        run_plan(replace(ASKED, **wrong))


def test_the_least_target_that_is_named_is_kept() -> None:
    with pytest.raises(InvalidParameter, match="is the least") as refused:
        find(ask(replace(ASKED, itl_target_ms=0.1)))
    least = float(str(refused.value).split(" ms is the least")[0].split()[-1])
    assert find(ask(replace(ASKED, itl_target_ms=1.5 * least, rate="0.01"))).candidates


def test_a_roofline_names_its_ridge_and_what_shortcuts_miss(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    picture = tmp_path / "roof.svg"
    run_roofline(
        RooflineOptions(model="llama-2-7b", device="a100-40gb", json=True, output=[str(picture)])
    )
    lines = capsys.readouterr().out.splitlines()
    assert "312 TFLOP/s / 1.555 TB/s = 201 FLOP/byte" in lines[1]
    assert any("153 with 80 GB, 201 with 40 GB" in line for line in lines)
    found = json.loads(lines[-1])
    bounds = {(each["stroke"], each["bound_by"]) for each in found["points"]}
    assert ("decode", "memory") in bounds
    assert ("prefill", "compute") in bounds
    assert picture.read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt_tokens": "0"}, "whole numbers from 1"),
        ({"batch": "1,x"}, "whole numbers from 1"),
        ({"context": ""}, "whole numbers from 1"),
        ({"device": None}, "give one with --device"),
        ({"kv": "f8"}, "choose from f32"),
        ({"output": ["a.txt"]}, "must end in"),
    ],
)
def test_a_roofline_of_nothing_is_refused(wrong: dict[str, Any], message: str) -> None:
    asked = RooflineOptions(model="llama-2-7b", device="l4")
    with pytest.raises(InvalidParameter, match=message):
        run_roofline(replace(asked, **wrong))


def test_planning_imports_no_pytorch_and_no_engine_that_computes() -> None:
    code = (
        "import json, sys\n"
        "from twostroke.cli.plan import run_plan\n"
        "from twostroke.cli.question_options import PlanOptions\n"
        "run_plan(PlanOptions(model='llama-2-7b', device=['l4'], rate='1', check=False))\n"
        "print(json.dumps(sorted(sys.modules)))\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    modules = set(json.loads(ran.stdout.splitlines()[-1]))
    assert "twostroke.plan.search" in modules
    assert not {"torch", "matplotlib", "twostroke._native", "twostroke.engine.service"} & modules
    # The simulator's executor, which only says how long a step would take.
    executors = {name for name in modules if name.startswith("twostroke.exec.")}
    assert executors == {"twostroke.exec.simulated"}


@pytest.mark.real_model
def test_this_machine_is_planned_for_with_the_models_own_file(
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = PlanOptions(model="smollm2-135m", device=["this"], max_rows=4, check=False)
    answer = run(capsys, asked)
    (plan,) = answer["plans"]
    assert plan["devices"] == 1
    assert plan["pools"][0]["rows"] == pytest.approx(4, rel=0.05)
    with pytest.raises(InvalidParameter, match="requests/s are kept here"):
        run_plan(replace(asked, rate="10000"))
