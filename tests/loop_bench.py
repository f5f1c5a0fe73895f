"""A loop over fakes: what its tests submit to, pump and look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fakes import FakeExecutor, ManualClock, make_config
from twostroke.core.scheduler import Scheduler
from twostroke.core.types import (
    Ending,
    Request,
    SequenceEnded,
    SequenceId,
    StepOutcome,
    StepPlan,
    TokensEmitted,
    Update,
)
from twostroke.engine.loop import EngineLoop, LoopPolicy
from twostroke.errors import ExecutorLost


@dataclass
class Recorder:
    """A LoopListener that remembers, and stops sequences at a token of the test's choice."""

    stop_at: int = -1
    tokens: dict[SequenceId, list[int]] = field(default_factory=dict)
    endings: dict[SequenceId, Ending] = field(default_factory=dict)
    committed: list[int] = field(default_factory=list)
    losses: list[str] = field(default_factory=list)
    log: list[str] = field(default_factory=list)

    def step_started(self, plan: StepPlan, now_ns: int) -> None:
        self.log.append("started")

    def step_committed(self, plan: StepPlan, outcome: StepOutcome) -> None:
        self.committed.append(plan.step)
        self.log.append("committed")

    def executor_lost(self, lost: ExecutorLost) -> None:
        self.losses.append(str(lost))

    def updated(self, updates: Sequence[Update], now_ns: int) -> Sequence[SequenceId]:
        stops = []
        for update in updates:
            if isinstance(update, TokensEmitted):
                assert update.sequence not in self.endings, "a token after the end"
                self.tokens.setdefault(update.sequence, []).extend(update.tokens)
                if self.stop_at in update.tokens:
                    stops.append(update.sequence)
            elif isinstance(update, SequenceEnded):
                assert update.sequence not in self.endings, "ended twice"
                self.endings[update.sequence] = update.ending
        return [one for one in stops if one not in self.endings]

    def deliver(self) -> None:
        self.log.append("delivered")


PLAIN = LoopPolicy()


class Bench:
    """A loop over fakes, with the scheduler in view."""

    def __init__(
        self,
        executor: FakeExecutor | None = None,
        policy: LoopPolicy = PLAIN,
        stop_at: int = -1,
        **sizes: int,
    ) -> None:
        self.executor = executor or FakeExecutor()
        self.clock = ManualClock()
        self.recorder = Recorder(stop_at)
        self.scheduler = Scheduler(make_config(self.executor, **sizes))
        self.loop = EngineLoop(self.scheduler, self.executor, self.clock, self.recorder, policy)

    def submit(self, id: str, tokens: int = 5, n: int = 1) -> None:
        self.loop.submit(Request(id, (1, 2, 3), tokens, n=n))

    def run(self) -> None:
        """Pump until nothing more happens by itself."""
        self.loop.pump()
        while self.loop.has_answers:
            self.loop.pump()


def replace_with(executors: list[FakeExecutor]) -> LoopPolicy:
    """Replacements in order; ExecutorLost when there are none left."""

    def replace(lost: ExecutorLost) -> FakeExecutor:
        if not executors:
            raise ExecutorLost("none left")
        return executors.pop(0)

    return LoopPolicy(replace_executor=replace)
