"""Triton kernels that multiply few rows by a large matrix, and so stream the matrix from memory.

`stream_vector` multiplies one token on the CUDA cores; `stream_tile` multiplies a tile of tokens on
the tensor cores. Both read the matrix (outputs, inputs) once, in wide loads, several tiles ahead,
and do what surrounds a product in a decoder on the way (see types.Fused): the norm of x costs no
launch because its root mean square is a factor of the result, known when the last column is read.
dense.py chooses tiles and launches.

With a gate a program's rows are gate and up in turn, so that both halves of a result meet in it.
"""

# ruff: noqa: N803 (Triton's constants are upper case)
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from twostroke.kernels.cuda.rows import activate

# Prefetch one stretch of memory a row to the second cache, by as many threads as there are rows.
PREFETCH = tl.constexpr(
    """{
    .reg .pred p;
    .reg .u32 t;
    mov.u32 t, %tid.x;
    setp.lt.u32 p, t, $2;
    @p cp.async.bulk.prefetch.L2.global [$1], $3;
    mov.u32 $0, 0;
    }"""
)


@dataclass(frozen=True, slots=True)
class Tile:
    """What a program does at a time, and how.

    rows of the matrix, columns, and tokens, powers of two; with 0 tokens it is the kernel for one
    token, on the CUDA cores. warps: of a program. stages: tiles in flight, the one in use included.
    prefetched: bytes of each row asked for before the launch before is complete; a multiple of 16.
    """

    rows: int
    columns: int
    tokens: int
    warps: int
    stages: int
    prefetched: int = 0


@dataclass(frozen=True, slots=True)
class Stream:
    """What one compiled kernel is for.

    inputs: columns of the matrix. gate: an activation (rows.py), or "". group: tiles of tokens that
    share matrix rows. overlap: see overlap.py.
    """

    tile: Tile
    inputs: int
    gate: str
    group: int
    overlap: bool

    @property
    def is_even(self) -> bool:
        """Whether tiles fill the columns."""
        return self.inputs % self.tile.columns == 0

    @property
    def width(self) -> int:
        """Outputs of a program: half its rows with a gate."""
        return self.tile.rows // 2 if self.gate else self.tile.rows

    @property
    def prefetched(self) -> int:
        """Bytes to ask for of a row: none beyond it, none where rows do not begin on 16 bytes."""
        row_bytes = 2 * self.inputs
        return min(self.tile.prefetched, row_bytes) if row_bytes % 16 == 0 else 0


@triton.jit
def begin_stream(pointers, STREAM: tl.constexpr):
    """Let the next launch start, ask for the beginning of each row, wait for the launch before.

    Weights do not depend on what ran before; everything else does (see overlap.py).
    """
    if STREAM.overlap:
        tl.extra.cuda.gdc_launch_dependents()
        if STREAM.prefetched > 0:
            tl.inline_asm_elementwise(
                PREFETCH,
                "=r,l,r,r",
                [pointers.to(tl.int64), STREAM.tile.rows, STREAM.prefetched],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )
        tl.extra.cuda.gdc_wait()


