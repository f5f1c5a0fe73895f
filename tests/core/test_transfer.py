"""KV that comes from elsewhere or goes there: attach in two calls, and release."""

from __future__ import annotations

import pytest

from scheduler_model import build_driver, build_request
from twostroke.core.types import Idle, Rejected, StepPlan
from twostroke.errors import InvalidParameter


def test_an_attached_request_computes_only_what_is_missing() -> None:
    driver = build_driver()
    driver.submit(build_request("a", 10))
    assert driver.reserve("a", 9)
    driver.attach("a")
    made = driver.plan()
    assert isinstance(made, StepPlan)
    assert (made.rows[0].start, len(made.rows[0].tokens)) == (9, 1)
    driver.drain()


def test_a_reserved_request_is_not_planned_before_its_kv_is_there() -> None:
    driver = build_driver()
    driver.submit(build_request("a", 10))
    driver.reserve("a", 9)
    assert driver.plan() == Idle(waiting=0, in_flight=0)
    driver.attach("a")
    driver.drain()


def test_fewer_tokens_than_reserved_give_blocks_back() -> None:
    driver = build_driver(block_tokens=4)
    driver.submit(build_request("a", 20))
    driver.reserve("a", 19)
    assert driver.scheduler.num_free_blocks == 59
    driver.attach("a", 6)
    assert driver.scheduler.num_free_blocks == 62
    driver.drain()


def test_a_failed_transfer_leaves_the_request_waiting() -> None:
    driver = build_driver()
    driver.submit(build_request("a", 10))
    driver.reserve("a", 9)
    driver.attach("a", 0)
    assert driver.scheduler.num_waiting == 1
    assert driver.scheduler.num_free_blocks == 64
    driver.drain()


def test_blocks_being_written_are_not_reused_when_the_request_is_cancelled() -> None:
    driver = build_driver(num_blocks=4, block_tokens=4)
    driver.submit(build_request("a", 10))
    driver.reserve("a", 9)
    driver.cancel("a")
    assert driver.scheduler.num_free_blocks == 1
    assert isinstance(driver.submit(build_request("a", 3)), Rejected)
    driver.attach("a")
    assert driver.scheduler.num_free_blocks == 4


def test_a_full_pool_reserves_nothing() -> None:
    driver = build_driver(num_blocks=4, block_tokens=4)
    driver.submit(build_request("a", 8))
    driver.plan()
    driver.submit(build_request("b", 14))
    assert not driver.reserve("b", 13)
    assert driver.scheduler.num_waiting == 1
    driver.drain()


def test_continuations_fork_from_attached_kv() -> None:
    driver = build_driver()
    driver.submit(build_request("a", 10, n=3))
    driver.reserve("a", 9)
    driver.attach("a")
    made = driver.plan()
    assert isinstance(made, StepPlan)
    assert [row.sequence.index for row in made.rows] == [0, 1, 2]
    assert len(made.copies) == 2
    driver.drain()


def test_what_cannot_be_attached_is_refused_by_name() -> None:
    driver = build_driver()
    scheduler = driver.scheduler
    driver.submit(build_request("a", 10))
    driver.submit(build_request("scored", 10, prompt_logprobs=1))
    for parameter, (id, blocks, tokens) in {
        "id": ("unknown", (), 1),
        "blocks": ("a", (3,), 1),
        "prompt_logprobs": ("scored", (), 1),
        "tokens_computed": ("a", (), 10),
    }.items():
        with pytest.raises(InvalidParameter) as refusal:
            scheduler.attach(id, blocks, tokens)
        assert refusal.value.parameter == parameter
    driver.reserve("a", 4)
    blocks = driver.reserved["a"][0]
    for wrong, tokens in (((), 4), (blocks[:-1], 3), (blocks, 5), (blocks, -1)):
        with pytest.raises(InvalidParameter):
            scheduler.attach("a", wrong, tokens)
    driver.attach("a")
    driver.plan()
    with pytest.raises(InvalidParameter):
        scheduler.attach("a", (), 4)
    driver.drain()


def test_a_released_request_is_forgotten_without_a_word() -> None:
    driver = build_driver()
    driver.submit(build_request("a", 10, n=2))
    for _ in range(2):
        driver.plan()
        driver.commit()
    driver.release("a")
    assert driver.scheduler.counts["released"] == 1
    assert driver.scheduler.num_free_blocks == 64
    assert driver.cancel("a") == ()
    driver.release("a")
    assert driver.scheduler.counts["released"] == 1


def test_nothing_is_said_of_a_request_after_its_release() -> None:
    driver = build_driver(num_blocks=4, block_tokens=4)
    driver.submit(build_request("a", 4, 12))
    driver.submit(build_request("b", 3, 12))
    while not driver.scheduler.memory.num_preemptions:
        driver.plan()
        if not driver.scheduler.memory.num_preemptions:
            driver.commit()
    driver.release("b")
    assert all(update.sequence.request == "a" for update in driver.commit())
    driver.drain()


def test_release_waits_for_rows_in_flight() -> None:
    driver = build_driver()
    driver.submit(build_request("a", 10))
    driver.plan()
    driver.release("a")
    assert driver.scheduler.num_free_blocks == 61
    assert driver.commit() == ()
    assert driver.scheduler.num_free_blocks == 64


def test_release_frees_what_was_reserved() -> None:
    driver = build_driver()
    driver.submit(build_request("a", 10))
    driver.reserve("a", 9)
    driver.release("a")
    assert driver.scheduler.num_free_blocks == 64
    assert driver.scheduler.counts["live"] == 0
