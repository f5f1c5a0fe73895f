"""The passes over whole rows of logits that precede a draw, many programs a row.

Owns three kernels, in this order: the largest and smallest value of each part of a row; what a row
needs to know of itself before it can be weighed, and its random number; the weight of each bin
(see sampling_values.py), with a list of the candidates that are not far, as long as it lasts.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from twostroke.kernels.cuda.sampling_values import (
    BINS,
    FACTS,
    FAR,
    LEAST_PACKED,
    clean,
    find_bin,
    get_key,
    get_packed_value,
    get_token,
    get_units,
    is_live,
    load_facts,
    pack_candidate,
    widen,
)
from twostroke.kernels.cuda.types import Tensor

# Log of the weight, relative to the best, below which candidates are lumped together: their bin is
# taken apart only when a cut or a draw falls into it. About 6e-5.
FAR_LOG = tl.constexpr(-9.704060527839234)
LOG2_E = tl.constexpr(1.4426950408889634)
NEAR = tl.constexpr(8192)  # candidates that a row's list has room for
CHOSEN = tl.constexpr(256)  # candidates that are put in order at once
BLOCK = tl.constexpr(2048)  # logits read at once by a pass for the largest
WEIGHED = tl.constexpr(1024)  # logits weighed at once
MAX_PARTS = tl.constexpr(64)  # into which a row is divided


class DrawScratch(NamedTuple):
    """Memory of the kernels' own for L rows; it holds nothing from one draw to the next.

    best (L, MAX_PARTS) int64 packed candidates, lowest (L, MAX_PARTS) float32: of parts of rows.
    facts (L, FACTS) float64: RowFacts, then the random number. masses (L, BINS) int64 in each bin's
    units, counts (L, BINS) int32. near_values, near_ids (L, NEAR): candidates before the last bin,
    near_count (L,) int32 how many there are, which may be more than the list holds.
    chosen, chosen_units (L, CHOSEN) int64: packed candidates, and what they weigh.
    """

    best: Tensor
    lowest: Tensor
    facts: Tensor
    masses: Tensor
    counts: Tensor
    near_values: Tensor
    near_ids: Tensor
    near_count: Tensor
    chosen: Tensor
    chosen_units: Tensor

    @classmethod
    def allocate(cls, rows: int, device: torch.device | str) -> DrawScratch:
        """Scratch for up to `rows` rows of any vocabulary."""

        def make(width: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros((rows, width), dtype=dtype, device=device)

        return cls(
            best=make(MAX_PARTS.value, torch.int64),
            lowest=make(MAX_PARTS.value, torch.float32),
            facts=make(FACTS.value, torch.float64),
            masses=make(BINS.value, torch.int64),
            counts=make(BINS.value, torch.int32),
            near_values=make(NEAR.value, torch.float32),
            near_ids=make(NEAR.value, torch.int32),
            near_count=make(1, torch.int32),
            chosen=make(CHOSEN.value, torch.int64),
            chosen_units=make(CHOSEN.value, torch.int64),
        )

    @property
    def bytes(self) -> int:
        """Bytes it takes."""
        return sum(each.numel() * each.element_size() for each in self)


@triton.jit
def scan_kernel(best, lowest, logits, stride, vocab, chunk):
    """Best candidate of each part of `chunk` logits, and unless `lowest` is None the least finite
    value, +inf where there is none. Grid (rows, parts)."""
    row, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    values = logits + row.to(tl.int64) * stride
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    least = tl.full((BLOCK,), float("inf"), tl.float32)
    token = tl.zeros((BLOCK,), tl.int32)
    start, end = part * chunk, tl.minimum(part * chunk + chunk, vocab)
    while start < end:
        at = start + tl.arange(0, BLOCK)
        x = tl.load(values + at, mask=at < vocab, other=float("-inf"))
        better = x > largest  # never for NaN; the first of equal ones stays
        largest = tl.where(better, x, largest)
        token = tl.where(better, at, token)
        if lowest is not None:
            least = tl.where((x > float("-inf")) & (x < least), x, least)
        start += BLOCK
    packed = pack_candidate(get_key(clean(largest)), token)
    tl.store(best + row * parts + part, tl.max(packed))
    if lowest is not None:
        tl.store(lowest + row * parts + part, tl.min(least))


@triton.jit(do_not_specialize=["parts"], do_not_specialize_on_alignment=["tokens"])
def pick_kernel(tokens, best, parts):
    """The token of the best of a row's parts. Grid (rows,)."""
    row = tl.program_id(0)
    at = tl.arange(0, MAX_PARTS)
    packed = tl.load(best + row * parts + at, mask=at < parts, other=LEAST_PACKED)
    tl.store(tokens + row, get_token(tl.max(packed)))


