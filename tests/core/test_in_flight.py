"""Steps in flight: two at once, answers in order, losses undone, and blocks of the ended held."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest

from scheduler_model import Driver, build_driver, build_request
from twostroke.core.scheduler import Scheduler
from twostroke.core.types import (
    Idle,
    Request,
    RowResult,
    SamplingSpec,
    SequenceId,
    StepOutcome,
    StepPlan,
    TokenLogprob,
    TokensEmitted,
)
from twostroke.errors import ExecutorLost


def plan(driver: Driver) -> StepPlan:
    """A plan that must not be idle."""
    answer = driver.plan()
    assert isinstance(answer, StepPlan)
    return answer


def test_the_next_chunk_is_planned_while_the_last_is_in_flight() -> None:
    driver = build_driver(step_tokens=4)
    driver.submit(build_request("a", 10))
    assert [plan(driver).rows[0].start for _ in range(2)] == [0, 4]
    driver.drain()


def test_a_sequence_that_samples_in_flight_waits_for_its_token() -> None:
    driver = build_driver()
    driver.submit(build_request("a", 3))
    plan(driver)
    assert driver.plan() == Idle(waiting=0, in_flight=1)
    driver.commit()
    assert plan(driver).rows[0].start == 3
    driver.drain()


def test_a_third_step_is_idle() -> None:
    driver = build_driver(step_tokens=2)
    driver.submit(build_request("a", 10))
    plan(driver)
    plan(driver)
    assert driver.plan() == Idle(waiting=0, in_flight=2)
    driver.drain()


def test_an_answer_before_an_earlier_one_is_the_executors_fault() -> None:
    driver = build_driver(step_tokens=2)
    driver.submit(build_request("a", 10))
    plan(driver)
    second = plan(driver)
    results = tuple(RowResult(row.sequence) for row in second.rows)
    with pytest.raises(ExecutorLost, match="step 1 is not the first in flight"):
        driver.scheduler.commit(StepOutcome(second.step, results, 0), 0)
    driver.drain()


def test_an_answer_to_a_lost_step_is_refused() -> None:
    driver = build_driver()
    driver.submit(build_request("a", 3))
    lost = plan(driver)
    driver.lose(0, [0])
    results = (RowResult(lost.rows[0].sequence, (1,)),)
    with pytest.raises(ExecutorLost, match="step 0 is not the first in flight"):
        driver.scheduler.commit(StepOutcome(lost.step, results, 0), 0)
    driver.drain()


def _change_first(**changes: object) -> Callable[[StepOutcome], StepOutcome]:
    def change(outcome: StepOutcome) -> StepOutcome:
        first = replace(outcome.results[0], **changes)
        return replace(outcome, results=(first, *outcome.results[1:]))

    return change


LOGPROB = TokenLogprob(1, -1.0)
MALFORMED: dict[str, tuple[Callable[[StepOutcome], StepOutcome], str]] = {
    "unknown step": (lambda outcome: replace(outcome, step=9), "step 9 is not the first in flight"),
    "a row missing": (
        lambda outcome: replace(outcome, results=outcome.results[:1]),
        "1 results for 2 rows",
    ),
    "rows swapped": (
        lambda outcome: replace(outcome, results=outcome.results[::-1]),
        "the result is for",
    ),
    "no token": (_change_first(tokens=()), "0 tokens"),
    "two tokens": (_change_first(tokens=(1, 2)), "2 tokens"),
    "a token beyond the vocabulary": (_change_first(tokens=(1000,)), "(1000,) are"),
    "a negative token": (_change_first(tokens=(-1,)), "(-1,) are"),
    "a token of another type": (_change_first(tokens=(1.0,)), "(1.0,) are"),
    "drafts that were not made": (_change_first(tokens=(1, 2), accepted_drafts=1), "1 drafts"),
    "no logprobs": (_change_first(logprobs=()), "0 logprobs for 1 tokens"),
    "a score not asked for": (_change_first(scored=(LOGPROB,)), "1 scored tokens"),
}


@pytest.mark.parametrize("fault", MALFORMED)
def test_a_malformed_answer_is_refused_and_changes_nothing(fault: str) -> None:
    driver = build_driver()
    driver.submit(build_request("a", 3, sampling=SamplingSpec(logprobs=0)))
    driver.submit(build_request("b", 3))
    plan(driver)
    good = driver.executor.run(driver.flights[0])
    spoil, message = MALFORMED[fault]
    with pytest.raises(ExecutorLost, match=re.escape(message)):
        driver.scheduler.commit(spoil(good), 0)
    assert len(driver.scheduler._flights) == 1
    driver.drain()  # the good answer is taken


def test_a_token_drawn_for_an_unfinished_prompt_is_refused() -> None:
    driver = build_driver(step_tokens=4)
    driver.submit(build_request("a", 10))
    made = plan(driver)
    results = (RowResult(made.rows[0].sequence, (1,)),)
    with pytest.raises(ExecutorLost, match="1 tokens"):
        driver.scheduler.commit(StepOutcome(made.step, results, 0), 0)
    driver.drain()


@pytest.mark.parametrize("damage", [0, 1, 2])
def test_a_lost_step_is_planned_again_whatever_it_left_behind(damage: int) -> None:
    driver = build_driver(step_tokens=8)
    driver.submit(build_request("a", 12))
    driver.submit(build_request("b", 3))
    plan(driver)
    driver.commit()
    free = driver.scheduler.num_free_blocks
    lost = plan(driver)
    driver.lose(0, [damage])
    assert driver.scheduler.num_free_blocks == free
    again = plan(driver)
    assert again.step == lost.step + 1
    assert (again.rows[0].sequence, again.rows[0].start) == (SequenceId("a", 0), 8)
    driver.drain()


def test_losing_a_step_loses_every_later_one() -> None:
    driver = build_driver(step_tokens=4)
    driver.submit(build_request("a", 12))
    plan(driver)
    plan(driver)
    driver.lose(0, [0, 0])
    assert len(driver.scheduler._flights) == 0
    assert driver.scheduler.lose(1, "lost with the first", 0) == ()
    assert plan(driver).rows[0].start == 0
    driver.drain()


def test_losing_the_later_step_keeps_the_earlier() -> None:
    driver = build_driver(step_tokens=4)
    driver.submit(build_request("a", 12))
    plan(driver)
    plan(driver)
    driver.lose(1, [2])
    driver.commit()
    assert plan(driver).rows[0].start == 4
    driver.drain()


def test_scores_of_a_lost_step_are_asked_for_again() -> None:
    driver = build_driver(step_tokens=4)
    driver.submit(build_request("a", 10, prompt_logprobs=1))
    plan(driver)
    lost = plan(driver)
    driver.lose(1, [0])
    driver.commit()
    assert plan(driver).rows[0].scored == lost.rows[0].scored != ()
    driver.drain()


def test_blocks_of_the_cancelled_are_held_until_their_step_settles() -> None:
    driver = build_driver(num_blocks=8, block_tokens=4)
    driver.submit(build_request("a", 9))
    held = plan(driver).rows[0].blocks
    driver.cancel("a")
    assert driver.scheduler.num_free_blocks == 5
    driver.submit(build_request("b", 12))
    assert not set(plan(driver).rows[0].blocks) & set(held)
    driver.commit()
    assert driver.scheduler.num_ignored_results == 1
    assert driver.scheduler.num_free_blocks == 5
    driver.drain()


def test_blocks_of_the_cancelled_are_freed_when_their_step_is_lost() -> None:
    driver = build_driver(num_blocks=8, block_tokens=4)
    driver.submit(build_request("a", 9))
    plan(driver)
    driver.cancel("a")
    driver.lose(0, [2])
    assert driver.scheduler.num_free_blocks == 8


def test_a_cancelled_id_used_again_does_not_get_the_old_answer() -> None:
    driver = build_driver()
    driver.submit(build_request("a", 9))
    plan(driver)
    driver.cancel("a")
    driver.submit(Request("a", (1, 2, 3), 4))
    assert driver.commit() == ()
    driver.drain()
    assert len(driver.get_output("a")) == 4


def _draft(scheduler: Scheduler, drafts: tuple[int, ...]) -> StepPlan:
    """Plan the only request, with drafts put behind its row as a drafter would."""
    made = scheduler.plan(0)
    assert isinstance(made, StepPlan)
    flight = scheduler._flights[-1]
    place = flight.placements[0]
    sequence, row = place.sequence, place.row
    end = row.start + len(row.tokens) + len(drafts)
    grown = scheduler._roster.memory.get_num_blocks(end) - len(sequence.table)
    sequence.table.grow(grown)
    sequence.planned += len(drafts)
    place.grown += grown
    place.row = replace(
        row,
        tokens=row.tokens + drafts,
        drafts=len(drafts),
        blocks=sequence.table.get_blocks(),
    )
    flight.plan = replace(made, rows=(place.row,))
    return flight.plan


@pytest.mark.parametrize("accepted", [0, 1, 2, 3])
def test_accepted_drafts_are_computed_and_rejected_ones_give_their_blocks_back(
    accepted: int,
) -> None:
    scheduler = build_driver(block_tokens=2).scheduler
    scheduler.submit(build_request("a", 3, 20), 0)
    scheduler.plan(0)
    scheduler.commit(StepOutcome(0, (RowResult(SequenceId("a", 0), (5,)),), 0), 0)
    made = _draft(scheduler, (6, 7, 8))
    tokens = (*(6, 7, 8)[:accepted], 9)
    result = RowResult(SequenceId("a", 0), tokens, accepted_drafts=accepted)
    updates = scheduler.commit(StepOutcome(made.step, (result,), 0), 0)
    assert updates == (TokensEmitted(SequenceId("a", 0), tokens),)
    following = scheduler.plan(0)
    assert isinstance(following, StepPlan)
    row = following.rows[0]
    assert (row.start, row.tokens) == (4 + accepted, (9,))
    assert len(row.blocks) == -(-(5 + accepted) // 2)


def test_a_draft_accepted_that_was_not_drafted_is_refused() -> None:
    scheduler = build_driver().scheduler
    scheduler.submit(build_request("a", 3, 20), 0)
    made = _draft(scheduler, (6, 7))
    result = RowResult(SequenceId("a", 0), (6, 8, 9), accepted_drafts=2)
    with pytest.raises(ExecutorLost, match="differ from the drafted"):
        scheduler.commit(StepOutcome(made.step, (result,), 0), 0)
