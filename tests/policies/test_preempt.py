"""Laws of the choice between swapping and computing again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from step_costs import LinearStepCost
from twostroke.errors import InvalidParameter
from twostroke.policies.preempt import build_swap_choice


def test_the_quicker_way_is_chosen_and_a_tie_computes() -> None:
    # 32 tokens in steps of 16 take 2 * (1000 + 16 * 100) ns.
    cost = LinearStepCost(pair_ns=0)
    assert not build_swap_choice(cost, block_bytes=1_300, step_tokens=16)(32, 2)
    assert build_swap_choice(cost, block_bytes=1_299, step_tokens=16)(32, 2)


def test_smaller_steps_make_computing_dearer() -> None:
    cost = LinearStepCost(pair_ns=0)
    assert not build_swap_choice(cost, block_bytes=1_200, step_tokens=32)(32, 2)
    assert build_swap_choice(cost, block_bytes=1_200, step_tokens=16)(32, 2)


def test_long_contexts_are_swapped_where_attention_grows() -> None:
    choice = build_swap_choice(LinearStepCost(step_ns=0), block_bytes=1_600, step_tokens=64)
    assert not choice(64, 4)
    assert choice(640, 40)


@given(
    tokens=st.integers(1, 400),
    block_bytes=st.integers(1, 5_000),
    step_tokens=st.integers(1, 100),
)
def test_the_choice_agrees_with_both_times_written_out(
    tokens: int, block_bytes: int, step_tokens: int
) -> None:
    cost, blocks = LinearStepCost(), -(-tokens // 16)
    computing_ns, start = 0, 0
    while start < tokens:
        count = min(step_tokens, tokens - start)
        computing_ns += cost.predict_ns(cost.get_row_totals(count, start, 0))
        start += count
    swapping_ns = 2 * cost.predict_copy_ns(blocks * block_bytes)
    choice = build_swap_choice(cost, block_bytes, step_tokens)
    assert choice(tokens, blocks) == (swapping_ns < computing_ns)


def test_nothing_computed_is_nothing_to_swap() -> None:
    assert not build_swap_choice(LinearStepCost(), 1, 1)(0, 0)


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(InvalidParameter, match="block_bytes: must be at least 1, not 0"):
        build_swap_choice(LinearStepCost(), 0, 8)
    with pytest.raises(InvalidParameter, match="step_tokens: must be at least 1, not -1"):
        build_swap_choice(LinearStepCost(), 8, -1)
