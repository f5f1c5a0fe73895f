"""Cluster: replicas behind a router on one virtual clock, fed with arrivals and faults.

Owns the order of events and no scheduling: what happens in a replica is decided by the engine that
serves. At one time, what comes from outside (arrivals, cancels, faults) goes before what executors
answer, so the order does not depend on how many steps a plan asked for. Arrivals are pulled when
their time has come, and nothing of them is kept but records.
"""

from __future__ import annotations

import gc
import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial

from twostroke.errors import InvalidParameter
from twostroke.sim.arrivals import Arrival
from twostroke.sim.clock import NEVER_NS, VirtualClock
from twostroke.sim.faults import (
    ClockJumps,
    ExecutorDies,
    ExecutorHangs,
    ExecutorSlows,
    Fault,
    StepDies,
    TimedFault,
)
from twostroke.sim.records import FATES, Life, Records, StepSamples
from twostroke.sim.replica import Replica, ReplicaSpec
from twostroke.sim.routers import RoundRobin, Router
from twostroke.spec.cost import StepCost

_COLLECT_AFTER = 100_000  # objects
_REJECTED = FATES.index("rejected")


@dataclass(frozen=True, slots=True)
class Part:
    """Those of a cluster's replicas whose number, divided by `of`, leaves `index`."""

    index: int = 0
    of: int = 1

    def has(self, replica: int) -> bool:
        """True for a replica of this part."""
        return replica % self.of == self.index


_WHOLE = Part()


