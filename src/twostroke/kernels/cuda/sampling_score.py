"""Log-probabilities of given tokens and the most likely ones, in two launches.

Owns both. The n best tokens of a row lie in the n groups of tokens with the best largest values, so
one pass keeps each group's largest, and only n groups are looked at again. Everything from the
softmax on is float64, added in an order that depends on the vocabulary alone.
"""

# ruff: noqa: N803 (Triton's constants are upper case)
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from twostroke.kernels.cuda.sampling_values import (
    LEAST_PACKED,
    MAX_VOCAB,
    clean,
    get_key,
    get_packed_value,
    get_token,
    pack_candidate,
    widen,
)
from twostroke.kernels.cuda.types import Tensor

GROUP = tl.constexpr(64)  # tokens of a group
PART = tl.constexpr(64)  # groups that a program looks at
MAX_WIDTH = tl.constexpr(32)  # alternatives that can be reported
# Smaller than every float64 that rounds to a finite float32.
BELOW_FLOAT32 = tl.constexpr(-3.4028235677973366e38)


class ScoredTensors(NamedTuple):
    """The answer (see ops.Drawn). logprobs (L,), top_logprobs (L, width) float32; top_tokens
    (L, width) int32."""

    logprobs: Tensor
    top_tokens: Tensor
    top_logprobs: Tensor

    @classmethod
    def allocate(cls, rows: int, width: int, device: torch.device | str) -> ScoredTensors:
        """Room for so many rows with `width` alternatives."""
        return cls(
            logprobs=torch.empty(rows, dtype=torch.float32, device=device),
            top_tokens=torch.empty((rows, width), dtype=torch.int32, device=device),
            top_logprobs=torch.empty((rows, width), dtype=torch.float32, device=device),
        )


class ScoreScratch(NamedTuple):
    """Memory of the kernels' own. groups (L, groups) float32: largest value of each. largest
    float32, masses float64 (L, parts): of each part, the sum of exp(value - largest)."""

    groups: Tensor
    largest: Tensor
    masses: Tensor

    @classmethod
    def allocate(cls, rows: int, vocab: int, device: torch.device | str) -> ScoreScratch:
        """Scratch for up to so many rows."""
        parts = triton.cdiv(vocab, GROUP.value * PART.value)
        return cls(
            groups=torch.empty((rows, parts * PART.value), dtype=torch.float32, device=device),
            largest=torch.empty((rows, parts), dtype=torch.float32, device=device),
            masses=torch.empty((rows, parts), dtype=torch.float64, device=device),
        )

    @property
    def bytes(self) -> int:
        """Bytes it takes."""
        return sum(each.numel() * each.element_size() for each in self)


def score(
    answer: ScoredTensors, logits: Tensor, targets: Tensor, top: Tensor, scratch: ScoreScratch
) -> None:
    """Write the log-probability of each row's target and its `top` most likely tokens.

    answer: its width is at least the largest of `top` (L,) int32, or all of the vocabulary.
    logits (L, vocab) float32, rows of any stride. targets (L,) int32, each in the vocabulary.
    """
    rows, vocab = logits.shape
    width = answer.top_tokens.shape[1]
    assert targets.shape == top.shape == (rows,)
    assert logits.stride(1) == 1
    assert 0 < vocab <= MAX_VOCAB
    assert width <= MAX_WIDTH.value
    parts = scratch.largest.shape[1]
    assert parts == triton.cdiv(vocab, GROUP.value * PART.value)
    if not rows:
        return
    stride = logits.stride(0)
    summarise_kernel[(rows, parts)](logits, top, scratch, stride, vocab)
    score_kernel[(rows,)](
        (*answer, targets, top),
        logits,
        scratch,
        (stride, vocab, width, parts),
        GROUPS=triton.next_power_of_2(parts * PART.value),
        num_warps=8,
    )


