"""Thousands of random runs and a million random allocator operations, in plain Python.

Slow by the measure of the unit tests, so marked. A failure names its seed; the same seed fails
again.
"""

from __future__ import annotations

import random
from collections import Counter
from contextlib import ExitStack

import pytest

from scheduler_fuzz import run_random
from twostroke.core.types import PENDING
from twostroke.kv.blocks import BlockAllocator, BlockTable

NUM_RUNS = 2500
NUM_OPERATIONS = 1_000_000
NUM_BLOCKS = 300
SEED = 20


@pytest.mark.slow
def test_random_runs_hold_every_invariant_and_end() -> None:
    preemptions = copies = ignored = ahead = 0
    for seed in range(NUM_RUNS):
        with ExitStack() as on_failure:
            on_failure.callback(print, f"failing seed: {seed}")
            driver = run_random(seed)
            on_failure.pop_all()
        preemptions += driver.scheduler.memory.num_preemptions
        ignored += driver.scheduler.num_ignored_results
        copies += sum(len(plan.copies) for plan in driver.plans)
        ahead += sum(row.tokens == (PENDING,) for plan in driver.plans for row in plan.rows)
    # The runs are worth something only if they go through what is hard.
    assert preemptions > NUM_RUNS
    assert copies > NUM_RUNS
    assert ignored > NUM_RUNS // 2
    assert ahead > 4 * NUM_RUNS


def take_random(rng: random.Random, held: list[int]) -> int:
    """Remove a random entry in constant time; order does not matter."""
    place = rng.randrange(len(held))
    held[place], held[-1] = held[-1], held[place]
    return held.pop()


def check_allocator(allocator: BlockAllocator, held: list[int], pinned: list[int]) -> None:
    """Counts are those of the entries held and pinned, and the rest is free, once."""
    references, pins = Counter(held), Counter(pinned)
    taken = len(allocator.references)  # only blocks that were ever taken have counts
    assert max(references, default=0) < max(taken, 1)
    assert allocator.references == [references[block] for block in range(taken)]
    assert allocator.pins == [pins[block] for block in range(taken)]
    unheld = [block for block in range(taken) if not references[block] + pins[block]]
    assert sorted(allocator.free) == unheld
    assert allocator.num_free == len(unheld) + NUM_BLOCKS - taken


@pytest.mark.slow
def test_a_million_random_allocator_operations_leak_no_block() -> None:
    print(f"seed: {SEED}")
    rng, allocator = random.Random(SEED), BlockAllocator(NUM_BLOCKS)
    held: list[int] = []
    pinned: list[int] = []
    for number in range(NUM_OPERATIONS):
        choice = rng.random()
        if choice < 0.35 and allocator.num_free:
            held.append(allocator.take())
        elif choice < 0.45 and held:
            held.append(rng.choice(held))
            allocator.share(held[-1])
        elif choice < 0.55 and held:
            pinned.append(rng.choice(held))
            allocator.pin(pinned[-1])
        elif choice < 0.66 and pinned:
            allocator.unpin(take_random(rng, pinned))
        elif held:
            allocator.drop(take_random(rng, held))
        if number % 10_000 == 0:
            check_allocator(allocator, held, pinned)
    while pinned:
        allocator.unpin(pinned.pop())
    while held:
        allocator.drop(held.pop())
    check_allocator(allocator, [], [])


@pytest.mark.slow
def test_random_tables_leak_no_block() -> None:
    print(f"seed: {SEED}")
    rng, allocator = random.Random(SEED), BlockAllocator(NUM_BLOCKS)
    tables: list[BlockTable] = [BlockTable(allocator) for _ in range(40)]
    splits: dict[int, tuple[int, int]] = {}  # a table's place: the index and source of its split
    for number in range(100_000):
        operate_on_table(rng, allocator, tables, splits)
        if number % 1000 == 0:
            listed = [block for table in tables for block in table.get_blocks()]
            check_allocator(allocator, listed, [source for _, source in splits.values()])
    for _, source in splits.values():
        allocator.unpin(source)
    for table in tables:
        table.clear()
    check_allocator(allocator, [], [])


def operate_on_table(
    rng: random.Random,
    allocator: BlockAllocator,
    tables: list[BlockTable],
    splits: dict[int, tuple[int, int]],
) -> None:
    """One random operation on a random table; a split stays open until it is kept or undone."""
    place, choice = rng.randrange(len(tables)), rng.random()
    table = tables[place]
    if place in splits:
        index, source = splits.pop(place)
        if choice < 0.5:
            allocator.unpin(source)
        else:
            table.rejoin(index, source)
    elif choice < 0.4 and allocator.num_free >= 4:
        table.grow(rng.randint(1, 4))
    elif choice < 0.5:
        table.shrink(rng.randint(0, len(table)))
    elif choice < 0.6:
        table.clear()
        tables[place] = rng.choice(tables).fork()
    elif len(table):
        index = rng.randrange(len(table))
        if table.is_shared(index) and allocator.num_free:
            splits[place] = index, table.split(index).source
