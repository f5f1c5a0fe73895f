"""Weights as the native kernels hold them: packed matrices and float vectors.

A packed matrix is a view of memory it does not own. Whoever packs a whole model does so into one
block of memory, which can be written to a file and read back instead of packing again.
"""

from __future__ import annotations

import contextlib
import mmap
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twostroke.kernels.ops import F32
from twostroke.spec.quant import Format

ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A weight matrix (outputs, inputs), packed; `native` is a `_native.Matrix`.

    kind: the last part of its name ("q", "down"), for times by op.
    """

    native: Any
    outputs: int
    inputs: int
    is_quantised: bool
    kind: str = "linear"

    @property
    def bytes(self) -> int:
        """Bytes the packed weights take."""
        return int(self.native.bytes)


@dataclass(frozen=True, slots=True)
class Vector:
    """A norm weight or a bias, float32."""

    values: F32


def get_packed_bytes(format: Format, shape: tuple[int, int]) -> int:
    """Bytes of a packed matrix (outputs, inputs)."""
    from twostroke._native import packed_bytes

    return packed_bytes(format.value, *shape)


def get_layout_fingerprint() -> int:
    """Differs between builds that pack differently."""
    from twostroke._native import layout_fingerprint

    return layout_fingerprint()


def allocate(size: int) -> NDArray[np.uint8]:
    """Zeroed memory (size,) for packed weights, in huge pages where the system has them to give."""
    memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # advice only: its lack costs speed
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8, size)


def pack_into(
    memory: NDArray[np.uint8],
    pool: Any,
    format: Format,
    data: NDArray[np.uint8],
    shape: tuple[int, int],
) -> None:
    """Packs file bytes (row-major blocks of `format`) of a matrix (outputs, inputs).

    memory: `get_packed_bytes` of it, zeroed, aligned to ALIGNMENT; written to. `pool` is the
    `_native.ThreadPool` that does the work. Nothing is rounded.
    """
    from twostroke._native import pack

    pack(pool, format.value, data, memory, *shape)


def view_matrix(
    memory: NDArray[np.uint8], format: Format, shape: tuple[int, int], kind: str = "linear"
) -> PackedMatrix:
    """The matrix (outputs, inputs) that was packed into `memory`, which it keeps alive."""
    from twostroke._native import Matrix

    outputs, inputs = shape
    native = Matrix(format.value, memory, outputs, inputs)
    return PackedMatrix(native, outputs, inputs, format.is_quantised, kind)


def pack_matrix(
    pool: Any, format: Format, data: NDArray[np.uint8], shape: tuple[int, int]
) -> PackedMatrix:
    """A matrix packed into memory of its own; see `pack_into`."""
    memory = allocate(get_packed_bytes(format, shape))
    pack_into(memory, pool, format, data, shape)
    return view_matrix(memory, format, shape)