@triton.jit
def draw_uniform(sampling, row):
    """The row's number in [0, 1), float64 with 53 random bits, by Philox4x32-10."""
    seed, counter = sampling.seed + 2 * row, sampling.counter + 4 * row
    low, high, _, _ = tl.philox_impl(
        tl.load(counter).to(tl.uint32, bitcast=True),
        tl.load(counter + 1).to(tl.uint32, bitcast=True),
        tl.load(counter + 2).to(tl.uint32, bitcast=True),
        tl.load(counter + 3).to(tl.uint32, bitcast=True),
        tl.load(seed).to(tl.uint32, bitcast=True),
        tl.load(seed + 1).to(tl.uint32, bitcast=True),
    )
    bits = ((high.to(tl.uint64) << 32) | low.to(tl.uint64)) >> 11
    return bits.to(tl.int64).to(tl.float64) * 2.0**-53


@triton.jit(do_not_specialize=["parts"], do_not_specialize_on_alignment=["tokens"])
def prepare_kernel(tokens, sampling, scratch, parts):
    """Takes each row's largest logit, its answer unless it draws, and gets it ready to be weighed.

    With a min-p, all that it keeps is near and all else is far. Grid (rows,).
    """
    row = tl.program_id(0)
    at = tl.arange(0, MAX_PARTS)
    inside = at < parts
    packed = tl.load(scratch.best + row * parts + at, mask=inside, other=LEAST_PACKED)
    packed = tl.max(packed)
    tl.store(tokens + row, get_token(packed))
    best = get_packed_value(packed)
    temperature = tl.load(sampling.temperature + row).to(tl.float64)
    draws = (temperature > 0) & (best > float("-inf"))
    facts = scratch.facts + row * FACTS
    tl.store(facts + 1, 0.0)
    if draws:
        largest = widen(best)
        least = tl.min(tl.load(scratch.lowest + row * parts + at, mask=inside, other=float("inf")))
        min_p = tl.load(sampling.min_p + row).to(tl.float64)
        cut = tl.where(min_p > 0, tl.minimum(min_p, 1.0), 1.0)
        depth = -temperature * tl.where(min_p > 0, tl.log(cut), FAR_LOG)
        span = tl.minimum(depth, largest - widen(least))
        per_value = tl.where(span > 0, 1.0 / tl.where(span > 0, span, 1.0) * FAR, 0.0)
        tl.store(facts, largest)
        tl.store(facts + 1, 1.0 / temperature)
        tl.store(facts + 2, per_value)
        tl.store(facts + 3, -depth)
        tl.store(facts + 4, span / temperature * (LOG2_E / FAR))
        tl.store(facts + 5, draw_uniform(sampling, row))
        bins = row * BINS + tl.arange(0, BINS)
        tl.store(scratch.masses + bins, tl.zeros((BINS,), tl.int64))
        tl.store(scratch.counts + bins, tl.zeros((BINS,), tl.int32))
        tl.store(scratch.near_count + row, 0)


@triton.jit
def weigh_kernel(logits, scratch, stride, vocab, chunk):
    """Adds the logits of each part of `chunk` to the row's bins and list. Grid (rows, parts)."""
    row = tl.program_id(0)
    facts = load_facts(scratch.facts + row * FACTS)
    if facts.inverse > 0:
        values = logits + row.to(tl.int64) * stride
        first = tl.program_id(1) * chunk
        far_units, far_count = tl.full((), 0, tl.int64), 0
        start, end = first, tl.minimum(first + chunk, vocab)
        while start < end:
            at = start + tl.arange(0, WEIGHED)
            x = clean(tl.load(values + at, mask=at < vocab, other=float("-inf")))
            shifted = widen(x) - facts.largest
            place = find_bin(shifted, facts)
            units = get_units(shifted, place, facts)
            live = is_live(shifted, facts)
            far = live & (place == FAR)
            far_units += tl.sum(tl.where(far, units, 0))
            far_count += tl.sum(far.to(tl.int32))
            near = live & (place < FAR)
            found = tl.sum(near.to(tl.int32))
            if found > 0:
                bins = row * BINS + place
                tl.atomic_add(scratch.masses + bins, units, mask=near, sem="relaxed")
                tl.atomic_add(scratch.counts + bins, 1, mask=near, sem="relaxed")
                taken = tl.atomic_add(scratch.near_count + row, found, sem="relaxed")
                if taken < NEAR:
                    slot = taken + tl.cumsum(near.to(tl.int32), 0) - 1
                    listed = near & (slot < NEAR)
                    tl.store(scratch.near_values + row * NEAR + slot, x, mask=listed)
                    tl.store(scratch.near_ids + row * NEAR + slot, at, mask=listed)
            start += WEIGHED
        if far_count > 0:
            end_bin = row * BINS + FAR
            tl.atomic_add(scratch.masses + end_bin, far_units, sem="relaxed")
            tl.atomic_add(scratch.counts + end_bin, far_count, sem="relaxed")
