"""Several continuations of one prompt: the fork, copy-on-write, and every way it can be cut off."""

from __future__ import annotations

import pytest

from scheduler_model import Driver, build_driver, build_request
from twostroke.core.types import Cancelled, SequenceEnded, SequenceId, StepPlan


def plan(driver: Driver) -> StepPlan:
    """A plan that must not be idle."""
    answer = driver.plan()
    assert isinstance(answer, StepPlan)
    return answer


def fork(driver: Driver, prompt_tokens: int, n: int) -> None:
    """Bring a request to the moment after its fork."""
    driver.submit(build_request("a", prompt_tokens, 6, n=n))
    plan(driver)
    driver.commit()


def test_the_prompt_is_computed_once_but_for_its_last_token() -> None:
    driver = build_driver()
    driver.submit(build_request("a", 10, n=3))
    first = plan(driver)
    assert [(row.sequence.index, row.start, len(row.tokens)) for row in first.rows] == [(0, 0, 9)]
    assert first.rows[0].sampling is None
    driver.commit()
    second = plan(driver)
    assert [(row.sequence.index, row.start, len(row.tokens)) for row in second.rows] == [
        (0, 9, 1),
        (1, 9, 1),
        (2, 9, 1),
    ]
    assert all(row.sampling is not None for row in second.rows)
    driver.drain()


def test_all_but_the_last_writer_of_a_shared_block_copy_it() -> None:
    driver = build_driver(num_blocks=16, block_tokens=4)
    fork(driver, 10, 3)
    assert driver.scheduler.num_free_blocks == 13
    made = plan(driver)
    assert len(made.copies) == 2
    assert len({copy.source for copy in made.copies}) == 1
    assert len({row.blocks[2] for row in made.rows}) == 3
    assert len({row.blocks[:2] for row in made.rows}) == 1
    driver.drain()


def test_a_fork_at_a_block_edge_copies_nothing() -> None:
    driver = build_driver(block_tokens=4)
    fork(driver, 9, 3)
    made = plan(driver)
    assert made.copies == ()
    assert len({row.blocks[2] for row in made.rows}) == 3
    driver.drain()


def test_a_prompt_of_one_token_forks_at_once() -> None:
    driver = build_driver()
    driver.submit(build_request("a", 1, n=3))
    assert driver.scheduler.num_waiting == 3
    assert [row.sequence.index for row in plan(driver).rows] == [0, 1, 2]
    driver.drain()


def test_continuations_differ_and_each_is_what_it_would_be_alone() -> None:
    driver = build_driver()
    driver.submit(build_request("a", 10, 8, n=3))
    driver.drain()
    outputs = [tuple(driver.get_output("a", index)) for index in range(3)]
    assert len(set(outputs)) == 3
    # The driver compares each with the same continuation computed alone when it ends.


def test_a_copy_without_a_free_block_preempts_a_sibling_and_still_ends() -> None:
    driver = build_driver(num_blocks=4, block_tokens=4)
    driver.submit(build_request("a", 14, 2, n=4))
    driver.drain()
    assert driver.scheduler.memory.num_preemptions > 0
    assert driver.scheduler.counts["finished"] == 1


def test_a_preempted_sibling_recomputes_by_itself() -> None:
    driver = build_driver(num_blocks=5, block_tokens=2)
    driver.submit(build_request("a", 4, 5, n=2))
    rows = []
    while driver.get_live():
        rows += plan(driver).rows
        driver.commit()
    again = [row for row in rows if row.sequence.index == 1 and row.start == 0]
    assert driver.scheduler.memory.num_preemptions > 0
    assert again, "the second continuation starts from position 0"


def test_a_lost_copy_is_planned_again_from_the_same_source() -> None:
    driver = build_driver(num_blocks=16, block_tokens=4)
    fork(driver, 10, 3)
    before = driver.scheduler.num_free_blocks
    lost = plan(driver)
    driver.lose(0, [2])
    assert driver.scheduler.num_free_blocks == before
    again = plan(driver)
    assert [copy.source for copy in again.copies] == [copy.source for copy in lost.copies]
    driver.drain()


@pytest.mark.parametrize("cancelled", [0, 1])
def test_the_source_of_a_copy_in_flight_is_not_reused(cancelled: int) -> None:
    driver = build_driver(num_blocks=16, block_tokens=4)
    fork(driver, 10, 2)
    source = plan(driver).copies[0].source
    driver.cancel("a", cancelled)
    driver.submit(build_request("b", 20))
    assert all(source not in row.blocks for row in plan(driver).rows)
    driver.lose(0, [2, 2])
    driver.drain()


@pytest.mark.parametrize("prompt_tokens", [1, 10])
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_cancelling_ends_every_continuation_once(prompt_tokens: int, steps: int) -> None:
    driver = build_driver()
    driver.submit(build_request("a", prompt_tokens, 9, n=3))
    for _ in range(steps):
        driver.plan()
        driver.commit()
    ended = [SequenceEnded(SequenceId("a", index), Cancelled()) for index in range(3)]
    assert list(driver.cancel("a")) == ended
    assert driver.cancel("a") == ()
    assert driver.scheduler.num_free_blocks == 64


@pytest.mark.parametrize("in_flight", [False, True])
def test_the_next_continuation_computes_the_prompt_when_the_first_is_cancelled(
    in_flight: bool,
) -> None:
    driver = build_driver(step_tokens=4)
    driver.submit(build_request("a", 10, n=3, prompt_logprobs=1))
    plan(driver)
    if not in_flight:
        driver.commit()
    driver.cancel("a", 0)
    row = plan(driver).rows[0]
    assert (row.sequence.index, row.start) == (1, 0)
    driver.drain()
    assert [len(driver.get_output("a", index)) for index in range(3)] == [0, 4, 4]


def test_a_continuation_cancelled_before_the_fork_is_never_born() -> None:
    driver = build_driver(step_tokens=4)
    driver.submit(build_request("a", 10, n=3))
    plan(driver)
    driver.cancel("a", 1)
    driver.drain()
    assert [len(driver.get_output("a", index)) for index in range(3)] == [4, 0, 4]


def test_the_last_continuation_left_needs_no_fork() -> None:
    driver = build_driver()
    driver.submit(build_request("a", 10, n=2))
    driver.cancel("a", 1)
    made = plan(driver)
    assert len(made.rows[0].tokens) == 10
    assert made.rows[0].sampling is not None
    driver.drain()
