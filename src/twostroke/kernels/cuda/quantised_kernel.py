"""The product of activations and a quantised matrix: one Triton kernel for every number of rows.

A program computes `rows` outputs of `columns` tokens. Weights are the left operand of the tensor
core, tokens the right one, so few tokens waste its narrow side. With very few, that side is filled
by slices of the inputs instead of by padding: the left operand is (slices, rows) tall, each slice
with blocks of its own, the right one (columns, slices) wide; of the products only those of equal
slices are wanted, and their sum over the slices is the result. So a program shares its inputs out
among its warps and needs no other program.

    step 0          step 1          step 2           one row of weights; a cell is `unroll` blocks
    [s0|s1|s2|s3]   [s0|s1|s2|s3]   [s0|s1|s2|s3]    of the layout (quantised_layout.py)

Scales multiply the sum of a group's products in float32 or, where there are many tokens or
minimums, the weights before they are multiplied. Sums run in a fixed order whatever the number of
tokens; programs that share the inputs (`parts`) add up in order too, in whichever comes last.
"""

# ruff: noqa: N803, N806, RUF059 (Triton's constants are upper case; tuples are taken apart whole)
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from twostroke.kernels.cuda.quantised_layout import Layout
from twostroke.kernels.cuda.quantised_unpack import scale_weights, take_scales, unpack
from twostroke.kernels.cuda.rows import activate

# Inputs of a piece of a block: words of a row of a tile (64 bytes), and the depth of a product.
DEPTH = tl.constexpr(32)


@dataclass(frozen=True, slots=True)
class Tiles:
    """What one compiled kernel is for: the matrix's kind, and the shape of its tiles.

    gate: activation of a gated product, or "". even: the inputs fill whole steps. slices, rows,
    columns, parts: see above. stages: tiles in flight. scale_weights: scales multiply weights
    instead of sums. prefetch: cells of each slice that a program asks for before it waits for the
    launch before it. asm: not in the interpreter. overlap: see overlap.py.
    """

    layout: Layout
    gate: str
    even: bool
    slices: int
    rows: int
    columns: int
    parts: int
    stages: int
    scale_weights: bool
    prefetch: int
    asm: bool
    overlap: bool

    @property
    def height(self) -> int:
        """Rows of the left operand."""
        return self.slices * self.rows

    @property
    def width(self) -> int:
        """Columns of the right operand."""
        return self.columns * self.slices

    @property
    def cell(self) -> int:
        """Inputs of a cell."""
        return self.layout.cell


@triton.jit(do_not_specialize=["tokens"])
def multiply(places, tokens, matrix, fused, work, TILES: tl.constexpr):
    """out = x @ matrix.T with all that Fused asks for; grid (token tiles, row tiles, parts).

    places: (out, x, stride of out, stride of x). matrix: (packed, scales, minimums or None,
    outputs, inputs). fused: (norm, bias, residual, its stride, eps), None for what is not wanted.
    work: (partials, counters), or (None, None) of one part.
    """
    out, x, out_stride, x_stride = places
    token_tile, tile, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = token_tile * TILES.columns
    steps = tl.cdiv(matrix[4], TILES.cell * TILES.slices)
    share = tl.cdiv(steps, TILES.parts)
    span = (part * share, tl.minimum(part * share + share, steps))
    if TILES.overlap:
        tl.extra.cuda.gdc_launch_dependents()
        if TILES.prefetch > 0:
            prefetch(matrix, tile, span[0], TILES)
    source = (x + first.to(tl.int64) * x_stride, x_stride, tokens - first, fused[0])
    total, squares = accumulate(source, matrix, tile, span, TILES)
    total, squares = fold(total, squares, TILES)
    target = (out, out_stride, first, tokens, tile)
    if TILES.parts == 1:
        finish(target, total, squares, matrix, fused, TILES)
    else:
        slot = token_tile * tl.num_programs(1) + tile
        if put_part(work, slot, total, squares, TILES):
            total, squares = sum_parts(work, slot, TILES)
            finish(target, total, squares, matrix, fused, TILES)


