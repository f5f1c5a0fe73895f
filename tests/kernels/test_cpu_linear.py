"""Native matrix products against the reference, format by format."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from kernels_support import ISAS, pack, plain_step, run_native
from twostroke.kernels.cpu.recorder import Slot
from twostroke.kernels.cpu.weights import Vector
from twostroke.kernels.ops import OpTable
from twostroke.kernels.reference.dequant import dequantise
from twostroke.spec.quant import Format
from weight_bytes import random_matrix_bytes

SHAPE = (72, 512)  # outputs no multiple of 16, two superblocks of inputs


def quantise_rows(x: np.ndarray) -> np.ndarray:
    """The activations as the kernels see them: signed bytes in blocks of 32, back in float."""
    blocks = x.reshape(len(x), -1, 32)
    largest = np.abs(blocks).max(axis=-1, keepdims=True)
    scale = (largest / np.float32(127)).astype(np.float32)
    inverse = np.float32(127) / np.where(largest > 0, largest, np.float32(1))
    return (np.rint(blocks * inverse) * scale).reshape(x.shape)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", list(Format))
def test_product_equals_float64_product_of_the_same_numbers(format: Format, isa: str) -> None:
    rng = np.random.default_rng(list(Format).index(format))
    data = random_matrix_bytes(format, SHAPE, rng)
    x = rng.standard_normal((11, SHAPE[1])).astype(np.float32)
    bias = rng.standard_normal(SHAPE[0]).astype(np.float32)
    weight = pack(format, data, SHAPE)
    y = run_native(
        plain_step(len(x)), [x], lambda ops, slot: ops.linear(slot, weight, Vector(bias)), isa=isa
    )
    seen = quantise_rows(x) if format.is_quantised else x
    dense = dequantise(format, data, SHAPE).astype(np.float64)
    exact = seen.astype(np.float64) @ dense.T + bias
    size = np.abs(seen).astype(np.float64) @ np.abs(dense).T + np.abs(bias)
    plain = seen @ dense.astype(np.float32).T + bias
    plain_error = np.abs(plain - exact).max() / size.max()
    error = (np.abs(y - exact) / size).max()
    assert error <= max(2 * plain_error, 1e-6), (error, plain_error)


@pytest.mark.parametrize("format", list(Format))
def test_every_instruction_set_gives_the_same_bits(format: Format) -> None:
    rng = np.random.default_rng(5)
    weight = pack(format, random_matrix_bytes(format, SHAPE, rng), SHAPE)
    x = rng.standard_normal((13, SHAPE[1])).astype(np.float32)
    results = [
        run_native(plain_step(13), [x], lambda ops, s: ops.linear(s, weight, None), isa=isa)
        for isa in ISAS
    ]
    for result in results[1:]:
        np.testing.assert_array_equal(result.view(np.uint32), results[0].view(np.uint32))


@pytest.mark.parametrize("format", list(Format))
def test_a_row_alone_has_the_bits_it_has_in_company(format: Format) -> None:
    rng = np.random.default_rng(6)
    weight = pack(format, random_matrix_bytes(format, SHAPE, rng), SHAPE)
    x = rng.standard_normal((23, SHAPE[1])).astype(np.float32)
    together = run_native(plain_step(23), [x], lambda ops, s: ops.linear(s, weight, None))
    for row in (0, 3, 4, 16, 22):
        alone = run_native(
            plain_step(1), [x[row : row + 1]], lambda ops, s: ops.linear(s, weight, None), threads=1
        )
        np.testing.assert_array_equal(alone[0].view(np.uint32), together[row].view(np.uint32))


@pytest.mark.parametrize("format", list(Format))
def test_packing_loses_nothing(format: Format) -> None:
    rng = np.random.default_rng(7)
    data = random_matrix_bytes(format, SHAPE, rng)
    matrix = pack(format, data, SHAPE).native
    rows = np.array([matrix.read_row(output) for output in range(SHAPE[0])], np.float32)
    np.testing.assert_array_equal(rows, dequantise(format, data, SHAPE))


def test_zero_rows_stay_zero() -> None:
    rng = np.random.default_rng(8)
    weight = pack(Format.Q4_0, random_matrix_bytes(Format.Q4_0, SHAPE, rng), SHAPE)
    x = np.zeros((2, SHAPE[1]), np.float32)
    y = run_native(plain_step(2), [x], lambda ops, s: ops.linear(s, weight, None))
    np.testing.assert_array_equal(y, np.zeros((2, SHAPE[0]), np.float32))


def test_wrong_sizes_are_refused() -> None:
    rng = np.random.default_rng(9)
    data = random_matrix_bytes(Format.Q4_0, SHAPE, rng)
    with pytest.raises(ValueError, match="not a matrix of this shape"):
        pack(Format.Q4_0, data[:-1], SHAPE)
    with pytest.raises(ValueError, match="whole blocks"):
        pack(Format.Q4_0, data, (72, 500))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_a_joined_gated_middle_has_the_bits_of_its_parts(
    rows: int, activation: str, isa: str
) -> None:
    rng = np.random.default_rng(rows)
    wide, narrow = (96, 256), (64, 96)
    gate = pack(Format.Q4_K, random_matrix_bytes(Format.Q4_K, wide, rng), wide)
    up = pack(Format.Q6_K, random_matrix_bytes(Format.Q6_K, wide, rng), wide)
    down = pack(Format.Q4_1, random_matrix_bytes(Format.Q4_1, narrow, rng), narrow)
    biases = [Vector(rng.standard_normal(wide[0]).astype(np.float32)) for _ in range(2)]
    x = rng.standard_normal((rows, wide[1])).astype(np.float32)

    def get_middle(ops: OpTable, slot: Slot) -> Slot:
        g, u = ops.linear(slot, gate, biases[0]), ops.linear(slot, up, biases[1])
        return ops.gated(g, u, activation)

    def run(values: np.ndarray, call: Callable[[OpTable, Slot], Slot]) -> np.ndarray:
        return run_native(plain_step(rows), [values], call, isa=isa)

    joined = run(x, lambda ops, slot: ops.linear(get_middle(ops, slot), down, None))
    parts = run(run(x, get_middle), lambda ops, slot: ops.linear(slot, down, None))
    np.testing.assert_array_equal(joined.view(np.uint32), parts.view(np.uint32))
