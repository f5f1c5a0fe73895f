"""Times what a device does: events around each launch on a GPU, the clock on a CPU.

On a GPU launches are queued one behind the other without waiting for the host in between, so that a
time is the device's own unless the host cannot keep up; then the host is what bounds the step, and
the time says so. Repeats adapt to how long a launch takes; a sample is never dropped.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Launch = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Timed:
    """Seconds of repeated launches: median and range."""

    seconds: float
    lowest: float
    highest: float
    repeats: int

    def describe(self) -> dict[str, float | int]:
        """Plain values."""
        return {
            "seconds": self.seconds,
            "lowest": self.lowest,
            "highest": self.highest,
            "repeats": self.repeats,
        }


def summarise(samples: Sequence[float]) -> Timed:
    """Median and range of at least one sample in seconds."""
    return Timed(statistics.median(samples), min(samples), max(samples), len(samples))


@dataclass(frozen=True, slots=True)
class Pace:
    """How often to repeat: at least `least`, at most `most` times, for about `budget_s` seconds."""

    least: int = 5
    most: int = 40
    budget_s: float = 0.4
    warm: int = 2

    def get_repeats(self, seconds: float) -> int:
        """Repeats of something that takes `seconds`."""
        return max(self.least, min(self.most, int(self.budget_s / max(seconds, 1e-9))))


QUICK = Pace(least=1, most=1, budget_s=0.0, warm=0)  # one launch


def synchronise(device: torch.device) -> None:
    """Wait for the device; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def capture(launch: Launch, device: torch.device) -> Launch:
    """What `launch` queues, as a CUDA graph; launched a few times before, when it may compile."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            launch()
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = launch()

    def replay(captured: Launch = launch) -> Any:
        """`captured` holds the memory that the graph reads, which nothing else may hold."""
        graph.replay()
        return result

    return replay


def time_launch(launch: Launch, device: torch.device, pace: Pace = Pace()) -> Timed:
    """Time of one launch: warmed, repeated, queued back to back."""
    for _ in range(pace.warm):
        launch()
    synchronise(device)
    first = take_samples(launch, device, 1)
    if pace.most == 1:
        return summarise(first)
    return summarise(take_samples(launch, device, pace.get_repeats(first[0])))


def time_interleaved(
    launches: Mapping[str, Launch], device: torch.device, pace: Pace = Pace(), rounds: int = 5
) -> dict[str, Timed]:
    """Times of several launches, in turns, so that a card that slows down slows all of them.

    Every round takes a share of each one's repeats, in an order that alternates.
    """
    samples: dict[str, list[float]] = {name: [] for name in launches}
    repeats = {}
    for name, launch in launches.items():
        for _ in range(pace.warm):
            launch()
        synchronise(device)
        first = take_samples(launch, device, 1)
        repeats[name] = max(1, -(-pace.get_repeats(first[0]) // rounds))
        if pace.most == 1:
            samples[name], repeats[name] = first, 0
    names = list(launches)
    for turn in range(rounds):
        for name in names if turn % 2 == 0 else names[::-1]:
            if repeats[name]:
                samples[name] += take_samples(launches[name], device, repeats[name])
    return {name: summarise(taken) for name, taken in samples.items()}


def take_samples(launch: Launch, device: torch.device, count: int) -> list[float]:
    """Seconds of each of `count` launches."""
    if device.type != "cuda":
        return [_time_on_host(launch) for _ in range(count)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        launch()
        event.record()
    torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) / 1e3 for begin, end in itertools.pairwise(events)]


def _time_on_host(launch: Launch) -> float:
    begin = time.perf_counter()
    launch()
    return time.perf_counter() - begin
