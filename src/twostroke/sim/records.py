"""Records: what a simulation leaves of each request, and of its steps.

Owns columns of plain numbers, so that a million requests fit in little memory; nothing here
refers to a request, plan or replica. A request's row is written once, when it ends. Gaps between
tokens are counted in a histogram, and the state of the replicas is kept at instants on a grid whose
period doubles whenever there are too many. What is recorded does not depend on the order in which
replicas report, nor on whether steps were taken one by one or in strides, nor on whether all
replicas reported here or some of them to other records that were merged.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from twostroke.errors import InvalidParameter
from twostroke.sim.arrivals import Arrival

# What became of a request: `fate` is an index into this.
FATES = ("live", "finished", "rejected", "cancelled", "failed")

# column → what array.array stores it as. Times are on the simulation's clock; 0 where a thing
# never happened. replica: -1 when no replica took the request.
REQUEST_COLUMNS = {
    "arrival_ns": "q",
    "planned_ns": "q",  # the start of the first step that had a row of it
    "first_token_ns": "q",
    "last_token_ns": "q",
    "ended_ns": "q",
    "worst_gap_ns": "q",  # longest time between two of its tokens
    "prompt_tokens": "i",
    "cached_tokens": "i",  # of the prompt, found in the prefix cache when it was first planned
    "new_tokens": "i",
    "preemptions": "i",
    "replica": "i",
    "tenant": "i",  # index into Records.tenants
    "priority": "i",
    "fate": "b",
    "ttft_target_ns": "q",
    "itl_target_ns": "q",
}
# Of these, what is known when a request arrives; the others are written when it ends.
_ARRIVAL_COLUMNS = (
    "arrival_ns",
    "prompt_tokens",
    "tenant",
    "priority",
    "ttft_target_ns",
    "itl_target_ns",
)
_CHUNK = 4096
_SUB_BITS = 8


class GapHistogram:
    """Weighted counts of durations, 256 buckets to each doubling: percentiles within 0.2 %.

    Buckets come from shifts of integers, not from logarithms, so every machine fills the same.
    """

    __slots__ = ("_counts",)

    def __init__(self) -> None:
        self._counts = [0] * (64 << _SUB_BITS)

    @property
    def total(self) -> int:
        """Weight of all that was added."""
        return sum(self._counts)

    def add(self, gap_ns: int, weight: int = 1) -> None:
        """Count one duration, in ns and not negative."""
        self._counts[_get_bucket(gap_ns)] += weight

    def add_many(self, gaps_ns: Sequence[int], weight: int) -> None:
        """Count each of some durations `weight` times."""
        if not gaps_ns:
            return
        counts = self._counts
        # Steps of one stride take almost the same time: mostly all fall into one bucket.
        lowest, highest = _get_bucket(min(gaps_ns)), _get_bucket(max(gaps_ns))
        if lowest == highest:
            counts[lowest] += weight * len(gaps_ns)
            return
        for gap_ns in gaps_ns:
            counts[_get_bucket(gap_ns)] += weight

    def merge(self, other: GapHistogram) -> None:
        """Add all that `other` counted."""
        self._counts = [mine + more for mine, more in zip(self._counts, other._counts, strict=True)]

    def get_percentile_ns(self, percent: float) -> float:
        """The duration that `percent` % of the weight does not exceed; 0.0 when empty."""
        counts = np.cumsum(np.asarray(self._counts, dtype=np.int64))
        if not counts[-1]:
            return 0.0
        rank = max(1, int(np.ceil(percent / 100 * counts[-1])))
        return _get_middle_ns(int(np.searchsorted(counts, rank)))

    def get_counts(self) -> list[tuple[float, int]]:
        """(duration in ns, weight) of every bucket that is not empty, ascending."""
        return [(_get_middle_ns(bucket), n) for bucket, n in enumerate(self._counts) if n]


def _get_bucket(gap_ns: int) -> int:
    shift = gap_ns.bit_length() - _SUB_BITS - 1
    return gap_ns if shift <= 0 else (shift << _SUB_BITS) + (gap_ns >> shift)


def _get_middle_ns(bucket: int) -> float:
    shift = max((bucket >> _SUB_BITS) - 1, 0)
    lowest = (bucket - (shift << _SUB_BITS)) << shift
    return lowest + ((1 << shift) - 1) / 2


@dataclass(slots=True)
class Life:
    """What is noted of a request while it lives; `index` is its row."""

    index: int
    arrival: Arrival
    replica: int = -1
    planned_ns: int = 0
    first_token_ns: int = 0
    last_token_ns: int = 0
    worst_gap_ns: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    preemptions: int = 0


class Sample(NamedTuple):
    """One replica's state at the begin of the step that ran at an instant of the grid.

    running: rows of the step. waiting: sequences that waited when it began. kv_blocks: held, those
    of this step included. prefill_tokens: of rows with more than one. A tuple, because many are
    made and few are kept.
    """

    time_ns: int
    replica: int
    running: int
    waiting: int
    kv_blocks: int
    step_tokens: int
    prefill_tokens: int


@dataclass(slots=True)
class ReplicaTotals:
    """Sums over one replica's life.

    busy_ns: time in steps, each from its start to its answer. steps: of them, iterations counted.
    lost_executors: how often one was replaced or given up.
    """

    busy_ns: int = 0
    steps: int = 0
    step_rows: int = 0
    step_tokens: int = 0
    prefill_tokens: int = 0
    swapped_blocks: int = 0
    lost_executors: int = 0

    def merge(self, other: ReplicaTotals) -> None:
        """Add the sums of `other`."""
        for one in fields(self):
            setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))


@dataclass(slots=True)
class StepSamples:
    """Samples at the multiples of `period_ns`, at most `most` of them; others are not taken.

    When there are more, every second instant is dropped and the period doubles. Which remain
    depends on all samples ever offered and not on their order.
    """

    most: int = 1 << 16
    period_ns: int = 10_000_000
    _kept: list[Sample] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, sample: Sample) -> None:
        """Keep a sample if its instant is still on the grid."""
        if sample.time_ns % self.period_ns == 0:
            self._kept.append(sample)
            while len(self._kept) > self.most:
                self._double()

    def merge(self, other: StepSamples) -> None:
        """Keep what is kept when all that `other` was offered is offered here too.

        Both began with the same `most` and period. What either has dropped is off the grid of all,
        because more samples never make the period shorter.
        """
        assert self.most == other.most, "samples of other bounds"
        while self.period_ns < other.period_ns:
            self._double()
        for sample in other._kept:
            self.add(sample)

    def get_columns(self) -> dict[str, NDArray[np.int64]]:
        """The samples by column, ordered by time and replica."""
        rows = np.array(sorted(self._kept), np.int64).reshape(-1, len(Sample._fields))
        return {name: rows[:, place] for place, name in enumerate(Sample._fields)}

    def _double(self) -> None:
        self.period_ns *= 2
        self._kept = [one for one in self._kept if one.time_ns % self.period_ns == 0]


class Records:
    """All that a simulation leaves; `replicas` is how many it had.

    tenants: names that the tenant column counts through. totals: by replica. end_ns: when the
    last event happened.
    """

    def __init__(self, replicas: int, samples: StepSamples | None = None) -> None:
        self.gaps = GapHistogram()
        self.samples = StepSamples() if samples is None else samples
        self.totals = [ReplicaTotals() for _ in range(replicas)]
        self.tenants: list[str] = []
        self.end_ns = 0
        self._tenant_codes: dict[str, int] = {}
        self._count = 0
        self._columns = {name: array(code) for name, code in REQUEST_COLUMNS.items()}

    def __len__(self) -> int:
        return self._count

    def add(self, arrival: Arrival, index: int) -> None:
        """A request arrived: its row exists from now on, and is "live". Numbers only grow."""
        if index >= len(self._columns["fate"]):
            self._grow(index)
        self._count = max(self._count, index + 1)
        columns = self._columns
        columns["arrival_ns"][index] = arrival.time_ns
        columns["prompt_tokens"][index] = arrival.prompt_tokens
        columns["tenant"][index] = self._get_tenant_code(arrival.tenant)
        columns["priority"][index] = arrival.priority
        columns["ttft_target_ns"][index] = arrival.ttft_ns
        columns["itl_target_ns"][index] = arrival.itl_ns
        columns["replica"][index] = -1

    def end(self, life: Life, ended_ns: int, fate: int) -> None:
        """Write the row of a request that has ended; `fate` is an index into FATES."""
        columns, index = self._columns, life.index
        columns["planned_ns"][index] = life.planned_ns
        columns["first_token_ns"][index] = life.first_token_ns
        columns["last_token_ns"][index] = life.last_token_ns
        columns["ended_ns"][index] = ended_ns
        columns["worst_gap_ns"][index] = life.worst_gap_ns
        columns["cached_tokens"][index] = life.cached_tokens
        columns["new_tokens"][index] = life.new_tokens
        columns["preemptions"][index] = life.preemptions
        columns["replica"][index] = life.replica
        columns["fate"][index] = fate

    def merge(self, other: Records) -> None:
        """Add what `other` recorded of the same arrivals: requests that ended there, and steps.

        No request may have ended in both. Raises InvalidParameter, and changes nothing, when the
        arrivals were not the same.
        """
        mine, more = self._view_columns(), other._view_columns()
        if self.tenants != other.tenants or not all(
            np.array_equal(mine[name], more[name]) for name in _ARRIVAL_COLUMNS
        ):
            raise InvalidParameter(
                "arrivals", "differ between parts of one simulation: did the trace's file change?"
            )
        ended = np.flatnonzero(more["fate"])
        assert not mine["fate"][ended].any(), "a request ended twice"
        for name in REQUEST_COLUMNS.keys() - set(_ARRIVAL_COLUMNS):
            mine[name][ended] = more[name][ended]
        self.gaps.merge(other.gaps)
        self.samples.merge(other.samples)
        for totals, added in zip(self.totals, other.totals, strict=True):
            totals.merge(added)
        self.end_ns = max(self.end_ns, other.end_ns)

    def get_columns(self) -> dict[str, NDArray[np.int64]]:
        """The requests by column, in the order of their numbers."""
        return {
            name: np.array(column[: self._count], np.int64)
            for name, column in self._columns.items()
        }

    def get_tpots_ns(self) -> NDArray[np.float64]:
        """Mean time between the tokens of each request that has at least two (TPOT)."""
        columns = self.get_columns()
        several = columns["new_tokens"] > 1
        lasted_ns = (columns["last_token_ns"] - columns["first_token_ns"])[several]
        tpots_ns: NDArray[np.float64] = lasted_ns / (columns["new_tokens"][several] - 1)
        return tpots_ns

    def count_fates(self) -> dict[str, int]:
        """Requests by fate."""
        counts = np.bincount(self.get_columns()["fate"], minlength=len(FATES))
        return {name: int(count) for name, count in zip(FATES, counts, strict=True)}

    def _view_columns(self) -> dict[str, NDArray[np.signedinteger]]:
        """The columns themselves, not copies; no request may be added while a view is held."""
        return {
            name: np.frombuffer(self._columns[name], np.dtype(code))[: self._count]
            for name, code in REQUEST_COLUMNS.items()
        }

    def _grow(self, index: int) -> None:
        count = (index // _CHUNK + 1) * _CHUNK
        for column in self._columns.values():
            column.frombytes(bytes(column.itemsize * (count - len(column))))

    def _get_tenant_code(self, tenant: str) -> int:
        code = self._tenant_codes.get(tenant)
        if code is None:
            code = self._tenant_codes[tenant] = len(self.tenants)
            self.tenants.append(tenant)
        return code
