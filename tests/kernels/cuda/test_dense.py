"""The GPU's dense products against float64, and against plain PyTorch's error."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kernels.cuda_support import HALVES, assert_as_exact_as_plain, draw, poison, to_numpy
from twostroke.kernels.cuda import dense
from twostroke.kernels.cuda.dense import product, product_exact, product_many
from twostroke.kernels.cuda.stream import Tile
from twostroke.kernels.cuda.types import PLAIN, DenseMatrix, Fused
from twostroke.kernels.reference import ops

EPS = 1e-5
# Small tiles, so that small matrices have several, and some that are cut off.
VECTOR = Tile(rows=8, columns=64, tokens=0, warps=4, stages=1)
TILE = Tile(rows=32, columns=64, tokens=16, warps=4, stages=3)


def compute_exactly(x: torch.Tensor, weights: torch.Tensor, fused: Fused) -> NDArray[Any]:
    """In float64 what a product means."""
    y = to_numpy(x).astype(np.float64)
    if fused.norm is not None:
        y = ops.rms_norm(y, to_numpy(fused.norm), fused.eps)
    y = y @ to_numpy(weights).astype(np.float64).T
    if fused.bias is not None:
        y = y + to_numpy(fused.bias)
    if fused.gate:
        y = ops.gated(*np.split(y, 2, axis=1), fused.gate)
    return y if fused.residual is None else y + to_numpy(fused.residual)


def compute_plainly(x: torch.Tensor, weights: torch.Tensor, fused: Fused) -> torch.Tensor:
    """PyTorch's, every operation rounded to the dtype."""
    functional = torch.nn.functional
    if fused.norm is not None:
        x = functional.rms_norm(x, fused.norm.shape, fused.norm, fused.eps)
    y = functional.linear(x, weights, fused.bias)
    if fused.gate:
        gate, up = y.chunk(2, dim=1)
        if fused.gate == "silu":
            y = functional.silu(gate) * up
        else:
            y = functional.gelu(gate, approximate="tanh") * up
    return y if fused.residual is None else y + fused.residual


def check(
    x: torch.Tensor, weights: torch.Tensor, fused: Fused = PLAIN, tile: Tile | None = None
) -> torch.Tensor:
    """Run the product into poisoned memory and hold it to the bound."""
    width = weights.shape[0] // (2 if fused.gate else 1)
    out = poison((x.shape[0], width), x.dtype, x.device.type)
    product(out, x, DenseMatrix(weights), fused, tile)
    exact = compute_exactly(x, weights, fused)
    assert_as_exact_as_plain(out, compute_plainly(x, weights, fused), exact)
    return out


def make_fused(
    rng: np.random.Generator, extents: tuple[int, int, int], x: torch.Tensor, gate: str = ""
) -> Fused:
    """Everything at once; extents are tokens, outputs of the matrix, inputs."""
    tokens, outputs, inputs = extents
    width = outputs // 2 if gate else outputs
    norm, bias, residual = (
        draw(rng, shape, x.dtype, x.device.type)
        for shape in [(inputs,), (outputs,), (tokens, width)]
    )
    return Fused(norm=norm, eps=EPS, bias=bias, gate=gate, residual=residual)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("tokens", [1, 2, 8, 13, 40])
def test_chosen_tiles_multiply(device: str, dtype: torch.dtype, tokens: int) -> None:
    rng = np.random.default_rng(torch.initial_seed())
    x = draw(rng, (tokens, 520), dtype, device)
    check(x, draw(rng, (72, 520), dtype, device))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("tokens", [1, 21])
@pytest.mark.parametrize("gate", ["", "silu", "gelu_tanh"])
def test_fuses_norm_bias_gate_and_sum(
    device: str, dtype: torch.dtype, tokens: int, gate: str
) -> None:
    rng = np.random.default_rng(torch.initial_seed())
    outputs, inputs = 76, 200
    x = draw(rng, (tokens, inputs), dtype, device)
    weights = draw(rng, (outputs, inputs), dtype, device)
    fused = make_fused(rng, (tokens, outputs, inputs), x, gate)
    check(x, weights, fused, VECTOR if tokens == 1 else TILE)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 64), (7, 33), (33, 129), (64, 128)])
def test_tiles_may_be_cut_off(device: str, tokens: int, outputs: int, inputs: int) -> None:
    rng = np.random.default_rng(torch.initial_seed())
    x = draw(rng, (tokens, inputs), torch.float16, device)
    weights = draw(rng, (outputs, inputs), torch.float16, device)
    check(x, weights, tile=VECTOR if tokens == 1 else TILE)


@pytest.mark.parametrize("tokens", [1, 3])
def test_adds_to_the_residual_in_place(device: str, tokens: int) -> None:
    rng = np.random.default_rng(torch.initial_seed())
    buffer = draw(rng, (tokens, 80), torch.bfloat16, device)
    stream, outside = buffer[:, :40], buffer[:, 40:].clone()
    x, weights = (draw(rng, shape, torch.bfloat16, device) for shape in [(tokens, 96), (40, 96)])
    fused = Fused(residual=stream.clone())
    exact, plain = compute_exactly(x, weights, fused), compute_plainly(x, weights, fused)
    product(stream, x, DenseMatrix(weights), Fused(residual=stream))
    assert_as_exact_as_plain(stream, plain, exact)
    assert torch.equal(buffer[:, 40:], outside)


