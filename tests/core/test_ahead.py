"""Plans ahead of a token: a decode whose token the step before is still drawing."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from scheduler_fuzz import VOCAB_SIZE, FakeAccounts, FewestLeft, draw_config, draw_request
from scheduler_model import Driver, RandomDrafter, build_driver, build_request, draw_token
from twostroke.core.policy import Policies
from twostroke.core.types import (
    PENDING,
    Finished,
    Idle,
    Request,
    Row,
    SamplingSpec,
    SequenceId,
    StepPlan,
    Token,
)

Output = dict[SequenceId, list[Token]]


def build_ahead(**sizes: int) -> Driver:
    """A driver with roomy sizes that plans ahead."""
    return build_driver(plans_ahead=True, **sizes)


def plan(driver: Driver) -> StepPlan:
    """A plan that must not be idle."""
    answer = driver.plan()
    assert isinstance(answer, StepPlan)
    return answer


def is_ahead(row: Row) -> bool:
    """Whether the row's token is not known yet."""
    return row.tokens == (PENDING,)


def keep_two(driver: Driver, lose_every: int = 0) -> int:
    """Drive to the end with two steps in flight; returns the rows planned ahead.

    lose_every: lose both steps in flight, or only the later, at every so many commits.
    """
    ahead = commits = 0
    while driver.get_live() or driver.flights:
        while len(driver.flights) < 2 and isinstance(made := driver.plan(), StepPlan):
            ahead += sum(map(is_ahead, made.rows))
        commits += 1
        if lose_every and commits % lose_every == 0:
            driver.lose(commits // lose_every % len(driver.flights), [commits % 3, 2])
        else:
            driver.commit()
    return ahead


def test_a_decode_is_planned_while_its_token_is_drawn() -> None:
    driver = build_ahead()
    driver.submit(build_request("a", 3))
    first, second = plan(driver), plan(driver)
    assert second.step == first.step + 1
    row = second.rows[0]
    assert row == Row(first.rows[0].sequence, (PENDING,), 3, first.rows[0].blocks, SamplingSpec())
    assert driver.plan() == Idle(waiting=0, in_flight=2)
    driver.commit()
    assert plan(driver).rows[0].start == 4
    driver.drain()


def test_nothing_is_planned_ahead_unless_asked_for() -> None:
    driver = build_driver()
    driver.submit(build_request("a", 3))
    assert keep_two(driver) == 0


def test_a_row_ahead_takes_the_block_its_token_needs() -> None:
    driver = build_ahead(block_tokens=2)
    driver.submit(build_request("a", 2))
    first, second = plan(driver), plan(driver)
    assert len(first.rows[0].blocks) == 1
    assert second.rows[0].blocks[:1] == first.rows[0].blocks
    assert len(second.rows[0].blocks) == 2
    driver.lose(1, [2])
    assert driver.scheduler.num_free_blocks == 63
    driver.drain()


@pytest.mark.parametrize(
    ("prompt", "sizes"),
    [(3, {}), (124, {"step_tokens": 128}), (12, {"num_blocks": 4})],
    ids=["asked for no more", "the context is full", "the pool is full"],
)
def test_no_row_stands_on_a_token_that_is_surely_the_last(
    prompt: int, sizes: dict[str, int]
) -> None:
    driver = build_ahead(**sizes)
    driver.submit(build_request("a", prompt, 5 if prompt == 3 else 100))
    keep_two(driver)
    assert driver.scheduler.num_ignored_results == 0
    assert len(driver.plans) == len(driver.get_output("a")) < 6


def test_a_draw_that_needs_history_waits_for_its_token() -> None:
    driver = build_ahead()
    driver.submit(build_request("a", 3, sampling=SamplingSpec(repetition_penalty=1.1)))
    driver.submit(build_request("b", 3))
    plan(driver)
    assert [row.sequence.request for row in plan(driver).rows] == ["b"]
    driver.drain()


def test_nothing_is_planned_ahead_where_drafts_are_verified() -> None:
    driver = build_ahead()
    drafting = Driver(driver.config, Policies(drafter=RandomDrafter(driver.config)))
    drafting.submit(build_request("a", 3, 40))
    assert keep_two(drafting) == 0


def test_nothing_is_planned_ahead_of_a_stride() -> None:
    driver = build_ahead()
    driver.submit(build_request("a", 3, 40))
    plan(driver)
    driver.commit()
    made = driver.plan(5)
    assert isinstance(made, StepPlan)
    assert made.iterations == 5
    assert driver.plan() == Idle(waiting=0, in_flight=1)
    driver.drain()


def test_continuations_run_ahead_once_they_are_born() -> None:
    driver = build_ahead()
    driver.submit(build_request("a", 6, n=3))
    plan(driver)
    assert driver.plan() == Idle(waiting=0, in_flight=1)
    driver.commit()
    assert not any(map(is_ahead, plan(driver).rows))
    made = plan(driver)
    assert len(made.rows) == 3
    assert all(map(is_ahead, made.rows))
    driver.drain()


def test_scores_of_the_prompt_do_not_hinder() -> None:
    driver = build_ahead()
    driver.submit(build_request("a", 6, prompt_logprobs=1))
    plan(driver)
    row = plan(driver).rows[0]
    assert is_ahead(row)
    assert row.scored == ()
    driver.drain()


def test_what_stands_on_a_stop_token_is_ignored_and_its_blocks_are_held() -> None:
    driver = build_ahead(block_tokens=4)
    request = build_request("a", 3, 50)
    stop = draw_token(request, 0, _chain(request), 1000)
    driver.submit(replace(request, stop_tokens=frozenset({stop})))
    driver.submit(build_request("b", 3, 50))
    plan(driver)
    plan(driver)
    driver.commit()
    assert driver.told[SequenceId("a", 0)].ending == Finished("stop")
    assert driver.scheduler.num_free_blocks == 62
    assert [row.sequence.request for row in plan(driver).rows] == ["b"]
    driver.commit()
    assert driver.scheduler.num_ignored_results == 1
    assert driver.get_output("a") == [stop]
    driver.drain()


def _chain(request: Request) -> int:
    alone = build_driver()
    alone.submit(request)
    return alone.told[SequenceId("a", 0)].chain[-1]


def test_a_sequence_cancelled_with_two_rows_in_flight_is_freed_after_both() -> None:
    driver = build_ahead(block_tokens=4)
    driver.submit(build_request("a", 4, 50))
    plan(driver)
    plan(driver)
    driver.cancel("a", 0, Finished("stop"))
    driver.commit()
    assert driver.scheduler.num_free_blocks == 62
    driver.commit()
    assert driver.scheduler.num_free_blocks == 64
    assert driver.scheduler.num_ignored_results == 2


@pytest.mark.parametrize("damages", [(0, 0), (1, 0), (1, 1), (1, 2), (2, 2)])
def test_losing_both_steps_plans_the_same_two_rows_again(damages: tuple[int, int]) -> None:
    driver = build_ahead()
    driver.submit(build_request("a", 3, 9))
    plan(driver)
    driver.commit()
    lost = [plan(driver), plan(driver)]
    driver.lose(0, damages)
    again = [plan(driver), plan(driver)]
    assert [one.rows for one in again] == [one.rows for one in lost]
    assert [one.step for one in again] == [one.step + 2 for one in lost]
    driver.drain()


def test_a_token_drawn_before_a_lost_step_is_waited_for() -> None:
    driver = build_ahead()
    driver.submit(build_request("a", 3, 9))
    plan(driver)
    plan(driver)
    driver.lose(1, [2])  # the next step's number is two behind the one that draws
    assert driver.plan() == Idle(waiting=0, in_flight=1)
    driver.commit()
    assert not is_ahead(plan(driver).rows[0])
    driver.drain()


def test_nobody_runs_ahead_behind_one_who_waits_for_a_block() -> None:
    driver = build_ahead(num_blocks=4, block_tokens=4)
    driver.submit(build_request("a", 4, 9))
    driver.submit(build_request("b", 1, 9))
    for starts in ([0, 0], [4, 1], [5, 2], [6, 3], [7, 4]):
        assert [row.start for row in plan(driver).rows] == starts
        if len(driver.flights) == 2:
            driver.commit()
    # "a" needs its third block, and "b", who still has room for three tokens, has the last one.
    assert driver.plan() == Idle(waiting=0, in_flight=1)
    driver.commit()
    made = plan(driver)
    assert [(row.sequence.request, row.start) for row in made.rows] == [("a", 8)]
    assert driver.scheduler.memory.num_preemptions == 1
    driver.drain()


@pytest.mark.parametrize("lose_every", [0, 3])
@pytest.mark.parametrize("seed", range(40))
def test_planning_ahead_changes_no_token(seed: int, lose_every: int) -> None:
    rng = random.Random(seed)
    config = replace(draw_config(rng), num_blocks=rng.randint(6, 40), vocab_size=VOCAB_SIZE)
    requests = [draw_request(rng, f"r{number}", config) for number in range(8)]
    policies = rng.choice(
        [Policies, lambda: Policies(order=FewestLeft()), lambda: Policies(accounts=FakeAccounts())]
    )
    outputs: list[Output] = []
    num_ahead = []
    for plans_ahead in (False, True):
        driver = Driver(replace(config, plans_ahead=plans_ahead), policies())
        for request in requests:
            driver.submit(request)
        num_ahead.append(keep_two(driver, lose_every))
        driver.drain()
        outputs.append({key: told.tokens for key, told in driver.told.items()})
    assert outputs[0] == outputs[1]
    assert num_ahead[0] == 0


def test_a_long_decode_runs_ahead_all_the_way() -> None:
    driver = build_ahead()
    driver.submit(build_request("a", 5, 60))
    assert keep_two(driver) == 59
    assert len(driver.plans) == 60
