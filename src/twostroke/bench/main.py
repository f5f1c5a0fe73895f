"""The benchmark's driver: limits, our engine and peers, turn by turn, round after round.

In each round the limits are measured, then every engine runs the workload once, in an order that
alternates; ratios are of medians over rounds. Our greedy tokens must be the same in every round;
how far a peer's agree is reported. People read the table; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from twostroke.bench.engines import (
    BenchEngine,
    EngineCommand,
    get_llama_cpp_command,
    get_our_command,
    start_engines,
)
from twostroke.bench.report import (
    OURS,
    Measurement,
    build_table,
    count_agreeing,
    describe,
    draw,
    summarise,
)
from twostroke.bench.startup import time_first_token, time_import, time_peer_first_token
from twostroke.bench.workloads import SEED, Workload, choose, get_floor, make_prompt
from twostroke.cli.limits import format_device, measure_device
from twostroke.cli.machine import read_machine
from twostroke.errors import TwostrokeError
from twostroke.spec.model import ModelSpec
from twostroke.weights.catalog import resolve
from twostroke.weights.load import open_model


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
    parser.add_argument("--model", default="smollm2-135m", help="name or path of a GGUF file")
    parser.add_argument("--engines", default="twostroke,llama.cpp", help="comma-separated")
    parser.add_argument("--workloads", help="comma-separated, such as prefill-512,decode-0")
    parser.add_argument(
        "--peers",
        type=Path,
        default=Path(),
        help="the folder that has .venv-peers (make bench-peers)",
    )
    parser.add_argument("--no-start", action="store_true", help="do not measure starting")
    parser.add_argument("--threads", type=int, default=read_machine().cores)
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each workload")
    parser.add_argument("--plot", type=Path, help="where to draw the shares of the limit (PNG)")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Measure everything and print it. Raises TwostrokeError."""
    path = resolve(options.model)
    with open_model(path) as model:
        spec = model.spec
    wanted = choose(options.workloads)
    commands = [get_our_command(path, options.threads)]
    if "llama.cpp" in options.engines.split(","):
        python = options.peers / ".venv-peers" / "bin" / "python"
        commands.append(get_llama_cpp_command(str(python.absolute()), path, options.threads))
    say(f"{spec.name}, {path.name}; {options.threads} threads, {options.rounds} rounds")
    start = {} if options.no_start else measure_start(commands, path, options, spec)
    engines, refused = start_engines(commands)
    try:
        for engine in engines:
            say(f"  {engine.name}: {engine.description}")
        for name, why in refused.items():
            say(f"  {name}: not measured: {why}")
        results = [measure_workload(engines, one, spec, options) for one in wanted]
    finally:
        for engine in engines:
            engine.close()
    finish(options, spec, results, start, refused)


def measure_start(
    commands: Sequence[EngineCommand], path: Path, options: argparse.Namespace, spec: ModelSpec
) -> dict[str, object]:
    """Import and start to first token, engines in turn; the first turn warms the page cache."""
    prompt = make_prompt(spec, 5)
    times: dict[str, list[float]] = {"import twostroke": [time_import() for _ in range(3)]}
    for turn in range(options.rounds + 1):
        for command in commands:
            if command.name == OURS:
                seconds = time_first_token(path, options.threads)
            else:
                seconds = time_peer_first_token(command, prompt)
            if turn:
                times.setdefault(f"{command.name}, start to first token", []).append(seconds)
    for name, values in times.items():
        summary = summarise(values)
        spread = f"{summary['lowest']:.3f}–{summary['highest']:.3f}"
        say(f"  {name}: {summary['median']:.3f} s ({spread})")
    return {name: summarise(values) for name, values in times.items()}


def measure_workload(
    engines: Sequence[BenchEngine],
    workload: Workload,
    spec: ModelSpec,
    options: argparse.Namespace,
) -> Measurement:
    """One workload over all rounds; a first round, not counted, warms every engine."""
    result = Measurement(workload.name, workload.timed_tokens)
    request: dict[str, object] = {"op": workload.op, "tokens": make_prompt(spec, workload.prompt)}
    if workload.steps:
        request["steps"] = workload.steps
    tokens: dict[str, list[int]] = {}
    for turn in range(options.rounds + 1):
        device = measure_device(options.threads)
        order = list(engines) if turn % 2 else list(reversed(engines))
        for engine in order:
            answer = engine.ask(**request)
            if turn:
                result.seconds.setdefault(engine.name, []).append(answer["seconds"])
            if (
                engine.name == OURS
                and tokens.setdefault(OURS, answer["tokens"]) != answer["tokens"]
            ):
                raise TwostrokeError(f"{workload.name}: our tokens changed between rounds")
            tokens[engine.name] = answer["tokens"]
        if turn:
            result.floors.append(get_floor(spec, workload, device))
    for engine in engines:
        if engine.name != OURS:
            result.agreed[engine.name] = count_agreeing(tokens[OURS], tokens[engine.name])
    say(f"  {workload.name}: {result.get_rate(OURS)[0]:,.0f} tok/s, {result.get_share(OURS):.0%}")
    return result


def finish(
    options: argparse.Namespace,
    spec: ModelSpec,
    results: Sequence[Measurement],
    start: dict[str, object],
    refused: dict[str, str],
) -> None:
    """Print table and JSON, and draw the plot."""
    from rich.console import Console

    peers = [name for name in results[0].seconds if name != OURS] if results else []
    device = measure_device(options.threads)
    say(format_device(device))
    Console(file=sys.stderr).print(build_table(results, peers))
    if options.plot:
        draw(results, peers, options.plot)
    report = {
        "model": spec.name,
        "threads": options.threads,
        "rounds": options.rounds,
        "seed": SEED,
        "machine": {"processor": get_processor(), "features": list(device.features)},
        "commit": get_commit(),
        "limits": {"bytes_per_s": device.memory_bandwidth, **dict(device.rates)},
        "start": start,
        "workloads": describe(results, peers),
        "not_measured": refused,
    }
    print(json.dumps(report))


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
