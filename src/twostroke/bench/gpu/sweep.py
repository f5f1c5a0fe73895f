"""What the sweeps over candidate kernels share: clocks, and compiling many kernels at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

from twostroke.bench.gpu.timing import Launch, Pace, capture, time_launch

THREADS = 12


def time_captured(launches: Sequence[Launch], device: torch.device, pace: Pace) -> float:
    """Seconds of one launch on average, all of them captured and replayed together."""

    def launch() -> None:
        for each in launches:
            each()

    timed = capture(launch, device) if device.type == "cuda" else launch
    return time_launch(timed, device, pace).seconds / len(launches)


def measure_copy(device: torch.device, size: int, pace: Pace) -> float:
    """Bytes a second, read and written, of a copy that moves `size` bytes in all."""
    source = torch.zeros(size // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return size / time_launch(lambda: target.copy_(source), device, pace).seconds


def try_together(
    launches: Sequence[Callable[[], Any]], device: torch.device
) -> list[BaseException | None]:
    """Run each once, several at a time, for compiling one takes a second; what each raised."""
    is_gpu = device.type == "cuda"
    # A thread has no context of the device until it has asked for something there.
    begin = partial(torch.zeros, 1, device=device)
    with ThreadPoolExecutor(THREADS if is_gpu else 1, initializer=begin) as pool:
        running = [pool.submit(launch) for launch in launches]
    if is_gpu:
        torch.cuda.synchronize()
    return [each.exception() for each in running]


def run_together(launches: Sequence[Callable[[], Any]], device: torch.device) -> None:
    """As `try_together`; raises the first error."""
    for error in try_together(launches, device):
        if error is not None:
            raise error
