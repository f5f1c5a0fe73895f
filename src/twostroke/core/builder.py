"""StepBuilder: one step while it is being planned.

Owns the budgets of the step and its rows, copies and moves so far; it reserves what they need and
changes sequences accordingly. Decodes go first; longer gaps and newcomers share what is left in
policy order.

- Admission from the waiting line is strict: if its head does not fit, nobody behind it is tried.
  Small requests overtaking a large one would starve it for as long as they keep coming.
- The head is admitted when the free blocks cover all its known tokens, what running sequences
  still need for theirs, one spare block for each of these and itself, and the watermark. So
  admitted prompts do not collide half-way, and who was preempted does not return only to be again.
- A running sequence that gets no block preempts the last running one behind it that has no row in
  flight; if there is none it keeps its blocks and sits this step out, and nobody runs ahead, or
  those behind might have a row in flight for ever. The first in policy order is therefore never
  preempted and always proceeds, so everything ends.
"""

from __future__ import annotations

from twostroke.core.policy import Load, Policies, Room
from twostroke.core.roster import Roster
from twostroke.core.sequence import Key, Sequence, State
from twostroke.core.steps import Flight, Placement
from twostroke.core.types import (
    BlockCopy,
    BlockId,
    BlockSwap,
    Preempted,
    SchedulerConfig,
    StepPlan,
    Token,
    Update,
)


