"""What the engine asks of others: an executor of steps and a clock.

The engine's loop runs unchanged over any executor (CPU, CUDA, a remote actor, the simulated one)
and any clock (real or virtual); tests use the fakes in `tests/fakes.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from twostroke.core.types import BlockId, StepOutcome, StepPlan
from twostroke.errors import ExecutorLost
from twostroke.spec.device import ExecutorInfo as ExecutorInfo

StepAnswer = StepOutcome | ExecutorLost
OnDone = Callable[[StepAnswer], None]


class Executor(Protocol):
    """Runs steps and keeps KV bytes.

    `start` never blocks; `on_done` is called exactly once per plan, from any thread, with an
    outcome or with `ExecutorLost`. `read_kv` returns the bytes of whole blocks; `write_kv` puts
    such bytes back into `blocks` of the pool. `close` ends it; plans still running answer
    `ExecutorLost`.
    """

    def describe(self) -> ExecutorInfo: ...

    def start(self, plan: StepPlan, on_done: OnDone) -> None: ...

    def read_kv(self, blocks: Sequence[BlockId]) -> bytes: ...

    def write_kv(self, handle: bytes, blocks: Sequence[BlockId]) -> None: ...

    def close(self) -> None: ...


class Clock(Protocol):
    """Time in integer nanoseconds, monotonic; `call_at` runs `fn` at or soon after `t_ns`."""

    def now_ns(self) -> int: ...

    def call_at(self, t_ns: int, fn: Callable[[], None]) -> None: ...
