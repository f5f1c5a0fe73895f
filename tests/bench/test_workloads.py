"""Workloads: the same for every engine, and with a floor."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench_support import DEVICE
from tiny_models import TINY_SPECS
from twostroke.bench.workloads import (
    CHUNK,
    STANDARD,
    choose,
    cut_prompts,
    get_floor,
    make_prompt,
    make_request,
)
from twostroke.errors import InvalidParameter

SPEC = TINY_SPECS["llama"]


def test_floors_grow_with_work_and_shrink_with_rates() -> None:
    rates = tuple((name, 2 * rate) for name, rate in DEVICE.rates)
    fast = replace(DEVICE, memory_bandwidth=2 * DEVICE.memory_bandwidth, rates=rates)
    for workload in STANDARD:
        more = replace(workload, prompt=2 * workload.prompt, steps=2 * workload.steps)
        floor = get_floor(SPEC, workload, DEVICE)
        assert 0 < floor < get_floor(SPEC, more, DEVICE)
        assert get_floor(SPEC, workload, fast) == pytest.approx(floor / 2)


def test_a_batch_takes_less_than_its_rows_alone_and_more_than_one() -> None:
    floors = [get_floor(SPEC, one, DEVICE) for one in STANDARD if one.op == "batch"]
    rows = [one.rows for one in STANDARD if one.op == "batch"]
    assert floors == sorted(floors)
    for count, floor in zip(rows[1:], floors[1:], strict=True):
        assert floor < count * floors[0]


def test_every_engine_gets_the_same_ordinary_tokens() -> None:
    prompt = make_prompt(SPEC, 300)
    assert prompt == make_prompt(SPEC, 300)
    assert prompt != make_prompt(SPEC, 300, row=1)
    assert all(0 <= token < SPEC.vocab_size for token in prompt)


def test_a_request_asks_for_what_its_workload_counts() -> None:
    for workload in STANDARD:
        request = make_request(SPEC, workload)
        prompts = request.get("prompts") or [request["tokens"]]
        assert isinstance(prompts, list)
        assert [len(prompt) for prompt in prompts] == [workload.prompt] * workload.rows
        expected = workload.rows * workload.steps if workload.steps else workload.prompt
        assert workload.timed_tokens == expected


def test_batches_fit_the_first_step() -> None:
    assert all(one.rows * one.prompt <= CHUNK for one in STANDARD if one.op == "batch")


def test_prompts_are_cut_into_full_steps_that_hold_every_token_once() -> None:
    lengths = [100, 700, 512, 3, 1200]
    steps = list(cut_prompts(lengths))
    assert all(step.new_tokens == CHUNK for step in steps[:-1])
    assert sum(step.new_tokens for step in steps) == sum(lengths)
    rows = [row for step in steps for row in step.rows]
    assert sum(row.sampled for row in rows) == len(lengths)
    ends = [row.context_before + row.new_tokens for row in rows if row.sampled]
    assert ends == lengths


def test_names_are_chosen_in_their_own_order_and_unknown_ones_refused() -> None:
    known = ("a", "b", "c")
    assert choose("c, a", known, "letters") == ["a", "c"]
    assert choose("all", known, "letters") == ["a", "b", "c"]
    assert choose("", known, "letters") == []
    with pytest.raises(InvalidParameter, match=r"letters.*'d'.*a, b, c"):
        choose("a,d", known, "letters")
