"""What can never be served is refused at once; everything else waits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from scheduler_model import build_driver, build_request
from twostroke.core.types import Accepted, Rejected
from twostroke.errors import InvalidParameter

SIZES = {"num_blocks": 8, "block_tokens": 4, "context_tokens": 100, "vocab_size": 1000}


@pytest.mark.parametrize(
    ("parameter", "changes"),
    [
        ("id", {"id": ""}),
        ("id", {"id": 7}),
        ("prompt", {"prompt": ()}),
        ("prompt", {"prompt": [1, 2]}),
        ("prompt", {"prompt": (1, "2")}),
        ("prompt", {"prompt": (1, 2.0)}),
        ("prompt", {"prompt": (1, True)}),
        ("prompt", {"prompt": (1, -1)}),
        ("prompt", {"prompt": (1, 1000)}),
        ("prompt", {"prompt": (1, 10**30)}),
        ("max_new_tokens", {"max_new_tokens": 0}),
        ("max_new_tokens", {"max_new_tokens": -5}),
        ("max_new_tokens", {"max_new_tokens": 1.5}),
        ("max_new_tokens", {"max_new_tokens": None}),
        ("min_new_tokens", {"min_new_tokens": -1}),
        ("min_new_tokens", {"min_new_tokens": 5, "max_new_tokens": 4}),
        ("n", {"n": 0}),
        ("n", {"n": -1}),
        ("n", {"n": 10**9}),
        ("n", {"n": "2"}),
        ("priority", {"priority": 0.5}),
        ("prompt_logprobs", {"prompt_logprobs": -1}),
        ("prompt_logprobs", {"prompt_logprobs": 1001}),
    ],
)
def test_a_bad_request_is_rejected_by_the_name_of_its_fault(
    parameter: str, changes: dict[str, Any]
) -> None:
    driver = build_driver(**SIZES)
    answer = driver.submit(replace(build_request("a", 3), **changes))
    assert isinstance(answer, Rejected)
    assert answer.reason.startswith(f"{parameter}: ")
    assert answer.limit_tokens is None
    assert driver.scheduler.counts["rejected"] == 1
    assert driver.scheduler.counts["live"] == 0


def test_a_prompt_that_fills_the_pool_is_rejected_with_the_limit() -> None:
    driver = build_driver(**SIZES)
    assert isinstance(driver.submit(build_request("fits", 31)), Accepted)
    answer = driver.submit(build_request("large", 32))
    assert isinstance(answer, Rejected)
    assert answer.limit_tokens == 31
    assert "KV pool of 32 tokens" in answer.reason


def test_a_prompt_that_fills_the_context_is_rejected_with_the_limit() -> None:
    driver = build_driver(**{**SIZES, "context_tokens": 10})
    assert isinstance(driver.submit(build_request("fits", 9)), Accepted)
    answer = driver.submit(build_request("large", 10))
    assert isinstance(answer, Rejected)
    assert answer.limit_tokens == 9
    assert "context of 10 tokens" in answer.reason


def test_an_id_in_use_is_rejected_and_free_again_after_the_end() -> None:
    driver = build_driver(**SIZES)
    driver.submit(build_request("a", 3))
    answer = driver.submit(build_request("a", 5))
    assert isinstance(answer, Rejected)
    assert answer.reason.startswith("id: ")
    driver.drain()
    assert isinstance(driver.submit(build_request("a", 5)), Accepted)
    driver.drain()


def test_a_busy_pool_is_no_reason_to_reject() -> None:
    driver = build_driver(**SIZES)
    answers = [driver.submit(build_request(f"r{number}", 30)) for number in range(20)]
    assert all(isinstance(answer, Accepted) for answer in answers)
    driver.drain()
    assert driver.scheduler.counts["finished"] == 20


@pytest.mark.parametrize(
    "size",
    ["num_blocks", "block_tokens", "step_tokens", "max_rows", "context_tokens", "vocab_size"],
)
def test_a_scheduler_that_could_plan_nothing_is_refused(size: str) -> None:
    with pytest.raises(InvalidParameter, match=f"{size}: must be at least 1"):
        build_driver(**{size: 0})


def test_an_absurd_length_to_draw_ends_at_the_context() -> None:
    driver = build_driver(**{**SIZES, "context_tokens": 20})
    driver.submit(build_request("a", 3, 10**40))
    driver.drain()
    assert len(driver.get_output("a")) == 17
