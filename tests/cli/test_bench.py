"""Laws of `twostroke bench`: the load it chooses, the run it makes, and what it says of both."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fakes import FakeExecutor, make_parts
from model_files import make_gguf
from places import get_model_path
from step_costs import LinearStepCost
from twostroke.cli import bench_probe
from twostroke.cli.bench import run_bench
from twostroke.cli.bench_load import LEAST_REQUESTS, SHARE, settle_load
from twostroke.cli.bench_replay import build_recorded_policies
from twostroke.cli.bench_run import draw_prompt, run_load
from twostroke.cli.bench_steps import list_paces, sum_rows
from twostroke.cli.bench_table import get_error
from twostroke.cli.compose import build_engine
from twostroke.cli.machine import Machine
from twostroke.cli.options import MachineOptions, SchedulingOptions
from twostroke.cli.question_options import BenchOptions, LoadOptions
from twostroke.cli.settings import EngineSettings, ResolvedSettings, resolve_settings
from twostroke.cli.step_cost import get_calibration_path, get_settings_work, store_fit
from twostroke.core.policy import Policies
from twostroke.core.types import StepPlan
from twostroke.engine.recording import Header
from twostroke.errors import InvalidParameter
from twostroke.plan.step_time import MeasuredCost, Pace, StepFit
from twostroke.sim.arrivals import Arrival
from twostroke.sim.recorded import list_steps, measure_recording, replay_recording
from twostroke.sim.results import summarise
from twostroke.sim.sources import Targets
from twostroke.spec.catalog import get_known_model
from twostroke.weights.gguf import ValueType

FIT = StepFit(
    token_knots=(1, 512),
    token_ns=(1e6, 1e7),
    sampled_knots=(0, 8),
    sampled_ns=(0.0, 1e5),
    row_ns=1e4,
    decode_pair_ns=1.0,
    prompt_pair_ns=1.0,
    prompt_key_ns=1.0,
    copy_byte_ns=0.1,
    engine_step_ns=1e5,
)
PROBED = get_known_model("smollm2-135m", "q4_1")
TARGETS = Targets(context_tokens=1024)
SMALL = LoadOptions(
    workload="constant", rate="50", requests="12", prompt_tokens="9", new_tokens="5"
)


def make_trace(path: Path, requests: int = 400) -> str:
    """An Azure trace with one request every two seconds, of 200 and 50 tokens."""
    lines = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    for at in range(0, 2 * requests, 2):
        minute, second = divmod(at, 60)
        lines.append(f"2023-11-16 18:{minute:02}:{second:02}.0000000,200,50")
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def predict(arrivals: Sequence[Arrival]) -> float:
    """A machine that computes a thousand tokens a second."""
    return sum(one.prompt_tokens + one.new_tokens for one in arrivals) / 1000


# ---- the load -----------------------------------------------------------------------------------


def test_what_was_asked_for_is_not_changed() -> None:
    def never(arrivals: Sequence[Arrival]) -> float:
        raise AssertionError("nothing is left to choose")

    load = settle_load(SMALL, TARGETS, 60.0, never)
    assert [one.time_ns for one in load.arrivals] == [20_000_000 * n for n in range(1, 13)]
    assert {(one.prompt_tokens, one.new_tokens) for one in load.arrivals} == {(9, 5)}


def test_a_trace_is_shortened_until_enough_requests_fit_the_time(tmp_path: Path) -> None:
    trace = make_trace(tmp_path / "trace.csv")
    load = settle_load(LoadOptions(trace=trace), TARGETS, 30.0, predict)
    lengths = {(one.prompt_tokens, one.new_tokens) for one in load.arrivals}
    # 0.35 of 1000 tokens a second for 30 s, in 200 requests: at most 52 tokens each.
    assert lengths == {(36, 9)}
    assert len(load.arrivals) >= LEAST_REQUESTS
    reasons = {choice.name: choice.reason for choice in load.choices}
    assert "shortened" in reasons["prompt lengths"]


@pytest.mark.parametrize("workload", [None, "poisson"])
def test_requests_come_at_a_share_of_the_predicted_most(
    workload: str | None, tmp_path: Path
) -> None:
    trace = make_trace(tmp_path / "trace.csv")
    load = settle_load(LoadOptions(trace=trace, workload=workload), TARGETS, 30.0, predict)
    most = 1000 / (load.arrivals[0].prompt_tokens + load.arrivals[0].new_tokens)
    span_s = (load.arrivals[-1].time_ns - load.arrivals[0].time_ns) / 1e9
    tolerance = 0.02 if workload is None else 0.2
    assert (len(load.arrivals) - 1) / span_s == pytest.approx(SHARE * most, rel=tolerance)
    assert span_s == pytest.approx(30, rel=tolerance)
    reasons = {choice.name: choice.reason for choice in load.choices}
    assert reasons["rate"].startswith("35% of the ")


def test_lengths_that_were_asked_for_stay_however_few_requests_fit(tmp_path: Path) -> None:
    trace = make_trace(tmp_path / "trace.csv")
    asked = LoadOptions(trace=trace, prompt_tokens="1x", new_tokens="1x")
    load = settle_load(asked, TARGETS, 10.0, predict)
    assert {(one.prompt_tokens, one.new_tokens) for one in load.arrivals} == {(200, 50)}
    assert len(load.arrivals) == 14  # 0.35 of four a second


def test_faults_are_refused() -> None:
    with pytest.raises(InvalidParameter, match="faults: only simulated"):
        settle_load(replace(SMALL, faults="deaths=1"), TARGETS, 60.0, predict)


# ---- the run ------------------------------------------------------------------------------------


def test_prompts_begin_alike_exactly_where_the_load_says() -> None:
    one, two, other = (
        draw_prompt(Arrival(0, 50, 1, prefix, 16), index, 1000)
        for index, prefix in enumerate([(3, 4), (3, 5), (6, 4)])
    )
    assert len(one) == len(two) == len(other) == 50
    assert one[:16] == two[:16] != other[:16]
    assert one[16:32] != two[16:32]
    assert one == draw_prompt(Arrival(0, 50, 1, (3, 4), 16), 0, 1000)
    assert len(draw_prompt(Arrival(0, 20, 1, (3, 4), 16), 0, 1000)) == 20


def test_a_run_is_measured_by_its_recording_alone() -> None:
    executor = FakeExecutor()
    parts = make_parts(executor)
    arrivals = [Arrival(3_000_000 * n, 4 + n, 3 + n % 4) for n in range(10)]
    run = run_load(parts, arrivals, Header("fake", parts.scheduler.config))
    assert run.rejected == 0
    replayed = replay_recording(run.recording, Policies())
    assert replayed.difference is None
    assert replayed.plans == run.stats.steps == len(list_steps(run.recording))
    records = measure_recording(run.recording, Policies())
    found = summarise(records, parts.scheduler.config.num_blocks, 1.0)
    assert found.fates["finished"] == 10
    assert found.new_tokens == run.stats.generation_tokens == sum(a.new_tokens for a in arrivals)
    assert found.use.steps == run.stats.steps
    assert found.itl.count == sum(a.new_tokens - 1 for a in arrivals)
    columns = records.get_columns()
    # Sent no earlier than meant, so what a client waits for holds what the engine counts.
    assert (columns["first_token_ns"] > columns["arrival_ns"]).all()
    assert found.ttft.p50_s > 0


def test_a_request_that_never_fits_is_counted_and_nobody_waits_for_it() -> None:
    parts = make_parts(FakeExecutor(), context_tokens=32)
    arrivals = [Arrival(0, 4, 3), Arrival(1_000_000, 40, 3)]
    run = run_load(parts, arrivals, Header("fake", parts.scheduler.config))
    assert run.rejected == 1
    records = measure_recording(run.recording, Policies())
    assert records.count_fates()["rejected"] == 1
    assert records.count_fates()["finished"] == 1


def test_the_pace_of_a_run_is_what_its_steps_took_against_their_predictions() -> None:
    parts = make_parts(FakeExecutor())
    arrivals = [Arrival(3_000_000 * n, 4 + n, 3 + n % 4) for n in range(10)]
    run = run_load(parts, arrivals, Header("fake", parts.scheduler.config))
    cost = LinearStepCost()
    steps = []
    for step in list_steps(run.recording):
        times = 3 if any(len(row.tokens) > 1 for row in step.plan.rows) else 2
        predicted_ns = cost.predict_ns(sum_rows(step.plan.rows, cost))
        steps.append(replace(step, duration_ns=times * predicted_ns))
    paces = {pace.kind: pace for pace in list_paces(steps, cost)}
    assert list(paces) == ["all", "with prompts", "of decodes alone"]
    assert 2 < paces["all"].ratio < 3
    for kind, times in (("with prompts", 3), ("of decodes alone", 2)):
        found = paces[kind]
        assert found.ratio == found.fastest == found.slowest == times
    assert sum(pace.steps for pace in paces.values()) == 2 * len(steps)
    assert list(list_paces([], cost)) == []


# ---- the command --------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A tiny model that is calibrated."""
    monkeypatch.setenv("TWOSTROKE_CACHE", str(tmp_path / "cache"))
    recipe = make_gguf("llama")
    kind, tokens, element = recipe.keys["tokenizer.ggml.tokens"]
    merged = ["t", "0", "1", "t0", "t1"]
    recipe.keys["tokenizer.ggml.tokens"] = (kind, merged + tokens[len(merged) :], element)
    recipe.set("context_length", ValueType.UINT32, 1024)
    path = str(recipe.write(tmp_path / "tiny.gguf"))
    wanted = EngineSettings(model=path, device="cpu", backend="reference", threads=1)
    built = build_engine(replace(wanted, has_chat=False))
    store_fit(get_calibration_path(built.parts.spec, built.settings), FIT)
    built.parts.executor.close()
    built.model.close()
    return path


