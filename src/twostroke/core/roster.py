"""Who is live, who waits, who runs, and so which blocks are held.

Owns the lives of sequences: it alone changes their state, moves them between the lines and frees
their blocks. What a step computes is decided in scheduler.py. Only running and reserved sequences
hold blocks, and ended ones until nobody can still be writing to those.

    submit ──▶ UNBORN ──▶ WAITING ──run──▶ RUNNING        any ──stop──▶ ENDED
                             ▲ ◀──preempt─────┘
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Iterator
from operator import attrgetter

from twostroke.core.sequence import Group, Key, Sequence, State
from twostroke.core.types import Ending, Request, SchedulerConfig, SequenceEnded, SequenceId
from twostroke.kv.blocks import BlockAllocator, BlockTable

_get_key = attrgetter("key")


class WaitingQueue:
    """Sequences without blocks, first in policy order at the head.

    It may be long and only its head is ever looked at, so it is a heap in which entries go stale
    instead of being searched for; a sequence's ticket names its live entry.
    """

    __slots__ = ("_heap", "_live", "_tickets")

    def __init__(self) -> None:
        self._heap: list[tuple[Key, int, Sequence]] = []
        self._live = 0
        self._tickets = 0

    def __len__(self) -> int:
        return self._live

    def __iter__(self) -> Iterator[Sequence]:
        """All waiting sequences, in no particular order."""
        return (sequence for _, ticket, sequence in self._heap if sequence.ticket == ticket)

    def push(self, sequence: Sequence) -> None:
        """Add a sequence that is not waiting."""
        sequence.ticket = self._tickets
        self._tickets += 1
        self._live += 1
        heapq.heappush(self._heap, (sequence.key, sequence.ticket, sequence))

    def try_head(self) -> Sequence | None:
        """The first in policy order; None when nobody waits."""
        while self._heap and self._heap[0][2].ticket != self._heap[0][1]:
            heapq.heappop(self._heap)
        return self._heap[0][2] if self._heap else None

    def remove(self, sequence: Sequence) -> None:
        """Take a waiting sequence out, wherever it stands."""
        assert sequence.ticket >= 0, f"{sequence.id} is not waiting"
        sequence.ticket = -1
        self._live -= 1
        # Stale entries deep in the heap would keep their prompts alive: sweep when they dominate.
        if len(self._heap) > 2 * self._live + 64:
            self._heap = [entry for entry in self._heap if entry[2].ticket == entry[1]]
            heapq.heapify(self._heap)


class Roster:
    """All live requests of a scheduler; others read its fields and change them by its methods.

    groups: live requests by id. running: sequences a plan may pick, few and read in order every
    step, so a sorted list. reserved: sequences whose KV is being written from outside, by request;
    one may have ended. fates: how many requests came, and how many ended in which way.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.allocator = BlockAllocator(config.num_blocks)
        self.groups: dict[str, Group] = {}
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []
        self.reserved: dict[str, Sequence] = {}
        fates = ("submitted", "finished", "rejected", "cancelled", "failed", "released")
        self.fates = dict.fromkeys(fates, 0)
        self._block_tokens = config.block_tokens

    def enter(self, request: Request, rank: tuple[int, ...], arrival: int) -> None:
        """Take an accepted request in; its first sequence waits, to compute the prompt."""
        group = Group(request, request.n, request.n, request.sampling.needs_history)
        for index in range(request.n):
            id, key = SequenceId(request.id, index), (rank, arrival, index)
            group.sequences.append(Sequence(id, group, key, [], BlockTable(self.allocator)))
        self.groups[request.id] = group
        self.start_carrier(group)

    def start_carrier(self, group: Group) -> None:
        """Let the first unborn sequence compute the prompt, from its beginning."""
        carrier = next(one for one in group.sequences if one.state is State.UNBORN)
        group.unborn -= 1
        carrier.tokens = list(group.request.prompt)
        self._wait(carrier)
        self.try_fork(carrier)

    def try_fork(self, carrier: Sequence) -> None:
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

    def admit(self, sequence: Sequence) -> None:
        """Let a waiting sequence run."""
        self.waiting.remove(sequence)
        self._run(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Take the blocks of a running sequence away; it waits at its old place in the order."""
        self.running.remove(sequence)
        sequence.forget_kv()
        self._wait(sequence)

    def reserve(self, sequence: Sequence, num_blocks: int) -> None:
        """Give a waiting sequence blocks for KV that comes from outside."""
        self.waiting.remove(sequence)
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
        sequence.table.shrink(len(sequence.table) - self.get_num_blocks(tokens_computed))
        sequence.computed = sequence.planned = tokens_computed
        self._run(sequence)
        self.try_fork(sequence)

    def end(self, sequence: Sequence, ending: Ending) -> SequenceEnded:
        """End a live sequence, and its request with the last of them."""
        group = sequence.group
        self._stop(sequence)
        if not group.live:
            del self.groups[group.request.id]
            self.fates[type(ending).__name__.lower()] += 1
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
        """Free blocks beyond what running sequences need for known tokens and one spare each.

        Continuations yet to be forked count as running: each will want a block at the fork.
        """
        slack = self.allocator.num_free
        for sequence in self.running:
            missing = self.get_num_blocks(len(sequence.tokens)) - len(sequence.table)
            slack -= missing + 1 + sequence.group.unborn
        return slack

    def get_num_blocks(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens."""
        return -(-tokens // self._block_tokens)

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
        if state is State.UNBORN:
            sequence.group.unborn -= 1
        elif state is State.WAITING:
            self.waiting.remove(sequence)
        elif state is State.RUNNING:
            self.running.remove(sequence)
        if state is not State.RESERVED:
            self.free_if_settled(sequence)
