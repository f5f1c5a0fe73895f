"""The GPU's rope and KV write against the NumPy reference, and against plain PyTorch's error."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kernels.cuda_support import HALVES, assert_as_exact_as_plain, draw, poison, to_numpy
from twostroke.kernels.cuda.rope import HeadRope, HeadShape, rope_write
from twostroke.kernels.cuda.types import BLOCK_TOKENS, KvLayer, StepTensors
from twostroke.kernels.ops import RopeTable, StepArrays
from twostroke.kernels.reference import ops

F32 = NDArray[np.float32]
EPS = 1e-6
EMPTY = np.zeros(0, np.int32)
# The last of a step's tokens is padding.
POSITIONS = np.array([70, 62, 63, 64, 65, 0, 200, 5], np.int32)
ROWS = np.array([0, 1, 1, 1, 1, 2, 3, -1], np.int32)
TABLES = np.array([[3, 7, -1, -1], [9, 2, -1, -1], [0, -1, -1, -1], [1, 4, 6, 5]], np.int32)
BLOCKS = 10


@dataclass(frozen=True, slots=True)
class Case:
    """One layer's q, k, v, where they go, and what is done to them."""

    qkv: torch.Tensor
    step: StepTensors
    rope: HeadRope


def make_case(
    shape: HeadShape, dtype: torch.dtype, device: str, has_norms: bool = False, scale: float = 1.0
) -> Case:
    rng = np.random.default_rng(torch.initial_seed())
    dim = shape.head_dim
    width = (shape.heads + 2 * shape.kv_heads) * dim
    angles = np.arange(256)[:, None] / 100 ** (np.arange(dim // 2) / (dim // 2))
    cos, sin = (
        torch.from_numpy(each.astype(np.float32)).to(device)
        for each in (np.cos(angles), np.sin(angles))
    )
    norms = [draw(rng, (dim,), dtype, device) if has_norms else None for _ in range(2)]
    empty = torch.from_numpy(EMPTY).to(device)
    positions, rows, tables = (torch.from_numpy(x).to(device) for x in (POSITIONS, ROWS, TABLES))
    step = StepTensors(
        empty, positions, rows, empty, empty, tables, empty, empty, empty, tile_tokens=16, longest=0
    )
    qkv = draw(rng, (len(POSITIONS), width), dtype, device) * scale
    return Case(qkv, step, HeadRope(shape, cos, sin, norms[0], norms[1], EPS))


def make_pool(shape: HeadShape, element: torch.dtype, device: str) -> KvLayer:
    """A pool whose elements show whether they were written."""
    extents = (BLOCKS, shape.kv_heads, BLOCK_TOKENS, shape.head_dim)
    if element not in (torch.int8, torch.float8_e4m3fn):
        keys, values = poison((2, *extents), element, device)
        return KvLayer(keys, values)
    keys, values = torch.full((2, *extents), 77, dtype=torch.int8, device=device).view(element)
    key_scales, value_scales = poison((2, *extents[:3]), torch.float32, device)
    return KvLayer(keys, values, key_scales, value_scales)


def split(case: Case) -> tuple[F32, F32, F32]:
    """q, k and v of the tokens that are not padding, in float32."""
    shape = case.rope.shape
    q_width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    parts = np.split(to_numpy(case.qkv)[ROWS >= 0], [q_width, q_width + kv_width], axis=1)
    return parts[0], parts[1], parts[2]


def compute_exactly(case: Case) -> tuple[F32, F32, F32]:
    """The reference's q and k after norm and rotation, and v."""
    q, k, v = split(case)
    if case.rope.q_norm is not None and case.rope.k_norm is not None:
        q = ops.rms_norm(q, to_numpy(case.rope.q_norm), EPS)
        k = ops.rms_norm(k, to_numpy(case.rope.k_norm), EPS)
    table = RopeTable(case.rope.cos.cpu().numpy(), case.rope.sin.cpu().numpy(), "half")
    step = StepArrays(EMPTY, POSITIONS[ROWS >= 0], EMPTY, TABLES, EMPTY)
    return ops.rope(step, q, table), ops.rope(step, k, table), v


def compute_plainly(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """PyTorch's q and k, every operation rounded to the dtype."""
    shape, dtype = case.rope.shape, case.qkv.dtype
    results = []
    for x, norm in zip(split(case)[:2], (case.rope.q_norm, case.rope.k_norm), strict=True):
        heads = torch.from_numpy(x).to(dtype).reshape(len(x), -1, shape.head_dim)
        if norm is not None:
            heads = torch.nn.functional.rms_norm(heads, norm.shape, norm.cpu(), EPS)
        positions = torch.from_numpy(POSITIONS[ROWS >= 0]).long()
        cos, sin = (
            each.cpu()[positions].to(dtype)[:, None] for each in (case.rope.cos, case.rope.sin)
        )
        a, b = heads.chunk(2, dim=-1)
        results.append(torch.cat([a * cos - b * sin, b * cos + a * sin], -1).reshape(len(x), -1))
    return results[0], results[1]


def read(pool: torch.Tensor) -> torch.Tensor:
    """What lies at the places of the tokens that are not padding: (tokens, kv_heads, …)."""
    rows, positions = ROWS[ROWS >= 0], POSITIONS[ROWS >= 0]
    blocks = torch.from_numpy(TABLES[rows, positions // BLOCK_TOKENS]).long().to(pool.device)
    slots = torch.from_numpy(positions % BLOCK_TOKENS).long().to(pool.device)
    bits = pool.view(torch.uint8) if pool.dtype == torch.float8_e4m3fn else pool
    return bits[blocks, :, slots].view(pool.dtype)


def count_written(pool: torch.Tensor) -> int:
    """Heads of tokens in a poisoned pool of floats that are no longer poisoned."""
    return int((~torch.isnan(pool.float())).all(-1).sum())


SHAPES = [
    (HeadShape(5, 2, 64), False),
    (HeadShape(4, 1, 128), True),
    (HeadShape(3, 3, 80), False),
    (HeadShape(3, 1, 112), True),
    (HeadShape(8, 2, 16), True),
]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("shape", "has_norms"), SHAPES)
def test_rotates_and_stores(
    device: str, dtype: torch.dtype, shape: HeadShape, has_norms: bool
) -> None:
    case = make_case(shape, dtype, device, has_norms)
    exact_q, exact_k, _ = compute_exactly(case)
    plain_q, plain_k = compute_plainly(case)
    pool = make_pool(shape, dtype, device)
    q_out = poison((len(POSITIONS), shape.heads * shape.head_dim), dtype, device)
    rope_write(q_out, case.qkv, case.step, pool, case.rope)
    assert_as_exact_as_plain(q_out[:-1], plain_q, exact_q)
    assert_as_exact_as_plain(read(pool.keys).flatten(1), plain_k, exact_k)
    v = case.qkv[:-1, (shape.heads + shape.kv_heads) * shape.head_dim :]
    assert torch.equal(read(pool.values).flatten(1), v)
    for written in (pool.keys, pool.values):
        assert count_written(written) == 7 * shape.kv_heads


def test_rotates_queries_in_place(device: str) -> None:
    shape = HeadShape(7, 2, 64)
    case = make_case(shape, torch.float16, device, has_norms=True)
    width = shape.heads * shape.head_dim
    q_out = poison((len(POSITIONS), width), torch.float16, device)
    apart, within = (make_pool(shape, torch.float16, device) for _ in range(2))
    rope_write(q_out, case.qkv, case.step, apart, case.rope)
    rest = case.qkv[:, width:].clone()
    rope_write(case.qkv[:, :width], case.qkv, case.step, within, case.rope)
    assert torch.equal(case.qkv[:-1, :width], q_out[:-1])
    assert torch.equal(case.qkv[:, width:], rest)
    assert torch.equal(read(within.keys), read(apart.keys))


def test_a_pool_of_float32_takes_more_than_float16_could(device: str) -> None:
    shape = HeadShape(2, 1, 32)
    case = make_case(shape, torch.bfloat16, device, scale=1e5)
    exact = compute_exactly(case)
    pool = make_pool(shape, torch.float32, device)
    q_out = poison((len(POSITIONS), 64), torch.bfloat16, device)
    rope_write(q_out, case.qkv, case.step, pool, case.rope)
    np.testing.assert_allclose(to_numpy(read(pool.keys))[:, 0], exact[1], rtol=1e-5, atol=0.1)
    np.testing.assert_array_equal(to_numpy(read(pool.values))[:, 0], exact[2])


def test_a_pool_of_float16_clamps_what_bfloat16_exceeds(device: str) -> None:
    shape = HeadShape(2, 1, 32)
    case = make_case(shape, torch.bfloat16, device, scale=1e5)
    _, k, v = compute_exactly(case)
    pool = make_pool(shape, torch.float16, device)
    q_out = poison((len(POSITIONS), 64), torch.bfloat16, device)
    rope_write(q_out, case.qkv, case.step, pool, case.rope)
    np.testing.assert_allclose(to_numpy(read(pool.keys))[:, 0], ops.clamp(k), rtol=2e-3, atol=0.1)
    np.testing.assert_array_equal(
        to_numpy(read(pool.values))[:, 0], ops.clamp(v).astype(np.float16).astype(np.float32)
    )


EIGHT_BIT_SHAPES = [
    HeadShape(3, 2, 64), HeadShape(4, 1, 128), HeadShape(2, 1, 96), HeadShape(2, 1, 112),
    HeadShape(2, 1, 256), HeadShape(2, 2, 16), HeadShape(2, 1, 32),
]  # fmt: skip


@pytest.mark.parametrize("shape", EIGHT_BIT_SHAPES)
def test_stores_whole_numbers_of_transformed_keys(device: str, shape: HeadShape) -> None:
    case = make_case(shape, torch.float16, device, has_norms=True)
    q, k, v = compute_exactly(case)
    pool = make_pool(shape, torch.int8, device)
    q_out = poison((len(POSITIONS), shape.heads * shape.head_dim), torch.float16, device)
    rope_write(q_out, case.qkv, case.step, pool, case.rope)
    assert pool.key_scales is not None
    assert pool.value_scales is not None
    dim = shape.head_dim
    transformed = ops.rotate(q.reshape(-1, dim)).reshape(q.shape)
    np.testing.assert_allclose(to_numpy(q_out[:-1]), transformed, rtol=1e-3, atol=2e-3)
    expected = [ops.rotate(k.reshape(7, -1, dim)), v.reshape(7, -1, dim)]
    pools = [(pool.keys, pool.key_scales), (pool.values, pool.value_scales)]
    for (stored, scales), heads in zip(pools, expected, strict=True):
        elements, exact_scales = ops.round_to_int8(ops.clamp(heads))
        np.testing.assert_allclose(to_numpy(read(scales)), exact_scales[..., 0], rtol=1e-5)
        difference = np.abs(to_numpy(read(stored)) - elements)
        # Sums in another order may fall to the other side of a half: seldom, and by one.
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.01
    assert int((~torch.isnan(pool.key_scales)).sum()) == 7 * shape.kv_heads


@pytest.mark.parametrize("dtype", HALVES)
def test_stores_small_floats_of_transformed_keys(device: str, dtype: torch.dtype) -> None:
    shape = HeadShape(3, 2, 64)
    case = make_case(shape, dtype, device)
    _, k, v = compute_exactly(case)
    pool = make_pool(shape, torch.float8_e4m3fn, device)
    q_out = poison((len(POSITIONS), shape.heads * shape.head_dim), dtype, device)
    rope_write(q_out, case.qkv, case.step, pool, case.rope)
    assert pool.key_scales is not None
    assert pool.value_scales is not None
    expected = [ops.rotate(k.reshape(7, -1, 64)), v.reshape(7, -1, 64)]
    pools = [(pool.keys, pool.key_scales), (pool.values, pool.value_scales)]
    for (stored, scales), heads in zip(pools, expected, strict=True):
        largest = np.abs(heads).max(-1, keepdims=True)
        plain = torch.from_numpy(heads / largest * 448).to(torch.float8_e4m3fn).float()
        plain *= torch.from_numpy(largest) / 448
        result = read(stored).float().cpu() * read(scales)[..., None].cpu()
        np.testing.assert_allclose(to_numpy(read(scales)), largest[..., 0] / 448, rtol=1e-5)
        assert_as_exact_as_plain(result, plain, heads)


@pytest.mark.parametrize("element", [torch.int8, torch.float8_e4m3fn])
def test_a_head_of_zeros_stays_zeros(device: str, element: torch.dtype) -> None:
    shape = HeadShape(1, 1, 64)
    case = make_case(shape, torch.float16, device, scale=0.0)
    pool = make_pool(shape, element, device)
    q_out = poison((len(POSITIONS), 64), torch.float16, device)
    rope_write(q_out, case.qkv, case.step, pool, case.rope)
    for stored, scales in ((pool.keys, pool.key_scales), (pool.values, pool.value_scales)):
        assert scales is not None
        assert not read(stored).float().any()
        assert not read(scales).any()


def test_a_token_does_not_depend_on_the_others(device: str) -> None:
    shape = HeadShape(6, 2, 64)
    case = make_case(shape, torch.float16, device, has_norms=True)
    width = shape.heads * shape.head_dim
    together, alone = (make_pool(shape, torch.int8, device) for _ in range(2))
    q_together = poison((len(POSITIONS), width), torch.float16, device)
    rope_write(q_together, case.qkv, case.step, together, case.rope)
    first = case.qkv[:1].clone()
    q_alone = poison((1, width), torch.float16, device)
    rope_write(q_alone, first, case.step, alone, case.rope)
    assert torch.equal(q_alone, q_together[:1])
    assert torch.equal(read(alone.keys)[0], read(together.keys)[0])
