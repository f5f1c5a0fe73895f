"""Pieces that the attention kernels share: tiles of the pool, products, the running softmax.

Everything here is inlined into a kernel. A tile is `keys` consecutive positions of one KV head, one
or two blocks of the pool. Scores are kept in log2 units. The pool may hold anything beyond a row's
context, NaN included, so what lies there is never read: zero times NaN is NaN.
"""

# ruff: noqa: SIM108 (Triton's branches are not values)
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from twostroke.kernels.cuda.attention_work import AttentionScratch, Work
from twostroke.kernels.cuda.types import BLOCK_TOKENS

BLOCK: tl.constexpr = tl.constexpr(BLOCK_TOKENS)
# Triton's interpreter knows no assembly, and wants numbers for bounds of loops.
INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)
# The score of a key that a query does not see. Finite, so that a query that has seen no key yet
# gives no NaN; whatever it gathers until then, the first visible key multiplies by zero.
UNSEEN: tl.constexpr = tl.constexpr(-1e30)
# Values of parts that a program reads at a time when it puts them together.
FOLDED_VALUES = 8192


class Tensors(NamedTuple):
    """Pointers of a launch: out, q, the items (rows or tiles) it works on, and where rows lie."""

    out: Any
    q: Any
    items: Any
    offsets: Any
    contexts: Any
    tables: Any


class Pool(NamedTuple):
    """The layer's elements and scales: pointers, and their strides over blocks and heads."""

    key: Any
    value: Any
    key_scales: Any
    value_scales: Any
    key_block: Any
    key_head: Any
    value_block: Any
    value_head: Any
    key_scale_block: Any
    key_scale_head: Any
    value_scale_block: Any
    value_scale_head: Any


class Sizes(NamedTuple):
    """Numbers of a launch: strides over tokens and rows, the scale in log2 units, the window."""

    q_token: Any
    out_token: Any
    table_row: Any
    factor: Any
    window: Any


class Shape(NamedTuple):
    """What a kernel is compiled for, all of it constexpr.

    group: query heads a KV head. head_pad: head_dim rounded up to a power of two. rows: queries of
    a program, group heads a token one after the other. keys: positions of a tile. stages: tiles in
    flight. windowed: whether there is a window. tile_tokens: of the step's tiles.
    """

    group: Any
    head_dim: Any
    head_pad: Any
    rows: Any
    keys: Any
    stages: Any
    windowed: Any
    tile_tokens: Any


class Parts(NamedTuple):
    """Scratch of a launch (see AttentionScratch), and how results are cut and put together.

    least: fewest blocks of a run. together, constexpr: parts that are read at a time. group_pad,
    constexpr: the group rounded up to a power of two.
    """

    totals: Any
    sums: Any
    arrivals: Any
    least: Any
    together: Any
    group_pad: Any


def get_tensors(work: Work, items: Any) -> Tensors:
    """The pointers of a launch over these items."""
    step = work.step
    return Tensors(work.out, work.q, items, step.row_offsets, step.contexts, step.block_tables)


def get_pool(work: Work) -> Pool:
    """The pool of a launch."""
    kv = work.kv
    strides = [
        (0, 0) if each is None else each.stride()[:2]
        for each in (kv.keys, kv.values, kv.key_scales, kv.value_scales)
    ]
    flat = [stride for pair in strides for stride in pair]
    return Pool(kv.keys, kv.values, kv.key_scales, kv.value_scales, *flat)


def get_sizes(work: Work) -> Sizes:
    """The numbers of a launch."""
    return Sizes(
        work.q.stride(0),
        work.out.stride(0),
        work.step.block_tables.stride(0),
        work.factor,
        work.look.window,
    )


def get_shape(work: Work, rows: int, keys: int, stages: int) -> Shape:
    """What the kernel of a launch is compiled for."""
    pad = triton.next_power_of_2(max(work.head_dim, 16))
    windowed = work.look.window > 0
    values = (work.group, work.head_dim, pad, rows, keys, stages, windowed, work.step.tile_tokens)
    return Shape(*(tl.constexpr(value) for value in values))


