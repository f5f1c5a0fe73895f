"""Attribution: keeps the accounts of an engine's steps and requests while it runs.

Owns the last steps' accounts, the accounts of requests, and the sums of all. What happens in the
step itself is a note of a few values: counting is done for many steps at a time, because a step
leaves none of this code in the caches, or when somebody asks. Notes come from the engine's thread;
anybody may ask. It must never change what it is told of, and keeps true that the wall times of
steps follow one another without a gap and that a request's account sums to its time.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import add, sub
from typing import NamedTuple

from twostroke.core.types import Row, StepOutcome, StepPlan
from twostroke.engine.accounts import (
    WALL_PARTS,
    CauseSums,
    RowAccount,
    StepAccount,
    StepCounter,
    divide_wall,
)
from twostroke.engine.outputs import RequestAccount, RequestTimings
from twostroke.engine.parts import PartTimes
from twostroke.spec.device import DeviceSpec
from twostroke.spec.work import ModelWork, StepTotals

STEPS_KEPT = 2000
REQUESTS_KEPT = 500
_NOTES_KEPT = 64

_NO_TOTALS = StepTotals()


@dataclass(frozen=True, slots=True)
class EndedRequest:
    """A request that has ended, and its timings with their account."""

    request: str
    timings: RequestTimings


@dataclass(frozen=True, slots=True)
class AttributionTotals:
    """All steps so far: counts, and seconds by WALL_PARTS and by CAUSES.

    floor_seconds is 0 and cause_seconds empty where nobody knows the machine's limits.
    """

    steps: int
    flops: int
    bytes: int
    floor_seconds: float
    wall_seconds: float
    part_seconds: dict[str, float]
    cause_seconds: dict[str, float]


class _Note(NamedTuple):
    """What is kept of a step until it is counted. engine_ns: of the thread so far, by PARTS.

    A tuple, as the accounts are: a frozen dataclass takes three times as long to make.
    """

    plan: StepPlan
    outcome: StepOutcome
    started_ns: int
    ended_ns: int
    engine_ns: tuple[int, ...]


@dataclass(slots=True, eq=False)
class _Sums:
    """What is known of a live request."""

    prefill_ns: float = 0.0
    decode_ns: float = 0.0
    others_ns: float = 0.0
    python_ns: float = 0.0
    prefill_floor_ns: float = 0.0
    decode_floor_ns: float = 0.0
    has_begun: bool = False


class Attribution:
    """The accounts of one engine.

    work: counts of its model. device: this machine's limits; without them there are no floors.
    steps_kept: of the last steps, how many. `follow` comes before the first note.
    """

    def __init__(
        self, work: ModelWork, device: DeviceSpec | None = None, steps_kept: int = STEPS_KEPT
    ) -> None:
        self._lock = threading.Lock()
        self._counter = StepCounter(work, device)
        self._work = work
        self._notes: deque[_Note] = deque()
        self._started: deque[tuple[int, int]] = deque()  # step, when
        self.follow(PartTimes(0))
        self._steps: deque[StepAccount] = deque(maxlen=steps_kept)
        self._ended: deque[EndedRequest] = deque(maxlen=REQUESTS_KEPT)
        self._live: dict[str, _Sums] = {}
        self._counts: Counter[str] = Counter()
        self._part_ns = [0] * len(WALL_PARTS)
        self._causes = CauseSums()

    @property
    def device(self) -> DeviceSpec | None:
        """The limits that floors are made of."""
        return self._counter.device

    def set_limits(self, device: DeviceSpec) -> None:
        """Floors of steps counted from now on are those of this machine."""
        with self._lock:
            self._count_notes()
            self._counter = StepCounter(self._work, device)

    def follow(self, parts: PartTimes) -> None:
        """Take the times of this engine's thread."""
        self._parts = parts
        self._last_ns = parts.last_ns
        self._last_parts = parts.get_values()

    # ---- notes, on the engine's thread ----------------------------------------------------------

    def begin_request(self, request: str) -> None:
        """A request was accepted: its account is kept from now on."""
        with self._lock:
            self._live[request] = _Sums()

    def note_started(self, step: int, now_ns: int) -> None:
        """A step was handed to the executor."""
        self._started.append((step, now_ns))

    def note_committed(self, plan: StepPlan, outcome: StepOutcome) -> None:
        """A step's outcome was taken in."""
        started_ns = 0
        while self._started and self._started[0][0] <= plan.step:
            started_ns = self._started.popleft()[1]
        parts = self._parts
        self._notes.append(_Note(plan, outcome, started_ns, parts.last_ns, parts.get_values()))

    def catch_up(self) -> None:
        """Count when there is enough to count; called when nobody waits for the thread."""
        if len(self._notes) >= _NOTES_KEPT:
            with self._lock:
                self._count_notes()

    def end_request(self, request: str, timings: RequestTimings) -> RequestAccount:
        """The account of a request that has ended now."""
        with self._lock:
            self._count_notes()
            sums = self._live.pop(request, None) or _Sums()
            account = _settle(timings, sums)
            self._ended.append(EndedRequest(request, replace(timings, account=account)))
            return account

    # ---- questions, from any thread -------------------------------------------------------------

    def get_steps(self) -> tuple[StepAccount, ...]:
        """The last steps, in order."""
        with self._lock:
            self._count_notes()
            return tuple(self._steps)

    def get_ended(self) -> tuple[EndedRequest, ...]:
        """The last requests that have ended, in that order."""
        with self._lock:
            return tuple(self._ended)

    def get_totals(self) -> AttributionTotals:
        """All steps so far, summed."""
        with self._lock:
            self._count_notes()
            counts = self._counts
            return AttributionTotals(
                steps=counts["steps"],
                flops=counts["flops"],
                bytes=counts["bytes"],
                floor_seconds=counts["floor_ns"] / 1e9,
                wall_seconds=counts["wall_ns"] / 1e9,
                part_seconds={
                    name: ns / 1e9 for name, ns in zip(WALL_PARTS, self._part_ns, strict=True)
                },
                cause_seconds={name: ns / 1e9 for name, ns in self._causes.get_ns().items()}
                if self._counter.device is not None
                else {},
            )

    # ---- counting, under the lock ---------------------------------------------------------------

    def _count_notes(self) -> None:
        while self._notes:
            self._count(self._notes.popleft())

    def _count(self, note: _Note) -> None:
        rows, totals, decodes = self._read_rows(note)
        engine_ns = tuple(map(sub, note.engine_ns, self._last_parts))
        begin_ns = self._last_ns
        self._last_ns, self._last_parts = note.ended_ns, note.engine_ns
        floor = self._counter.count(totals)
        decode_floor_ns = 0.0
        if decodes.tokens:
            decode_floor_ns = self._counter.count(decodes).ns if decodes != totals else floor.ns
        outcome = note.outcome
        account = StepAccount(
            step=note.plan.step,
            begin_ns=begin_ns,
            started_ns=note.started_ns,
            ended_ns=note.ended_ns,
            executor_ns=outcome.duration_ns,
            rows=rows,
            totals=totals,
            floor=floor,
            decode_floor_ns=decode_floor_ns,
            part_ns=divide_wall(engine_ns, outcome.duration_ns, outcome.part_ns),
        )
        self._steps.append(account)
        self._add(account)
        self._share(account)

    def _read_rows(self, note: _Note) -> tuple[tuple[RowAccount, ...], StepTotals, StepTotals]:
        """The rows, their sums, and the sums of those that decode alone."""
        get_totals = self._counter.get_row_totals
        rows: list[RowAccount] = []
        every: list[StepTotals] = []
        decodes: list[StepTotals] = []
        for row, result in zip(note.plan.rows, note.outcome.results, strict=True):
            count = len(row.tokens)
            prompt = count_prompt(row)
            sampled = max(0 if row.sampling is None else row.drafts + 1, len(row.scored))
            totals = get_totals(count, row.start, min(sampled, count))
            every.append(totals)
            if not prompt:
                decodes.append(totals)
            rows.append(RowAccount(row.sequence, row.start, count, prompt, len(result.tokens)))
        whole = _sum(every)
        return tuple(rows), whole, whole if len(decodes) == len(every) else _sum(decodes)

    def _add(self, account: StepAccount) -> None:
        counts, floor = self._counts, account.floor
        counts["steps"] += 1
        counts["flops"] += floor.flops
        counts["bytes"] += floor.bytes
        counts["floor_ns"] += round(floor.ns)
        counts["wall_ns"] += account.wall_ns
        self._part_ns = list(map(add, self._part_ns, account.part_ns))
        if floor.part_ns:
            self._causes.add(account)

    def _share(self, account: StepAccount) -> None:
        """Divide the step among the requests in it: each has the whole of its time."""
        computed_ns = account.executor_ns
        python_ns = max(0, account.busy_ns - computed_ns)
        prompts = sum(row.prompt for row in account.rows)
        floor_ns = account.floor.ns
        beside = 1 - account.decode_floor_ns / floor_ns if floor_ns else 0.0
        if prompts and not floor_ns:
            beside = prompts / account.totals.tokens
        decode_ns = computed_ns * (1 - beside)
        own: dict[str, int] = {}
        for row in account.rows:
            request = row.sequence.request
            own[request] = own.get(request, 0) + row.prompt
        for request, tokens in own.items():
            sums = self._live.get(request)
            if sums is None:  # ended while the step ran
                continue
            sums.python_ns += python_ns
            if not sums.has_begun:
                # The engine was busy with others before this request was planned.
                sums.has_begun = True
                before_ns = account.started_ns - account.begin_ns - account.part_ns[-1]
                sums.python_ns -= min(python_ns, max(0, before_ns))
            if tokens:
                share = tokens / account.totals.tokens
                sums.prefill_ns += computed_ns * share
                sums.others_ns += computed_ns * (1 - share)
                sums.prefill_floor_ns += floor_ns * share
            else:
                sums.others_ns += computed_ns * beside
                sums.decode_ns += decode_ns
                sums.decode_floor_ns += account.decode_floor_ns


