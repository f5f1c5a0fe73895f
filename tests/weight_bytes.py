"""Random weights in the formats of files."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from twostroke.spec.quant import Format


def random_matrix_bytes(
    format: Format, shape: tuple[int, int], rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Random but sane file bytes of a matrix: any quants, scales of ordinary size."""
    outputs, inputs = shape
    if format in (Format.F32, Format.F16, Format.BF16):
        values = rng.standard_normal(shape).astype(np.float32)
        if format is Format.F16:
            return values.astype(np.float16).view(np.uint8).reshape(-1)
        if format is Format.BF16:
            return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).reshape(-1)
        return values.view(np.uint8).reshape(-1)
    size = format.block.bytes
    blocks = rng.integers(0, 256, (outputs * inputs // format.block.weights, size), np.uint8)
    halves = {"Q6_K": [208], "Q8_0": [0], "Q4_0": [0], "Q5_0": [0]}.get(format.value, [0, 2])
    # Scales that keep weights near 0.05 whatever the quants and inner scales are.
    largest = {"Q8_0": 16, "Q5_0": 2, "Q5_1": 2, "Q4_K": 32, "Q5_K": 64, "Q6_K": 200}
    for offset in halves:
        spread = 0.01 / largest.get(format.value, 1)
        scales = (rng.standard_normal(len(blocks)) * spread).astype(np.float16)
        blocks[:, offset : offset + 2] = scales.view(np.uint8).reshape(-1, 2)
    return np.ascontiguousarray(blocks).reshape(-1)
