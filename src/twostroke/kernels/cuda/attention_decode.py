"""Attention of rows with one token: split-KV decode over the paged pool, in one launch.

A program owns one KV head of a row, the query heads that share it packed into one tile, and a run
of the row's blocks. Where a row has several runs, each leaves its part in the scratch, and the
program that arrives last puts them together in the order of the runs, so that a result does not
depend on who was last. Runs are cut from contexts that the device reads at launch, so a captured
launch serves contexts that grow.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from twostroke.kernels.cuda.attention_parts import (
    BLOCK,
    UNSEEN,
    absorb,
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
from twostroke.kernels.cuda.attention_work import AttentionScratch, Work
from twostroke.kernels.cuda.overlap import begin_overlapped, can_overlap


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """How a decode is cut: most runs of a row, fewest blocks of a run, warps, tiles in flight."""

    runs: int
    least_blocks: int
    warps: int
    stages: int


def decode(work: Work, scratch: AttentionScratch, config: DecodeConfig) -> None:
    """Attention of the rows `work.step.decode_rows` into `work.out`."""
    rows = work.step.decode_rows.shape[0]
    if rows == 0:
        return
    assert rows * config.runs <= scratch.places, (rows, config.runs, scratch.places)
    assert rows * work.kv_heads <= scratch.arrivals.shape[0], (rows, work.kv_heads)
    packed = max(16, triton.next_power_of_2(work.group))
    overlap = can_overlap(work.q.device)
    decode_kernel[(config.runs, work.kv_heads, rows)](
        get_tensors(work, work.step.decode_rows),
        get_pool(work),
        get_sizes(work),
        get_parts(work, scratch, config.least_blocks),
        get_shape(work, packed, BLOCK.value, config.stages),
        overlap,
        num_warps=config.warps,
        num_stages=config.stages,
        launch_pdl=overlap,
    )


@triton.jit
def decode_kernel(tensors, pool, sizes, parts, shape, overlap: tl.constexpr):
    """Grid (runs, kv_heads, decode rows)."""
    begin_overlapped(overlap)
    run = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.load(tensors.items + tl.program_id(2))
    context = tl.load(tensors.contexts + row)
    token = tl.load(tensors.offsets + row)
    is_owner = tl.load(tensors.offsets + row + 1) > token
    first = 0
    if shape.windowed:
        first = tl.maximum(context - sizes.window, 0) // BLOCK
    blocks = tl.cdiv(context, BLOCK) - first
    length = tl.maximum(tl.cdiv(blocks, tl.num_programs(0)), parts.least)
    runs = tl.cdiv(blocks, length)
    if run >= tl.maximum(runs, 1):
        return
    packed = tl.arange(0, shape.rows)[:, None]
    dims = tl.arange(0, shape.head_pad)[None, :]
    own = (packed < shape.group) & (dims < shape.head_dim)
    columns = (head * shape.group + packed) * shape.head_dim + dims
    q = tl.load(tensors.q + token.to(tl.int64) * sizes.q_token + columns, mask=own, other=0.0)
    begin = first + run * length
    end = tl.minimum(begin + length, first + blocks)
    place = tensors.tables + row.to(tl.int64) * sizes.table_row, head, context - 1
    largest, weight, total = look(q, begin, end, place, (pool, sizes), shape)
    out = tensors.out + token.to(tl.int64) * sizes.out_token
    if runs <= 1:
        # A row without keys is padding; it gets zeros where it has a token.
        total = total / tl.where(weight > 0, weight, 1.0)[:, None]
        tl.store(out + columns, total.to(q.dtype), mask=own & is_owner)
    else:
        leave(largest, weight, total, run, parts, shape)
        # Every thread's part is written before the first one says so.
        tl.debug_barrier()
        arrivals = parts.arrivals + tl.program_id(2) * tl.num_programs(1) + head
        arrived = tl.atomic_add(arrivals, 1, sem="acq_rel")
        if arrived == runs - 1:
            tl.store(arrivals, 0)
            fold(out, q.dtype, runs, parts, shape)


@triton.jit
def look(q, begin, end, place, memory, shape):
    """The running softmax of q (rows, head_pad) over blocks begin … end - 1 of a row."""
    _, head, last = place
    pool, sizes = memory
    largest = tl.full([shape.rows], UNSEEN, tl.float32)
    weight = tl.zeros([shape.rows], tl.float32)
    total = tl.zeros([shape.rows, shape.head_pad], tl.float32)
    slots = tl.arange(0, BLOCK)
    # The number of the next block is fetched while this one is worked on.
    block = find_blocks(begin, place, shape)
    for number in tl.range(bound(begin), bound(end), num_stages=shape.stages):
        following = find_blocks(number + 1, place, shape)
        live = number * BLOCK + slots <= last
        if shape.windowed:
            live = live & (number * BLOCK + slots > last - sizes.window)
        spot = block, head, slots
        scores = tl.dot(q, tl.trans(load_keys(pool, spot, live, q.dtype, shape)))
        scores = scale_scores(scores, pool, spot, live, sizes.factor)
        values = load_values(pool, spot, live, q.dtype, shape)
        scores = tl.where(live[None, :], scores, UNSEEN)
        largest, weight, total = absorb(scores, 1.0, values, (largest, weight, total))
        block = following
    return largest, weight, total


@triton.jit
def leave(largest, weight, total, run, parts, shape):
    """Write this program's part of its row and head to the scratch."""
    heads = tl.num_programs(1) * shape.group
    place = tl.program_id(2) * tl.num_programs(0) + run
    packed = tl.arange(0, shape.rows)
    dims = tl.arange(0, shape.head_pad)[None, :]
    columns = tl.program_id(1) * shape.group + packed
    own = packed < shape.group
    tl.store(parts.sums + 2 * place * heads + columns, largest, mask=own)
    tl.store(parts.sums + (2 * place + 1) * heads + columns, weight, mask=own)
    at = (place * heads + columns[:, None]) * shape.head_dim + dims
    tl.store(parts.totals + at, total, mask=own[:, None] & (dims < shape.head_dim))


