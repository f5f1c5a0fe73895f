"""The in-process executor: one worker thread that runs plans in order over a runner.

A runner is a backend's arithmetic (CPU, reference); this file owns what is common: the thread,
the order of a step (copies, layers, logits, draws), and the promise that every plan is answered
exactly once. A plan that cannot be computed answers ExecutorLost and changes nothing but KV bytes
of blocks the plan itself would have written.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from twostroke.core.ports import ExecutorInfo, OnDone
from twostroke.core.types import BlockId, RowResult, StepOutcome, StepPlan
from twostroke.errors import ExecutorLost
from twostroke.exec.batch import build_step_arrays
from twostroke.exec.sampling import LogitLayout, build_logit_layout
from twostroke.kernels.ops import F32, I32, Drawn, SamplingArrays, StepArrays

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunnerSizes:
    """What a runner is made for: threads, the KV pool and the largest step."""

    threads: int
    num_blocks: int
    block_tokens: int
    max_step_tokens: int


class Runner(Protocol):
    """A backend's arithmetic for one step; called from one thread at a time.

    `get_logits` is asked for at most `describe().max_logit_rows` rows of the step last given to
    `run_layers`; its result may be overwritten by the next call. `view_kv` is the pool as bytes,
    (parts, blocks, bytes of a block in a part), writable.
    """

    def describe(self) -> RunnerInfo: ...

    def run_layers(self, step: StepArrays) -> None: ...

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


class LocalExecutor:
    """Runs plans on a worker thread (see core.ports.Executor)."""

    def __init__(self, runner: Runner, sizes: RunnerSizes) -> None:
        self._runner = runner
        self._sizes = sizes
        self._queue: queue.SimpleQueue[tuple[StepPlan, OnDone] | None] = queue.SimpleQueue()
        self._closed = False
        self._lock = threading.Lock()  # orders `start` before or after `close`
        self._thread = threading.Thread(target=self._work, name="twostroke-executor", daemon=True)
        self._thread.start()

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
        """Queues a plan; `on_done` is called once, from the worker thread or, when closed, here."""
        with self._lock:
            if not self._closed:
                self._queue.put((plan, on_done))
                return
        on_done(ExecutorLost("the executor is closed"))

    def read_kv(self, blocks: Sequence[BlockId]) -> bytes:
        """The bytes of whole blocks, in order; no step may be running."""
        return self._runner.view_kv()[:, list(blocks)].tobytes()

    def write_kv(self, handle: bytes, blocks: Sequence[BlockId]) -> None:
        """Puts bytes from `read_kv` into `blocks`; no step may be running."""
        view = self._runner.view_kv()
        shape = (view.shape[0], len(blocks), view.shape[2])
        view[:, list(blocks)] = np.frombuffer(handle, np.uint8).reshape(shape)

    def close(self) -> None:
        """Stops after the step that is running; plans still queued answer ExecutorLost."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            plan, on_done = job
            if self._closed:
                on_done(ExecutorLost("the executor is closed"))
                continue
            try:
                answer: StepOutcome | ExecutorLost = self._run(plan)
            except Exception as error:  # noqa: BLE001 outermost frame: every plan is answered
                _log.exception("step %d failed", plan.step)
                answer = ExecutorLost(f"step {plan.step} failed: {type(error).__name__}: {error}")
            on_done(answer)

    def _run(self, plan: StepPlan) -> StepOutcome:
        begin = time.perf_counter_ns()
        kv = self._runner.view_kv()
        for copy in plan.copies:
            kv[:, copy.target] = kv[:, copy.source]
        layout = build_logit_layout(plan)
        step = build_step_arrays(plan, layout.positions)
        self._runner.run_layers(step)
        results = self._draw(layout)
        return StepOutcome(plan.step, results, time.perf_counter_ns() - begin)

    def _draw(self, layout: LogitLayout) -> tuple[RowResult, ...]:
        """Logits, draws and scores, so many rows at a time as the runner takes."""
        most = self._runner.describe().max_logit_rows
        draws = self._runner.get_draws()
        for chunk in layout.get_chunks(most):
            logits = self._runner.get_logits(chunk.positions)
            layout.note(chunk, logits, draws)
        return layout.get_results()
