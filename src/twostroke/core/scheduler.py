"""The scheduler: a pure state machine that decides what every step computes.

Seven inputs and no others: submit, cancel, plan, commit, lose, attach, release. It never sees a
tensor, clock, random number or thread, and never iterates over a set, so the same inputs give the
same plans in every process.

One rule replaces phases: a plan spends a token budget closing the gaps between known and computed
tokens: sequences one token behind (decodes) first, then longer gaps (prompts, recomputations) and
newcomers, both in policy order, in the same step (see builder.py).

- Blocks of an ended sequence are reused only once its rows in flight have settled: until then the
  executor may still write to them.
- Preemption happens inside `plan` but is reported by the next commit, cancel or lose.
- What is a matter of choice is asked of `Policies`; no answer of theirs can break an invariant.
"""

from __future__ import annotations

from collections import deque

from twostroke.core.admission import check_config, find_rejection
from twostroke.core.builder import StepBuilder
from twostroke.core.policy import Policies
from twostroke.core.roster import Roster
from twostroke.core.sequence import Sequence, State
from twostroke.core.steps import Flight, Placement, check_outcome
from twostroke.core.types import (
    Accepted,
    BlockId,
    Cancelled,
    Ending,
    Finished,
    Idle,
    Rejected,
    Request,
    RowResult,
    SchedulerConfig,
    StepOutcome,
    StepPlan,
    Token,
    TokensEmitted,
    Update,
)
from twostroke.errors import ExecutorLost, InvalidParameter

MAX_IN_FLIGHT = 2
_CANCELLED = Cancelled()


