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


@triton.jit
def begin_stream(pointers, ROWS: tl.constexpr, BYTES: tl.constexpr, OVERLAP: tl.constexpr):
    """Let the next launch start, ask for the first BYTES of each row, wait for the launch before.

    Weights do not depend on what ran before; everything else does (see overlap.py).
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        if BYTES > 0:
            tl.inline_asm_elementwise(
                PREFETCH,
                "=r,l,r,r",
                [pointers.to(tl.int64), ROWS, BYTES],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )
        tl.extra.cuda.gdc_wait()


@triton.jit
def get_matrix_rows(tile, outputs, ROWS: tl.constexpr, GATED: tl.constexpr):
    """The matrix rows of a program, int64; beyond the last one it is the last one again."""
    line = tl.arange(0, ROWS)
    if GATED:
        row = tl.minimum(tile * (ROWS // 2) + line // 2, outputs - 1) + line % 2 * outputs
    else:
        row = tl.minimum(tile * ROWS + line, outputs - 1)
    return row.to(tl.int64)


@triton.jit
def stream_vector(
    out,
    x,
    weights,
    norm,
    bias,
    residual,
    outputs,
    eps,
    INPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    NORMED: tl.constexpr,
    BIASED: tl.constexpr,
    GATE: tl.constexpr,
    ADDED: tl.constexpr,
    AHEAD: tl.constexpr,
    PREFETCHED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """out (outputs,) = weights times x (inputs,): a program does ROWS rows, COLUMNS at a time.

    A thread adds up eight columns of every row before it touches its sums: one wide load each.
    AHEAD: tiles in flight through shared memory; with 1 they go straight to registers.
    """
    even: tl.constexpr = INPUTS % COLUMNS == 0
    tile = tl.program_id(0)
    gated: tl.constexpr = GATE != ""
    row = get_matrix_rows(tile, outputs, ROWS, gated)
    begin_stream(weights + row * INPUTS, ROWS, PREFETCHED, OVERLAP)
    column = tl.arange(0, COLUMNS)
    at = row[:, None] * INPUTS + column[None, :]
    sums = tl.zeros((ROWS, COLUMNS // 8), tl.float32)
    squares = tl.zeros((COLUMNS // 8,), tl.float32)
    for start in tl.range(0, INPUTS, COLUMNS, num_stages=AHEAD):
        if even:
            w = tl.load(weights + at + start, eviction_policy="evict_first")
            v = tl.load(x + column + start).to(tl.float32)
        else:
            inside = column + start < INPUTS
            w = tl.load(
                weights + at + start,
                mask=inside[None, :],
                other=0.0,
                eviction_policy="evict_first",
            )
            v = tl.load(x + column + start, mask=inside, other=0.0).to(tl.float32)
        if NORMED:
            squares += tl.sum(tl.reshape(v * v, (COLUMNS // 8, 8)), axis=1)
            if even:
                v *= tl.load(norm + column + start).to(tl.float32)
            else:
                v *= tl.load(norm + column + start, mask=inside, other=0.0).to(tl.float32)
        terms = tl.reshape(w.to(tl.float32) * v[None, :], (ROWS, COLUMNS // 8, 8))
        sums += tl.sum(terms, axis=2)
    result = tl.sum(sums, axis=1)
    if NORMED:
        result *= tl.rsqrt(tl.sum(squares, axis=0) / INPUTS + eps)
    if BIASED:
        result += tl.load(bias + row).to(tl.float32)
    if gated:
        gate, up = tl.split(tl.reshape(result, (ROWS // 2, 2)))
        result = activate(gate, GATE) * up
        output = tile * (ROWS // 2) + tl.arange(0, ROWS // 2)
    else:
        output = tile * ROWS + tl.arange(0, ROWS)
    if ADDED:
        result += tl.load(residual + output, mask=output < outputs, other=0.0).to(tl.float32)
    tl.store(out + output, result.to(out.dtype.element_ty), mask=output < outputs)


@triton.jit
def get_tile(outputs, tokens, ROWS: tl.constexpr, TOKENS: tl.constexpr, GROUP: tl.constexpr):
    """The program's tile of outputs and of tokens: GROUP tiles of tokens share matrix rows.

    Programs that run together read the same rows, so the matrix leaves memory once a group.
    """
    program = tl.program_id(0)
    row_tiles, token_tiles = tl.cdiv(outputs, ROWS), tl.cdiv(tokens, TOKENS)
    first = program // (GROUP * row_tiles) * GROUP
    size = tl.minimum(token_tiles - first, GROUP)
    within = program % (GROUP * row_tiles)
    return within // size, first + within % size


@triton.jit
def stream_tile(
    out,
    x,
    weights,
    norm,
    bias,
    residual,
    tokens,
    outputs,
    eps,
    out_stride,
    x_stride,
    residual_stride,
    INPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    NORMED: tl.constexpr,
    BIASED: tl.constexpr,
    GATE: tl.constexpr,
    ADDED: tl.constexpr,
    PREFETCHED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """out (tokens, outputs) = x (tokens, inputs) times weights transposed, in tiles.

    A program does ROWS matrix rows for TOKENS tokens. The matrix is the tensor cores' first
    operand, so that few tokens fill the side that may be narrow. Sums run over the columns in
    order, whatever the tile: an output's bits depend on the instruction, whose width is TOKENS.
    """
    even: tl.constexpr = INPUTS % COLUMNS == 0
    gated: tl.constexpr = GATE != ""
    width: tl.constexpr = ROWS // 2 if gated else ROWS
    tile, token_tile = get_tile(outputs, tokens, width, TOKENS, GROUP)
    row = get_matrix_rows(tile, outputs, ROWS, gated)
    begin_stream(weights + row * INPUTS, ROWS, PREFETCHED, OVERLAP)
    token = token_tile * TOKENS + tl.arange(0, TOKENS)
    token_inside = token < tokens
    column = tl.arange(0, COLUMNS)
    at = row[:, None] * INPUTS + column[None, :]
    x_at = token.to(tl.int64)[:, None] * x_stride + column[None, :]
    sums = tl.zeros((ROWS, TOKENS), tl.float32)
    squares = tl.zeros((TOKENS, COLUMNS // 8), tl.float32)
    for start in range(0, INPUTS, COLUMNS):
        if even:
            w = tl.load(weights + at + start)
            v = tl.load(x + x_at + start, mask=token_inside[:, None], other=0.0)
        else:
            inside = (column + start < INPUTS)[None, :]
            w = tl.load(weights + at + start, mask=inside, other=0.0)
            v = tl.load(x + x_at + start, mask=token_inside[:, None] & inside, other=0.0)
        if NORMED:
            v = v.to(tl.float32)
            squares += tl.sum(tl.reshape(v * v, (TOKENS, COLUMNS // 8, 8)), axis=2)
            scale = tl.load(norm + column + start, mask=column + start < INPUTS, other=0.0)
            v = (v * scale.to(tl.float32)[None, :]).to(x.dtype.element_ty)
        sums = tl.dot(w, tl.trans(v), sums)
    if NORMED:
        sums *= tl.rsqrt(tl.sum(squares, axis=1) / INPUTS + eps)[None, :]
    if BIASED:
        sums += tl.load(bias + row).to(tl.float32)[:, None]
    if gated:
        pairs = tl.permute(tl.reshape(sums, (ROWS // 2, 2, TOKENS)), (0, 2, 1))
        gate, up = tl.split(pairs)
        sums = activate(gate, GATE) * up
    result = tl.trans(sums)
    output = tile * width + tl.arange(0, width)
    inside = token_inside[:, None] & (output < outputs)[None, :]
    if ADDED:
        add_at = token.to(tl.int64)[:, None] * residual_stride + output[None, :]
        result += tl.load(residual + add_at, mask=inside, other=0.0).to(tl.float32)
    out_at = token.to(tl.int64)[:, None] * out_stride + output[None, :]
    tl.store(out + out_at, result.to(out.dtype.element_ty), mask=inside)
