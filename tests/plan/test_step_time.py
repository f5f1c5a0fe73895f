"""Laws of predicted step times: runs equal steps, more work never takes less, fits find costs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twostroke.errors import InvalidParameter
from twostroke.plan.fit import fit_steps
from twostroke.plan.roofline_cost import CAPTURED, RooflineCost
from twostroke.plan.step_time import MeasuredCost, Pace, StepFit
from twostroke.spec.catalog import get_known_model
from twostroke.spec.cost import StepCost
from twostroke.spec.device import get_known_device
from twostroke.spec.work import StepTotals, add_totals, get_floor_seconds, get_model_work

A100 = get_known_device("a100-80gb")
SMOLLM2 = get_model_work(get_known_model("smollm2-135m"))
GEMMA = get_model_work(get_known_model("gemma3-270m"))
LLAMA = get_known_model("llama-2-70b")
FIT = StepFit(
    token_knots=(1, 8, 64, 512),
    token_ns=(2e6, 2.5e6, 6e6, 4e7),
    sampled_knots=(0, 1, 8),
    sampled_ns=(0.0, 1e6, 1.5e6),
    row_ns=4_321.0,
    decode_pair_ns=7.25,
    prompt_pair_ns=3.125,
    prompt_key_ns=0.7,
    copy_byte_ns=0.2,
)
COSTS: list[StepCost] = [
    RooflineCost(LLAMA, A100, 4),
    RooflineCost(get_known_model("mixtral-8x7b"), get_known_device("h100-sxm"), 2, CAPTURED),
    RooflineCost(get_known_model("smollm2-135m", "q4_0"), get_known_device("t4")),
    RooflineCost(get_known_model("mixtral-8x7b"), A100, 2, CAPTURED, None, 4),
    MeasuredCost(GEMMA, FIT),
]
ROWS = st.lists(
    st.tuples(st.integers(1, 600), st.integers(0, 5000), st.integers(0, 1)), min_size=1, max_size=5
)


def add_rows(cost: StepCost, rows: list[tuple[int, int, int]]) -> StepTotals:
    totals = StepTotals()
    for row in rows:
        totals = add_totals(totals, cost.get_row_totals(*row))
    return totals


@settings(deadline=None)
@given(st.sampled_from(COSTS), ROWS, ROWS, st.integers(0, 60))
def test_a_run_takes_exactly_what_its_steps_take(cost, first, growth, count) -> None:
    start, more = add_rows(cost, first), add_rows(cost, growth)
    one_by_one = []
    totals = start
    for _ in range(count):
        one_by_one.append(cost.predict_ns(totals))
        totals = add_totals(totals, more)
    assert cost.predict_run_ns(start, more, count) == one_by_one


@settings(deadline=None)
@given(st.sampled_from(COSTS), st.integers(1, 200), st.integers(0, 4000), st.integers(1, 60))
def test_a_run_of_decodes_takes_exactly_what_its_steps_take(cost, rows, context, count) -> None:
    first, second = (
        StepTotals(*(rows * each for each in cost.get_row_totals(1, context + at, 1)))
        for at in (0, 1)
    )
    growth = StepTotals(*(b - a for a, b in zip(first, second, strict=True)))
    totals = [
        StepTotals(*(a + step * b for a, b in zip(first, growth, strict=True)))
        for step in range(count)
    ]
    assert cost.predict_run_ns(first, growth, count) == [cost.predict_ns(each) for each in totals]


@settings(deadline=None)
@given(st.sampled_from(COSTS), ROWS, ROWS)
def test_more_rows_never_take_less_time(cost, some, others) -> None:
    fewer = add_rows(cost, some)
    more = add_totals(fewer, add_rows(cost, others))
    assert cost.predict_ns(fewer) <= cost.predict_ns(more)


@pytest.mark.parametrize("cost", COSTS)
def test_copies_take_time_by_their_bytes(cost: StepCost) -> None:
    assert cost.predict_copy_ns(0) == 0
    assert 0 < cost.predict_copy_ns(10**6) < cost.predict_copy_ns(10**9)


# ---- the roofline --------------------------------------------------------------------------------

DECODE = (1, 1000, 1)
PROMPT = (2048, 0, 1)
LOSSLESS = replace(
    CAPTURED,
    memory_efficiency=1.0,
    matrix_efficiency=1.0,
    attention_efficiency=1.0,
    link_efficiency=1.0,
    kernel_ns=0.0,
    link_ns=0.0,
    step_ns=0.0,
    sampled_ns=0.0,
)


@pytest.mark.parametrize("row", [DECODE, PROMPT])
def test_without_losses_one_device_takes_the_floor_of_its_work(row: tuple[int, int, int]) -> None:
    # What a device without matrix units computes as the work is counted, but for the norms' bytes
    # and for elementwise work, which the cost adds where the floor takes the longer.
    device = replace(A100, rates=(("fp32", 19.5e12),))
    cost = RooflineCost(LLAMA, device, 1, LOSSLESS)
    work = get_model_work(LLAMA)
    totals = work.get_row_totals(*row)
    floor = get_floor_seconds(work.get_totals_work(totals), device)
    assert cost.predict_ns(totals) == pytest.approx(floor.seconds * 1e9, rel=1e-3)


def test_a_decode_is_bound_by_weights_and_a_prefill_by_products() -> None:
    cost = RooflineCost(LLAMA, A100, 1, LOSSLESS)
    decode = cost.predict_ns(cost.get_row_totals(*DECODE))
    assert decode == pytest.approx(LLAMA.weight_bytes / A100.memory_bandwidth * 1e9, rel=0.02)
    prefill = cost.predict_ns(cost.get_row_totals(*PROMPT))
    assert prefill == pytest.approx(2 * LLAMA.num_weights * 2048 / 312e12 * 1e9, rel=0.05)


def test_devices_share_the_work_and_pay_for_sums() -> None:
    totals = get_model_work(LLAMA).get_row_totals(*PROMPT)
    alone, shared = (RooflineCost(LLAMA, A100, n, LOSSLESS).predict_ns(totals) for n in (1, 8))
    # Two sums a layer: 2 * 7/8 of 2048 rows of 8192 16-bit values pass each link.
    sums_ns = 2 * 80 * 2 * 7 / 8 * 2048 * 8192 * 2 / A100.link_bandwidth * 1e9
    assert shared == pytest.approx(alone / 8 + sums_ns, rel=0.01)


def test_more_devices_than_kv_heads_hold_them_several_times() -> None:
    far = get_model_work(LLAMA).get_row_totals(1, 10**6, 1)
    near = get_model_work(LLAMA).get_row_totals(1, 0, 1)

    def read_ns(devices: int) -> int:
        cost = RooflineCost(LLAMA, A100, devices, LOSSLESS)
        return cost.predict_ns(far) - cost.predict_ns(near)

    assert read_ns(8) == pytest.approx(read_ns(4) / 2, rel=1e-6)
    assert read_ns(16) == pytest.approx(read_ns(8), rel=1e-6)


def test_a_mixture_reads_more_experts_the_more_tokens_decode() -> None:
    spec = get_known_model("mixtral-8x7b")
    cost = RooflineCost(spec, A100, 2, LOSSLESS)
    one = cost.get_row_totals(*DECODE)
    times = [cost.predict_ns(StepTotals(*(n * each for each in one))) for n in (1, 4, 64)]
    assert times[1] > 2 * times[0]
    assert times[2] < 2 * times[1]


def test_devices_that_cannot_share_heads_are_refused_with_those_that_can() -> None:
    with pytest.raises(InvalidParameter, match=r"tensor_parallel: .*64 heads: 1, 2, 4, 8.*not 3"):
        RooflineCost(LLAMA, A100, 3)


def test_stages_share_a_steps_rows_but_read_all_weights() -> None:
    spec = get_known_model("llama-2-70b")
    device = get_known_device("a100-80gb")
    one, two = (RooflineCost(spec, device, 4, CAPTURED, None, stages) for stages in (1, 2))
    row = StepTotals(*(64 * each for each in one.get_row_totals(1, 2000, 1)))
    half = StepTotals(*(32 * each for each in one.get_row_totals(1, 2000, 1)))
    assert two.predict_ns(row) == pytest.approx(one.predict_ns(half), rel=0.01)
    prompt = one.get_row_totals(2048, 0, 1)
    assert two.predict_ns(prompt) == pytest.approx(one.predict_ns(prompt) / 2, rel=0.1)
    with pytest.raises(InvalidParameter, match="from 1 to the 80 layers"):
        RooflineCost(spec, device, 4, CAPTURED, None, 81)


def test_devices_without_a_link_are_refused() -> None:
    with pytest.raises(InvalidParameter, match=r"a100-80gb has no link"):
        RooflineCost(LLAMA, replace(A100, link_bandwidth=0.0), 2)


# ---- the fit -------------------------------------------------------------------------------------


def make_samples(cost: MeasuredCost) -> list[tuple[StepTotals, int]]:
    steps = [[(1, context, 1)] * rows for rows in (1, 8, 64) for context in (0, 300, 2000)]
    steps += [[(length, start, 0)] for length in (8, 64, 512) for start in (0, 512, 1500)]
    steps += [[(1, 100, 0)], [(64, 0, 1)], [(1, 400, 1)] * 4 + [(60, 128, 0)]]
    totals = [add_rows(cost, rows) for rows in steps]
    return [(each, cost.predict_ns(each)) for each in totals]


def test_a_fit_finds_the_costs_that_made_the_samples() -> None:
    made = MeasuredCost(GEMMA, FIT)
    found = MeasuredCost(GEMMA, fit_steps(make_samples(made), 0.2))
    for rows in ([(1, 700, 1)] * 3, [(200, 900, 1)], [(1, 50, 1)] * 30 + [(256, 300, 0)]):
        totals = add_rows(made, rows)
        assert found.predict_ns(totals) == pytest.approx(made.predict_ns(totals), rel=0.01)


@settings(deadline=None, max_examples=20)
@given(st.randoms(use_true_random=False))
def test_a_fit_has_no_negative_cost_and_beyond_few_tokens_no_falling_curve(draw) -> None:
    samples = [
        (totals, round(duration * draw.uniform(0.5, 2)))
        for totals, duration in make_samples(MeasuredCost(GEMMA, FIT))
    ]
    fit = fit_steps(samples, 0.1)
    for knots, curve in ((fit.token_knots, fit.token_ns), (fit.sampled_knots, fit.sampled_ns)):
        many = [each for knot, each in zip(knots, curve, strict=True) if knot >= 8]
        assert many == sorted(many)
        assert min(curve) >= 0
    assert min(fit.row_ns, fit.decode_pair_ns, fit.prompt_pair_ns, fit.prompt_key_ns) >= 0


def test_a_fit_follows_steps_of_few_tokens_that_take_longer_than_more_tokens_do() -> None:
    made = replace(
        FIT, token_knots=(1, 4, 8, 64, 512), token_ns=(9e6, 5e6, 6e6, *FIT.token_ns[-2:])
    )
    cost = MeasuredCost(GEMMA, made)
    samples = make_samples(cost)
    for rows in ([(4, 0, 0)], [(4, 700, 0)], [(1, 9, 1)] * 4):
        totals = add_rows(cost, rows)
        samples.append((totals, cost.predict_ns(totals)))
    found = MeasuredCost(GEMMA, fit_steps(samples, 0.2))
    for rows in ([(1, 500, 1)], [(4, 100, 0)], [(1, 40, 1)] * 4):
        totals = add_rows(cost, rows)
        assert found.predict_ns(totals) == pytest.approx(cost.predict_ns(totals), rel=0.02)


def test_what_the_engine_takes_is_added_to_every_step_and_row() -> None:
    fit = replace(FIT, engine_step_ns=100_000.0, engine_row_ns=7_000.0)
    cost = MeasuredCost(GEMMA, fit)
    for rows in ([(1, 700, 1)], [(200, 900, 0)], [(1, 50, 1)] * 30 + [(256, 300, 1)]):
        totals = add_rows(cost, rows)
        around = cost.add_engine().predict_ns(totals) - cost.predict_ns(totals)
        assert around == pytest.approx(100_000 + 7_000 * len(rows), abs=1)


def test_a_slower_machine_takes_longer_for_every_step_and_no_longer_around_it() -> None:
    cost = MeasuredCost(GEMMA, replace(FIT, engine_step_ns=100_000.0))
    for rows in ([(1, 700, 1)], [(200, 900, 0)], [(1, 50, 1)] * 30 + [(256, 300, 1)]):
        totals = add_rows(cost, rows)
        slower = cost.slow_down(Pace(1.5, 1.5))
        assert slower.predict_ns(totals) == pytest.approx(1.5 * cost.predict_ns(totals), rel=1e-6)
        around = slower.add_engine().predict_ns(totals) - slower.predict_ns(totals)
        assert around == pytest.approx(100_000, abs=1)


def test_a_pace_of_decodes_is_not_that_of_prompts() -> None:
    cost = MeasuredCost(GEMMA, FIT)
    decode, prefill = add_rows(cost, [(1, 700, 1)] * 4), add_rows(cost, [(200, 900, 0)])
    slow = cost.slow_down(Pace(2.0, 1.0))
    assert slow.predict_ns(decode) == pytest.approx(2 * cost.predict_ns(decode), rel=1e-6)
    assert slow.predict_ns(prefill) == pytest.approx(cost.predict_ns(prefill), rel=0.05)
    rising = [Pace(1.0, 3.0).get(tokens) for tokens in (1, 16, 40, 64, 500)]
    assert rising == [1.0, 1.0, 2.0, 3.0, 3.0]


def test_one_slow_repeat_changes_nothing() -> None:
    samples = make_samples(MeasuredCost(GEMMA, FIT))
    slow = [(totals, 10 * duration) for totals, duration in samples[::3]]
    assert fit_steps(3 * samples + slow, 0.2) == fit_steps(samples, 0.2)


def test_samples_come_in_any_order() -> None:
    samples = make_samples(MeasuredCost(GEMMA, FIT))
    assert fit_steps(samples[::-1], 0.2) == fit_steps(samples, 0.2)


@pytest.mark.parametrize(
    ("keep", "missing"),
    [
        (lambda step: step.rows == 1, "decoding rows at two numbers of rows"),
        (lambda step: step.tokens == step.rows, "one prompt row of two lengths"),
        (lambda step: step.rows > 1, "one prompt row at two contexts"),
        (lambda step: step.sampled > 0, "one prompt row of two lengths"),
    ],
)
def test_too_few_samples_are_refused_by_name(keep, missing) -> None:
    samples = make_samples(MeasuredCost(GEMMA, FIT))
    with pytest.raises(InvalidParameter, match=rf"samples: are too few: .*{missing}"):
        fit_steps([each for each in samples if keep(each[0])], 0.2)


def test_a_fit_survives_being_stored() -> None:
    fit = fit_steps(make_samples(MeasuredCost(GEMMA, FIT)), 1 / 3)
    assert StepFit.from_json(fit.to_json()) == fit


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{", "", "is no JSON"),
        ("row_ns", "rows_ns", "must be an object with token_knots"),
        ("4321.0", '"4321"', "row_ns must be a number"),
        ("[1, 8, 64, 512]", "[1, 8, 8, 512]", "token_knots must be whole and rising"),
        ("[0, 1, 8]", "[0, 8]", "sampled_ns must match sampled_knots"),
        ("[0, 1, 8]", "8", "sampled_knots must be numbers"),
    ],
)
def test_a_damaged_fit_is_refused_by_name(old: str, new: str, message: str) -> None:
    text = FIT.to_json().replace(old, new, 1)
    with pytest.raises(InvalidParameter, match=message):
        StepFit.from_json(text)
