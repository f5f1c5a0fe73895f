"""Accounts of steps: what a step had to compute, the least time for it, and where its time went.

Pure values and functions. A step's wall time runs from the end of the step before to its own end,
so steps follow one another without a gap; it is divided into WALL_PARTS, which sum to it. What the
executor measured is taken as it is; the rest is the engine thread's. Work is counted by
spec/work.py alone, and the floor is its roofline on limits that somebody else has measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import add
from typing import NamedTuple

from twostroke.core.types import SequenceId
from twostroke.engine.parts import PARTS
from twostroke.spec.device import DeviceSpec
from twostroke.spec.step import STEP_PARTS
from twostroke.spec.work import ModelWork, PartFloor, PartWork, StepTotals, get_part_floor

# Of the executor ("executor" where it does not say more), then of the engine's thread (see
# parts.py), without what that counts of an executor.
_ENGINE_PARTS = ("commit", "plan", "deliver", "inbox", "wait", "idle")
WALL_PARTS = (*STEP_PARTS, "executor", *_ENGINE_PARTS)

# What time is spent on: weights coming from memory, arithmetic, and so on. attention and head are
# those parts whatever bounds them. python: beside the arithmetic, checks and waking threads too.
# wait: for an executor elsewhere, beyond what it computes. idle: nothing was live.
CAUSES = ("bandwidth", "arithmetic", "attention", "head", "sampling", "python", "wait", "idle")
_PYTHON = ("arrays", "launch", "results", "commit", "plan", "deliver", "inbox")
_BY_LIMIT = ("elementwise", "projections", "ffn", "executor")

# Which of the engine thread's parts an executor elsewhere has computed beside, first those that are
# most likely.
_OVERLAPPED = (*("arrays", "compute", "results", "wait"), *("deliver", "inbox", "plan", "commit"))
_ROOM = tuple(PARTS.index(name) for name in _OVERLAPPED)
_KEPT = tuple(PARTS.index(name) for name in _ENGINE_PARTS)
_INBOX = PARTS.index("inbox")
_EXECUTOR = WALL_PARTS.index("executor")
_IN_PROCESS = tuple(PARTS.index(name) for name in ("arrays", "compute", "results"))

# work.PARTS; embedding is an elementwise part of the time.
FLOOR_PARTS = ("elementwise", "projections", "attention", "ffn", "head")
_CACHED_SHAPES = 1024


class RowAccount(NamedTuple):
    """One row of a step: `tokens` from position `start`, of them `prompt` of the prompt; `drawn`
    tokens came out. A tuple, because thousands of steps keep all their rows."""

    sequence: SequenceId
    start: int
    tokens: int
    prompt: int
    drawn: int


class StepFloor(NamedTuple):
    """What a step must compute and move, and the least time for each of FLOOR_PARTS.

    part_ns and memory_bound are empty where nobody knows the machine's limits.
    """

    flops: int
    bytes: int
    part_ns: tuple[float, ...] = ()
    memory_bound: tuple[bool, ...] = ()

    @property
    def ns(self) -> float:
        """The whole floor: the parts run one after another."""
        return sum(self.part_ns)

    @property
    def bound_by(self) -> str:
        """The limit that sets most of the floor: "memory" or "compute"; "" where unknown."""
        if not self.part_ns:
            return ""
        memory = sum(ns for ns, by in zip(self.part_ns, self.memory_bound, strict=True) if by)
        return "memory" if 2 * memory >= self.ns else "compute"


class StepAccount(NamedTuple):
    """One committed step, on the engine's clock.

    begin_ns: when the step before had ended; started_ns: when this was handed to the executor;
    part_ns: by WALL_PARTS. decode_floor_ns: the floor of its decodes alone. executor_ns: what the
    executor took.
    """

    step: int
    begin_ns: int
    started_ns: int
    ended_ns: int
    executor_ns: int
    rows: tuple[RowAccount, ...]
    totals: StepTotals
    floor: StepFloor
    decode_floor_ns: float
    part_ns: tuple[int, ...]

    @property
    def wall_ns(self) -> int:
        """From the end of the step before to its own, time without anything live included."""
        return self.ended_ns - self.begin_ns

    @property
    def busy_ns(self) -> int:
        """The wall time without what was idle before."""
        return self.wall_ns - self.part_ns[-1]

    @property
    def causes(self) -> dict[str, float]:
        """Nanoseconds by CAUSES, which sum to the wall time; needs the machine's limits."""
        return get_causes(self.part_ns, self.floor)


class CauseSums:
    """Nanoseconds by CAUSES of many steps with floors, added up by what bounds their parts.

    Of steps whose parts are bound alike the sums have the causes that they have, so most steps are
    one addition; only the time of an executor that does not say its parts is divided step by step.
    """

    def __init__(self) -> None:
        self._alike: dict[tuple[bool, ...], tuple[StepFloor, list[int]]] = {}
        self._apart = dict.fromkeys(CAUSES, 0.0)

    def add(self, account: StepAccount) -> None:
        """One more step."""
        if account.part_ns[_EXECUTOR]:
            _add_to(self._apart, account.causes)
            return
        bound = account.floor.memory_bound
        floor, part_ns = self._alike.get(bound) or (account.floor, [0] * len(WALL_PARTS))
        self._alike[bound] = floor, list(map(add, part_ns, account.part_ns))

    def get_ns(self) -> dict[str, float]:
        """All steps so far."""
        found = dict(self._apart)
        for floor, part_ns in self._alike.values():
            _add_to(found, get_causes(part_ns, floor))
        return found


