"""Attention over a paged pool, ready to launch; what it means, what plain code makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.cuda_support import draw, poison, to_numpy
from twostroke.kernels.cuda.attention_work import AttentionScratch, Look, Work
from twostroke.kernels.cuda.types import BLOCK_TOKENS, KvLayer, StepTensors
from twostroke.kernels.ops import StepArrays
from twostroke.kernels.reference import ops

F32 = NDArray[np.float32]
EMPTY = np.zeros(0, np.int32)
EIGHT_BIT = (torch.int8, torch.float8_e4m3fn)
# A table's entries beyond a row's end: following one would leave the pool.
NOWHERE = 1 << 28
TILE_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a step: `past` tokens computed before, then `tokens` new ones."""

    past: int
    tokens: int = 1


@dataclass(frozen=True, slots=True)
class Heads:
    """Heads of queries, of keys and values, and dimensions."""

    heads: int
    kv_heads: int
    dim: int = 64


@dataclass(frozen=True, slots=True)
class Kind:
    """Types of activations and of the pool's elements, and the window."""

    dtype: torch.dtype = torch.float16
    element: torch.dtype | None = None
    window: int = 0
    q_scale: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """A launch's work, and its rows' keys and values (context, kv_heads, dim) in float32.

    Of 8-bit pools they are what the elements stand for, the keys rotated as in the pool.
    """

    work: Work
    rows: Sequence[Row]
    keys: list[F32] = field(default_factory=list)
    values: list[F32] = field(default_factory=list)

    def make_scratch(self, places: int | None = None) -> AttentionScratch:
        """Scratch for the case; with `places` for parts."""
        q = self.work.q
        scratch = AttentionScratch.allocate(
            q.device, len(self.rows), q.shape[1], q.shape[2], self.work.step.longest
        )
        if places is not None:
            scratch = replace(scratch, parts=scratch.parts[:places], sums=scratch.sums[:places])
        return scratch


