"""Native paged FlashAttention against float64, and its laws."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kernels_support import (
    BLOCK,
    ISAS,
    RowCase,
    fill_kv,
    make_native_kv,
    make_step,
    run_native,
    store_kv,
)
from twostroke.kernels.ops import KVShape, StepArrays
from twostroke.kernels.reference.ops import (
    ReferenceKV,
    attention,
    get_pool_extents,
    get_rotated_dims,
    rotate,
)
from twostroke.spec.kv import KvElement

# Lengths that do not divide blocks (16), tiles (64) or segments (256), chunks at causal offsets,
# decodes, and many key blocks.
ROWS = [RowCase(0, 37), RowCase(300, 1), RowCase(129, 50), RowCase(700, 3), RowCase(0, 1)]
HEADS = [
    (3, 3, 64),
    (1, 4, 256),
    (2, 1, 32),
    (1, 8, 128),
    (1, 6, 16),
    (2, 2, 80),
]  # kv heads, group, head_dim


def make_case(
    heads: tuple[int, int, int], rows: list[RowCase], element: str, logit_scale: float = 1.0
) -> tuple[StepArrays, ReferenceKV, KVShape, np.ndarray]:
    """A step with a filled KV pool (float64 for the exact answer) and queries."""
    kv_heads, group, head_dim = heads
    rng = np.random.default_rng(kv_heads * 1000 + head_dim)
    blocks = sum(-(-(row.start + row.tokens) // BLOCK) for row in rows) + 3
    shape = KVShape(1, blocks, BLOCK, kv_heads, head_dim, KvElement(element))
    extents = get_pool_extents(shape)
    kv = ReferenceKV(np.full(extents, np.nan), np.full(extents, np.nan))
    step = make_step(rows, rng, blocks)
    fill_kv(kv, step, rng, logit_scale)
    q = rng.standard_normal((len(step.tokens), kv_heads * group * head_dim)).astype(np.float32)
    return step, kv, shape, q


def run(
    case: tuple[StepArrays, ReferenceKV, KVShape, np.ndarray],
    window: int | None,
    isa: str = "auto",
    threads: int = 2,
) -> np.ndarray:
    step, kv, shape, q = case
    scale = shape.head_dim**-0.5
    return run_native(
        step,
        [q],
        lambda ops, slot: ops.attention(None, 0, slot, scale, window),
        isa=isa,
        threads=threads,
        kv=(make_native_kv(store_kv(kv, shape)), shape),
    )


def get_stored(kv: ReferenceKV, shape: KVShape) -> tuple[np.ndarray, np.ndarray]:
    """The keys and values that the elements of the pool, once stored, stand for, in float64."""
    if shape.element is not KvElement.INT8:
        return np.nan_to_num(kv.keys), np.nan_to_num(kv.values)
    stored = store_kv(kv, shape)
    assert stored.key_scales is not None
    assert stored.value_scales is not None
    keys = rotate(stored.keys * stored.key_scales.astype(np.float64))
    return keys / get_rotated_dims(shape.head_dim), stored.values * stored.value_scales.astype(
        np.float64
    )


def get_exact(
    case: tuple[StepArrays, ReferenceKV, KVShape, np.ndarray], window: int | None
) -> np.ndarray:
    """The same attention in float64."""
    step, kv, shape, q = case
    keys, values = get_stored(kv, shape)
    exact = np.empty(q.shape)
    for row in range(len(step.row_offsets) - 1):
        for token in range(step.row_offsets[row], step.row_offsets[row + 1]):
            end = int(step.positions[token]) + 1
            begin = max(0, end - window) if window else 0
            blocks = step.block_tables[row, : -(-end // BLOCK)]
            k, v = (
                pool[0, blocks].reshape(-1, shape.num_kv_heads, shape.head_dim)[begin:end]
                for pool in (keys, values)
            )
            heads = q[token].astype(np.float64).reshape(shape.num_kv_heads, -1, shape.head_dim)
            scores = np.einsum("gxd,kgd->gxk", heads, k) * shape.head_dim**-0.5
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            exact[token] = np.einsum("gxk,kgd->gxd", weights, v).reshape(-1)
    return exact


def get_relative_error(y: np.ndarray, exact: np.ndarray) -> float:
    """Largest error of a token's output relative to that output's norm."""
    return float((np.linalg.norm(y - exact, axis=1) / np.linalg.norm(exact, axis=1)).max())


@pytest.mark.parametrize("window", [None, 1, 100, 512])
@pytest.mark.parametrize("heads", HEADS)
def test_attention_is_exact_to_1e_5_in_f32(heads: tuple[int, int, int], window: int | None) -> None:
    case = make_case(heads, ROWS, "f32")
    assert get_relative_error(run(case, window), get_exact(case, window)) <= 1e-5


@pytest.mark.parametrize("heads", HEADS)
def test_f16_keys_and_values_cost_no_more_than_their_rounding(heads: tuple[int, int, int]) -> None:
    case = make_case(heads, ROWS, "f16")  # the values drawn are representable in f16
    assert get_relative_error(run(case, None), get_exact(case, None)) <= 1e-5


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("heads", HEADS)
def test_int8_keys_and_values_cost_no_more_than_their_rounding(
    heads: tuple[int, int, int], window: int | None
) -> None:
    case = make_case(heads, ROWS, "int8")
    assert get_relative_error(run(case, window), get_exact(case, window)) <= 1e-5


@pytest.mark.parametrize("element", ["f16", "int8"])
@pytest.mark.parametrize("logit_scale", [1.0, 3000.0])
def test_attention_errs_at_most_twice_as_much_as_the_reference(
    logit_scale: float, element: str
) -> None:
    case = make_case((3, 3, 64), ROWS, element, logit_scale)
    step, kv, shape, q = case
    exact = get_exact(case, None)
    plain = attention(store_kv(kv, shape), step, 0, (q, shape.head_dim**-0.5, None))
    assert get_relative_error(run(case, None), exact) <= 2 * get_relative_error(plain, exact)


def test_extreme_logits_stay_exact_and_finite() -> None:
    # Keys scaled so that logits reach ±1e4: probabilities are 0 or 1 but for near ties.
    case = make_case((3, 3, 64), ROWS, "f32", logit_scale=3000.0)
    step, kv, _, q = case
    logits = np.abs(q.reshape(-1, 64) @ np.nan_to_num(kv.keys[0]).reshape(-1, 64).T) / 8
    assert logits.max() > 1e4
    y = run(case, None)
    assert np.isfinite(y).all()
    # Plain float32 on the same numbers is the measure: logits of 1e4 carry errors of 1e-3.
    single = ReferenceKV(
        np.nan_to_num(kv.keys).astype(np.float32), np.nan_to_num(kv.values).astype(np.float32)
    )
    plain = attention(single, step, 0, (q, 64**-0.5, None))
    exact = get_exact(case, None)
    assert get_relative_error(y, exact) <= max(2 * get_relative_error(plain, exact), 1e-5)


def test_one_key_far_above_the_rest_wins_exactly() -> None:
    case = make_case((1, 1, 64), [RowCase(600, 1)], "f32")
    step, kv, _, q = case
    q[:] = 0
    q[0, 0] = 1000.0
    kv.keys[np.isfinite(kv.keys)] = 0
    winner = int(step.block_tables[0, 333 // BLOCK])
    kv.keys[0, winner, 333 % BLOCK, 0, 0] = 80.0  # logit 1e4 over zeros
    kv.keys[0, int(step.block_tables[0, 0]), 0, 0, 0] = -80.0  # and one at -1e4
    np.testing.assert_array_equal(run(case, None)[0], kv.values[0, winner, 333 % BLOCK, 0])


@pytest.mark.parametrize("element", ["f16", "int8"])
@pytest.mark.parametrize("window", [None, 100])
def test_every_instruction_set_and_thread_count_gives_the_same_bits(
    window: int | None, element: str
) -> None:
    case = make_case((3, 3, 64), ROWS, element)
    first = run(case, window, ISAS[0], 1)
    for isa in ISAS:
        for threads in (1, 2, 3):
            np.testing.assert_array_equal(run(case, window, isa, threads), first)


DECODES = [RowCase(1300, 1), RowCase(255, 1), RowCase(256, 1), RowCase(0, 1), RowCase(2047, 1)]


@pytest.mark.parametrize("window", [None, 100, 700])
@pytest.mark.parametrize("rows", [DECODES, DECODES[:1], [RowCase(1500, 5)], [RowCase(1100, 40)]])
def test_a_sequence_cut_between_threads_gives_the_same_bits(
    rows: list[RowCase], window: int | None
) -> None:
    case = make_case((3, 3, 64), rows, "f16")
    first = run(case, window, threads=1)
    assert get_relative_error(first, get_exact(case, window)) <= 1e-5
    for threads in (2, 3, 5, 16):
        np.testing.assert_array_equal(run(case, window, threads=threads), first)


@pytest.mark.parametrize("element", ["f16", "int8"])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("heads", [(3, 3, 64), (1, 4, 256)])
def test_chunks_and_company_do_not_change_a_bit(
    heads: tuple[int, int, int], window: int | None, element: str
) -> None:
    whole = make_case(heads, [RowCase(0, 600)], element)
    step, kv, shape, q = whole
    expected = run(whole, window)
    for size in (1, 7, 16, 250):
        starts = list(range(0, 600, size))[-3:]
        for start in starts:
            end = min(600, start + size)
            part = StepArrays(
                step.tokens[start:end],
                step.positions[start:end],
                np.array([0, end - start], np.int32),
                step.block_tables,
                step.logit_rows,
            )
            y = run((part, kv, shape, q[start:end]), window)
            np.testing.assert_array_equal(y, expected[start:end])


def test_physical_blocks_do_not_matter() -> None:
    case = make_case((3, 3, 64), ROWS, "f16")
    step, kv, shape, q = case
    order = np.random.default_rng(3).permutation(shape.num_blocks)
    moved = ReferenceKV(np.empty_like(kv.keys), np.empty_like(kv.values))
    moved.keys[:, order], moved.values[:, order] = kv.keys, kv.values
    tables = np.where(step.block_tables < 0, -1, order[step.block_tables]).astype(np.int32)
    other = StepArrays(step.tokens, step.positions, step.row_offsets, tables, step.logit_rows)
    np.testing.assert_array_equal(run((other, moved, shape, q), None), run(case, None))


PEAK = """
import re, sys
import numpy as np
from kernels_support import BLOCK, RowCase, make_step, run_native
from twostroke.kernels.ops import KVShape

def attend(length):
    shape = KVShape(1, length // BLOCK, BLOCK, 1, 16)
    step = make_step([RowCase(0, length)], np.random.default_rng(0), length // BLOCK)
    kv = (np.zeros(shape.bytes, np.uint8), shape)
    run_native(step, [np.ones((length, 16), np.float32)],
               lambda ops, slot: ops.attention(None, 0, slot, 0.25, None), kv=kv)

def get_peak_kib():  # of this program only: ru_maxrss would begin at its parent's
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

attend(64)
before = get_peak_kib()
attend(int(sys.argv[1]))
print(get_peak_kib() - before)
"""


def get_peak_kib(length: int) -> int:
    """KiB by which attention over `length` tokens raises a fresh process's peak memory."""
    tests = str(Path(__file__).resolve().parents[1])
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(length)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": tests},
    )
    return int(done.stdout)


def test_memory_grows_with_length_not_with_its_square() -> None:
    """One head's scores of 16,384² in float32 would be 1 GiB; its rows are about 4 MiB."""
    half, whole = get_peak_kib(8192), get_peak_kib(16384)
    assert whole <= 32 * 1024, whole
    assert whole <= 2.5 * half + 2048, (half, whole)