def _add_to(sums: dict[str, float], causes: dict[str, float]) -> None:
    for name, ns in causes.items():
        sums[name] += ns


class StepCounter:
    """Counts steps' work and floors; remembers shapes, because decodes repeat theirs.

    device: this machine's limits; None counts the work only.
    """

    def __init__(self, work: ModelWork, device: DeviceSpec | None) -> None:
        self.get_row_totals = work.get_row_totals
        self.device = device
        self._work = work
        self._shapes: dict[tuple[int, int], tuple[StepFloor, PartWork]] = {}

    def count(self, totals: StepTotals) -> StepFloor:
        """Work and floor of the step whose rows sum to `totals`."""
        key = (totals.tokens, totals.sampled)
        found = self._shapes.get(key)
        if found is None:
            if len(self._shapes) >= _CACHED_SHAPES:
                self._shapes.clear()
            found = self._shapes[key] = self._count_shape(*key)
        rest, without = found
        part = self._work.get_attention_work(totals)
        flops = rest.flops + part.flops - without.flops
        moved = rest.bytes + part.bytes - without.bytes
        if self.device is None:
            return StepFloor(flops, moved)
        own = get_part_floor(part, self.device)
        elementwise, projections, _, ffn, head = rest.part_ns
        bound = list(rest.memory_bound)
        bound[2] = own.bound_by == "memory"
        part_ns = (elementwise, projections, own.seconds * 1e9, ffn, head)
        return StepFloor(flops, moved, part_ns, tuple(bound))

    def _count_shape(self, tokens: int, sampled: int) -> tuple[StepFloor, PartWork]:
        """A step of so many tokens that attend to nothing, and what attention counts of it."""
        step = self._work.get_totals_work(StepTotals(tokens=tokens, sampled=sampled))
        attention = step.get_part("attention")
        if self.device is None:
            return StepFloor(step.flops, step.bytes), attention
        floors = {part.name: get_part_floor(part, self.device) for part in step.parts}
        embed = floors.pop("embed")
        chosen = [floors[name] for name in FLOOR_PARTS]
        chosen[0] = PartFloor("elementwise", chosen[0].seconds + embed.seconds, chosen[0].bound_by)
        return (
            StepFloor(
                step.flops,
                step.bytes,
                tuple(one.seconds * 1e9 for one in chosen),
                tuple(one.bound_by == "memory" for one in chosen),
            ),
            attention,
        )


def divide_wall(
    engine_ns: Sequence[int], executor_ns: int, part_ns: Sequence[int]
) -> tuple[int, ...]:
    """A step's wall time by WALL_PARTS.

    engine_ns: what the engine's thread spent on each of parts.PARTS in that time, which it sums to.
    executor_ns and part_ns: the executor's time and its STEP_PARTS (or ()). An executor elsewhere
    computes beside the thread: its time is taken out of the thread's waiting first, and what did
    not fit into this step's wall time, because it ran beside the step before, is left out evenly.
    """
    left = list(engine_ns)
    room = executor_ns
    for index in _ROOM:
        taken = min(left[index], room)
        left[index] -= taken
        room -= taken
    # What an executor on this thread took beyond the time it says of the step.
    for index in _IN_PROCESS:
        left[_INBOX] += left[index]
    fitting = executor_ns - room
    if part_ns and room:
        part_ns = _scale(part_ns, fitting)
    own = (*part_ns, 0) if part_ns else (*((0,) * len(STEP_PARTS)), fitting)
    return (*own, *(left[index] for index in _KEPT))


def get_causes(part_ns: Sequence[float], floor: StepFloor) -> dict[str, float]:
    """Time by WALL_PARTS as time by CAUSES, by the limit that bounds each part of this work.

    The time of an executor that does not say its parts is divided as their floors are.
    """
    parts = dict(zip(WALL_PARTS, part_ns, strict=True))
    causes = dict.fromkeys(CAUSES, 0.0)
    for name in ("attention", "head", "sampling", "wait", "idle"):
        causes[name] += parts[name]
    for name in _PYTHON:
        causes["python"] += parts[name]
    if not floor.part_ns:
        causes["arithmetic"] += sum(parts[name] for name in _BY_LIMIT)
        return causes
    whole = floor.ns or 1.0
    for name, floor_ns, by_memory in zip(
        FLOOR_PARTS, floor.part_ns, floor.memory_bound, strict=True
    ):
        cause = name
        if name in _BY_LIMIT:
            cause = "bandwidth" if by_memory else "arithmetic"
            causes[cause] += parts[name]
        causes[cause] += parts["executor"] * floor_ns / whole
    return causes


def _scale(part_ns: Sequence[int], total: int) -> tuple[int, ...]:
    """The same division of a smaller time, to the nanosecond; the last part takes the rounding."""
    whole = sum(part_ns)
    scaled = [ns * total // whole for ns in part_ns]
    scaled[-1] += total - sum(scaled)
    return tuple(scaled)
