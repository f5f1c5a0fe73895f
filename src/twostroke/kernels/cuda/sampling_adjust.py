"""Penalties and biases on logits, in place, and the logits put back afterwards.

Owns the tables that remember what was there. A row's history may name a token many times, so the
row's share of a hash table (open addressing, two slots a history token) counts each once: cheaper
than a counter for every token of the vocabulary, and nothing has to be cleared but what is used.
The arithmetic is the reference's: float64 for penalties, float32 for biases, one after another.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from twostroke.kernels.cuda.sampling_tensors import SamplingTensors
from twostroke.kernels.cuda.sampling_values import clean
from twostroke.kernels.cuda.types import Tensor

STEP = tl.constexpr(512)  # entries that a program takes at once
# Multiplier of Fibonacci hashing (Knuth, volume 3, §6.4): neighbouring ids land far apart.
SCATTER = tl.constexpr(0x9E3779B1)


class AdjustScratch(NamedTuple):
    """What a draw's penalties and biases need until its logits are put back.

    slots (2 * history,) int32: of each row, from twice its history's offset on, a hash table of its
    history's tokens, -1 where a slot is free. counts (2 * history,) int32: how often a slot's token
    is output. seen (2 * history,), biased (biases,) float32: the logits that were there.
    """

    slots: Tensor
    counts: Tensor
    seen: Tensor
    biased: Tensor

    @classmethod
    def allocate(cls, history: int, biases: int, device: torch.device | str) -> AdjustScratch:
        """Scratch for up to so many history tokens and bias entries."""
        return cls(
            slots=torch.empty(2 * history, dtype=torch.int32, device=device),
            counts=torch.empty(2 * history, dtype=torch.int32, device=device),
            seen=torch.empty(2 * history, dtype=torch.float32, device=device),
            biased=torch.empty(biases, dtype=torch.float32, device=device),
        )

    @property
    def bytes(self) -> int:
        """Bytes it takes."""
        return sum(each.numel() * each.element_size() for each in self)


def adjust(logits: Tensor, sampling: SamplingTensors, scratch: AdjustScratch) -> None:
    """Change logits (L, vocab) as `sampling` says; `scratch` remembers what they were."""
    grid, stride = (logits.shape[0],), logits.stride(0)
    if sampling.history_tokens.numel():
        assert scratch.slots.numel() >= 2 * sampling.history_tokens.numel()
        count_kernel[grid](sampling, scratch)
        penalise_kernel[grid](logits, sampling, scratch, stride)
    if sampling.bias_tokens.numel():
        assert scratch.biased.numel() >= sampling.bias_tokens.numel()
        bias_kernel[grid](logits, sampling, scratch, stride)


def restore(logits: Tensor, sampling: SamplingTensors, scratch: AdjustScratch) -> None:
    """Put back the logits that `adjust` changed, bit for bit."""
    grid, stride = (logits.shape[0],), logits.stride(0)
    if sampling.bias_tokens.numel():
        restore_biased_kernel[grid](logits, sampling, scratch, stride)
    if sampling.history_tokens.numel():
        restore_seen_kernel[grid](logits, sampling, scratch, stride)


@triton.jit
def count_kernel(sampling, scratch):
    """Enters each row's history into its table. Grid (rows,)."""
    row = tl.program_id(0)
    first = tl.load(sampling.history_offsets + row)
    length = tl.load(sampling.history_offsets + row + 1) - first
    prompt = tl.load(sampling.history_prompt + row)
    size = 2 * length
    slots, counts = scratch.slots + 2 * first, scratch.counts + 2 * first
    start = 0
    while start < size:
        at = start + tl.arange(0, STEP)
        tl.store(slots + at, -1, mask=at < size)
        tl.store(counts + at, 0, mask=at < size)
        start += STEP
    tl.debug_barrier()  # the whole table is clear before anything enters it
    start = 0
    while start < length:
        at = start + tl.arange(0, STEP)
        inside = at < length
        token = tl.load(sampling.history_tokens + first + at, mask=inside, other=0)
        slot = ((token.to(tl.uint32) * SCATTER) % size.to(tl.uint32)).to(tl.int32)
        pending = inside
        while tl.max(pending.to(tl.int32)) > 0:
            # A lane that is done compares with what no slot holds, and so changes none.
            found = tl.atomic_cas(slots + slot, tl.where(pending, -1, -2), token)
            pending = pending & (found != -1) & (found != token)
            slot = tl.where(pending, (slot + 1) % size, slot)
        tl.atomic_add(counts + slot, 1, mask=inside & (at >= prompt), sem="relaxed")
        start += STEP


