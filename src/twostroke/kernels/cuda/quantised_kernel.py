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
    instead of sums. asm: not in the interpreter.
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
    asm: bool

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
    outputs, inputs). fused: (bias, residual, its stride), None for what is not wanted.
    work: (partials, counters), or (None, None) of one part.
    """
    out, x, out_stride, x_stride = places
    token_tile, tile, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = token_tile * TILES.columns
    steps = tl.cdiv(matrix[4], TILES.cell * TILES.slices)
    share = tl.cdiv(steps, TILES.parts)
    span = (part * share, tl.minimum(part * share + share, steps))
    source = (x + first.to(tl.int64) * x_stride, x_stride, tokens - first)
    total = fold(accumulate(source, matrix, tile, span, TILES), TILES)
    target = (out, out_stride, first, tokens, tile)
    if TILES.parts == 1:
        finish(target, total, matrix, fused, TILES)
    else:
        slot = token_tile * tl.num_programs(1) + tile
        if put_part(work, slot, total, TILES):
            finish(target, sum_parts(work, slot, TILES), matrix, fused, TILES)


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
def get_bound(x, ASM: tl.constexpr):
    """x as the bound of a loop: the interpreter wants a number there and has an array of one."""
    return x if ASM else x.handle.data.item()


@triton.jit
def accumulate(source, matrix, tile, span, TILES: tl.constexpr):
    """Sums over the inputs of steps span[0] … span[1] - 1: (height, width), float32.

    source: (x, its stride, rows left of it).
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
    begin, end = get_bound(span[0], TILES.asm), get_bound(span[1], TILES.asm)
    for _ in tl.range(begin, end, num_stages=TILES.stages):
        weights_at = (words_at, pairs_at, cell * TILES.cell < inputs)
        total = add_cell(total, weights_at, (x_at, input_at, is_live), matrix, TILES)
        words_at += outputs * (TILES.slices * TILES.layout.unroll * DEPTH)
        pairs_at += outputs * (TILES.slices * TILES.layout.pairs)
        input_at += TILES.slices * TILES.cell
        cell += TILES.slices
    return total


@triton.jit
def add_cell(total, weights_at, inputs_at, matrix, TILES: tl.constexpr):
    """The sums with what one cell adds to them, piece by piece."""
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
        right = load_inputs(inputs_at, piece * DEPTH, inputs, TILES)
        sums = add_piece(sums, (words, pairs), right, piece, TILES)
    return sums[0]


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
def load_inputs(inputs_at, offset, inputs, TILES: tl.constexpr):
    """Inputs offset … offset + 31 of each column's cell: (DEPTH, width)."""
    x_at, input_at, is_live = inputs_at
    at = input_at + offset
    return tl.load(x_at + at, mask=is_live if TILES.even else is_live & (at < inputs), other=0.0)


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
def fold(total, TILES: tl.constexpr):
    """Sums over the slices: (rows, columns)."""
    SLICES: tl.constexpr = TILES.slices
    ROWS: tl.constexpr = TILES.rows
    COLUMNS: tl.constexpr = TILES.columns
    if SLICES > 1:
        slice_of_row = (tl.arange(0, SLICES * ROWS) // ROWS)[:, None]
        slice_of_column = (tl.arange(0, COLUMNS * SLICES) % SLICES)[None, :]
        total = tl.where(slice_of_row == slice_of_column, total, 0.0)
        total = tl.reshape(total, (SLICES, ROWS, COLUMNS, SLICES))
        total = tl.sum(tl.sum(total, axis=3), axis=0)
    return total


@triton.jit
def put_part(work, slot, total, TILES: tl.constexpr):
    """Store a program's sums, and whether all parts of its tile have been stored."""
    partials, counters = work
    at = partials + (slot * TILES.parts + tl.program_id(2)) * (TILES.rows * TILES.columns)
    rows = tl.arange(0, TILES.rows)[:, None] * TILES.columns
    tl.store(at + rows + tl.arange(0, TILES.columns)[None, :], total)
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
    at = partials + slot * (PARTS * ROWS * COLUMNS)
    at += tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for _ in tl.static_range(PARTS):
        total += tl.load(at, cache_modifier=".cg")
        at += ROWS * COLUMNS
    return total


@triton.jit
def finish(target, total, matrix, fused, TILES: tl.constexpr):
    """Store what the sums become: with a bias, gated, with a residual.

    target: (out, its stride, first token, tokens, row tile).
    """
    out, out_stride, first, tokens, tile = target
    bias, residual, residual_stride = fused
    outputs = matrix[3]
    HALF: tl.constexpr = TILES.rows // 2
    COLUMNS: tl.constexpr = TILES.columns
    GATE: tl.constexpr = TILES.gate
    token = first + tl.arange(0, COLUMNS)
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
