"""A simulated world: the scheduler and the engine's loop that serve, on a virtual clock.

Owns the order of events and what goes wrong with executors; decides nothing that an engine decides.
Steps take the time that the simulated executor says, and are run on cells that model KV contents,
so a block that is shared, moved or reused wrongly shows as a wrong token. Cells outlive their
executor, as memory does that a dead process shared.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

from dst_laws import Laws
from dst_scene import BLOCK_BYTES, Cancel, Scene
from fakes import make_vocabulary
from scheduler_model import FakeExecutor, RandomDrafter, Running
from step_costs import LinearStepCost
from twostroke.core.ports import ExecutorInfo, OnDone, StepAnswer
from twostroke.core.scheduler import Scheduler
from twostroke.core.types import (
    Accepted,
    Cancelled,
    Finished,
    Request,
    SequenceId,
    StepOutcome,
    StepPlan,
)
from twostroke.engine.loop import EngineLoop, LoopPolicy
from twostroke.engine.metrics import EngineMetrics
from twostroke.engine.request import RequestBook, RequestState, TextRules
from twostroke.errors import EngineClosed, ExecutorLost
from twostroke.exec.simulated import SimulatedExecutor, SimulatedFaults
from twostroke.sim.clock import NEVER_NS, VirtualClock
from twostroke.sim.faults import ClockJumps, ExecutorDies, ExecutorSlows, Fault, StepDies
from twostroke.text.tokenizer import Tokenizer

MOST_EVENTS = 5_000


@lru_cache
def make_tokenizer() -> Tokenizer:
    """One for all worlds: a token is a byte."""
    return Tokenizer.from_vocabulary(make_vocabulary())


class CheckedExecutor:
    """A SimulatedExecutor for the times, over cells for the tokens; it errs where it is told to."""

    def __init__(self, world: World) -> None:
        self.inner = SimulatedExecutor(world.info, LinearStepCost(), world.clock)
        self._world = world
        self._runs: deque[Running] = deque()
        self._ran = True  # whether every step before was run

    def describe(self) -> ExecutorInfo:
        return self.inner.describe()

    def start(self, plan: StepPlan, on_done: OnDone) -> None:
        harm, laws = self._world.start_step(), self._world.laws
        laws.parts[plan.step] = plan
        if harm == "refuses":
            self._ran = False
            self.inner.lose("it starts nothing")
            raise ExecutorLost("it starts nothing")
        flight = next(one for one in laws.flights if one.plan.step == plan.step)
        told = dict(zip((row.sequence for row in flight.plan.rows), flight.told, strict=True))
        step = Running(plan, [told[row.sequence] for row in plan.rows])
        self._runs.append(step)
        self.inner.start(plan, partial(self._answer, on_done, harm))

    def read_kv(self, blocks: Any) -> bytes:
        return self.inner.read_kv(blocks)

    def write_kv(self, handle: bytes, blocks: Any) -> None:
        self.inner.write_kv(handle, blocks)

    def close(self) -> None:
        self.inner.close()

    def _answer(self, on_done: OnDone, harm: str, answer: StepAnswer) -> None:
        """Run the oldest step, or damage what it may have written, and answer it."""
        step, cells, clock = self._runs.popleft(), self._world.cells, self._world.clock
        if not isinstance(answer, StepOutcome):
            damage = self._world.rng.randrange(3)
            if damage == 1 and self._ran:
                cells.run(step)
            else:
                self._ran = False
            if damage == 2:
                cells.damage(step)
            on_done(answer)
            if harm == "late":
                clock.call_at(clock.now_ns() + 5_000, partial(on_done, StepOutcome(0, (), 0)))
            return
        ran = cells.run(step, len(answer.iteration_ns) or 1)
        outcome = replace(answer, results=ran.results)
        on_done(_falsify(outcome, harm))
        if harm == "twice":
            on_done(outcome)


def _falsify(outcome: StepOutcome, harm: str) -> Any:
    """The outcome as an executor gives it that errs in this way."""
    results, first = outcome.results, outcome.results[0]
    if harm == "short":
        return replace(outcome, results=results[1:])
    if harm in ("other_step", "next_step"):
        return replace(outcome, step=outcome.step + (7 if harm == "other_step" else 1))
    if harm == "bad_token":
        return replace(outcome, results=(replace(first, tokens=(1 << 40,)), *results[1:]))
    if harm == "one_more_token":
        return replace(outcome, results=(replace(first, tokens=(*first.tokens, 1)), *results[1:]))
    if harm == "no_answer":
        return "done"
    if harm == "too_many":
        return replace(outcome, iteration_ns=(1,) * 1000)
    return outcome


class World:
    """One scene, run to its end by `run`; `says` hears of everything that happens."""

    def __init__(self, scene: Scene, says: Callable[[str], object] | None = None) -> None:
        config = scene.config
        self.scene = scene
        self.rng = random.Random(f"world {scene.seed}")
        self.clock = VirtualClock()
        self.info = ExecutorInfo(
            device="simulated",
            backend="simulated",
            threads=1,
            num_blocks=config.num_blocks,
            block_tokens=config.block_tokens,
            kv_bytes=config.num_blocks * BLOCK_BYTES,
            weight_bytes=0,
            max_step_tokens=config.step_tokens,
        )
        self.cells = FakeExecutor(config)
        self.scheduler = Scheduler(config, scene.policies)
        self.metrics = EngineMetrics()
        self.book = RequestBook(make_tokenizer(), self.metrics, lambda: None)
        self.laws = Laws(scene, self.scheduler, self.book, self.metrics)
        if says is not None:
            self.laws.says = lambda what: says(f"{self.clock.now_ns():>9,} ns  {what}")
        self.num_events = 0
        self._num_started = 0
        self._armed: set[int] = set()
        self._replacements = scene.replacements
        self._dies_at = sorted(one.step for one in scene.faults if isinstance(one, StepDies))
        self.executor = self._make_executor()
        policy = LoopPolicy(
            max_in_flight=scene.max_in_flight,
            max_iterations=scene.max_iterations,
            replace_executor=self._replace if scene.replacements != 0 else None,
            step_deadline_ns=scene.deadline_ns,
        )
        self.loop = EngineLoop(self.scheduler, self.executor, self.clock, self.laws, policy)
        self._arrange()

    def run(self) -> None:
        """Let everything happen, and check the laws after each event."""
        clock = self.clock
        while clock.next_ns != NEVER_NS:
            self.num_events += 1
            assert self.num_events < MOST_EVENTS, "endings: it does not come to an end"
            clock.run_next()
            if clock.next_ns == NEVER_NS or self.rng.randrange(100) >= self.scene.lazy:
                self._settle()
        self.laws.check_end()

    def start_step(self) -> str:
        """Count a step that an executor is given; returns what goes wrong with it."""
        self._num_started += 1
        return self.scene.harms.get(self._num_started, "")

    def _settle(self) -> None:
        """Pump until nothing is left to take in, and see to it that the loop is woken in time."""
        self.loop.pump()
        while self.loop.has_answers:
            self.loop.pump()
        self.laws.is_closed = self.loop.closed_reason is not None
        wake_ns = self.loop.next_wake_ns
        if wake_ns is not None and wake_ns not in self._armed:
            self._armed.add(wake_ns)
            self.clock.call_at(wake_ns, partial(self._armed.discard, wake_ns))
        self.laws.check_between(self.loop)

    # ---- what happens ---------------------------------------------------------------------------

    def _arrange(self) -> None:
        """Put everything that comes from outside on the clock."""
        at: Callable[[int, Callable[[], None]], None] = self.clock.call_at
        for time_ns, request, stop in self.scene.arrivals:
            at(time_ns, partial(self._submit, request, stop))
        for cancel in self.scene.cancels:
            at(cancel.time_ns, partial(self._cancel, cancel))
        for fault in self.scene.faults:
            if not isinstance(fault, StepDies):
                at(fault.time_ns, partial(self._break, fault))
            if isinstance(fault, ExecutorSlows):
                at(fault.time_ns + fault.lasting_ns, partial(self._set_speed, 100))
        if self.scene.closes_ns:
            at(self.scene.closes_ns, self._close)

    def _submit(self, request: Request, stop: int) -> None:
        """As the engine's service does it."""
        if request.id in self.book:
            return
        try:
            answer = self.loop.submit(request)
        except EngineClosed:
            return
        laws, drafter = self.laws, self.scene.policies.drafter
        if not isinstance(answer, Accepted):
            laws.num_rejected += 1
            self.metrics.record_rejected()
            return
        if isinstance(drafter, RandomDrafter):
            drafter.requests[request.id] = request
        known = laws.accept(request, stop, self.clock.now_ns())
        rules = TextRules(make_tokenizer(), (chr(stop),) if stop >= 0 else ())
        state = RequestState(request, rules, partial(laws.take, known))
        self.book.open(state, self.clock.now_ns())

    def _cancel(self, cancel: Cancel) -> None:
        live = list(self.laws.live)
        if not live:
            return
        id = live[cancel.pick % len(live)]
        request = self.laws.live[id].request
        index = cancel.pick % request.n if cancel.one else None
        ending = Finished("stop") if cancel.stops and cancel.one else Cancelled()
        for each in range(request.n) if index is None else (index,):
            self.laws.asked.setdefault(SequenceId(id, each), ending)
        self.loop.cancel(id, index=index, ending=ending)

    def _break(self, fault: Fault) -> None:
        inner = self.executor.inner
        if isinstance(fault, ClockJumps):
            self.clock.jump(fault.by_ns)
        elif isinstance(fault, ExecutorSlows):
            self._set_speed(fault.percent)
        elif isinstance(fault, ExecutorDies):
            inner.lose("the executor died")
        else:
            inner.silence()

    def _set_speed(self, percent: int) -> None:
        self.executor.inner.slow_percent = percent

    def _close(self) -> None:
        self.laws.is_closed = True
        self.loop.close("the engine was closed")

    # ---- executors ------------------------------------------------------------------------------

    def _make_executor(self) -> CheckedExecutor:
        executor = CheckedExecutor(self)
        if self._dies_at:
            executor.inner.faults = SimulatedFaults(lost_at_step=self._dies_at.pop(0))
        return executor

    def _replace(self, lost: ExecutorLost) -> CheckedExecutor:
        if self._replacements is not None:
            self._replacements -= 1
            if self._replacements < 1:
                self.laws.is_closed = True
                raise ExecutorLost("no other is left")
        self.executor = self._make_executor()
        self.executor.inner.ready_ns = self.clock.now_ns() + self.scene.restart_ns
        return self.executor