class Scheduler:
    """Plans steps for many requests over one pool of KV blocks, in the order `policy` gives.

    Counted since the start: num_drafted and num_accepted tokens, num_ignored_results (rows answered
    after their sequence had ended). memory: of its KV, for reading. Attributes with an underscore
    are read by sim/invariants.py and nobody else. Raises InvalidParameter for impossible sizes.
    """

    def __init__(self, config: SchedulerConfig, policies: Policies | None = None) -> None:
        check_config(config)
        self.config = config
        self.num_drafted = self.num_accepted = self.num_ignored_results = 0
        self._policies = policies or Policies()
        self._roster = Roster(config, self._policies)
        self.memory = self._roster.memory
        self._flights: deque[Flight] = deque()
        self._pending: list[Update] = []
        self._next_step = 0

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for blocks."""
        return len(self._roster.waiting)

    @property
    def num_running(self) -> int:
        """Sequences that a plan may pick."""
        return len(self._roster.running)

    @property
    def num_free_blocks(self) -> int:
        """Blocks nobody holds; some may keep a prefix for later."""
        return self.memory.allocator.num_free

    @property
    def num_held_tokens(self) -> int:
        """Tokens of running sequences with KV in the pool; shared ones count for each."""
        return sum(sequence.computed for sequence in self._roster.running)

    @property
    def counts(self) -> dict[str, int]:
        """Requests by fate, that of the last sequence to end; all but "submitted" add up to it."""
        return {**self._roster.fates, "live": len(self._roster.groups)}

    def submit(self, request: Request, now: int) -> Accepted | Rejected:
        """Queue `request`, or say why it can never be served."""
        roster = self._roster
        roster.fates["submitted"] += 1
        rejection = find_rejection(request, self.config)
        if rejection is None and (request.id in roster.groups or request.id in roster.reserved):
            rejection = Rejected(f"id: {request.id!r} is in use")
        if rejection is not None:
            roster.fates["rejected"] += 1
            return rejection
        roster.enter(request, now)
        return Accepted(request.id)

    def cancel(
        self, id: str, now: int, *, index: int | None = None, ending: Ending = _CANCELLED
    ) -> tuple[Update, ...]:
        """End a request, or its continuation `index` only, as `ending`; () when it does not live.

        If the one that computes the prompt is ended before the fork, the next starts it over.
        """
        group = self._roster.groups.get(id)
        live = [one for one in group.sequences if one.state is not State.ENDED] if group else []
        chosen = [sequence for sequence in live if index in (None, sequence.id.index)]
        if group is None or not chosen:
            return ()
        updates, self._pending = self._pending, []
        updates.extend(self._roster.end(sequence, ending) for sequence in chosen)
        if group.live and group.live == group.unborn:
            self._roster.start_carrier(group)
        return tuple(updates)

    def plan(self, now: int, iterations: int = 1) -> StepPlan | Idle:
        """Plan the next step and reserve its blocks; Idle when there is nothing to compute now.

        At most two steps may be in flight; a third plan is Idle. iterations: the most that may be
        planned in one go; there will be several only where planning them one by one would give
        nothing but the same rows.
        """
        if len(self._flights) >= MAX_IN_FLIGHT:
            return Idle(self.num_waiting, len(self._flights))
        follows = bool(self._flights) and self._flights[-1].plan.step == self._next_step - 1
        ahead = self.config.plans_ahead and follows
        builder = StepBuilder(self.config, self._policies, self._roster, now, ahead)
        builder.fill(iterations)
        self._pending += builder.preempted
        flight = builder.build(self._next_step)
        if flight is None:
            return Idle(self.num_waiting, len(self._flights), builder.wake_ns)
        self._next_step += 1
        self._flights.append(flight)
        return flight.plan

    def commit(self, outcome: StepOutcome, now: int) -> tuple[Update, ...]:
        """Make the oldest step in flight lasting and return what came of it.

        Raises `ExecutorLost`, with nothing changed, when `outcome` does not answer its plan.
        """
        flight = self._flights[0] if self._flights else None
        if flight is None or flight.plan.step != outcome.step:
            raise ExecutorLost(f"step {outcome.step} is not the first in flight")
        check_outcome(outcome, flight.plan, self.config.vocab_size)
        self._flights.popleft()
        updates, self._pending = self._pending, []
        made = len(outcome.iteration_ns) or 1
        for placement, result in zip(flight.placements, outcome.results, strict=True):
            self._settle(placement, result, made, updates)
        if self._policies.pace is not None:
            self._policies.pace.note_step(flight.plan, outcome)
        return tuple(updates)

    def lose(self, step: int, reason: str, now: int) -> tuple[Update, ...]:
        """Undo a step in flight, and every later one, because those stand on its results.

        Their rows will be planned again. No executor may still run an undone step: its blocks are
        free from here on. A step that is not in flight changes nothing.
        """
        lost = self._find_flight(step)
        while lost in self._flights:
            flight = self._flights.pop()
            for placement in reversed(flight.placements):
                self._undo(placement)
            for sequence in flight.moved_out:  # whether its KV arrived, nobody knows
                sequence.kept.forget_host()
        updates, self._pending = self._pending, []
        return tuple(updates)

    def attach(
        self, id: str, blocks: tuple[BlockId, ...], tokens_computed: int
    ) -> tuple[BlockId, ...]:
        """Give a waiting request KV that was computed elsewhere, in two calls.

        The first, with no blocks, reserves room and returns the blocks to write to, or () when the
        pool cannot spare them now. The request waits for the second, which names those blocks and
        the tokens they hold, and runs from there; with 0 tokens the transfer failed and it waits as
        before. If it ends in between, its blocks are kept until the second call or `release`.
        Raises InvalidParameter, with nothing changed, for a request that cannot be attached to.
        """
        roster, group = self._roster, self._roster.groups.get(id)
        sequence = roster.reserved.get(id) or (group.sequences[0] if group else None)
        if sequence is None or (id not in roster.reserved and sequence.state is not State.WAITING):
            raise InvalidParameter("id", f"{id!r} is not waiting, so nothing can be attached to it")
        if sequence.group.request.prompt_logprobs is not None:
            raise InvalidParameter("prompt_logprobs", f"{id!r} must compute its prompt here")
        held = sequence.table.get_blocks()
        if blocks != held:
            raise InvalidParameter("blocks", f"must be those reserved for {id!r}, {held}")
        room = len(held) * self.config.block_tokens if held else tokens_computed
        most = min(len(sequence.tokens) - 1, room)
        if not (0 if held else 1) <= tokens_computed <= most:
            raise InvalidParameter("tokens_computed", f"{tokens_computed} is out of range")
        if held:
            roster.settle_reserved(id, tokens_computed)
        elif roster.memory.get_num_blocks(tokens_computed) <= roster.measure_slack():
            roster.reserve(sequence, roster.memory.get_num_blocks(tokens_computed))
        return sequence.table.get_blocks()

    def release(self, id: str) -> None:
        """Forget a request whose KV moved away, without updates; an unknown id changes nothing."""
        self._roster.release(id)
        self._pending = [update for update in self._pending if update.sequence.request != id]

    def _find_flight(self, step: int) -> Flight | None:
        return next((flight for flight in self._flights if flight.plan.step == step), None)

    def _settle(
        self, placement: Placement, result: RowResult, made: int, updates: list[Update]
    ) -> None:
        """Make one row lasting, of which so many iterations were made."""
        sequence, row = placement.sequence, placement.row
        sequence.rows_in_flight -= 1
        if placement.source is not None:
            self.memory.allocator.unpin(placement.source)
        if sequence.state is State.ENDED:
            self.num_ignored_results += 1
            self._roster.free_if_settled(sequence)
            return
        accepted = result.accepted_drafts
        sequence.computed = row.start + len(row.tokens) - row.drafts + accepted + made - 1
        ends = row.sampling is not None and not sequence.rows_in_flight  # nothing stands on it
        if ends and sequence.planned > sequence.computed:
            sequence.planned, table = sequence.computed, sequence.table
            table.shrink(len(table) - self.memory.get_num_blocks(sequence.planned))
        if row.drafts and self._policies.drafter is not None:
            self.num_drafted += row.drafts
            self.num_accepted += accepted
            self._policies.drafter.settle(sequence.id, row.drafts, accepted)
        if placement.arrives:
            sequence.kept.forget_host()
        if result.scored:
            sequence.group.scored.extend(result.scored)
        if result.tokens:
            self._emit(sequence, result, updates)
        else:
            sequence.kept.name_full(sequence.table, sequence.tokens, sequence.computed)
            self._roster.try_fork(sequence)

    def _emit(self, sequence: Sequence, result: RowResult, updates: list[Update]) -> None:
        """Append drawn tokens up to the one that ends the sequence, if any, and report them."""
        count, ending = self._find_ending(sequence, result.tokens)
        sequence.tokens += result.tokens[:count]
        if self.memory.seed:
            lasting = min(sequence.computed, len(sequence.tokens))
            sequence.kept.name_full(sequence.table, sequence.tokens, lasting)
        tokens, logprobs = result.tokens[:count], result.logprobs[:count]
        group = sequence.group
        # Asked first, because calling for every row took a fortieth of a simulation.
        is_told = group.scored_emitted or sequence.id.index != 0
        scored = () if is_told else group.take_scored()
        updates.append(TokensEmitted(sequence.id, tokens, logprobs, scored))
        if self._policies.accounts is not None:
            self._roster.charge(group.request, 0, count)
        if ending is not None:
            updates.append(self._roster.end(sequence, ending))

    def _find_ending(
        self, sequence: Sequence, tokens: tuple[Token, ...]
    ) -> tuple[int, Finished | None]:
        """How many of these drawn tokens belong to a sequence, and how the last of them ends it."""
        request, left = sequence.group.request, sequence.num_left
        if request.stop_tokens and not request.stop_tokens.isdisjoint(tokens):
            least = request.min_new_tokens - sequence.num_new_tokens
            for count, token in enumerate(tokens[:left], 1):
                if token in request.stop_tokens and count >= least:
                    return count, Finished("stop")
        return min(left, len(tokens)), Finished("length") if left <= len(tokens) else None

    def _undo(self, placement: Placement) -> None:
        """Take one row back, as if it had never been planned."""
        sequence, source = placement.sequence, placement.source
        sequence.rows_in_flight -= 1
        if sequence.state is State.ENDED:
            if source is not None:
                self.memory.allocator.unpin(source)
            self._roster.free_if_settled(sequence)
            return
        start = sequence.planned = placement.row.start
        sequence.group.scored_planned -= len(placement.row.scored)
        sequence.table.shrink(placement.grown)
        if source is not None:
            sequence.table.rejoin(start // self.config.block_tokens, source)
        if placement.arrives:
            self._roster.return_to_line(sequence)