def get_parts(work: Work, scratch: AttentionScratch, least: int) -> Parts:
    """The scratch of a launch."""
    group_pad = triton.next_power_of_2(work.group)
    head_pad = triton.next_power_of_2(max(work.head_dim, 16))
    together = max(1, min(32, FOLDED_VALUES // (group_pad * head_pad)))
    constants = (tl.constexpr(together), tl.constexpr(group_pad))
    return Parts(scratch.parts, scratch.sums, scratch.arrivals, least, *constants)


def get_boxes(work: Work) -> tuple[TensorDescriptor, TensorDescriptor]:
    """The layer's keys and values for the tensor memory accelerator, a head of a block each."""
    pad = triton.next_power_of_2(max(work.head_dim, 16))
    box = [1, 1, BLOCK_TOKENS, pad]
    keys, values = (
        TensorDescriptor(each, list(each.shape), list(each.stride()), box)
        for each in (work.kv.keys, work.kv.values)
    )
    return keys, values


@triton.jit
def bound(x):
    """x as the bound of a loop: the interpreter wants a number there and has an array of one."""
    if INTERPRETED:
        return x.handle.data.item()
    return x


@triton.jit
def widen(x, dtype: tl.constexpr):
    """Elements of the pool, without scales, in `dtype`, which holds 8-bit ones exactly."""
    if x.dtype != dtype:
        x = x.to(tl.float32).to(dtype)
    return x


@triton.jit
def find_block(table, number, last):
    """Block `number` of a row, int64; of a later one that has no key up to `last`, that of last.

    Loads that a pipelined loop contains are made asynchronous, and a tile's address would wait for
    this one's way through shared memory; the pipeliner does not look into assembly.
    """
    pointer = table + tl.minimum(number, last // BLOCK)
    if INTERPRETED:
        block = tl.load(pointer)
    else:
        block = tl.inline_asm_elementwise(
            "ld.global.nc.b32 $0, [$1];", "=r,l", [pointer], tl.int32, is_pure=True, pack=1
        )
    return block.to(tl.int64)


@triton.jit
def find_blocks(tile, place, shape):
    """The block of a tile's keys, or its two in one int64, the first lower; place: table, _, last.

    `last` is the last key that is of interest.
    """
    table, _, last = place
    number = tile * (shape.keys // BLOCK)
    block = find_block(table, number, last)
    if shape.keys > BLOCK:
        tl.static_assert(shape.keys == 2 * BLOCK)
        block += find_block(table, number + 1, last) << 32
    return block


@triton.jit
def get_spot(block, head, shape):
    """Where a tile's keys lie: each key's block, or one that all share, the head, their slots."""
    slots = tl.arange(0, shape.keys)
    if shape.keys > BLOCK:
        block = tl.where(slots < BLOCK, block & 0xFFFFFFFF, block >> 32)
    return block, head, slots % BLOCK


@triton.jit
def load_tile(start, at, live, shape):
    """Elements (keys, head_pad) of the tile whose rows begin at start + at; 0 where not `live`.

    start: pointer. at (keys,): offsets. live (keys,), or None where all are.
    """
    dims = tl.arange(0, shape.head_pad)
    pointers = start + at[:, None] + dims[None, :]
    if shape.head_dim != shape.head_pad:
        inside = (dims < shape.head_dim)[None, :]
        if live is not None:
            inside = inside & live[:, None]
        tile = tl.load(pointers, mask=inside, other=0.0)
    elif live is not None:
        tile = tl.load(pointers, mask=live[:, None], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def load_scales(start, at, live):
    """Scales (keys,) at start + at; 0 where not `live` (keys,), or None where all are."""
    if live is None:
        scales = tl.load(start + at)
    else:
        scales = tl.load(start + at, mask=live, other=0.0)
    return scales


@triton.jit
def load_keys(pool, spot, live, dtype: tl.constexpr, shape):
    """Keys (keys, head_pad) at `spot` (blocks, head and slots) in `dtype`, without scales."""
    block, head, slots = spot
    at = block * pool.key_block + head * pool.key_head + slots * shape.head_dim
    return widen(load_tile(pool.key, at, live, shape), dtype)


@triton.jit
def scale_scores(scores, pool, spot, live, factor):
    """Scores (rows, keys) times factor and the scales of the keys at `spot`, if they have any."""
    block, head, slots = spot
    if pool.key_scales is None:
        scores = scores * factor
    else:
        at = block * pool.key_scale_block + head * pool.key_scale_head + slots
        scores = scores * (load_scales(pool.key_scales, at, live) * factor)[None, :]
    return scores


@triton.jit
def load_values(pool, spot, live, dtype: tl.constexpr, shape):
    """Values (keys, head_pad) at `spot` in `dtype`, scales multiplied in; 0 where not `live`."""
    block, head, slots = spot
    at = block * pool.value_block + head * pool.value_head + slots * shape.head_dim
    tile = load_tile(pool.value, at, live, shape)
    if pool.value_scales is None:
        values = widen(tile, dtype)
    else:
        at = block * pool.value_scale_block + head * pool.value_scale_head + slots
        scales = load_scales(pool.value_scales, at, live)
        values = (tile.to(tl.float32) * scales[:, None]).to(dtype)
    return values


@triton.jit
def absorb(scores, factor, values, state):
    """One more tile in the running softmax (Dao 2023, FlashAttention-2, §3.1).

    scores (rows, keys), which times factor are in log2 units. state: largest (rows,), the maximum
    of those so far; weight (rows,), the sum of 2^(score - largest); total (rows, head_pad), the
    values so weighted. Returns the three, with this tile.
    """
    largest, weight, total = state
    new_largest = tl.maximum(largest, tl.max(scores, 1) * factor)
    keep = tl.exp2(largest - new_largest)
    weights = tl.exp2(scores * factor - new_largest[:, None])
    weight = weight * keep + tl.sum(weights, 1)
    total = tl.dot(weights.to(values.dtype), values, total * keep[:, None])
    return new_largest, weight, total


@triton.jit
def absorb_pair(scores, factor, values, state):
    """`absorb` of two tiles at once: scores and values are pairs."""
    largest, weight, total = state
    peaks = tl.maximum(tl.max(scores[0], 1), tl.max(scores[1], 1))
    new_largest = tl.maximum(largest, peaks * factor)
    keep = tl.exp2(largest - new_largest)
    left = tl.exp2(scores[0] * factor - new_largest[:, None])
    right = tl.exp2(scores[1] * factor - new_largest[:, None])
    weight = weight * keep + (tl.sum(left, 1) + tl.sum(right, 1))
    total = tl.dot(left.to(values[0].dtype), values[0], total * keep[:, None])
    total = tl.dot(right.to(values[1].dtype), values[1], total)
    return new_largest, weight, total
