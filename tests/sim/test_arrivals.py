"""Prompts made of numbers: equal where the trace says so, and nowhere else."""

from __future__ import annotations

import itertools

import pytest

from twostroke.sim.arrivals import MIN_VOCAB, Arrival, build_prompt, build_request


@pytest.mark.parametrize("vocab_size", [MIN_VOCAB, 264, 32_000])
def test_a_prompt_has_the_length_asked_for_and_fits_the_vocabulary(vocab_size: int) -> None:
    for length, parts in itertools.product([1, 2, 16, 17, 1000], [(), (7,), (7, 123_456), (1, 2)]):
        prompt = build_prompt(Arrival(0, length, 1, parts, 16), 999_999, vocab_size)
        assert len(prompt) == length
        assert all(0 <= token < vocab_size for token in prompt)


def test_equal_prefix_ids_are_equal_tokens() -> None:
    first = build_prompt(Arrival(0, 100, 1, (5, 6), 32), 1, 264)
    second = build_prompt(Arrival(0, 200, 1, (5, 6, 9), 32), 2, 264)
    assert first[:64] == second[:64]
    assert first[64:96] != second[64:96]


def test_different_prefix_ids_and_requests_differ_in_their_first_block() -> None:
    prompts = [build_prompt(Arrival(0, 16, 1, (part,), 16), 0, 264) for part in range(3000)]
    prompts += [build_prompt(Arrival(0, 16, 1), index, 264) for index in range(3000)]
    assert len(set(prompts)) == len(prompts)


def test_a_last_part_may_be_cut_by_the_end_of_the_prompt() -> None:
    whole = build_prompt(Arrival(0, 64, 1, (5, 6), 32), 1, 264)
    cut = build_prompt(Arrival(0, 40, 1, (5, 6), 32), 2, 264)
    assert whole[:40] == cut


def test_a_request_takes_over_what_its_arrival_says() -> None:
    arrival = Arrival(5, 3, 4, tenant="a", priority=2, ttft_ns=6, itl_ns=7, expected_tokens=8)
    request = build_request(arrival, 12, 264)
    assert (request.id, len(request.prompt), request.max_new_tokens) == ("12", 3, 4)
    assert (request.tenant, request.priority) == ("a", 2)
    assert (request.ttft_ns, request.itl_ns, request.expected_tokens) == (6, 7, 8)
