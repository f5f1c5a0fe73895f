"""Every policy in the scheduler it was made for: what it changes there, and that it breaks nothing.

The driver checks each answer of the scheduler, all invariants, and every token against the same
request computed alone; the fuzz runs all combinations of names through it.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from scheduler_fuzz import RandomRun, draw_config
from scheduler_model import Driver
from step_costs import LinearStepCost
from twostroke.core.policy import Policies
from twostroke.core.types import Idle, Request, SamplingSpec, SchedulerConfig, StepPlan
from twostroke.policies.accounts import VirtualTokenCounter
from twostroke.policies.draft import PromptLookup
from twostroke.policies.names import ORDERS, PACES, PolicyChoice, build_policies
from twostroke.policies.order import AgeingPriority, EarliestDeadline, ShortestRemaining
from twostroke.policies.target import TargetPace

CONFIG = SchedulerConfig(
    num_blocks=64,
    block_tokens=16,
    step_tokens=256,
    max_rows=16,
    context_tokens=512,
    vocab_size=17,
)


def make_driver(config: SchedulerConfig = CONFIG, **fields: Any) -> Driver:
    """A driver under the policies of this choice."""
    choice = PolicyChoice(**fields)
    policies = build_policies(
        choice, step_tokens=config.step_tokens, block_bytes=64, cost=LinearStepCost(pair_ns=0)
    )
    return Driver(config, policies)


def make_request(id: str, prompt_tokens: int = 20, new_tokens: int = 8, **fields: Any) -> Request:
    """A request whose tokens are its own."""
    prompt = tuple((sum(map(ord, id)) + place) % 17 for place in range(prompt_tokens))
    return Request(id, prompt, new_tokens, SamplingSpec(seed=prompt[0]), **fields)


def step(driver: Driver) -> list[tuple[str, int]]:
    """Plan and commit one step; its rows as (request, tokens)."""
    plan = driver.plan()
    assert isinstance(plan, StepPlan)
    driver.commit()
    return [(row.sequence.request, len(row.tokens)) for row in plan.rows]


def get_first_seen(driver: Driver) -> list[str]:
    """Requests in the order of their first rows."""
    rows = [row.sequence.request for plan in driver.plans for row in plan.rows]
    return list(dict.fromkeys(rows))


ONE_AT_A_TIME = SchedulerConfig(
    num_blocks=64, block_tokens=16, step_tokens=64, max_rows=1, context_tokens=512, vocab_size=17
)


def test_first_come_serves_in_order_of_arrival_whatever_the_priority() -> None:
    driver = make_driver(ONE_AT_A_TIME, order="first-come")
    for id, priority in (("a", 3), ("b", -3), ("c", 0)):
        driver.submit(make_request(id, priority=priority))
    driver.drain()
    assert get_first_seen(driver) == ["a", "b", "c"]


def test_priority_serves_the_urgent_first_until_others_have_aged() -> None:
    # The driver's clock moves on by 1000 ns with every input.
    driver = make_driver(ONE_AT_A_TIME, order="priority", age_ns=10_000)
    driver.submit(make_request("old"))
    for index in range(30):
        driver.submit(make_request(f"urgent{index}", new_tokens=1, priority=-1))
    driver.drain()
    assert get_first_seen(driver).index("old") in (9, 10)


def test_shortest_serves_what_ends_soonest_first() -> None:
    driver = make_driver(ONE_AT_A_TIME, order="shortest")
    for id, expected in (("long", 40), ("short", 4), ("middle", 9)):
        driver.submit(make_request(id, new_tokens=40, expected_tokens=expected))
    driver.drain()
    assert get_first_seen(driver) == ["short", "middle", "long"]


def test_deadline_serves_what_is_due_first_and_what_is_late_last() -> None:
    driver = make_driver(ONE_AT_A_TIME, order="deadline")
    for id, ttft_ns in (("plain", 0), ("loose", 900_000), ("late", 2_000), ("tight", 90_000)):
        driver.submit(make_request(id, ttft_ns=ttft_ns))
    driver.drain()
    assert get_first_seen(driver) == ["tight", "loose", "plain", "late"]


def test_fair_gives_a_tenant_its_turn_before_the_rest_of_another() -> None:
    driver = make_driver(ONE_AT_A_TIME, order="fair")
    for index in range(10):
        driver.submit(make_request(f"greedy{index}", tenant="greedy"))
    driver.submit(make_request("modest", tenant="modest"))
    driver.drain()
    assert get_first_seen(driver).index("modest") <= 1


def test_fair_keeps_service_within_the_bound_of_its_paper() -> None:
    driver = make_driver(order="fair")
    for index in range(40):
        driver.submit(make_request(f"greedy{index}", 64, 30, tenant="greedy"))
    for index in range(4):
        driver.submit(make_request(f"modest{index}", 64, 30, tenant="modest"))
    served = {"greedy": 0, "modest": 0}
    while any(key.request.startswith("modest") for key in driver.get_live()):
        for id, tokens in step(driver):
            served[id.rstrip("0123456789")] += 2 if tokens == 1 else tokens
    held = CONFIG.num_blocks * CONFIG.block_tokens
    assert abs(served["greedy"] - served["modest"]) <= 2 * max(64, 2 * held)
    assert get_first_seen(driver)[-1] != "modest3"
    driver.drain()


def test_load_halves_chunks_of_prompts_as_blocks_run_short() -> None:
    config = SchedulerConfig(80, 16, 1_024, 16, 1_280, 17)
    driver = make_driver(config, pace="load", chunk_tokens=220)
    driver.submit(make_request("a", 1_270, 2))
    # Half as soon as more than 64 of the 80 blocks are held.
    assert [step(driver) for _ in range(7)] == [
        [("a", tokens)] for tokens in (220, 220, 220, 220, 220, 110, 60)
    ]
    driver.drain()


def test_static_batches_neither_start_early_nor_let_anybody_join() -> None:
    driver = make_driver(pace="static", batch_size=3, batch_timeout_ns=1_000_000)
    driver.submit(make_request("a"))
    idle = driver.plan()
    assert isinstance(idle, Idle)
    assert idle.wake_ns == 1_000_000 + 1_000
    for id in ("b", "c", "d", "e", "f", "g"):
        driver.submit(make_request(id))
    assert {id for id, _ in step(driver)} == {"a", "b", "c"}
    while driver.get_live() and "a" in {key.request for key in driver.get_live()}:
        assert {id for id, _ in step(driver)} <= {"a", "b", "c"}
    assert {id for id, _ in step(driver)} == {"d", "e", "f"}
    while len(driver.get_live()) > 1:
        step(driver)
    assert isinstance(driver.plan(), Idle)  # "g" waits for company
    driver.now += 1_000_000
    assert [id for id, _ in step(driver)] == ["g"]
    driver.drain()


def make_streams(driver: Driver, count: int, **fields: Any) -> None:
    """So many requests that decode from now on."""
    for index in range(count):
        driver.submit(make_request(f"s{index}", 4, 60, **fields))
    while any(tokens > 1 for _, tokens in step(driver)):
        pass


def test_target_gives_a_prompt_what_running_streams_can_wait_for() -> None:
    # 1000 ns a step and 100 a token; an eighth of margin leaves 4000 ns: 30 tokens, of which the
    # decodes take 8 and a prompt one block.
    driver = make_driver(pace="target", itl_ns=4_500)
    make_streams(driver, 8)
    driver.submit(make_request("long", 200, 2))
    # From the second on, what was seen to pass between steps is taken off the target.
    assert [dict(step(driver))["long"] for _ in range(3)] == [16, 12, 12]
    # By then three steps were seen to take 1000 ns each, as steps of the fake executor do, and the
    # predictions are believed no longer.
    assert dict(step(driver))["long"] == 64
    driver.drain()


def test_target_of_a_request_holds_for_those_it_runs_beside() -> None:
    driver = make_driver(pace="target")
    make_streams(driver, 8, itl_ns=9_000)
    driver.submit(make_request("long", 200, 2))
    assert dict(step(driver))["long"] == 48
    driver.drain()


def test_target_lets_a_prompt_alone_have_the_step() -> None:
    driver = make_driver(pace="target", itl_ns=4_500)
    driver.submit(make_request("long", 200, 2))
    assert step(driver) == [("long", 200)]
    driver.drain()


def test_target_counts_decodes_that_are_in_flight() -> None:
    driver = make_driver(pace="target", itl_ns=4_500)
    make_streams(driver, 8)
    driver.submit(make_request("long", 200, 2))
    driver.plan()
    behind = driver.plan()
    assert isinstance(behind, StepPlan)
    assert [len(row.tokens) for row in behind.rows] == [16]
    driver.commit()
    driver.commit()
    driver.drain()


def test_lookup_saves_steps_and_changes_no_token() -> None:
    # With two tokens in the vocabulary the same runs come again and again; the driver compares
    # every token with the request computed alone.
    config = SchedulerConfig(64, 16, 64, 4, 512, 1)
    plain, drafting = make_driver(config), make_driver(config, drafts=True)
    for driver in (plain, drafting):
        driver.submit(Request("a", (0, 0, 0, 0), 100))
        driver.drain()
    assert drafting.get_output("a") == plain.get_output("a")
    assert len(drafting.plans) < len(plain.plans) / 4
    assert drafting.scheduler.num_accepted >= 70


def test_swaps_follow_the_predicted_times() -> None:
    config = SchedulerConfig(8, 16, 64, 4, 128, 17, host_blocks=8)
    for copied_byte_ns, swaps in ((0, True), (10**6, False)):
        cost = LinearStepCost(copied_byte_ns=copied_byte_ns)
        choice = PolicyChoice()
        driver = Driver(config, build_policies(choice, step_tokens=64, block_bytes=64, cost=cost))
        for id in ("a", "b", "c"):
            driver.submit(make_request(id, 30, 60))
        driver.drain()
        assert driver.scheduler.memory.num_preemptions > 0
        assert (driver.scheduler.memory.num_swaps > 0) == swaps


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("pace", PACES)
def test_no_combination_breaks_an_invariant_or_keeps_anything(order: str, pace: str) -> None:
    for seed in range(12):
        rng = random.Random(f"{order} {pace} {seed}")
        config = draw_config(rng)
        choice = PolicyChoice(
            order=order,
            pace=pace,
            drafts=seed % 2 == 1,
            age_ns=rng.choice([1, 5_000, 10**9]),
            horizon_ns=rng.choice([1, 50_000, 10**9]),
            fixed_tokens=rng.choice([0, 1, 9]),
            chunk_tokens=rng.choice([2, 16]),
            itl_ns=rng.choice([0, 1_200, 9_000]) if pace == "target" else 0,
            batch_size=rng.choice([1, 3, 9]),
            batch_timeout_ns=0,
        )
        policies = build_policies(choice, step_tokens=64, block_bytes=64, cost=LinearStepCost())
        run = RandomRun(seed)
        run.driver = Driver(config, policies)
        for _ in range(100):
            run.step()
        run.driver.drain()
        check_nothing_is_kept(policies)


def check_nothing_is_kept(policies: Policies) -> None:
    """No policy remembers a request when all have ended."""
    order, drafter = policies.order, policies.drafter
    if isinstance(order, AgeingPriority):
        assert len(order._arrivals) == 0
    if isinstance(order, ShortestRemaining):
        assert len(order._predicted) == 0
    if isinstance(order, EarliestDeadline):
        assert len(order._deadlines) == 0
    if isinstance(drafter, PromptLookup):
        assert drafter._draftees == {}
    if isinstance(policies.accounts, VirtualTokenCounter):
        assert len(policies.accounts._near) <= 3
    if isinstance(policies.pace, TargetPace):
        assert len(policies.pace._decodes) <= 3


def test_a_newcomer_with_one_token_to_compute_takes_its_share_of_the_budget() -> None:
    driver = make_driver(pace="fixed", fixed_tokens=6)
    for number in range(12):
        driver.submit(Request(f"r{number}", (number,), 1))
    plan = driver.plan()
    assert isinstance(plan, StepPlan)
    assert plan.num_tokens == 6
    driver.drain()


def test_with_accounts_a_prompt_that_was_charged_goes_on_before_others_are_admitted() -> None:
    # The greedy tenant's requests came first; behind the modest one's chunk they are cheaper.
    config = SchedulerConfig(64, 16, 32, 16, 512, 17)
    driver = make_driver(config, order="fair")
    for number in range(20):
        driver.submit(Request(f"g{number}", (1,) * 20, 1, tenant="greedy"))
    driver.submit(Request("m", (2,) * 128, 1, tenant="modest"))
    order: list[str] = []
    while (plan := driver.plan()) and isinstance(plan, StepPlan):
        order += [row.sequence.request for row in plan.rows]
        driver.commit()
    first = order.index("m")
    others = [id for id in order[first : first + 4] if id != "m"]
    assert len(others) <= 1  # at most who was in the same step when it was admitted
