"""`twostroke simulate`: requests in, their latencies out, on hardware that is only described.

Composes a source of requests, replicas and a router, lets the cluster run and shows what came of
it. Everything a user can get wrong is refused before anything runs, files that cannot be written
included; the tables are printed before files are written, so that a full disk loses neither.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from twostroke.cli.fault_options import FaultChoice, parse_faults
from twostroke.cli.machine import count_processors
from twostroke.cli.options import SchedulingOptions
from twostroke.cli.question_options import LoadOptions, SimulatedMachineOptions, SimulationOutput
from twostroke.cli.scheduling import check_target, read_target
from twostroke.cli.settings import Choice
from twostroke.cli.simulated import (
    Hardware,
    build_replica,
    get_least_ttft_ns,
    resolve_hardware,
)
from twostroke.cli.simulation_table import describe_simulation, print_choices, print_summary
from twostroke.errors import InvalidParameter
from twostroke.policies.target import get_least_itl_ns
from twostroke.sim.arrivals import Arrival
from twostroke.sim.cluster import Cluster, Part
from twostroke.sim.export import check_parquet, write_csv, write_parquet
from twostroke.sim.faults import FaultRates, draw_cancels, draw_faults
from twostroke.sim.parts import count_parts, run_parts
from twostroke.sim.plot import Picture, check_plot, draw
from twostroke.sim.records import Records
from twostroke.sim.replica import ReplicaSpec
from twostroke.sim.results import summarise
from twostroke.sim.routers import make_router
from twostroke.sim.sources import Fitted, Source, SourceChoice, Targets, build_source

_ENDINGS = (".csv", ".parquet", ".png", ".svg")
_PROGRESS_EVERY = 2000


@dataclass(frozen=True, slots=True)
class Simulation:
    """Everything that is settled before a simulation runs."""

    hardware: Hardware
    replica: ReplicaSpec
    replicas: int
    router: str
    source: Source
    targets: Targets
    faults: FaultChoice
    seed: int
    choices: tuple[Choice, ...]

    @property
    def title(self) -> str:
        """The picture's."""
        spec, device = self.hardware.spec.name, self.hardware.device.name
        _, what, _ = self.source.notes[0]
        return f"{spec} on {self.replicas:,} × {self.hardware.tp} × {device}: {what}"


def run_simulate(
    machine: SimulatedMachineOptions,
    load: LoadOptions,
    scheduling: SchedulingOptions,
    output: SimulationOutput,
) -> None:
    """Simulate and show the results. Raises TwostrokeError."""
    files = check_outputs(output.output or [])
    simulation = build_simulation(machine, load, scheduling)
    print_choices(simulation.choices)
    fitted = Fitted()
    began = time.perf_counter()
    records = simulate(simulation, fitted)
    summary = summarise(records, simulation.hardware.num_blocks, time.perf_counter() - began)
    print_summary(summary, fitted)
    sys.stdout.flush()
    for path in files:
        _write(records, simulation, path)
        print(f"wrote {path}")
    if output.json:
        print(json.dumps(describe_simulation(summary, fitted, simulation.choices)))


def build_simulation(
    machine: SimulatedMachineOptions, load: LoadOptions, scheduling: SchedulingOptions
) -> Simulation:
    """Settle everything; a trace is read to its end. Raises TwostrokeError."""
    hardware = resolve_hardware(machine)
    faults = parse_faults(load.faults)
    source = build_source(
        SourceChoice(
            trace=load.trace,
            workload=load.workload,
            rate=load.rate,
            prompt_tokens=load.prompt_tokens,
            new_tokens=load.new_tokens,
            requests=load.requests,
            seed=load.seed,
        )
    )
    replica, choices = build_replica(hardware, machine, scheduling, source.has_prefixes)
    targets = _build_targets(hardware, replica, source, scheduling)
    rates = faults.rates
    if rates.deaths or rates.hangs:
        replica = replace(replica, restart_ns=round(faults.restart_s * 1e9))
    if rates.hangs:
        replica = replace(replica, step_deadline_ns=round(faults.deadline_s * 1e9))
    notes = [Choice(*note) for note in source.notes]
    if load.faults is not None:
        notes.append(Choice("faults", load.faults, f"as asked, seed {load.seed}"))
    for name, target_ns in (("TTFT target", targets.ttft_ns), ("ITL target", targets.itl_ns)):
        if target_ns:
            notes.append(Choice(name, f"{target_ns / 1e6:g} ms", "as asked"))
    return Simulation(
        hardware=hardware,
        replica=replica,
        replicas=machine.replicas,
        router=machine.router,
        source=source,
        targets=targets,
        faults=faults,
        seed=load.seed,
        choices=(*hardware.choices, *choices, *notes),
    )


