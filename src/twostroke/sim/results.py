"""Results: what the records of a simulation amount to.

Owns the definitions, the same as the engine's: TTFT from arrival to the first token, TPOT the mean
time between a request's tokens, ITL each of those times alone, end to end from arrival to the last
token. A percentile is the smallest value that so many percent do not exceed; no value is
interpolated. Reads the records and changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twostroke.sim.records import FATES, Records

PERCENTILES = (50, 90, 99)
FINISHED = FATES.index("finished")
Columns = Mapping[str, NDArray[np.int64]]


@dataclass(frozen=True, slots=True)
class Spread:
    """Percentiles of durations, in seconds; `count` durations, none when it is 0."""

    p50_s: float = 0.0
    p90_s: float = 0.0
    p99_s: float = 0.0
    count: int = 0


@dataclass(frozen=True, slots=True)
class Goodput:
    """Requests that kept what was asked of them; a target of 0 was not set.

    met: finished, with TTFT and TPOT at most their targets. smooth: of those, none of whose gaps
    between tokens exceeded the ITL target. share: of all requests that were sent.
    """

    ttft_target_s: float
    itl_target_s: float
    met: int
    smooth: int
    share: float
    requests_per_s: float
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class ReplicaUse:
    """Shares over the replicas. busy: of the simulated time that a replica spent in steps.

    kv: of its pool's blocks that were held while it worked.
    """

    replicas: int
    busy_mean: float
    busy_least: float
    busy_most: float
    kv_mean: float
    kv_most: float
    steps: int
    rows_per_step: float
    tokens_per_step: float
    prefill_share: float
    swapped_blocks: int
    lost_executors: int


@dataclass(frozen=True, slots=True)
class Rates:
    """What went through in the simulated seconds, from the start to the last event."""

    requests_per_s: float
    prompt_tokens_per_s: float
    new_tokens_per_s: float


@dataclass(frozen=True, slots=True)
class TenantResult:
    """One tenant's requests, tokens and first-token times."""

    tenant: str
    requests: int
    finished: int
    new_tokens: int
    ttft: Spread


@dataclass(frozen=True, slots=True)
class Summary:
    """A whole simulation. queued: from arrival to the first step that computed for the request.

    seconds: simulated; real_seconds: what simulating took.
    """

    requests: int
    fates: Mapping[str, int]
    seconds: float
    real_seconds: float
    queued: Spread
    ttft: Spread
    tpot: Spread
    itl: Spread
    end_to_end: Spread
    rates: Rates
    goodput: Goodput
    use: ReplicaUse
    prompt_tokens: int
    new_tokens: int
    cached_tokens: int
    preemptions: int
    tenants: tuple[TenantResult, ...]

    @property
    def speed(self) -> float:
        """Simulated seconds in one real second."""
        return self.seconds / self.real_seconds if self.real_seconds else 0.0


def summarise(records: Records, num_blocks: int, real_seconds: float) -> Summary:
    """All results of a simulation whose replicas had `num_blocks` KV blocks each."""
    columns = records.get_columns()
    seconds = records.end_ns / 1e9
    times = get_times(columns)
    counts = np.bincount(columns["fate"], minlength=len(FATES))
    finished = columns["fate"] == FINISHED
    prompt_tokens, new_tokens = (int(columns[n].sum()) for n in ("prompt_tokens", "new_tokens"))
    return Summary(
        requests=len(records),
        fates={name: int(count) for name, count in zip(FATES, counts, strict=True)},
        seconds=seconds,
        real_seconds=real_seconds,
        queued=get_spread(times["queued_s"]),
        ttft=get_spread(times["ttft_s"]),
        tpot=get_spread(times["tpot_s"]),
        itl=_get_gap_spread(records),
        end_to_end=get_spread(times["end_to_end_s"]),
        rates=Rates(
            _divide(int(finished.sum()), seconds),
            _divide(int(columns["prompt_tokens"][times["has_first"]].sum()), seconds),
            _divide(new_tokens, seconds),
        ),
        goodput=_judge(columns, times, seconds),
        use=_measure_use(records, num_blocks),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        cached_tokens=int(columns["cached_tokens"].sum()),
        preemptions=int(columns["preemptions"].sum()),
        tenants=_divide_tenants(records, columns, times),
    )


