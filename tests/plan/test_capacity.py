"""Laws of capacity in closed form, of the search and of recovery; exercises among them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twostroke.plan.capacity import (
    KV,
    TPOT,
    Demand,
    Engine,
    find_capacity,
    find_load,
    find_prefill_capacity,
    get_largest_batch,
    get_load,
    get_prefill_load,
    get_wait_s,
)
from twostroke.plan.pareto_plot import draw_front
from twostroke.plan.recovery import plan_checkpoints, plan_replay
from twostroke.plan.roofline_cost import CAPTURED, RooflineCost
from twostroke.plan.search import Option, add_replicas, find_front, find_nearest, search
from twostroke.spec.catalog import get_known_model
from twostroke.spec.device import get_known_device
from twostroke.spec.work import get_model_work

SPEC = get_known_model("llama-2-7b")
COST = RooflineCost(SPEC, get_known_device("a100-80gb"), 1, CAPTURED, get_model_work(SPEC))
ENGINE = Engine(COST, pool_tokens=100_000, max_rows=256, step_tokens=2048)
DEMAND = Demand(rate=5.0, prompt_tokens=1000, new_tokens=200, ttft_s=2.0, tpot_s=0.05)
OPTION = Option(SPEC, "a100-80gb", "bf16", "f16", 1, ENGINE, 2.0, 524_288)


@pytest.mark.parametrize(("cap", "batch"), [(1.0, 28), (0.9, 21)])
def test_24_gb_with_14_gb_of_weights_hold_28_requests_of_356_mb_and_21_under_a_cap(
    cap: float, batch: int
) -> None:
    free_mb = int(24_000 * cap) - 14_000
    engine = replace(ENGINE, pool_tokens=free_mb)  # a token stands for a megabyte
    assert get_largest_batch(engine, replace(DEMAND, prompt_tokens=300, new_tokens=56)) == batch


def test_littles_law_holds_in_the_steady_state() -> None:
    load = find_load(ENGINE, DEMAND, 3.0, find_capacity(ENGINE, DEMAND).load)
    assert load.rate == pytest.approx(3.0, rel=0.02)
    assert load.rows == pytest.approx(load.rate * DEMAND.new_tokens * load.tpot_s)


@given(
    prompt=st.integers(1, 4000),
    new=st.integers(1, 1000),
    tpot=st.floats(0.0, 0.2),
    ttft=st.floats(0.0, 5.0),
)
def test_what_is_found_is_kept_and_one_row_more_is_not(prompt, new, tpot, ttft) -> None:
    demand = Demand(1.0, prompt, new, ttft, tpot)
    capacity = find_capacity(ENGINE, demand)
    if not capacity.load.breaks:
        rows = capacity.load.rows
        assert not get_load(ENGINE, demand, rows).breaks
        assert get_load(ENGINE, demand, rows + 1).breaks == capacity.breaks
    else:
        assert capacity.breaks == get_load(ENGINE, demand, 1).breaks


def test_the_pool_breaks_first_where_it_is_small_and_the_target_where_it_is_tight() -> None:
    free = replace(DEMAND, ttft_s=0.0, tpot_s=0.0)
    assert find_capacity(replace(ENGINE, pool_tokens=5000), free).breaks == KV
    assert find_capacity(ENGINE, replace(free, tpot_s=0.02)).breaks == TPOT


def test_a_prefill_pool_keeps_its_target_with_its_wait() -> None:
    capacity = find_prefill_capacity(ENGINE, DEMAND)
    assert capacity.load.ttft_s <= DEMAND.ttft_s
    assert capacity.load.busy <= 0.9
    tight = replace(DEMAND, ttft_s=1.2 * get_prefill_load(ENGINE, DEMAND, 0.0).ttft_s)
    assert find_prefill_capacity(ENGINE, tight).load.rate < capacity.load.rate


def test_waits_grow_without_end_as_a_queue_fills() -> None:
    waits = [get_wait_s(busy, 1.0) for busy in (0.05, 0.3, 0.6, 0.9, 0.99, 1.0)]
    assert waits[0] == 0.0
    assert waits == sorted(waits)
    assert waits[-1] == math.inf


def test_plans_keep_the_rate_and_the_targets_and_the_cheapest_is_first() -> None:
    options = [OPTION, replace(OPTION, device="other", price=1.5)]
    found = search(options, DEMAND, 25e9, 100)
    assert {len(each.pools) for each in found} == {1, 2}
    assert [each.hourly_cost for each in found] == sorted(each.hourly_cost for each in found)
    for each in found:
        assert each.growth >= 1
        assert each.ttft_s <= DEMAND.ttft_s
        assert each.tpot_s <= DEMAND.tpot_s
        for pool in each.pools:
            assert pool.utilisation <= 1 + 1e-9
            assert pool.load.rate * pool.replicas == pytest.approx(DEMAND.rate, rel=0.05)


def test_more_replicas_of_a_pool_do_less_each_and_cost_more() -> None:
    for plan in search([OPTION], DEMAND, 25e9, 100):
        for at, before in enumerate(plan.pools):
            more = add_replicas(plan, DEMAND, at, 2)
            pool = more.pools[at]
            assert pool.replicas == before.replicas + 2
            assert pool.load.rate * pool.replicas == pytest.approx(DEMAND.rate, rel=0.05)
            assert pool.utilisation < before.utilisation
            assert more.hourly_cost > plan.hourly_cost
            assert more.growth >= plan.growth
            assert (more.ttft_s, more.tpot_s) <= (plan.ttft_s, plan.tpot_s)


def test_the_link_that_two_pools_need_carries_every_prompts_keys() -> None:
    (plan,) = (each for each in search([OPTION], DEMAND, 25e9, 100) if each.link)
    assert plan.link is not None
    assert plan.link.request_bytes == 524_288 * DEMAND.prompt_tokens
    prefill = plan.pools[0]
    sent = DEMAND.rate / prefill.replicas * plan.link.request_bytes
    assert plan.link.needed == pytest.approx(sent / 0.7)


def test_a_link_that_is_too_slow_leaves_one_pool() -> None:
    assert all(each.link is None for each in search([OPTION], DEMAND, 1e6, 100))


def test_targets_nothing_keeps_are_answered_with_what_is_possible() -> None:
    impossible = replace(DEMAND, tpot_s=1e-4)
    assert search([OPTION], impossible, 25e9, 100) == []
    nearest = find_nearest([OPTION], impossible)
    possible = replace(DEMAND, ttft_s=0.0, tpot_s=1.5 * nearest.tpot_s)
    assert search([OPTION], possible, 25e9, 10_000)


def test_the_front_holds_what_no_other_beats_in_both() -> None:
    points = [(3.0, 1.0), (1.0, 3.0), (2.0, 2.0), (3.0, 3.0), (2.0, 2.5)]
    assert find_front(points) == [1, 2, 0]


def test_the_same_plans_give_the_same_picture(tmp_path: Path) -> None:
    found = search([OPTION], DEMAND, 25e9, 100)
    paths = [tmp_path / f"{name}.svg" for name in "ab"]
    for path in paths:
        draw_front(found, DEMAND, found[:1], path)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_youngs_interval_by_hand_and_dalys_near_it() -> None:
    # C = 50 ms and M = 4 s: √(2 · 0.05 · 4) = 0.632 s.
    found = plan_checkpoints(0.05, 4.0, 2.0)
    assert found.young_s == pytest.approx(math.sqrt(0.4))
    assert found.interval_s == pytest.approx(
        math.sqrt(0.4) * (1 + math.sqrt(0.00625) / 3 + 0.00625 / 9) - 0.05
    )
    assert found.overhead == pytest.approx(
        0.05 / found.interval_s + (found.interval_s / 2 + 2.0) / 4.0
    )


@pytest.mark.parametrize("checkpoint_s", [0.01, 0.5])
def test_no_other_interval_costs_much_less_than_dalys(checkpoint_s: float) -> None:
    best = plan_checkpoints(checkpoint_s, 3600.0, 30.0)

    def cost(interval_s: float) -> float:
        return checkpoint_s / interval_s + (interval_s / 2 + 30.0) / 3600.0

    others = [cost(best.interval_s * factor) for factor in (0.25, 0.5, 0.9, 1.1, 2.0, 4.0)]
    assert min(others) >= best.overhead * (1 - 1e-3)


def test_a_checkpoint_longer_than_failures_allow_is_made_at_every_failure() -> None:
    assert plan_checkpoints(10.0, 4.0, 0.0).interval_s == 4.0


def test_replay_costs_nothing_while_nothing_fails() -> None:
    often, seldom = (plan_replay(0.1, 20, failure_s, 0.0) for failure_s in (100.0, 1e12))
    assert often.rework_s == pytest.approx(2.0)
    assert seldom.overhead < 1e-11
