"""Rotates queries and keys by position and stores keys and values in the pool: one launch a layer.

Per token and head, in float32: an RMS norm where the model has one, the rotation of the head's
halves (Su et al. 2021, §3.4.2), and for 8-bit elements of the pool the Walsh-Hadamard transform of
queries and keys (kernels/reference/ops.py: rotate). It rounds once, when it stores. A program does
a few heads of one token, the same few for every number of tokens, so a token's bits depend on
nothing but itself. Nothing is allocated and nothing waits.
"""

# ruff: noqa: N803, SIM108 (Triton's constants are upper case, and its branches are not values)
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from twostroke.kernels.cuda.overlap import begin_overlapped, can_overlap, get_options
from twostroke.kernels.cuda.types import BLOCK_TOKENS, KvLayer, StepTensors, Tensor

# Values that a program holds: with two warps a thread has eight, one wide load of 16-bit elements.
PROGRAM_VALUES = 512
PROGRAM_WARPS = 2
EIGHT_BIT = (torch.int8, torch.float8_e4m3fn)


@dataclass(frozen=True, slots=True)
class HeadShape:
    """Heads of the queries, heads of the keys and values, and dimensions of each."""

    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True, eq=False)
class HeadRope:
    """What happens to the heads of a layer before attention.

    cos, sin (positions, head_dim / 2) float32, contiguous. q_norm, k_norm (head_dim,): weights of
    the RMS norm, with `eps`, that comes first; None, both, where there is none.
    """

    shape: HeadShape
    cos: Tensor
    sin: Tensor
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    eps: float = 0.0


