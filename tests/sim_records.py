"""Records made by hand, for tests of what is read from them."""

from __future__ import annotations

from dataclasses import dataclass

from twostroke.sim.arrivals import Arrival
from twostroke.sim.records import FATES, Life, Records, Sample

MS = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One request's life in ms: what a test wants to say of it."""

    arrival: int = 0
    first: int = 0
    gaps: tuple[int, ...] = ()
    fate: str = "finished"
    prompt: int = 100
    tenant: str = ""
    ttft_target: int = 0
    itl_target: int = 0
    replica: int = 0
    cached: int = 0
    preemptions: int = 0


def make_records(*runs: Run, replicas: int = 1) -> Records:
    """Records of these lives; a run whose `first` is 0 never had a token."""
    records = Records(replicas)
    for index, run in enumerate(runs):
        arrival = Arrival(
            time_ns=run.arrival * MS,
            prompt_tokens=run.prompt,
            new_tokens=1 + len(run.gaps),
            tenant=run.tenant,
            ttft_ns=run.ttft_target * MS,
            itl_ns=run.itl_target * MS,
        )
        records.add(arrival, index)
        last = run.first + sum(run.gaps)
        life = Life(
            index=index,
            arrival=arrival,
            replica=run.replica,
            planned_ns=max(run.first - 1, 0) * MS,
            first_token_ns=run.first * MS,
            last_token_ns=last * MS,
            worst_gap_ns=max(run.gaps, default=0) * MS,
            cached_tokens=run.cached,
            new_tokens=1 + len(run.gaps) if run.first else 0,
            preemptions=run.preemptions,
        )
        for gap in run.gaps:
            records.gaps.add(gap * MS)
        records.end(life, max(last, run.arrival) * MS, FATES.index(run.fate))
        records.end_ns = max(records.end_ns, last * MS)
    return records


def add_sample(records: Records, time_ms: int, kv_blocks: int, replica: int = 0) -> None:
    """A state at an instant, `time_ms` on the grid of 10."""
    records.samples.add(Sample(time_ms * MS, replica, 3, 2, kv_blocks, 130, 128))
