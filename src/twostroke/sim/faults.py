"""Faults: what goes wrong in a simulation, as data that is known before it begins.

A fault names its time or step, so a run with faults repeats exactly, and steps can be taken in
strides that end before it. Drawing them from a seed is the only randomness; it happens here and
nowhere later.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from random import Random

from twostroke.sim.arrivals import Arrival


@dataclass(frozen=True, slots=True)
class ExecutorDies:
    """The executor of `replica` is gone at `time_ns`, and with it the step it is in."""

    time_ns: int
    replica: int


@dataclass(frozen=True, slots=True)
class ExecutorHangs:
    """From `time_ns` on the executor of `replica` answers nothing: a deadline has to tell."""

    time_ns: int
    replica: int


@dataclass(frozen=True, slots=True)
class ExecutorSlows:
    """Steps of `replica` that begin within `lasting_ns` of `time_ns` take `percent` % as long."""

    time_ns: int
    replica: int
    lasting_ns: int
    percent: int


@dataclass(frozen=True, slots=True)
class ClockJumps:
    """At `time_ns` the clock is suddenly `by_ns` later: what was due meanwhile comes late."""

    time_ns: int
    by_ns: int


TimedFault = ExecutorDies | ExecutorHangs | ExecutorSlows | ClockJumps


@dataclass(frozen=True, slots=True)
class StepDies:
    """The executor of `replica` dies half-way through step `step` of the replica's life, from 1."""

    step: int
    replica: int


Fault = TimedFault | StepDies


@dataclass(frozen=True, slots=True)
class FaultRates:
    """How many faults to expect of each kind: per replica, but clock jumps in all."""

    deaths: float = 0.0
    hangs: float = 0.0
    slowdowns: float = 0.0
    jumps: float = 0.0


def draw_faults(seed: int, replicas: int, until_ns: int, rates: FaultRates) -> list[Fault]:
    """Faults at times drawn evenly over 1 … until_ns, in order of time."""
    random, drawn = Random(f"faults {seed}"), list[TimedFault]()
    for replica in range(replicas):
        for _ in range(_draw_count(random, rates.deaths)):
            drawn.append(ExecutorDies(random.randint(1, until_ns), replica))
        for _ in range(_draw_count(random, rates.hangs)):
            drawn.append(ExecutorHangs(random.randint(1, until_ns), replica))
        for _ in range(_draw_count(random, rates.slowdowns)):
            time_ns, lasting_ns = random.randint(1, until_ns), random.randint(1, until_ns)
            drawn.append(ExecutorSlows(time_ns, replica, lasting_ns, random.randint(110, 1000)))
    for _ in range(_draw_count(random, rates.jumps)):
        drawn.append(ClockJumps(random.randint(1, until_ns), random.randint(1, until_ns)))
    drawn.sort(key=lambda fault: fault.time_ns)
    return [*drawn]


def draw_cancels(
    arrivals: Iterable[Arrival], seed: int, share: float, mean_ns: int
) -> Iterator[Arrival]:
    """The arrivals, of which that share is given up after times with that mean (exponential)."""
    random = Random(f"cancels {seed}")
    for arrival in arrivals:
        if random.random() < share:
            after_ns = max(1, int(random.expovariate(1 / mean_ns)))
            arrival = replace(arrival, cancel_after_ns=after_ns)
        yield arrival


def _draw_count(random: Random, expected: float) -> int:
    """A whole number whose mean is `expected`: one of the two beside it."""
    return int(expected) + (random.random() < expected % 1)