def make_case(rows: Sequence[Row], heads: Heads, kind: Kind, device: str) -> Case:
    """Fresh random numbers, in scattered blocks of a pool that is poisoned everywhere else."""
    rng = np.random.default_rng(torch.initial_seed())
    needed = [-(-(row.past + row.tokens) // BLOCK_TOKENS) for row in rows]
    pool = _make_pool(sum(needed) + 2, heads, kind, device)
    order = rng.permutation(sum(needed) + 2)
    tables = np.full((len(rows), max(needed) + 1), NOWHERE, np.int32)
    tokens = sum(row.tokens for row in rows)
    qkv = draw(rng, (tokens, heads.heads + 2 * heads.kv_heads, heads.dim), kind.dtype, device)
    step = make_step(rows, tables, device)
    scale = heads.dim**-0.5 * kind.q_scale
    if _get_element(kind) in EIGHT_BIT:
        scale /= ops.get_rotated_dims(heads.dim)
    out = poison((tokens, heads.heads * heads.dim), kind.dtype, device)
    work = Work(out, qkv[:, : heads.heads], pool, step, Look(scale, kind.window))
    case = Case(work, rows)
    used = 0
    for index, row in enumerate(rows):
        blocks = order[used : used + needed[index]]
        used += needed[index]
        step.block_tables[index, : len(blocks)] = torch.from_numpy(blocks.astype(np.int32))
        _fill(case, rng, blocks, row.past + row.tokens)
    return case


def make_step(
    rows: Sequence[Row], tables: NDArray[np.int32], device: str, tile: int = TILE_TOKENS
) -> StepTensors:
    """The step of these rows, in order; a row of no past and no tokens is padding with a token."""
    counts = [max(row.tokens, 1) for row in rows]
    offsets = np.cumsum([0, *counts])
    tiles = [
        (i, t) for i, row in enumerate(rows) if row.tokens > 1 for t in range(0, row.tokens, tile)
    ]
    contexts = [row.past + row.tokens for row in rows]

    def place(values: object) -> torch.Tensor:
        return torch.from_numpy(np.array(values, np.int32)).to(device)

    return StepTensors(
        tokens=place([0] * offsets[-1]),
        positions=place([row.past + t for row in rows for t in range(max(row.tokens, 1))]),
        token_rows=place([i for i, count in enumerate(counts) for _ in range(count)]),
        row_offsets=place(offsets),
        contexts=place(contexts),
        block_tables=place(tables),
        logit_rows=place([]),
        decode_rows=place([i for i, row in enumerate(rows) if row.tokens <= 1]),
        tiles=place(tiles).reshape(len(tiles), 2),
        tile_tokens=tile,
        longest=max(contexts),
    )


def compute_exactly(case: Case) -> F32:
    """The reference's result on what the pool stands for."""
    work, rows = case.work, case.rows
    shape = (1, len(rows), work.step.longest, work.kv_heads, work.head_dim)
    kv = ops.ReferenceKV(np.zeros(shape, np.float32), np.zeros(shape, np.float32))
    for row, (keys, values) in enumerate(zip(case.keys, case.values, strict=True)):
        kv.keys[0, row, : len(keys)] = keys
        kv.values[0, row, : len(values)] = values
    step = StepArrays(
        EMPTY,
        work.step.positions.cpu().numpy(),
        work.step.row_offsets.cpu().numpy(),
        np.arange(len(rows), dtype=np.int32)[:, None],
        EMPTY,
    )
    q = to_numpy(work.q).reshape(len(work.q), -1)
    return ops.attention(kv, step, 0, (q, work.look.scale, work.look.window or None))


def compute_plainly(case: Case) -> torch.Tensor:
    """PyTorch's, every operation rounded to the type of the activations."""
    work, dtype = case.work, case.work.q.dtype
    parts = []
    offsets = work.step.row_offsets.tolist()
    for row, (keys, values) in enumerate(zip(case.keys, case.values, strict=True)):
        q = work.q[offsets[row] : offsets[row + 1]].cpu().transpose(0, 1)
        k, v = (
            torch.from_numpy(each).to(dtype).repeat_interleave(work.group, 1).transpose(0, 1)
            for each in (keys, values)
        )
        scores = (q @ k.transpose(1, 2)) * work.look.scale
        positions = torch.arange(len(keys) - q.shape[1], len(keys))[:, None]
        distance = positions - torch.arange(len(keys))
        hidden = (distance < 0) | (distance >= (work.look.window or len(keys) + 1))
        scores = scores.masked_fill(hidden, -torch.inf)
        parts.append((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))
    return torch.cat(parts)


def _get_element(kind: Kind) -> torch.dtype:
    return kind.element or kind.dtype


def _make_pool(blocks: int, heads: Heads, kind: Kind, device: str) -> KvLayer:
    """Two tensors' worth of views of one, as a pool of several layers has them."""
    element = _get_element(kind)
    extents = (blocks, 2, heads.kv_heads, BLOCK_TOKENS, heads.dim)
    if element not in EIGHT_BIT:
        pool = poison(extents, element, device)
        return KvLayer(pool[:, 0], pool[:, 1])
    pool = torch.full(extents, 127, dtype=torch.int8, device=device).view(element)
    scales = poison(extents[:4], torch.float32, device)
    return KvLayer(pool[:, 0], pool[:, 1], scales[:, 0], scales[:, 1])


def _fill(case: Case, rng: np.random.Generator, blocks: NDArray[np.int64], context: int) -> None:
    """Writes a row's keys and values into its blocks, and remembers what they stand for."""
    work = case.work
    shape = (context, work.kv_heads, work.head_dim)
    kv = work.kv
    at = torch.arange(context, device=work.q.device)
    block = torch.from_numpy(blocks).to(work.q.device)[at // BLOCK_TOKENS]
    for is_key, kept in ((True, case.keys), (False, case.values)):
        exact = rng.standard_normal(shape).astype(np.float32)
        pool, scales = (kv.keys, kv.key_scales) if is_key else (kv.values, kv.value_scales)
        if scales is None:
            stored = torch.from_numpy(exact).to(pool.dtype)
        else:
            exact = ops.rotate(exact) if is_key else exact
            largest = 127.0 if pool.dtype == torch.int8 else 448.0
            scale = torch.from_numpy(np.abs(exact).max(-1) / np.float32(largest))
            quotient = torch.from_numpy(exact) / scale[..., None]
            rounded = quotient.round() if pool.dtype == torch.int8 else quotient
            stored = rounded.to(pool.dtype)
            scales[block, :, at % BLOCK_TOKENS] = scale.to(scales.device)
        pool.view(torch.int8 if scales is not None else pool.dtype)[block, :, at % BLOCK_TOKENS] = (
            stored.view(torch.int8 if scales is not None else pool.dtype).to(pool.device)
        )
        meant = stored.float() if scales is None else stored.float() * scale[..., None]
        kept.append(meant.numpy())
