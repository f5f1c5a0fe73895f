"""What must be true of a scheduler between any two inputs.

`check` recounts from scratch everything the scheduler keeps incrementally. It is for tests and for
a debugging engine; it reads the scheduler's private state and changes nothing.
"""

from __future__ import annotations

from collections import Counter

from twostroke.core.scheduler import MAX_IN_FLIGHT, Scheduler
from twostroke.core.sequence import Sequence, State
from twostroke.core.steps import Placement
from twostroke.core.types import PENDING, BlockId


def check(scheduler: Scheduler) -> None:
    """Raise AssertionError naming the first broken invariant."""
    placements = [place for flight in scheduler._flights for place in flight.placements]
    sequences = _collect_sequences(scheduler, placements)
    _check_lines(scheduler, sequences)
    _check_marks(scheduler, sequences, placements)
    _check_ahead(scheduler)
    _check_groups(scheduler)
    _check_blocks(scheduler, sequences, placements)
    _check_counts(scheduler)


def _collect_sequences(scheduler: Scheduler, placements: list[Placement]) -> list[Sequence]:
    """Every sequence the scheduler remembers, ended ones with rows in flight included."""
    found = {id(one): one for group in scheduler._roster.groups.values() for one in group.sequences}
    found.update((id(place.sequence), place.sequence) for place in placements)
    found.update((id(one), one) for one in scheduler._roster.reserved.values())
    return list(found.values())


def _check_lines(scheduler: Scheduler, sequences: list[Sequence]) -> None:
    running = scheduler._roster.running
    keys = [one.key for one in running]
    assert keys == sorted(keys), "running: out of policy order"
    assert all(one.state is State.RUNNING for one in running), "running: holds another state"
    waiting = [one for lane in scheduler._roster.waiting.lanes.values() for one in lane]
    assert all(one.state is State.WAITING for one in waiting), "waiting: holds another state"
    assert len(waiting) == len(scheduler._roster.waiting), "waiting: miscounted"
    for state, line in ((State.RUNNING, running), (State.WAITING, waiting)):
        expected = sorted(one.key for one in sequences if one.state is state)
        assert sorted(one.key for one in line) == expected, f"{state.value}: not those in the line"


def _check_marks(
    scheduler: Scheduler, sequences: list[Sequence], placements: list[Placement]
) -> None:
    assert len(scheduler._flights) <= MAX_IN_FLIGHT, "flights: too many"
    steps = [flight.plan.step for flight in scheduler._flights]
    assert steps == sorted(set(steps)), "flights: out of order"
    rows = Counter(id(place.sequence) for place in placements)
    for one in sequences:
        name = one.id
        assert one.rows_in_flight == rows[id(one)], f"{name}: rows in flight miscounted"
        if one.state is State.RUNNING:
            assert 0 <= one.computed <= one.planned, f"{name}: computed beyond planned"
            assert one.computed < len(one.tokens), f"{name}: nothing left to compute"
            assert one.rows_in_flight or one.computed == one.planned, f"{name}: planned in no step"
            assert one.rows_in_flight or one.gap > 0, f"{name}: runs without a gap"
            named = one.kept.named * scheduler.config.block_tokens
            assert named <= one.computed, f"{name}: named what is not computed"
            assert PENDING not in one.tokens, f"{name}: knows a token that was not drawn"
            num_blocks = scheduler._roster.memory.get_num_blocks(one.planned)
            assert len(one.table) == (num_blocks if one.planned else 0), (
                f"{name}: more or fewer blocks than its tokens need"
            )
        elif one.state in (State.WAITING, State.UNBORN):
            assert not len(one.table), f"{name}: holds blocks while {one.state.value}"
            assert one.planned == one.rows_in_flight == 0, f"{name}: in flight without blocks"
        elif one.state is State.ENDED and not one.rows_in_flight:
            held = scheduler._roster.reserved.get(one.id.request) is one
            assert held or not len(one.table), f"{name}: ended and settled, but holds blocks"


def _check_ahead(scheduler: Scheduler) -> None:
    """Rows ahead of their token: the step just before draws it, and nobody else's."""
    before = None
    for flight in scheduler._flights:
        for place in flight.placements:
            row, one = place.row, place.sequence
            if PENDING not in row.tokens:
                continue
            assert scheduler.config.plans_ahead, f"{one.id}: ahead, but nobody may be"
            assert row.tokens == (PENDING,), f"{one.id}: more than one token in a row ahead"
            assert flight.plan.iterations == 1, f"{one.id}: ahead by a stride"
            assert row.sampling is not None, f"{one.id}: ahead without drawing"
            assert not row.history, f"{one.id}: ahead of its history"
            known = len(one.tokens) - (before is None)
            assert one.state is State.ENDED or row.start == known, f"{one.id}: ahead by two"
            if before is not None:
                assert before.plan.step == flight.plan.step - 1, f"{one.id}: ahead by two steps"
                assert before.plan.iterations == 1, f"{one.id}: ahead of a stride"
                drawn = [other.row for other in before.placements if other.sequence is one]
                ends = [other.start + len(other.tokens) for other in drawn if other.sampling]
                assert ends == [row.start], f"{one.id}: nobody draws its token"
                assert not drawn[0].drafts, f"{one.id}: ahead of drafts"
        before = flight


def _check_groups(scheduler: Scheduler) -> None:
    for name, group in scheduler._roster.groups.items():
        live = [one for one in group.sequences if one.state is not State.ENDED]
        unborn = [one for one in live if one.state is State.UNBORN]
        assert group.live == len(live) > 0, f"{name}: live sequences miscounted"
        assert group.unborn == len(unborn) < len(live), f"{name}: unborn sequences miscounted"
        assert not unborn or len(unborn) + 1 == len(live), f"{name}: two compute the prompt"
        assert len(group.scored) <= group.scored_planned, f"{name}: scored more than planned"
        assert group.scored_planned < len(group.request.prompt), f"{name}: scored twice"


def _check_blocks(
    scheduler: Scheduler, sequences: list[Sequence], placements: list[Placement]
) -> None:
    allocator = scheduler._roster.allocator
    references: Counter[BlockId] = Counter()
    for one in sequences:
        blocks = one.table.get_blocks()
        assert len(set(blocks)) == len(blocks), f"{one.id}: lists a block twice"
        references.update(blocks)
    pins = Counter(place.source for place in placements if place.source is not None)
    free = [*allocator.free, *allocator.prefixes.idle]
    assert len(set(free)) == len(free), "blocks: one is free twice"
    host = [*scheduler._roster.memory.free_host, *(h for one in sequences for h in one.kept.host)]
    assert sorted(host) == list(range(scheduler.config.host_blocks)), "host: a block leaked"
    taken, listed_free = len(allocator.references), frozenset(free)
    assert all(block < taken for block in references | pins), "blocks: one was never taken"
    assert allocator.num_free == scheduler.config.num_blocks - taken + len(free), (
        "blocks: miscounted"
    )
    for block, counted in enumerate(zip(allocator.references, allocator.pins, strict=True)):
        held = references[block], pins[block]
        assert counted == held, f"block {block}: counts {counted} references and pins, has {held}"
        assert (block in listed_free) == (held == (0, 0)), f"block {block}: leaked, or free in use"
    for place in placements:
        first = place.row.start // scheduler.config.block_tokens
        for block in place.row.blocks[first:]:
            assert references[block] == 1, f"block {block}: written while shared"


def _check_counts(scheduler: Scheduler) -> None:
    counts = dict(scheduler.counts)
    assert counts.pop("submitted") == sum(counts.values()), "counts: not conserved"
