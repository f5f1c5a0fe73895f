"""Rotary tables: cos and sin for every position, from a RopeSpec.

Frequencies and angles are computed in float64 and rounded once to float32.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from twostroke.kernels.ops import RopeTable
from twostroke.spec.model import (
    LinearScaling,
    Llama3Scaling,
    RopeLayout,
    RopeSpec,
    StoredFactors,
)

F64 = NDArray[np.float64]


def get_frequencies(rope: RopeSpec, head_dim: int, factors: F64 | None = None) -> F64:
    """Angular frequency of each pair, (head_dim/2,) radians per position.

    base^(-2i/head_dim) (Su et al. 2021, §3.2.2), changed by the spec's scaling. `factors`
    (head_dim/2,) are the file's stored divisors, needed for StoredFactors.
    """
    frequencies = rope.base ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    scaling = rope.scaling
    if isinstance(scaling, LinearScaling):
        frequencies /= scaling.factor
    elif isinstance(scaling, Llama3Scaling):
        frequencies = _scale_llama3(frequencies, scaling)
    elif isinstance(scaling, StoredFactors):
        assert factors is not None, "StoredFactors needs the rope_factors tensor"
        frequencies /= factors
    return frequencies


def _scale_llama3(frequencies: F64, scaling: Llama3Scaling) -> F64:
    """Low frequencies are divided by the factor, high ones kept, those between interpolated.

    As released with Llama 3.1: the boundary wavelengths are the original context over the low and
    high frequency factors.
    """
    turns = scaling.original_context_tokens * frequencies / (2 * np.pi)
    smooth = (turns - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    smooth = np.clip(smooth, 0.0, 1.0)
    return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies


def make_rope_table(head_dim: int, positions: int, layout: RopeLayout) -> RopeTable:
    """cos and sin (positions, head_dim/2) float32, not filled in yet; see `fill_rope_rows`.

    What was never filled takes no memory.
    """
    shape = (positions, head_dim // 2)
    return RopeTable(np.empty(shape, np.float32), np.empty(shape, np.float32), layout.value)


def fill_rope_rows(table: RopeTable, frequencies: F64, first: int, last: int) -> None:
    """Writes cos and sin for positions first <= position < last; see `get_frequencies`."""
    angles = np.arange(first, last, dtype=np.float64)[:, None] * frequencies
    table.cos[first:last] = np.cos(angles)
    table.sin[first:last] = np.sin(angles)
