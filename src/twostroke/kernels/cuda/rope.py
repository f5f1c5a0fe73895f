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

from twostroke.kernels.cuda.overlap import begin_overlapped, can_overlap
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


@dataclass(frozen=True, slots=True)
class _Heads:
    """What the kernel is compiled for.

    heads, kv_heads, dim: see HeadShape. rows, width: heads of a program, dimensions rounded up to a
    power of two. transformed: dimensions that are transformed together, 1 for none. clamped: to
    the range of float16, before they are stored. limit: see _get_limit. block: tokens of a block.
    overlap: see overlap.py.
    """

    heads: int
    kv_heads: int
    dim: int
    rows: int
    width: int
    transformed: int
    clamped: bool
    limit: float
    block: int
    overlap: bool

    @property
    def q_pieces(self) -> int:
        """Programs of a token that do heads of q."""
        return -(-self.heads // self.rows)

    @property
    def kv_pieces(self) -> int:
        """Programs of a token that do heads of k; as many do heads of v."""
        return -(-self.kv_heads // self.rows)


@triton.jit
def _transform(x, HEADS: tl.constexpr):
    """H x of every HEADS.transformed columns of x (rows, width), a power of two up to 256.

    H of 16 m dimensions is H of m on the high bits of the column times H of 16 on the low ones.
    Each is a product with a matrix of 16 by 16, of signs, which three TF32 terms do in float32.
    """
    size: tl.constexpr = HEADS.transformed
    values: tl.constexpr = HEADS.rows * HEADS.width
    x = tl.reshape(x, (values // 16, 16))
    x = tl.dot(x, _get_signs(size - 1 if size < 16 else 15), input_precision="tf32x3")
    if size > 16:
        high: tl.constexpr = size // 16
        low: tl.constexpr = 16 // high
        count: tl.constexpr = values // size
        x = tl.permute(tl.reshape(x, (count, high, high, low)), (0, 2, 1, 3))
        x = tl.reshape(x, (values // 16, 16))
        x = tl.dot(x, _get_signs(16 - low), input_precision="tf32x3")
        x = tl.permute(tl.reshape(x, (count, high, high, low)), (0, 2, 1, 3))
    rows: tl.constexpr = HEADS.rows
    width: tl.constexpr = HEADS.width
    return tl.reshape(x, (rows, width))


@triton.jit
def _get_signs(BITS: tl.constexpr):
    """The transform (16, 16) over these bits of the index: 0 where the other bits differ."""
    line = tl.arange(0, 16)
    shared = line[:, None] & line[None, :] & BITS
    odd = (shared ^ (shared >> 1) ^ (shared >> 2) ^ (shared >> 3)) & 1
    same = ((line[:, None] ^ line[None, :]) & (15 - BITS)) == 0
    return tl.where(same, 1.0 - 2.0 * odd, 0.0)


@triton.jit
def _rotate_heads(own, source, token, inside, rope, HEADS: tl.constexpr):
    """The heads own (rows, width) that lie at source (rows, 1), normed and rotated.

    token: (its position, whether the heads are of q). rope: (cos, sin, q_norm, k_norm, eps). A
    value's partner, half a head away, is loaded again rather than fetched from another thread.
    """
    position, is_q = token
    cos, sin, q_norm, k_norm, eps = rope
    half: tl.constexpr = HEADS.dim // 2
    dim = tl.arange(0, own.shape[1])
    partner = (dim + half) % HEADS.dim
    other = tl.load(source + partner[None, :], mask=inside, other=0.0).to(tl.float32)
    # The result may go where the heads came from: every thread has loaded before one stores.
    tl.debug_barrier()
    real = dim < HEADS.dim
    if q_norm is not None:
        norm = tl.where(is_q, q_norm, k_norm)
        root = tl.rsqrt(tl.sum(own * own, axis=1) / HEADS.dim + eps)[:, None]
        own *= root * tl.load(norm + dim, mask=real, other=0.0).to(tl.float32)[None, :]
        other *= root * tl.load(norm + partner, mask=real, other=0.0).to(tl.float32)[None, :]
    angle = position * half + dim % half
    cosine = tl.load(cos + angle, mask=real, other=0.0)
    sine = tl.load(sin + angle, mask=real, other=0.0)
    sine = tl.where(dim < half, -sine, sine)
    return own * cosine[None, :] + other * sine[None, :]


@triton.jit
def _clamp(x, limit):
    """x no larger than limit."""
    return tl.minimum(tl.maximum(x, -limit), limit)


@triton.jit
def _store_heads(pool, place, x, head, inside, HEADS: tl.constexpr):
    """Store x (rows, width); with a limit as whole or 8-bit numbers up to it, times a scale.

    pool: (elements, scales, strides of elements over blocks and heads, the same of scales). place:
    (block, slot in it). head (rows,): of the pool.
    """
    elements, scales, block_stride, head_stride, scale_block_stride, scale_head_stride = pool
    block, slot = place
    element: tl.constexpr = elements.dtype.element_ty
    if HEADS.limit > 0:
        largest = tl.max(tl.abs(x), axis=1)
        limit = tl.zeros_like(largest) + HEADS.limit
        x *= tl.div_rn(limit, tl.where(largest > 1e-30, largest, float("inf")))[:, None]
        if element == tl.int8:
            # Adding 1.5 * 2^23 leaves no bits for a fraction: it rounds to nearest even.
            x = (x + 12582912.0) - 12582912.0
        else:
            x = _clamp(x, limit[:, None])
        scale_at = block * scale_block_stride + head * scale_head_stride + slot
        tl.store(scales + scale_at, tl.div_rn(largest, limit), mask=head < HEADS.kv_heads)
    at = block * block_stride + head[:, None] * head_stride + slot * HEADS.dim
    at += tl.arange(0, x.shape[1])[None, :]
    tl.store(elements + at, x.to(element), mask=inside)


@triton.jit
def _rope_write(places, step, keys, values, rope, HEADS: tl.constexpr):
    """A few heads of one token.

    places: (q_out, qkv, their strides). step: (positions, token_rows, tables, stride of tables).
    keys, values: see _store_heads. rope: (cos, sin, q_norm, k_norm, eps).
    """
    if HEADS.overlap:
        begin_overlapped(True)
    q_out, qkv, q_stride, qkv_stride = places
    positions, token_rows, tables, table_stride = step
    token, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.load(token_rows + token).to(tl.int64)
    position = tl.load(positions + token)
    # Programs do heads of q first, then of k, then of v; no program does two kinds.
    is_q, is_v = piece < HEADS.q_pieces, piece >= HEADS.q_pieces + HEADS.kv_pieces
    kind = tl.where(is_q, 0, tl.where(is_v, 2, 1))
    base = tl.where(is_q, 0, HEADS.heads + (kind - 1) * HEADS.kv_heads)
    skipped = tl.where(is_q, 0, HEADS.q_pieces + (kind - 1) * HEADS.kv_pieces)
    head = (piece - skipped) * HEADS.rows + tl.arange(0, HEADS.rows)
    row_inside = head < tl.where(is_q, HEADS.heads, HEADS.kv_heads)
    dim = tl.arange(0, HEADS.width)[None, :]
    inside = row_inside[:, None] & (dim < HEADS.dim)
    source = qkv + token * qkv_stride + (base + head)[:, None] * HEADS.dim
    x = tl.load(source + dim, mask=inside, other=0.0).to(tl.float32)
    if row < 0:
        return
    block = tl.load(tables + row * table_stride + position // HEADS.block).to(tl.int64)
    place = (block, position % HEADS.block)
    if is_v:
        if HEADS.clamped:
            x = _clamp(x, 65504.0)
        _store_heads(values, place, x, head, inside, HEADS)
    else:
        x = _rotate_heads(x, source, (position, is_q), inside, rope, HEADS)
        if HEADS.clamped:
            x = tl.where(is_q, x, _clamp(x, 65504.0))
        if HEADS.transformed > 1:
            x = _transform(x, HEADS)
        if is_q:
            target = q_out + token * q_stride + head[:, None] * HEADS.dim + dim
            tl.store(target, x.to(q_out.dtype.element_ty), mask=inside)
        else:
            _store_heads(keys, place, x, head, inside, HEADS)


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
    heads = _compile_for(shape, kv.keys.dtype, can_overlap(qkv.device))
    _rope_write[tokens, heads.q_pieces + 2 * heads.kv_pieces](
        (q_out, qkv, q_out.stride(0), qkv.stride(0)),
        (step.positions, step.token_rows, step.block_tables, step.block_tables.stride(0)),
        _point(kv.keys, kv.key_scales),
        _point(kv.values, kv.value_scales),
        (rope.cos, rope.sin, rope.q_norm, rope.k_norm, rope.eps),
        HEADS=heads,
        num_warps=PROGRAM_WARPS,
        launch_pdl=heads.overlap,
    )


def _compile_for(shape: HeadShape, element: torch.dtype, overlap: bool) -> _Heads:
    dim = shape.head_dim
    width = triton.next_power_of_2(dim)
    is_eight_bit = element in EIGHT_BIT
    return _Heads(
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        dim=dim,
        rows=max(1, PROGRAM_VALUES // width),
        width=width,
        transformed=dim & -dim if is_eight_bit else 1,
        clamped=is_eight_bit or element == torch.float16,
        limit=_get_limit(element),
        block=BLOCK_TOKENS,
        overlap=overlap,
    )


def _point(elements: Tensor, scales: Tensor | None) -> tuple[Tensor | int | None, ...]:
    """Half a layer of the pool as kernels take it: pointers, strides over blocks and heads."""
    assert (scales is None) == (elements.dtype not in EIGHT_BIT)
    scale_strides = (0, 0) if scales is None else scales.stride()[:2]
    return (elements, scales, *elements.stride()[:2], *scale_strides)


def _get_limit(element: torch.dtype) -> float:
    """The largest value of an 8-bit element that a scale is chosen for; 0 for the others."""
    if element == torch.int8:
        return 127.0
    return 448.0 if element == torch.float8_e4m3fn else 0.0
