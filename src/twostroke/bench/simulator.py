"""How simulating grows with requests and with replicas: time and memory of `twostroke simulate`.

Each point is one run of the command, round robin on every core that this process may use: lengths
of a trace, drawn arrivals, ten requests a second for each replica. `--full` adds the million
requests over a thousand GPUs. The last line is one JSON object; `--plot` draws it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from twostroke.bench.engines import get_peak_bytes

MODEL, DEVICE = "llama-3.1-8b", "h100-sxm:captured"
RATE_PER_REPLICA = 10
REQUESTS = (1_000, 4_000, 16_000, 64_000)
FULL_REQUESTS = 1_000_000
REPLICAS = (1, 10, 100, 1_000)
MOST_REPLICAS = 1_000
FIXED_REQUESTS = 16_000
_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Point:
    """One run: what it took, and what was simulated.

    peak_bytes: of its processes together; what they share counts in each. cores: it could use, but
    one replica needs only one.
    """

    requests: int
    replicas: int
    seconds: float
    peak_bytes: int
    simulated_s: float
    steps: int
    cores: int

    @property
    def name(self) -> str:
        """The point in words."""
        return f"{self.requests:,} requests on {self.replicas:,} replicas"


def measure(requests: int, replicas: int, trace: Path) -> Point:
    """Run one simulation. Raises CalledProcessError with the command's own words on failure."""
    command = [sys.executable, "-m", "twostroke", "simulate", "--model", MODEL, "--device", DEVICE]
    command += ["--replicas", str(replicas), "--workload", "poisson", "--seed", "1"]
    command += ["--rate", str(RATE_PER_REPLICA * replicas), "--requests", str(requests)]
    command += ["--router", "round-robin", "--trace", str(trace), "--json"]
    begin = time.perf_counter()
    with (
        tempfile.TemporaryFile("w+") as shown,
        tempfile.TemporaryFile("w+") as words,
        subprocess.Popen(command, stdout=shown, stderr=words) as process,
    ):
        peak_bytes = _wait(process)
        seconds = time.perf_counter() - begin
        for file in (shown, words):
            file.seek(0)
        output, complaint = shown.read(), words.read()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, output, complaint)
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    assert result["fates"]["finished"] == requests, f"not all finished: {result['fates']}"
    steps = result["use"]["steps"]
    cores = len(os.sched_getaffinity(0))
    return Point(requests, replicas, seconds, peak_bytes, result["seconds"], steps, cores)


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Wait for its end; returns the peak memory of it and its children, added up, in bytes."""
    peak = 0
    while process.poll() is None:
        peak = max(peak, get_peak_bytes(process.pid))
        time.sleep(_POLL_S)
    return peak


def plan_points(full: bool) -> list[tuple[int, int]]:
    """(requests, replicas) of every run, the short ones first."""
    points = {(requests, MOST_REPLICAS) for requests in REQUESTS}
    points |= {(FIXED_REQUESTS, replicas) for replicas in REPLICAS}
    if full:
        points.add((FULL_REQUESTS, MOST_REPLICAS))
    return sorted(points)


def draw(points: Sequence[Point], path: Path) -> None:
    """Time and memory over requests, and over replicas, both logarithmic."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    panels = (
        ("requests", f"on {MOST_REPLICAS:,} replicas", "replicas", MOST_REPLICAS),
        ("replicas", f"{FIXED_REQUESTS:,} requests", "requests", FIXED_REQUESTS),
    )
    for panel, (over, title, fixed, value) in zip(axes, panels, strict=True):
        chosen = [point for point in points if getattr(point, fixed) == value]
        chosen.sort(key=lambda point: int(getattr(point, over)))
        places = [getattr(point, over) for point in chosen]
        panel.loglog(
            places, [point.seconds for point in chosen], "o-", color="0.1", label="time, s"
        )
        gib = [point.peak_bytes / 2**30 for point in chosen]
        panel.loglog(places, gib, "s--", color="0.5", label="peak memory, GiB")
        panel.set(title=title, xlabel=over, ylabel="seconds, GiB")
        panel.grid(visible=True, which="major", color="0.9")
        panel.legend(frameon=False)
    how = f"round robin on every core ({points[0].cores})"
    figure.suptitle(f"`twostroke simulate`, {how}: {MODEL} on {DEVICE}, lengths of a trace")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a line for each point, and the whole as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m twostroke.bench.simulator", description=__doc__
    )
    parser.add_argument("--trace", type=Path, default=Path("../shared/traces/azure2023_conv.csv"))
    parser.add_argument("--full", action="store_true", help="add a million requests")
    parser.add_argument("--json", type=Path, help="write the results here too")
    parser.add_argument("--plot", type=Path, help="draw them into this PNG or SVG")
    options = parser.parse_args(arguments)
    points = []
    for requests, replicas in plan_points(options.full):
        try:
            point = measure(requests, replicas, options.trace)
        except subprocess.CalledProcessError as error:
            sys.exit(f"{' '.join(error.cmd[2:])} failed:\n{error.stderr}")
        points.append(point)
        each_us = point.seconds / requests * 1e6
        memory = f"{point.peak_bytes / 2**20:,.0f} MiB"
        print(f"{point.name}: {point.seconds:.1f} s, {each_us:.0f} us a request, {memory}")
    result = {"model": MODEL, "device": DEVICE, "points": [asdict(point) for point in points]}
    if options.plot is not None:
        draw(points, options.plot)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
