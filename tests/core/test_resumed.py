"""Laws of requests that go on where an earlier run stopped: the rest is what it would have been."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from scheduler_fuzz import VOCAB_SIZE, draw_config, draw_policies, draw_request
from scheduler_model import Driver, build_driver, build_request, compute_alone
from twostroke.core.types import (
    Accepted,
    Idle,
    Rejected,
    Request,
    SamplingSpec,
    SchedulerConfig,
    SequenceId,
    StepPlan,
)


def cut(rng: random.Random, request: Request, config: SchedulerConfig) -> Request:
    """The request as it is resumed after each continuation has emitted some or all of it."""
    resumed: list[tuple[int, ...] | None] = []
    for index in range(request.n):
        tokens, _ = compute_alone(request, index, config)
        at = rng.randint(0, len(tokens))
        resumed.append(None if at == len(tokens) else tuple(tokens[:at]))
    if not any(one is not None for one in resumed):
        resumed[-1] = ()
    return replace(request, resumed=tuple(resumed), prompt_logprobs=None)


def run_cut(seed: int) -> Driver:
    """Requests of any kind, each cut anywhere, together in a small pool, with losses."""
    rng = random.Random(seed)
    config = draw_config(rng)
    driver = Driver(config, draw_policies(rng, config))
    for number in range(rng.randint(1, 6)):
        request = draw_request(rng, f"r{number}", config)
        if request.find_fault(VOCAB_SIZE) == "" and len(request.prompt) < config.context_tokens:
            request = cut(rng, request, config)
        driver.submit(request)
        for _ in range(rng.randint(0, 4)):
            driver.plan(rng.choice([1, 1, 7]))
            if rng.random() < 0.2 and driver.flights:
                driver.lose(rng.randrange(len(driver.flights)), [0, 0])
            elif driver.flights:
                driver.commit()
        if rng.random() < 0.1:
            driver.cancel(f"r{number}", rng.randrange(2))
    driver.drain()
    assert isinstance(driver.plan(), Idle)
    return driver


@pytest.mark.parametrize("part", range(10))
def test_what_is_resumed_ends_as_if_it_had_never_stopped(part: int) -> None:
    # The driver compares every token and ending with the request computed alone, from its prompt.
    for seed in range(part * 40, part * 40 + 40):
        try:
            run_cut(seed)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


@pytest.mark.parametrize("n", [1, 3])
def test_every_cut_of_one_request_gives_the_same_rest(n: int) -> None:
    request = build_request("r", 9, 12, n=n, sampling=SamplingSpec(presence_penalty=0.5))
    driver = build_driver(block_tokens=4, step_tokens=7)
    whole = [compute_alone(request, index, driver.config)[0] for index in range(n)]
    for at in range(12):
        resumed = tuple(tuple(tokens[:at]) for tokens in whole)
        assert isinstance(driver.submit(replace(request, id=f"r{at}", resumed=resumed)), Accepted)
        driver.drain()
        assert [driver.get_output(f"r{at}", index) for index in range(n)] == whole


def test_known_tokens_are_history_but_no_prompt() -> None:
    driver = build_driver()
    sampling = SamplingSpec(repetition_penalty=1.1)
    driver.submit(build_request("r", 5, 9, sampling=sampling, resumed=((1, 2, 3),)))
    plan = driver.plan()
    assert isinstance(plan, StepPlan)
    assert plan.rows[0].history[5:] == (1, 2, 3)
    assert plan.rows[0].history_prompt == 5


def test_what_had_ended_is_never_planned_nor_spoken_of() -> None:
    driver = build_driver()
    request = build_request("r", 6, 4, n=3)
    known = tuple(compute_alone(request, 1, driver.config)[0][:1])
    driver.submit(replace(request, resumed=(None, known, None)))
    driver.drain()
    assert {row.sequence for plan in driver.plans for row in plan.rows} == {SequenceId("r", 1)}
    assert driver.scheduler.counts["finished"] == 1
    assert len(driver.told) == 1


@pytest.mark.parametrize(
    ("resumed", "word"),
    [
        (((1,), (2,)), "a tuple of 1"),
        ((None,), "every continuation has ended"),
        (((1000,),), "token ids"),
        ((("a",),), "tuples of token ids"),
        (((1, 2, 3, 4),), "leave none of 4"),
    ],
)
def test_what_cannot_be_gone_on_with_is_refused(resumed: object, word: str) -> None:
    answer = build_driver().submit(build_request("r", 3, 4, resumed=resumed))
    assert isinstance(answer, Rejected)
    assert word in answer.reason


def test_known_tokens_must_fit_in_the_pool() -> None:
    driver = build_driver(num_blocks=2, block_tokens=4)
    assert isinstance(driver.submit(build_request("a", 4, 9, resumed=((1,) * 3,))), Accepted)
    assert isinstance(driver.submit(build_request("b", 4, 9, resumed=((1,) * 4,))), Rejected)
