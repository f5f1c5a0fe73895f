"""Laws of the pace that keeps latency targets: its budget, its search and its correction."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policy_loads import make_load, make_outcome, make_plan
from step_costs import LinearStepCost
from twostroke.errors import InvalidParameter
from twostroke.policies.target import (
    LEAST_TOKENS,
    MAX_PREDICTIONS,
    ONE,
    Correction,
    TargetPace,
    find_most_tokens,
    get_least_itl_ns,
)

STEP_TOKENS = 4_096


def make_pace(itl_ns: int = 0, cost: LinearStepCost | None = None) -> TargetPace:
    """A pace over the fake cost, whose correction is exact: measured is what was predicted."""
    pace = TargetPace(cost or LinearStepCost(pair_ns=0), STEP_TOKENS, itl_ns)
    for step in range(15):
        plan = make_plan(step, [(5, 1), (0, 32)])
        pace.note_step(plan, make_outcome(plan, pace.cost.predict_ns(pace._sum_rows(plan.rows))))
    return pace


def test_with_no_decode_a_step_takes_all_it_can() -> None:
    room = make_pace(itl_ns=5_000).open_step(make_load(prefills=[0]), 0)
    assert room.get_tokens(0, 99_999) == STEP_TOKENS


def test_without_a_target_a_step_takes_what_decodes_leave() -> None:
    room = make_pace().open_step(make_load(decodes=range(96)), 0)
    assert room.get_tokens(0, 99_999) == 4_000
    room.add(0, 3_990)
    assert room.get_tokens(0, 99) == 10


def test_a_step_takes_no_more_than_its_decodes_can_wait_for() -> None:
    # 1000 ns a step and 100 a token; the margin is 1/12, so 10834 ns allow 90 tokens.
    room = make_pace(itl_ns=10_834).open_step(make_load(decodes=range(10)), 0)
    assert room.get_tokens(0, 9_999) == 80
    assert room.get_tokens(0, 75) == 75
    assert room.get_tokens(0, 85) == 80


def test_what_passes_between_steps_is_taken_off_the_target() -> None:
    pace = make_pace(itl_ns=10_834)
    plan, now = make_plan(0, [(5, 1), (0, 32)]), 0
    load = make_load(decodes=range(10))
    for between_ns in (1_084, 1_084, 99_000, 1_084):
        pace.open_step(load, now)
        lasted_ns = pace.cost.predict_ns(pace._sum_rows(plan.rows))
        pace.note_step(plan, make_outcome(plan, lasted_ns))
        now += lasted_ns + between_ns
    # 9750 ns are left: less the margin of 1/12, 9000 allow 80 tokens, of which ten decode.
    assert pace.open_step(load, now).get_tokens(0, 9_999) == 64


def test_idle_time_is_not_taken_off_the_target() -> None:
    pace = make_pace(itl_ns=10_834)
    plan = make_plan(0, [(5, 1), (0, 32)])
    for now in range(0, 10**9, 10**8):
        pace.open_step(make_load(prefills=[0]), now)
        pace.note_step(plan, make_outcome(plan, pace.cost.predict_ns(pace._sum_rows(plan.rows))))
    assert pace.open_step(make_load(decodes=range(10)), now).get_tokens(0, 9_999) == 80


def test_what_was_placed_counts() -> None:
    room = make_pace(itl_ns=10_834).open_step(make_load(decodes=range(10)), 0)
    room.get_tokens(0, 40)
    room.add(0, 40)
    assert room.get_tokens(0, 999) == 32
    room.add(0, 32)
    assert room.get_tokens(0, 999) == 0


def test_drafts_count_toward_the_target() -> None:
    room = make_pace(itl_ns=10_834).open_step(make_load(decodes=range(10)), 0)
    room.add(3, 17)
    assert room.get_tokens(0, 999) == 48


def test_the_tightest_target_of_a_decode_holds() -> None:
    tight = make_load(decodes=range(10), itl_ns=10_834)
    assert make_pace(itl_ns=50_000).open_step(tight, 0).get_tokens(0, 999) == 80
    assert make_pace().open_step(tight, 0).get_tokens(0, 999) == 80


def test_where_a_block_does_not_fit_fewer_tokens_may() -> None:
    # What ten decodes leave, less the margin, is the time of so many tokens.
    for tokens, least in ((16, 16), (15, 12), (12, 12), (9, 8), (8, 8), (7, 4), (2, 4)):
        itl_ns = (2_000 + 100 * tokens) * 13 // 12 + 1
        room = make_pace(itl_ns=itl_ns).open_step(make_load(decodes=range(10)), 0)
        assert room.get_tokens(0, 999) == least
        assert room.get_tokens(0, 3) == 3
        room.add(0, least)
        assert room.get_tokens(0, 999) == 0  # and nobody else has any


def test_a_prompt_gets_a_few_tokens_a_step_even_when_no_step_keeps_the_target() -> None:
    room = make_pace(itl_ns=1_200).open_step(make_load(decodes=range(10)), 0)
    assert room.get_tokens(0, 999) == LEAST_TOKENS
    room.add(0, LEAST_TOKENS)
    assert room.get_tokens(0, 999) == 0


def test_drafts_do_not_take_a_prompts_few_tokens_away() -> None:
    room = make_pace(itl_ns=1_200).open_step(make_load(decodes=range(10)), 0)
    room.add(3, 9)
    assert room.get_tokens(0, 999) == LEAST_TOKENS


def test_a_step_that_is_full_stays_full() -> None:
    room = make_pace(itl_ns=1_200).open_step(make_load(decodes=range(STEP_TOKENS)), 0)
    assert room.get_tokens(0, 999) == 0


def test_nothing_is_predicted_until_a_prompt_asks() -> None:
    cost = LinearStepCost()
    pace = make_pace(itl_ns=10_000, cost=cost)
    cost.asked.clear()
    room = pace.open_step(make_load(decodes=range(10)), 0)
    assert cost.asked == []
    room.get_tokens(0, 9_999)
    assert 0 < len(cost.asked) <= MAX_PREDICTIONS


def test_a_prompt_that_fits_costs_one_prediction() -> None:
    cost = LinearStepCost()
    pace = make_pace(itl_ns=100_000, cost=cost)
    cost.asked.clear()
    assert pace.open_step(make_load(decodes=range(10)), 0).get_tokens(0, 20) == 20
    assert len(cost.asked) == 1


def test_a_target_below_one_decode_alone_is_refused_with_the_smallest_possible() -> None:
    cost = LinearStepCost()
    assert get_least_itl_ns(cost) == 1_101
    with pytest.raises(InvalidParameter, match=r"itl_ns: 1100 cannot be kept.* 1101 ns"):
        TargetPace(cost, STEP_TOKENS, 1_100)
    assert TargetPace(cost, STEP_TOKENS, 1_101).itl_ns == 1_101
    with pytest.raises(InvalidParameter, match="step_tokens: must be at least 16, not 15"):
        TargetPace(cost, 15)


def test_decodes_are_summed_as_their_blocks_ends() -> None:
    cost = LinearStepCost()
    exact = [cost.get_row_totals(1, position, 1) for position in (15, 31, 31)]
    summed = TargetPace(cost, STEP_TOKENS).sum_decodes([3, 16, 31])
    assert summed == tuple(map(sum, zip(*exact, strict=True)))


# ---- the search ---------------------------------------------------------------------------------


@given(
    fixed=st.integers(1_000, 10**6),
    floor=st.integers(0, 10**7),
    token_ns=st.integers(1, 10**4),
    pair_ps=st.integers(0, 2_000),
    most=st.integers(1, 16_384),
    limit_ns=st.integers(1, 10**8),
)
def test_the_search_finds_nearly_the_most_and_never_more(
    fixed: int, floor: int, token_ns: int, pair_ps: int, most: int, limit_ns: int
) -> None:
    asked = []

    def predict(tokens: int) -> int:
        asked.append(tokens)
        return fixed + max(floor, token_ns * tokens) + pair_ps * tokens * tokens // 1_000

    found = find_most_tokens(predict, most, limit_ns)
    assert len(asked) <= MAX_PREDICTIONS
    assert len(set(asked)) == len(asked)
    assert 0 <= found <= most
    assert found == most or found % 16 == 0
    if found:
        assert predict(found) <= limit_ns
    # Within a tenth and two blocks of the most that would fit.
    if found < most:
        assert predict(min(most, found + found // 10 + 32)) > limit_ns


# ---- the correction -----------------------------------------------------------------------------


def test_until_something_was_measured_predictions_get_an_eighth() -> None:
    pace = TargetPace(LinearStepCost(), STEP_TOKENS, 9_000)
    assert pace.get_limit_ns(9_000) == 8_000


def test_the_limit_follows_what_is_measured() -> None:
    pace = make_pace()
    before = pace.get_limit_ns(1_000_000)
    for step in range(15):
        plan = make_plan(step, [(5, 1), (0, 32)])
        pace.note_step(plan, make_outcome(plan, 2 * (1_000 + 3_300)))
    assert pace.get_limit_ns(1_000_000) == before // 2


@given(st.lists(st.integers(1, 10**12), min_size=7, max_size=7), st.permutations(range(15)))
def test_wild_measurements_do_not_move_a_correction(wild: list[int], places: list[int]) -> None:
    correction = Correction()
    measured = wild + [2_000] * 8
    for place in places:
        correction.note(measured[place], 1_000)
    assert correction.upper == 2 * ONE + 2 * ONE // 12


def test_the_margin_grows_with_the_spread() -> None:
    calm, wavering = Correction(), Correction()
    for step in range(15):
        calm.note(1_000 + step % 3, 1_000)
        wavering.note(1_000 + 100 * (step % 3), 1_000)
    assert calm.upper < 1.09 * ONE
    assert wavering.upper == pytest.approx(1.5 * ONE, rel=1e-4)


def test_swaps_teach_nothing_about_steps() -> None:
    pace = make_pace()
    plan = make_plan(3, [(5, 1), (0, 32)])
    swapping = type(plan)(3, plan.rows, swaps_in=(object(),))  # type: ignore[arg-type]
    before = pace._mixed.upper
    for _ in range(15):
        pace.note_step(swapping, make_outcome(plan, 10**9))
    assert pace._mixed.upper == before


@given(st.lists(st.integers(1_000, 9_000), min_size=1, max_size=400), st.integers(0, 40))
def test_many_iterations_in_one_go_teach_what_single_steps_do(times: list[int], seen: int) -> None:
    single, many = (TargetPace(LinearStepCost(), STEP_TOKENS) for _ in range(2))
    for pace in (single, many):
        for step in range(seen):
            plan = make_plan(step, [(step, 1), (9, 1)])
            pace.note_step(plan, make_outcome(plan, 3_000))
    for ahead, time_ns in enumerate(times):
        plan = make_plan(seen + ahead, [(70 + ahead, 1), (9 + ahead, 1)])
        single.note_step(plan, make_outcome(plan, time_ns))
    plan = make_plan(seen, [(70, 1), (9, 1)], iterations=len(times))
    many.note_step(plan, make_outcome(plan, sum(times), tuple(times)))
    assert sorted(single._other._ratios) == sorted(many._other._ratios)
    assert single._other.upper == many._other.upper
    assert single._noted == many._noted
