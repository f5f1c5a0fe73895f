"""KV blocks: who holds which, and which are free.

Owns the reference counts of the pool's blocks and the block tables of sequences. A block has
*references* (tables that list it) and *pins* (steps in flight that still need its contents, so
that a lost copy can be made again). It is free exactly when it has neither; nothing else decides
that. A free block that holds a named prefix is idle: it may be taken like any other, after those
that hold nothing, or be shared again. Only block ids live here, never KV bytes. A block that two
tables list is never written: the writer splits off a copy first (copy-on-write).
"""

from __future__ import annotations

from collections.abc import Sequence

from twostroke.kv.moves import BlockCopy, BlockId
from twostroke.kv.prefix import PrefixIndex


class BlockAllocator:
    """Reference counts, pins and the free list of a pool of `num_blocks` blocks; others only read.

    references, pins: indexed by block, of the first blocks, those ever taken: a fresh pool costs
    nothing, however large. free: those given back, a stack, whose last is taken next: a block freed
    last is the likeliest to be in a cache still, and reusing it at once makes a use after free
    show. prefixes: the names of blocks, and the free blocks that have one.
    """

    __slots__ = ("free", "num_blocks", "pins", "prefixes", "references")

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.free: list[BlockId] = []
        self.references: list[int] = []
        self.pins: list[int] = []
        self.prefixes = PrefixIndex()

    @property
    def num_empty(self) -> int:
        """Blocks that can be taken now without forgetting a prefix."""
        return len(self.free) + self.num_blocks - len(self.references)

    @property
    def num_free(self) -> int:
        """Blocks that can be taken now."""
        return self.num_empty + len(self.prefixes.idle)

    def take(self) -> BlockId:
        """Take a free block with one reference; there must be one (`num_free`)."""
        return self.take_many(1)[0]

    def take_many(self, count: int) -> list[BlockId]:
        """Take so many free blocks with one reference each; there must be as many (`num_free`)."""
        assert count <= self.num_free, "more than there is: the caller checks num_free first"
        free, references = self.free, self.references
        given = min(count, len(free))
        blocks = free[len(free) - given :][::-1]
        del free[len(free) - given :]
        for block in blocks:
            references[block] = 1
        if given == count:
            return blocks
        fresh = range(len(references), min(len(references) + count - given, self.num_blocks))
        references.extend([1] * len(fresh))
        self.pins.extend([0] * len(fresh))
        blocks.extend(fresh)
        while len(blocks) < count:
            block = self.prefixes.evict()
            references[block] = 1
            blocks.append(block)
        return blocks

    def share(self, block: BlockId) -> None:
        """Add a reference to a block that is held, pinned or idle."""
        if not self.references[block] and not self.pins[block]:
            assert block in self.prefixes.idle, f"block {block} is free"
            del self.prefixes.idle[block]
        self.references[block] += 1

    def drop(self, block: BlockId) -> None:
        """Take one reference away; the block is freed with its last reference and pin."""
        self.drop_many((block,))

    def drop_many(self, blocks: Sequence[BlockId]) -> None:
        """Take one reference away from each of these blocks, in this order."""
        references, pins, prefixes = self.references, self.pins, self.prefixes
        has_names = len(prefixes) > 0
        for block in blocks:
            left = references[block] - 1
            assert left >= 0, f"block {block} has no reference to drop"
            references[block] = left
            if not (left or pins[block] or (has_names and prefixes.try_retire(block))):
                self.free.append(block)

    def pin(self, block: BlockId) -> None:
        """Keep a held block from being reused until `unpin`."""
        assert self.references[block], f"block {block} is pinned without being held"
        self.pins[block] += 1

    def unpin(self, block: BlockId) -> None:
        """Undo one `pin`."""
        pins = self.pins[block] - 1
        assert pins >= 0, f"block {block} has no pin to undo"
        self.pins[block] = pins
        if not pins and not self.references[block] and not self.prefixes.try_retire(block):
            self.free.append(block)


class BlockTable:
    """One sequence's blocks in order of position; every entry is one reference.

    The tuple that plans carry is cached, because a table changes once per block of tokens while a
    plan shows it every step.
    """

    __slots__ = ("_allocator", "_blocks", "_shown")

    def __init__(self, allocator: BlockAllocator) -> None:
        self._allocator = allocator
        self._blocks: list[BlockId] = []
        self._shown: tuple[BlockId, ...] | None = ()

    def __len__(self) -> int:
        return len(self._blocks)

    def get_blocks(self) -> tuple[BlockId, ...]:
        """The blocks in order of position."""
        if self._shown is None:
            self._shown = tuple(self._blocks)
        return self._shown

    def is_shared(self, index: int) -> bool:
        """True when entry `index` exists and another table lists the same block."""
        blocks = self._blocks
        return index < len(blocks) and self._allocator.references[blocks[index]] > 1

    def grow(self, count: int) -> None:
        """Append `count` fresh blocks."""
        if count:
            self._blocks.extend(self._allocator.take_many(count))
            self._shown = None

    def adopt(self, blocks: Sequence[BlockId]) -> None:
        """Append blocks that hold a known prefix, one reference each."""
        for block in blocks:
            self._allocator.share(block)
        self._blocks.extend(blocks)
        self._shown = None

    def shrink(self, count: int) -> None:
        """Drop the last `count` blocks, the inverse of `grow`."""
        if count:
            kept = len(self._blocks) - count
            self._allocator.drop_many(self._blocks[kept:][::-1])
            del self._blocks[kept:]
            self._shown = None

    def clear(self) -> None:
        """Drop every block."""
        self.shrink(len(self._blocks))

    def fork(self) -> BlockTable:
        """A new table that shares every block of this one."""
        twin = BlockTable(self._allocator)
        for block in self._blocks:
            self._allocator.share(block)
        twin._blocks = list(self._blocks)
        twin._shown = self._shown
        return twin

    def split(self, index: int) -> BlockCopy:
        """Replace the shared block at `index` by a fresh one; returns the copy to make.

        The source stays pinned, so that `rejoin` can undo this; who settles the copy unpins it.
        """
        source = self._blocks[index]
        self._allocator.pin(source)
        target = self._allocator.take()
        self._allocator.drop(source)
        self._blocks[index] = target
        self._shown = None
        return BlockCopy(source, target)

    def rejoin(self, index: int, source: BlockId) -> None:
        """Undo `split`: list the pinned `source` at `index` again and give its copy back."""
        self._allocator.share(source)
        self._allocator.unpin(source)
        self._allocator.drop(self._blocks[index])
        self._blocks[index] = source
        self._shown = None
