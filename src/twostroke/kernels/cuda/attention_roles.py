"""Causal attention of rows with several tokens, by warps with roles: for NVIDIA's Hopper.

As attention_prefill.py, but one warp group only copies tiles, and two others, of 64 queries each,
compute at their own pace, so that one multiplies while the other weighs its scores. The compiler
deals out the roles (tl.range: warp_specialize), and wants for it: queries that are copied whole, so
that a program has one head; one loop, so that every tile is masked; no way out before the end. It
reads blocks of keys and values whole, also beyond a row's end, where whatever the pool holds must
be finite: it is multiplied by zero.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from twostroke.kernels.cuda.attention_parts import (
    BLOCK,
    UNSEEN,
    absorb,
    bound,
    find_block,
    get_boxes,
    get_shape,
    get_sizes,
    get_tensors,
)
from twostroke.kernels.cuda.attention_work import Work
from twostroke.kernels.cuda.types import BLOCK_TOKENS

# Queries of a program: the tiles that a step is cut into.
ROWS = 128


@dataclass(frozen=True, slots=True)
class RolesConfig:
    """Tiles in flight."""

    stages: int


def can_prefill(work: Work) -> bool:
    """Whether the kernel takes this work: its tiles, types, and the processor."""
    device = work.q.device
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] != 9:
        return False
    is_plain = work.kv.keys.dtype == work.q.dtype
    return is_plain and work.step.tile_tokens == ROWS and work.head_dim <= 128


def prefill_by_roles(work: Work, config: RolesConfig) -> None:
    """Attention of the tokens of `work.step.tiles` into `work.out`."""
    step = work.step
    tiles = step.tiles.shape[0]
    if tiles == 0:
        return
    assert can_prefill(work), work.kv.keys.dtype
    tokens, heads, head_dim = work.q.shape
    q = work.q.as_strided((tokens, heads * head_dim), (work.q.stride(0), 1))
    shape = get_shape(work, ROWS, BLOCK_TOKENS, config.stages)
    roles_kernel[(tiles, heads)](
        get_tensors(work, step.tiles),
        get_sizes(work),
        shape,
        TensorDescriptor(q, list(q.shape), list(q.stride()), [ROWS, shape.head_pad.value]),
        *get_boxes(work),
        num_warps=4,
        num_stages=config.stages,
    )


@triton.jit
def roles_kernel(tensors, sizes, shape, q_box, key_box, value_box):
    """Grid (tiles, heads); later tiles, which see more keys, go first."""
    order = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    number = tl.load(tensors.items + 2 * order)
    begin = tl.load(tensors.items + 2 * order + 1)
    row = tl.maximum(number, 0)
    offset = tl.load(tensors.offsets + row)
    length = tl.load(tensors.offsets + row + 1) - offset
    past = tl.load(tensors.contexts + row) - length
    last = past + tl.minimum(begin + shape.rows, length) - 1
    table = tensors.tables + row.to(tl.int64) * sizes.table_row
    tokens = begin + tl.arange(0, shape.rows)
    q = q_box.load([offset + begin, head * shape.head_dim])
    largest = tl.full([shape.rows], UNSEEN, tl.float32)
    weight = tl.zeros([shape.rows], tl.float32)
    total = tl.zeros([shape.rows, shape.head_pad], tl.float32)
    start = 0
    if shape.windowed:
        start = tl.maximum(past + begin + 1 - sizes.window, 0) // BLOCK
    end = last // BLOCK + 1
    for tile in tl.range(bound(start), bound(end), num_stages=shape.stages, warp_specialize=True):
        block = find_block(table, tile, last).to(tl.int32)
        keys = key_box.load([block, head // shape.group, 0, 0])
        scores = tl.dot(q, keys.reshape(BLOCK, shape.head_pad).T)
        at = tile * BLOCK + tl.arange(0, BLOCK)
        seen = at[None, :] <= (past + tokens)[:, None]
        values = value_box.load([block, head // shape.group, 0, 0])
        values = values.reshape(BLOCK, shape.head_pad)
        state = largest, weight, total
        if shape.windowed:
            seen = seen & (at[None, :] > (past + tokens)[:, None] - sizes.window)
            scores = tl.where(seen, scores * sizes.factor, UNSEEN)
            largest, weight, total = absorb(scores, 1.0, values, state)
        else:
            # Every query sees the first key: no maximum is ever UNSEEN times the factor, which a
            # fused multiply-add would not get back to zero.
            scores = tl.where(seen, scores, UNSEEN)
            largest, weight, total = absorb(scores, sizes.factor, values, state)
    dims = tl.arange(0, shape.head_pad)
    own = ((tokens < length) & (number >= 0))[:, None] & (dims < shape.head_dim)[None, :]
    places = (offset + tokens).to(tl.int64)[:, None] * sizes.out_token
    out = tensors.out + places + head * shape.head_dim + dims[None, :]
    tl.store(out, (total / weight[:, None]).to(q.dtype), mask=own)