class Cluster:
    """`count` replicas made of `spec` behind `router`; `run` may be called once.

    part: only its replicas are there, and what is sent to others is not simulated. That leaves them
    what they are in the whole only where no replica's doings reach another: behind round robin,
    without faults.

    Raises InvalidParameter for a fault of a replica that does not exist, or an executor that
    hangs where no deadline would ever tell.
    """

    def __init__(
        self,
        spec: ReplicaSpec,
        count: int,
        router: Router,
        faults: Iterable[Fault] = (),
        samples: StepSamples | None = None,
        part: Part = _WHOLE,
    ) -> None:
        listed = list(faults)
        is_apart = isinstance(router, RoundRobin) and not listed and spec.step_deadline_ns is None
        assert part == _WHOLE or is_apart, "replicas that depend on each other have no parts"
        self.clock = VirtualClock()
        self.records = Records(count, samples)
        self._router = router
        self._due: dict[int, Replica] = {}
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._order = itertools.count()
        spec = replace(spec, cost=_RememberedCost(spec.cost))
        self.replicas = {
            index: Replica(index, spec, self.clock, self.records, router.end, self._note_due)
            for index in range(count)
            if part.has(index)
        }
        self._open = list(self.replicas.values())
        self._take_faults(spec, listed)

    def run(self, arrivals: Iterable[Arrival]) -> Records:
        """Let everything happen that follows from `arrivals`, which come in order of time.

        Requests that nothing can end any more stay "live". Raises InvalidParameter for an arrival
        before the one that came before it.
        """
        thresholds = gc.get_threshold()
        # What a simulation makes refers to itself hardly ever: looking for what does took a fifth
        # of the time with a thousand replicas.
        gc.set_threshold(_COLLECT_AFTER, *thresholds[1:])
        try:
            self._run(arrivals)
        finally:
            gc.set_threshold(*thresholds)
        return self.records

    def _run(self, arrivals: Iterable[Arrival]) -> None:
        clock, events, due = self.clock, self._events, self._due
        pulled = _check_order(arrivals)
        index, arrival = 0, next(pulled, None)
        while True:
            arrival_ns = NEVER_NS if arrival is None else arrival.time_ns
            event_ns = events[0][0] if events else NEVER_NS
            outside_ns = min(arrival_ns, event_ns)
            # What came from outside at one time is heard together.
            if due and (outside_ns > clock.now_ns() or clock.next_ns < outside_ns):
                self._pump_due()
            elif clock.next_ns < outside_ns:
                clock.run_next()
                self._pump_due()
            elif outside_ns == NEVER_NS:
                return
            else:
                clock.move_to(outside_ns)
                if event_ns <= arrival_ns:
                    heapq.heappop(events)[2]()
                elif arrival is not None:
                    self._arrive(arrival, index)
                    index, arrival = index + 1, next(pulled, None)

    def _arrive(self, arrival: Arrival, index: int) -> None:
        self.records.add(arrival, index)
        number = self._router.choose(arrival)
        if number < 0:
            self.records.end(Life(index, arrival), self.clock.now_ns(), _REJECTED)
            return
        replica = self.replicas.get(number)
        if replica is None:  # it is simulated elsewhere
            return
        if arrival.cancel_after_ns:
            time_ns = arrival.time_ns + arrival.cancel_after_ns
            self._at(time_ns, [replica], partial(replica.cancel, index))
        replica.submit(arrival, index)

    def _note_due(self, replica: Replica) -> None:
        self._due[replica.index] = replica

    def _pump_due(self) -> None:
        """Pump the replicas to which something has happened."""
        due, self.records.end_ns = list(self._due.values()), self.clock.now_ns()
        self._due.clear()
        for replica in due:
            replica.pump()
            if replica.is_closed and replica in self._open:
                self._open.remove(replica)
                self._router.close(replica.index)

    # ---- faults ---------------------------------------------------------------------------------

    def _take_faults(self, spec: ReplicaSpec, faults: list[Fault]) -> None:
        dies_at: dict[int, list[int]] = {}
        for fault in faults:
            if not isinstance(fault, ClockJumps) and not 0 <= fault.replica < len(self.replicas):
                raise InvalidParameter("faults", f"{fault} is of none of {len(self.replicas)}")
            if isinstance(fault, ExecutorHangs) and spec.step_deadline_ns is None:
                raise InvalidParameter("faults", f"{fault} needs a step_deadline_ns to be noticed")
            if isinstance(fault, StepDies):
                dies_at.setdefault(fault.replica, []).append(fault.step)
            else:
                self._take_timed_fault(fault)
        for replica, steps in dies_at.items():
            self.replicas[replica].die_at(steps)

    def _take_timed_fault(self, fault: TimedFault) -> None:
        if isinstance(fault, ClockJumps):
            everyone = list(self.replicas.values())
            self._at(fault.time_ns, everyone, partial(self.clock.jump, fault.by_ns))
            return
        replica = self.replicas[fault.replica]
        if isinstance(fault, ExecutorSlows):
            end_ns = fault.time_ns + fault.lasting_ns
            self._at(fault.time_ns, [replica], partial(_slow, replica, fault.percent))
            self._at(end_ns, [replica], partial(_slow, replica, 100))
        elif isinstance(fault, ExecutorDies):
            self._at(fault.time_ns, [replica], partial(_lose, replica))
        else:
            self._at(fault.time_ns, [replica], partial(_silence, replica))

    def _at(self, time_ns: int, replicas: list[Replica], act: Callable[[], None]) -> None:
        """Let `act` happen then, to these replicas."""
        for replica in replicas:
            replica.add_barrier(time_ns)
        event: Callable[[], None] = partial(_happen, time_ns, replicas, act)
        heapq.heappush(self._events, (time_ns, next(self._order), event))


class _RememberedCost:
    """A StepCost that keeps the sums of rows: replicas decode at the same positions often."""

    def __init__(self, cost: StepCost) -> None:
        self.get_row_totals = lru_cache(maxsize=1 << 16)(cost.get_row_totals)
        self.predict_ns = cost.predict_ns
        self.predict_run_ns = cost.predict_run_ns
        self.predict_copy_ns = cost.predict_copy_ns


def _happen(time_ns: int, replicas: list[Replica], act: Callable[[], None]) -> None:
    act()
    for replica in replicas:
        replica.pass_barriers(time_ns)


def _slow(replica: Replica, percent: int) -> None:
    replica.executor.slow_percent = percent


def _lose(replica: Replica) -> None:
    replica.executor.lose("the executor died")


def _silence(replica: Replica) -> None:
    replica.executor.silence()


def _check_order(arrivals: Iterable[Arrival]) -> Iterator[Arrival]:
    last_ns = 0
    for arrival in arrivals:
        if arrival.time_ns < last_ns:
            message = f"one at {arrival.time_ns} ns comes behind one at {last_ns} ns"
            raise InvalidParameter("arrivals", message)
        last_ns = arrival.time_ns
        yield arrival