def simulate(simulation: Simulation, fitted: Fitted) -> Records:
    """Run it to its end, on every core where that can be; `fitted` counts what was changed about
    the requests."""
    faults = draw_faults(
        simulation.seed,
        simulation.replicas,
        max(1, round(simulation.source.seconds * 1e9)),
        simulation.faults.rates,
    )

    def make(part: Part) -> Cluster:
        router = make_router(simulation.router, simulation.replicas)
        return Cluster(simulation.replica, simulation.replicas, router, faults, part=part)

    def arrive(part: Part) -> Iterator[Arrival]:
        arrivals = simulation.source.arrive(simulation.targets, fitted)
        if simulation.faults.cancels:
            mean_ns = round(simulation.faults.patience_s * 1e9)
            arrivals = draw_cancels(arrivals, simulation.seed, simulation.faults.cancels, mean_ns)
        if part.index == 0 and sys.stderr.isatty():
            arrivals = _show_progress(arrivals, simulation.source.expected)
        return arrivals

    return run_parts(make, arrive, _count_parts(simulation))


def _count_parts(simulation: Simulation) -> int:
    """1 unless nothing that happens to a replica can reach another."""
    if simulation.router != "round-robin" or simulation.faults.rates != FaultRates():
        return 1
    return count_parts(simulation.replicas, simulation.source.expected, count_processors())


def check_outputs(names: Sequence[str]) -> list[Path]:
    """The files to write. Raises InvalidParameter for one that is unknown or cannot be written."""
    paths = [Path(name) for name in names]
    for path in paths:
        ending = path.suffix.lower()
        if ending not in _ENDINGS:
            raise InvalidParameter("output", f"{path} must end in one of {', '.join(_ENDINGS)}")
        if not path.parent.is_dir():
            raise InvalidParameter("output", f"{path}: there is no folder {path.parent}")
        if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
            raise InvalidParameter("output", f"{path} cannot be written")
        _WRITERS[ending][0]()
    return paths


def _write(records: Records, simulation: Simulation, path: Path) -> None:
    try:
        _WRITERS[path.suffix.lower()][1](records, simulation, path)
    except OSError as error:
        why = error.strerror or str(error)
        raise InvalidParameter("output", f"{path} cannot be written: {why}") from error


def _write_csv(records: Records, simulation: Simulation, path: Path) -> None:
    write_csv(records, path)


def _write_parquet(records: Records, simulation: Simulation, path: Path) -> None:
    write_parquet(records, path)


def _write_picture(records: Records, simulation: Simulation, path: Path) -> None:
    draw(records, Picture(simulation.title, simulation.hardware.num_blocks), path)


def _need_nothing() -> None:
    """A CSV can always be written."""


# Ending of a file → what it needs, and what writes it.
_WRITERS: dict[str, tuple[Callable[[], None], Callable[[Records, Simulation, Path], None]]] = {
    ".csv": (_need_nothing, _write_csv),
    ".parquet": (check_parquet, _write_parquet),
    ".png": (check_plot, _write_picture),
    ".svg": (check_plot, _write_picture),
}


def _build_targets(
    hardware: Hardware, replica: ReplicaSpec, source: Source, scheduling: SchedulingOptions
) -> Targets:
    """What is asked of every request. Raises InvalidParameter for what no step can keep."""
    cost, context = hardware.cost, hardware.spec.context_tokens
    # What is cached of a prompt needs no computing, so one token is all that is sure.
    shortest = 1 if source.has_prefixes else min(source.least_prompt_tokens, context - 1)
    ttft_least_ns = get_least_ttft_ns(cost, shortest, replica.scheduler.step_tokens)
    whole = f"the shortest prompt, {shortest:,} token{'s' if shortest > 1 else ''} alone,"
    ttft_ns = read_target("ttft_target_ms", scheduling.ttft_target_ms)
    itl_ns = read_target("itl_target_ms", scheduling.itl_target_ms)
    check_target("ttft_target_ms", ttft_ns, ttft_least_ns, whole)
    check_target("itl_target_ms", itl_ns, get_least_itl_ns(cost), "one decode alone")
    return Targets(context_tokens=context, ttft_ns=ttft_ns, itl_ns=itl_ns)


def _show_progress(arrivals: Iterator[Arrival], expected: int) -> Iterator[Arrival]:
    """The arrivals, and on standard error how many have come."""
    for count, arrival in enumerate(arrivals):
        if count % _PROGRESS_EVERY == 0:
            seconds = arrival.time_ns / 1e9
            text = f"\r{count:,} of about {expected:,} requests, {seconds:,.0f} s simulated"
            print(text, end="", file=sys.stderr, flush=True)
        yield arrival
    print("\r\x1b[K", end="", file=sys.stderr, flush=True)
