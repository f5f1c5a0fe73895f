"""The loop under random submissions, cancels, and executors that are late, lost or lie.

Each seed is one run. It checks that every accepted continuation ends exactly once, that no token
depends on what went wrong around it, and that all blocks come back.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from fakes import FakeExecutor, ManualClock, draw_by_hash, make_config
from twostroke.core.ports import OnDone
from twostroke.core.scheduler import Scheduler
from twostroke.core.types import (
    PENDING,
    Accepted,
    Cancelled,
    Ending,
    Failed,
    Finished,
    Rejected,
    Request,
    SamplingSpec,
    SequenceEnded,
    SequenceId,
    StepOutcome,
    StepPlan,
    TokensEmitted,
    Update,
)
from twostroke.engine.loop import EngineLoop, LoopPolicy
from twostroke.errors import EngineClosed, ExecutorLost

DEADLINE_NS = 1_000_000
STOP_LETTER = ord("q")
SEEDS = range(120)


@dataclass
class Ledger:
    """A LoopListener that keeps accounts and ends a sequence at STOP_LETTER."""

    tokens: dict[SequenceId, list[int]] = field(default_factory=dict)
    endings: dict[SequenceId, Ending] = field(default_factory=dict)
    stopped: set[SequenceId] = field(default_factory=set)

    def step_started(self, plan: StepPlan, now_ns: int) -> None:
        ended = [row.sequence for row in plan.rows if row.sequence in self.endings]
        assert not ended, f"planned after their end: {ended}"

    def step_committed(self, plan: StepPlan, outcome: StepOutcome) -> None:
        assert plan.step == outcome.step

    def executor_lost(self, lost: ExecutorLost) -> None:
        assert str(lost)

    def updated(self, updates: Sequence[Update], now_ns: int) -> Sequence[SequenceId]:
        stops = []
        for update in updates:
            if isinstance(update, TokensEmitted):
                assert update.sequence not in self.endings
                assert update.sequence not in self.stopped
                self.tokens.setdefault(update.sequence, []).extend(update.tokens)
                if STOP_LETTER in update.tokens:
                    stops.append(update.sequence)
                    self.stopped.add(update.sequence)
            elif isinstance(update, SequenceEnded):
                assert update.sequence not in self.endings
                self.endings[update.sequence] = update.ending
        return [one for one in stops if one not in self.endings]

    def deliver(self) -> None:
        """Nothing to do: the accounts are kept as updates come."""


class Run:
    """One random run."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.clock = ManualClock()
        self.ledger = Ledger()
        self.replacements_left = self.random.choice([0, 3, 1000])
        self.harm = self.random.choice([0.0, 0.05, 0.3])
        blocks = self.random.choice([6, 16, 64])
        self.executor = FakeExecutor(num_blocks=blocks)
        self.executor.behave = self.behave
        plans_ahead = self.random.random() < 0.6
        sizes = {"step_tokens": 7, "max_rows": 5, "plans_ahead": plans_ahead}
        self.scheduler = Scheduler(make_config(self.executor, **sizes))
        policy = LoopPolicy(
            max_in_flight=2 if plans_ahead else self.random.choice([1, 2]),
            replace_executor=self.replace if self.replacements_left else None,
            step_deadline_ns=DEADLINE_NS,
        )
        self.loop = EngineLoop(self.scheduler, self.executor, self.clock, self.ledger, policy)
        self.accepted: dict[str, Request] = {}
        self.outcomes: Counter[str] = Counter()
        self.num_ahead = 0

    def replace(self, lost: ExecutorLost) -> FakeExecutor:
        if not self.replacements_left:
            raise ExecutorLost("no replacement is left")
        self.replacements_left -= 1
        self.executor = FakeExecutor(pool=self.executor.pool)
        self.executor.behave = self.behave
        return self.executor

    def behave(self, plan: StepPlan, on_done: OnDone) -> None:
        executor, roll = self.executor, self.random.random()
        self.num_ahead += sum(row.tokens == (PENDING,) for row in plan.rows)
        if roll < self.harm:
            wrong = ["lost", "malformed", "wrong_step", "bad_token", "twice", "held"]
            getattr(executor, f"answer_{self.random.choice(wrong)}")(plan, on_done)
        elif self.random.random() < 0.5:
            executor.answer_held(plan, on_done)
        else:
            executor.answer_now(plan, on_done)

    def submit(self) -> None:
        id = f"r{sum(self.outcomes.values())}"
        request = Request(
            id=id,
            prompt=tuple(self.random.randrange(256) for _ in range(self.random.randrange(1, 30))),
            max_new_tokens=self.random.randrange(1, 12),
            sampling=SamplingSpec(temperature=1.0, seed=self.random.randrange(9)),
            n=self.random.choice([1, 1, 2, 4]),
            priority=self.random.randrange(2),
        )
        try:
            answer = self.loop.submit(request)
        except EngineClosed:
            self.outcomes["closed"] += 1
            return
        self.outcomes[type(answer).__name__] += 1
        if isinstance(answer, Accepted):
            self.accepted[id] = request
        else:
            assert isinstance(answer, Rejected)

    def cancel(self) -> None:
        if self.accepted:
            id = self.random.choice(list(self.accepted))
            index = self.random.choice([None, self.random.randrange(self.accepted[id].n)])
            self.loop.cancel(id, index=index)

    def release(self) -> None:
        if self.executor.held:
            self.executor.release()

    def advance(self) -> None:
        self.clock.advance(self.random.randrange(DEADLINE_NS // 3))

    def act(self) -> None:
        actions = [self.submit, self.cancel, self.release, self.release, self.advance]
        actions += [self.loop.pump] * 5
        self.random.choice(actions)()

    def finish(self) -> None:
        """No new harm; let everything that is live come to its end."""
        self.harm = 0.0
        for _ in range(3000):
            if not self.loop.num_live:
                break
            self.release()
            self.advance()
            self.loop.pump()
        self.release()
        self.loop.pump()

    def check(self) -> None:
        """The laws, after the end."""
        expected = {
            SequenceId(id, index) for id, one in self.accepted.items() for index in range(one.n)
        }
        assert set(self.ledger.endings) == expected
        for sequence, ending in self.ledger.endings.items():
            self.check_tokens(sequence, ending)
        assert self.loop.num_live == 0
        while self.executor.held:
            self.release()
        self.loop.pump()
        assert self.scheduler.num_free_blocks == self.scheduler.config.num_blocks
        counts = self.scheduler.counts
        fates = ("finished", "rejected", "cancelled", "failed")
        assert counts["live"] == 0
        assert counts["submitted"] == sum(counts[fate] for fate in fates)

    def check_tokens(self, sequence: SequenceId, ending: Ending) -> None:
        request = self.accepted[sequence.request]
        tokens = self.ledger.tokens.get(sequence, [])
        known = list(request.prompt)
        for token in tokens:
            assert token == draw_by_hash(known, request.sampling, sequence.index)
            known.append(token)
        if isinstance(ending, Finished):
            stops = bool(tokens) and tokens[-1] == STOP_LETTER
            assert stops or len(tokens) == request.max_new_tokens or self.is_full(len(known))
        else:
            assert isinstance(ending, Cancelled | Failed)

    def is_full(self, tokens: int) -> bool:
        config = self.scheduler.config
        return tokens > config.num_blocks * config.block_tokens


@pytest.mark.parametrize("seed", SEEDS)
def test_every_continuation_ends_once_with_the_tokens_it_would_have_alone(seed: int) -> None:
    print(f"seed {seed}")
    run = Run(seed)
    for _ in range(250):
        run.act()
    run.finish()
    run.check()


def test_the_fuzz_reaches_every_kind_of_ending() -> None:
    kinds: Counter[str] = Counter()
    num_ahead = num_ignored = 0
    for seed in SEEDS[:40]:
        run = Run(seed)
        for _ in range(150):
            run.act()
        run.finish()
        kinds.update(type(ending).__name__ for ending in run.ledger.endings.values())
        kinds.update(run.outcomes)
        num_ahead += run.num_ahead
        num_ignored += run.scheduler.num_ignored_results
    assert num_ahead > 500
    assert num_ignored > 100
    assert set(kinds) == {"Finished", "Cancelled", "Failed", "Accepted", "Rejected", "closed"}
