"""Laws of steps of several iterations: they are what single steps would have been."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from scheduler_fuzz import FewestLeft, draw_config, draw_request
from scheduler_model import Driver, build_driver, build_request
from twostroke.core.policy import Policies
from twostroke.core.types import Idle, SamplingSpec, StepPlan

Placed = tuple[tuple[str, int, int], ...]


def run(driver: Driver, iterations: int) -> tuple[list[Placed], int]:
    """Drive to the end; returns what each single step computed, and the longest stride."""
    steps: list[Placed] = []
    longest = 1
    while not isinstance(made := driver.plan(iterations), Idle):
        driver.run_ahead()
        outcome = driver.flights[0].outcome
        assert outcome is not None
        count = len(outcome.iteration_ns) or 1
        longest = max(longest, made.iterations)
        for iteration in range(count):
            rows = [
                (row.sequence.request, row.sequence.index, row.start + iteration)
                for row in made.rows
            ]
            steps.append(tuple(rows))
        driver.commit()
    return steps, longest


@pytest.mark.parametrize("seed", range(60))
def test_a_stride_computes_what_single_steps_would(seed: int) -> None:
    rng = random.Random(seed)
    config = replace(
        draw_config(rng), num_blocks=rng.randint(6, 40), context_tokens=200, reserve_tokens=0
    )
    requests = [
        replace(draw_request(rng, f"r{number}", config), stop_tokens=frozenset(), max_new_tokens=30)
        for number in range(8)
    ]
    order = rng.choice([None, FewestLeft])
    runs = []
    for iterations in (1, 40):
        policies = Policies() if order is None else Policies(order=order())
        driver = Driver(config, policies)
        for request in requests:
            driver.submit(request)
        steps, longest = run(driver, iterations)
        runs.append(
            (steps, driver.scheduler.memory.num_preemptions, driver.scheduler.num_free_blocks)
        )
        assert longest == 1 or iterations > 1
    assert runs[0] == runs[1]


def test_nobody_ends_before_the_last_iteration() -> None:
    driver = build_driver()
    driver.submit(build_request("a", 3, 20))
    driver.submit(build_request("b", 3, 9))
    driver.plan()
    driver.commit()
    made = driver.plan(100)
    assert isinstance(made, StepPlan)
    assert made.iterations == 8


def test_a_stride_ends_where_blocks_run_out() -> None:
    driver = build_driver(num_blocks=5)
    driver.submit(build_request("a", 3, 100))
    driver.plan()
    driver.commit()
    made = driver.plan(100)
    assert isinstance(made, StepPlan)
    assert 3 + made.iterations <= 20


@pytest.mark.parametrize("kind", ["prompt", "waiting", "history"])
def test_there_is_no_stride_when_more_than_decodes_may_happen(kind: str) -> None:
    driver = build_driver(max_rows=1 if kind == "prompt" else 16)
    spec = SamplingSpec(presence_penalty=0.5) if kind == "history" else SamplingSpec()
    driver.submit(replace(build_request("a", 3, 20), sampling=spec))
    driver.plan()
    driver.commit()
    if kind != "history":
        driver.submit(build_request("b", 3, 20))
    made = driver.plan(100)
    assert isinstance(made, StepPlan)
    assert (made.iterations > 1) == (kind == "prompt")  # with its only row taken, nobody can enter
