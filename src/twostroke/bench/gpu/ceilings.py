"""The card's own ceilings, measured: copy and read bandwidth, and the BF16 matrix rate.

Shares are of these, never of a data sheet. A copy counts bytes read and bytes written; the bars are
of the copy. Reading alone is shown beside it, because decoding mostly reads. Products are of random
numbers: zeros run faster than real data.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from twostroke.bench.gpu.timing import Pace, time_launch
from twostroke.spec.device import DeviceSpec

COPY_BYTES = 4 << 30
MATRIX_SIZE = 8192
_PACE = Pace(least=10, most=30, budget_s=0.3)
_FAKE_PACE = Pace(least=2, most=3, budget_s=0.01)


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the card can do: bytes a second copied (read and written) and read; operations a second.

    card: its name; memory_bytes: what it has in all.
    """

    card: str
    memory_bytes: int
    copy_bandwidth: float
    read_bandwidth: float
    matrix_rate: float

    def describe(self) -> dict[str, str | int | float]:
        """Plain values."""
        return asdict(self)

    def make_device(self) -> DeviceSpec:
        """As the device that `spec/work.py` divides by.

        All arithmetic counts at the matrix rate: products and attention do run in 16 bits, 4-bit
        weights too once unpacked; norms, rope and gates do not, which lowers the floor by less
        than 1 % and so makes a share harder to reach, not easier.
        """
        rates = tuple((kind, self.matrix_rate) for kind in ("fp32", "f16", "bf16", "int8"))
        return DeviceSpec(self.card, self.copy_bandwidth, rates, 0, self.memory_bytes)


def measure_ceilings(device: torch.device) -> Ceilings:
    """Measure in about two seconds on a GPU; on a CPU with tiny sizes, to exercise the code."""
    is_gpu = device.type == "cuda"
    copy_bytes, size = (COPY_BYTES, MATRIX_SIZE) if is_gpu else (1 << 20, 64)
    pace = _PACE if is_gpu else _FAKE_PACE
    copied, read = _time_memory(device, copy_bytes, pace)
    multiplied = _time_product(device, size, pace)
    return Ceilings(
        card=get_card(device),
        memory_bytes=get_memory_bytes(device),
        copy_bandwidth=2 * copy_bytes / copied,
        read_bandwidth=copy_bytes / read,
        matrix_rate=2 * size**3 / multiplied,
    )


def _time_memory(device: torch.device, size: int, pace: Pace) -> tuple[float, float]:
    """Seconds to copy and to read `size` bytes."""
    source = torch.empty(size // 4, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    copied = time_launch(lambda: target.copy_(source), device, pace)
    read = time_launch(lambda: torch.sum(source), device, pace)
    return copied.seconds, read.seconds


def _time_product(device: torch.device, size: int, pace: Pace) -> float:
    """Seconds of one square product in bfloat16."""
    first, second, product = (
        torch.empty(size, size, dtype=torch.bfloat16, device=device).normal_() for _ in range(3)
    )
    return time_launch(lambda: torch.mm(first, second, out=product), device, pace).seconds


def get_card(device: torch.device) -> str:
    """The card's name; "fake" for the CPU that stands in for one."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "fake"


def get_memory_bytes(device: torch.device) -> int:
    """Memory of the card that can be allocated; 80 GB for the fake one."""
    if device.type != "cuda":
        return 80_000_000_000
    return int(torch.cuda.mem_get_info(device)[1])
