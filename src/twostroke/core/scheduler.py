"""The scheduler: a pure state machine that decides what every step computes.

Seven inputs and no others: submit, cancel, plan, commit, lose, attach, release. It never sees a
tensor, a clock, a random number or a thread, and never iterates over a set, so the same inputs
give the same plans in every process.

One rule replaces phases: a plan spends a token budget closing the gaps between known and computed
tokens: sequences one token behind (decodes) first, then longer gaps (prompts, recomputations) and
newcomers, both in policy order, in the same step.

- Admission from the waiting line is strict: if its head does not fit, nobody behind it is tried.
  Small requests overtaking a large one would starve it for as long as they keep coming.
- The head is admitted when the free blocks cover all its known tokens, what running sequences
  still need for theirs, and one spare block for each of these and itself. So admitted prompts do
  not collide half-way, and a preempted sequence does not return only to be preempted again.
- A running sequence that gets no block preempts the last running one behind it that has no row in
  flight; if there is none it keeps its blocks and sits this step out. The first in policy order is
  therefore never preempted and always proceeds, so everything ends.
- Blocks of an ended sequence are reused only once its rows in flight have settled: until then the
  executor may still write to them.
- Preemption happens inside `plan` but is reported by the next commit, cancel or lose.
- Who goes first, how much of the prompts a step takes, what is drafted and how a preempted sequence
  comes back is asked of `Policies`; nothing they answer can break an invariant.
"""

from __future__ import annotations

from collections import deque

