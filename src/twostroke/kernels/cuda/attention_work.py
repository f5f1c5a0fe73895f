"""What one call of attention works on, and the memory its split decodes meet in.

Owns the argument types that the attention kernels' launchers share, and no kernel. T is the number
of tokens of a step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from twostroke.kernels.cuda.types import BLOCK_TOKENS, KvLayer, StepTensors, Tensor

# Keys of one segment where results are exact: a segment begins at every multiple of it.
SEGMENT_TOKENS = 1024
# Multiprocessors assumed where there is no GPU to ask, in the interpreter.
ASSUMED_PROCESSORS = 132
# Places for parts of results: so many a decode row on average, and at least so many for a step.
PLACES_A_ROW = 4
LEAST_PLACES = 1024


@dataclass(frozen=True, slots=True)
class Look:
    """How queries look at keys.

    scale: multiplies scores, all constant factors included. window: how many of the most recent
    positions a query sees, itself included; 0 for all. exact: a token's result must not depend on
    the other tokens of its step.
    """

    scale: float
    window: int = 0
    exact: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class AttentionScratch:
    """Where the programs that share one row's keys leave their parts, allocated once.

    parts (places, heads, head_dim) float32: sums of weighted values, a place a row and split. sums
    (places, 2, heads) float32: maxima of scores in log2 units, then sums of weights. arrivals
    (rows * heads,) int32: how many programs of a row and head are done; zero between launches, each
    of which leaves it so. processors: multiprocessors of the device.
    Launches that share it must run one after the other.
    """

    parts: Tensor
    sums: Tensor
    arrivals: Tensor
    processors: int

    @staticmethod
    def allocate(
        device: torch.device | str,
        max_decode_rows: int,
        heads: int,
        head_dim: int,
        max_context: int,
    ) -> AttentionScratch:
        """Scratch for steps of up to `max_decode_rows` rows of one token, contexts up to this."""
        places = _count_places(max_decode_rows, max_context)
        processors = ASSUMED_PROCESSORS
        if torch.device(device).type == "cuda":
            processors = torch.cuda.get_device_properties(device).multi_processor_count
        return AttentionScratch(
            torch.zeros(places, heads, head_dim, dtype=torch.float32, device=device),
            torch.zeros(places, 2, heads, dtype=torch.float32, device=device),
            torch.zeros(max_decode_rows * heads, dtype=torch.int32, device=device),
            processors,
        )

    @property
    def places(self) -> int:
        """How many parts of rows fit at a time."""
        return int(self.parts.shape[0])

    @property
    def bytes(self) -> int:
        """Bytes it takes; `count_scratch_bytes` tells before."""
        tensors = (self.parts, self.sums, self.arrivals)
        return sum(each.numel() * each.element_size() for each in tensors)


def count_scratch_bytes(max_decode_rows: int, heads: int, head_dim: int, max_context: int) -> int:
    """Bytes of `AttentionScratch.allocate` with these arguments."""
    places = _count_places(max_decode_rows, max_context)
    return 4 * (places * heads * (head_dim + 2) + max_decode_rows * heads)


def _count_places(max_decode_rows: int, max_context: int) -> int:
    wanted = max(LEAST_PLACES, PLACES_A_ROW * max_decode_rows)
    return min(wanted, max_decode_rows * -(-max_context // BLOCK_TOKENS))


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """One call: queries q (T, heads, head_dim) float16 or bfloat16, heads contiguous, into out.

    out (T, heads * head_dim) like q; it is written where tokens have rows. kv: the layer's pool,
    in which the step's own tokens already are.
    """

    out: Tensor
    q: Tensor
    kv: KvLayer
    step: StepTensors
    look: Look

    def check(self) -> None:
        """Asserts the shapes that the kernels take for granted."""
        tokens, heads, head_dim = self.q.shape
        blocks, kv_heads = self.kv.keys.shape[:2]
        assert self.q.dtype in (torch.float16, torch.bfloat16), self.q.dtype
        assert self.q.stride()[1:] == (head_dim, 1), self.q.stride()
        assert self.out.shape == (tokens, heads * head_dim), self.out.shape
        assert self.out.dtype == self.q.dtype, self.out.dtype
        assert self.out.stride(1) == 1, self.out.stride()
        assert heads % kv_heads == 0, (heads, kv_heads)
        for pool in (self.kv.keys, self.kv.values):
            assert pool.shape == (blocks, kv_heads, BLOCK_TOKENS, head_dim), pool.shape
            assert pool.stride()[2:] == (head_dim, 1), pool.stride()
        for scales in (self.kv.key_scales, self.kv.value_scales):
            has_scales = self.kv.keys.element_size() == 1
            assert (scales is not None) == has_scales, "8-bit elements, and only they, have scales"
            assert scales is None or scales.stride(2) == 1, scales.stride()
        assert self.look.window >= 0, self.look.window

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return int(self.kv.keys.shape[1])

    @property
    def group(self) -> int:
        """Query heads that share a head of keys and values."""
        return int(self.q.shape[1]) // self.kv_heads

    @property
    def head_dim(self) -> int:
        """Dimensions of a head."""
        return int(self.q.shape[2])

    @property
    def factor(self) -> float:
        """The scale in log2 units: powers of two are what the hardware computes."""
        return self.look.scale * math.log2(math.e)
