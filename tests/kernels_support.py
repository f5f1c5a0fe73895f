"""Random op inputs shared by kernel tests, and single native ops run as one-op programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from twostroke._native import Program, ThreadPool, kernels_name
from twostroke.kernels.cpu.recorder import Recorder, Slot
from twostroke.kernels.cpu.weights import PackedMatrix, pack_matrix
from twostroke.kernels.ops import F32, KVShape, OpTable, StepArrays
from twostroke.kernels.reference.ops import ReferenceKV, rotate, round_to_int8, write_kv
from twostroke.spec.kv import KvElement
from twostroke.spec.quant import Format

BLOCK = 16


def get_isas() -> list[str]:
    """The instruction sets this processor runs, by name."""
    names = []
    for name in ("portable", "avx2", "avx512"):
        try:
            names.append(kernels_name(name))
        except ValueError:
            continue
    return names


ISAS = get_isas()


@dataclass(frozen=True, slots=True)
class RowCase:
    """One row of a step: `start` tokens computed before, then `tokens` new ones."""

    start: int
    tokens: int


def make_step(rows: Sequence[RowCase], rng: np.random.Generator, num_blocks: int) -> StepArrays:
    """A step with these rows and randomly scattered physical blocks."""
    counts = [row.tokens for row in rows]
    offsets = np.cumsum([0, *counts]).astype(np.int32)
    positions = np.concatenate(
        [np.arange(row.start, row.start + row.tokens) for row in rows]
    ).astype(np.int32)
    needed = [-(-(row.start + row.tokens) // BLOCK) for row in rows]
    assert sum(needed) <= num_blocks
    order = rng.permutation(num_blocks).astype(np.int32)
    tables = np.full((len(rows), max(needed)), -1, np.int32)
    used = 0
    for index, count in enumerate(needed):
        tables[index, :count] = order[used : used + count]
        used += count
    tokens = rng.integers(0, 100, int(offsets[-1])).astype(np.int32)
    return StepArrays(tokens, positions, offsets, tables, np.zeros(0, np.int32))


def run_native(
    step: StepArrays,
    inputs: Sequence[F32],
    call: Callable[..., Slot],
    *,
    isa: str = "auto",
    threads: int = 2,
    kv: tuple[NDArray[np.uint8], KVShape] | None = None,
) -> F32:
    """Runs `call(ops, *slots)` natively on these inputs (T, width); returns the result likewise."""
    if kv is None:
        shape = KVShape(1, 1, BLOCK, 1, 16)
        kv = (np.zeros(shape.bytes, np.uint8), shape)
    memory, shape = kv
    pool = ThreadPool(threads)
    sizes = (shape.num_layers, shape.num_blocks, shape.num_kv_heads, shape.head_dim)
    program = Program(pool, isa, memory, sizes, shape.element.value, len(step.tokens), 1)
    recorder = Recorder()
    ops: OpTable = recorder.make_ops()
    slots = [recorder.new_input(values.shape[1]) for values in inputs]
    result = call(ops, *slots)
    *input_ids, result_id = recorder.build(program, [*slots, result])
    for buffer, values in zip(input_ids, inputs, strict=True):
        program.view(buffer, len(values))[:] = values
    program.run_body(step.tokens, step.positions, step.row_offsets, step.block_tables)
    return np.array(program.view(result_id, len(step.tokens)))


def plain_step(tokens: int) -> StepArrays:
    """One row of this many tokens from position 0 in blocks 0, 1, …"""
    blocks = -(-tokens // BLOCK)
    return StepArrays(
        np.zeros(tokens, np.int32),
        np.arange(tokens, dtype=np.int32),
        np.array([0, tokens], np.int32),
        np.zeros((1, blocks), np.int32),
        np.zeros(0, np.int32),
    )


def store_kv(kv: ReferenceKV, shape: KVShape) -> ReferenceKV:
    """A pool of any floats in the element type of `shape`; what is no number becomes large."""
    keys, values = (
        np.nan_to_num(pool, nan=6e4).astype(np.float32) for pool in (kv.keys, kv.values)
    )
    if shape.element is KvElement.INT8:
        (keys, key_scales), (values, value_scales) = (
            round_to_int8(rotate(keys)),
            round_to_int8(values),
        )
        return ReferenceKV(keys, values, key_scales, value_scales)
    stored = np.float16 if shape.element is KvElement.F16 else np.float32
    return ReferenceKV(keys.astype(stored), values.astype(stored))


def make_native_kv(kv: ReferenceKV) -> NDArray[np.uint8]:
    """A reference pool's bytes in the native layout (native/kernels.h: KvPool)."""
    layers, blocks, _, heads, _ = kv.keys.shape

    def flatten(array: NDArray[np.generic], axes: Sequence[int]) -> NDArray[np.uint8]:
        ordered = np.ascontiguousarray(array.transpose(axes))
        return ordered.view(np.uint8).reshape(blocks, layers, heads, -1)

    by_dimension, by_token = (1, 0, 3, 4, 2), (1, 0, 3, 2, 4)
    first = [flatten(kv.keys, by_dimension)]
    if kv.key_scales is not None and kv.value_scales is not None:
        first += [flatten(scales, by_token) for scales in (kv.key_scales, kv.value_scales)]
    parts = [np.concatenate(first, axis=3), flatten(kv.values, by_token)]
    return np.concatenate([part.reshape(blocks, layers, -1) for part in parts], axis=2).reshape(-1)


def fill_kv(kv: ReferenceKV, step: StepArrays, rng: np.random.Generator, scale: float) -> None:
    """Writes random f16-representable keys and values for all positions of every row, layer 0."""
    heads, dim = kv.keys.shape[3:]
    ends = step.positions[step.row_offsets[1:] - 1] + 1
    total = int(ends.sum())
    whole = StepArrays(
        np.zeros(total, np.int32),
        np.concatenate([np.arange(end) for end in ends]).astype(np.int32),
        np.cumsum([0, *ends]).astype(np.int32),
        step.block_tables,
        np.zeros(0, np.int32),
    )
    k, v = (
        (rng.standard_normal((total, heads * dim)) * factor).astype(np.float16).astype(np.float32)
        for factor in (scale, 1.0)
    )
    write_kv(kv, whole, 0, (k, v))


def pack(format: Format, data: NDArray[np.uint8], shape: tuple[int, int]) -> PackedMatrix:
    """A packed matrix from file bytes."""
    return pack_matrix(ThreadPool(2), format, data, shape)