def bench(
    capsys: pytest.CaptureFixture[str],
    options: BenchOptions,
    scheduling: SchedulingOptions | None = None,
) -> tuple[str, dict[str, Any]]:
    """What it prints, and its last line."""
    on = MachineOptions(device="cpu", backend="reference", threads=1)
    run_bench(options, SMALL, scheduling or SchedulingOptions(), on)
    text = capsys.readouterr().out
    return text, json.loads(text.splitlines()[-1])


@pytest.mark.parametrize(
    "scheduling",
    [SchedulingOptions(), SchedulingOptions(policy="deadline", itl_target_ms=50.0)],
)
def test_what_was_recorded_is_replayed_from_its_file(
    scheduling: SchedulingOptions,
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "run.jsonl"
    asked = BenchOptions(model=model, record=str(path), json=True)
    text, found = bench(capsys, asked, scheduling)
    assert "byte for byte the same" in text
    assert found["measured"]["fates"]["finished"] == 12
    assert found["predicted"]["new_tokens"] == found["measured"]["new_tokens"] == 60
    text, again = bench(capsys, BenchOptions(replay=str(path), json=True))
    assert again["difference"] is None
    assert again["plans"] == found["replayed"]["plans"]


def test_mistakes_are_told_before_anything_runs(model: str, tmp_path: Path) -> None:
    on, scheduling = MachineOptions(device="cpu"), SchedulingOptions()
    for options, words in (
        (BenchOptions(), "model: name the model"),
        (BenchOptions(model=model, seconds=0.0), "seconds: must be above 0"),
        (BenchOptions(model=model, record=str(tmp_path / "no" / "file")), "record: .*must be"),
        (BenchOptions(replay=str(tmp_path / "nothing")), "recording: .*cannot be read"),
    ):
        with pytest.raises(InvalidParameter, match=words):
            run_bench(options, SMALL, scheduling, on)


@pytest.mark.parametrize(
    ("policies", "words"),
    [
        ({"choice": {"order": 7}}, "policies.choice: 'order' cannot be 7"),
        ({"choice": {"colour": "red"}}, "'colour' cannot be"),
        ({"choice": []}, "must be an object"),
        ({"choice": {"pace": "target"}}, "must name model, kv and fit"),
        ({"choice": {"order": "nobody"}}, "there is no 'nobody'"),
    ],
)
def test_policies_that_cannot_be_made_again_are_refused(
    policies: dict[str, object], words: str
) -> None:
    config = make_parts(FakeExecutor()).scheduler.config
    with pytest.raises(InvalidParameter, match=words):
        build_recorded_policies(Header("fake", config, policies))


def test_an_error_is_predicted_over_measured_less_one() -> None:
    assert get_error(1.1, 1.0) == pytest.approx(0.1)
    assert get_error(0.0, 0.0) == 0.0
    assert get_error(1.0, 0.0) is None


# ---- a real model -------------------------------------------------------------------------------


@pytest.mark.real_model
def test_a_real_run_replayed_gives_the_same_plans() -> None:
    get_model_path("smollm2-135m")
    wanted = EngineSettings(model="smollm2-135m", device="cpu", kv_memory=2**24, has_chat=False)
    built = build_engine(wanted)
    try:
        # More than the pool of 700 tokens holds, so that some are preempted.
        arrivals = [Arrival(40_000_000 * n, 30 + 17 * n % 90, 60) for n in range(16)]
        run = run_load(built.parts, arrivals, Header("m", built.parts.scheduler.config))
    finally:
        built.model.close()
    replayed = replay_recording(run.recording, Policies())
    assert replayed.difference is None
    assert replayed.plans == run.stats.steps
    assert run.stats.gauges.preemptions > 0
    assert measure_recording(run.recording, Policies()).count_fates()["finished"] == 16


# ---- the pace of the machine --------------------------------------------------------------------


def settle_small(**wanted: Any) -> ResolvedSettings:
    machine = Machine(2, "for a test", 2**33, "for a test")
    return resolve_settings(EngineSettings(model="any", **wanted), PROBED, machine)


def test_a_probe_tells_how_much_longer_steps_take_than_calibrated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = settle_small()
    cost = MeasuredCost(get_settings_work(PROBED, settings), FIT)
    seen: list[StepPlan] = []

    def repeat_slowly(
        executor: object, plan: StepPlan, repeats: int, threads: int
    ) -> tuple[list[int], bool]:
        seen.append(plan)
        slow = 2.0 if all(len(row.tokens) == 1 for row in plan.rows) else 0.5
        return [round(slow * cost.predict_ns(sum_rows(plan.rows, cost)))] * repeats, True

    monkeypatch.setattr(bench_probe, "repeat_step", repeat_slowly)
    pace = bench_probe.probe(FakeExecutor(), cost, PROBED, settings)
    assert (pace.decode, pace.prefill) == pytest.approx((2.0, 0.5), rel=1e-3)
    assert {len(plan.rows) for plan in seen} >= {1, 4, 8, 16}
    seen.clear()
    small = settle_small(max_rows=1, step_tokens=64, kv_memory=2**23)
    bench_probe.probe(FakeExecutor(), cost, PROBED, small)
    assert seen
    for plan in seen:
        assert len(plan.rows) == 1
        assert len(plan.rows[0].tokens) <= 64
        assert all(block < small.num_blocks for block in plan.rows[0].blocks)


def test_no_step_that_fits_leaves_the_calibration_as_it_is() -> None:
    tiny = settle_small(step_tokens=64, kv_memory=2**20)
    cost = MeasuredCost(get_settings_work(PROBED, tiny), FIT)
    assert bench_probe.probe(FakeExecutor(), cost, PROBED, tiny) == Pace()
    assert cost.slow_down(Pace()).fit == cost.fit
    assert bench_probe.average([0.5, 2.0]) == pytest.approx(1.0)
