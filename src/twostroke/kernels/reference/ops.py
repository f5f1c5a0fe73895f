"""The op table in plain NumPy, float32, written to be read beside the papers.

It holds weights as float32 matrices and KV as float32 arrays of blocks, and materialises scores.
It is the measure for every other backend and is never tuned; a step's rows are computed one by
one, so no row can influence another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twostroke.kernels.ops import F32, I32, KVShape, OpTable, RopeTable, StepArrays
from twostroke.spec.kv import KvElement


@dataclass(frozen=True, slots=True)
class ReferenceKV:
    """KV of all layers: `keys` and `values` (layers, blocks, block_tokens, kv_heads, head_dim).

    int8 elements have scales, float32 (layers, blocks, block_tokens, kv_heads, 1), and stand for
    element times scale; their keys are rotated (see `rotate`).
    """

    keys: NDArray[Any]
    values: NDArray[Any]
    key_scales: F32 | None = None
    value_scales: F32 | None = None


def get_pool_extents(shape: KVShape) -> tuple[int, int, int, int, int]:
    """The extents of `ReferenceKV.keys` and `.values` for a pool of this shape."""
    return (
        shape.num_layers,
        shape.num_blocks,
        shape.block_tokens,
        shape.num_kv_heads,
        shape.head_dim,
    )


def new_kv(shape: KVShape) -> ReferenceKV:
    """An empty pool of the given shape in its element type."""
    return view_kv(np.zeros(shape.bytes, np.uint8), shape)


def view_kv(memory: NDArray[np.uint8], shape: KVShape) -> ReferenceKV:
    """The pool that lies in `memory`, of `shape.bytes`: all keys, then all values.

    A token's head is its elements, then, of int8, their scale.
    """
    extents = get_pool_extents(shape)
    keys, values = memory.reshape(2, *extents[:-1], -1)
    if shape.element is not KvElement.INT8:
        stored = np.float16 if shape.element is KvElement.F16 else np.float32
        return ReferenceKV(keys.view(stored), values.view(stored))
    dim = shape.head_dim
    elements = (pool[..., :dim].view(np.int8) for pool in (keys, values))
    scales = (pool[..., dim:].view(np.float32) for pool in (keys, values))
    return ReferenceKV(*elements, *scales)


def make_ops(kv: ReferenceKV) -> OpTable:
    """The reference op table over this KV pool."""
    return OpTable(
        name="reference",
        embed=embed,
        rms_norm=rms_norm,
        linear=linear,
        rope=rope,
        write_kv=lambda step, layer, k, v: write_kv(kv, step, layer, (k, v)),
        attention=lambda step, layer, q, scale, window: attention(
            kv, step, layer, (q, scale, window)
        ),
        gated=gated,
        add=lambda x, y: x + y,
        take_rows=lambda step, x: x[step.logit_rows],
        logits=lambda x, weight: linear(x, weight, None),
        all_reduce=lambda x: x,
    )


def embed(step: StepArrays, table: F32, scale: float) -> F32:
    """Rows of `table` (vocab, width) for step.tokens, times scale: (T, width)."""
    rows: F32 = table[step.tokens] * np.float32(scale)
    return rows


def rms_norm(x: F32, weight: F32, eps: float) -> F32:
    """x / sqrt(mean(x^2) + eps) * weight over groups of weight's length (Zhang & Sennrich 2019)."""
    groups = x.reshape(*x.shape[:-1], x.shape[-1] // weight.size, weight.size)
    mean = np.mean(groups * groups, axis=-1, keepdims=True, dtype=np.float32)
    root = np.sqrt(mean + np.float32(eps))
    return np.asarray(groups / root * weight, x.dtype).reshape(x.shape)


def linear(x: F32, weight: F32, bias: F32 | None) -> F32:
    """x (T, in) @ weight (out, in) transposed, plus bias (out,)."""
    y = x @ weight.T
    return y if bias is None else y + bias


def rope(step: StepArrays, x: F32, table: RopeTable) -> F32:
    """Rotates the pairs of every head of x (T, heads*head_dim) (Su et al. 2021, §3.4.2)."""
    half = table.cos.shape[1]
    heads = x.reshape(x.shape[0], -1, 2 * half)
    cos = table.cos[step.positions][:, None, :]
    sin = table.sin[step.positions][:, None, :]
    y = np.empty_like(heads)
    if table.layout == "interleaved":
        first, second = slice(0, None, 2), slice(1, None, 2)
    else:
        first, second = slice(0, half), slice(half, None)
    a, b = heads[..., first], heads[..., second]
    y[..., first] = a * cos - b * sin
    y[..., second] = b * cos + a * sin
    return y.reshape(x.shape)


def write_kv(kv: ReferenceKV, step: StepArrays, layer: int, pair: tuple[F32, F32]) -> None:
    """Stores k and v (T, kv_heads*head_dim) in the blocks of their tokens' positions."""
    block_tokens, kv_heads, head_dim = kv.keys.shape[2:]
    for row in range(len(step.row_offsets) - 1):
        tokens = slice(step.row_offsets[row], step.row_offsets[row + 1])
        positions = step.positions[tokens]
        at = (layer, step.block_tables[row, positions // block_tokens], positions % block_tokens)
        keys, values = (array[tokens].reshape(-1, kv_heads, head_dim) for array in pair)
        if kv.key_scales is None or kv.value_scales is None:
            if kv.keys.dtype == np.float16:
                keys, values = clamp(keys), clamp(values)
            kv.keys[at], kv.values[at] = keys, values
        else:
            kv.keys[at], kv.key_scales[at] = round_to_int8(rotate(clamp(keys)))
            kv.values[at], kv.value_scales[at] = round_to_int8(clamp(values))


def clamp(x: F32) -> F32:
    """x within the range of f16."""
    clamped: F32 = np.clip(x, np.float32(-65504), np.float32(65504))
    return clamped


def round_to_int8(x: F32) -> tuple[NDArray[np.int8], F32]:
    """x (..., head_dim) as int8 elements and scales (..., 1): x is about element * scale.

    The scale is max |x| / 127; an element is x * (127 / max |x|), rounded to nearest even. A head
    below 1e-30 becomes zeros.
    """
    largest = np.abs(x).max(axis=-1, keepdims=True)
    inverse = np.float32(127) / np.where(largest > 1e-30, largest, np.float32(np.inf))
    return np.rint(x * inverse).astype(np.int8), largest / np.float32(127)


def get_rotated_dims(head_dim: int) -> int:
    """How many dimensions are rotated together: the largest power of two in head_dim."""
    return head_dim & -head_dim


def rotate(x: F32) -> F32:
    """H x of every n = get_rotated_dims dimensions of x (..., head_dim), H being Walsh-Hadamard.

    It spreads a dimension far larger than the rest over all, so that one scale serves them
    (Ashkboos et al. 2024, QuaRot, §3). H is symmetric, of ±1, and H H = n: q . k is
    (H q) . (H k) / n. Sixteen dimensions are one sum in order, then come pairs of such sums 1, 2,
    4 … apart, as native code adds.
    """
    size = get_rotated_dims(x.shape[-1])
    lanes = min(size, 16)
    parts = x.reshape(*x.shape[:-1], -1, lanes)
    sums = sum(parts[..., j, None] * signs for j, signs in enumerate(_get_signs(lanes)))
    assert not isinstance(sums, int)
    apart = 1
    while apart < size // lanes:
        a, b = np.moveaxis(sums.reshape(*x.shape[:-1], -1, 2, apart, lanes), -3, 0)
        sums = np.stack([a + b, a - b], axis=-3)
        apart *= 2
    rotated: F32 = sums.reshape(x.shape)
    return rotated


def _get_signs(size: int) -> F32:
    """The transform of `size` dimensions: -1 where i and j share an odd number of bits."""
    shared = np.arange(size)[:, None] & np.arange(size)
    return np.array(
        [[(-1) ** number.bit_count() for number in row] for row in shared.tolist()], np.float32
    )


def attention(
    kv: ReferenceKV, step: StepArrays, layer: int, query: tuple[F32, float, int | None]
) -> F32:
    """softmax(scale q k^T + causal and window mask) v over each row's own blocks.

    query is (q (T, heads*head_dim), scale, window). Grouped heads share KV heads in order.
    """
    q, scale, window = query
    block_tokens, kv_heads, head_dim = kv.keys.shape[2:]
    y = np.empty_like(q)
    for row in range(len(step.row_offsets) - 1):
        tokens = slice(step.row_offsets[row], step.row_offsets[row + 1])
        positions = step.positions[tokens]
        length = int(positions[-1]) + 1
        blocks = step.block_tables[row, : -(-length // block_tokens)]
        k = _load(kv.keys, kv.key_scales, layer, blocks)[:length]
        v = _load(kv.values, kv.value_scales, layer, blocks)[:length]
        heads = q[tokens].reshape(len(positions), kv_heads, -1, head_dim) * np.float32(scale)
        if kv.key_scales is not None:
            heads = rotate(heads / np.float32(get_rotated_dims(head_dim)))
        scores = np.einsum("tghd,kgd->tghk", heads, k, optimize=True)
        distance = positions[:, None] - np.arange(length)[None, :]
        hidden = (distance < 0) | (distance >= (window or length + 1))
        scores = np.where(hidden[:, None, None, :], np.float32(-np.inf), scores)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        y[tokens] = np.einsum("tghk,kgd->tghd", weights, v, optimize=True).reshape(
            len(positions), -1
        )
    return y


def _load(pool: NDArray[Any], scales: F32 | None, layer: int, blocks: I32) -> F32:
    """These blocks' keys or values as float32 (tokens, kv_heads, head_dim)."""
    stored: F32 = pool[layer, blocks].astype(np.float32)
    if scales is not None:
        stored *= scales[layer, blocks]
    return stored.reshape(-1, *pool.shape[-2:])


def gated(gate: F32, up: F32, activation: str) -> F32:
    """activation(gate) * up: silu (Elfwing et al. 2018) or the tanh form of gelu."""
    if activation == "silu":
        sigmoid: F32 = np.exp(-np.logaddexp(np.float32(0), -gate))
        return gate * sigmoid * up
    inner = np.float32(np.sqrt(2 / np.pi)) * (gate + np.float32(0.044715) * gate**3)
    tanh: F32 = np.tanh(inner)
    return np.float32(0.5) * gate * (1 + tanh) * up
