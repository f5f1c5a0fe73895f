"""Weights back from a quantised matrix: a block of rows for a dense product, or rows of a table."""

# ruff: noqa: N803, N806 (Triton's constants are upper case; tuples are taken apart whole)
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from twostroke.kernels.cuda.overlap import begin_overlapped
from twostroke.kernels.cuda.quantised_unpack import take_half, take_scales, unpack

DEPTH = tl.constexpr(32)


@triton.jit
def write_rows(out, matrix, span, LAYOUT: tl.constexpr, ROWS: tl.constexpr, ASM: tl.constexpr):
    """out (rows, inputs) = rows span[0] … span[1] - 1 of the matrix, rounded once.

    matrix: (packed, scales, minimums or None, outputs, inputs). Grid (row tiles, cells).
    """
    packed, scales, minimums, outputs, inputs = matrix
    begin, end = span
    DTYPE: tl.constexpr = out.dtype.element_ty
    local = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(begin + local, end - 1)
    cell = tl.program_id(1)
    at = tl.arange(0, DEPTH)
    pairs_at = cell * (outputs * LAYOUT.pairs) + row
    words_at = cell * (outputs * LAYOUT.unroll * DEPTH) + row[:, None] * DEPTH + at[None, :]
    out_at = out + local.to(tl.int64)[:, None] * inputs + at[None, :]
    for piece in tl.static_range(LAYOUT.pieces * LAYOUT.unroll):
        if piece % LAYOUT.pieces == 0:
            words = tl.load(packed + words_at + piece // LAYOUT.pieces * outputs * DEPTH)
        if piece * DEPTH % (2 * LAYOUT.group) == 0:
            offset = piece * DEPTH // (2 * LAYOUT.group) * outputs
            pairs = tl.load(scales + pairs_at + offset)
            if minimums is not None:
                minimum_pairs = tl.load(minimums + pairs_at + offset)
        weights = unpack(words, piece % LAYOUT.pieces, LAYOUT.bits, LAYOUT.zero, DTYPE, ASM)
        weights = weights.to(tl.float32) * take_scales(pairs, piece * DEPTH, LAYOUT.group)
        if minimums is not None:
            weights += take_scales(minimum_pairs, piece * DEPTH, LAYOUT.group)
        column = cell * LAYOUT.cell + piece * DEPTH
        inside = (begin + local < end)[:, None] & (column + at < inputs)[None, :]
        tl.store(out_at + column, weights.to(DTYPE), mask=inside)


@triton.jit
def gather_rows(
    places, matrix, scale, LAYOUT: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):
    """Row tokens[i] of the matrix, times scale, becomes row i of out. Grid (tokens, pieces).

    places: (out, its stride, tokens).
    """
    begin_overlapped(OVERLAP)
    out, out_stride, tokens = places
    packed, scales, minimums, outputs, inputs = matrix
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < inputs
    row = tl.load(tokens + tl.program_id(0))
    words_at = (column // LAYOUT.block * outputs + row) * DEPTH + column % DEPTH
    words = tl.load(packed + words_at, mask=inside, other=0).to(tl.int32)
    piece = column % LAYOUT.block // DEPTH
    integers = (words >> (piece * LAYOUT.bits)) & ((1 << LAYOUT.bits) - 1)
    values = (integers - (LAYOUT.zero + LAYOUT.offset)).to(tl.float32)
    group = column // LAYOUT.group
    pair_at = group // 2 * outputs + row
    values *= take_group(tl.load(scales + pair_at, mask=inside, other=0), group)
    if minimums is not None:
        values += take_group(tl.load(minimums + pair_at, mask=inside, other=0), group)
    at = out + tl.program_id(0).to(tl.int64) * out_stride + column
    tl.store(at, (values * scale).to(out.dtype.element_ty), mask=inside)


@triton.jit
def take_group(pairs, group):
    """The half of each pair that is the group's, as float32."""
    return tl.where(group % 2 == 1, take_half(pairs, 1), take_half(pairs, 0))
