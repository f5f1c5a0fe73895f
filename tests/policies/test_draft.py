"""Laws of prompt lookup: what it proposes, that asking again changes nothing, when it gives up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from step_costs import LinearStepCost
from twostroke.core.types import SequenceId
from twostroke.policies.draft import SIZES, PromptLookup, find_best_count

A, B = SequenceId("a", 0), SequenceId("b", 0)


def look_up(tokens: list[int], most: int) -> tuple[int, ...]:
    """The proposal written out: the latest earlier run of the last tokens, and what followed."""
    for size in SIZES:
        for follows in range(len(tokens) - 1, size - 1, -1):
            if tokens[follows - size : follows] == tokens[len(tokens) - size :]:
                extended = list(tokens)
                for ahead in range(most):
                    extended.append(extended[follows + ahead])
                return tuple(extended[len(tokens) :])
    return ()


def drive(drafter: PromptLookup, stream: list[int], known: int) -> tuple[int, int]:
    """Feed a stream from so many known tokens on: steps made, and tokens drafted."""
    steps = drafted = 0
    while known < len(stream):
        drafts = drafter.propose(A, stream[:known], 8)
        accepted = 0
        while accepted < len(drafts) and drafts[accepted : accepted + 1] == tuple(
            stream[known + accepted : known + accepted + 1]
        ):
            accepted += 1
        drafter.settle(A, len(drafts), accepted)
        known += accepted + 1
        drafted += len(drafts)
        steps += 1
    return steps, drafted


def test_what_followed_before_is_proposed() -> None:
    tokens = [1, 2, 3, 4, 5, 6, 7, 9, 1, 2, 3]
    assert PromptLookup().propose(A, tokens, 3) == (4, 5, 6)


def test_the_longer_run_decides() -> None:
    tokens = [1, 2, 3, 40, 8, 9, 2, 3, 50, 8, 9, 1, 2, 3]
    assert PromptLookup().propose(A, tokens, 1) == (40,)


def test_the_latest_occurrence_decides() -> None:
    tokens = [1, 2, 3, 40, 8, 9, 1, 2, 3, 50, 8, 7, 1, 2, 3]
    assert PromptLookup().propose(A, tokens, 1) == (50,)


def test_a_period_goes_on() -> None:
    assert PromptLookup().propose(A, [7, 8, 9, 7, 8, 9, 7, 8], 3) == (9, 7, 8)
    assert PromptLookup().propose(A, [5, 5, 5, 5], 3) == (5, 5, 5)


def test_new_text_is_met_with_silence() -> None:
    assert PromptLookup().propose(A, list(range(50)), 8) == ()
    assert PromptLookup().propose(A, [1], 8) == ()
    assert PromptLookup().propose(A, [1, 2, 3, 4, 1, 2, 3], 0) == ()


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(0, 3), st.data())
def test_an_index_grown_bit_by_bit_finds_what_a_search_finds(
    tokens: list[int], most: int, data: st.DataObject
) -> None:
    drafter, known = PromptLookup(), 1
    while known <= len(tokens):
        drafts = drafter.propose(A, tokens[:known], most)
        assert drafts == look_up(tokens[:known], len(drafts))
        assert len(drafts) == (most if look_up(tokens[:known], 1) else 0)
        known += data.draw(st.integers(1, 5))


@given(st.lists(st.integers(0, 2), min_size=20, max_size=120))
def test_asking_again_gives_the_same(stream: list[int]) -> None:
    once, twice = PromptLookup(), PromptLookup()
    for known in range(5, len(stream)):
        drafts = once.propose(A, stream[:known], 8)
        assert twice.propose(A, stream[:known], 8) == drafts
        assert twice.propose(A, stream[:known], 8) == drafts
        accepted = int(drafts[:1] == (stream[known],))
        for drafter in (once, twice):
            drafter.settle(A, len(drafts), accepted)


def test_sequences_do_not_see_each_other() -> None:
    drafter = PromptLookup()
    drafter.propose(A, [1, 2, 3, 4, 5], 4)
    assert drafter.propose(B, [1, 2, 3], 4) == ()


def test_a_forgotten_sequence_leaves_nothing() -> None:
    drafter = PromptLookup()
    drafter.propose(A, [1, 2, 3, 4, 1, 2, 3], 4)
    drafter.forget(A)
    drafter.forget(B)
    drafter.settle(A, 4, 2)
    assert drafter._draftees == {}


def test_a_text_that_repeats_takes_few_steps() -> None:
    stream = [token for _ in range(20) for token in range(10)]
    steps, _ = drive(PromptLookup(), stream, 10)
    assert steps < 40


def test_drafting_that_does_not_pay_is_given_up_and_seldom_retried() -> None:
    # Runs recur all the time and never go on as before.
    stream = [token for index in range(1_000) for token in (1, 2, 10 + index)]
    steps, drafted = drive(PromptLookup(), stream, 12)
    assert steps == len(stream) - 12
    assert drafted < 40


def test_drafting_is_taken_up_again_when_the_text_repeats_at_last() -> None:
    wild = [token for index in range(60) for token in (1, 2, 10 + index)]
    steps, _ = drive(PromptLookup(), wild + [3, 4, 5, 6] * 100, 12)
    assert steps < len(wild) + 200


def test_a_dear_draft_must_be_surer() -> None:
    # A row of one token takes 1100 ns and each draft adds 100 or 1000 more.
    cheap = PromptLookup(LinearStepCost(pair_ns=0))
    dear = PromptLookup(LinearStepCost(token_ns=1_000, pair_ns=0))
    tokens = [5] * 20
    assert len(cheap.propose(A, tokens, 16)) > len(dear.propose(A, tokens, 16))


def test_many_rows_make_a_draft_dearer() -> None:
    drafter = PromptLookup(LinearStepCost(pair_ns=0))
    alone = drafter.propose(A, [5] * 20, 16)
    for index in range(64):
        drafter.propose(SequenceId("other", index), [5] * 20, 16)
    assert len(drafter.propose(A, [5] * 20, 16)) < len(alone)


def test_the_best_count_maximises_expected_tokens_per_time() -> None:
    assert find_best_count(0.0, [10, 11, 12]) == 0
    assert find_best_count(1.0, [10, 11, 12]) == 2
    assert find_best_count(0.5, [10, 15, 20]) == 0
    assert find_best_count(0.6, [10, 15, 20]) == 1
    assert find_best_count(0.6, [10, 18, 18, 18]) == 3


@given(st.floats(0, 1), st.lists(st.integers(1, 1_000), min_size=1, max_size=17))
def test_no_other_count_is_better(rate: float, times: list[int]) -> None:
    def get_speed(drafts: int) -> float:
        return sum(rate**ahead for ahead in range(drafts + 1)) / times[drafts]

    best = find_best_count(rate, times)
    assert get_speed(best) == pytest.approx(max(map(get_speed, range(len(times)))))