@triton.jit
def get_matrix_rows(tile, outputs, STREAM: tl.constexpr):
    """The matrix rows of a program, int64; beyond the last one it is the last one again."""
    line = tl.arange(0, STREAM.tile.rows)
    if STREAM.gate == "":
        row = tl.minimum(tile * STREAM.width + line, outputs - 1)
    else:
        row = tl.minimum(tile * STREAM.width + line // 2, outputs - 1) + line % 2 * outputs
    return row.to(tl.int64)


@triton.jit
def load_columns(pointers, inside, STREAM: tl.constexpr):
    """What lies there, 0 beyond the last column."""
    if STREAM.is_even:
        return tl.load(pointers)
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def stream_vector(places, matrix, fused, STREAM: tl.constexpr):
    """out (outputs,) = the matrix times x (inputs,): a program does some rows, column by column.

    A thread adds up eight columns of every row before it touches its sums: one wide load each.
    places: (out, x). matrix: (weights, outputs), half its rows with a gate. fused: (norm, bias,
    residual, eps), None for what is not wanted.
    """
    out, x = places
    weights, outputs = matrix
    norm, bias, residual, eps = fused
    rows: tl.constexpr = STREAM.tile.rows
    columns: tl.constexpr = STREAM.tile.columns
    tile = tl.program_id(0)
    row = get_matrix_rows(tile, outputs, STREAM)
    begin_stream(weights + row * STREAM.inputs, STREAM)
    column = tl.arange(0, columns)
    at = row[:, None] * STREAM.inputs + column[None, :]
    sums = tl.zeros((rows, columns // 8), tl.float32)
    squares = tl.zeros((columns // 8,), tl.float32)
    for start in tl.range(0, STREAM.inputs, columns, num_stages=STREAM.tile.stages):
        inside = column + start < STREAM.inputs
        w = load_columns(weights + at + start, inside[None, :], STREAM)
        v = load_columns(x + column + start, inside, STREAM).to(tl.float32)
        if norm is not None:
            squares += tl.sum(tl.reshape(v * v, (columns // 8, 8)), axis=1)
            v *= load_columns(norm + column + start, inside, STREAM).to(tl.float32)
        terms = tl.reshape(w.to(tl.float32) * v[None, :], (rows, columns // 8, 8))
        sums += tl.sum(terms, axis=2)
    result = tl.sum(sums, axis=1)
    if norm is not None:
        result *= tl.rsqrt(tl.sum(squares, axis=0) / STREAM.inputs + eps)
    if bias is not None:
        result += tl.load(bias + row).to(tl.float32)
    if STREAM.gate != "":
        activation: tl.constexpr = STREAM.gate
        gate, up = tl.split(tl.reshape(result, (rows // 2, 2)))
        result = activate(gate, activation) * up
    output = tile * STREAM.width + tl.arange(0, STREAM.width)
    if residual is not None:
        result += tl.load(residual + output, mask=output < outputs, other=0.0).to(tl.float32)
    tl.store(out + output, result.to(out.dtype.element_ty), mask=output < outputs)


@triton.jit
def get_tile(outputs, tokens, STREAM: tl.constexpr):
    """The program's tile of outputs and of tokens: a group of tiles of tokens shares matrix rows.

    Programs that run together read the same rows, so the matrix leaves memory once a group.
    """
    program = tl.program_id(0)
    row_tiles, token_tiles = tl.cdiv(outputs, STREAM.width), tl.cdiv(tokens, STREAM.tile.tokens)
    first = program // (STREAM.group * row_tiles) * STREAM.group
    size = tl.minimum(token_tiles - first, STREAM.group)
    within = program % (STREAM.group * row_tiles)
    return within // size, first + within % size


@triton.jit(do_not_specialize=["tokens"])
def stream_tile(places, tokens, matrix, fused, STREAM: tl.constexpr):
    """out (tokens, outputs) = x (tokens, inputs) times the matrix transposed, in tiles.

    The matrix is the tensor cores' first operand, so that few tokens fill the side that may be
    narrow. Sums run over the columns in order, whatever the tile: an output's bits depend on the
    instruction, whose width is that of the tile of tokens.
    places: (out, x, stride of out, stride of x). matrix: (weights, outputs), half its rows with a
    gate. fused: (norm, bias, residual, its stride, eps), None for what is not wanted.
    """
    out, x, out_stride, x_stride = places
    weights, outputs = matrix
    norm, bias, residual, residual_stride, eps = fused
    tile, token_tile = get_tile(outputs, tokens, STREAM)
    row = get_matrix_rows(tile, outputs, STREAM)
    begin_stream(weights + row * STREAM.inputs, STREAM)
    token = token_tile * STREAM.tile.tokens + tl.arange(0, STREAM.tile.tokens)
    source = (x, token.to(tl.int64) * x_stride, token < tokens, norm)
    sums, squares = add_columns(weights, row, source, STREAM)
    if norm is not None:
        sums *= tl.rsqrt(squares / STREAM.inputs + eps)[None, :]
    if bias is not None:
        sums += tl.load(bias + row).to(tl.float32)[:, None]
    if STREAM.gate != "":
        activation: tl.constexpr = STREAM.gate
        pairs = tl.reshape(sums, (sums.shape[0] // 2, 2, sums.shape[1]))
        gate, up = tl.split(tl.permute(pairs, (0, 2, 1)))
        sums = activate(gate, activation) * up
    result = tl.trans(sums)
    output = tile * STREAM.width + tl.arange(0, STREAM.width)
    inside = (token < tokens)[:, None] & (output < outputs)[None, :]
    if residual is not None:
        add_at = token.to(tl.int64)[:, None] * residual_stride + output[None, :]
        result += tl.load(residual + add_at, mask=inside, other=0.0).to(tl.float32)
    out_at = token.to(tl.int64)[:, None] * out_stride + output[None, :]
    tl.store(out + out_at, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def add_columns(weights, row, source, STREAM: tl.constexpr):
    """Sums (rows, tokens) of products, and of the squares of x (tokens,) where there is a norm.

    source: (x, where its rows begin, which of them there are, norm).
    """
    x, begin, present, norm = source
    columns: tl.constexpr = STREAM.tile.columns
    rows: tl.constexpr = STREAM.tile.rows
    tokens: tl.constexpr = STREAM.tile.tokens
    column = tl.arange(0, columns)
    at = row[:, None] * STREAM.inputs + column[None, :]
    x_at = begin[:, None] + column[None, :]
    sums = tl.zeros((rows, tokens), tl.float32)
    squares = tl.zeros((tokens, columns // 8), tl.float32)
    for start in range(0, STREAM.inputs, columns):
        inside = column + start < STREAM.inputs
        x_inside = present[:, None]
        if not STREAM.is_even:
            x_inside = x_inside & inside[None, :]
        w = load_columns(weights + at + start, inside[None, :], STREAM)
        v = tl.load(x + x_at + start, mask=x_inside, other=0.0)
        if norm is not None:
            v = v.to(tl.float32)
            squares += tl.sum(tl.reshape(v * v, (tokens, columns // 8, 8)), axis=2)
            scale = load_columns(norm + column + start, inside, STREAM).to(tl.float32)
            v = (v * scale[None, :]).to(x.dtype.element_ty)
        sums = tl.dot(w, tl.trans(v), sums)
    return sums, tl.sum(squares, axis=1)
