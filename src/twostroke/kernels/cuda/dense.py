"""Products with dense matrices: of few rows, of many, and with bits that depend on neither.

Owns which kernel and which tile a product gets; the kernels for few rows are in stream.py, and many
rows go to PyTorch's library. Outputs are preallocated, nothing waits, and a launch depends on
shapes alone, so that all of it may be captured in a graph.
"""

from __future__ import annotations

import torch
import triton

from twostroke.kernels.cuda.overlap import can_overlap
from twostroke.kernels.cuda.stream import Stream, Tile, stream_tile, stream_vector
from twostroke.kernels.cuda.types import PLAIN, DenseMatrix, Fused, Tensor

# Beyond this many rows a product is no longer bound by reading the matrix once.
FEW_ROWS = 64


# One instruction shape, 64 by 128 by 16, for every number of tokens: what a row of the result is
# made of, and in which order, is then the same whatever its company. Few tokens get fewer matrix
# rows a program, and so more programs, which reads faster; an output's sums do not change by that.
EXACT_TOKENS = 128
EXACT_FEW = Tile(rows=64, columns=64, tokens=EXACT_TOKENS, warps=4, stages=4)
EXACT_MANY = Tile(rows=128, columns=64, tokens=EXACT_TOKENS, warps=8, stages=4)
# Tiles of tokens that share a matrix's rows in the cache.
EXACT_GROUP = 16


def choose_tile(tokens: int, outputs: int, inputs: int, normed: bool) -> Tile:
    """The tile for a product of few rows; see `Tile`.

    outputs: rows of the matrix. Small matrices get fewer rows a program, or there would be fewer
    programs than processors.
    """
    if tokens == 1:
        return Tile(rows=8, columns=1024, tokens=0, warps=4, stages=4, prefetched=4096)
    padded = max(8, triton.next_power_of_2(tokens))
    if outputs < 8192:
        stages = 4 if padded <= 32 else 3
        return Tile(rows=32, columns=256, tokens=padded, warps=4, stages=stages, prefetched=1024)
    if padded <= 16:
        return Tile(rows=64, columns=256, tokens=padded, warps=4, stages=3, prefetched=1024)
    if normed:
        return Tile(rows=64, columns=256, tokens=padded, warps=8, stages=2, prefetched=1024)
    return Tile(rows=64, columns=128, tokens=padded, warps=4, stages=4, prefetched=1024)


def product(
    out: Tensor,
    x: Tensor,
    matrix: DenseMatrix,
    fused: Fused = PLAIN,
    tile: Tile | None = None,
    overlap: bool | None = None,
) -> None:
    """out = x times the matrix transposed, with what is fused; for few rows (see FEW_ROWS).

    x (T, inputs), out (T, outputs), or half as wide with a gate: float16, bfloat16, or float32 for
    logits. Sums are float32 and rounded once, at the end. With a norm, x times its weight is
    rounded to x's dtype where T > 1; it must not exceed its range. out may be fused.residual,
    never x. tile, overlap: instead of what would be chosen.
    """
    tokens, inputs = x.shape
    width = matrix.outputs // 2 if fused.gate else matrix.outputs
    assert matrix.inputs == inputs
    assert out.shape == (tokens, width)
    assert fused.residual is None or fused.residual.shape == out.shape
    if tokens == 0:
        return
    if tile is None:
        tile = choose_tile(tokens, matrix.outputs, inputs, fused.norm is not None)
    if overlap is None:
        overlap = can_overlap(x.device)
    if tile.tokens == 0:
        _launch_vector(out, x, matrix, fused, tile, overlap)
    else:
        _launch_tiles(out, x, matrix, fused, tile, overlap)


def product_exact(
    out: Tensor,
    x: Tensor,
    matrix: DenseMatrix,
    bias: Tensor | None = None,
    tile: Tile | None = None,
) -> None:
    """out (T, outputs) = x (T, inputs) times the matrix transposed, plus bias (outputs,).

    A row's bits do not depend on T nor on the other rows. out: float16, bfloat16 or float32.
    tile: instead of what would be chosen, of EXACT_TOKENS tokens.
    """
    assert matrix.inputs == x.shape[1]
    assert out.shape == (x.shape[0], matrix.outputs)
    if x.shape[0] == 0:
        return
    if tile is None:
        tile = EXACT_FEW if x.shape[0] <= EXACT_TOKENS else EXACT_MANY
    assert tile.tokens == EXACT_TOKENS
    _launch_tiles(out, x, matrix, Fused(bias=bias), tile, can_overlap(x.device))


def product_many(out: Tensor, x: Tensor, matrix: DenseMatrix, bias: Tensor | None = None) -> None:
    """out (T, outputs) = x (T, inputs) times the matrix transposed, plus bias (outputs,).

    By PyTorch's library. A float32 `out` (logits) gets the unrounded sums where the library gives
    them, which on a CPU it does not: there x and the matrix are converted.
    """
    weights = matrix.values.t()
    if out.dtype == x.dtype:
        if bias is None:
            torch.mm(x, weights, out=out)
        else:
            torch.addmm(bias, x, weights, out=out)
        return
    if x.is_cuda:
        torch.mm(x, weights, out_dtype=out.dtype, out=out)
    else:
        torch.mm(x.to(out.dtype), weights.to(out.dtype), out=out)
    if bias is not None:
        out += bias


def _launch_vector(
    out: Tensor, x: Tensor, matrix: DenseMatrix, fused: Fused, tile: Tile, overlap: bool
) -> None:
    assert x.shape[0] == 1
    width = out.shape[1]
    stream = Stream(tile, matrix.inputs, fused.gate, EXACT_GROUP, overlap)
    stream_vector[triton.cdiv(width, stream.width),](
        (out, x),
        (matrix.values, width),
        (fused.norm, fused.bias, fused.residual, fused.eps),
        STREAM=stream,
        num_warps=tile.warps,
        num_stages=1,
        launch_pdl=overlap,
    )


def _launch_tiles(
    out: Tensor, x: Tensor, matrix: DenseMatrix, fused: Fused, tile: Tile, overlap: bool
) -> None:
    tokens, width = out.shape
    stream = Stream(tile, matrix.inputs, fused.gate, EXACT_GROUP, overlap)
    residual = fused.residual
    residual_stride = 0 if residual is None else _get_stride(residual)
    stream_tile[triton.cdiv(width, stream.width) * triton.cdiv(tokens, tile.tokens),](
        (out, x, _get_stride(out), _get_stride(x)),
        tokens,
        (matrix.values, width),
        (fused.norm, fused.bias, residual, residual_stride, fused.eps),
        STREAM=stream,
        num_warps=tile.warps,
        num_stages=tile.stages,
        launch_pdl=overlap,
    )


def _get_stride(x: Tensor) -> int:
    """Elements from row to row of a matrix with contiguous columns."""
    assert x.shape[1] == 1 or x.stride(1) == 1
    return int(x.stride(0))