from twostroke.core.admission import check_config, find_rejection
from twostroke.core.policy import Load, Policies
from twostroke.core.roster import Roster
from twostroke.core.sequence import Key, Sequence, State
from twostroke.core.steps import Flight, Placement, StepDraft, check_outcome
from twostroke.core.types import (
    Accepted,
    BlockId,
    Cancelled,
    Ending,
    Finished,
    Idle,
    Preempted,
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

    Counted since the start: num_preemptions, num_swaps (of them, KV moved to the host), num_drafted
    and num_accepted tokens, num_ignored_results (rows answered after their sequence had ended).
    Attributes with an underscore are read by sim/invariants.py and nobody else. Raises
    InvalidParameter for a size with which nothing would ever be planned.
    """

    def __init__(self, config: SchedulerConfig, policies: Policies | None = None) -> None:
        check_config(config)
        self.config = config
        self.num_preemptions = self.num_swaps = self.num_ignored_results = 0
        self.num_drafted = self.num_accepted = 0
        self._policies = policies or Policies()
        self._roster = Roster(config, self._policies)
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
    def num_in_flight(self) -> int:
        """Steps planned and neither committed nor lost."""
        return len(self._flights)

    @property
    def num_free_blocks(self) -> int:
        """Blocks nobody holds; some may keep a prefix for later."""
        return self._roster.allocator.num_free

    @property
    def num_cached_blocks(self) -> int:
        """Blocks that hold a named prefix, held or not."""
        return len(self._roster.allocator.prefixes)

    @property
    def prefix_tokens(self) -> tuple[int, int]:
        """Prompt tokens of admitted requests: all, and those found in the prefix cache."""
        return self._roster.prompt_tokens, self._roster.cached_tokens

    @property
    def num_held_tokens(self) -> int:
        """Tokens of running sequences with KV in the pool; shared ones count for each."""
        return sum(sequence.computed for sequence in self._roster.running)

    @property
    def counts(self) -> dict[str, int]:
        """Requests by fate: submitted = finished + rejected + cancelled + failed + released + live.

        One of several sequences has the fate of the last to end; released ones moved elsewhere.
        """
        return {**self._roster.fates, "live": len(self._roster.groups)}

    def get_losses(self, id: str) -> int:
        """Most losses of a sequence of `id` since its last committed row; 0 for an unknown id."""
        group = self._roster.groups.get(id)
        return max(sequence.losses for sequence in group.sequences) if group else 0

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
        """End a request, or its continuation `index` only, as `ending`.

        Returns the updates; () when there is no such live sequence. If the continuation that
        computes the prompt is ended before the fork, the next one starts it over.
        """
        group = self._roster.groups.get(id)
        live = [one for one in group.sequences if one.state is not State.ENDED] if group else []
        chosen = [sequence for sequence in live if index in (None, sequence.id.index)]
        if group is None or not chosen:
            return ()
        updates = self._take_pending()
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
        draft = StepDraft(self.config.step_tokens, self.config.max_rows)
        if len(self._flights) < MAX_IN_FLIGHT:
            self._fill(draft, now, iterations)
        if not draft.placements:
            for sequence in draft.moved_out:  # no step will move its KV
                sequence.kept.forget_host()
            wake_ns = draft.room.wake_ns if draft.room is not None else 0
            return Idle(self.num_waiting, len(self._flights), wake_ns)
        plan = draft.build(self._next_step)
        self._next_step += 1
        self._flights.append(Flight(plan, draft.placements, draft.moved_out))
        return plan

    def commit(self, outcome: StepOutcome, now: int) -> tuple[Update, ...]:
        """Make the oldest step in flight lasting and return what came of it.

        Raises `ExecutorLost`, with nothing changed, when `outcome` does not answer its plan.
        """
        flight = self._find_flight(outcome.step)
        if flight is None:
            raise ExecutorLost(f"step {outcome.step} is not in flight")
        assert flight is self._flights[0], f"step {outcome.step} answered before an earlier one"
        check_outcome(outcome, flight.plan, self.config.vocab_size)
        self._flights.popleft()
        updates = self._take_pending() if self._pending else []
        made = len(outcome.iteration_ns) or 1
        for placement, result in zip(flight.placements, outcome.results, strict=True):
            self._settle(placement, result, made, updates)
        if self._policies.pace is not None:
            self._policies.pace.note_step(flight.plan, outcome)
        return tuple(updates)

    def lose(self, step: int, reason: str, now: int) -> tuple[Update, ...]:
        """Undo a step in flight, and every later one, because those stand on its results.

        Their rows will be planned again. The caller makes sure that no executor still runs an
        undone step, since its blocks are free from here on. A step that is not in flight (undone
        with an earlier one, or answered) changes nothing.
        """
        lost = self._find_flight(step)
        while lost in self._flights:
            flight = self._flights.pop()
            for placement in reversed(flight.placements):
                self._undo(placement)
                placement.sequence.losses += flight is lost
            for sequence in flight.moved_out:  # whether its KV arrived, nobody knows
                sequence.kept.forget_host()
        return tuple(self._take_pending())

    def attach(
        self, id: str, blocks: tuple[BlockId, ...], tokens_computed: int
    ) -> tuple[BlockId, ...]:
        """Give a waiting request KV that was computed elsewhere, in two calls.

        The first, with no blocks, reserves room for `tokens_computed` tokens and returns the blocks
        to write their KV to, or () when the pool cannot spare them now. The request then waits for
        the second call, which names those blocks and how many tokens they hold; it runs from there.
        With 0 tokens the transfer failed: the blocks are freed and the request waits as before. If
        the request ends in between, its blocks are not reused before the second call or `release`.
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
        most = len(sequence.tokens) - 1
        if held:
            most = min(most, len(held) * self.config.block_tokens)
        if not (0 if held else 1) <= tokens_computed <= most:
            raise InvalidParameter("tokens_computed", f"{tokens_computed} is out of range")
        if held:
            roster.settle_reserved(id, tokens_computed)
        elif roster.get_num_blocks(tokens_computed) <= roster.measure_slack():
            roster.reserve(sequence, roster.get_num_blocks(tokens_computed))
        return sequence.table.get_blocks()

    def release(self, id: str) -> None:
        """Forget a request whose KV moved away: no updates; its blocks are freed.

        Rows in flight are waited for as ever. An unknown id changes nothing.
        """
        self._roster.release(id)
        self._pending = [update for update in self._pending if update.sequence.request != id]

    def _fill(self, draft: StepDraft, now: int, iterations: int) -> None:
        """Spend the draft's budgets: decodes, then prefills and newcomers in policy order."""
        policies, roster = self._policies, self._roster
        if policies.order.changes:
            roster.sort_running(now)
        running = list(roster.running)
        decodes = [one for one in running if one.gap == 1]
        prefills = [one for one in running if one.gap > 1]
        if policies.pace is not None:
            draft.room = policies.pace.open_step(self._measure_load(running), now)
        if iterations > 1 and len(decodes) == len(running) > 0 and policies.accounts is None:
            self._try_stride(draft, decodes, iterations)
        if draft.placements:
            return
        for sequence in decodes:
            self._place(draft, sequence, 1)
        for sequence in prefills:
            self._admit(draft, now, before=sequence.key)
            if draft.has_room and sequence.state is State.RUNNING:
                self._place(draft, sequence, draft.get_tokens(sequence.planned, sequence.gap))
        self._admit(draft, now, before=None)

    def _measure_load(self, running: list[Sequence]) -> Load:
        head, allocator = self._roster.waiting.try_head(), self._roster.allocator
        return Load(
            [(one.planned, one.group.request) for one in running if one.gap <= 1],
            [(one.planned, one.group.request) for one in running if one.gap > 1],
            self.num_waiting,
            None if head is None else head.group.request,
            0 if head is None else head.group.arrived_ns,
            allocator.num_free,
            self.config.num_blocks,
        )

    def _place(self, draft: StepDraft, sequence: Sequence, limit: int) -> None:
        """Add the next row of `sequence`, as far as `limit`, tokens, rows and blocks allow.

        A sequence that was preempted earlier in this plan is passed over.
        """
        if not draft.has_room or limit < 1 or sequence.state is not State.RUNNING:
            return
        start, table, source = sequence.planned, sequence.table, None
        is_decode = sequence.gap == 1
        count = self._make_room(draft, sequence, sequence.get_chunk(min(limit, draft.tokens_left)))
        if count == 0:
            return
        if table.is_shared(start // self.config.block_tokens):
            copy = table.split(start // self.config.block_tokens)
            draft.copies.append(copy)
            source = copy.source
        drafts = self._draft_tokens(draft, sequence) if is_decode else ()
        grown = self._roster.get_num_blocks(start + count + len(drafts)) - len(table)
        if grown > 0:
            table.grow(grown)
        row = sequence.build_row(count, drafts)
        sequence.planned = start + len(row.tokens)
        sequence.rows_in_flight += 1
        sequence.group.scored_planned += len(row.scored)
        if draft.room is not None and not (is_decode and len(row.tokens) == 1):
            draft.room.add(start, len(row.tokens))
        arrives = sequence.kept.host != () and start == sequence.kept.hosted
        draft.add(Placement(sequence, row, max(0, grown), source, arrives))

    def _draft_tokens(self, draft: StepDraft, sequence: Sequence) -> tuple[Token, ...]:
        """Tokens to verify behind the next one of `sequence`, where free blocks are plenty."""
        drafter, known = self._policies.drafter, len(sequence.tokens)
        spare = self._roster.allocator.num_free - len(self._roster.running)
        if drafter is None or spare < 1 or sequence.group.unborn:
            return ()
        most = min(
            draft.tokens_left - 1,
            sequence.group.request.max_new_tokens - sequence.num_new_tokens - 1,
            min(self.config.context_tokens, self.config.num_blocks * self.config.block_tokens)
            - known
            - 1,
            (len(sequence.table) + spare) * self.config.block_tokens - known,
        )
        return drafter.propose(sequence.id, sequence.tokens, most) if most > 0 else ()

    def _try_stride(self, draft: StepDraft, decodes: list[Sequence], iterations: int) -> None:
        """Place several iterations of these decodes, all that run, if nothing else could happen.

        Blocks nobody holds must suffice without evicting a prefix, because the executor may make
        fewer iterations than it was asked for.
        """
        config, roster, policies = self.config, self._roster, self._policies
        rows_left = min(config.max_rows, config.step_tokens) - len(decodes)
        if policies.drafter is not None or rows_left < 0:
            return
        head = roster.waiting.try_head()
        if head is not None and policies.order.changes:
            return
        if head is not None and rows_left and self._fits(draft, head, roster.find_prefix(head)):
            return
        most = min(config.context_tokens, config.num_blocks * config.block_tokens + 1)
        for one in decodes:
            left = one.group.request.max_new_tokens - one.num_new_tokens
            iterations = min(iterations, left, most - len(one.tokens))
            if (
                one.group.unborn
                or one.group.needs_history
                or one.table.is_shared(one.planned // config.block_tokens)
            ):
                return
        free, count_blocks = len(roster.allocator.free), roster.get_num_blocks
        while iterations > 1:
            grown = [
                max(0, count_blocks(one.planned + iterations) - len(one.table)) for one in decodes
            ]
            if sum(grown) <= free:
                break
            iterations //= 2
        else:
            return
        draft.iterations = iterations
        for one, blocks in zip(decodes, grown, strict=True):
            one.table.grow(blocks)
            row = one.build_row(1)
            one.planned += iterations
            one.rows_in_flight += 1
            draft.add(Placement(one, row, blocks, None))

    def _make_room(self, draft: StepDraft, sequence: Sequence, count: int) -> int:
        """How many of `count` tokens there are blocks for; preempts when there is not one."""
        start, table, block_tokens = sequence.planned, sequence.table, self.config.block_tokens
        roster, least = self._roster, self._roster.get_num_blocks(sequence.planned + 1)
        while True:
            # Asked anew each time: preempting a sibling may leave its block unshared.
            spare = roster.allocator.num_free - table.is_shared(start // block_tokens)
            if len(table) + spare >= least:
                return min(count, (len(table) + spare) * block_tokens - start)
            victim = draft.try_take_victim(sequence, roster.running)
            if victim is None:
                return 0
            moves = roster.preempt(victim)
            self.num_preemptions += 1
            if moves:
                self.num_swaps += 1
                draft.swaps_out += moves
                draft.moved_out.append(victim)
            self._pending.append(Preempted(victim.id, bool(moves)))

    def _fits(self, draft: StepDraft, head: Sequence, prefix: list[BlockId]) -> bool:
        """Whether a waiting sequence may run now, as far as blocks and the pace go.

        A sequence alone fits when its tokens do: no spare is kept for nobody.
        """
        roster = self._roster
        if draft.room is not None and draft.room.newcomers < 1:
            return False
        if draft.slack is None:
            draft.slack = roster.measure_slack()
        spare = 1 + head.group.unborn if roster.running else 0
        needed = roster.get_num_blocks(len(head.tokens)) + spare
        return needed - roster.memory.count_shared(prefix) <= draft.slack

    def _admit(self, draft: StepDraft, now: int, before: Key | None) -> None:
        """Move waiting sequences that come before `before` into the step, until one does not fit.

        Nobody is admitted without a row in this step, since it would hold blocks for nothing.
        """
        roster, changes = self._roster, self._policies.order.changes
        while draft.has_room:
            head = roster.waiting.try_head()
            if head is not None and changes:
                head = roster.rank_waiting(head, now)
            if head is None or (before is not None and head.key > before):
                return
            prefix = roster.find_prefix(head)
            start = head.kept.hosted or len(prefix) * self.config.block_tokens
            if not self._fits(draft, head, prefix):
                return
            limit = draft.get_tokens(start, len(head.tokens) - start)
            if limit < 1:
                return
            draft.swaps_in += roster.admit(head, prefix)
            draft.slack = None
            if draft.room is not None:
                draft.room.newcomers -= 1
            self._place(draft, head, limit)

    def _find_flight(self, step: int) -> Flight | None:
        return next((flight for flight in self._flights if flight.plan.step == step), None)

    def _settle(
        self, placement: Placement, result: RowResult, made: int, updates: list[Update]
    ) -> None:
        """Make one row lasting, of which so many iterations were made."""
        sequence, row = placement.sequence, placement.row
        sequence.rows_in_flight -= 1
        if placement.source is not None:
            self._roster.allocator.unpin(placement.source)
        if sequence.state is State.ENDED:
            self.num_ignored_results += 1
            self._roster.free_if_settled(sequence)
            return
        sequence.losses = 0
        accepted = result.accepted_drafts
        sequence.computed = row.start + len(row.tokens) - row.drafts + accepted + made - 1
        if sequence.planned > sequence.computed and row.sampling is not None:
            sequence.planned, table = sequence.computed, sequence.table
            table.shrink(len(table) - self._roster.get_num_blocks(sequence.planned))
        if row.drafts and self._policies.drafter is not None:
            self.num_drafted += row.drafts
            self.num_accepted += accepted
            self._policies.drafter.settle(sequence.id, row.drafts, accepted)
        if placement.arrives:
            sequence.kept.forget_host()
        sequence.group.scored.extend(result.scored)
        if result.tokens:
            self._emit(sequence, result, updates)
        else:
            sequence.kept.name_full(sequence.table, sequence.tokens, sequence.computed)
            self._roster.try_fork(sequence)

    def _emit(self, sequence: Sequence, result: RowResult, updates: list[Update]) -> None:
        """Append drawn tokens up to the one that ends the sequence, if any, and report them."""
        count, ending = 0, None
        while ending is None and count < len(result.tokens):
            sequence.tokens.append(result.tokens[count])
            count += 1
            ending = self._find_ending(sequence)
        lasting = min(sequence.computed, len(sequence.tokens))
        sequence.kept.name_full(sequence.table, sequence.tokens, lasting)
        tokens, logprobs = result.tokens[:count], result.logprobs[:count]
        group = sequence.group
        scored = group.take_scored() if sequence.id.index == 0 and not group.scored_emitted else ()
        updates.append(TokensEmitted(sequence.id, tokens, logprobs, scored))
        if self._policies.accounts is not None:
            self._policies.accounts.charge(group.request.tenant, 0, count)
        if ending is not None:
            updates.append(self._roster.end(sequence, ending))

    def _find_ending(self, sequence: Sequence) -> Finished | None:
        """How the last known token ends its sequence, or None when it does not.

        A sequence that has outgrown the whole pool cannot draw another token: that is "length".
        """
        request, config, known = sequence.group.request, self.config, len(sequence.tokens)
        new_tokens = sequence.num_new_tokens
        if sequence.tokens[-1] in request.stop_tokens and new_tokens >= request.min_new_tokens:
            return Finished("stop")
        most = min(config.context_tokens, config.num_blocks * config.block_tokens + 1)
        is_full = known >= most or new_tokens >= request.max_new_tokens
        return Finished("length") if is_full else None

    def _undo(self, placement: Placement) -> None:
        """Take one row back, as if it had never been planned."""
        sequence, source = placement.sequence, placement.source
        sequence.rows_in_flight -= 1
        if sequence.state is State.ENDED:
            if source is not None:
                self._roster.allocator.unpin(source)
            self._roster.free_if_settled(sequence)
            return
        start = sequence.planned = placement.row.start
        sequence.group.scored_planned -= len(placement.row.scored)
        sequence.table.shrink(placement.grown)
        if source is not None:
            sequence.table.rejoin(start // self.config.block_tokens, source)
        if placement.arrives:
            self._roster.return_to_line(sequence)

    def _take_pending(self) -> list[Update]:
        pending, self._pending = self._pending, []
        return pending
