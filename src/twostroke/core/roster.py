"""Who is live, who waits, who runs, and so which blocks are held.

Owns the lives of sequences: it alone changes their state, moves them between the lines and frees
their blocks. Only running and reserved sequences hold blocks, and ended ones until nobody can still
be writing to those.

    submit ──▶ UNBORN ──▶ WAITING ──run──▶ RUNNING        any ──stop──▶ ENDED
                             ▲ ◀──preempt─────┘
"""

from __future__ import annotations

from bisect import bisect_left, insort
from operator import attrgetter

from twostroke.core.policy import Accounts, Policies
from twostroke.core.sequence import Group, Sequence, State
from twostroke.core.types import (
    BlockId,
    BlockSwap,
    Ending,
    Request,
    SchedulerConfig,
    SequenceEnded,
    SequenceId,
)
from twostroke.kv.blocks import BlockTable
from twostroke.kv.memory import KeptKV, KVMemory

_get_key = attrgetter("key")

# Sequences that end for each block that the watermark falls.
CALM_ENDS = 8


class WaitingQueue:
    """Sequences without blocks, first in policy order at the head.

    Sorted lists, because the head is looked at in every step and most newcomers go to the end: one
    a tenant with accounts, one in all without.
    """

    def __init__(self, accounts: Accounts | None) -> None:
        self._accounts = accounts
        self.lanes: dict[str, list[Sequence]] = {}

    def __len__(self) -> int:
        return sum(map(len, self.lanes.values()))

    def push(self, sequence: Sequence) -> None:
        """Add a sequence that is not waiting."""
        tenant = self._get_lane(sequence)
        if self._accounts is not None and tenant not in self.lanes:
            self._accounts.lift(tenant, self.lanes)
        insort(self.lanes.setdefault(tenant, []), sequence, key=_get_key)

    def try_head(self) -> Sequence | None:
        """The first in policy order, of the tenant who has had least; None when nobody waits."""
        lanes, accounts = self.lanes, self._accounts
        if accounts is None or not lanes:
            return lanes[""][0] if lanes else None
        return lanes[min(lanes, key=lambda one: (accounts.get_debt(one), lanes[one][0].key))][0]

    def remove(self, sequence: Sequence) -> None:
        """Take a waiting sequence out, wherever it stands."""
        place, lane = self.get_place(sequence)
        del lane[place]
        if not lane:
            del self.lanes[self._get_lane(sequence)]

    def get_place(self, sequence: Sequence) -> tuple[int, list[Sequence]]:
        """Where a waiting sequence stands in its lane, and the lane."""
        lane = self.lanes[self._get_lane(sequence)]
        place = bisect_left(lane, sequence.key, key=_get_key)
        assert lane[place] is sequence, f"{sequence.id} is not waiting"
        return place, lane

    def _get_lane(self, sequence: Sequence) -> str:
        return sequence.group.request.tenant if self._accounts is not None else ""


