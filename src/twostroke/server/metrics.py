"""`/metrics`: EngineStats, and what the server turned away, in Prometheus' text format.

The engine counts; this only renders one consistent snapshot per scrape, so counters and histograms
of one answer agree with each other. There is no registry beside the app's own. Names are those that
dashboards of inference servers know (vLLM's, under our prefix); where ours was another before, both
are there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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

from twostroke.engine.attribution import AttributionTotals
from twostroke.engine.metrics import EngineStats, Gauges, HistogramData
from twostroke.server.limits import Traffic
from twostroke.server.settings import Served

CONTENT_TYPE = CONTENT_TYPE_LATEST

SUCCESSES = ("stop", "length")

_HISTOGRAMS = (
    ("time_to_first_token_seconds", "ttft_seconds", "Submission to first token"),
    ("inter_token_latency_seconds", "inter_token_seconds", "Between a continuation's tokens"),
    ("time_per_output_token_seconds", "tpot_seconds", "Mean over a request's later tokens"),
    ("request_time_per_output_token_seconds", "tpot_seconds", "The same"),
    ("e2e_request_latency_seconds", "e2e_seconds", "Submission to end"),
    ("request_queue_time_seconds", "queue_seconds", "Submission to first planned"),
    ("request_prefill_time_seconds", "prefill_seconds", "First planned to first token"),
    ("request_decode_time_seconds", "decode_seconds", "First token to end"),
    ("step_duration_seconds", "step_seconds", "Time of one engine step"),
    ("step_tokens", "step_tokens", "Tokens computed by one engine step"),
    ("iteration_tokens_total", "step_tokens", "The same"),
)


class EngineCollector(Collector):
    """Renders the engine's and the server's numbers when it is asked."""

    def __init__(self, served: Served, traffic: Traffic) -> None:
        self._served = served
        self._traffic = traffic

    def collect(self) -> Iterator[Metric]:
        """Every metric, from one snapshot."""
        stats = self._served.engine.stats()
        info = {"model": self._served.names[0], "version": self._served.version}
        yield InfoMetricFamily("twostroke", "What this engine runs", value=info)
        yield from _collect_gauges(stats)
        yield from _collect_counters(stats)
        yield from _collect_attribution(stats.attribution)
        yield from _collect_traffic(self._traffic)
        for name, attribute, text in _HISTOGRAMS:
            yield _to_histogram(f"twostroke_{name}", text, getattr(stats, attribute))


def render_metrics(collector: Collector) -> bytes:
    """The whole page."""
    return generate_latest(collector)


def _collect_gauges(stats: EngineStats) -> Iterator[Metric]:
    gauges = stats.gauges
    ratio = gauges.kv_blocks_used / gauges.kv_blocks_total if gauges.kv_blocks_total else 0.0
    for name, text, value in (
        ("num_requests_running", "Continuations that hold KV blocks", gauges.running),
        ("num_requests_waiting", "Continuations waiting for KV blocks", gauges.waiting),
        ("requests_running", "The same as num_requests_running", gauges.running),
        ("requests_waiting", "The same as num_requests_waiting", gauges.waiting),
        ("requests_live", "Requests accepted and not yet ended", stats.live),
        ("kv_cache_usage_perc", "Share of the KV blocks in use, 1 being all", ratio),
        ("kv_cache_usage_ratio", "The same as kv_cache_usage_perc", ratio),
        ("kv_cache_blocks", "KV blocks in the pool", gauges.kv_blocks_total),
        ("kv_cache_blocks_cached", "KV blocks that keep a prefix", gauges.kv_blocks_cached),
        ("kv_cache_waste_ratio", "Share of used KV blocks without a token", get_waste(gauges)),
    ):
        yield GaugeMetricFamily(f"twostroke_{name}", text, value=value)


def get_waste(gauges: Gauges) -> float:
    """Internal fragmentation: what is reserved in used blocks and holds no token yet.

    A lower bound: a block that several share counts once as used, and its tokens for each.
    """
    room = gauges.kv_blocks_used * gauges.block_tokens
    return max(0.0, 1 - gauges.held_tokens / room) if room else 0.0


def _collect_counters(stats: EngineStats) -> Iterator[Metric]:
    gauges = stats.gauges
    for name, text, value in (
        ("prompt_tokens", "Prompt tokens computed", stats.prompt_tokens),
        ("generation_tokens", "Tokens emitted", stats.generation_tokens),
        ("requests_submitted", "Requests submitted", stats.submitted),
        ("requests_rejected", "Requests refused at submission", stats.rejected),
        ("requests_failed", "Requests that failed", stats.ended["failed"]),
        ("requests_cancelled", "Requests cancelled", stats.ended["cancelled"]),
        ("num_preemptions", "Continuations that lost their blocks", gauges.preemptions),
        ("preemptions", "The same as num_preemptions", gauges.preemptions),
        ("prefix_cache_queries", "Prompt tokens looked up", gauges.prefix_queries),
        ("prefix_cache_hits", "Of these, found with their KV", gauges.prefix_hits),
        ("spec_decode_num_drafts", "Guesses verified", stats.drafts),
        ("spec_decode_num_draft_tokens", "Tokens guessed", gauges.drafted),
        ("spec_decode_num_accepted_tokens", "Of these, accepted", gauges.accepted),
        ("executor_losses", "Executors lost", stats.executor_losses),
        ("steps", "Engine steps committed", stats.steps),
    ):
        yield CounterMetricFamily(f"twostroke_{name}", text, value=value)
    success = {reason: stats.ended[reason] for reason in SUCCESSES}
    yield _count_by("request_success", "Requests finished", "finished_reason", success)
    kinds = {"recompute": gauges.preemptions - gauges.swaps, "swap": gauges.swaps}
    yield _count_by("preemptions_by_kind", "Where lost KV comes from again", "kind", kinds)
    yield _count_by(
        "engine_seconds", "Life of the engine's thread, by part", "part", stats.part_seconds
    )


def _collect_attribution(totals: AttributionTotals | None) -> Iterator[Metric]:
    """What steps had to compute, the least that takes on this machine, and what it took."""
    if totals is None:
        return
    for name, text, value in (
        ("step_flops", "Operations of all steps, a multiply-add being two", totals.flops),
        ("step_bytes", "Bytes of weights and KV that all steps had to move", totals.bytes),
        ("step_floor_seconds", "The least time for that; 0 while unknown", totals.floor_seconds),
        ("step_wall_seconds", "From each step's begin to the next", totals.wall_seconds),
    ):
        yield CounterMetricFamily(f"twostroke_{name}", text, value=value)
    yield _count_by("step_part_seconds", "Time of steps by part", "part", totals.part_seconds)
    yield _count_by(
        "step_cause_seconds", "Time of steps by what bound it", "cause", totals.cause_seconds
    )


def _collect_traffic(traffic: Traffic) -> Iterator[Metric]:
    yield GaugeMetricFamily(
        "twostroke_http_connections", "Open connections", value=traffic.connections
    )
    yield _count_by(
        "requests_refused", "Requests answered with an error", "reason", traffic.refusals
    )


def _count_by(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    counter = CounterMetricFamily(f"twostroke_{name}", text, labels=[label])
    for key, value in values.items():
        counter.add_metric([key], value)
    return counter


def _to_histogram(name: str, text: str, data: HistogramData) -> Metric:
    bounds = [*(str(bound) for bound in data.bounds), "+Inf"]
    buckets = list(zip(bounds, accumulate(data.counts), strict=True))
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=data.sum)
