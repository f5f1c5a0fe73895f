"""Row-wise kernels: norms, sums, gates, embeddings, and choosing rows.

They compute in float32 and round once, when they store. Rows may lie apart: every matrix is given
by its row stride, with contiguous columns. Nothing is allocated and nothing waits, so all of it may
be captured in a graph. One program does one row (or one piece of it), with a layout that depends on
the width alone: a row's bits do not depend on how many rows there are.
"""

# ruff: noqa: N803 (Triton's constants are upper case)
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from twostroke.kernels.cuda.overlap import begin_overlapped, can_overlap, get_options
from twostroke.kernels.cuda.types import DenseMatrix, Tensor

ACTIVATIONS = ("silu", "gelu_tanh")
# Columns that one program of an element-wise kernel does.
PIECE = 2048
PIECE_WARPS = 4


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) without an overflow for either sign."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """silu (Elfwing et al. 2018), or gelu's tanh form, in which 1 + tanh(u) = 2 sigmoid(2 u)."""
    if ACTIVATION == "silu":
        return x * sigmoid(x)
    return x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def _norm_rows(out, x, weight, eps, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """out, x: (pointer, stride). weight: (pointer, width of a group)."""
    begin_overlapped(OVERLAP)
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    inside = column < weight[1]
    at = group * weight[1] + column
    values = tl.load(x[0] + row * x[1] + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight[0] + column, mask=inside, other=0.0).to(tl.float32)
    root = tl.rsqrt(tl.sum(values * values, axis=0) / weight[1] + eps)
    normed = values * root * scale
    tl.store(out[0] + row * out[1] + at, normed.to(out[0].dtype.element_ty), mask=inside)


@triton.jit
def _add_norm_rows(outs, x, y, norm, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """outs: pointer and stride of the sum, of the norm. norm: (weight, width, eps)."""
    begin_overlapped(OVERLAP)
    total, total_stride, out, out_stride = outs
    weight, width, eps = norm
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    first = tl.load(x[0] + row * x[1] + column, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(y[0] + row * y[1] + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    rounded = (first + second).to(total.dtype.element_ty)
    tl.store(total + row * total_stride + column, rounded, mask=inside)
    values = rounded.to(tl.float32)
    root = tl.rsqrt(tl.sum(values * values, axis=0) / width + eps)
    normed = values * root * scale
    tl.store(out + row * out_stride + column, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add_rows(out, x, y, width, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """out, x, y: (pointer, stride)."""
    begin_overlapped(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    first = tl.load(x[0] + row * x[1] + column, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(y[0] + row * y[1] + column, mask=inside, other=0.0).to(tl.float32)
    total = (first + second).to(out[0].dtype.element_ty)
    tl.store(out[0] + row * out[1] + column, total, mask=inside)


@triton.jit
def _gate_rows(
    out, gate_up, width, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):
    """out, gate_up: (pointer, stride)."""
    begin_overlapped(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    source = gate_up[0] + row * gate_up[1] + column
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + width, mask=inside, other=0.0).to(tl.float32)
    result = (activate(gate, ACTIVATION) * up).to(out[0].dtype.element_ty)
    tl.store(out[0] + row * out[1] + column, result, mask=inside)


@triton.jit
def _copy_rows(out, source, index, shape, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """Row index[i] of source, times scale, becomes row i of out.

    out, source: (pointer, stride). shape: (width, scale).
    """
    begin_overlapped(OVERLAP)
    width, scale = shape
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    chosen = tl.load(index + row).to(tl.int64)
    values = tl.load(source[0] + chosen * source[1] + column, mask=inside, other=0.0)
    values = (values.to(tl.float32) * scale).to(out[0].dtype.element_ty)
    tl.store(out[0] + row * out[1] + column, values, mask=inside)


@triton.jit
def _gather_tokens(tokens, sources, drawn, count, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    begin_overlapped(OVERLAP)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(sources + at, mask=at < count, other=-1)
    taken = source >= 0
    tl.store(tokens + at, tl.load(drawn + source, mask=taken, other=0), mask=taken)


def rms_norm(out: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    """out = x / sqrt(mean(x^2) + eps) * weight over groups of the weight's length.

    out, x (T, width): may be the same. weight (group,): its length divides the width; with the
    length of a head, one call norms all heads of all tokens.
    """
    tokens, width = x.shape
    size = weight.numel()
    assert out.shape == x.shape
    assert width % size == 0
    if tokens == 0:
        return
    block, warps = _choose_block(size)
    _norm_rows[tokens, width // size](
        _point(out),
        _point(x),
        (weight, size),
        eps,
        BLOCK=block,
        **get_options(can_overlap(x.device), warps),
    )


def add_rms_norm(
    sum_out: Tensor, norm_out: Tensor, x: Tensor, y: Tensor, weight: Tensor, eps: float
) -> None:
    """sum_out = x + y in its dtype, and norm_out = the norm of that sum as it was rounded.

    All but weight are (T, width), weight (width,). sum_out may be x or y.
    """
    tokens, width = x.shape
    assert sum_out.shape == norm_out.shape == x.shape == y.shape
    assert weight.numel() == width
    if tokens == 0:
        return
    block, warps = _choose_block(width)
    _add_norm_rows[tokens,](
        (*_point(sum_out), *_point(norm_out)),
        _point(x),
        _point(y),
        (weight, width, eps),
        BLOCK=block,
        **get_options(can_overlap(x.device), warps),
    )


def add(out: Tensor, x: Tensor, y: Tensor) -> None:
    """out = x + y, all (T, width); out may be x or y."""
    tokens, width = x.shape
    assert out.shape == x.shape == y.shape
    if tokens == 0:
        return
    _add_rows[tokens, triton.cdiv(width, PIECE)](
        _point(out),
        _point(x),
        _point(y),
        width,
        BLOCK=PIECE,
        **get_options(can_overlap(x.device), PIECE_WARPS),
    )


def gated(out: Tensor, gate_up: Tensor, activation: str) -> None:
    """out (T, width) = activation(gate) * up; gate_up (T, 2 * width) holds the gate's half first.

    activation: "silu" or "gelu_tanh".
    """
    tokens, width = out.shape
    assert gate_up.shape == (tokens, 2 * width)
    assert activation in ACTIVATIONS
    if tokens == 0:
        return
    _gate_rows[tokens, triton.cdiv(width, PIECE)](
        _point(out),
        _point(gate_up),
        width,
        ACTIVATION=activation,
        BLOCK=PIECE,
        **get_options(can_overlap(out.device), PIECE_WARPS),
    )


def embed(out: Tensor, tokens: Tensor, table: DenseMatrix, scale: float) -> None:
    """out (T, width) = rows of the table (vocabulary, width) for tokens (T,) int32, times scale."""
    _copy(out, table.values, tokens, scale)


def take_rows(out: Tensor, x: Tensor, index: Tensor) -> None:
    """out (L, width) = rows of x (T, width) at index (L,) int32; out must not be x."""
    _copy(out, x, index, 1.0)


def gather_tokens(tokens: Tensor, sources: Tensor, drawn: Tensor) -> None:
    """tokens[i] = drawn[sources[i]] wherever sources[i] >= 0, in place; all int32.

    tokens, sources (T,). drawn: tokens of the step before, which the host has not seen yet.
    """
    count = tokens.numel()
    assert sources.numel() == count
    if count == 0:
        return
    _gather_tokens[triton.cdiv(count, PIECE),](
        tokens,
        sources,
        drawn,
        count,
        BLOCK=PIECE,
        **get_options(can_overlap(tokens.device), PIECE_WARPS),
    )


def _copy(out: Tensor, source: Tensor, index: Tensor, scale: float) -> None:
    rows, width = out.shape
    assert source.shape[1] == width
    assert index.shape == (rows,)
    if rows == 0:
        return
    _copy_rows[rows, triton.cdiv(width, PIECE)](
        _point(out),
        _point(source),
        index,
        (width, scale),
        BLOCK=PIECE,
        **get_options(can_overlap(out.device), PIECE_WARPS),
    )


def _point(x: Tensor) -> tuple[Tensor, int]:
    """A matrix with contiguous columns as kernels take it: itself, elements from row to row."""
    assert x.dim() == 2
    assert x.shape[1] == 1 or x.stride(1) == 1
    return x, int(x.stride(0))


def _choose_block(width: int) -> tuple[int, int]:
    """Columns and warps of a program that does a whole row: 16 values a thread if it can."""
    block = max(16, triton.next_power_of_2(width))
    return block, max(1, min(32, block // 512))
