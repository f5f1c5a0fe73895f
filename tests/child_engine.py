"""An engine over a tiny model in a child process, and a child that dies of a request.

`make_executor` and `make_poisoned` are what children are told to call; the rest runs in the test.
"""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tiny_models import TINY_SPECS, make_config, make_tensors
from twostroke.core.scheduler import Scheduler
from twostroke.core.types import (
    Ending,
    Request,
    SequenceEnded,
    SequenceId,
    StepOutcome,
    StepPlan,
    TokenLogprob,
    TokensEmitted,
    Update,
)
from twostroke.engine.clock import MonotonicClock
from twostroke.engine.loop import EngineLoop, LoopPolicy
from twostroke.errors import ExecutorLost
from twostroke.exec.child_executor import ChildExecutor
from twostroke.exec.child_memory import MappedMemory, MemorySizes
from twostroke.exec.child_process import ChildSetup
from twostroke.exec.child_supervisor import ChildSupervisor
from twostroke.exec.cpu import CpuRunner
from twostroke.exec.local import LocalExecutor, Runner, RunnerSizes, get_kv_shape
from twostroke.kernels.ops import Drawn, SamplingArrays, StepArrays
from twostroke.spec.quant import Format

SIZES = RunnerSizes(threads=1, num_blocks=96, block_tokens=16, max_step_tokens=64, host_blocks=32)
SPEC = TINY_SPECS["llama"]
POISON = 7  # a token that a poisoned child dies of


class WatchedRunner:
    """A runner (see exec.local.Runner) that calls `after` with each step it has computed."""

    def __init__(self, runner: Runner, after: Callable[[StepArrays], None]) -> None:
        self.describe = runner.describe
        self.get_logits = runner.get_logits
        self.get_draws = runner.get_draws
        self.view_kv = runner.view_kv
        self._runner = runner
        self._after = after

    def run_step(self, step: StepArrays, arrays: SamplingArrays) -> Drawn:
        drawn = self._runner.run_step(step, arrays)
        self._after(step)
        return drawn


def make_runner(memory: NDArray[np.uint8] | None) -> CpuRunner:
    """The tiny model's runner, over memory of its own or memory given."""
    return CpuRunner(SPEC, make_tensors(SPEC, Format.Q4_0), SIZES, memory=memory)


def make_local(memory: NDArray[np.uint8] | None, host: NDArray[np.uint8] | None) -> LocalExecutor:
    """The tiny model's executor, over memory of its own or memory given."""
    return LocalExecutor(make_runner(memory), SIZES, host)


def make_executor(job: tuple[Any, ...], memory: MappedMemory) -> LocalExecutor:
    """For a child."""
    return make_local(memory.kv, memory.host)


def make_poisoned(job: tuple[Any, ...], memory: MappedMemory) -> LocalExecutor:
    """For a child that dies of a step in which the token POISON is computed."""

    def die_of_poison(step: StepArrays) -> None:
        if POISON in step.tokens:
            os.kill(os.getpid(), signal.SIGKILL)

    return LocalExecutor(WatchedRunner(make_runner(memory.kv), die_of_poison), SIZES, memory.host)


def make_broken(job: tuple[Any, ...], memory: MappedMemory) -> LocalExecutor:
    """For a child that cannot start."""
    raise ValueError("no such thing")


def open_supervisor(factory: str = "make_executor") -> ChildSupervisor:
    """A supervisor of children that call `factory` of this module."""
    kv_bytes = get_kv_shape(SPEC, SIZES).bytes
    sizes = MemorySizes(kv_bytes, kv_bytes // SIZES.num_blocks * SIZES.host_blocks)
    return ChildSupervisor(
        ChildSetup(f"child_engine:{factory}", ()), sizes, lambda plan: 60 * 10**9
    )


@dataclass
class Listener:
    """A LoopListener that keeps all output."""

    tokens: dict[SequenceId, list[int]] = field(default_factory=dict)
    logprobs: dict[SequenceId, list[TokenLogprob]] = field(default_factory=dict)
    endings: dict[SequenceId, Ending] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    stop: tuple[int, ...] = ()
    committed: int = 0

    def step_started(self, plan: StepPlan, now_ns: int) -> None:
        """Nothing is noted before the executor has the step."""

    def step_committed(self, plan: StepPlan, outcome: StepOutcome) -> None:
        self.committed += 1

    def executor_lost(self, lost: ExecutorLost) -> None:
        self.lost.append(str(lost))

    def updated(self, updates: Sequence[Update], now_ns: int) -> Sequence[SequenceId]:
        stops = []
        for update in updates:
            sequence = update.sequence
            if isinstance(update, TokensEmitted):
                assert sequence not in self.endings, "a token after the end"
                self.tokens.setdefault(sequence, []).extend(update.tokens)
                self.logprobs.setdefault(sequence, []).extend(update.logprobs)
                if self.stop and tuple(self.tokens[sequence][-len(self.stop) :]) == self.stop:
                    stops.append(sequence)
            elif isinstance(update, SequenceEnded):
                assert sequence not in self.endings, "ended twice"
                self.endings[sequence] = update.ending
        return [one for one in stops if one not in self.endings]

    def deliver(self) -> None:
        """Output is read by the test."""


def run_requests(
    requests: Sequence[Request],
    disturb: Callable[[ChildExecutor, int], None] = lambda executor, committed: None,
    factory: str = "make_executor",
    stop: tuple[int, ...] = (),
) -> Listener:
    """Runs requests to their ends over supervised children.

    disturb: called after each round of the loop with the executor in use and the number of steps
    committed. Checks that nothing is left of scheduler, processes and descriptors.
    """
    listener = Listener(stop=stop)
    supervisor = open_supervisor(factory)
    first = supervisor.open()
    current = [first]

    def replace_executor(lost: ExecutorLost) -> ChildExecutor:
        current.append(supervisor.replace(lost))
        return current[-1]

    policy = LoopPolicy(replace_executor=replace_executor, on_closed=supervisor.close)
    scheduler = Scheduler(make_config(SPEC, SIZES, 32))
    loop = EngineLoop(scheduler, first, MonotonicClock(), listener, policy)
    try:
        for request in requests:
            loop.submit(request)
        while loop.num_live:
            loop.pump()
            disturb(current[-1], listener.committed)
            if not loop.has_answers and loop.poll_for is not None:
                poll = select.poll()
                poll.register(*loop.poll_for)
                poll.poll(20)
        assert scheduler.num_free_blocks == SIZES.num_blocks
    finally:
        loop.close()
    assert all(executor.is_dead for executor in current)
    return listener
