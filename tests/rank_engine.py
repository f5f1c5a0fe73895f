"""The real scheduler and loop over a group of ranks, or any executor that answers by itself."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from tiny_models import Answer
from twostroke.core.ports import Executor
from twostroke.core.scheduler import Scheduler
from twostroke.core.types import (
    PENDING,
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
from twostroke.engine.loop import EngineLoop, LoopPolicy
from twostroke.errors import ExecutorLost


class Engine:
    """A LoopListener that keeps every sequence's answer, with the loop it listens to."""

    def __init__(
        self, executor: Executor, vocab_size: int, max_in_flight: int = 2, ahead: bool = False
    ) -> None:
        info = executor.describe()
        config = SchedulerConfig(
            num_blocks=info.num_blocks,
            block_tokens=info.block_tokens,
            step_tokens=min(info.max_step_tokens, 24),
            max_rows=4,
            context_tokens=60,
            vocab_size=vocab_size,
            plans_ahead=ahead,
        )
        self.answers: dict[SequenceId, Answer] = {}
        self.num_committed = 0
        self.num_ahead = 0  # steps with a token that was still being drawn
        self._arrived = threading.Event()
        policy = LoopPolicy(max_in_flight=max_in_flight)
        self.loop = EngineLoop(
            Scheduler(config), executor, MonotonicClock(), self, policy, self._arrived.set
        )

    def submit(self, *requests: Request) -> None:
        """Queues requests."""
        for request in requests:
            self.loop.submit(request)

    def run(self, steps: int = 1000) -> None:
        """Pumps until nothing is live, or so many steps were committed."""
        self.loop.pump()
        while self.loop.num_live and self.num_committed < steps:
            assert self._arrived.wait(30.0)
            self._arrived.clear()
            self.loop.pump()

    def step_started(self, plan: StepPlan, now_ns: int) -> None:
        """See LoopListener."""
        self.num_ahead += any(PENDING in row.tokens for row in plan.rows)

    def step_committed(self, plan: StepPlan, outcome: StepOutcome) -> None:
        """See LoopListener."""
        self.num_committed += 1

    def executor_lost(self, lost: ExecutorLost) -> None:
        """See LoopListener."""

    def updated(self, updates: Sequence[Update], now_ns: int) -> Sequence[SequenceId]:
        """See LoopListener."""
        for update in updates:
            if isinstance(update, TokensEmitted | SequenceEnded):
                answer = self.answers.setdefault(update.sequence, Answer())
                if isinstance(update, SequenceEnded):
                    answer.ending = update.ending
                else:
                    answer.tokens += update.tokens
                    answer.logprobs += update.logprobs
        return ()

    def deliver(self) -> None:
        """See LoopListener."""
