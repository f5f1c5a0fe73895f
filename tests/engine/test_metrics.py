"""Laws of the metrics: conservation, and histograms that lose nothing."""

from __future__ import annotations

import random

import pytest

from twostroke.engine.metrics import ENDINGS, EngineMetrics, Histogram
from twostroke.engine.outputs import RequestTimings


def test_submitted_requests_are_live_rejected_or_ended() -> None:
    chooser = random.Random(0)
    metrics, live = EngineMetrics(), 0
    timings = RequestTimings(1, 2, 3, 4, 5, 6, 0, 0)
    for _ in range(300):
        action = chooser.randrange(3)
        if action == 0:
            metrics.record_accepted()
            live += 1
        elif action == 1:
            metrics.record_rejected()
        elif live:
            metrics.record_ended(chooser.choice(ENDINGS), timings, 1)
            live -= 1
        stats = metrics.get_stats()
        assert stats.live == live
        assert stats.submitted == stats.live + stats.rejected + sum(stats.ended.values())


def test_a_histogram_counts_a_value_at_its_upper_bound() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 2.5):
        histogram.observe(value)
    data = histogram.get_data()
    assert data.counts == (2, 2, 1)
    assert data.count == 5
    assert data.sum == 7.5


def test_what_never_happened_to_a_request_is_not_measured() -> None:
    metrics = EngineMetrics()
    for timings in (
        RequestTimings(10, 0, 0, 50, 0, 0, 0, 0),
        RequestTimings(10, 20, 0, 50, 3, 0, 0, 0),
        RequestTimings(10, 20, 30, 50, 3, 1, 0, 0),
        RequestTimings(10, 20, 30, 50, 3, 4, 0, 0),
    ):
        metrics.record_accepted()
        metrics.record_ended("stop", timings, 2 if timings.decode_tokens == 4 else 1)
    stats = metrics.get_stats()
    assert stats.e2e_seconds.count == 4
    assert stats.queue_seconds.count == 3
    assert stats.ttft_seconds.count == stats.prefill_seconds.count == 2
    assert stats.tpot_seconds.count == 1
    assert stats.tpot_seconds.sum == pytest.approx(20e-9)


def test_a_snapshot_does_not_change_afterwards() -> None:
    metrics = EngineMetrics()
    before = metrics.get_stats()
    metrics.record_step(3, 2, 1_000_000)
    assert before.steps == before.step_tokens.count == 0
    assert metrics.get_stats().step_tokens.sum == 3.0