def get_times(columns: Columns) -> dict[str, NDArray[Any]]:
    """Per-request times in seconds, NaN where a thing never happened, and `has_first`.

    queued_s: until the first step that computed for it. ttft_s: of those that had a token. tpot_s:
    of those that had two. end_to_end_s: of finished ones.
    """
    first, last = columns["first_token_ns"], columns["last_token_ns"]
    new = columns["new_tokens"]
    has_first = new > 0
    was_planned = has_first | (columns["planned_ns"] > 0)
    steps = np.maximum(new - 1, 1)
    return {
        "has_first": has_first,
        "queued_s": np.where(was_planned, columns["planned_ns"] - columns["arrival_ns"], np.nan)
        / 1e9,
        "ttft_s": np.where(has_first, first - columns["arrival_ns"], np.nan) / 1e9,
        "tpot_s": np.where(new > 1, (last - first) / steps, np.nan) / 1e9,
        "end_to_end_s": np.where(
            columns["fate"] == FINISHED, columns["ended_ns"] - columns["arrival_ns"], np.nan
        )
        / 1e9,
    }


def get_spread(seconds: NDArray[np.float64]) -> Spread:
    """Percentiles of some durations, those that are NaN left out."""
    known = seconds[~np.isnan(seconds)]
    if not len(known):
        return Spread()
    found = np.percentile(known, PERCENTILES, method="inverted_cdf").tolist()
    return Spread(found[0], found[1], found[2], len(known))


def _get_gap_spread(records: Records) -> Spread:
    found = [records.gaps.get_percentile_ns(percent) / 1e9 for percent in PERCENTILES]
    return Spread(found[0], found[1], found[2], records.gaps.total)


def find_met(columns: Columns, times: Mapping[str, NDArray[Any]]) -> NDArray[np.bool_]:
    """Which requests finished within their TTFT and TPOT targets; one token has no TPOT to miss."""
    ttft, itl = columns["ttft_target_ns"] / 1e9, columns["itl_target_ns"] / 1e9
    in_time = (ttft == 0) | (times["ttft_s"] <= ttft)
    in_pace = (itl == 0) | np.isnan(times["tpot_s"]) | (times["tpot_s"] <= itl)
    met: NDArray[np.bool_] = (columns["fate"] == FINISHED) & in_time & in_pace
    return met


def _judge(columns: Columns, times: Mapping[str, NDArray[Any]], seconds: float) -> Goodput:
    met = find_met(columns, times)
    itl = columns["itl_target_ns"]
    smooth = met & ((itl == 0) | (columns["worst_gap_ns"] <= itl))
    count = int(met.sum())
    return Goodput(
        ttft_target_s=_get_most(columns["ttft_target_ns"]) / 1e9,
        itl_target_s=_get_most(itl) / 1e9,
        met=count,
        smooth=int(smooth.sum()),
        share=_divide(count, len(met)),
        requests_per_s=_divide(count, seconds),
        tokens_per_s=_divide(int(columns["new_tokens"][met].sum()), seconds),
    )


def _measure_use(records: Records, num_blocks: int) -> ReplicaUse:
    totals, end_ns = records.totals, records.end_ns
    busy = [_divide(each.busy_ns, end_ns) for each in totals]
    held = records.samples.get_columns()["kv_blocks"] / num_blocks
    steps = sum(each.steps for each in totals)
    tokens = sum(each.step_tokens for each in totals)
    return ReplicaUse(
        replicas=len(totals),
        busy_mean=sum(busy) / len(busy),
        busy_least=min(busy),
        busy_most=max(busy),
        kv_mean=float(held.mean()) if len(held) else 0.0,
        kv_most=float(held.max()) if len(held) else 0.0,
        steps=steps,
        rows_per_step=_divide(sum(each.step_rows for each in totals), steps),
        tokens_per_step=_divide(tokens, steps),
        prefill_share=_divide(sum(each.prefill_tokens for each in totals), tokens),
        swapped_blocks=sum(each.swapped_blocks for each in totals),
        lost_executors=sum(each.lost_executors for each in totals),
    )


def _divide_tenants(
    records: Records, columns: Columns, times: Mapping[str, NDArray[Any]]
) -> tuple[TenantResult, ...]:
    """One result for each tenant, in the order they first came; none when there is only one."""
    if len(records.tenants) < 2:
        return ()
    found = []
    for code, name in enumerate(records.tenants):
        own = columns["tenant"] == code
        found.append(
            TenantResult(
                tenant=name,
                requests=int(own.sum()),
                finished=int((columns["fate"][own] == FINISHED).sum()),
                new_tokens=int(columns["new_tokens"][own].sum()),
                ttft=get_spread(times["ttft_s"][own]),
            )
        )
    return tuple(found)


def _get_most(values: NDArray[np.int64]) -> int:
    return int(values.max()) if len(values) else 0


def _divide(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
