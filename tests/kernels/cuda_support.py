"""What the tests of the GPU's kernels share: random tensors, NumPy views, the bound on errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

HALVES = (torch.float16, torch.bfloat16)


def draw(
    rng: np.random.Generator, shape: Sequence[int], dtype: torch.dtype, device: str
) -> torch.Tensor:
    """Normally distributed numbers, rounded to dtype."""
    return torch.from_numpy(rng.standard_normal(tuple(shape))).to(dtype).to(device)


def poison(shape: Sequence[int], dtype: torch.dtype, device: str) -> torch.Tensor:
    """An output that shows what was not written: all NaN."""
    return torch.full(tuple(shape), float("nan"), dtype=dtype, device=device)


def to_numpy(x: torch.Tensor) -> NDArray[np.float32]:
    """Any tensor as float32 in NumPy."""
    return x.detach().to("cpu", torch.float32).numpy()


def assert_as_exact_as_plain(
    result: torch.Tensor, plain: torch.Tensor, exact: NDArray[Any]
) -> None:
    """The largest error against `exact` is at most twice that of plain code in the same dtype."""
    assert result.shape == exact.shape
    error = np.abs(to_numpy(result).astype(np.float64) - exact).max()
    allowed = 2 * np.abs(to_numpy(plain).astype(np.float64) - exact).max()
    assert error <= allowed, (error, allowed)
