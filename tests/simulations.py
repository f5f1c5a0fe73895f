"""Small simulated clusters for tests: sizes, costs and workloads in a few words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from step_costs import LinearStepCost
from twostroke.core.policy import Policies
from twostroke.core.ports import ExecutorInfo
from twostroke.core.types import Row, SchedulerConfig, Token
from twostroke.exec.simulated import draw_zero
from twostroke.sim.arrivals import Arrival
from twostroke.sim.cluster import Cluster
from twostroke.sim.faults import Fault
from twostroke.sim.records import Records, StepSamples
from twostroke.sim.replica import ReplicaSpec
from twostroke.sim.routers import make_router

VOCAB_SIZE = 97


def draw_by_last(row: Row, last: Token, position: int) -> Token:
    """A token that depends on the one before, its position and the request."""
    return (31 * last + 7 * position + int(row.sequence.request)) % VOCAB_SIZE


def make_replica_spec(
    num_blocks: int = 64, block_tokens: int = 4, **sizes: int | str
) -> ReplicaSpec:
    """A replica with small blocks and a linear cost; `sizes` replace fields of SchedulerConfig."""
    config = SchedulerConfig(
        num_blocks=num_blocks,
        block_tokens=block_tokens,
        step_tokens=16,
        max_rows=8,
        context_tokens=256,
        vocab_size=VOCAB_SIZE,
    )
    info = ExecutorInfo(
        device="simulated",
        backend="simulated",
        threads=1,
        num_blocks=num_blocks,
        block_tokens=block_tokens,
        kv_bytes=num_blocks * block_tokens * 8,
        weight_bytes=0,
        max_step_tokens=16,
    )
    return ReplicaSpec(replace(config, **sizes), info, LinearStepCost())  # type: ignore[arg-type]


@dataclass(frozen=True)
class Scene:
    """All that a simulation follows from."""

    spec: ReplicaSpec
    arrivals: tuple[Arrival, ...]
    replicas: int = 1
    router: str = "round-robin"
    faults: tuple[Fault, ...] = ()
    make_policies: Callable[[], Policies] = field(default=Policies)

    def run(self, max_iterations: int, **changes: object) -> Cluster:
        """Run it with strides of at most so many steps; returns the cluster as it was left."""
        spec = replace(
            self.spec,
            max_iterations=max_iterations,
            make_policies=self.make_policies,
            **changes,  # type: ignore[arg-type]
        )
        router = make_router(self.router, self.replicas)
        samples = StepSamples(most=64, period_ns=500)
        cluster = Cluster(spec, self.replicas, router, self.faults, samples)
        cluster.run(self.arrivals)
        return cluster


def run_one(arrivals: Iterable[Arrival], spec: ReplicaSpec | None = None) -> Records:
    """Run some arrivals on one replica, step by step."""
    return Scene(spec or make_replica_spec(), tuple(arrivals)).run(1).records


def show(records: Records) -> dict[str, object]:
    """Everything recorded, to be compared."""
    return {
        "requests": {name: rows.tolist() for name, rows in records.get_columns().items()},
        "gaps": records.gaps.get_counts(),
        "totals": records.totals,
        "period_ns": records.samples.period_ns,
        "samples": {name: rows.tolist() for name, rows in records.samples.get_columns().items()},
    }


def get_column(records: Records, name: str) -> Sequence[int]:
    """One column of the requests."""
    values: list[int] = records.get_columns()[name].tolist()
    return values


__all__ = [
    "Scene",
    "draw_by_last",
    "draw_zero",
    "get_column",
    "make_replica_spec",
    "run_one",
    "show",
]
