"""EngineMetrics: counters and histograms of one engine, as plain data.

It owns the numbers that health pages, `/metrics` and tests read; whoever renders them imports
this, never the other way round. Every recording is one event under one short lock, so a snapshot
taken from any thread is consistent: submitted = live + rejected + the sum of `ended`, always.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from twostroke.engine.attribution import AttributionTotals
from twostroke.engine.outputs import RequestTimings

_SHORT_SECONDS = (
    *(0.0005, 0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06),
    *(0.08, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5),
)
_LONG_SECONDS = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0, 1.5, 2.5, 5.0, 10.0, 20.0, 40.0),
    *(80.0, 160.0, 320.0),
)
_TOKENS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0)

_STEPS_KEPT = 64

# How a request as a whole ended; with n > 1 the first of these that any continuation has.
ENDINGS = ("failed", "cancelled", "length", "stop")


@dataclass(frozen=True, slots=True)
class HistogramData:
    """A histogram's state.

    counts[i] is the number of values v with bounds[i-1] < v <= bounds[i]; the last count, one more
    than there are bounds, is of the values above every bound. sum: of all values.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float

    @property
    def count(self) -> int:
        """Number of values observed."""
        return sum(self.counts)


class Histogram:
    """Counts of observed values in fixed buckets; `bounds` ascend."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def get_data(self) -> HistogramData:
        """The state now, as a value."""
        return HistogramData(self._bounds, tuple(self._counts), self._sum)


@dataclass(frozen=True, slots=True)
class Gauges:
    """What the scheduler holds, and what it has counted since the start.

    running, waiting: continuations. kv_blocks_used: held by somebody; cached: hold a named prefix,
    held or not. held_tokens: with KV in held blocks, a shared one counted for each holder.
    preemptions: all; swaps: of these, KV moved to host memory. prefix_queries, prefix_hits: prompt
    tokens looked up in the prefix cache, and found. drafted, accepted: speculated tokens.
    """

    running: int = 0
    waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    preemptions: int = 0
    kv_blocks_cached: int = 0
    block_tokens: int = 0
    held_tokens: int = 0
    swaps: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True, slots=True)
class EngineStats:
    """One consistent snapshot. Counters only grow; all times are in seconds.

    ended: requests by how they ended, keys `ENDINGS`. live: accepted and not yet ended.
    prompt_tokens and generation_tokens: computed as prompt, and emitted. inter_token: time between
    two emissions of one continuation. drafts: rows of steps that held speculated tokens.
    part_seconds: the life of the engine's thread, by
    `parts.PARTS`. tpot: per request, first token to end over the tokens after
    the first of a continuation. queue, prefill, decode and e2e: per request, submitted → first
    planned → first token → ended, and the whole. attribution: what steps had to compute, and where
    their time went.
    """

    submitted: int
    rejected: int
    live: int
    ended: dict[str, int]
    gauges: Gauges
    prompt_tokens: int
    generation_tokens: int
    executor_losses: int
    steps: int
    drafts: int
    part_seconds: dict[str, float]
    step_seconds: HistogramData
    step_tokens: HistogramData
    ttft_seconds: HistogramData
    inter_token_seconds: HistogramData
    tpot_seconds: HistogramData
    queue_seconds: HistogramData
    prefill_seconds: HistogramData
    decode_seconds: HistogramData
    e2e_seconds: HistogramData
    attribution: AttributionTotals | None = None


class EngineMetrics:
    """Records one engine's events and answers snapshots from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._submitted = self._rejected = self._losses = self._steps = 0
        self._prompt_tokens = self._generation_tokens = self._drafts = 0
        self._ended = dict.fromkeys(ENDINGS, 0)
        self._gauges = Gauges()
        self._part_ns: dict[str, int] = {}
        self._new_steps: list[tuple[int, int]] = []  # tokens and duration, not yet counted
        self._new_intervals_ns: list[int] = []
        self._step_seconds = Histogram(_SHORT_SECONDS)
        self._step_tokens = Histogram(_TOKENS)
        self._inter_token = Histogram(_SHORT_SECONDS)
        self._tpot = Histogram(_SHORT_SECONDS)
        self._ttft = Histogram(_LONG_SECONDS)
        self._queue = Histogram(_LONG_SECONDS)
        self._prefill = Histogram(_LONG_SECONDS)
        self._decode = Histogram(_LONG_SECONDS)
        self._e2e = Histogram(_LONG_SECONDS)

    @property
    def num_ended(self) -> int:
        """Accepted requests that have ended."""
        with self._lock:
            return sum(self._ended.values())

    def record_accepted(self) -> None:
        """One request was submitted and accepted."""
        with self._lock:
            self._submitted += 1

    def record_rejected(self) -> None:
        """One request was submitted and turned away."""
        with self._lock:
            self._submitted += 1
            self._rejected += 1

    def record_step(
        self, step_tokens: int, prompt_tokens: int, duration_ns: int, drafts: int = 0
    ) -> None:
        """One step was committed: tokens it computed, those of them prompt, its time, and rows
        with speculated tokens."""
        with self._lock:
            self._steps += 1
            self._drafts += drafts
            self._prompt_tokens += prompt_tokens
            self._new_steps.append((step_tokens, duration_ns))
            if len(self._new_steps) >= _STEPS_KEPT:
                self._count_new()

    def record_emitted(self, tokens: int, intervals_ns: Sequence[int]) -> None:
        """Tokens were emitted; intervals: per continuation, time since its last emission."""
        with self._lock:
            self._generation_tokens += tokens
            self._new_intervals_ns += intervals_ns

    def record_loss(self) -> None:
        """An executor was lost."""
        with self._lock:
            self._losses += 1

    def record_ended(self, how: str, timings: RequestTimings, continuations: int) -> None:
        """One accepted request ended; `how` is one of ENDINGS."""
        with self._lock:
            self._ended[how] += 1
            self._e2e.observe((timings.ended_ns - timings.submitted_ns) / 1e9)
            if not timings.first_planned_ns:
                return
            self._queue.observe((timings.first_planned_ns - timings.submitted_ns) / 1e9)
            if not timings.first_token_ns:
                return
            self._prefill.observe((timings.first_token_ns - timings.first_planned_ns) / 1e9)
            self._ttft.observe((timings.first_token_ns - timings.submitted_ns) / 1e9)
            decode_s = (timings.ended_ns - timings.first_token_ns) / 1e9
            self._decode.observe(decode_s)
            tokens_each = timings.decode_tokens / continuations
            if tokens_each > 1:
                self._tpot.observe(decode_s / (tokens_each - 1))

    def _count_new(self) -> None:
        """Enter what happened in the last steps into the histograms; under the lock.

        Done for many steps at a time, because a step leaves none of this code in the caches, and
        fetching it again each time would cost more than the counting.
        """
        for tokens, duration_ns in self._new_steps:
            self._step_tokens.observe(tokens)
            self._step_seconds.observe(duration_ns / 1e9)
        for interval_ns in self._new_intervals_ns:
            self._inter_token.observe(interval_ns / 1e9)
        self._new_steps.clear()
        self._new_intervals_ns.clear()

    def set_gauges(self, gauges: Gauges, part_ns: Mapping[str, int] = MappingProxyType({})) -> None:
        """What the scheduler holds now, and where the engine's thread has spent its time."""
        with self._lock:
            self._gauges = gauges
            self._part_ns = dict(part_ns)

    def get_stats(self) -> EngineStats:
        """A consistent snapshot; from any thread."""
        with self._lock:
            self._count_new()
            return EngineStats(
                submitted=self._submitted,
                rejected=self._rejected,
                live=self._submitted - self._rejected - sum(self._ended.values()),
                ended=dict(self._ended),
                gauges=self._gauges,
                prompt_tokens=self._prompt_tokens,
                generation_tokens=self._generation_tokens,
                executor_losses=self._losses,
                steps=self._steps,
                drafts=self._drafts,
                part_seconds={name: ns / 1e9 for name, ns in self._part_ns.items()},
                step_seconds=self._step_seconds.get_data(),
                step_tokens=self._step_tokens.get_data(),
                ttft_seconds=self._ttft.get_data(),
                inter_token_seconds=self._inter_token.get_data(),
                tpot_seconds=self._tpot.get_data(),
                queue_seconds=self._queue.get_data(),
                prefill_seconds=self._prefill.get_data(),
                decode_seconds=self._decode.get_data(),
                e2e_seconds=self._e2e.get_data(),
            )
