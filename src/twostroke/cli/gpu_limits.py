"""A GPU's limits, measured now: how fast it copies, and how fast it multiplies in 16 bits.

Imported only where the engine ran on a GPU: it brings PyTorch. A copy counts bytes read and bytes
written. Products are of random numbers: zeros run faster than real data.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from twostroke.spec.device import DeviceSpec

_COPY_BYTES = 2**30  # many times the caches
_MATRIX = 4096
_TURNS = 10
_KINDS = ("fp32", "f16", "bf16", "int8")


def measure_gpu(device: str) -> DeviceSpec:
    """The limits of `device`, such as "cuda:0", in some tenths of a second.

    All arithmetic counts at the rate of 16-bit products: weights of fewer bits are multiplied as
    such, and what is computed in 32 bits (norms, rope, gates) is under 1 % of the operations.
    """
    with torch.cuda.device(device), torch.no_grad():
        rate = _measure_rate()
        return DeviceSpec(
            name=torch.cuda.get_device_name(),
            memory_bandwidth=2 * _COPY_BYTES / _time_copy(),
            rates=tuple((kind, rate) for kind in _KINDS),
            threads=0,
            memory_bytes=int(torch.cuda.mem_get_info()[1]),
        )


def _time_copy() -> float:
    source = torch.zeros(_COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return _time(lambda: target.copy_(source))


def _measure_rate() -> float:
    left, right, product = (
        torch.randn(_MATRIX, _MATRIX, device="cuda", dtype=torch.bfloat16) for _ in range(3)
    )
    return 2 * _MATRIX**3 / _time(lambda: torch.mm(left, right, out=product))


def _time(run: Callable[[], object]) -> float:
    """Seconds of the fastest of some runs, after one that warms up."""
    run()
    times = []
    for _ in range(_TURNS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return float(min(times))
