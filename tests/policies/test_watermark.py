"""The default watermark: few preemptions for little time, and nobody kept out for good."""

from __future__ import annotations

import random

import pytest

from simulations import Scene, make_replica_spec
from twostroke.policies.watermark import choose_watermark
from twostroke.sim.arrivals import Arrival

# Azure's conversations have prompts of 1,155 tokens and answers of 211 in the mean (Patel et al.
# 2024). Here both are an eighth, in blocks of 4, and answers vary as much as prompts.
PROMPT_TOKENS, NEW_TOKENS = 144, 26
LOADS = {"conversations": (1.0, 1.0), "short prompts": (0.15, 1.0), "long answers": (0.15, 4.0)}


def draw_load(name: str, count: int = 600) -> tuple[Arrival, ...]:
    """A burst of requests with lognormal lengths."""
    rng = random.Random(f"load {name}")
    prompts, answers = LOADS[name]
    return tuple(
        Arrival(
            0,
            max(1, min(400, round(prompts * PROMPT_TOKENS * rng.lognormvariate(-0.5, 1.0)))),
            max(1, min(400, round(answers * NEW_TOKENS * rng.lognormvariate(-0.5, 1.0)))),
        )
        for _ in range(count)
    )


def run_over(arrivals: tuple[Arrival, ...], times: int, share: int) -> tuple[int, int]:
    """Preemptions and time with a pool that is so many times too small; share 0: no watermark."""
    needed = sum(-(-(one.prompt_tokens + one.new_tokens) // 4) for one in arrivals)
    blocks = max(needed // times, 210)
    watermark = choose_watermark(blocks, 64) if share else 0
    spec = make_replica_spec(
        num_blocks=blocks,
        step_tokens=128,
        max_rows=64,
        context_tokens=1024,
        watermark_blocks=watermark,
    )
    cluster = Scene(spec, arrivals).run(1_000)
    assert cluster.records.count_fates()["finished"] == len(arrivals)
    return cluster.replicas[0].scheduler.memory.num_preemptions, cluster.records.end_ns


@pytest.mark.parametrize(
    ("name", "times"), [("conversations", 60), ("short prompts", 40), ("long answers", 10)]
)
def test_a_pool_many_times_too_small_preempts_less_than_half_as_often(
    name: str, times: int
) -> None:
    arrivals = draw_load(name)
    without, plain_ns = run_over(arrivals, times, 0)
    with_it, marked_ns = run_over(arrivals, times, 1)
    assert 2 * with_it < without
    assert marked_ns < 1.06 * plain_ns


def test_a_watermark_is_a_small_part_of_the_pool_and_of_what_rows_may_take() -> None:
    assert choose_watermark(1_600, 64) == 100
    assert choose_watermark(1 << 20, 16) == 64
    for blocks in range(1, 200):
        assert 0 <= choose_watermark(blocks, 256) <= blocks // 16


def test_a_pool_of_few_blocks_has_none() -> None:
    assert choose_watermark(15, 256) == 0
