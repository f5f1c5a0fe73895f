"""Laws of the prefix cache: what is named, found, shared, evicted, and never mixed up."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scheduler_model import Driver, build_driver, build_request
from twostroke.core.types import Idle, Request, StepPlan
from twostroke.errors import InvalidParameter
from twostroke.kv.prefix import extend_names, get_root

PROMPT = tuple(range(100, 121))  # five blocks of four and one token


def run_alone(driver: Driver, request: Request) -> StepPlan:
    """Run one request to its end; returns its first plan."""
    driver.submit(request)
    first = driver.plan()
    assert isinstance(first, StepPlan)
    driver.drain()
    return first


def build(id: str, prompt: tuple[int, ...] = PROMPT, **rest: object) -> Request:
    return replace(build_request(id, 1), prompt=prompt, **rest)


def test_a_known_prefix_is_not_computed_again() -> None:
    driver = build_driver(cache_seed="m")
    run_alone(driver, build("a"))
    row = run_alone(driver, build("b")).rows[0]
    assert (row.start, len(row.tokens)) == (20, 1)
    assert driver.scheduler.memory.cached_tokens == 20
    assert driver.scheduler.memory.prompt_tokens == 42
    assert driver.get_output("a") == driver.get_output("b")


def test_at_least_one_token_is_left_to_compute() -> None:
    driver = build_driver(cache_seed="m")
    run_alone(driver, build("a", PROMPT[:20]))
    assert run_alone(driver, build("b", PROMPT[:20])).rows[0].start == 16


def test_generated_tokens_are_found_by_the_next_turn() -> None:
    driver = build_driver(cache_seed="m")
    run_alone(driver, build("a", max_new_tokens=9))
    answer = tuple(driver.get_output("a"))
    row = run_alone(driver, build("b", (*PROMPT, *answer, 7, 8))).rows[0]
    assert row.start == 28  # the last token's KV was never computed


@pytest.mark.parametrize("other", [{"cache_scope": "salt"}, {"prompt": (99, *PROMPT[1:])}])
def test_another_scope_or_beginning_finds_nothing(other: dict[str, object]) -> None:
    driver = build_driver(cache_seed="m")
    run_alone(driver, build("a"))
    assert run_alone(driver, replace(build("b"), **other)).rows[0].start == 0


def test_a_prompt_that_is_scored_is_computed_whole() -> None:
    driver = build_driver(cache_seed="m")
    run_alone(driver, build("a"))
    assert run_alone(driver, build("b", prompt_logprobs=1)).rows[0].start == 0


def test_without_a_seed_nothing_is_kept() -> None:
    driver = build_driver()
    run_alone(driver, build("a"))
    assert run_alone(driver, build("b")).rows[0].start == 0
    assert driver.scheduler.memory.num_cached_blocks == 0


def test_running_requests_share_the_blocks_of_a_prefix() -> None:
    driver = build_driver(cache_seed="m")
    driver.submit(build("a", max_new_tokens=20))
    driver.plan()
    driver.commit()
    free = driver.scheduler.num_free_blocks
    driver.submit(build("b", max_new_tokens=20))
    made = driver.plan()
    assert isinstance(made, StepPlan)
    assert made.rows[0].blocks[:5] == made.rows[1].blocks[:5]
    assert free - driver.scheduler.num_free_blocks == 1
    driver.drain()


def test_the_prefix_used_longest_ago_is_evicted_first_and_its_end_before_its_beginning() -> None:
    driver = build_driver(cache_seed="m", num_blocks=12)
    for id, first in (("a", 100), ("b", 200)):
        run_alone(driver, build(id, tuple(range(first, first + 21)), max_new_tokens=1))
    run_alone(driver, build("c", tuple(range(300, 317)), max_new_tokens=1))  # takes five blocks
    found_b = run_alone(driver, build("b2", tuple(range(200, 221)), max_new_tokens=1)).rows[0].start
    assert found_b == 20
    found_a = run_alone(driver, build("a2", tuple(range(100, 121)), max_new_tokens=1)).rows[0].start
    assert found_a == 8


def test_a_full_pool_of_prefixes_never_stops_a_request() -> None:
    driver = build_driver(cache_seed="m", num_blocks=6)
    for number in range(12):
        prompt = tuple(range(number * 20, number * 20 + 20))
        run_alone(driver, build(f"r{number}", prompt, max_new_tokens=4))
    assert isinstance(driver.plan(), Idle)


def test_pre_allocated_memory_cannot_be_shared() -> None:
    with pytest.raises(InvalidParameter, match="cache_seed"):
        build_driver(cache_seed="m", reserve_tokens=16)


def test_names_depend_on_the_model_the_scope_and_all_tokens_before() -> None:
    def name(seed: str, scope: str, tokens: tuple[int, ...]) -> bytes:
        names: list[bytes] = []
        extend_names(names, get_root(seed, scope), tokens, 4)
        return names[-1]

    tokens = tuple(range(8))
    variants = {
        name("m", "", tokens),
        name("n", "", tokens),
        name("m", "a", tokens),
        name("ma", "", tokens),
        name("m", "", (9, *tokens[1:])),
        name("m", "", (*tokens[:7], 9)),
        name("m", "", tokens[:4]),
    }
    assert len(variants) == 7


def test_names_made_bit_by_bit_are_those_made_at_once() -> None:
    root, tokens = get_root("m", "s"), list(range(50))
    at_once: list[bytes] = []
    extend_names(at_once, root, tokens, 4)
    slowly: list[bytes] = []
    for end in range(51):
        extend_names(slowly, root, tokens[:end], 4)
    assert slowly == at_once
    assert len(at_once) == 12
