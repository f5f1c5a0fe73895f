"""Native row-wise ops against the reference in float64 and float32."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from kernels_support import BLOCK, ISAS, RowCase, make_native_kv, make_step, plain_step, run_native
from twostroke.kernels.cpu.recorder import Slot
from twostroke.kernels.cpu.weights import Vector
from twostroke.kernels.ops import KVShape, OpTable, RopeTable
from twostroke.kernels.reference import ops as reference
from twostroke.spec.kv import KvElement

ROWS = 5


def check(
    inputs: list[np.ndarray],
    call: Callable[..., Slot],
    plain: Callable[..., np.ndarray],
    head_dim: int = 16,
) -> None:
    """Error at most twice the reference's own in float32, and the same bits on every ISA."""
    exact = plain(*(x.astype(np.float64) for x in inputs))
    single = plain(*inputs)
    size = np.abs(exact).max()
    bound = max(2 * float(np.abs(single - exact).max() / size), 3e-7)
    shape = KVShape(1, 1, BLOCK, 1, head_dim)
    kv = (np.zeros(shape.bytes, np.uint8), shape)
    first = None
    for isa in ISAS:
        for threads in (1, 2):
            y = run_native(plain_step(ROWS), inputs, call, isa=isa, threads=threads, kv=kv)
            assert float(np.abs(y - exact).max() / size) <= bound, isa
            if first is None:
                first = y
            np.testing.assert_array_equal(y, first)


@pytest.mark.parametrize(("width", "groups"), [(576, 1), (100, 1), (256, 4), (64, 9)])
def test_rms_norm(width: int, groups: int) -> None:
    rng = np.random.default_rng(width)
    x = (rng.standard_normal((ROWS, width * groups)) * 7).astype(np.float32)
    weight = rng.standard_normal(width).astype(np.float32)
    check(
        [x],
        lambda ops, slot: ops.rms_norm(slot, Vector(weight), 1e-5),
        lambda x: reference.rms_norm(x, weight.astype(x.dtype), 1e-5),
    )


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated(activation: str) -> None:
    rng = np.random.default_rng(2)
    gate, up = (rng.standard_normal((ROWS, 200)).astype(np.float32) * s for s in (20, 3))
    gate[0, :6] = [0.0, -0.0, 88.0, -88.0, 1e4, -1e4]
    check(
        [gate, up],
        lambda ops, g, u: ops.gated(g, u, activation),
        lambda g, u: reference.gated(g, u, activation),
    )


def test_add() -> None:
    rng = np.random.default_rng(3)
    x, y = (rng.standard_normal((ROWS, 77)).astype(np.float32) for _ in range(2))
    check([x, y], lambda ops, a, b: ops.add(a, b), lambda a, b: a + b)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize(("heads", "dim"), [(9, 64), (4, 256), (2, 80)])
def test_rope(layout: str, heads: int, dim: int) -> None:
    rng = np.random.default_rng(4)
    angles = np.arange(ROWS)[:, None] * rng.random(dim // 2)[None, :]
    table = RopeTable(np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32), layout)
    x = rng.standard_normal((ROWS, heads * dim)).astype(np.float32)
    check(
        [x],
        lambda ops, slot: ops.rope(None, slot, table),
        lambda x: reference.rope(plain_step(ROWS), x, table),
        head_dim=dim,
    )


@pytest.mark.parametrize("element", ["f16", "f32", "int8"])
@pytest.mark.parametrize("isa", ISAS)
def test_write_kv_puts_every_value_where_attention_reads_it(element: str, isa: str) -> None:
    rng = np.random.default_rng(5)
    shape = KVShape(2, 12, BLOCK, 3, 32, KvElement(element))
    # Whole blocks and parts of blocks, decodes, a chunk that starts inside a block.
    step = make_step([RowCase(0, 35), RowCase(5, 30), RowCase(40, 1), RowCase(0, 9)], rng, 12)
    k, v = (rng.standard_normal((75, 96)).astype(np.float32) for _ in range(2))
    if element != "f32":
        k[0, 0], v[0, 1] = 1e6, -1e6  # beyond f16: clamped to its largest
    k[1, :32] = v[50, 32:64] = 0.0
    k[51, :32] = 1e-35
    expected = reference.new_kv(shape)
    reference.write_kv(expected, step, 1, (k, v))
    memory = np.zeros(shape.bytes, np.uint8)

    def write(ops: OpTable, key: Slot, value: Slot) -> Slot:
        ops.write_kv(None, 1, key, value)
        return key

    run_native(step, [k, v], write, isa=isa, kv=(memory, shape))
    np.testing.assert_array_equal(memory, make_native_kv(expected))


def test_int8_values_are_within_half_a_step_of_their_values() -> None:
    rng = np.random.default_rng(6)
    x = (rng.standard_normal((50, 64)) * 10.0 ** rng.integers(-6, 4, (50, 1))).astype(np.float32)
    elements, scales = reference.round_to_int8(x)
    assert np.abs(elements).max(axis=1).min() == 127  # the largest value uses the whole range
    assert (np.abs(elements * scales.astype(np.float64) - x) <= scales * 0.50001).all()


@pytest.mark.parametrize("dim", [8, 16, 48, 64, 256])
def test_rotation_keeps_products_and_spreads_a_large_dimension(dim: int) -> None:
    together = reference.get_rotated_dims(dim)
    q, k = np.random.default_rng(7).standard_normal((2, 100, dim)).astype(np.float32)
    k[:, 3] += 1000
    turned = reference.rotate(k)
    products = (reference.rotate(q) * turned).sum(axis=1) / together
    np.testing.assert_allclose(products, (q * k).sum(axis=1), rtol=1e-5, atol=1e-2)
    assert np.abs(turned[:, :together]).min() > 800  # each has its share of it
