"""Drawing tokens and scoring them on a GPU, answering what kernels/reference/sampling.py answers.

Owns the launches and their sizes. Nothing here waits for the device or reads from it, so all of it
can be captured in a graph. Logits are (L, vocab) float32 with rows of any stride. Where penalties
or biases are wanted the logits are changed in place and put back after the draw, bit for bit.

Results do not depend on how a row is divided, on the other rows, or on the order in which programs
run: sums are of integers (see sampling_values.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from twostroke.kernels.cuda.sampling_adjust import AdjustScratch, adjust, restore
from twostroke.kernels.cuda.sampling_search import search_kernel
from twostroke.kernels.cuda.sampling_tensors import (
    SamplingCounts,
    SamplingMode,
    SamplingTensors,
)
from twostroke.kernels.cuda.sampling_values import MAX_VOCAB
from twostroke.kernels.cuda.sampling_weigh import (
    BLOCK,
    MAX_PARTS,
    WEIGHED,
    DrawScratch,
    pick_kernel,
    prepare_kernel,
    scan_kernel,
    weigh_kernel,
)
from twostroke.kernels.cuda.types import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class SamplingScratch:
    """Memory of the kernels' own, for draws and for their penalties and biases."""

    draw: DrawScratch
    adjust: AdjustScratch

    @classmethod
    def allocate(cls, counts: SamplingCounts, device: torch.device | str) -> SamplingScratch:
        """Scratch for up to so many rows, biases and history tokens."""
        return cls(
            DrawScratch.allocate(counts.rows, device),
            AdjustScratch.allocate(counts.history, counts.biases, device),
        )

    @property
    def bytes(self) -> int:
        """Bytes it takes."""
        return self.draw.bytes + self.adjust.bytes


@dataclass(frozen=True, slots=True)
class DrawChoice:
    """How draws are launched; no result depends on it.

    programs: that a pass over all rows is divided into, about; enough to fill the largest GPUs.
    scan_warps, weigh_warps, search_warps: of a program of each kernel.
    """

    programs: int = 2048
    scan_warps: int = 4
    weigh_warps: int = 8
    search_warps: int = 8


CHOICE = DrawChoice()


def draw_greedy(
    tokens: Tensor, logits: Tensor, scratch: DrawScratch, choice: DrawChoice = CHOICE
) -> None:
    """Write each row's largest logit's id, the smallest of equal ones, to tokens (L,) int32.

    NaN counts as -inf; a row of nothing else draws 0.
    """
    rows = _check(tokens, logits)
    if rows:
        parts = _scan(logits, scratch.best, None, choice)
        pick_kernel[(rows,)](tokens, scratch.best, parts, num_warps=1)


def draw(
    tokens: Tensor,
    logits: Tensor,
    sampling: SamplingTensors,
    mode: SamplingMode,
    scratch: SamplingScratch,
    choice: DrawChoice = CHOICE,
) -> None:
    """Draw one token per row into tokens (L,) int32, as `sampling` says for each row.

    mode: of the same arrays. scratch: for at least L rows, and for `sampling`'s history and biases
    where `mode.adjusts`.
    """
    rows = _check(tokens, logits)
    if not rows:
        return
    if mode.adjusts:
        adjust(logits, sampling, scratch.adjust)
    if mode.is_greedy:
        draw_greedy(tokens, logits, scratch.draw, choice)
    else:
        own, stride, vocab = scratch.draw, logits.stride(0), logits.shape[1]
        parts = _scan(logits, own.best, own.lowest, choice)
        prepare_kernel[(rows,)](tokens, sampling, own, parts)
        chunk, parts = divide_row(rows, vocab, WEIGHED.value, choice.programs)
        warps = choice.weigh_warps
        weigh_kernel[(rows, parts)](logits, own, stride, vocab, chunk, num_warps=warps)
        warps = choice.search_warps
        search_kernel[(rows,)](tokens, logits, sampling, own, stride, vocab, num_warps=warps)
    if mode.adjusts:
        restore(logits, sampling, scratch.adjust)


def _scan(logits: Tensor, best: Tensor, lowest: Tensor | None, choice: DrawChoice) -> int:
    """Queues the pass for the largest values; returns how many parts a row was divided into."""
    rows, vocab = logits.shape
    chunk, parts = divide_row(rows, vocab, BLOCK.value, choice.programs)
    stride, warps = logits.stride(0), choice.scan_warps
    scan_kernel[(rows, parts)](best, lowest, logits, stride, vocab, chunk, num_warps=warps)
    return parts


def divide_row(rows: int, vocab: int, block: int, programs: int) -> tuple[int, int]:
    """Logits of a part, a multiple of `block`, and how many parts a row has."""
    wanted = max(1, min(MAX_PARTS.value, programs // rows))
    chunk = block * triton.cdiv(triton.cdiv(vocab, wanted), block)
    return chunk, triton.cdiv(vocab, chunk)


def _check(tokens: Tensor, logits: Tensor) -> int:
    """The number of rows."""
    rows, vocab = logits.shape
    assert tokens.shape == (rows,)
    assert logits.stride(1) == 1
    assert 0 < vocab <= MAX_VOCAB
    return int(rows)
