"""`/metrics`: EngineStats in Prometheus' text format.

The engine counts; this only renders one consistent snapshot per scrape, so counters and histograms
of one answer agree with each other. There is no registry beside the app's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from twostroke.engine.metrics import EngineStats, HistogramData
from twostroke.server.settings import Served

CONTENT_TYPE = CONTENT_TYPE_LATEST

SUCCESSES = ("stop", "length")

_HISTOGRAMS = (
    ("time_to_first_token_seconds", "ttft_seconds", "Submission to first token"),
    ("inter_token_latency_seconds", "inter_token_seconds", "Between a continuation's tokens"),
    ("time_per_output_token_seconds", "tpot_seconds", "Mean over a request's later tokens"),
    ("e2e_request_latency_seconds", "e2e_seconds", "Submission to end"),
    ("request_queue_time_seconds", "queue_seconds", "Submission to first planned"),
    ("request_prefill_time_seconds", "prefill_seconds", "First planned to first token"),
    ("request_decode_time_seconds", "decode_seconds", "First token to end"),
    ("step_duration_seconds", "step_seconds", "Time of one engine step"),
    ("step_tokens", "step_tokens", "Tokens computed by one engine step"),
)


class EngineCollector(Collector):
    """Renders the engine's numbers when it is asked."""

    def __init__(self, served: Served) -> None:
        self._served = served

    def collect(self) -> Iterator[Metric]:
        """Every metric, from one snapshot."""
        stats = self._served.engine.stats()
        info = {"model": self._served.names[0], "version": self._served.version}
        yield InfoMetricFamily("twostroke", "What this engine runs", value=info)
        yield from _collect_gauges(stats)
        yield from _collect_counters(stats)
        for name, attribute, text in _HISTOGRAMS:
            yield _to_histogram(f"twostroke_{name}", text, getattr(stats, attribute))


def render_metrics(collector: Collector) -> bytes:
    """The whole page."""
    return generate_latest(collector)


def _collect_gauges(stats: EngineStats) -> Iterator[Metric]:
    gauges = stats.gauges
    ratio = gauges.kv_blocks_used / gauges.kv_blocks_total if gauges.kv_blocks_total else 0.0
    for name, text, value in (
        ("requests_running", "Continuations that hold KV blocks", gauges.running),
        ("requests_waiting", "Continuations waiting for KV blocks", gauges.waiting),
        ("requests_live", "Requests accepted and not yet ended", stats.live),
        ("kv_cache_usage_ratio", "Share of the KV blocks in use", ratio),
        ("kv_cache_blocks", "KV blocks in the pool", gauges.kv_blocks_total),
    ):
        yield GaugeMetricFamily(f"twostroke_{name}", text, value=value)


def _collect_counters(stats: EngineStats) -> Iterator[Metric]:
    for name, text, value in (
        ("prompt_tokens", "Prompt tokens computed", stats.prompt_tokens),
        ("generation_tokens", "Tokens emitted", stats.generation_tokens),
        ("requests_submitted", "Requests submitted", stats.submitted),
        ("requests_rejected", "Requests refused at submission", stats.rejected),
        ("requests_failed", "Requests that failed", stats.ended["failed"]),
        ("requests_cancelled", "Requests cancelled", stats.ended["cancelled"]),
        ("preemptions", "Continuations that lost their blocks", stats.gauges.preemptions),
        ("executor_losses", "Executors lost", stats.executor_losses),
        ("steps", "Engine steps committed", stats.steps),
    ):
        yield CounterMetricFamily(f"twostroke_{name}", text, value=value)
    success = CounterMetricFamily(
        "twostroke_request_success", "Requests finished", labels=["finished_reason"]
    )
    for reason in SUCCESSES:
        success.add_metric([reason], stats.ended[reason])
    yield success
    parts = CounterMetricFamily(
        "twostroke_engine_seconds", "Life of the engine's thread, by part", labels=["part"]
    )
    for part, seconds in stats.part_seconds.items():
        parts.add_metric([part], seconds)
    yield parts


def _to_histogram(name: str, text: str, data: HistogramData) -> Metric:
    bounds = [*(str(bound) for bound in data.bounds), "+Inf"]
    buckets = list(zip(bounds, accumulate(data.counts), strict=True))
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=data.sum)
