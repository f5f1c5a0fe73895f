"""What the lab's experiments run on: a built-in model on a data sheet's device.

Owns how a model, a device and a few sizes become a replica of the simulator, with the scheduler
that serves. Counts no work (spec/work.py does) and predicts no time (plan/roofline_cost.py does).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from twostroke.core.ports import ExecutorInfo
from twostroke.core.types import SchedulerConfig
from twostroke.errors import InvalidParameter
from twostroke.plan.roofline import get_working_device
from twostroke.plan.roofline_cost import CAPTURED, Overheads, RooflineCost
from twostroke.policies.names import PolicyChoice, build_policies
from twostroke.sim.arrivals import Arrival
from twostroke.sim.cluster import Cluster
from twostroke.sim.faults import Fault
from twostroke.sim.records import Records
from twostroke.sim.replica import ReplicaSpec
from twostroke.sim.routers import make_router
from twostroke.spec.catalog import get_known_model
from twostroke.spec.device import DeviceSpec, get_known_device
from twostroke.spec.model import ModelSpec
from twostroke.spec.work import Floor, RowShape, StepShape, StepWork, get_floor_seconds
from twostroke.spec.work import get_step_work as _get_step_work

BLOCK_TOKENS = 16
KEPT_BACK = 0.10  # of a device's memory, as in `twostroke simulate`
_MAX_ITERATIONS = 1024


@dataclass(frozen=True, slots=True)
class Station:
    """A model on a device: its counts, its floor, and its predicted times."""

    spec: ModelSpec
    device: DeviceSpec
    cost: RooflineCost

    def get_work(self, rows: int, new_tokens: int, context: int) -> StepWork:
        """A step of equal rows, each with new tokens behind a context, and one draw a row."""
        return _get_step_work(self.spec, _shape(rows, new_tokens, context))

    def get_floor(self, rows: int, new_tokens: int, context: int) -> Floor:
        """The least time of that step on one device."""
        return get_floor_seconds(self.get_work(rows, new_tokens, context), self.device)

    def predict_s(self, rows: int, new_tokens: int, context: int) -> float:
        """Its time with an engine's losses."""
        return self.predict_mixed_s([(rows, new_tokens, context)])

    def predict_mixed_s(self, groups: Sequence[tuple[int, int, int]]) -> float:
        """The time of a step of several groups of equal rows."""
        totals = [
            self.cost.get_row_totals(new_tokens, context, 1)
            for rows, new_tokens, context in groups
            for _ in range(rows)
        ]
        summed = type(totals[0])._make(map(sum, zip(*totals, strict=True)))
        return self.cost.predict_ns(summed) / 1e9


def open_station(
    model: str, device: str, overheads: Overheads = CAPTURED, tp: int = 1, weights: str = "bf16"
) -> Station:
    """A built-in model on a known device. Raises UnknownModel, DeviceError, InvalidParameter."""
    spec = get_known_model(model, weights)
    known = get_known_device(device)
    return Station(spec, get_working_device(known), RooflineCost(spec, known, tp, overheads))


def _shape(rows: int, new_tokens: int, context: int) -> StepShape:
    return StepShape((RowShape(new_tokens, context, 1),) * rows)


def get_pool_tokens(station: Station) -> int:
    """Tokens of KV that one device holds beside the weights. Raises InvalidParameter for none."""
    spec, device = station.spec, station.device
    free = int(device.memory_bytes * (1 - KEPT_BACK)) - spec.weight_bytes
    tokens = free // spec.get_kv_bytes_per_token()
    if tokens < BLOCK_TOKENS:
        raise InvalidParameter("device", f"{device.name} has no room for {spec.name}")
    return tokens


def build_replica(
    station: Station,
    policies: PolicyChoice | None = None,
    *,
    step_tokens: int = 2048,
    max_rows: int = 256,
    pool_tokens: int = 0,
    reserve_tokens: int = 0,
) -> ReplicaSpec:
    """A replica of the simulator; pool_tokens: 0 for what the weights leave."""
    spec = station.spec
    num_blocks = (pool_tokens or get_pool_tokens(station)) // BLOCK_TOKENS
    block_bytes = BLOCK_TOKENS * spec.get_kv_bytes_per_token()
    config = SchedulerConfig(
        num_blocks=num_blocks,
        block_tokens=BLOCK_TOKENS,
        step_tokens=step_tokens,
        max_rows=max_rows,
        context_tokens=spec.context_tokens,
        vocab_size=spec.vocab_size,
        reserve_tokens=reserve_tokens,
    )
    info = ExecutorInfo(
        device=station.device.name,
        backend="simulated",
        threads=0,
        num_blocks=num_blocks,
        block_tokens=BLOCK_TOKENS,
        kv_bytes=num_blocks * block_bytes,
        weight_bytes=spec.weight_bytes,
        max_step_tokens=step_tokens,
    )
    make_policies = partial(
        build_policies,
        policies or PolicyChoice(),
        step_tokens=step_tokens,
        block_bytes=block_bytes,
        cost=station.cost,
    )
    return ReplicaSpec(
        config, info, station.cost, make_policies=make_policies, max_iterations=_MAX_ITERATIONS
    )


def simulate(
    replica: ReplicaSpec, arrivals: Iterable[Arrival], count: int = 1, faults: Iterable[Fault] = ()
) -> Records:
    """Let all arrivals pass through `count` such replicas behind one router."""
    return Cluster(replica, count, make_router("least-tokens", count), faults).run(arrivals)


def draw_arrivals(count: int, rate: float, lengths: tuple[int, int], seed: int) -> list[Arrival]:
    """`count` requests, Poisson at `rate` a second (0: all at once), of exponential lengths.

    lengths: mean prompt and mean answer, each cut at four times itself.
    """
    rng = random.Random(seed)
    now_s, drawn = 0.0, []
    for _ in range(count):
        now_s += rng.expovariate(rate) if rate else 0.0
        prompt, answer = (min(4 * mean, 1 + int(rng.expovariate(1 / mean))) for mean in lengths)
        drawn.append(Arrival(round(now_s * 1e9), prompt, answer))
    return drawn
