"""Prefix names: which blocks hold the KV of which tokens, after which tokens.

A full block's name is a hash of its tokens and the name of the block before it; the first block
follows a root that names the model and the request's scope (adapter, tenant salt). Equal names mean
equal KV, because KV depends on nothing else. The hash is cryptographic: a client who could make two
prompts collide would read another's answer. Only block ids and names live here.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from hashlib import blake2b

from twostroke.kv.moves import BlockId

Name = bytes
_NAME_BYTES = 16


def get_root(seed: str, scope: str) -> Name:
    """The name that the first block of a prompt follows; seed names the model."""
    return blake2b(f"{len(seed)} {seed} {scope}".encode(), digest_size=_NAME_BYTES).digest()


def extend_names(names: list[Name], root: Name, tokens: Sequence[int], block_tokens: int) -> None:
    """Append the names of full blocks of `tokens` that `names` lacks; changes `names`."""
    last = names[-1] if names else root
    for end in range((len(names) + 1) * block_tokens, len(tokens) + 1, block_tokens):
        content = array("q", tokens[end - block_tokens : end]).tobytes()
        last = blake2b(content, digest_size=_NAME_BYTES, key=last).digest()
        names.append(last)


class PrefixIndex:
    """Named blocks, and in order of last use those of them that nobody holds.

    idle: a dict as an ordered set, least recently used first; such blocks count as free.
    """

    __slots__ = ("_blocks", "_names", "idle")

    def __init__(self) -> None:
        self._blocks: dict[Name, BlockId] = {}
        self._names: dict[BlockId, Name] = {}
        self.idle: dict[BlockId, None] = {}

    def __len__(self) -> int:
        return len(self._names)

    def find(self, names: Iterable[Name]) -> list[BlockId]:
        """Blocks of the longest known prefix of `names`, in order."""
        found = []
        for name in names:
            block = self._blocks.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def name(self, block: BlockId, name: Name) -> None:
        """`block`, which somebody holds, is full and its KV lasting; the first such one is kept."""
        if name not in self._blocks and block not in self._names:
            self._blocks[name] = block
            self._names[block] = name

    def try_retire(self, block: BlockId) -> bool:
        """Keep a block that nobody holds any more for its name; False when it has none."""
        if block not in self._names:
            return False
        self.idle[block] = None
        return True

    def evict(self) -> BlockId:
        """The idle block used longest ago, with its name forgotten."""
        block = next(iter(self.idle))
        del self.idle[block]
        del self._blocks[self._names.pop(block)]
        return block
