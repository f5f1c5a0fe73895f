"""The in-process executor: it runs plans in order, over a runner, on a thread that is lent to it.

A runner is a backend's arithmetic (CPU, reference); this file owns what is common: the order of a
step (copies, layers, logits, draws), and the promise that every plan is answered exactly once. A
plan that cannot be computed answers ExecutorLost and changes nothing but KV bytes of blocks the
plan itself would have written.

It has no thread of its own: two threads that hand a step to each other and back spend a fifth of a
short step on it. Whoever started a plan calls `run_pending` when it has nothing else to do.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from twostroke.core.ports import ExecutorInfo, OnDone
from twostroke.core.types import BlockId, StepOutcome, StepPlan
from twostroke.errors import ExecutorLost
from twostroke.exec.batch import Batch, BatchBuilder
from twostroke.exec.sampling import build_results
from twostroke.kernels.ops import F32, I32, Drawn, KVShape, SamplingArrays, StepArrays
from twostroke.spec.kv import KvElement
from twostroke.spec.model import ModelSpec
from twostroke.spec.step import STEP_PARTS

_log = logging.getLogger(__name__)

# What a runner's own time is divided into.
RUNNER_PARTS = STEP_PARTS[1:-2]


@dataclass(frozen=True, slots=True)
class RunnerSizes:
    """What a runner is made for: threads, the KV pool and the largest step.

    host_blocks: blocks kept beside the pool for sequences that wait.
    """

    threads: int
    num_blocks: int
    block_tokens: int
    max_step_tokens: int
    kv_element: KvElement = KvElement.F16
    host_blocks: int = 0


def get_kv_shape(spec: ModelSpec, sizes: RunnerSizes) -> KVShape:
    """The pool of a model with these sizes."""
    return KVShape(
        spec.num_layers,
        sizes.num_blocks,
        sizes.block_tokens,
        spec.num_kv_heads,
        spec.head_dim,
        sizes.kv_element,
    )


class Runner(Protocol):
    """A backend's arithmetic for one step; called from one thread at a time.

    `run_step` computes the layers of a step and draws from the logits of its `logit_rows`, at most
    `describe().max_logit_rows` of them. `get_logits` is asked for as many rows of the step last
    given to `run_step`; its result may be overwritten by the next call. `view_kv` is the pool as
    bytes, (parts, blocks, bytes of a block in a part), writable.
    """

    def describe(self) -> RunnerInfo: ...

    def run_step(self, step: StepArrays, arrays: SamplingArrays) -> Drawn: ...

    def get_logits(self, rows: I32) -> F32: ...

    def get_draws(self) -> Draws: ...

    def view_kv(self) -> NDArray[np.uint8]: ...


@dataclass(frozen=True, slots=True)
class RunnerInfo:
    """What a runner is: for printing, and its limits."""

    backend: str
    threads: int
    weight_bytes: int
    max_logit_rows: int


@dataclass(frozen=True, slots=True)
class Draws:
    """A backend's sampler: `sample` draws a token a row, `score` looks given tokens up."""

    sample: Callable[[F32, SamplingArrays], Drawn]
    score: Callable[[F32, I32, I32], Drawn]


@dataclass(frozen=True, slots=True)
class StepTimes:
    """When a step began on the monotonic clock, and what it took, in nanoseconds.

    run_ns: the whole step inside the executor; call_ns: of it, the runner's arithmetic.
    tokens: computed; rows: of the plan.
    """

    begin_ns: int
    run_ns: int
    call_ns: int
    tokens: int
    rows: int


@runtime_checkable
class TimedRunner(Protocol):
    """A Runner that knows where its time goes.

    `take_part_ns` gives nanoseconds of each of RUNNER_PARTS since the last call.
    """

    def take_part_ns(self) -> Sequence[int]: ...


