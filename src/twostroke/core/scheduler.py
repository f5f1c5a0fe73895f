"""The scheduler: a pure state machine that decides what every step computes.

Owns all requests and the KV pool's block ids. Seven inputs and no others: submit, cancel, plan,
commit, lose, attach, release. It never sees a tensor, a clock, a random number or a thread, and
never iterates over a set, so the same inputs give the same plans in every process.

One rule replaces phases: a sequence has known tokens and computed tokens, and a plan spends a
token budget closing the gaps: sequences one token behind (decodes) first, then longer gaps
(prompts, recomputations) and newcomers, both in policy order, in the same step.

- Admission from the waiting line is strict: if its head does not fit, nobody behind it is tried.
  Small requests overtaking a large one would starve it for as long as they keep coming.
- The head is admitted when the free blocks cover all its known tokens, what running sequences
  still need for theirs, and one spare block for each of those. So admitted prompts do not collide
  half-way, and a sequence just preempted does not return only to be preempted again.
- A running sequence that gets no block preempts the last running one behind it that has no row in
  flight; if there is none it keeps its blocks and sits this step out. The first in policy order is
  therefore never preempted and always proceeds, so everything ends.
- Blocks of an ended sequence are reused only once its rows in flight have settled: until then the
  executor may still write to them.
- `Preempted` happens inside `plan` but is reported with the updates of the next commit, cancel or
  lose.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from operator import attrgetter

from twostroke.core.admission import find_rejection
from twostroke.core.blocks import BlockAllocator, BlockTable
from twostroke.core.policy import Policy, PriorityThenArrival
from twostroke.core.queues import WaitingQueue
from twostroke.core.sequence import Group, Key, Sequence, State
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
    SequenceEnded,
    SequenceId,
    StepOutcome,
    StepPlan,
    TokensEmitted,
    Update,
)
from twostroke.errors import ExecutorLost, InvalidParameter

MAX_IN_FLIGHT = 2
_CANCELLED = Cancelled()
_get_key = attrgetter("key")


class Scheduler:
    """Plans steps for many requests over one pool of KV blocks, in the order `policy` gives.

    num_preemptions, num_ignored_results (rows answered after their sequence had ended): counted
    since the start. Attributes with an underscore are read by invariants.py and nobody else.
    """

    def __init__(self, config: SchedulerConfig, policy: Policy | None = None) -> None:
        self.config = config
        self.num_preemptions = 0
        self.num_ignored_results = 0
        self._policy = policy or PriorityThenArrival()
        self._allocator = BlockAllocator(config.num_blocks)
        self._groups: dict[str, Group] = {}
        self._waiting = WaitingQueue()
        self._running: list[Sequence] = []  # in policy order
        self._reserved: dict[str, Sequence] = {}
        self._flights: deque[Flight] = deque()
        self._pending: list[Update] = []
        self._next_step = 0
        self._arrivals = 0
        fates = ("submitted", "finished", "rejected", "cancelled", "failed", "released")
        self._fates = dict.fromkeys(fates, 0)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for blocks."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences that a plan may pick."""
        return len(self._running)

    @property
    def num_in_flight(self) -> int:
        """Steps planned and neither committed nor lost."""
        return len(self._flights)

    @property
    def num_free_blocks(self) -> int:
        """Blocks nobody holds."""
        return self._allocator.num_free

    @property
    def num_held_tokens(self) -> int:
        """Tokens of running sequences with KV in the pool; shared ones count for each."""
        return sum(sequence.computed for sequence in self._running)

    @property
    def counts(self) -> dict[str, int]:
        """Requests by fate: submitted = finished + rejected + cancelled + failed + released + live.

        One of several sequences has the fate of the last to end; released ones moved elsewhere.
        """
        return {**self._fates, "live": len(self._groups)}

    def get_losses(self, id: str) -> int:
        """Most losses of a sequence of `id` since its last committed row; 0 for an unknown id."""
        group = self._groups.get(id)
        return max(sequence.losses for sequence in group.sequences) if group else 0

    # ---- the seven inputs -----------------------------------------------------------------------

    def submit(self, request: Request, now: int) -> Accepted | Rejected:
        """Queue `request`, or say why it can never be served."""
        self._fates["submitted"] += 1
        rejection = find_rejection(request, self.config)
        if rejection is None and (request.id in self._groups or request.id in self._reserved):
            rejection = Rejected(f"id: {request.id!r} is in use")
        if rejection is not None:
            self._fates["rejected"] += 1
            return rejection
        rank = self._policy.rank(request, now)
        group = Group(request, request.n, request.n, request.sampling.needs_history)
        for index in range(request.n):
            id, key = SequenceId(request.id, index), (rank, self._arrivals, index)
            group.sequences.append(Sequence(id, group, key, [], BlockTable(self._allocator)))
        self._arrivals += 1
        self._groups[request.id] = group
        self._start_carrier(group)
        return Accepted(request.id)

    def cancel(
        self, id: str, now: int, *, index: int | None = None, ending: Ending = _CANCELLED
    ) -> tuple[Update, ...]:
        """End a request, or its continuation `index` only, as `ending`.

        Returns the updates; () when there is no such live sequence. If the continuation that
        computes the prompt is ended before the fork, the next one starts it over.
        """
        group = self._groups.get(id)
        live = [one for one in group.sequences if one.state is not State.ENDED] if group else []
        chosen = [sequence for sequence in live if index in (None, sequence.id.index)]
        if group is None or not chosen:
            return ()
        updates = self._take_pending()
        for sequence in chosen:
            self._end(sequence, ending, updates)
        if group.live and group.live == group.unborn:
            self._start_carrier(group)
        return tuple(updates)

    def plan(self, now: int) -> StepPlan | Idle:
        """Plan the next step and reserve its blocks; Idle when there is nothing to compute now.

        At most two steps may be in flight; a third plan is Idle.
        """
        draft = StepDraft(self.config.step_tokens, self.config.max_rows)
        if len(self._flights) < MAX_IN_FLIGHT:
            self._fill(draft)
        if not draft.placements:
            return Idle(waiting=len(self._waiting), in_flight=len(self._flights))
        plan = draft.build(self._next_step)
        self._next_step += 1
        self._flights.append(Flight(plan, draft.placements))
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
        updates = self._take_pending()
        for placement, result in zip(flight.placements, outcome.results, strict=True):
            self._settle(placement, result, updates)
        return tuple(updates)

    def lose(self, step: int, reason: str, now: int) -> tuple[Update, ...]:
        """Undo a step in flight, and every later one, because those stand on its results.

        Their rows will be planned again. The caller makes sure that no executor still runs an
        undone step, since its blocks are free from here on. A step that is not in flight (undone
        with an earlier one, or answered) changes nothing.
        """
        lost = self._find_flight(step)
        while lost is not None and lost in self._flights:
            flight = self._flights.pop()
            for placement in reversed(flight.placements):
                self._undo(placement)
                placement.sequence.losses += flight is lost
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
        if id in self._reserved:
            return self._attach_reserved(self._reserved[id], blocks, tokens_computed)
        group = self._groups.get(id)
        if group is None or group.sequences[0].state is not State.WAITING:
            raise InvalidParameter("id", f"{id!r} is not waiting, so nothing can be attached to it")
        sequence = group.sequences[0]
        if blocks:
            raise InvalidParameter("blocks", f"none are reserved for {id!r}")
        if group.request.prompt_logprobs is not None:
            raise InvalidParameter("prompt_logprobs", f"{id!r} must compute its prompt here")
        if not 0 < tokens_computed < len(sequence.tokens):
            raise InvalidParameter("tokens_computed", f"must be in 1 … {len(sequence.tokens) - 1}")
        count = self._get_num_blocks(tokens_computed)
        if count > self._measure_slack():
            return ()
        self._waiting.remove(sequence)
        sequence.state = State.RESERVED
        sequence.table.grow(count)
        self._reserved[id] = sequence
        return sequence.table.get_blocks()

    def release(self, id: str) -> None:
        """Forget a request whose KV moved away: no updates; its blocks are freed.

        Rows in flight are waited for as ever. An unknown id changes nothing.
        """
        reserved = self._reserved.pop(id, None)
        if reserved is not None:
            reserved.forget_kv()
        group = self._groups.pop(id, None)
        if group is None:
            return
        for sequence in group.sequences:
            if sequence.state is not State.ENDED:
                self._stop(sequence)
        self._fates["released"] += 1
        self._pending = [update for update in self._pending if update.sequence.request != id]

    # ---- planning -------------------------------------------------------------------------------

    def _fill(self, draft: StepDraft) -> None:
        """Spend the draft's budgets: decodes, then prefills and newcomers in policy order."""
        prefills = []
        for sequence in list(self._running):
            gap = sequence.gap
            if gap == 1:
                self._place(draft, sequence)
            elif gap > 1:
                prefills.append(sequence)
        for sequence in prefills:
            self._admit(draft, before=sequence.key)
            self._place(draft, sequence)
        self._admit(draft, before=None)

    def _place(self, draft: StepDraft, sequence: Sequence) -> None:
        """Add the next row of `sequence`, as far as tokens, rows and blocks allow.

        A sequence that was preempted earlier in this plan is passed over.
        """
        if not draft.has_room or sequence.state is not State.RUNNING:
            return
        start, table, source = sequence.planned, sequence.table, None
        count = self._make_room(draft, sequence, sequence.get_chunk(draft.tokens_left))
        if count == 0:
            return
        if table.is_shared(start // self.config.block_tokens):
            copy = table.split(start // self.config.block_tokens)
            draft.copies.append(copy)
            source = copy.source
        grown = max(self._get_num_blocks(start + count) - len(table), 0)
        if grown:
            table.grow(grown)
        row = sequence.build_row(count)
        sequence.planned = start + count
        sequence.rows_in_flight += 1
        sequence.group.scored_planned += len(row.scored)
        draft.add(Placement(sequence, row, grown, source))

    def _make_room(self, draft: StepDraft, sequence: Sequence, count: int) -> int:
        """How many of `count` tokens there are blocks for; preempts when there is not one."""
        start, table, block_tokens = sequence.planned, sequence.table, self.config.block_tokens
        while True:
            # Asked anew each time: preempting a sibling may leave its block unshared.
            spare = self._allocator.num_free - table.is_shared(start // block_tokens)
            room = (len(table) + spare) * block_tokens - start if spare >= 0 else 0
            if room > 0:
                return min(count, room)
            victim = draft.try_take_victim(sequence, self._running)
            if victim is None:
                return 0
            self._preempt(victim)

    def _preempt(self, sequence: Sequence) -> None:
        """Take the blocks of a running sequence away; it waits at its old place in the order."""
        self._running.remove(sequence)
        sequence.forget_kv()
        self._wait(sequence)
        self.num_preemptions += 1
        self._pending.append(Preempted(sequence.id))

    def _admit(self, draft: StepDraft, before: Key | None) -> None:
        """Move waiting sequences that come before `before` into the step, until one does not fit.

        A sequence alone is admitted when its tokens fit: no spare is kept for nobody. No more run
        than a step has rows and tokens for, since the others would hold blocks for nothing.
        """
        most = min(self.config.max_rows, self.config.step_tokens)
        while draft.has_room and len(self._running) < most:
            head = self._waiting.try_head()
            if head is None or (before is not None and head.key > before):
                return
            if draft.slack is None:
                draft.slack = self._measure_slack()
            needed, spare = self._get_num_blocks(len(head.tokens)), 1 + head.group.unborn
            if needed + (spare if self._running else 0) > draft.slack:
                return
            draft.slack -= needed + spare
            self._waiting.remove(head)
            self._run(head)
            self._place(draft, head)

    def _measure_slack(self) -> int:
        """Free blocks beyond what running sequences need for known tokens and one spare each.

        Continuations yet to be forked count as running: each will want a block at the fork.
        """
        slack = self._allocator.num_free
        for sequence in self._running:
            missing = self._get_num_blocks(len(sequence.tokens)) - len(sequence.table)
            slack -= max(missing, 0) + 1 + sequence.group.unborn
        return slack

    def _get_num_blocks(self, tokens: int) -> int:
        return -(-tokens // self.config.block_tokens)

    # ---- steps settling -------------------------------------------------------------------------

    def _find_flight(self, step: int) -> Flight | None:
        return next((flight for flight in self._flights if flight.plan.step == step), None)

    def _settle(self, placement: Placement, result: RowResult, updates: list[Update]) -> None:
        """Make one row lasting."""
        sequence, row = placement.sequence, placement.row
        sequence.rows_in_flight -= 1
        if placement.source is not None:
            self._allocator.unpin(placement.source)
        if sequence.state is State.ENDED:
            self.num_ignored_results += 1
            self._free_if_settled(sequence)
            return
        sequence.losses = 0
        sequence.computed = row.start + len(row.tokens) - row.drafts + result.accepted_drafts
        if row.drafts:
            sequence.planned = sequence.computed
        sequence.group.scored.extend(result.scored)
        if result.tokens:
            self._emit(sequence, result, updates)
        else:
            self._try_fork(sequence)

    def _emit(self, sequence: Sequence, result: RowResult, updates: list[Update]) -> None:
        """Append drawn tokens up to the one that ends the sequence, if any, and report them."""
        count, ending = 0, None
        while ending is None and count < len(result.tokens):
            sequence.tokens.append(result.tokens[count])
            count += 1
            ending = self._find_ending(sequence)
        tokens, logprobs = result.tokens[:count], result.logprobs[:count]
        scored = sequence.group.take_scored() if sequence.id.index == 0 else ()
        updates.append(TokensEmitted(sequence.id, tokens, logprobs, scored))
        if ending is not None:
            self._end(sequence, ending, updates)

    def _find_ending(self, sequence: Sequence) -> Finished | None:
        """How the last known token ends its sequence, or None when it does not.

        A sequence that has outgrown the whole pool cannot draw another token: that is "length".
        """
        request, config, known = sequence.group.request, self.config, len(sequence.tokens)
        new_tokens = known - len(request.prompt)
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
                self._allocator.unpin(source)
            self._free_if_settled(sequence)
            return
        start = sequence.planned = placement.row.start
        sequence.group.scored_planned -= len(placement.row.scored)
        sequence.table.shrink(placement.grown)
        if source is not None:
            sequence.table.rejoin(start // self.config.block_tokens, source)

    def _take_pending(self) -> list[Update]:
        pending, self._pending = self._pending, []
        return pending

    # ---- lives of sequences ---------------------------------------------------------------------

    def _start_carrier(self, group: Group) -> None:
        """Let the first unborn sequence compute the prompt, from its beginning."""
        carrier = next(one for one in group.sequences if one.state is State.UNBORN)
        group.unborn -= 1
        group.scored_planned = len(group.scored)
        carrier.tokens = list(group.request.prompt)
        self._wait(carrier)
        self._try_fork(carrier)

    def _try_fork(self, carrier: Sequence) -> None:
        """Give birth to the other continuations once all but the last prompt token is computed.

        They share the carrier's blocks and its state; each computes the last token itself.
        """
        group = carrier.group
        if not group.unborn or carrier.computed != len(group.request.prompt) - 1:
            return
        group.unborn = 0
        for sequence in group.sequences:
            if sequence.state is State.UNBORN:
                sequence.tokens = list(carrier.tokens)
                sequence.computed = sequence.planned = carrier.computed
                sequence.table = carrier.table.fork()
                (self._wait if carrier.state is State.WAITING else self._run)(sequence)

    def _wait(self, sequence: Sequence) -> None:
        sequence.state = State.WAITING
        self._waiting.push(sequence)

    def _run(self, sequence: Sequence) -> None:
        sequence.state = State.RUNNING
        insort(self._running, sequence, key=_get_key)

    def _attach_reserved(
        self, sequence: Sequence, blocks: tuple[BlockId, ...], tokens_computed: int
    ) -> tuple[BlockId, ...]:
        """The second call of `attach`."""
        table = sequence.table
        if blocks != table.get_blocks():
            raise InvalidParameter("blocks", f"those reserved are {table.get_blocks()}")
        most = min(len(table) * self.config.block_tokens, len(sequence.tokens) - 1)
        if not 0 <= tokens_computed <= most:
            raise InvalidParameter("tokens_computed", f"must be in 0 … {most}")
        del self._reserved[sequence.id.request]
        if sequence.state is State.ENDED or tokens_computed == 0:
            sequence.forget_kv()
            if sequence.state is State.RESERVED:
                self._wait(sequence)
            return ()
        table.shrink(len(table) - self._get_num_blocks(tokens_computed))
        sequence.computed = sequence.planned = tokens_computed
        self._run(sequence)
        self._try_fork(sequence)
        return table.get_blocks()

    def _end(self, sequence: Sequence, ending: Ending, updates: list[Update]) -> None:
        """End a live sequence, and its request with the last of them."""
        group = sequence.group
        self._stop(sequence)
        updates.append(SequenceEnded(sequence.id, ending))
        if not group.live:
            del self._groups[group.request.id]
            self._fates[type(ending).__name__.lower()] += 1

    def _stop(self, sequence: Sequence) -> None:
        """Take a live sequence out of its line and free its blocks, now or when they settle."""
        state, sequence.state = sequence.state, State.ENDED
        sequence.group.live -= 1
        if state is State.UNBORN:
            sequence.group.unborn -= 1
        elif state is State.WAITING:
            self._waiting.remove(sequence)
        elif state is State.RUNNING:
            self._running.remove(sequence)
        if state is not State.RESERVED:
            self._free_if_settled(sequence)

    def _free_if_settled(self, sequence: Sequence) -> None:
        """Free the blocks of an ended sequence unless a step in flight may still write to them."""
        if not sequence.rows_in_flight:
            sequence.forget_kv()
