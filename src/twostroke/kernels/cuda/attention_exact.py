"""Attention whose bits for a token depend on its own keys alone: one kernel for both strokes.

Tiles have the same shape for every query: 64 of them, packed token by token and head by head, and
64 keys, so that every product is made of the same instructions. Keys are cut into segments of 1024
that begin at multiples of 1024 positions. A segment has a running softmax of its own, and segments
are folded from the left with explicit fused multiply-adds: in registers where a program walks over
all of them, or out of the scratch, by the last program to arrive, where each has its own program. A
tile or segment that a query does not see changes none of its numbers, so where walks begin does not
matter.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from twostroke.kernels.cuda.attention_parts import (
    BLOCK,
    UNSEEN,
    bound,
    find_blocks,
    get_parts,
    get_pool,
    get_shape,
    get_sizes,
    get_tensors,
    load_keys,
    load_values,
    scale_scores,
)
from twostroke.kernels.cuda.attention_work import SEGMENT_TOKENS, AttentionScratch, Work
from twostroke.kernels.cuda.types import BLOCK_TOKENS, Tensor

SEGMENT: tl.constexpr = tl.constexpr(SEGMENT_TOKENS // BLOCK_TOKENS)
# Queries of a program.
ROWS = 64


class Cut(NamedTuple):
    """How a launch is cut, in numbers that the compiler does not specialise on (see `_hide`).

    width: integers of an item, which is a row, or a row and a first token. tokens, parts: of an
    item. is_split: whether every segment has its own program.
    """

    width: Any
    tokens: Any
    parts: Any
    is_split: Any


def attend_exact(work: Work, scratch: AttentionScratch) -> None:
    """Attention of all tokens of the step into `work.out`."""
    step = work.step
    rows = step.decode_rows.shape[0]
    segments = -(-step.longest // SEGMENT_TOKENS)
    if work.look.window:
        segments = min(segments, -(-(work.look.window - 1) // SEGMENT_TOKENS) + 1)
    parts = -(-work.group // ROWS)
    if rows * parts * segments > scratch.places:
        segments = 1
    _launch(work, scratch, (step.decode_rows, 1, 1), segments)
    _launch(work, scratch, (step.tiles, 2, step.tile_tokens), 1)


def _launch(
    work: Work, scratch: AttentionScratch, items: tuple[Tensor, int, int], segments: int
) -> None:
    """One launch over items (tensor, integers of one, tokens of one) with programs per segment."""
    tensor, width, tokens = items
    if tensor.shape[0] == 0:
        return
    parts = -(-tokens * work.group // ROWS)
    cut = Cut(*(_hide(number) for number in (width, tokens, parts, int(segments > 1))))
    assert segments == 1 or tensor.shape[0] * parts * work.kv_heads <= scratch.arrivals.shape[0]
    stages = 2 if work.head_dim > 128 else 3
    exact_kernel[(segments, work.kv_heads, tensor.shape[0] * parts)](
        cut,
        get_tensors(work, tensor),
        get_pool(work),
        get_sizes(work),
        get_parts(work, scratch, 1),
        get_shape(work, ROWS, BLOCK_TOKENS, stages),
        num_warps=4 if work.head_dim <= 64 else 8,
        num_stages=stages,
    )


def _hide(number: int) -> int:
    """An odd number above one: ones and multiples of 16 would be compiled into a kernel apart."""
    return 2 * number + 3


@triton.jit
def show(hidden):
    """The number that `_hide` hid."""
    return (hidden - 3) // 2


@triton.jit
def exact_kernel(cut, tensors, pool, sizes, parts, shape):
    """Grid (segments if they are split, kv_heads, items * parts of an item)."""
    head = tl.program_id(1)
    item_parts = show(cut.parts)
    is_split = show(cut.is_split) != 0
    start = tl.program_id(2) % item_parts * shape.rows
    at = tl.program_id(2) // item_parts * show(cut.width)
    row = tl.load(tensors.items + at)
    begin = tl.load(tensors.items + at + 1, mask=show(cut.width) > 1, other=0)
    if row < 0:
        return
    offset = tl.load(tensors.offsets + row)
    length = tl.load(tensors.offsets + row + 1) - offset
    past = tl.load(tensors.contexts + row) - length
    first = begin + start // shape.group
    if first >= length:
        return
    last = tl.minimum(begin + show(cut.tokens), length) - 1
    last = tl.minimum(last, begin + (start + shape.rows - 1) // shape.group)
    packed = start + tl.arange(0, shape.rows)
    tokens = begin + packed // shape.group
    dims = tl.arange(0, shape.head_pad)
    is_own = tokens <= last
    own = is_own[:, None] & (dims < shape.head_dim)[None, :]
    places = (offset + tokens).to(tl.int64)[:, None]
    heads = head * shape.group + packed % shape.group
    columns = (heads * shape.head_dim)[:, None] + dims[None, :]
    q = tl.load(tensors.q + places * sizes.q_token + columns, mask=own, other=0.0)
    # Segments from the first that a query sees to the last, or the one that is this program's.
    lowest = 0
    if shape.windowed:
        lowest = tl.maximum(past + first + 1 - sizes.window, 0) // BLOCK
    segment = lowest // SEGMENT + tl.program_id(0)
    # Of a row without keys past + last is -1, whose quotient is 0 on a device.
    end = tl.cdiv(tl.cdiv(past + last + 1, BLOCK), SEGMENT)
    segments = end - lowest // SEGMENT
    if tl.program_id(0) >= tl.maximum(segments, 1):
        return
    if is_split:
        end = tl.minimum(segment + 1, end)
    place = tensors.tables + row.to(tl.int64) * sizes.table_row, head, past + last
    reach = segment, end, lowest
    state = look(q, past + tokens, reach, place, (pool, sizes), shape)
    _, weight, total = state
    is_last = True
    if is_split & (segments > 1):
        leave(state, heads, is_own, parts, shape)
        # Every thread's part is written before the first one says so.
        tl.debug_barrier()
        arrivals = parts.arrivals + tl.program_id(2) * tl.num_programs(1) + head
        is_last = tl.atomic_add(arrivals, 1, sem="acq_rel") == segments - 1
        if is_last:
            tl.store(arrivals, 0)
            _, weight, total = gather(segments, heads, is_own, parts, shape)
    # A row without keys is padding; it gets zeros.
    total = total / tl.where(weight > 0, weight, 1.0)[:, None]
    out = tensors.out + places * sizes.out_token + columns
    tl.store(out, total.to(q.dtype), mask=own & is_last)


@triton.jit
def look(q, positions, reach, place, memory, shape):
    """Segments folded from the left: maxima, weights and totals of q (rows, head_pad)."""
    segment, end, lowest = reach
    _, _, last = place
    all_largest = tl.full([shape.rows], UNSEEN, tl.float32)
    all_weight = tl.zeros([shape.rows], tl.float32)
    all_total = tl.zeros([shape.rows, shape.head_pad], tl.float32)
    for number in tl.range(bound(segment), bound(end), num_stages=1):
        begin = tl.maximum(number * SEGMENT, lowest)
        finish = tl.minimum(number * SEGMENT + SEGMENT, tl.cdiv(last + 1, BLOCK))
        part = look_at_segment(q, positions, (begin, finish), place, memory, shape)
        whole = fold((all_largest, all_weight, all_total), part)
        all_largest, all_weight, all_total = whole
    return all_largest, all_weight, all_total


@triton.jit
def look_at_segment(q, positions, reach, place, memory, shape):
    """The running softmax of q over the blocks from `begin` to `finish`."""
    begin, finish = reach
    _, head, last = place
    pool, sizes = memory
    largest = tl.full([shape.rows], UNSEEN, tl.float32)
    weight = tl.zeros([shape.rows], tl.float32)
    total = tl.zeros([shape.rows, shape.head_pad], tl.float32)
    slots = tl.arange(0, BLOCK)
    block = find_blocks(begin, place, shape)
    for tile in tl.range(bound(begin), bound(finish), num_stages=shape.stages):
        following = find_blocks(tile + 1, place, shape)
        at = tile * BLOCK + slots
        seen = at[None, :] <= tl.minimum(positions, last)[:, None]
        if shape.windowed:
            seen = seen & (at[None, :] > positions[:, None] - sizes.window)
        spot = block, head, slots
        scores = tl.dot(q, tl.trans(load_keys(pool, spot, None, q.dtype, shape)))
        scores = tl.where(seen, scale_scores(scores, pool, spot, None, sizes.factor), UNSEEN)
        values = load_values(pool, spot, at <= last, q.dtype, shape)
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        keep = tl.exp2(largest - new_largest)
        weights = tl.where(seen, tl.exp2(scores - new_largest[:, None]), 0.0)
        weight = weight * keep + tl.sum(weights, 1)
        total = tl.dot(weights.to(values.dtype), values, total * keep[:, None])
        largest = new_largest
        block = following
    return largest, weight, total


@triton.jit
def fold(left, right):
    """Two running softmaxes as one; fused where it says so and nowhere else."""
    left_largest, left_weight, left_total = left
    right_largest, right_weight, right_total = right
    largest = tl.maximum(left_largest, right_largest)
    keep = tl.exp2(left_largest - largest)
    share = tl.exp2(right_largest - largest)
    weight = tl.fma(left_weight, keep, right_weight * share)
    keep = tl.broadcast_to(keep[:, None], left_total.shape)
    total = tl.fma(left_total, keep, right_total * share[:, None])
    return largest, weight, total


@triton.jit
def leave(state, heads, is_own, parts, shape):
    """Write this program's segment of its rows to the scratch."""
    largest, weight, total = state
    count = tl.num_programs(1) * shape.group
    place = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    dims = tl.arange(0, shape.head_pad)
    tl.store(parts.sums + 2 * place * count + heads, largest, mask=is_own)
    tl.store(parts.sums + (2 * place + 1) * count + heads, weight, mask=is_own)
    at = (place * count + heads)[:, None] * shape.head_dim + dims[None, :]
    own = is_own[:, None] & (dims < shape.head_dim)[None, :]
    tl.store(parts.totals + at, total, mask=own)


@triton.jit
def gather(segments, heads, is_own, parts, shape):
    """The segments that programs have left, folded from the left."""
    count = tl.num_programs(1) * shape.group
    dims = tl.arange(0, shape.head_pad)
    own = is_own[:, None] & (dims < shape.head_dim)[None, :]
    all_largest = tl.full([shape.rows], UNSEEN, tl.float32)
    all_weight = tl.zeros([shape.rows], tl.float32)
    all_total = tl.zeros([shape.rows, shape.head_pad], tl.float32)
    for number in tl.range(0, bound(segments), num_stages=1):
        place = tl.program_id(2) * tl.num_programs(0) + number
        at = parts.sums + 2 * place * count + heads
        largest = tl.load(at, mask=is_own, other=UNSEEN, cache_modifier=".cg")
        weight = tl.load(at + count, mask=is_own, other=0.0, cache_modifier=".cg")
        at = (place * count + heads)[:, None] * shape.head_dim + dims[None, :]
        total = tl.load(parts.totals + at, mask=own, other=0.0, cache_modifier=".cg")
        whole = fold((all_largest, all_weight, all_total), (largest, weight, total))
        all_largest, all_weight, all_total = whole
    return all_largest, all_weight, all_total