@triton.jit
def summarise_kernel(logits, top, scratch, stride, vocab):
    """Largest values of a part's groups, and the part's mass. Grid (rows, parts)."""
    row, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    if tl.load(top + row) >= 0:
        groups = part * PART + tl.arange(0, PART)
        at = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        values = logits + row.to(tl.int64) * stride
        x = clean(tl.load(values + at, mask=at < vocab, other=float("-inf")))
        best = tl.max(x, 1)
        tl.store(scratch.groups + row * parts * PART + groups, best)
        largest = tl.max(best)
        tl.store(scratch.largest + row * parts + part, largest)
        mass = tl.sum(tl.sum(tl.exp(widen(x) - widen(largest)), 1))
        tl.store(scratch.masses + row * parts + part, mass)


@triton.jit
def get_logprob(x, largest, log_mass):
    """Log-probability of clean x in float32, -inf below what that holds."""
    result = widen(x) - widen(largest) - log_mass
    lost = (result < BELOW_FLOAT32) | (largest == float("-inf"))
    return tl.where(lost, float("-inf"), result).to(tl.float32)


@triton.jit
def find_best_groups(groups, number, count, GROUPS: tl.constexpr):
    """The `count` groups of the largest values, ties by smaller index: (MAX_WIDTH,), -1 beyond."""
    at = tl.arange(0, GROUPS)
    best = tl.load(groups + at, mask=at < number, other=float("-inf"))
    packed = tl.where(at < number, pack_candidate(get_key(best), at), LEAST_PACKED)
    columns = tl.arange(0, MAX_WIDTH)
    picked = tl.full((MAX_WIDTH,), -1, tl.int32)
    column = 0
    while column < count:
        first = tl.max(packed)
        index = tl.where(first > LEAST_PACKED, get_token(first), -1)
        picked = tl.where(columns == column, index, picked)
        packed = tl.where(packed == first, LEAST_PACKED, packed)
        column += 1
    return picked


@triton.jit
def score_kernel(answer, logits, scratch, sizes, GROUPS: tl.constexpr):
    """One row's target and most likely tokens. Grid (rows,)."""
    logprobs, top_tokens, top_logprobs, targets, top = answer
    stride, vocab, width, parts = sizes
    row = tl.program_id(0)
    columns = tl.arange(0, MAX_WIDTH)
    tl.store(top_tokens + row * width + columns, -1, mask=columns < width)
    tl.store(top_logprobs + row * width + columns, float("nan"), mask=columns < width)
    tl.store(logprobs + row, float("nan"))
    count = tl.load(top + row)
    if count >= 0:
        part = tl.arange(0, GROUPS // PART)
        inside = part < parts
        most = tl.load(scratch.largest + row * parts + part, mask=inside, other=float("-inf"))
        mass = tl.load(scratch.masses + row * parts + part, mask=inside, other=0.0)
        largest = tl.max(most)
        log_mass = tl.log(tl.sum(mass * tl.exp(widen(most) - widen(largest))))
        values = logits + row.to(tl.int64) * stride
        target = clean(tl.load(values + tl.load(targets + row)))
        tl.store(logprobs + row, get_logprob(target, largest, log_mass))
        count = tl.minimum(count, width)
        number = tl.cdiv(vocab, GROUP)
        groups = scratch.groups + row * parts * PART
        picked = find_best_groups(groups, number, count, GROUPS)
        at = picked[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        member = (picked >= 0)[:, None] & (at < vocab)
        x = clean(tl.load(values + at, mask=member, other=float("-inf")))
        packed = tl.where(member, pack_candidate(get_key(x), at), LEAST_PACKED)
        tl.debug_barrier()  # the -1 and NaN above are written before what replaces them
        column = 0
        while column < count:
            first = tl.max(packed)
            if first > LEAST_PACKED:
                logprob = get_logprob(get_packed_value(first), largest, log_mass)
                tl.store(top_tokens + row * width + column, get_token(first))
                tl.store(top_logprobs + row * width + column, logprob)
            packed = tl.where(packed == first, LEAST_PACKED, packed)
            column += 1