@triton.jit
def find_rows(local, tile, outputs, TILES: tl.constexpr):
    """Rows of the matrix that are rows `local` of a program's tile; the last one instead of those
    beyond. With a gate, half of a tile are of the gate, and half their counterparts of up."""
    if TILES.gate == "":
        found = tl.minimum(tile * TILES.rows + local, outputs - 1)
    else:
        half: tl.constexpr = TILES.rows // 2
        width = outputs // 2
        found = tl.minimum(tile * half + local % half, width - 1) + local // half * width
    return found


@triton.jit
def load(at, inside, EVEN: tl.constexpr):
    """What lies at these places, 0 where not inside; EVEN: all are."""
    return tl.load(at) if EVEN else tl.load(at, mask=inside, other=0)


@triton.jit
def prefetch(matrix, tile, begin, TILES: tl.constexpr):
    """Ask for what a program reads in its first steps to come to the second cache.

    Weights do not depend on the launches before this one, so this is done before waiting for them.
    """
    packed, scales, minimums, outputs, inputs = matrix
    RUNS: tl.constexpr = 1 if TILES.gate == "" else 2
    ROWS: tl.constexpr = TILES.rows // RUNS
    CELLS: tl.constexpr = TILES.prefetch * TILES.slices
    width = outputs // RUNS
    last = tl.cdiv(inputs, TILES.cell) - 1
    row = tl.minimum(tile * ROWS, width - ROWS)
    BLOCKS: tl.constexpr = CELLS * TILES.layout.unroll
    at = tl.arange(0, BLOCKS * RUNS)
    cell = tl.minimum(begin * TILES.slices + at // RUNS // TILES.layout.unroll, last)
    block = cell * TILES.layout.unroll + at // RUNS % TILES.layout.unroll
    ask_for(packed + (block * outputs + at % RUNS * width + row) * DEPTH, ROWS * 2 * DEPTH)
    PAIRS: tl.constexpr = CELLS * TILES.layout.pairs
    at = tl.arange(0, PAIRS * RUNS)
    cell = tl.minimum(begin * TILES.slices + at // RUNS // TILES.layout.pairs, last)
    pair = cell * TILES.layout.pairs + at // RUNS % TILES.layout.pairs
    ask_for(scales + pair * outputs + at % RUNS * width + row, ROWS * 4)
    if minimums is not None:
        ask_for(minimums + pair * outputs + at % RUNS * width + row, ROWS * 4)


@triton.jit
def ask_for(places, BYTES: tl.constexpr):
    """Ask for the BYTES from each of these places on, a sector of 32 bytes at a time."""
    sectors = places.to(tl.int64)[:, None] + 32 * tl.arange(0, BYTES // 32)[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [sectors],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def get_bound(x, ASM: tl.constexpr):
    """x as the bound of a loop: the interpreter wants a number there and has an array of one."""
    return x if ASM else x.handle.data.item()


@triton.jit
def accumulate(source, matrix, tile, span, TILES: tl.constexpr):
    """Sums over the inputs of steps span[0] … span[1] - 1: (height, width), float32.

    source: (x, its stride, rows left of it, norm or None). Second: squares of x, (DEPTH, width),
    summed over the steps; zeros without a norm.
    """
    HEIGHT: tl.constexpr = TILES.height
    WIDTH: tl.constexpr = TILES.width
    packed, scales, minimums, outputs, inputs = matrix
    row = find_rows(tl.arange(0, TILES.height) % TILES.rows, tile, outputs, TILES)
    cell = span[0] * TILES.slices + tl.arange(0, TILES.height) // TILES.rows
    words_at = packed + cell[:, None] * (outputs * DEPTH * TILES.layout.unroll)
    words_at += row[:, None] * DEPTH + tl.arange(0, DEPTH)[None, :]
    pairs_at = cell * (outputs * TILES.layout.pairs) + row
    column = tl.arange(0, TILES.width)
    input_at = (span[0] * TILES.slices + column % TILES.slices)[None, :] * TILES.cell
    input_at += tl.arange(0, DEPTH)[:, None]
    x_at = source[0] + (column // TILES.slices)[None, :] * source[1]
    is_live = (column // TILES.slices < source[2])[None, :]
    total = tl.zeros([HEIGHT, WIDTH], tl.float32)
    squares = tl.zeros([DEPTH, WIDTH], tl.float32)
    if TILES.overlap:
        tl.extra.cuda.gdc_wait()
    begin, end = get_bound(span[0], TILES.asm), get_bound(span[1], TILES.asm)
    for _ in tl.range(begin, end, num_stages=TILES.stages):
        weights_at = (words_at, pairs_at, cell * TILES.cell < inputs)
        inputs_at = (x_at, input_at, is_live, source[3])
        total, squares = add_cell(total, squares, weights_at, inputs_at, matrix, TILES)
        words_at += outputs * (TILES.slices * TILES.layout.unroll * DEPTH)
        pairs_at += outputs * (TILES.slices * TILES.layout.pairs)
        input_at += TILES.slices * TILES.cell
        cell += TILES.slices
    return total, squares


@triton.jit
def add_cell(total, squares, weights_at, inputs_at, matrix, TILES: tl.constexpr):
    """total and squares with what one cell adds to them, piece by piece."""
    words_at, pairs_at, inside = weights_at
    packed, scales, minimums, outputs, inputs = matrix
    words = load(words_at, inside[:, None], TILES.even)
    pairs = load_pairs(matrix, pairs_at, inside, TILES.even)
    sums = (total, tl.zeros_like(total), tl.zeros_like(total))
    for piece in tl.static_range(TILES.layout.pieces * TILES.layout.unroll):
        if piece > 0 and piece % TILES.layout.pieces == 0:
            words_at += outputs * DEPTH
            words = load(words_at, inside[:, None], TILES.even)
        if piece > 0 and piece * DEPTH % (2 * TILES.layout.group) == 0:
            pairs_at += outputs
            pairs = load_pairs(matrix, pairs_at, inside, TILES.even)
        right, squares = load_inputs(inputs_at, piece * DEPTH, inputs, squares, TILES)
        sums = add_piece(sums, (words, pairs), right, piece, TILES)
    return sums[0], squares


@triton.jit
def load_pairs(matrix, at, inside, EVEN: tl.constexpr):
    """Scales and minimums (without any: the scales again) of two groups of each row."""
    packed, scales, minimums, outputs, inputs = matrix
    scale_pairs = load(scales + at, inside, EVEN)
    minimum_pairs = scale_pairs
    if minimums is not None:
        minimum_pairs = load(minimums + at, inside, EVEN)
    return scale_pairs, minimum_pairs


@triton.jit
def load_inputs(inputs_at, offset, inputs, squares, TILES: tl.constexpr):
    """Inputs offset … offset + 31 of each column's cell, weighed by the norm: (DEPTH, width)."""
    x_at, input_at, is_live, norm = inputs_at
    at = input_at + offset
    inside = at < inputs
    right = tl.load(x_at + at, mask=is_live if TILES.even else is_live & inside, other=0.0)
    if norm is not None:
        weight = load(norm + at, inside, TILES.even)
        squares += right.to(tl.float32) * right.to(tl.float32)
        right = (right.to(tl.float32) * weight.to(tl.float32)).to(right.dtype)
    return right, squares


@triton.jit
def add_piece(sums, left, right, PIECE: tl.constexpr, TILES: tl.constexpr):
    """The sums with the products of a piece.

    sums: (total, and of the group that is being summed: integers times inputs, and inputs).
    left: (words, pairs of scales and minimums). right (DEPTH, width): inputs.
    """
    total, products, plain = sums
    words, pairs = left
    at: tl.constexpr = PIECE * DEPTH
    group: tl.constexpr = TILES.layout.group
    piece: tl.constexpr = PIECE % TILES.layout.pieces
    dtype: tl.constexpr = right.dtype
    weights = unpack(words, piece, TILES.layout.bits, TILES.layout.zero, dtype, TILES.asm)
    scales = take_scales(pairs[0], at, group)
    if not TILES.asm:
        right = right.to(tl.float32)
    if TILES.scale_weights:
        minimums = take_scales(pairs[1], at, group) if TILES.layout.minimums else None
        weights = scale_weights(weights, scales, minimums, dtype, TILES.asm)
        total = tl.dot(weights, right, total)
    else:
        products = tl.dot(weights, right, products)
        if TILES.layout.minimums:
            # A matrix of ones puts the sum of the inputs where the sums of products are.
            plain = tl.dot(tl.full(weights.shape, 1.0, weights.dtype), right, plain)
        if (at + DEPTH) % group == 0:
            total += scales * products
            products = tl.zeros_like(products)
            if TILES.layout.minimums:
                total += take_scales(pairs[1], at, group) * plain
                plain = tl.zeros_like(plain)
    return total, products, plain


@triton.jit
def fold(total, squares, TILES: tl.constexpr):
    """Sums over the slices: total (rows, columns) and squares (columns,)."""
    SLICES: tl.constexpr = TILES.slices
    ROWS: tl.constexpr = TILES.rows
    COLUMNS: tl.constexpr = TILES.columns
    squares = tl.sum(squares, axis=0)
    if SLICES > 1:
        slice_of_row = (tl.arange(0, SLICES * ROWS) // ROWS)[:, None]
        slice_of_column = (tl.arange(0, COLUMNS * SLICES) % SLICES)[None, :]
        total = tl.where(slice_of_row == slice_of_column, total, 0.0)
        total = tl.reshape(total, (SLICES, ROWS, COLUMNS, SLICES))
        total = tl.sum(tl.sum(total, axis=3), axis=0)
        squares = tl.sum(tl.reshape(squares, (COLUMNS, SLICES)), axis=1)
    return total, squares


@triton.jit
def put_part(work, slot, total, squares, TILES: tl.constexpr):
    """Store a program's sums, and whether all parts of its tile have been stored."""
    partials, counters = work
    at = partials + (slot * TILES.parts + tl.program_id(2)) * ((TILES.rows + 1) * TILES.columns)
    column = tl.arange(0, TILES.columns)
    tl.store(at + column, squares)
    rows = tl.arange(1, TILES.rows + 1)[:, None] * TILES.columns
    tl.store(at + rows + column[None, :], total)
    tl.debug_barrier()
    return tl.atomic_add(counters + slot, 1, sem="acq_rel") == TILES.parts - 1


@triton.jit
def sum_parts(work, slot, TILES: tl.constexpr):
    """The sums of all parts, in order; the counter is made ready for the next launch."""
    ROWS: tl.constexpr = TILES.rows
    COLUMNS: tl.constexpr = TILES.columns
    PARTS: tl.constexpr = TILES.parts
    partials, counters = work
    tl.store(counters + slot, 0)
    at = partials + slot * (PARTS * (ROWS + 1) * COLUMNS)
    column = tl.arange(0, COLUMNS)
    rows = (tl.arange(0, ROWS) + 1)[:, None] * COLUMNS
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    squares = tl.zeros([COLUMNS], tl.float32)
    for _ in tl.static_range(PARTS):
        squares += tl.load(at + column, cache_modifier=".cg")
        total += tl.load(at + rows + column[None, :], cache_modifier=".cg")
        at += (ROWS + 1) * COLUMNS
    return total, squares


@triton.jit
def finish(target, total, squares, matrix, fused, TILES: tl.constexpr):
    """Store what the sums become: normed, with a bias, gated, with a residual.

    target: (out, its stride, first token, tokens, row tile).
    """
    out, out_stride, first, tokens, tile = target
    norm, bias, residual, residual_stride, eps = fused
    outputs, inputs = matrix[3], matrix[4]
    HALF: tl.constexpr = TILES.rows // 2
    COLUMNS: tl.constexpr = TILES.columns
    GATE: tl.constexpr = TILES.gate
    token = first + tl.arange(0, COLUMNS)
    if norm is not None:
        total *= tl.rsqrt(squares / inputs + eps)[None, :]
    if bias is not None:
        row = find_rows(tl.arange(0, TILES.rows), tile, outputs, TILES)
        total += tl.load(bias + row).to(tl.float32)[:, None]
    if GATE == "":
        width = outputs
        row = tile * TILES.rows + tl.arange(0, TILES.rows)
    else:
        width = outputs // 2
        row = tile * HALF + tl.arange(0, HALF)
        gate, up = tl.split(tl.permute(tl.reshape(total, (2, HALF, COLUMNS)), (1, 2, 0)))
        total = activate(gate, GATE) * up
    inside = (row < width)[:, None] & (token < tokens)[None, :]
    if residual is not None:
        at = residual + token.to(tl.int64)[None, :] * residual_stride + row[:, None]
        total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    at = out + token.to(tl.int64)[None, :] * out_stride + row[:, None]
    tl.store(at, total.to(out.dtype.element_ty), mask=inside)
