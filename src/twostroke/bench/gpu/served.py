"""A served trace through our engine: the real scheduler and loop over its executor, no HTTP.

Requests are submitted when they are due and tokens are noted when the loop hears of them. One
thread does it all, as in production; it sleeps only while the device works.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from twostroke.bench.gpu.traces import Lifetime, TraceRequest
from twostroke.core.ports import Executor
from twostroke.core.scheduler import Scheduler
from twostroke.core.types import (
    Accepted,
    Failed,
    Request,
    SchedulerConfig,
    SequenceEnded,
    SequenceId,
    StepOutcome,
    StepPlan,
    TokensEmitted,
    Update,
)
from twostroke.engine.clock import MonotonicClock
from twostroke.engine.loop import EngineLoop, LentExecutor, LoopPolicy
from twostroke.errors import ExecutorLost, TwostrokeError

_NAP_S = 0.002


class TraceListener:
    """Notes when each request's tokens came and when steps were committed (see LoopListener).

    commits: (time in ns, rows, tokens) of every committed step.
    """

    def __init__(self, lives: Sequence[Lifetime], begin_ns: int) -> None:
        self.ended = 0
        self.commits: list[tuple[int, int, int]] = []
        self.failures: list[str] = []
        self._lives = lives
        self._begin_ns = begin_ns

    def step_started(self, plan: StepPlan, now_ns: int) -> None:
        """Nothing to note."""

    def step_committed(self, plan: StepPlan, outcome: StepOutcome) -> None:
        """Note when, and what the step held."""
        self.commits.append((time.perf_counter_ns(), len(plan.rows), plan.num_tokens))

    def executor_lost(self, lost: ExecutorLost) -> None:
        """Note why."""
        self.failures.append(str(lost))

    def updated(self, updates: Sequence[Update], now_ns: int) -> Sequence[SequenceId]:
        """Note tokens and endings; no stop strings."""
        now_s = (time.perf_counter_ns() - self._begin_ns) / 1e9
        for update in updates:
            if isinstance(update, TokensEmitted):
                life = self._lives[int(update.sequence.request)]
                life.token_times_s += [now_s] * len(update.tokens)
            elif isinstance(update, SequenceEnded):
                self.ended += 1
                if isinstance(update.ending, Failed):
                    self.failures.append(update.ending.reason)
        return ()

    def deliver(self) -> None:
        """Nothing is kept for later."""


def run_trace(
    executor: Executor,
    config: SchedulerConfig,
    requests: Sequence[TraceRequest],
    limit_s: float,
    max_in_flight: int = 2,
) -> tuple[list[Lifetime], TraceListener]:
    """Serves the requests as they arrive, greedily, until all have ended or `limit_s` has passed.

    Raises TwostrokeError when a request is rejected or fails: such a run measures nothing.
    """
    lives = [Lifetime(request.at_s, request.new_tokens) for request in requests]
    woken = threading.Event()
    clock = MonotonicClock()
    begin_ns = time.perf_counter_ns()
    listener = TraceListener(lives, begin_ns)
    is_lent = isinstance(executor, LentExecutor)
    policy = LoopPolicy(max_in_flight=1 if is_lent else max_in_flight)
    loop = EngineLoop(Scheduler(config), executor, clock, listener, policy, woken.set)
    sent = 0
    while listener.ended < len(requests):
        passed_s = (time.perf_counter_ns() - begin_ns) / 1e9
        if passed_s > limit_s:
            break
        while sent < len(requests) and requests[sent].at_s <= passed_s:
            _submit(loop, requests[sent], sent)
            sent += 1
        woken.clear()
        loop.pump()
        loop.lend_thread()
        if listener.failures:
            raise TwostrokeError(f"the engine failed: {listener.failures[0]}")
        if not loop.has_answers:
            woken.wait(_NAP_S)
    for index in range(sent):
        loop.cancel(str(index))
    while loop.num_live:
        loop.pump()
        loop.lend_thread()
    return lives, listener


def _submit(loop: EngineLoop, one: TraceRequest, index: int) -> None:
    answer = loop.submit(Request(str(index), one.prompt, one.new_tokens))
    if not isinstance(answer, Accepted):
        raise TwostrokeError(f"request {index} was rejected: {answer.reason}")
