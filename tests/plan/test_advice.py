"""Laws of advice: the largest cause comes first, with its numbers, or nothing is said."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from twostroke.plan.advice import LEAST_GAIN, LEAST_STEPS, Snapshot, advise

QUIET = Snapshot(
    steps=1000,
    wall_seconds=12.0,
    floor_seconds=8.0,
    cause_seconds={
        "bandwidth": 0.4,
        "arithmetic": 6.0,
        "attention": 3.0,
        "python": 0.3,
        "idle": 2.0,
    },
    requests=100,
    queue_seconds=0.5,
    prefill_seconds=3.0,
    decode_seconds=20.0,
    prompt_tokens=40_000,
    generation_tokens=8_000,
    kv_usage=0.4,
    prefix_queries=40_000,
    prefix_hits=20_000,
)


def get_first(snapshot: Snapshot) -> str:
    return advise(snapshot)[0].change


def test_nothing_stands_out_of_a_balanced_engine() -> None:
    assert advise(QUIET) == []


def test_few_steps_say_nothing() -> None:
    assert advise(replace(QUIET, steps=LEAST_STEPS - 1, queue_seconds=1e6)) == []


def test_a_full_pool_with_a_queue_asks_for_memory() -> None:
    full = replace(QUIET, kv_usage=0.98, queue_seconds=60.0, waiting=9, preemptions=4)
    first = advise(full)[0]
    assert "--kv-memory" in first.change
    assert "98%" in first.evidence
    assert first.gain == pytest.approx(60 / 83)


def test_a_queue_before_free_blocks_is_no_matter_of_memory() -> None:
    change = get_first(replace(QUIET, queue_seconds=60.0, waiting=9))
    assert "--max-rows" in change
    assert "--kv-memory" not in change


def test_weights_read_for_few_rows_ask_for_more_requests() -> None:
    alone = replace(
        QUIET,
        generation_tokens=1_000,
        prefill_seconds=0.1,
        cause_seconds={"bandwidth": 9.0, "attention": 0.5, "python": 0.5, "idle": 2.0},
    )
    first = advise(alone)[0]
    assert "at once" in first.change
    assert first.gain == pytest.approx(0.45)


def test_drafts_that_are_refused_should_go_and_good_ones_stay() -> None:
    drafting = replace(QUIET, drafted=30_000)
    assert "--drafts" in get_first(replace(drafting, accepted=1_000))
    assert advise(replace(drafting, accepted=20_000)) == []


def test_prompts_that_share_nothing_are_told_and_others_not() -> None:
    reading = replace(QUIET, prefill_seconds=40.0)
    assert advise(reading) == []
    assert "prompts" in get_first(replace(reading, prefix_hits=0))


def test_python_counts_only_where_it_is_large() -> None:
    causes = {"arithmetic": 6.0, "python": 4.0, "idle": 2.0}
    assert "Python" in get_first(replace(QUIET, cause_seconds=causes))


@pytest.mark.parametrize("seed", range(30))
def test_advice_is_ranked_and_worth_it_whatever_is_counted(seed: int) -> None:
    draw = random.Random(seed)
    causes = {name: draw.random() for name in QUIET.cause_seconds}
    found = advise(
        replace(
            QUIET,
            wall_seconds=sum(causes.values()),
            cause_seconds=causes,
            queue_seconds=draw.random() * 40,
            prefill_seconds=draw.random() * 40,
            generation_tokens=draw.randrange(10_000),
            kv_usage=draw.random(),
            waiting=draw.choice((0, 5)),
            prefix_hits=draw.randrange(40_000),
            drafted=(drafted := draw.randrange(1000)),
            accepted=draw.randrange(drafted + 1),
        )
    )
    gains = [one.gain for one in found]
    assert gains == sorted(gains, reverse=True)
    assert all(LEAST_GAIN <= gain <= 1 for gain in gains)
    assert all(any(letter.isdigit() for letter in one.evidence) for one in found)
