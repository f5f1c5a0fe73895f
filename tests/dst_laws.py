"""The laws that hold in every simulated world, checked while it runs.

Laws listens to the engine's loop in front of the real RequestBook and recounts, from what goes in
and out alone, what the engine owes each request. A broken law is an AssertionError that names it:

- tokens: what a request gets is what it gives alone, each token once and in order, at the
  scheduler, and in what is delivered behind the stop strings.
- endings: each continuation ends once, nothing follows, and no ending comes without its cause.
- order: nobody who waits is overtaken but by whom the policy ranks before it, and the first of
  those that run is not preempted.
- waiting: a request waits for at most as many committed steps, times the steps in flight, as those
  that may go before it have tokens: who was live when it came, who overtook it, and who was
  preempted meanwhile, once more. One of them computes a token in every step, or in the next.
- budgets: tokens and rows of a step, its pace's limits, and rows that ask for what is known.
- conservation: submitted = finished + rejected + cancelled + failed + live, at the scheduler, the
  loop and the metrics, and the three agree.
- memory: sim/invariants.py recounts every block, and at the end all of them are free.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dst_scene import Scene
from scheduler_model import (
    Running,
    Told,
    check_plan,
    compute_alone,
    extend_chain,
    hear_tokens,
)
from step_costs import LinearStepCost
from twostroke.core.scheduler import Scheduler
from twostroke.core.types import (
    Cancelled,
    Ending,
    Failed,
    Finished,
    Preempted,
    Request,
    SequenceEnded,
    SequenceId,
    StepOutcome,
    StepPlan,
    TokensEmitted,
    Update,
)
from twostroke.engine.loop import MAX_LOSSES, EngineLoop
from twostroke.engine.metrics import EngineMetrics
from twostroke.engine.outputs import OutputDelta
from twostroke.engine.request import RequestBook
from twostroke.errors import ExecutorLost
from twostroke.policies.target import BLOCK_TOKENS
from twostroke.sim.invariants import check
from twostroke.spec.work import StepTotals, add_totals


@dataclass(slots=True, eq=False)
class Known:
    """One accepted request, as somebody outside knows it.

    before: tokens of those that may go before it. losses: executors lost in a row with its rows,
    the last of them, where was_alone, with nobody else's. got: tokens delivered, by continuation.
    endings: delivered ones.
    """

    request: Request
    number: int
    arrived_ns: int
    stop: int
    steps: int
    before: int
    live: int
    planned: bool = False
    losses: int = 0
    was_alone: bool = False
    got: list[list[int]] = field(default_factory=list)
    endings: list[Ending | None] = field(default_factory=list)

    def get_work(self, context_tokens: int) -> int:
        """Most tokens that its continuations compute, the prompt once."""
        one, prompt = self.request, len(self.request.prompt)
        return prompt + one.n * min(one.max_new_tokens, context_tokens - prompt)


class Laws:
    """A LoopListener in front of `book`; also counts what was worth simulating."""

    def __init__(
        self, scene: Scene, scheduler: Scheduler, book: RequestBook, metrics: EngineMetrics
    ) -> None:
        self.told: dict[SequenceId, Told] = {}
        self.flights: deque[Running] = deque()
        self.parts: dict[int, StepPlan] = {}  # what an executor was given last of a step
        self.live: dict[str, Known] = {}
        self.asked: dict[SequenceId, Ending] = {}
        self.num_accepted = self.num_rejected = self.num_steps = 0
        self.num_lost = self.num_tokens = self.num_preempted = 0
        self.is_closed = False
        self.says: Callable[[object], object] | None = None  # hears of everything, for a replay
        self._scene = scene
        self._scheduler = scheduler
        self._book = book
        self._metrics = metrics
        self._batch: set[str] = set()
        self._last: set[SequenceId] = set()  # who had a row in the plan before
        self._cost = LinearStepCost()
        self._delivered: list[Known] = []  # everybody, for the end

    def accept(self, request: Request, stop: int, now_ns: int) -> Known:
        """A request was accepted; its chains begin with the prompt."""
        context = self._scene.config.context_tokens
        before = sum(one.get_work(context) for one in self.live.values())
        known = Known(
            request, self.num_accepted, now_ns, stop, self.num_steps, before, request.n,
            got=[[] for _ in range(request.n)], endings=[None] * request.n,
        )  # fmt: skip
        self.num_accepted += 1
        if self.says is not None:
            self.says(request)
        self.live[request.id] = known
        self._delivered.append(known)
        for index in range(request.n):
            chain: list[int] = []
            extend_chain(chain, request.prompt)
            id = SequenceId(request.id, index)
            self.told[id] = Told(request, index, list(request.prompt), chain)
            self.asked.pop(id, None)
        return known

    # ---- LoopListener ---------------------------------------------------------------------------

    def step_started(self, plan: StepPlan, now_ns: int) -> None:
        """A plan is about to be given to the executor."""
        if self.says is not None:
            self.says(plan)
        self.flights.append(Running(plan, [self.told[row.sequence] for row in plan.rows]))
        check_plan(self.flights, self.told, self._scene.config)
        assert plan.iterations <= self._scene.max_iterations, "budgets: too many iterations"
        assert plan.iterations == 1 or plan.num_tokens == len(plan.rows), "budgets: a long stride"
        self._check_order(plan)
        self._check_pace(plan)
        self._last = {row.sequence for row in plan.rows}
        self._book.step_started(plan, now_ns)

    def step_committed(self, plan: StepPlan, outcome: StepOutcome) -> None:
        """A step has become lasting."""
        assert self.flights.popleft().plan is plan, "endings: a step was committed out of order"
        self.num_steps += 1
        for row in plan.rows:
            if row.sequence.request in self.live:
                self.live[row.sequence.request].losses = 0
        for one in self.live.values():
            waited = self.num_steps - one.steps
            bound = self._scene.max_in_flight * (one.before + 1)
            is_due = one.planned or waited <= bound
            assert is_due, f"waiting: {one.request.id} for {waited} steps, of {bound}"
        self._book.step_committed(plan, outcome)

    def executor_lost(self, lost: ExecutorLost) -> None:
        """Whose rows were in the first step in flight is a suspect."""
        self.num_lost += 1
        if self.says is not None:
            self.says(repr(lost))
        self.is_closed |= self._scene.replacements == 0
        suspect = self.flights[0].plan
        rows = self.parts.get(suspect.step, suspect).rows
        suspects = {row.sequence.request for row in rows}
        for id in suspects & self.live.keys():
            self.live[id].losses += 1
            self.live[id].was_alone = len(suspects) == 1
        self.flights.clear()
        self._batch.clear()
        self._book.executor_lost(lost)

    def updated(self, updates: Sequence[Update], now_ns: int) -> Sequence[SequenceId]:
        """New tokens and endings, before anybody else hears of them."""
        for update in updates:
            if self.says is not None:
                self.says(update)
            told = self.told[update.sequence]
            assert told.ending is None, f"endings: {update.sequence} is spoken of after its end"
            if isinstance(update, TokensEmitted):
                hear_tokens(told, update)
                self.num_tokens += len(update.tokens)
            elif isinstance(update, SequenceEnded):
                self._check_ending(update.sequence, told, update.ending)
            else:
                assert isinstance(update, Preempted)
                self._note_preempted(update.sequence)
        if not self._scheduler.num_running:
            self._batch.clear()
        stops = self._book.updated(updates, now_ns)
        self.asked.update((id, Finished("stop")) for id in stops)
        return stops

    def deliver(self) -> None:
        """Output goes to the sinks."""
        self._book.deliver()

    # ---- what is delivered ----------------------------------------------------------------------

    def take(self, known: Known, deltas: Sequence[OutputDelta], ended: bool) -> None:
        """The sink of one request."""
        for delta in deltas:
            name = f"{known.request.id}/{delta.index}"
            assert known.endings[delta.index] is None, f"endings: {name} goes on after its end"
            known.got[delta.index] += delta.tokens
            if delta.ending is None:
                continue
            known.endings[delta.index] = delta.ending
            tokens, ending = self._compute_cut(known, delta.index)
            got = known.got[delta.index]
            assert got == tokens[: len(got)], f"tokens: {name} was delivered others than alone"
            asked = SequenceId(known.request.id, delta.index) in self.asked
            if isinstance(delta.ending, Finished) and not (asked and len(got) < len(tokens)):
                assert got == tokens, f"tokens: {name} was not delivered all"
                assert asked or delta.ending == ending, f"endings: {name} as {delta.ending}"
        is_over = all(one is not None for one in known.endings)
        assert ended == is_over, f"endings: {known.request.id} is not over, or was before"

    def _compute_cut(self, known: Known, index: int) -> tuple[list[int], Finished]:
        """What is delivered of a continuation alone: up to its stop string."""
        tokens, ending = compute_alone(known.request, index, self._scene.config)
        if known.stop in tokens:
            return tokens[: tokens.index(known.stop) + 1], Finished("stop")
        return tokens, ending

    # ---- laws -----------------------------------------------------------------------------------

    def check_between(self, loop: EngineLoop) -> None:
        """What holds after every event."""
        check(self._scheduler)
        counts, stats = self._scheduler.counts, self._metrics.get_stats()
        live = (counts["live"], loop.num_live, stats.live, len(self.live))
        assert len(set(live)) == 1, f"conservation: {live} are live"
        ended = counts["finished"] + counts["cancelled"] + counts["failed"]
        submitted = self.num_accepted + self.num_rejected
        assert counts["submitted"] == stats.submitted == submitted, "conservation: submitted"
        assert counts["rejected"] == stats.rejected == self.num_rejected, "conservation: rejected"
        assert ended == sum(stats.ended.values()), "conservation: ended"
        assert submitted == ended + self.num_rejected + len(self.live), "conservation: lost one"
        assert stats.executor_losses == self.num_lost, "conservation: executors"
        killers = [one for one in self.live.values() if one.was_alone and one.losses >= MAX_LOSSES]
        assert not killers, "endings: who kills executors goes on"

    def check_end(self) -> None:
        """What holds when everything is over."""
        assert not self.live, f"endings: never ended: {list(self.live)}"
        assert all(None not in one.endings for one in self._delivered), "endings: none delivered"
        delivered = sum(len(tokens) for one in self._delivered for tokens in one.got)
        counted = self._metrics.get_stats().generation_tokens
        assert delivered == counted, f"tokens: {counted} counted, {delivered} delivered"
        config, memory = self._scene.config, self._scheduler.memory
        assert self._scheduler.num_free_blocks == config.num_blocks, "memory: blocks leaked"
        assert len(memory.free_host) == config.host_blocks, "memory: host blocks leaked"
        assert not any(memory.allocator.pins), "memory: pins leaked"

    def _check_ending(self, id: SequenceId, told: Told, ending: Ending) -> None:
        told.ending = ending
        known = self.live[id.request]
        known.live -= 1
        if not known.live:
            del self.live[id.request]
        tokens, alone = compute_alone(told.request, told.index, self._scene.config)
        drawn = told.tokens[len(told.request.prompt) :]
        assert drawn == tokens[: len(drawn)], f"tokens: {id} drew others than alone"
        asked = self.asked.get(id)
        if isinstance(ending, Failed):
            may_fail = self.is_closed or (known.was_alone and known.losses >= MAX_LOSSES)
            assert may_fail, f"endings: {id} failed for no reason: {ending.reason}"
        elif ending == asked:
            pass
        else:
            assert not isinstance(ending, Cancelled), f"endings: nobody cancelled {id}"
            assert drawn == tokens, f"tokens: {id} finished without all of them"
            assert ending == alone, f"endings: {id} ended as {ending}, alone as {alone}"

    def _check_order(self, plan: StepPlan) -> None:
        """Who is planned for the first time goes before everybody of its lane who still waits."""
        ids = dict.fromkeys(row.sequence.request for row in plan.rows)
        first = [self.live[id] for id in ids if not self.live[id].planned]
        for one in first:
            one.planned = True
        waiting = [one for one in self.live.values() if not one.planned] if first else []
        scene = self._scene
        for one in first:
            lane = scene.get_lane(one.request)
            least = scene.get_ranks(one.request, one.arrived_ns)[0], one.number
            for other in waiting:
                if other.number < one.number:
                    other.before += one.get_work(scene.config.context_tokens)
                if scene.get_lane(other.request) == lane:
                    most = scene.get_ranks(other.request, other.arrived_ns)[1], other.number
                    assert least < most, f"order: {one.request.id} overtook {other.request.id}"

    def _note_preempted(self, id: SequenceId) -> None:
        """Somebody who runs may go before whoever is preempted, so the first always proceeds."""
        scene, one = self._scene, self.live[id.request]
        self.num_preempted += 1
        for other in self.live.values():
            other.before += one.get_work(scene.config.context_tokens)
        most = scene.get_ranks(one.request, one.arrived_ns)[1], one.number
        siblings = (self.told[SequenceId(id.request, at)] for at in range(id.index))
        others = (
            (scene.get_ranks(other.request, other.arrived_ns)[0], other.number)
            for other in self.live.values()
            if other.planned and other is not one
        )
        is_behind = any(told.ending is None for told in siblings) or any(
            least < most for least in others
        )
        assert is_behind or scene.policies.order.changes, f"order: {id} was first and is preempted"

    def _check_pace(self, plan: StepPlan) -> None:
        """The limits that the named paces promise."""
        choice = self._scene.choice
        if choice is None:
            return
        prompts = [len(row.tokens) for row in plan.rows if len(row.tokens) - row.drafts > 1]
        if choice.pace == "fixed" and choice.fixed_tokens and prompts:
            left = choice.fixed_tokens - (len(plan.rows) - len(prompts))
            assert sum(prompts) <= max(1, left), "budgets: more prompt than the fixed budget"
        if choice.pace == "static":
            self._batch.update(row.sequence.request for row in plan.rows)
            assert len(self._batch) <= choice.batch_size, "budgets: somebody joined a static batch"
        if choice.pace == "target" and sum(prompts) > BLOCK_TOKENS and not choice.drafts:
            self._check_target(plan)

    def _check_target(self, plan: StepPlan) -> None:
        """More than one block of prompts only where running decodes' targets are kept."""
        choice, totals, targets = self._scene.choice, StepTotals(), list[int]()
        assert choice is not None
        for row in plan.rows:
            sampled = int(row.sampling is not None)
            more = self._cost.get_row_totals(len(row.tokens), row.start, sampled)
            totals = add_totals(totals, more)
            told = self.told[row.sequence]
            if row.start >= len(told.request.prompt) and row.sequence in self._last:
                itl_ns = self.live[row.sequence.request].request.itl_ns or choice.itl_ns
                targets.append(itl_ns)
        if targets:
            assert self._cost.predict_ns(totals) <= min(targets), "budgets: a target is not kept"