@triton.jit
def penalise_kernel(logits, sampling, scratch, stride):
    """Penalises each token of a row's table once, and keeps what was there. Grid (rows,)."""
    row = tl.program_id(0)
    values = logits + row.to(tl.int64) * stride
    first = 2 * tl.load(sampling.history_offsets + row)
    end = 2 * tl.load(sampling.history_offsets + row + 1)
    repetition = tl.load(sampling.repetition + row).to(tl.float64)
    presence = tl.load(sampling.presence + row).to(tl.float64)
    frequency = tl.load(sampling.frequency + row).to(tl.float64)
    start = first
    while start < end:
        at = start + tl.arange(0, STEP)
        token = tl.load(scratch.slots + at, mask=at < end, other=-1)
        used = token >= 0
        drawn = tl.load(scratch.counts + at, mask=used, other=0)
        kept = tl.load(values + token, mask=used, other=0.0)
        tl.store(scratch.seen + at, kept, mask=used)
        value = clean(kept).to(tl.float64)
        value = tl.where(value > 0, value / repetition, value * repetition)
        less = value - (presence + frequency * drawn.to(tl.float64))
        value = tl.where(drawn > 0, less, value)
        tl.store(values + token, value.to(tl.float32), mask=used)
        start += STEP


@triton.jit
def restore_seen_kernel(logits, sampling, scratch, stride):
    """Undoes `penalise_kernel`. Grid (rows,)."""
    row = tl.program_id(0)
    values = logits + row.to(tl.int64) * stride
    start = 2 * tl.load(sampling.history_offsets + row)
    end = 2 * tl.load(sampling.history_offsets + row + 1)
    while start < end:
        at = start + tl.arange(0, STEP)
        token = tl.load(scratch.slots + at, mask=at < end, other=-1)
        kept = tl.load(scratch.seen + at, mask=token >= 0, other=0.0)
        tl.store(values + token, kept, mask=token >= 0)
        start += STEP


@triton.jit
def load_first_biases(sampling, at, first, end):
    """Tokens of the entries `at` of a row's biases, and which are their token's first."""
    token = tl.load(sampling.bias_tokens + at, mask=at < end, other=-1)
    before = tl.load(sampling.bias_tokens + at - 1, mask=(at > first) & (at < end), other=-1)
    return token, (at < end) & (token != before)


@triton.jit
def bias_kernel(logits, sampling, scratch, stride):
    """Adds each row's biases, several of one token in their order. Grid (rows,)."""
    row = tl.program_id(0)
    values = logits + row.to(tl.int64) * stride
    first = tl.load(sampling.bias_offsets + row)
    end = tl.load(sampling.bias_offsets + row + 1)
    start = first
    while start < end:
        at = start + tl.arange(0, STEP)
        token, is_first = load_first_biases(sampling, at, first, end)
        kept = tl.load(values + token, mask=is_first, other=0.0)
        tl.store(scratch.biased + at, kept, mask=is_first)
        value = clean(kept)
        entry, adding = at, is_first
        while tl.max(adding.to(tl.int32)) > 0:
            value += tl.load(sampling.bias_values + entry, mask=adding, other=0.0)
            entry += 1
            following = tl.load(sampling.bias_tokens + entry, mask=adding & (entry < end), other=-1)
            adding = adding & (following == token)
        tl.store(values + token, value, mask=is_first)
        start += STEP


@triton.jit
def restore_biased_kernel(logits, sampling, scratch, stride):
    """Undoes `bias_kernel`. Grid (rows,)."""
    row = tl.program_id(0)
    values = logits + row.to(tl.int64) * stride
    first = tl.load(sampling.bias_offsets + row)
    end = tl.load(sampling.bias_offsets + row + 1)
    start = first
    while start < end:
        at = start + tl.arange(0, STEP)
        token, is_first = load_first_biases(sampling, at, first, end)
        kept = tl.load(scratch.biased + at, mask=is_first, other=0.0)
        tl.store(values + token, kept, mask=is_first)
        start += STEP
