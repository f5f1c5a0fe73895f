"""Laws of the block allocator and of block tables."""

from __future__ import annotations

import pytest

from twostroke.kv.blocks import BlockAllocator, BlockTable


def test_every_block_can_be_taken_once() -> None:
    allocator = BlockAllocator(5)
    assert sorted(allocator.take() for _ in range(5)) == [0, 1, 2, 3, 4]
    assert allocator.num_free == 0


def test_the_block_freed_last_is_taken_first() -> None:
    allocator = BlockAllocator(3)
    first, second = allocator.take(), allocator.take()
    allocator.drop(first)
    allocator.drop(second)
    assert allocator.take() == second


def test_freeing_a_shared_block_keeps_it() -> None:
    allocator = BlockAllocator(2)
    block = allocator.take()
    allocator.share(block)
    allocator.drop(block)
    assert allocator.num_free == 1
    allocator.drop(block)
    assert allocator.num_free == 2


def test_a_pinned_block_is_freed_only_when_unpinned() -> None:
    allocator = BlockAllocator(1)
    block = allocator.take()
    allocator.pin(block)
    allocator.drop(block)
    assert allocator.num_free == 0
    allocator.unpin(block)
    assert allocator.num_free == 1


def test_misuse_of_a_block_is_our_bug() -> None:
    allocator = BlockAllocator(1)
    for misuse in (allocator.drop, allocator.share, allocator.pin, allocator.unpin):
        with pytest.raises((AssertionError, IndexError)):
            misuse(0)
    allocator.take()
    with pytest.raises(AssertionError):
        allocator.take()


def test_shrinking_undoes_growing() -> None:
    allocator = BlockAllocator(4)
    table = BlockTable(allocator)
    table.grow(1)
    before = table.get_blocks()
    table.grow(3)
    assert len(table) == 4
    table.shrink(3)
    assert table.get_blocks() == before
    assert allocator.num_free == 3


def test_a_fork_takes_no_block() -> None:
    allocator = BlockAllocator(4)
    table = BlockTable(allocator)
    table.grow(2)
    twin = table.fork()
    assert twin.get_blocks() == table.get_blocks()
    assert allocator.num_free == 2
    table.clear()
    assert allocator.num_free == 2
    twin.clear()
    assert allocator.num_free == 4


def test_splitting_leaves_the_twin_its_block() -> None:
    allocator = BlockAllocator(4)
    table = BlockTable(allocator)
    table.grow(2)
    twin = table.fork()
    copy = table.split(1)
    assert twin.get_blocks()[1] == copy.source
    assert table.get_blocks()[1] == copy.target
    assert not table.is_shared(1)
    assert not twin.is_shared(1)
    assert table.is_shared(0)


def test_rejoining_undoes_splitting_even_when_the_twin_is_gone() -> None:
    allocator = BlockAllocator(4)
    table = BlockTable(allocator)
    table.grow(2)
    before = table.get_blocks()
    twin = table.fork()
    copy = table.split(1)
    twin.clear()
    table.rejoin(1, copy.source)
    assert table.get_blocks() == before
    assert allocator.num_free == 2
    assert not any(allocator.pins)