class Roster:
    """All live requests of a scheduler; others read its fields and change them by its methods.

    groups: live requests by id. running: sequences a plan may pick, few and read in order every
    step, so a sorted list. reserved: sequences whose KV is being written from outside, by request;
    one may have ended. fates: how many requests came, and how many ended in which way.
    """

    def __init__(self, config: SchedulerConfig, policies: Policies) -> None:
        blocks, size = config.num_blocks, config.block_tokens
        least = -(-config.reserve_tokens // size)
        self.memory = KVMemory(blocks, size, config.host_blocks, least, config.cache_seed)
        self.allocator = self.memory.allocator
        self.groups: dict[str, Group] = {}
        self.waiting = WaitingQueue(policies.accounts)
        self.running: list[Sequence] = []
        self.reserved: dict[str, Sequence] = {}
        fates = ("submitted", "finished", "rejected", "cancelled", "failed", "released")
        self.fates = dict.fromkeys(fates, 0)
        self._most_tokens = min(config.context_tokens, blocks * size + 1)
        self._watermark = self._least_watermark = CALM_ENDS * config.watermark_blocks
        self._most_watermark = max(self._watermark, CALM_ENDS * config.num_blocks // 4)
        self._policies = policies

    def enter(self, request: Request, now: int) -> None:
        """Take an accepted request in; its first sequence waits, to compute the prompt."""
        n, rank = request.n, self._policies.order.rank(request, 0, 0, now)
        arrival = self.fates["submitted"]
        most_tokens = min(len(request.prompt) + request.max_new_tokens, self._most_tokens)
        group = Group(request, now, most_tokens, n, n, request.sampling.needs_history)
        for index in range(n):
            id, key = SequenceId(request.id, index), (rank, arrival, index)
            kept = KeptKV(self.memory, request.cache_scope)
            group.sequences.append(Sequence(id, group, key, [], BlockTable(self.allocator), kept))
        self.groups[request.id] = group
        for sequence, resumed in zip(group.sequences, request.resumed, strict=False):
            if resumed is None:  # it had ended
                self._stop(sequence)
        self.start_carrier(group)

    def start_carrier(self, group: Group) -> None:
        """Let the first unborn sequence compute the prompt, from its beginning."""
        carrier = next(one for one in group.sequences if one.state is State.UNBORN)
        group.unborn -= 1
        carrier.tokens = list(group.request.prompt)
        self._learn_resumed(group)
        self._wait(carrier)
        self.try_fork(carrier)

    def try_fork(self, carrier: Sequence) -> None:
        """Give birth to the others once all but the last prompt token is computed."""
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
        self._learn_resumed(group)

    def _learn_resumed(self, group: Group) -> None:
        """Once nobody waits for the fork, sequences know what an earlier run emitted of them."""
        for one in group.sequences if group.request.resumed and not group.unborn else ():
            if one.state is not State.ENDED and len(one.tokens) == len(group.request.prompt):
                one.tokens += group.request.get_resumed(one.id.index)

    def find_prefix(self, sequence: Sequence) -> list[BlockId]:
        """Blocks that hold a beginning of a waiting sequence's tokens, not all of them.

        A prompt whose log-probabilities are wanted has to be computed, so nothing is found for it.
        """
        if sequence.kept.host or sequence.group.request.prompt_logprobs is not None:
            return []
        return sequence.kept.find_prefix(sequence.tokens)

    def admit(self, sequence: Sequence, prefix: list[BlockId]) -> list[BlockSwap]:
        """Let a waiting sequence run, with the `prefix` found for it or what the host keeps.

        Returns the moves that bring its KV in.
        """
        group, kept, moves = sequence.group, sequence.kept, list[BlockSwap]()
        self.waiting.remove(sequence)
        if kept.host:
            moves = kept.move_in(sequence.table)
            sequence.computed = kept.hosted
        elif prefix:
            sequence.table.adopt(prefix)
            kept.named = len(prefix)
            sequence.computed = len(prefix) * self.memory.block_tokens
        sequence.planned = sequence.computed
        if not group.charged:
            group.charged = True
            self.memory.prompt_tokens += len(sequence.tokens)
            self.memory.cached_tokens += sequence.computed
            self.charge(group.request, len(sequence.tokens) - sequence.computed, 0)
        self._run(sequence)
        self.try_fork(sequence)
        return moves

    def preempt(self, sequence: Sequence) -> list[BlockSwap]:
        """Take the blocks of a running sequence away; it waits at its old place in the order.

        Returns the moves that keep its KV in host memory, where that is preferred and has room.
        """
        moves, computed = list[BlockSwap](), sequence.computed
        # Before the fork it is not moved: continuations would share KV that may yet fail to arrive.
        can_swap = not sequence.group.unborn and sequence.kept.can_move_out(computed)
        if can_swap and self._policies.prefers_swap(computed, len(sequence.table)):
            moves = sequence.kept.move_out(sequence.table, computed)
        self.memory.num_preemptions += 1
        self._watermark = min(2 * self._watermark, self._most_watermark)
        self.memory.num_swaps += bool(moves)
        self.return_to_line(sequence)
        return moves

    def return_to_line(self, sequence: Sequence) -> None:
        """A running sequence waits again, without blocks."""
        self.running.remove(sequence)
        sequence.forget_kv()
        self._wait(sequence)

    def charge(self, request: Request, prompt_tokens: int, new_tokens: int) -> None:
        """A request's tenant was served so many tokens."""
        if self._policies.accounts is not None:
            self._policies.accounts.charge(request.tenant, prompt_tokens, new_tokens)

    def rank_waiting(self, head: Sequence, now: int) -> Sequence:
        """Give the head of the line its rank as it is now; returns who is the head then."""
        while True:
            place, lane = self.waiting.get_place(head)
            del lane[place]
            self._rank(head, now)
            insort(lane, head, key=_get_key)
            if lane[0] is head:
                return head
            head = lane[0]

    def sort_running(self, now: int) -> None:
        """Bring the running sequences into the order of their ranks as they are now."""
        for sequence in self.running:
            self._rank(sequence, now)
        self.running.sort(key=_get_key)

    def reserve(self, sequence: Sequence, num_blocks: int) -> None:
        """Give a waiting sequence blocks for KV that comes from outside."""
        self.waiting.remove(sequence)
        sequence.kept.forget_host()
        sequence.state = State.RESERVED
        sequence.table.grow(num_blocks)
        self.reserved[sequence.id.request] = sequence

    def settle_reserved(self, id: str, tokens_computed: int) -> None:
        """Nobody writes to the reserved blocks of `id` any more; they hold so many tokens."""
        sequence = self.reserved.pop(id)
        if sequence.state is State.ENDED or tokens_computed == 0:
            sequence.forget_kv()
            if sequence.state is State.RESERVED:
                self._wait(sequence)
            return
        sequence.table.shrink(len(sequence.table) - self.memory.get_num_blocks(tokens_computed))
        sequence.computed = sequence.planned = tokens_computed
        self._run(sequence)
        self.try_fork(sequence)

    def end(self, sequence: Sequence, ending: Ending) -> SequenceEnded:
        """End a live sequence, and its request with the last of them."""
        group = sequence.group
        self._stop(sequence)
        self._watermark = max(self._watermark - 1, self._least_watermark)
        if not group.live:
            del self.groups[group.request.id]
            self.fates[type(ending).__name__.lower()] += 1
            group.sequences.clear()  # or they and it would wait for the cyclic collector
        return SequenceEnded(sequence.id, ending)

    def release(self, id: str) -> None:
        """Forget a request without a word; an unknown id changes nothing."""
        group = self.groups.pop(id, None)
        for sequence in group.sequences if group else ():
            if sequence.state is not State.ENDED:
                self._stop(sequence)
        if id in self.reserved:
            self.settle_reserved(id, 0)
        self.fates["released"] += group is not None

    def free_if_settled(self, sequence: Sequence) -> None:
        """Free the blocks of an ended sequence unless a step in flight may still write to them."""
        if not sequence.rows_in_flight:
            sequence.forget_kv()

    def measure_slack(self) -> int:
        """Free blocks beyond the watermark, if any run, their known tokens and one spare each.

        The watermark doubles with a preemption, up to a quarter of the pool, and falls by a block
        with CALM_ENDS ends. Continuations yet to be forked count as running.
        """
        slack = self.allocator.num_free - (self._watermark // CALM_ENDS if self.running else 0)
        for sequence in self.running:
            missing = self.memory.get_num_blocks(len(sequence.tokens)) - len(sequence.table)
            slack -= max(0, missing) + 1 + sequence.group.unborn
        return slack

    def _rank(self, sequence: Sequence, now: int) -> None:
        rank = self._policies.order.rank(
            sequence.group.request, sequence.computed, sequence.num_new_tokens, now
        )
        sequence.key = (rank, *sequence.key[1:])

    def _wait(self, sequence: Sequence) -> None:
        sequence.state = State.WAITING
        self.waiting.push(sequence)

    def _run(self, sequence: Sequence) -> None:
        sequence.state = State.RUNNING
        insort(self.running, sequence, key=_get_key)

    def _stop(self, sequence: Sequence) -> None:
        """Take a live sequence out of its line and free its blocks, now or when they settle."""
        state, sequence.state = sequence.state, State.ENDED
        sequence.group.live -= 1
        sequence.kept.forget_host()
        self._policies.order.end(sequence.group.request, max(0, sequence.num_new_tokens))
        if self._policies.drafter is not None:
            self._policies.drafter.forget(sequence.id)
        if state is State.UNBORN:
            sequence.group.unborn -= 1
            self._learn_resumed(sequence.group)
        elif state is State.WAITING:
            self.waiting.remove(sequence)
        elif state is State.RUNNING:
            self.running.remove(sequence)
        if state is not State.RESERVED:
            self.free_if_settled(sequence)
