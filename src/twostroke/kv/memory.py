"""The KV memory of one scheduler: its pool of blocks, and host memory for sequences that wait.

`KVMemory` counts; `KeptKV` is one sequence's claim on KV that is not, or not only, in its block
table: blocks named for reuse by others, and blocks moved to the host. Every host block has at most
one owner, and is free otherwise. The bytes are moved by an executor, in the order that plans name.
"""

from __future__ import annotations

from collections.abc import Sequence

from twostroke.kv.blocks import BlockAllocator, BlockTable
from twostroke.kv.moves import BlockId, BlockSwap
from twostroke.kv.prefix import Name, extend_names, get_root


class KVMemory:
    """The pool and host memory, and how many blocks a sequence takes of them.

    least_blocks: of any sequence with tokens (pre-allocation); 0 pages on demand. seed: of prefix
    names; an empty one names nothing. free_host: a stack of host blocks. Counted since the start:
    prompt_tokens of admitted requests, cached_tokens found for them, num_preemptions, num_swaps (of
    these, KV moved to the host).
    """

    __slots__ = (
        "allocator",
        "block_tokens",
        "cached_tokens",
        "free_host",
        "least_blocks",
        "num_preemptions",
        "num_swaps",
        "prompt_tokens",
        "seed",
    )

    def __init__(
        self,
        num_blocks: int,
        block_tokens: int,
        host_blocks: int = 0,
        least_blocks: int = 0,
        seed: str = "",
    ) -> None:
        self.allocator = BlockAllocator(num_blocks)
        self.block_tokens = block_tokens
        self.free_host = list(range(host_blocks - 1, -1, -1))
        self.least_blocks = least_blocks
        self.seed = seed
        self.prompt_tokens = self.cached_tokens = self.num_preemptions = self.num_swaps = 0

    @property
    def num_cached_blocks(self) -> int:
        """Blocks that hold a named prefix, held or not."""
        return len(self.allocator.prefixes)

    def get_num_blocks(self, tokens: int) -> int:
        """Blocks of a sequence with `tokens` tokens."""
        return max(-(-tokens // self.block_tokens), self.least_blocks)

    def count_shared(self, blocks: Sequence[BlockId]) -> int:
        """How many of these blocks somebody holds now."""
        references = self.allocator.references
        return sum(references[block] > 0 for block in blocks)


class KeptKV:
    """One sequence's named blocks and host blocks.

    host: blocks of host memory with the KV of its first `hosted` tokens. named: how many blocks of
    its table were entered under their names; the names of known tokens are made when needed.
    """

    __slots__ = ("_memory", "_names", "_scope", "host", "hosted", "named")

    def __init__(self, memory: KVMemory, scope: str) -> None:
        self._memory = memory
        self._scope = scope
        self._names: list[Name] = []
        self.named = 0
        self.host: tuple[BlockId, ...] = ()
        self.hosted = 0

    def find_prefix(self, tokens: Sequence[int]) -> list[BlockId]:
        """Blocks that hold a beginning of `tokens`, of which at least one is left to compute."""
        if not self._memory.seed:
            return []
        names = self._get_names(tokens)
        most = (len(tokens) - 1) // self._memory.block_tokens
        return self._memory.allocator.prefixes.find(names[:most])

    def name_full(self, table: BlockTable, tokens: Sequence[int], computed: int) -> None:
        """Enter the blocks of `table` that are full and lasting with `computed` tokens."""
        full = computed // self._memory.block_tokens
        if not self._memory.seed or self.named >= full:
            return
        names, blocks = self._get_names(tokens), table.get_blocks()
        for index in range(self.named, full):
            self._memory.allocator.prefixes.name(blocks[index], names[index])
        self.named = full

    def can_move_out(self, computed: int) -> bool:
        """True when host memory has room for the KV of `computed` tokens."""
        return 0 < -(-computed // self._memory.block_tokens) <= len(self._memory.free_host)

    def move_out(self, table: BlockTable, computed: int) -> list[BlockSwap]:
        """Take host blocks for the KV of `computed` tokens; returns the moves to make."""
        blocks = table.get_blocks()[: -(-computed // self._memory.block_tokens)]
        moves = [BlockSwap(block, self._memory.free_host.pop()) for block in blocks]
        self.host, self.hosted = tuple(move.host for move in moves), computed
        return moves

    def move_in(self, table: BlockTable) -> list[BlockSwap]:
        """Grow the empty `table` for the hosted tokens; returns the moves to make.

        The host blocks stay until `forget_host`, so that the moves can be made again.
        """
        table.grow(self._memory.get_num_blocks(self.hosted))
        pairs = zip(table.get_blocks(), self.host, strict=False)
        return [BlockSwap(block, host) for block, host in pairs]

    def forget_host(self) -> None:
        """Free the host blocks, if there are any."""
        self._memory.free_host.extend(reversed(self.host))
        self.host, self.hosted = (), 0

    def _get_names(self, tokens: Sequence[int]) -> list[Name]:
        root = get_root(self._memory.seed, self._scope)
        extend_names(self._names, root, tokens, self._memory.block_tokens)
        return self._names
