"""The benchmark's driver: our engine, its peers and this machine's limits in one run.

It chooses models, engines and workloads, has them measured in turn, and reports. People read the
tables on standard error; the last line of standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from twostroke.bench.bars import judge
from twostroke.bench.engines import BenchEngineFailed, EngineCommand, start_engines
from twostroke.bench.lineup import ENGINES, OURS, Lineup, PeerAbsent
from twostroke.bench.measure import Bench, Pace, collect_peaks
from twostroke.bench.plot import draw
from twostroke.bench.report import build_tables, list_agreement, list_missing
from twostroke.bench.results import ModelResult
from twostroke.bench.served import get_load_floor, make_burst, make_poisson
from twostroke.bench.servers import measure_served
from twostroke.bench.startup import measure_start
from twostroke.bench.synthetic import SYNTHETIC, make_synthetic
from twostroke.bench.workloads import SEED, STANDARD, choose
from twostroke.cli.limits import format_device, measure_device
from twostroke.cli.machine import read_machine
from twostroke.errors import TwostrokeError
from twostroke.spec.model import ModelSpec
from twostroke.weights.catalog import resolve
from twostroke.weights.load import open_model

WORKLOADS = tuple(one.name for one in STANDARD)
SERVED = ("burst", "poisson")


def main() -> None:
    """Run the benchmark from the command line; exit 1 when it cannot be run."""
    try:
        run(parse_arguments(sys.argv[1:]))
    except TwostrokeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="twostroke.bench", description=__doc__)
    add, known = parser.add_argument, f"{', '.join((*WORKLOADS, *SERVED))}; or all, or none"
    add("--models", default="smollm2-135m", help=f"names or paths, or {', '.join(SYNTHETIC)}")
    add("--engines", default="all", help=f"of {', '.join(ENGINES)}")
    add("--workloads", default="all", help=f"of {known}")
    add("--peers", type=Path, default=Path(), help="the folder in which make bench-peers ran")
    add("--threads", type=int, default=read_machine().cores)
    add("--rounds", type=int, default=5, help="measurements of each workload")
    add("--budget", type=float, default=5.0, help="seconds an engine may spend on a workload")
    add("--longest", type=float, default=60.0, help="seconds one run may take")
    add("--served-rounds", type=int, default=1, help="measurements of each served load")
    add("--burst", type=int, default=64, help="requests in the burst")
    add("--arrivals", type=float, default=0.4, help="requests a second of the Poisson load")
    add("--duration", type=float, default=60.0, help="seconds of arrivals of the Poisson load")
    add("--no-start", action="store_true", help="do not measure starting")
    add("--plot", type=Path, help="folder for a picture of each model's results")
    options = parser.parse_args(arguments)
    every = (*WORKLOADS, *SERVED)
    options.engines = choose(options.engines, ENGINES, "engines")
    wanted = "" if options.workloads == "none" else options.workloads
    options.workloads = choose(wanted, every, "workloads")
    return options


def run(options: argparse.Namespace) -> None:
    """Measure every model and print the report. Raises TwostrokeError."""
    from rich.console import Console

    console = Console(file=sys.stderr, width=None if sys.stderr.isatty() else 190)
    results = []
    for name in options.models.split(","):
        path = make_synthetic(name) if name in SYNTHETIC else resolve(name)
        result = measure_model(name, path, options)
        for table in build_tables(result):
            console.print(table)
        for line in [*list_agreement(result), *list_missing(result)]:
            say(f"  {line}")
        if options.plot:
            options.plot.mkdir(parents=True, exist_ok=True)
            draw(result, options.plot / f"{name if name in SYNTHETIC else path.stem}.png")
        results.append(result)
    device = measure_device(options.threads)
    say(format_device(device))
    report = {
        "threads": options.threads,
        "rounds": options.rounds,
        "seed": SEED,
        "machine": {"processor": get_processor(), "features": list(device.features)},
        "commit": get_commit(),
        "command": sys.argv[1:],
        "limits": {"bytes_per_s": device.memory_bandwidth, **dict(device.rates)},
        "models": [
            {**one.describe(), "bars": [verdict.describe() for verdict in judge(one)]}
            for one in results
        ],
    }
    print(json.dumps(report))


def measure_model(name: str, path: Path, options: argparse.Namespace) -> ModelResult:
    """Everything that was asked for, with one model."""
    with open_model(path) as model:
        spec = model.spec
    lineup = Lineup(path, options.threads, options.peers)
    result = ModelResult(name, path.name, sum_bytes(path))
    say(f"{spec.name}, {path.name}; {options.threads} threads, {options.rounds} rounds")
    commands = find_workers(lineup, options.engines, result)
    if not options.no_start:
        names = [command.name for command in commands]
        result.start = measure_start(lineup, names, min(3, options.rounds))
        for what, seconds in result.start.items():
            spread = f"{seconds['lowest']:.3f}–{seconds['highest']:.3f}"
            say(f"  {what}: {seconds['median']:.3f} s ({spread})")
    if any(one in options.workloads for one in WORKLOADS):
        measure_workloads(commands, spec, options, result)
    loads = [one for one in SERVED if one in options.workloads]
    if loads:
        measure_loads(lineup, spec, options, result)
    return result


def find_workers(lineup: Lineup, names: Sequence[str], result: ModelResult) -> list[EngineCommand]:
    """How to start each engine that is there; the others are noted as refused."""
    commands = []
    for name in names:
        try:
            commands.append(lineup.get_worker(name))
        except PeerAbsent as error:
            result.refused[name] = str(error)
    return commands


def measure_workloads(
    commands: Sequence[EngineCommand],
    spec: ModelSpec,
    options: argparse.Namespace,
    result: ModelResult,
) -> None:
    """Prefill, decode and batches with every engine that starts, into `result`."""
    engines, refused = start_engines(commands)
    result.refused |= refused
    pace = Pace(options.rounds, options.budget, options.longest)
    bench = Bench(spec, engines, pace, partial(measure_device, options.threads))
    try:
        for engine in engines:
            say(f"  {engine.name}: {engine.description}, started in {engine.start_s:.1f} s")
        for workload in STANDARD:
            if workload.name in options.workloads:
                measured = bench.measure(workload)
                result.measurements.append(measured)
                rates = [f"{one} {measured.get_rate(one)[0]:,.0f}" for one in measured.samples]
                say(f"  {workload.name}: {', '.join(rates)} tok/s")
        result.refused |= bench.ended
        result.peak_bytes = collect_peaks(engines)
        for engine in engines:
            if engine.name == OURS:
                result.kv_bytes = int(engine.about["kv_bytes"])
    finally:
        for engine in engines:
            engine.close()


def measure_loads(
    lineup: Lineup, spec: ModelSpec, options: argparse.Namespace, result: ModelResult
) -> None:
    """The served loads with every engine that has a server, one engine at a time, into `result`."""
    loads = {}
    if "burst" in options.workloads:
        loads["burst"] = make_burst(spec, options.burst)
    if "poisson" in options.workloads:
        loads["poisson"] = make_poisson(spec, options.arrivals, options.duration)
    refused: dict[str, str] = {}
    devices = [measure_device(options.threads)]
    for _ in range(options.served_rounds):
        for name in options.engines:
            if name in result.refused or name in refused:
                continue
            try:
                served = measure_served(name, lineup, loads)
            except (PeerAbsent, BenchEngineFailed) as error:
                if name == OURS:
                    raise
                refused[name] = str(error)
                continue
            result.served.setdefault(name, []).append(served)
            devices.append(measure_device(options.threads))
            rates = [
                f"{load} {one.get('output_tokens_per_s', 0):,.0f}"
                for load, one in served.loads.items()
            ]
            say(f"  {name}, served: {', '.join(rates)} tok/s; ready in {served.start_s:.1f} s")
    result.refused |= {f"{name} server": why for name, why in refused.items()}
    for load, arrivals in loads.items():
        floors = [get_load_floor(spec, arrivals, device) for device in devices]
        result.load_floors[load] = {
            value: statistics.median(floor[value] for floor in floors) for value in floors[0]
        }


def sum_bytes(path: Path) -> int:
    """Size of a model: a file, or all weights of a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def say(text: str) -> None:
    """A line for people."""
    print(text, file=sys.stderr, flush=True)


def get_processor() -> str:
    """The processor's own name where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def get_commit() -> str:
    """The commit measured, "+" behind it where files differ; "unknown" outside a checkout."""
    here = Path(__file__).parent
    try:
        commit, dirty = (
            subprocess.run(
                ["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True
            ).stdout.strip()
            for arguments in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+" if dirty else "")