def count_prompt(row: Row) -> int:
    """Tokens of a row that are no decode: all but one known token and its drafts, or none."""
    known = len(row.tokens) - row.drafts
    return 0 if known == 1 and row.sampling is not None else known


def _sum(totals: Sequence[StepTotals]) -> StepTotals:
    """The totals of all rows together."""
    return StepTotals._make(map(sum, zip(*totals, strict=True))) if totals else _NO_TOTALS


def _settle(timings: RequestTimings, sums: _Sums) -> RequestAccount:
    """An account that sums to the time from submission to end."""
    life_ns = timings.ended_ns - timings.submitted_ns
    queued_ns = (timings.first_planned_ns or timings.ended_ns) - timings.submitted_ns
    left_ns = life_ns - queued_ns
    spans = []
    # Steps of an executor that overlap count twice: what does not fit is left out.
    for span in (sums.prefill_ns, sums.decode_ns, sums.others_ns, sums.python_ns):
        spans.append(max(0, min(round(span), left_ns)))
        left_ns -= spans[-1]
    prefill_ns, decode_ns, others_ns, python_ns = spans
    return RequestAccount(
        queued_ns=queued_ns,
        prefill_ns=prefill_ns,
        decode_ns=decode_ns,
        others_ns=others_ns,
        python_ns=python_ns,
        waited_ns=left_ns,
        prefill_floor_ns=round(sums.prefill_floor_ns),
        decode_floor_ns=round(sums.decode_floor_ns),
    )