@pytest.mark.parametrize("tokens", [1, 3])
def test_logits_are_not_rounded(device: str, tokens: int) -> None:
    rng = np.random.default_rng(torch.initial_seed())
    x, weights = (draw(rng, shape, torch.bfloat16, device) for shape in [(tokens, 300), (90, 300)])
    exact = compute_exactly(x, weights, PLAIN)
    for multiply in (product, product_exact, product_many):
        out = poison((tokens, 90), torch.float32, device)
        multiply(out, x, DenseMatrix(weights))
        np.testing.assert_allclose(to_numpy(out), exact, rtol=1e-5, atol=1e-4)


def test_launches_that_overlap_compute_the_same(device: str) -> None:
    rng = np.random.default_rng(torch.initial_seed())
    layers, width = 6, 256
    weights = [
        [DenseMatrix(draw(rng, shape, torch.float16, device) / 16) for shape in shapes]
        for shapes in [[(2 * width, width), (width, width)]] * layers
    ]
    norm = draw(rng, (width,), torch.float16, device)
    for tokens in (1, 3):
        start = draw(rng, (tokens, width), torch.float16, device)
        results = []
        for overlap in (False, None):
            stream, hidden = start.clone(), poison(start.shape, torch.float16, device)
            for up, down in weights:
                gated, added = Fused(norm, EPS, gate="silu"), Fused(residual=stream)
                product(hidden, stream, up, gated, overlap=overlap)
                product(stream, hidden, down, added, overlap=overlap)
            results.append(stream)
        assert not torch.isnan(results[0]).any()
        assert torch.equal(*results)


def test_a_large_residual_stream_is_normed_in_full(device: str) -> None:
    """Several large values of random size: one alone would be normed to the root of the width."""
    rng = np.random.default_rng(torch.initial_seed())
    for tokens in (1, 16):
        x = draw(rng, (tokens, 320), torch.float16, device)
        x[:, [7, 9, 100]] = torch.from_numpy(rng.uniform(2000, 6000, (tokens, 3))).to(x)
        weights = draw(rng, (48, 320), torch.float16, device)
        norm = draw(rng, (320,), torch.float16, device)
        check(x, weights, Fused(norm=norm, eps=EPS))


@pytest.mark.parametrize("dtype", HALVES)
def test_the_exact_product_is_as_exact_as_plain(device: str, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(torch.initial_seed())
    x, weights, bias = (draw(rng, s, dtype, device) for s in [(150, 200), (140, 200), (140,)])
    out = poison((150, 140), dtype, device)
    product_exact(out, x, DenseMatrix(weights), bias)
    fused = Fused(bias=bias)
    assert_as_exact_as_plain(
        out, compute_plainly(x, weights, fused), compute_exactly(x, weights, fused)
    )


def test_exact_bits_depend_neither_on_the_company_nor_on_the_place(device: str) -> None:
    rng = np.random.default_rng(torch.initial_seed())
    x, weights = (draw(rng, s, torch.float16, device) for s in [(300, 328), (200, 328)])
    matrix = DenseMatrix(weights)
    together = poison((300, 200), torch.float32, device)
    product_exact(together, x, matrix)
    for first, last in [(0, 1), (77, 78), (120, 140), (30, 290)]:
        part = poison((last - first, 200), torch.float32, device)
        product_exact(part, x[first:last].clone(), matrix)
        assert torch.equal(part, together[first:last])


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_the_library_multiplies_many(device: str, dtype: torch.dtype, has_bias: bool) -> None:
    rng = np.random.default_rng(torch.initial_seed())
    x, weights, bias = (draw(rng, s, dtype, device) for s in [(90, 64), (50, 64), (50,)])
    fused = Fused(bias=bias if has_bias else None)
    exact = compute_exactly(x, weights, fused)
    for out_dtype in (dtype, torch.float32):
        out = poison((90, 50), out_dtype, device)
        product_many(out, x, DenseMatrix(weights), fused.bias)
        assert_as_exact_as_plain(out, compute_plainly(x, weights, fused), exact)


@pytest.mark.parametrize("tokens", [1, 2, 8, 16, 32, 64])
@pytest.mark.parametrize("outputs", [4096, 12288, 22016, 32000])
def test_chosen_tiles_fit_the_memory_of_a_processor(tokens: int, outputs: int) -> None:
    for normed in (False, True):
        tile = dense.choose_tile(tokens, outputs, 4096, normed)
        staged = 2 * tile.columns * (tile.rows + tile.tokens) * tile.stages
        assert tile.tokens == 0 or staged <= 227 * 1024


def test_no_rows_are_no_work(device: str) -> None:
    weights = torch.zeros(8, 16, dtype=torch.float16, device=device)
    x = torch.empty(0, 16, dtype=torch.float16, device=device)
    memory = torch.full((2, 8), 7, dtype=torch.float16, device=device)
    for multiply in (product, product_exact, product_many):
        multiply(memory[:0], x, DenseMatrix(weights))
    assert (memory == 7).all()