@triton.jit
def _transform(x, ROWS: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    """H x of every SIZE columns of x (ROWS, WIDTH), SIZE a power of two up to 256.

    H of 16 m dimensions is H of m on the high bits of the column times H of 16 on the low ones.
    Each is a product with a matrix of 16 by 16, of signs, which three TF32 terms do in float32.
    """
    x = tl.reshape(x, (ROWS * WIDTH // 16, 16))
    x = tl.dot(x, _get_signs(SIZE - 1 if SIZE < 16 else 15), input_precision="tf32x3")
    if SIZE > 16:
        high: tl.constexpr = SIZE // 16
        low: tl.constexpr = 16 // high
        count: tl.constexpr = ROWS * WIDTH // SIZE
        x = tl.permute(tl.reshape(x, (count, high, high, low)), (0, 2, 1, 3))
        x = tl.reshape(x, (ROWS * WIDTH // 16, 16))
        x = tl.dot(x, _get_signs(16 - low), input_precision="tf32x3")
        x = tl.permute(tl.reshape(x, (count, high, high, low)), (0, 2, 1, 3))
    return tl.reshape(x, (ROWS, WIDTH))


@triton.jit
def _get_signs(BITS: tl.constexpr):
    """The transform (16, 16) over these bits of the index: 0 where the other bits differ."""
    line = tl.arange(0, 16)
    shared = line[:, None] & line[None, :] & BITS
    odd = (shared ^ (shared >> 1) ^ (shared >> 2) ^ (shared >> 3)) & 1
    same = ((line[:, None] ^ line[None, :]) & (15 - BITS)) == 0
    return tl.where(same, 1.0 - 2.0 * odd, 0.0)


@triton.jit
def _rotate_heads(
    own, source, norm, cos, sin, position, inside, eps, DIM: tl.constexpr, NORMED: tl.constexpr
):
    """The heads own (ROWS, WIDTH) that lie at source (ROWS, WIDTH), normed and rotated.

    A value's partner, half a head away, is loaded again rather than fetched from another thread.
    """
    half: tl.constexpr = DIM // 2
    dim = tl.arange(0, own.shape[1])
    partner = (dim + half) % DIM
    other = tl.load(source + partner[None, :], mask=inside, other=0.0).to(tl.float32)
    # The result may go where the heads came from: every thread has loaded before one stores.
    tl.debug_barrier()
    real = dim < DIM
    if NORMED:
        root = tl.rsqrt(tl.sum(own * own, axis=1) / DIM + eps)[:, None]
        own *= root * tl.load(norm + dim, mask=real, other=0.0).to(tl.float32)[None, :]
        other *= root * tl.load(norm + partner, mask=real, other=0.0).to(tl.float32)[None, :]
    angle = position * half + dim % half
    cosine = tl.load(cos + angle, mask=real, other=0.0)
    sine = tl.load(sin + angle, mask=real, other=0.0)
    sine = tl.where(dim < half, -sine, sine)
    return own * cosine[None, :] + other * sine[None, :]


@triton.jit
def _clamp(x, LIMIT: tl.constexpr):
    """x no larger than LIMIT."""
    return tl.minimum(tl.maximum(x, -LIMIT), LIMIT)


@triton.jit
def _store_heads(pool, scales, at, scale_at, x, inside, row_inside, LIMIT: tl.constexpr):
    """Store x (ROWS, WIDTH); with a LIMIT as whole or 8-bit numbers up to it, times a scale."""
    element: tl.constexpr = pool.dtype.element_ty
    if LIMIT > 0:
        largest = tl.max(tl.abs(x), axis=1)
        limit = tl.full(largest.shape, LIMIT, tl.float32)
        x *= tl.div_rn(limit, tl.where(largest > 1e-30, largest, float("inf")))[:, None]
        if element == tl.int8:
            # Adding 1.5 * 2^23 leaves no bits for a fraction: it rounds to nearest even.
            x = (x + 12582912.0) - 12582912.0
        else:
            x = _clamp(x, LIMIT)
        tl.store(scales + scale_at, tl.div_rn(largest, limit), mask=row_inside)
    tl.store(pool + at, x.to(element), mask=inside)


@triton.jit
def _rope_write(
    q_out,
    qkv,
    positions,
    token_rows,
    tables,
    keys,
    values,
    key_scales,
    value_scales,
    cos,
    sin,
    q_norm,
    k_norm,
    q_stride,
    qkv_stride,
    table_stride,
    key_block_stride,
    key_head_stride,
    value_block_stride,
    value_head_stride,
    scale_block_stride,
    scale_head_stride,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    NORMED: tl.constexpr,
    TRANSFORMED: tl.constexpr,
    CLAMPED: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin_overlapped(OVERLAP)
    token, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.load(token_rows + token).to(tl.int64)
    position = tl.load(positions + token)
    # Programs do heads of q first, then of k, then of v; no program does two kinds.
    q_pieces: tl.constexpr = (HEADS + ROWS - 1) // ROWS
    kv_pieces: tl.constexpr = (KV_HEADS + ROWS - 1) // ROWS
    is_q, is_v = piece < q_pieces, piece >= q_pieces + kv_pieces
    kind = tl.where(is_q, 0, tl.where(is_v, 2, 1))
    base = tl.where(is_q, 0, HEADS + (kind - 1) * KV_HEADS)
    skipped = tl.where(is_q, 0, q_pieces + (kind - 1) * kv_pieces)
    head = (piece - skipped) * ROWS + tl.arange(0, ROWS)
    row_inside = head < tl.where(is_q, HEADS, KV_HEADS)
    dim = tl.arange(0, WIDTH)[None, :]
    inside = row_inside[:, None] & (dim < DIM)
    source = qkv + token * qkv_stride + (base + head)[:, None] * DIM
    x = tl.load(source + dim, mask=inside, other=0.0).to(tl.float32)
    if row < 0:
        return
    block = tl.load(tables + row * table_stride + position // BLOCK).to(tl.int64)
    slot = position % BLOCK
    scale_at = block * scale_block_stride + head * scale_head_stride + slot
    if is_v:
        if CLAMPED:
            x = _clamp(x, 65504.0)
        at = block * value_block_stride + head[:, None] * value_head_stride + slot * DIM + dim
        _store_heads(values, value_scales, at, scale_at, x, inside, row_inside, LIMIT)
    else:
        norm = tl.where(is_q, q_norm, k_norm)
        x = _rotate_heads(x, source, norm, cos, sin, position, inside, eps, DIM, NORMED)
        if CLAMPED:
            x = tl.where(is_q, x, _clamp(x, 65504.0))
        if TRANSFORMED > 1:
            x = _transform(x, ROWS, WIDTH, TRANSFORMED)
        if is_q:
            target = q_out + token * q_stride + head[:, None] * DIM + dim
            tl.store(target, x.to(q_out.dtype.element_ty), mask=inside)
        else:
            at = block * key_block_stride + head[:, None] * key_head_stride + slot * DIM + dim
            _store_heads(keys, key_scales, at, scale_at, x, inside, row_inside, LIMIT)


def rope_write(q_out: Tensor, qkv: Tensor, step: StepTensors, kv: KvLayer, rope: HeadRope) -> None:
    """Norm, rotate and write q to q_out; norm, rotate and store k, and store v, in the pool.

    qkv (T, (heads + 2 * kv_heads) * head_dim): heads of q, of k, of v. q_out (T, heads *
    head_dim): may be the first columns of qkv. A token's k and v go to the place of its position
    in its row's blocks; a token whose row is -1 writes nothing. For 8-bit pools q comes out as H q,
    for the stored keys are H k: q . k = (H q) . (H k) / n (see the reference's rotate).
    """
    shape = rope.shape
    dim = shape.head_dim
    tokens = qkv.shape[0]
    assert qkv.shape == (tokens, (shape.heads + 2 * shape.kv_heads) * dim)
    assert q_out.shape == (tokens, shape.heads * dim)
    assert (rope.q_norm is None) == (rope.k_norm is None)
    assert kv.keys.shape[1:] == kv.values.shape[1:] == (shape.kv_heads, BLOCK_TOKENS, dim)
    if tokens == 0:
        return
    element = kv.keys.dtype
    is_eight_bit = element in EIGHT_BIT
    key_scales, value_scales = kv.keys, kv.values
    scale_strides = (0, 0)
    if is_eight_bit:
        assert kv.key_scales is not None
        assert kv.value_scales is not None
        assert kv.key_scales.stride() == kv.value_scales.stride()
        key_scales, value_scales = kv.key_scales, kv.value_scales
        scale_strides = key_scales.stride()[:2]
    width = triton.next_power_of_2(dim)
    rows = max(1, PROGRAM_VALUES // width)
    pieces = triton.cdiv(shape.heads, rows) + 2 * triton.cdiv(shape.kv_heads, rows)
    _rope_write[tokens, pieces](
        q_out,
        qkv,
        step.positions,
        step.token_rows,
        step.block_tables,
        kv.keys,
        kv.values,
        key_scales,
        value_scales,
        rope.cos,
        rope.sin,
        rope.cos if rope.q_norm is None else rope.q_norm,
        rope.cos if rope.k_norm is None else rope.k_norm,
        q_out.stride(0),
        qkv.stride(0),
        step.block_tables.stride(0),
        *kv.keys.stride()[:2],
        *kv.values.stride()[:2],
        *scale_strides,
        rope.eps,
        HEADS=shape.heads,
        KV_HEADS=shape.kv_heads,
        DIM=dim,
        ROWS=rows,
        WIDTH=width,
        NORMED=rope.q_norm is not None,
        TRANSFORMED=dim & -dim if is_eight_bit else 1,
        CLAMPED=is_eight_bit or element == torch.float16,
        LIMIT=_get_limit(element),
        BLOCK=BLOCK_TOKENS,
        **get_options(can_overlap(qkv.device), PROGRAM_WARPS),
    )


def _get_limit(element: torch.dtype) -> float:
    """The largest value of an 8-bit element that a scale is chosen for; 0 for the others."""
    if element == torch.int8:
        return 127.0
    return 448.0 if element == torch.float8_e4m3fn else 0.0