class StepBuilder:
    """Fills one step at time `now`; `ahead` allows rows whose token the step before draws.

    preempted: what is to be reported. wake_ns: when the pace lets more in; 0 for no such time.
    """

    def __init__(
        self, config: SchedulerConfig, policies: Policies, roster: Roster, now: int, ahead: bool
    ) -> None:
        self.preempted: list[Update] = []
        self.wake_ns = 0
        self._config = config
        self._policies = policies
        self._roster = roster
        self._now = now
        self._drafts = policies.drafter is not None
        self._ahead = ahead and not self._drafts  # what is to be verified must be known
        self._tokens_left = config.step_tokens
        self._iterations = 1
        self._room: Room | None = None
        self._placements: list[Placement] = []
        self._copies: list[BlockCopy] = []
        self._swaps_out: list[BlockSwap] = []
        self._swaps_in: list[BlockSwap] = []
        self._moved_out: list[Sequence] = []
        self._slack: int | None = None  # blocks newcomers may count on; None until somebody asks
        self._candidates: list[Sequence] | None = None

    def fill(self, iterations: int) -> None:
        """Spend the budgets; `iterations` is the most that may be planned in one go."""
        policies, roster = self._policies, self._roster
        if policies.order.changes:
            roster.sort_running(self._now)
        running = list(roster.running)
        if policies.pace is not None:
            self._room = policies.pace.open_step(self._measure_load(running), self._now)
            self.wake_ns = self._room.wake_ns
        decodes = [one for one in running if one.gap == 1]
        if (
            iterations > 1
            and len(decodes) == len(running)
            and self._try_stride(decodes, iterations)
        ):
            return
        self._slack = None
        ahead = [one for one in running if one.can_run_ahead] if self._ahead else []
        for sequence in decodes:
            self._place(sequence, 1)
        for sequence in ahead:
            if self._ahead:
                self._place(sequence, 1)
        for sequence in running if len(decodes) < len(running) else ():
            if sequence.gap > 1:
                if policies.accounts is None:  # else who was charged for its prompt goes on first
                    self._admit(before=sequence.key)
                self._place(sequence, self._get_tokens(sequence.planned, sequence.gap))
        self._admit(before=None)

    def build(self, step: int) -> Flight | None:
        """The finished step; None when there is nothing to compute."""
        if not self._placements:
            for sequence in self._moved_out:  # no step will move its KV
                sequence.kept.forget_host()
            return None
        plan = StepPlan(
            step,
            tuple([placement.row for placement in self._placements]),
            tuple(self._copies),
            tuple(self._swaps_out),
            tuple(self._swaps_in),
            self._iterations,
        )
        return Flight(plan, self._placements, self._moved_out)

    def _has_room(self) -> bool:
        return self._tokens_left > 0 and len(self._placements) < self._config.max_rows

    def _get_tokens(self, start: int, wanted: int) -> int:
        """How many of `wanted` tokens a prompt's row from position `start` may have."""
        most = min(wanted, self._tokens_left)
        return most if self._room is None else min(most, self._room.get_tokens(start, wanted))

    def _measure_load(self, running: list[Sequence]) -> Load:
        head, allocator = self._roster.waiting.try_head(), self._roster.allocator
        return Load(
            [(one.planned, one.group.request) for one in running if one.gap <= 1],
            [(one.planned, one.group.request) for one in running if one.gap > 1],
            len(self._roster.waiting),
            None if head is None else head.group.request,
            0 if head is None else head.group.arrived_ns,
            allocator.num_free,
            self._config.num_blocks,
        )

    def _add(self, placement: Placement, planned: int) -> None:
        sequence, row = placement.sequence, placement.row
        sequence.planned = planned
        sequence.rows_in_flight += 1
        sequence.group.scored_planned += len(row.scored)
        self._placements.append(placement)
        self._tokens_left -= len(row.tokens)

    def _place(self, sequence: Sequence, limit: int, is_new: bool = False) -> None:
        """Add the next row of `sequence`, unless this step preempted it, as far as all allows.

        is_new: admitted in this step, so the room does not know of it yet.
        """
        if limit < 1 or not self._has_room() or sequence.state is not State.RUNNING:
            return
        start, table, source = sequence.planned, sequence.table, None
        is_decode, place = sequence.gap <= 1, start // self._config.block_tokens
        arrives = sequence.kept.host != () and start == sequence.kept.hosted
        plain = is_decode and not (is_new or self._drafts)
        if plain and place < len(table) and not table.is_shared(place):
            self._add(Placement(sequence, sequence.build_row(1), 0, None, arrives), start + 1)
            return
        wanted = 1 if is_decode else sequence.get_chunk(min(limit, self._tokens_left))
        count = self._make_room(sequence, wanted)
        if count == 0:
            return
        if table.is_shared(place):
            copy = table.split(place)
            self._copies.append(copy)
            source = copy.source
        drafts = self._draft_tokens(sequence) if is_decode else ()
        end = start + count + len(drafts)
        grown = max(0, self._roster.memory.get_num_blocks(end) - len(table))
        table.grow(grown)
        row = sequence.build_row(count, drafts)
        self._add(Placement(sequence, row, grown, source, arrives), end)
        if self._room is not None and (is_new or not (is_decode and end == start + 1)):
            self._room.add(start, end - start)

    def _draft_tokens(self, sequence: Sequence) -> tuple[Token, ...]:
        """Tokens to verify behind the next one of `sequence`, where free blocks are plenty."""
        drafter, known = self._policies.drafter, len(sequence.tokens)
        spare = self._roster.allocator.num_free - len(self._roster.running)
        masked = sequence.group.request.sampling.grammar != ""  # for one position, not for drafts
        if drafter is None or spare < 1 or sequence.group.unborn or masked:
            return ()
        most = min(
            self._tokens_left - 1,
            sequence.num_left - 1,
            (len(sequence.table) + spare) * self._config.block_tokens - known,
        )
        return drafter.propose(sequence.id, sequence.tokens, most) if most > 0 else ()

    def _try_stride(self, decodes: list[Sequence], iterations: int) -> bool:
        """Place several iterations of all that run, if nothing else could happen meanwhile.

        Free blocks must suffice with no prefix evicted, since fewer iterations may be made.
        """
        config, roster, policies = self._config, self._roster, self._policies
        head, rows = roster.waiting.try_head(), min(config.max_rows, config.step_tokens)
        if policies.drafter is not None or policies.accounts is not None or len(decodes) > rows:
            return False
        if head is not None and len(decodes) < rows:
            prefix = roster.find_prefix(head)
            if policies.order.changes or self._fits(head, prefix):
                return False
        for one in decodes:
            group, place = one.group, one.planned // config.block_tokens
            if group.unborn or group.needs_history or one.table.is_shared(place):
                return False
            iterations = min(iterations, one.num_left)
        free, count_blocks = roster.allocator.num_empty, roster.memory.get_num_blocks
        grown: list[int] = []
        while iterations > 1:
            grown = [
                max(0, count_blocks(one.planned + iterations) - len(one.table)) for one in decodes
            ]
            if sum(grown) <= free:
                break
            iterations //= 2
        if iterations < 2 or not decodes:
            return False
        self._iterations = iterations
        for one, blocks in zip(decodes, grown, strict=True):
            one.table.grow(blocks)
            self._add(Placement(one, one.build_row(1), blocks, None), one.planned + iterations)
        return True

    def _make_room(self, sequence: Sequence, count: int) -> int:
        """How many of `count` tokens there are blocks for; preempts when there is not one."""
        start, table, block_tokens = sequence.planned, sequence.table, self._config.block_tokens
        roster, least = self._roster, self._roster.memory.get_num_blocks(sequence.planned + 1)
        while True:
            # Asked anew each time: preempting a sibling may leave its block unshared.
            spare = roster.allocator.num_free - table.is_shared(start // block_tokens)
            if len(table) + spare >= least:
                return min(count, (len(table) + spare) * block_tokens - start)
            victim = self._try_take_victim(sequence)
            if victim is None:
                self._ahead = False
                return 0
            moves = roster.preempt(victim)
            if moves:
                self._swaps_out += moves
                self._moved_out.append(victim)
            self.preempted.append(Preempted(victim.id, bool(moves)))

    def _try_take_victim(self, needy: Sequence) -> Sequence | None:
        """The last that runs behind `needy` with no row in flight; None when there is none.

        Whoever is passed over keeps its row in flight: the list is walked once, however many ask.
        """
        if self._candidates is None:
            self._candidates = list(self._roster.running)
        while self._candidates and self._candidates[-1].key > needy.key:
            candidate = self._candidates.pop()
            if candidate.state is State.RUNNING and not candidate.rows_in_flight:
                return candidate
        return None

    def _fits(self, head: Sequence, prefix: list[BlockId]) -> bool:
        """Whether a waiting sequence may run now; alone it needs no spare block."""
        roster = self._roster
        if self._room is not None and self._room.newcomers < 1:
            return False
        if self._slack is None:
            self._slack = roster.measure_slack()
        spare = 1 + head.group.unborn if roster.running else 0
        needed = roster.memory.get_num_blocks(len(head.tokens)) + spare
        return needed - roster.memory.count_shared(prefix) <= self._slack

    def _admit(self, before: Key | None) -> None:
        """Move waiting sequences that come before `before` into the step, until one does not fit.

        Nobody is admitted without a row in this step, since it would hold blocks for nothing.
        """
        roster = self._roster
        while self._has_room():
            head = roster.waiting.try_head()
            if head is not None and self._policies.order.changes:
                head = roster.rank_waiting(head, self._now)
            if head is None or (before is not None and head.key > before):
                return
            prefix = roster.find_prefix(head)
            if not self._fits(head, prefix):
                return
            start = head.kept.hosted or len(prefix) * self._config.block_tokens
            limit = self._get_tokens(start, len(head.tokens) - start)
            if limit < 1:
                return
            self._swaps_in += roster.admit(head, prefix)
            self._slack = None
            if self._room is not None:
                self._room.newcomers -= 1
            self._place(head, limit, is_new=True)
