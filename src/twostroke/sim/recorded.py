"""A recorded run played again: the same inputs into a fresh scheduler, plan compared with plan.

Owns the comparison, byte for byte over the plans' own form, and the records of what the run's
requests went through, by the definitions that simulations have (records.py, results.py): the
measured column beside a simulation's. It times nothing: every time is one that was recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from twostroke.core.policy import Policies
from twostroke.core.scheduler import Scheduler
from twostroke.core.types import (
    Cancelled,
    Failed,
    Finished,
    Rejected,
    SequenceEnded,
    StepPlan,
    TokensEmitted,
    Update,
)
from twostroke.engine.recording import (
    Cancel,
    Commit,
    Lose,
    Plan,
    Recording,
    Submit,
    apply_input,
)
from twostroke.engine.recording_file import encode
from twostroke.errors import ExecutorLost, InvalidParameter
from twostroke.sim.arrivals import Arrival
from twostroke.sim.records import FATES, Life, Records

_SHOWN = 400


@dataclass(frozen=True, slots=True)
class Difference:
    """The first input at which the replay went another way. number: of inputs before it."""

    number: int
    recorded: str
    replayed: str


@dataclass(frozen=True, slots=True)
class Replayed:
    """plans: steps planned the same; idles: times when the same nothing was planned.

    difference: None when the whole recording was followed.
    """

    plans: int
    idles: int
    difference: Difference | None


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """A step as it ran. cycle_ns: from its plan's input to its commit's; duration_ns: of that, what
    the executor took."""

    plan: StepPlan
    duration_ns: int
    cycle_ns: int


def replay_recording(recording: Recording, policies: Policies) -> Replayed:
    """Give a fresh scheduler all that was recorded. `policies` must be fresh too."""
    scheduler = Scheduler(recording.header.config, policies)
    plans = idles = 0
    for number, one in enumerate(recording.inputs):
        try:
            answer, _ = apply_input(scheduler, one)
        except (ExecutorLost, InvalidParameter) as error:
            # What was recorded took effect; a scheduler that refuses it has gone another way.
            return Replayed(plans, idles, Difference(number, _show(one), f"refused: {error}"))
        if isinstance(one, Plan):
            assert answer is not None
            if encode(answer) != encode(one):
                return Replayed(plans, idles, Difference(number, *_cut(_show(one), _show(answer))))
            plans += one.plan is not None
            idles += one.plan is None
    return Replayed(plans, idles, None)


def list_steps(recording: Recording) -> list[MeasuredStep]:
    """The steps that were committed, in order."""
    planned: dict[int, Plan] = {}
    steps = []
    for one in recording.inputs:
        if isinstance(one, Plan) and one.plan is not None:
            planned[one.plan.step] = one
        elif isinstance(one, Commit):
            begun = planned.pop(one.outcome.step)
            assert begun.plan is not None
            steps.append(MeasuredStep(begun.plan, one.outcome.duration_ns, one.now - begun.now))
    return steps


def measure_recording(recording: Recording, policies: Policies) -> Records:
    """What the requests of a recording went through, as a simulation would have recorded it.

    Arrivals are those of the header, else submissions; times count from the first. A request
    of several continuations ends with the last. `policies` must be fresh.
    """
    return _Observer(recording).run(Scheduler(recording.header.config, policies))


@dataclass(slots=True)
class _Observer:
    """Writes the records of one recording."""

    recording: Recording
    records: Records = field(default_factory=lambda: Records(1))
    lives: dict[str, Life] = field(default_factory=dict)
    unplanned: dict[str, Life] = field(default_factory=dict)
    start_ns: int = 0

    def run(self, scheduler: Scheduler) -> Records:
        arrivals = self.recording.header.arrivals
        submits = [one for one in self.recording.inputs if isinstance(one, Submit)]
        times = [arrivals.get(one.request.id, one.now) for one in submits]
        self.start_ns = min(times, default=0)
        order = sorted(range(len(submits)), key=lambda at: times[at])
        for index, at in enumerate(order):
            request = submits[at].request
            arrival = Arrival(
                time_ns=times[at] - self.start_ns,
                prompt_tokens=len(request.prompt),
                new_tokens=request.max_new_tokens,
                tenant=request.tenant,
                priority=request.priority,
                ttft_ns=request.ttft_ns,
                itl_ns=request.itl_ns,
            )
            self.records.add(arrival, index)
            self.lives[request.id] = self.unplanned[request.id] = Life(index, arrival, 0)
        self._walk(scheduler)
        return self.records

    def _walk(self, scheduler: Scheduler) -> None:
        records, begun = self.records, dict[int, Plan]()
        for one in self.recording.inputs:
            if isinstance(one, Submit):
                answer = scheduler.submit(one.request, one.now)
                if isinstance(answer, Rejected):
                    life = self.lives[one.request.id]
                    records.end(life, one.now - self.start_ns, _FATES[Rejected])
                continue
            _, updates = apply_input(scheduler, one)
            if isinstance(one, Plan) and one.plan is not None:
                begun[one.plan.step] = one
                self._note_planned(one)
            elif isinstance(one, Commit):
                plan = begun.pop(one.outcome.step)
                assert plan.plan is not None
                self._count_step(plan.plan, one.now - plan.now)
            if isinstance(one, Commit | Cancel | Lose):
                records.end_ns = one.now - self.start_ns
                self._note(updates, records.end_ns)

    def _note_planned(self, one: Plan) -> None:
        assert one.plan is not None
        for row in one.plan.rows if self.unplanned else ():
            life = self.unplanned.pop(row.sequence.request, None)
            if life is not None:
                life.planned_ns = one.now - self.start_ns
                life.cached_tokens = row.start

    def _count_step(self, plan: StepPlan, cycle_ns: int) -> None:
        totals = self.records.totals[0]
        totals.busy_ns += cycle_ns
        totals.steps += 1
        totals.step_rows += len(plan.rows)
        totals.step_tokens += plan.num_tokens
        totals.prefill_tokens += sum(len(row.tokens) for row in plan.rows if len(row.tokens) > 1)
        totals.swapped_blocks += len(plan.swaps_out) + len(plan.swaps_in)

    def _note(self, updates: Sequence[Update], now_ns: int) -> None:
        gaps = self.records.gaps
        for update in updates:
            life = self.lives[update.sequence.request]
            if isinstance(update, TokensEmitted):
                count = len(update.tokens)
                if life.first_token_ns:
                    gap_ns = now_ns - life.last_token_ns
                    gaps.add(gap_ns)
                    life.worst_gap_ns = max(life.worst_gap_ns, gap_ns)
                else:
                    life.first_token_ns = now_ns
                if count > 1:
                    gaps.add(0, count - 1)
                life.new_tokens += count
                life.last_token_ns = now_ns
            elif isinstance(update, SequenceEnded):
                self.records.end(life, now_ns, _FATES[type(update.ending)])
            else:
                life.preemptions += 1


_FATES = {
    Finished: FATES.index("finished"),
    Rejected: FATES.index("rejected"),
    Cancelled: FATES.index("cancelled"),
    Failed: FATES.index("failed"),
}


def _show(one: object) -> str:
    return encode(one).decode()


def _cut(recorded: str, replayed: str) -> tuple[str, str]:
    """Both from a little before where they differ."""
    at = next(
        (
            place
            for place, (one, other) in enumerate(zip(recorded, replayed, strict=False))
            if one != other
        ),
        min(len(recorded), len(replayed)),
    )
    begin = max(0, at - _SHOWN // 4)
    dots = "…" if begin else ""
    end = begin + _SHOWN
    return dots + recorded[begin:end], dots + replayed[begin:end]
