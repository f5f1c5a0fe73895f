"""Weights as the native kernels hold them: packed matrices and float vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twostroke.kernels.ops import F32
from twostroke.spec.quant import Format


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A weight matrix (outputs, inputs), packed; `native` is a `_native.Matrix`."""

    native: Any
    outputs: int
    inputs: int
    is_quantised: bool

    @property
    def bytes(self) -> int:
        """Bytes the packed weights take."""
        return int(self.native.bytes)


@dataclass(frozen=True, slots=True)
class Vector:
    """A norm weight or a bias, float32."""

    values: F32


def pack_matrix(
    pool: Any, format: Format, data: NDArray[np.uint8], shape: tuple[int, int]
) -> PackedMatrix:
    """Packs file bytes (row-major blocks of `format`) of a matrix (outputs, inputs).

    `pool` is the `_native.ThreadPool` that does the work. Nothing is rounded.
    """
    from twostroke._native import Matrix

    outputs, inputs = shape
    native = Matrix(pool, format.value, data, outputs, inputs)
    return PackedMatrix(native, outputs, inputs, format.is_quantised)
