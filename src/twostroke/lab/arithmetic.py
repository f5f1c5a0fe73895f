"""The few sums that exercises and claims share, each from the numbers that its reader is given.

Of a model of the catalogue ask spec/work.py and ModelSpec instead; here are the forms that stand
on a sheet of paper.
"""

from __future__ import annotations

import math


def get_kv_bytes(
    layers: int, kv_heads: int, head_dim: int, tokens: int, element_bytes: int = 2
) -> int:
    """Keys and values of `tokens` tokens: two of each layer, head and value of a head."""
    return 2 * layers * kv_heads * head_dim * tokens * element_bytes


def count_requests(
    memory_bytes: float, weight_bytes: float, request_bytes: float, cap: float = 1.0
) -> int:
    """Requests that fit beside the weights where a share `cap` of the memory may be used."""
    return max(0, math.floor((memory_bytes * cap - weight_bytes) / request_bytes))


def get_ridge(flops_per_s: float, bytes_per_s: float) -> float:
    """Operations a byte from which on arithmetic takes longer (Williams et al. 2009, §3)."""
    return flops_per_s / bytes_per_s


def count_blocks(lengths: list[int], block_tokens: int) -> int:
    """Blocks that requests of these lengths hold, each its own."""
    return sum(-(-length // block_tokens) for length in lengths)
