"""How blocks are named, and how their bytes are to be moved."""

from __future__ import annotations

from dataclasses import dataclass

BlockId = int


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """Copy one block's KV over all layers within the pool."""

    source: BlockId
    target: BlockId


@dataclass(frozen=True, slots=True)
class BlockSwap:
    """Move one block's KV over all layers between the pool and block `host` of host memory."""

    block: BlockId
    host: BlockId
