"""RecordingScheduler: a scheduler that keeps everything it was told, in order, to be replayed.

Owns the record of the seven inputs, each with its arguments and, where a plan was asked for, the
answer. The loop drives it like the scheduler inside: it decides nothing, and costs one small object
an input. Only inputs that took effect are kept: one that raised has changed nothing. Everything
kept is frozen, so the record needs no copies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from twostroke.core.scheduler import Scheduler
from twostroke.core.types import (
    Accepted,
    BlockId,
    Cancelled,
    Ending,
    Failed,
    Finished,
    Idle,
    Rejected,
    Request,
    SchedulerConfig,
    StepOutcome,
    StepPlan,
    Update,
)

VERSION = 1
_CANCELLED = Cancelled()


@dataclass(frozen=True, slots=True)
class Header:
    """What a recording is of. config: of the scheduler. model: the name it was served under.

    policies: what chose for the scheduler, as plain values for whoever builds it again.
    arrivals: request id → when its sender meant to send it, on the clock of the inputs; empty
    where nobody knows.
    """

    model: str
    config: SchedulerConfig
    policies: Mapping[str, Any] = field(default_factory=dict)
    arrivals: Mapping[str, int] = field(default_factory=dict)
    version: int = VERSION


@dataclass(frozen=True, slots=True)
class Submit:
    """A request was submitted, whether it was accepted or not."""

    now: int
    request: Request


@dataclass(frozen=True, slots=True)
class Cancel:
    """A request, or its continuation `index`, was ended. ending: the kind's name in lower case.

    reason: the ending's. limit_tokens: of a rejection.
    """

    now: int
    id: str
    ending: str
    reason: str
    index: int | None = None
    limit_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """A plan was asked for, and this one given; None when there was nothing to plan (see idle)."""

    now: int
    iterations: int
    plan: StepPlan | None = None
    idle: Idle | None = None


@dataclass(frozen=True, slots=True)
class Commit:
    """A step was committed."""

    now: int
    outcome: StepOutcome


@dataclass(frozen=True, slots=True)
class Lose:
    """A step and those behind it were undone."""

    now: int
    step: int
    reason: str


@dataclass(frozen=True, slots=True)
class Attach:
    """KV from elsewhere was attached to a request, or room for it reserved."""

    id: str
    blocks: tuple[BlockId, ...]
    tokens_computed: int


@dataclass(frozen=True, slots=True)
class Release:
    """A request was forgotten."""

    id: str


Input = Submit | Cancel | Plan | Commit | Lose | Attach | Release

ENDINGS: Mapping[str, type[Finished] | type[Rejected] | type[Cancelled] | type[Failed]] = {
    "finished": Finished,
    "rejected": Rejected,
    "cancelled": Cancelled,
    "failed": Failed,
}


@dataclass(frozen=True, slots=True)
class Recording:
    """A run as the scheduler saw it."""

    header: Header
    inputs: tuple[Input, ...]


class RecordingScheduler:
    """Has the scheduler's seven inputs and hands each on; what else is asked is the scheduler's.

    inputs: all so far, in order.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.inputs: list[Input] = []

    def as_scheduler(self) -> Scheduler:
        """Itself, for a loop: the loop names the class, and needs nothing of it but its methods."""
        return cast(Scheduler, self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scheduler, name)

    def submit(self, request: Request, now: int) -> Accepted | Rejected:
        """See Scheduler."""
        answer = self._scheduler.submit(request, now)
        self.inputs.append(Submit(now, request))
        return answer

    def cancel(
        self, id: str, now: int, *, index: int | None = None, ending: Ending = _CANCELLED
    ) -> tuple[Update, ...]:
        """See Scheduler."""
        updates = self._scheduler.cancel(id, now, index=index, ending=ending)
        limit = ending.limit_tokens if isinstance(ending, Rejected) else None
        kind = type(ending).__name__.lower()
        self.inputs.append(Cancel(now, id, kind, ending.reason, index, limit))
        return updates

    def plan(self, now: int, iterations: int = 1) -> StepPlan | Idle:
        """See Scheduler."""
        answer = self._scheduler.plan(now, iterations)
        if isinstance(answer, StepPlan):
            self.inputs.append(Plan(now, iterations, answer))
        else:
            self.inputs.append(Plan(now, iterations, None, answer))
        return answer

    def commit(self, outcome: StepOutcome, now: int) -> tuple[Update, ...]:
        """See Scheduler."""
        updates = self._scheduler.commit(outcome, now)
        self.inputs.append(Commit(now, outcome))
        return updates

    def lose(self, step: int, reason: str, now: int) -> tuple[Update, ...]:
        """See Scheduler."""
        updates = self._scheduler.lose(step, reason, now)
        self.inputs.append(Lose(now, step, reason))
        return updates

    def attach(
        self, id: str, blocks: tuple[BlockId, ...], tokens_computed: int
    ) -> tuple[BlockId, ...]:
        """See Scheduler."""
        answer = self._scheduler.attach(id, blocks, tokens_computed)
        self.inputs.append(Attach(id, blocks, tokens_computed))
        return answer

    def release(self, id: str) -> None:
        """See Scheduler."""
        self._scheduler.release(id)
        self.inputs.append(Release(id))


def apply_input(scheduler: Scheduler, one: Input) -> tuple[Plan | None, tuple[Update, ...]]:
    """Give a scheduler a recorded input: what it plans, where that was asked, and its updates."""
    match one:
        case Submit():
            scheduler.submit(one.request, one.now)
        case Plan():
            answer = scheduler.plan(one.now, one.iterations)
            if isinstance(answer, StepPlan):
                return Plan(one.now, one.iterations, answer), ()
            return Plan(one.now, one.iterations, None, answer), ()
        case Commit():
            return None, scheduler.commit(one.outcome, one.now)
        case Cancel():
            ending = get_ending(one)
            return None, scheduler.cancel(one.id, one.now, index=one.index, ending=ending)
        case Lose():
            return None, scheduler.lose(one.step, one.reason, one.now)
        case Attach():
            scheduler.attach(one.id, one.blocks, one.tokens_computed)
        case Release():
            scheduler.release(one.id)
    return None, ()


def get_ending(one: Cancel) -> Ending:
    """The ending that a recorded cancel gave."""
    if one.ending == "rejected":
        return Rejected(one.reason, one.limit_tokens)
    kind = ENDINGS[one.ending]
    assert kind is not Rejected
    return kind(one.reason)