@triton.jit
def fold(out, dtype: tl.constexpr, runs, parts, shape):
    """Put the parts of a row and head together, in the order of its runs, and write the result."""
    heads = tl.num_programs(1) * shape.group
    packed = tl.arange(0, parts.group_pad)
    dims = tl.arange(0, shape.head_pad)
    columns = tl.program_id(1) * shape.group + packed
    inside = (packed < shape.group)[:, None] & (dims < shape.head_dim)[None, :]
    cells = columns[:, None] * shape.head_dim + dims[None, :]
    largest = tl.full([parts.group_pad], UNSEEN, tl.float32)
    weight = tl.zeros([parts.group_pad], tl.float32)
    total = tl.zeros([parts.group_pad, shape.head_pad], tl.float32)
    # Parts come from other processors: past the first-level cache, which may hold older ones.
    for begin in tl.range(0, bound(runs), parts.together):
        those = begin + tl.arange(0, parts.together)
        place = tl.program_id(2) * tl.num_programs(0) + those
        here = (those < runs)[:, None] & (packed < shape.group)[None, :]
        at = parts.sums + (2 * place * heads)[:, None] + columns[None, :]
        peaks = tl.load(at, mask=here, other=UNSEEN, cache_modifier=".cg")
        weights = tl.load(at + heads, mask=here, other=0.0, cache_modifier=".cg")
        at = parts.totals + (place * heads * shape.head_dim)[:, None, None] + cells[None, :, :]
        mask = (those < runs)[:, None, None] & inside[None, :, :]
        totals = tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
        new_largest = tl.maximum(largest, tl.max(peaks, 0))
        keep = tl.exp2(largest - new_largest)
        share = tl.exp2(peaks - new_largest[None, :])
        weight = weight * keep + tl.sum(weights * share, 0)
        total = total * keep[:, None] + tl.sum(totals * share[:, :, None], 0)
        largest = new_largest
    weight = tl.where(packed < shape.group, weight, 1.0)
    tl.store(out + cells, (total / weight[:, None]).to(dtype), mask=inside)
