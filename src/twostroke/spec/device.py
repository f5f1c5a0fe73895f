"""DeviceSpec: what a device can do at most, as numbers the work formulas are divided by.

Owns the names of the limits, not how they were found: a CPU's are measured at start
(`native/limits.cpp`), another device's may come from its data sheet. Frozen; no I/O.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """One device.

    memory_bandwidth: bytes per second read from main memory by all threads together.
    rates: (arithmetic, operations per second) pairs over all threads, a multiply-add being two
    operations; arithmetic is "int8", "fp32", "bf16" or "f16". threads: cores used on a CPU.
    memory_bytes: for weights and KV together. features: instruction set extensions, for reports.
    """

    name: str
    memory_bandwidth: float
    rates: tuple[tuple[str, float], ...]
    threads: int
    memory_bytes: int
    features: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert self.memory_bandwidth > 0
        assert all(rate > 0 for _, rate in self.rates)

    def get_rate(self, arithmetic: str) -> float:
        """Operations per second in `arithmetic`; ValueError names those known when it is not."""
        for name, rate in self.rates:
            if name == arithmetic:
                return rate
        known = ", ".join(name for name, _ in self.rates)
        raise ValueError(f"{self.name} has no rate for {arithmetic} arithmetic, only for: {known}")


@dataclass(frozen=True, slots=True)
class ExecutorInfo:
    """What an executor offers: its device, backend and KV pool.

    kv_bytes is the whole pool's size; max_step_tokens the most tokens one step may hold.
    """

    device: str
    backend: str
    threads: int
    num_blocks: int
    block_tokens: int
    kv_bytes: int
    weight_bytes: int
    max_step_tokens: int
