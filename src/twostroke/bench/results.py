"""What a benchmark found: measured values, medians and spreads, and what is missing and why."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from twostroke.bench.lineup import OURS
from twostroke.bench.servers import Served


@dataclass(frozen=True, slots=True)
class Sample:
    """One run of a workload: its seconds, and the floor by the limits of the same round."""

    seconds: float
    floor: float


@dataclass(frozen=True, slots=True)
class Agreement:
    """A peer's greedy tokens beside ours: rows that begin alike, and leading tokens that are equal.

    Once a row has one other token, what follows is another text, so only leading tokens count.
    """

    first_equal: int
    rows: int
    leading_equal: int
    tokens: int

    def __add__(self, other: Agreement) -> Agreement:
        """Both together."""
        return Agreement(
            self.first_equal + other.first_equal,
            self.rows + other.rows,
            self.leading_equal + other.leading_equal,
            self.tokens + other.tokens,
        )


@dataclass(slots=True)
class Measurement:
    """One workload's samples by engine.

    agreed: by peer, how its tokens compare with ours. missing: by engine, why it was not measured.
    """

    name: str
    timed_tokens: int
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    agreed: dict[str, Agreement] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def get_rate(self, engine: str) -> tuple[float, float, float]:
        """Tokens per second: median, lowest, highest."""
        rates = sorted(self.timed_tokens / one.seconds for one in self.samples[engine])
        return statistics.median(rates), rates[0], rates[-1]

    def get_share(self, engine: str) -> float:
        """Median share of the limit measured in the same round."""
        return statistics.median(one.floor / one.seconds for one in self.samples[engine])

    def get_ratio(self, peer: str) -> float:
        """Our rate over a peer's: the ratio of medians."""
        return self.get_rate(OURS)[0] / self.get_rate(peer)[0]

    def describe(self) -> dict[str, Any]:
        """Plain values."""
        row: dict[str, Any] = {"workload": self.name, "timed_tokens": self.timed_tokens}
        for engine, samples in self.samples.items():
            median, lowest, highest = self.get_rate(engine)
            row[engine] = {
                "tokens_per_s": median,
                "lowest": lowest,
                "highest": highest,
                "rounds": len(samples),
                "share_of_limit": self.get_share(engine),
            }
            if engine != OURS and OURS in self.samples:
                row[engine]["ratio"] = self.get_ratio(engine)
                row[engine]["agreement"] = asdict(self.agreed[engine])
        if self.missing:
            row["not_measured"] = self.missing
        return row


@dataclass(slots=True)
class ModelResult:
    """All that was measured with one model.

    start: medians and ranges of seconds by what was started. peak_bytes: by engine. served: by
    engine. load_floors: by load, the least of `served.get_load_floor`. refused: by engine, why it
    did not start; "NAME server" for its server.
    """

    name: str
    file: str
    file_bytes: int
    measurements: list[Measurement] = field(default_factory=list)
    start: dict[str, Mapping[str, float]] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    kv_bytes: int = 0
    served: dict[str, list[Served]] = field(default_factory=dict)
    load_floors: dict[str, Mapping[str, float]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def find(self, workload: str) -> Measurement | None:
        """A workload's measurement, or None where it was not measured."""
        return next((one for one in self.measurements if one.name == workload), None)

    def get_served(self, engine: str, load: str, value: str) -> list[float]:
        """A value of a load by round; empty where the engine was not measured."""
        rounds = [one.loads.get(load, {}) for one in self.served.get(engine, [])]
        return [float(one[value]) for one in rounds if value in one]

    def get_memory_share(self) -> float | None:
        """Our worker's peak memory over the model's file and the KV pool together."""
        if not self.peak_bytes.get(OURS):
            return None
        return self.peak_bytes[OURS] / (self.file_bytes + self.kv_bytes)

    def describe(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "model": self.name,
            "file": self.file,
            "file_bytes": self.file_bytes,
            "kv_bytes": self.kv_bytes,
            "start": self.start,
            "workloads": [one.describe() for one in self.measurements],
            "served": {
                engine: [
                    {"start_s": one.start_s, "peak_bytes": one.peak_bytes, **one.loads}
                    for one in rounds
                ]
                for engine, rounds in self.served.items()
            },
            "load_floors": self.load_floors,
            "peak_bytes": self.peak_bytes,
            "peak_over_file_and_kv": self.get_memory_share(),
            "not_measured": self.refused,
        }


def summarise(values: Sequence[float]) -> Mapping[str, float]:
    """Median and range of repeated values."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def compare_tokens(ours: Sequence[Any], theirs: Sequence[Any]) -> Agreement:
    """How the tokens of one row, or of a list of rows, compare."""
    if ours and isinstance(ours[0], list):
        rows = [compare_tokens(mine, other) for mine, other in zip(ours, theirs, strict=True)]
        return sum(rows, Agreement(0, 0, 0, 0))
    equal = 0
    for mine, other in zip(ours, theirs, strict=False):
        if mine != other:
            break
        equal += 1
    return Agreement(int(equal > 0), 1, equal, len(ours))
