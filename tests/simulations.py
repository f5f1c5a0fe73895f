"""Small simulated clusters for tests: sizes, costs and workloads in a few words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from step_costs import LinearStepCost
from twostroke.core.policy import Policies
from twostroke.core.ports import ExecutorInfo
from twostroke.core.types import Row, SchedulerConfig, Token
from twostroke.policies.names import PolicyChoice, build_policies
from twostroke.sim.arrivals import Arrival
from twostroke.sim.cluster import Cluster, Part
from twostroke.sim.faults import Fault
from twostroke.sim.records import Records, StepSamples
from twostroke.sim.replica import ReplicaSpec
from twostroke.sim.routers import make_router

VOCAB_SIZE = 97
BLOCK_BYTES = 32


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
        kv_bytes=num_blocks * BLOCK_BYTES,
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
    choice: PolicyChoice = field(default_factory=PolicyChoice)

    def make_policies(self) -> Policies:
        """New policies of the kinds chosen."""
        config, cost = self.spec.scheduler, self.spec.cost
        return build_policies(
            self.choice, step_tokens=config.step_tokens, block_bytes=BLOCK_BYTES, cost=cost
        )

    def run(self, max_iterations: int, **changes: object) -> Cluster:
        """Run it with strides of at most so many steps; returns the cluster as it was left."""
        cluster = self.make(max_iterations, Part(), **changes)
        cluster.run(self.arrivals)
        return cluster

    def make(self, max_iterations: int, part: Part, **changes: object) -> Cluster:
        """The cluster, or a part of it, before anything has arrived."""
        spec = replace(
            self.spec,
            max_iterations=max_iterations,
            make_policies=self.make_policies,
            **changes,  # type: ignore[arg-type]
        )
        router = make_router(self.router, self.replicas)
        samples = StepSamples(most=64, period_ns=500)
        return Cluster(spec, self.replicas, router, self.faults, samples, part)


def run_one(arrivals: Iterable[Arrival], spec: ReplicaSpec | None = None) -> Records:
    """Run some arrivals on one replica, step by step."""
    return Scene(spec or make_replica_spec(), tuple(arrivals)).run(1).records


def show(records: Records) -> dict[str, object]:
    """Everything recorded, to be compared."""
    return {
        "requests": {name: rows.tolist() for name, rows in records.get_columns().items()},
        "gaps": records.gaps.get_counts(),
        "tenants": records.tenants,
        "totals": records.totals,
        "period_ns": records.samples.period_ns,
        "samples": {name: rows.tolist() for name, rows in records.samples.get_columns().items()},
    }


def get_column(records: Records, name: str) -> Sequence[int]:
    """One column of the requests."""
    values: list[int] = records.get_columns()[name].tolist()
    return values
