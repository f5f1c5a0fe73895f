"""Causal attention of rows with several tokens: FlashAttention-2 over the paged pool.

A program owns a tile of queries of one KV head, the heads that share it packed token by token, and
walks over the keys from the left: first tiles that a window's edge crosses, then tiles that every
query sees whole, then the diagonal. Whole tiles are fetched ahead of use.
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
    absorb_pair,
    bound,
    find_blocks,
    get_boxes,
    get_pool,
    get_shape,
    get_sizes,
    get_spot,
    get_tensors,
    load_keys,
    load_values,
    scale_scores,
)
from twostroke.kernels.cuda.attention_work import Work


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """How a prefill is cut: queries of a program, keys of a tile, warps, tiles in flight.

    boxes: whole tiles are copied by the tensor memory accelerator. registers: a thread's at most, 0
    for as many as it likes.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    boxes: bool = False
    registers: int = 0


def prefill(work: Work, config: PrefillConfig) -> None:
    """Attention of the tokens of `work.step.tiles` into `work.out`."""
    step = work.step
    tiles = step.tiles.shape[0]
    if tiles == 0:
        return
    parts = -(-step.tile_tokens * work.group // config.rows)
    boxes = get_boxes(work) if config.boxes else (None, None)
    prefill_kernel[(tiles * parts, work.kv_heads)](
        get_tensors(work, step.tiles),
        get_pool(work),
        get_sizes(work),
        get_shape(work, config.rows, config.keys, config.stages),
        *boxes,
        num_warps=config.warps,
        num_stages=config.stages,
        maxnreg=config.registers or None,
    )


@triton.jit
def prefill_kernel(tensors, pool, sizes, shape, key_box, value_box):
    """Grid (tiles * parts of a tile, kv_heads); later tiles, which see more keys, go first."""
    parts: tl.constexpr = (shape.tile_tokens * shape.group + shape.rows - 1) // shape.rows
    order = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    row = tl.load(tensors.items + 2 * (order // parts))
    begin = tl.load(tensors.items + 2 * (order // parts) + 1)
    if row < 0:
        return
    offset = tl.load(tensors.offsets + row)
    length = tl.load(tensors.offsets + row + 1) - offset
    past = tl.load(tensors.contexts + row) - length
    start = (order % parts) * shape.rows
    first = begin + start // shape.group
    if first >= length:
        return
    last = tl.minimum(begin + shape.tile_tokens, length) - 1
    last = tl.minimum(last, begin + (start + shape.rows - 1) // shape.group)
    packed = start + tl.arange(0, shape.rows)
    tokens = begin + packed // shape.group
    dims = tl.arange(0, shape.head_pad)
    own = (tokens <= last)[:, None] & (dims < shape.head_dim)[None, :]
    places = (offset + tokens).to(tl.int64)[:, None]
    columns = ((head * shape.group + packed % shape.group) * shape.head_dim)[:, None] + dims[
        None, :
    ]
    q = tl.load(tensors.q + places * sizes.q_token + columns, mask=own, other=0.0)
    place = tensors.tables + row.to(tl.int64) * sizes.table_row, head, past + last
    boxes = key_box, value_box
    total = look(q, (past + tokens, past + first), place, (pool, sizes), boxes, shape)
    tl.store(tensors.out + places * sizes.out_token + columns, total.to(q.dtype), mask=own)


@triton.jit
def look(q, positions, place, memory, boxes, shape):
    """What queries q (rows, head_pad) see of a row's keys: (rows, head_pad) float32.

    positions: of the queries (rows,), and their first.
    """
    positions, first = positions
    _, head, last = place
    _, sizes = memory
    largest = tl.full([shape.rows], UNSEEN, tl.float32)
    weight = tl.zeros([shape.rows], tl.float32)
    total = tl.zeros([shape.rows, shape.head_pad], tl.float32)
    # Every query sees the tiles from `whole` to `diagonal` whole.
    whole = 0
    end = last // shape.keys + 1
    diagonal = (first + 1) // shape.keys
    edge = q, positions, last, sizes.window
    if shape.windowed:
        begin = tl.maximum(first + 1 - sizes.window, 0) // shape.keys
        whole = tl.minimum(tl.cdiv(tl.maximum(last + 1 - sizes.window, 0), shape.keys), end)
        diagonal = tl.maximum(diagonal, whole)
        block = find_blocks(begin, place, shape)
        for tile in tl.range(bound(begin), bound(whole), num_stages=shape.stages):
            # The number of the next tile's block is fetched while this tile is worked on, so that
            # fetching the tile need not wait for it.
            following = find_blocks(tile + 1, place, shape)
            state = largest, weight, total
            spot = block, head
            largest, weight, total = see_edge(tile, edge, spot, state, (memory, boxes), shape)
            block = following
    block = find_blocks(whole, place, shape)
    for tile in tl.range(bound(whole), bound(diagonal), num_stages=shape.stages):
        following = find_blocks(tile + 1, place, shape)
        state = largest, weight, total
        spot = block, head
        largest, weight, total = see_whole(q, spot, state, memory, boxes, shape)
        block = following
    block = find_blocks(diagonal, place, shape)
    for tile in tl.range(bound(diagonal), bound(end), num_stages=shape.stages):
        following = find_blocks(tile + 1, place, shape)
        state = largest, weight, total
        spot = block, head
        largest, weight, total = see_edge(tile, edge, spot, state, (memory, boxes), shape)
        block = following
    return total / weight[:, None]


@triton.jit
def see_whole(q, block, state, memory, boxes, shape):
    """The running softmax `state` with one more tile of keys, which every query sees."""
    pool, sizes = memory
    key_box, value_box = boxes
    if key_box is None:
        spot = get_spot(block[0], block[1], shape)
        scores = tl.dot(q, tl.trans(load_keys(pool, spot, None, q.dtype, shape)))
        values = load_values(pool, spot, None, q.dtype, shape)
        if pool.key_scales is None:
            state = absorb(scores, sizes.factor, values, state)
        else:
            scores = scale_scores(scores, pool, spot, None, sizes.factor)
            state = absorb(scores, 1.0, values, state)
    elif shape.keys == BLOCK:
        scores = tl.dot(q, tl.trans(load_box(key_box, block, shape)))
        state = absorb(scores, sizes.factor, load_box(value_box, block, shape), state)
    else:
        # A box is one block: two of them are two products.
        left = block[0] & 0xFFFFFFFF, block[1]
        right = block[0] >> 32, block[1]
        left_scores = tl.dot(q, tl.trans(load_box(key_box, left, shape)))
        right_scores = tl.dot(q, tl.trans(load_box(key_box, right, shape)))
        values = load_box(value_box, left, shape), load_box(value_box, right, shape)
        state = absorb_pair((left_scores, right_scores), sizes.factor, values, state)
    return state


@triton.jit
def load_box(box, block, shape):
    """All keys or values (BLOCK, head_pad) of a block's head; block: the two."""
    tile = box.load([block[0].to(tl.int32), block[1], 0, 0])
    return tile.reshape(BLOCK, shape.head_pad)


@triton.jit
def see_edge(tile, edge, block, state, places, shape):
    """The running softmax `state` with one more tile, whose keys are hidden from some queries.

    Keys beyond the last one are read as they are, for their scores are replaced; values are not.
    """
    q, positions, last, window = edge
    memory, boxes = places
    pool, sizes = memory
    key_box, _ = boxes
    spot = get_spot(block[0], block[1], shape)
    at = tile * shape.keys + tl.arange(0, shape.keys)
    seen = at[None, :] <= tl.minimum(positions, last)[:, None]
    if shape.windowed:
        seen = seen & (at[None, :] > positions[:, None] - window)
    if key_box is None or shape.keys > BLOCK:
        scores = tl.dot(q, tl.trans(load_keys(pool, spot, None, q.dtype, shape)))
    else:
        scores = tl.dot(q, tl.trans(load_box(key_box, block, shape)))
    scores = scale_scores(scores, pool, spot, None, sizes.factor)
    values = load_values(pool, spot, at <= last, q.dtype, shape)
    return absorb(tl.where(seen, scores, UNSEEN), 1.0, values, state)
