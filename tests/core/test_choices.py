"""Laws of what the scheduler does with its policies' answers, and of memory beside the pool."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scheduler_fuzz import FakeAccounts
from scheduler_model import Driver, RandomDrafter, build_request
from twostroke.core.policy import Load, Policies
from twostroke.core.roster import CALM_ENDS
from twostroke.core.types import Idle, Preempted, SchedulerConfig, StepOutcome, StepPlan
from twostroke.errors import InvalidParameter

CONFIG = SchedulerConfig(64, 4, 64, 16, 128, 1000)


def crowd(config: SchedulerConfig, policies: Policies, count: int = 4) -> Driver:
    """Requests that together outgrow the pool, driven to their end."""
    driver = Driver(config, policies)
    for number in range(count):
        driver.submit(build_request(f"r{number}", 8, 24))
    driver.drain()
    return driver


def test_kv_in_host_memory_is_not_computed_again() -> None:
    small = replace(CONFIG, num_blocks=16)
    swapped = crowd(replace(small, host_blocks=64), Policies())
    again = crowd(small, Policies())
    assert swapped.scheduler.memory.num_swaps == swapped.scheduler.memory.num_preemptions > 0
    assert again.scheduler.memory.num_swaps == 0

    def count(driver: Driver) -> int:
        return sum(plan.num_tokens for plan in driver.plans)

    assert count(swapped) == 4 * (8 + 24 - 1) < count(again)
    assert [swapped.get_output(f"r{n}") for n in range(4)] == [
        again.get_output(f"r{n}") for n in range(4)
    ]


def test_kv_is_moved_only_where_that_is_preferred_and_fits() -> None:
    small = replace(CONFIG, num_blocks=16, host_blocks=64)
    never = crowd(small, Policies(prefers_swap=lambda tokens, blocks: False))
    assert never.scheduler.memory.num_swaps == 0 < never.scheduler.memory.num_preemptions
    tight = crowd(replace(small, host_blocks=1), Policies())
    assert tight.scheduler.memory.num_swaps == 0 < tight.scheduler.memory.num_preemptions


def test_a_lost_move_to_the_host_is_computed_again() -> None:
    driver = Driver(replace(CONFIG, num_blocks=12, host_blocks=64), Policies())
    for number in range(3):
        driver.submit(build_request(f"r{number}", 8, 24))
    while True:
        made = driver.plan()
        assert isinstance(made, StepPlan)
        if made.swaps_out:
            break
        driver.commit()
    updates = driver.lose(0, [2])
    assert [type(update) for update in updates] == [Preempted]
    assert len(driver.scheduler.memory.free_host) == 64
    driver.drain()


def test_the_watermark_halves_preemptions() -> None:
    small = replace(CONFIG, num_blocks=40, context_tokens=400)

    def count(watermark_blocks: int) -> int:
        driver = Driver(replace(small, watermark_blocks=watermark_blocks))
        for number in range(40):
            driver.submit(build_request(f"r{number}", 12, 30))
        driver.drain()
        return driver.scheduler.memory.num_preemptions

    assert count(8) * 2 < count(0)


def test_the_watermark_rises_with_preemptions_and_falls_again() -> None:
    small = replace(CONFIG, num_blocks=40, context_tokens=400, watermark_blocks=1)
    driver = Driver(small)
    for number in range(40):
        driver.submit(build_request(f"r{number}", 12, 30))
    roster = driver.scheduler._roster
    seen, before = [], 0
    while driver.get_live():
        driver.plan()
        driver.commit()
        preemptions, watermark = driver.scheduler.memory.num_preemptions, roster._watermark
        seen.append(watermark // CALM_ENDS)
        assert preemptions == before or watermark > CALM_ENDS
        before = preemptions
    assert 1 < max(seen) <= 10  # a quarter of the pool
    for number in range(10 * CALM_ENDS):
        driver.submit(build_request(f"calm{number}", 2, 1))
    driver.drain()
    assert roster._watermark == CALM_ENDS  # one block again


def test_a_prompt_above_the_watermark_still_runs_alone() -> None:
    driver = Driver(replace(CONFIG, num_blocks=8, watermark_blocks=6))
    driver.submit(build_request("big", 28, 4))
    driver.submit(build_request("small", 2, 4))
    driver.drain()
    assert driver.scheduler.counts["finished"] == 2


def test_pre_allocation_takes_all_room_at_once_and_no_more() -> None:
    driver = Driver(replace(CONFIG, reserve_tokens=64))
    for number in range(6):
        driver.submit(build_request(f"r{number}", 4, 20))
    made = driver.plan()
    assert isinstance(made, StepPlan)
    assert len(made.rows) == 3  # of 64 blocks 16 each, and a spare block for each that runs
    for row in made.rows:
        assert row.blocks == tuple(range(row.blocks[0], row.blocks[0] + 16))
    driver.drain()


def test_pre_allocation_must_fit_and_cannot_be_shared() -> None:
    with pytest.raises(InvalidParameter, match="reserve_tokens"):
        Driver(replace(CONFIG, reserve_tokens=257))
    driver = Driver(replace(CONFIG, reserve_tokens=64))
    assert "n: must be 1" in driver.submit(replace(build_request("a", 4), n=2)).reason


def test_the_tenant_who_had_least_is_next() -> None:
    driver = Driver(replace(CONFIG, max_rows=1), Policies(accounts=FakeAccounts()))
    for number in range(4):
        driver.submit(replace(build_request(f"big{number}", 4, 10), tenant="big"))
    driver.submit(replace(build_request("small", 4, 10), tenant="small"))
    order = []
    while not isinstance(made := driver.plan(), Idle):
        order.append(made.rows[0].sequence.request)
        driver.commit()
    assert list(dict.fromkeys(order)) == ["big0", "small", "big1", "big2", "big3"]


def test_drafts_change_no_token_and_save_steps() -> None:
    alone = crowd(CONFIG, Policies())
    drafted = crowd(CONFIG, Policies(drafter=RandomDrafter(CONFIG)))
    for number in range(4):
        assert alone.get_output(f"r{number}") == drafted.get_output(f"r{number}")
    assert len(drafted.plans) < len(alone.plans)
    assert drafted.scheduler.num_accepted > 0
    assert drafted.policies is not None
    assert isinstance(drafted.policies.drafter, RandomDrafter)
    assert drafted.policies.drafter.counts == {}, "a sequence was not forgotten"


class Closed:
    """A pace that opens at a time, and hears of every step."""

    newcomers = 1

    def __init__(self, opens_ns: int) -> None:
        self.opens_ns = opens_ns
        self.wake_ns = 0
        self.steps: list[int] = []

    def open_step(self, load: Load, now: int) -> Closed:
        self.newcomers = 1 if now >= self.opens_ns else 0
        self.wake_ns = self.opens_ns if self.newcomers == 0 and load.waiting else 0
        return self

    def get_tokens(self, start: int, wanted: int) -> int:
        return wanted

    def add(self, start: int, tokens: int) -> None:
        assert tokens > 0

    def note_step(self, plan: StepPlan, outcome: StepOutcome) -> None:
        self.steps.append(plan.step)


def test_an_idle_plan_says_when_the_pace_will_open() -> None:
    pace = Closed(5_000)
    driver = Driver(CONFIG, Policies(pace=pace))
    assert driver.plan() == Idle(0, 0)
    driver.submit(build_request("a", 4, 3))
    assert driver.plan() == Idle(1, 0, 5_000)
    assert driver.plan() == Idle(1, 0, 5_000)
    assert isinstance(driver.plan(), StepPlan)
    driver.drain()
    assert pace.steps == [0, 1, 2]
