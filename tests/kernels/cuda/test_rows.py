"""The GPU's row-wise kernels against the NumPy reference, and against plain PyTorch's error."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels.cuda_support import HALVES, assert_as_exact_as_plain, draw, poison, to_numpy
from twostroke.kernels.cuda import rows
from twostroke.kernels.cuda.types import DenseMatrix
from twostroke.kernels.reference import ops

EPS = 1e-5


def norm_plainly(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    groups = x.reshape(x.shape[0], -1, weight.numel())
    return torch.nn.functional.rms_norm(groups, weight.shape, weight, EPS).reshape(x.shape)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("width", "group"), [(2048, 2048), (1000, 1000), (384, 128), (75, 25)])
def test_norms_as_the_reference_does(
    device: str, dtype: torch.dtype, width: int, group: int
) -> None:
    rng = np.random.default_rng(torch.initial_seed())
    x, weight = draw(rng, (5, width), dtype, device) * 8, draw(rng, (group,), dtype, device)
    out = poison(x.shape, dtype, device)
    rows.rms_norm(out, x, weight, EPS)
    exact = ops.rms_norm(to_numpy(x), to_numpy(weight), EPS)
    assert_as_exact_as_plain(out, norm_plainly(x, weight), exact)


def test_norms_in_place_and_over_rows_that_lie_apart(device: str) -> None:
    rng = np.random.default_rng(torch.initial_seed())
    buffer = draw(rng, (3, 96), torch.float16, device)
    weight = draw(rng, (32,), torch.float16, device)
    x = buffer[:, 16:80]
    expected = ops.rms_norm(to_numpy(x), to_numpy(weight), EPS)
    plain = norm_plainly(x, weight)
    outside = buffer[:, 80:].clone()
    rows.rms_norm(x, x, weight, EPS)
    assert_as_exact_as_plain(buffer[:, 16:80], plain, expected)
    assert torch.equal(buffer[:, 80:], outside)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("alias", [False, True])
def test_norms_the_sum_as_it_was_rounded(device: str, dtype: torch.dtype, alias: bool) -> None:
    rng = np.random.default_rng(torch.initial_seed())
    width = 1200
    x, y = (draw(rng, (4, width), dtype, device) for _ in range(2))
    weight = draw(rng, (width,), dtype, device)
    total = x + y
    plain = norm_plainly(total, weight)
    exact = ops.rms_norm(to_numpy(total), to_numpy(weight), EPS)
    sum_out = x if alias else poison(x.shape, dtype, device)
    norm_out = poison(x.shape, dtype, device)
    rows.add_rms_norm(sum_out, norm_out, x, y, weight, EPS)
    assert torch.equal(sum_out, total)
    assert_as_exact_as_plain(norm_out, plain, exact)


@pytest.mark.parametrize("dtype", HALVES)
def test_adds_in_place(device: str, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(torch.initial_seed())
    x, y = (draw(rng, (3, 2500), dtype, device) for _ in range(2))
    expected = x + y
    rows.add(x, x, y)
    assert torch.equal(x, expected)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("activation", rows.ACTIVATIONS)
def test_gates_also_extreme_values(device: str, dtype: torch.dtype, activation: str) -> None:
    rng = np.random.default_rng(torch.initial_seed())
    width = 2100
    gate_up = draw(rng, (2, 2 * width), dtype, device)
    gate_up[0, :6] = torch.tensor([-1e4, -100, -30, 30, 100, 200], dtype=dtype)
    gate, up = gate_up[:, :width], gate_up[:, width:]
    out = poison((2, width), dtype, device)
    rows.gated(out, gate_up, activation)
    if activation == "silu":
        plain = torch.nn.functional.silu(gate) * up
    else:
        plain = torch.nn.functional.gelu(gate, approximate="tanh") * up
    exact = ops.gated(to_numpy(gate).astype(np.float64), to_numpy(up), activation)
    assert_as_exact_as_plain(out, plain, exact)


@pytest.mark.parametrize("dtype", HALVES)
def test_embeds_scaled_rows(device: str, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(torch.initial_seed())
    table = draw(rng, (50, 2100), dtype, device)
    tokens = torch.from_numpy(rng.integers(0, 50, 4).astype(np.int32)).to(device)
    out = poison((4, 2100), dtype, device)
    scale = 5.65685424949238
    rows.embed(out, tokens, DenseMatrix(table), scale)
    expected = (table[tokens.long()].float() * scale).to(dtype)
    assert torch.equal(out, expected)


def test_takes_rows(device: str) -> None:
    rng = np.random.default_rng(torch.initial_seed())
    x = draw(rng, (9, 70), torch.bfloat16, device)
    index = torch.tensor([8, 0, 8], dtype=torch.int32, device=device)
    out = poison((3, 70), torch.bfloat16, device)
    rows.take_rows(out, x, index)
    assert torch.equal(out, x[index.long()])


def test_gathers_only_tokens_with_a_source(device: str) -> None:
    rng = np.random.default_rng(torch.initial_seed())
    count = 2050
    tokens = torch.from_numpy(rng.integers(0, 99, count).astype(np.int32)).to(device)
    sources = torch.from_numpy(rng.integers(-1, 7, count).astype(np.int32)).to(device)
    drawn = torch.arange(1000, 1007, dtype=torch.int32, device=device)
    expected = torch.where(sources >= 0, drawn[sources.clamp(min=0).long()], tokens)
    rows.gather_tokens(tokens, sources, drawn)
    assert torch.equal(tokens, expected)


def test_rows_do_not_depend_on_each_other(device: str) -> None:
    rng = np.random.default_rng(torch.initial_seed())
    x, weight = (draw(rng, shape, torch.float16, device) for shape in [(6, 700), (700,)])
    together, alone = poison((6, 700), torch.float16, device), poison((1, 700), x.dtype, device)
    rows.rms_norm(together, x, weight, EPS)
    rows.rms_norm(alone, x[4:5], weight, EPS)
    assert torch.equal(together[4:5], alone)


def test_no_rows_are_no_work(device: str) -> None:
    memory = torch.full((2, 64), 7, dtype=torch.float16, device=device)
    tokens = torch.full((2,), 7, dtype=torch.int32, device=device)
    nothing, index = memory[:0], tokens[:0]
    weight = torch.ones(64, dtype=torch.float16, device=device)
    rows.rms_norm(nothing, nothing, weight, EPS)
    rows.add(nothing, nothing, nothing)
    rows.take_rows(nothing, weight[None], index)
    rows.gather_tokens(index, index, index)
    assert (memory == 7).all()
    assert (tokens == 7).all()