class LocalExecutor:
    """Runs plans on the thread that calls `run_pending` (see core.ports.Executor).

    One thread uses it.
    """

    def __init__(
        self, runner: Runner, sizes: RunnerSizes, host: NDArray[np.uint8] | None = None
    ) -> None:
        """host: the bytes of the host blocks, where they shall outlive this executor."""
        self._runner = runner
        self._sizes = sizes
        self._max_logit_rows = runner.describe().max_logit_rows
        self._builder = BatchBuilder(self._max_logit_rows)
        self._pending: deque[tuple[StepPlan, OnDone]] = deque()
        self._closed = False
        self._arrays_ns = self._compute_ns = self._results_ns = 0  # of this `run_pending`
        self._watch: Callable[[StepTimes], None] | None = None
        self._take_part_ns = runner.take_part_ns if isinstance(runner, TimedRunner) else None
        self._host: NDArray[np.uint8] | None = None
        if host is not None and sizes.host_blocks:
            parts, _, size = runner.view_kv().shape
            self._host = host.reshape(parts, sizes.host_blocks, size)

    @property
    def runner(self) -> Runner:
        """The arithmetic it runs."""
        return self._runner

    def watch(self, on_step: Callable[[StepTimes], None]) -> None:
        """Calls `on_step` after every step from now on, before the step is answered."""
        self._watch = on_step

    def describe(self) -> ExecutorInfo:
        """What this executor offers."""
        info = self._runner.describe()
        return ExecutorInfo(
            device="cpu",
            backend=info.backend,
            threads=info.threads,
            num_blocks=self._sizes.num_blocks,
            block_tokens=self._sizes.block_tokens,
            kv_bytes=self._runner.view_kv().nbytes,
            weight_bytes=info.weight_bytes,
            max_step_tokens=self._sizes.max_step_tokens,
        )

    def start(self, plan: StepPlan, on_done: OnDone) -> None:
        """Queues a plan; `on_done` is called once, by `run_pending` or, when closed, here."""
        if self._closed:
            on_done(ExecutorLost("the executor is closed"))
        else:
            self._pending.append((plan, on_done))

    def run_pending(self) -> tuple[int, int, int]:
        """Computes and answers every plan that was started.

        Returns the nanoseconds that went into arrays, arithmetic and results.
        """
        self._arrays_ns = self._compute_ns = self._results_ns = 0
        while self._pending:
            plan, on_done = self._pending.popleft()
            try:
                answer: StepOutcome | ExecutorLost = self._run(plan)
            except Exception as error:  # noqa: BLE001 outermost frame: every plan is answered
                _log.exception("step %d failed", plan.step)
                answer = ExecutorLost(f"step {plan.step} failed: {type(error).__name__}: {error}")
                if self._take_part_ns is not None:
                    self._take_part_ns()  # no part of the next step
            on_done(answer)
        return self._arrays_ns, self._compute_ns, self._results_ns

    def read_kv(self, blocks: Sequence[BlockId]) -> bytes:
        """The bytes of whole blocks, in order; no step may be running."""
        return self._runner.view_kv()[:, list(blocks)].tobytes()

    def write_kv(self, handle: bytes, blocks: Sequence[BlockId]) -> None:
        """Puts bytes from `read_kv` into `blocks`; no step may be running."""
        view = self._runner.view_kv()
        shape = (view.shape[0], len(blocks), view.shape[2])
        view[:, list(blocks)] = np.frombuffer(handle, np.uint8).reshape(shape)

    def close(self) -> None:
        """Ends it; plans that were started and not run answer ExecutorLost."""
        self._closed = True
        while self._pending:
            _, on_done = self._pending.popleft()
            on_done(ExecutorLost("the executor is closed"))

    def _run(self, plan: StepPlan) -> StepOutcome:
        begin_ns = time.perf_counter_ns()
        if plan.copies or plan.swaps_out or plan.swaps_in:
            self._move_blocks(plan)
        batch = self._builder.build(plan)
        built_ns = time.perf_counter_ns()
        drawn = [self._runner.run_step(batch.step, batch.first)]
        scored = [] if batch.is_whole else self._compute_rest(batch, drawn)
        computed_ns = time.perf_counter_ns()
        results = build_results(plan.rows, drawn, scored)
        end_ns = time.perf_counter_ns()
        self._arrays_ns += built_ns - begin_ns
        self._compute_ns += computed_ns - built_ns
        self._results_ns += end_ns - computed_ns
        if self._watch is not None:
            run_ns, call_ns = end_ns - begin_ns, computed_ns - built_ns
            tokens = batch.step.tokens.size
            self._watch(StepTimes(begin_ns, run_ns, call_ns, tokens, len(plan.rows)))
        part_ns = self._divide(built_ns - begin_ns, computed_ns - built_ns, end_ns - computed_ns)
        return StepOutcome(plan.step, results, end_ns - begin_ns, part_ns=part_ns)

    def _divide(self, arrays_ns: int, call_ns: int, results_ns: int) -> tuple[int, ...]:
        """The step's time by STEP_PARTS; () when the runner cannot tell where its own has gone."""
        if self._take_part_ns is None:
            return ()
        own = self._take_part_ns()
        return (arrays_ns, *own, call_ns - sum(own), results_ns)

    def _move_blocks(self, plan: StepPlan) -> None:
        """Moves and copies the blocks of a plan, in the order it promises."""
        kv = self._runner.view_kv()
        if self._host is None and plan.swaps_out:
            # Made when first needed: most runs never preempt.
            shape = (kv.shape[0], self._sizes.host_blocks, kv.shape[2])
            self._host = np.empty(shape, np.uint8)
        for move in plan.swaps_out:
            assert self._host is not None
            self._host[:, move.host] = kv[:, move.block]
        for move in plan.swaps_in:
            assert self._host is not None, "moved in before anything was moved out"
            kv[:, move.block] = self._host[:, move.host]
        for copy in plan.copies:
            kv[:, copy.target] = kv[:, copy.source]

    def _compute_rest(self, batch: Batch, drawn: list[Drawn]) -> list[Drawn]:
        """The draws that are still missing, added to `drawn`, and all scores.

        So many rows at a time as the runner takes.
        """
        runner, layout = self._runner, batch.layout
        scored: list[Drawn] = []
        draws = runner.get_draws()
        for chunk in layout.get_chunks(self._max_logit_rows):
            if chunk.draws and chunk.start < self._max_logit_rows:
                continue
            logits = runner.get_logits(chunk.positions)
            if chunk.draws:
                drawn.append(draws.sample(logits, layout.take_arrays(chunk.part)))
            else:
                targets, top = layout.targets[chunk.part], layout.top[chunk.part]
                scored.append(draws.score(logits, targets, top))
        return scored
