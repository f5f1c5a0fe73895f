"""Which tiles a product with a quantised matrix is computed with.

Tables of what was fastest; no launch and no device. A configuration never changes what is computed,
but for the order of sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton

from twostroke.kernels.cuda.quantised_kernel import Tiles
from twostroke.kernels.cuda.quantised_layout import get_layout
from twostroke.kernels.cuda.types import QuantMatrix

# Programs that a product is cut into if it can be: some for every processor of a large device.
PROGRAMS = 400
MAX_PARTS = 8
# Outputs from which there are programs enough for each to read a larger share of the inputs.
LARGE = 16384
# Outputs from which programs of two warps keep more loads in flight: vocabularies.
HUGE = 65536
# Tokens up to which many rows are multiplied without writing the weights out first.
FUSED_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Config:
    """Tiles of a product (see quantised_kernel.py) and its warps."""

    slices: int
    rows: int
    columns: int
    parts: int = 1
    warps: int = 4
    stages: int = 4
    scale_weights: bool = False

    def get_grid(self, tokens: int, outputs: int) -> tuple[int, int, int]:
        """Programs: token tiles, row tiles, parts."""
        return (triton.cdiv(tokens, self.columns), triton.cdiv(outputs, self.rows), self.parts)

    def get_tiles(self, matrix: QuantMatrix, gate: str, asm: bool) -> Tiles:
        """The constants of the kernel."""
        layout, inputs = get_layout(matrix), matrix.inputs
        return Tiles(
            layout=layout,
            gate=gate,
            even=inputs % (layout.cell * self.slices) == 0,
            slices=self.slices,
            rows=self.rows,
            columns=self.columns,
            parts=self.parts,
            stages=self.stages,
            # Of groups that end within a piece, sums know nothing.
            scale_weights=self.scale_weights or layout.group < 32,
            asm=asm,
        )


def is_fused(tokens: int) -> bool:
    """Whether many rows are multiplied in the kernel rather than by cuBLAS."""
    return tokens <= FUSED_TOKENS


def choose_few(tokens: int, matrix: QuantMatrix, is_shared: bool) -> Config:
    """Tiles for 1 to 64 tokens. is_shared: there is a workspace for parts."""
    layout = get_layout(matrix)
    columns = triton.next_power_of_2(tokens)
    # A stage of a cell of two or four blocks holds as much as two or four stages of one.
    warps, stages = 4, {1: 4, 2: 3, 4: 2}[layout.unroll]
    # A narrow side of 8 columns costs what one column costs, and of 16 hardly more.
    if tokens == 1:
        slices = 8 if matrix.outputs <= LARGE else 4
        columns = 8 // slices
        if matrix.outputs >= HUGE:
            warps, stages = 2, max(2, stages - 1)
    elif tokens <= 8:
        slices = min(4, 16 // columns)
    else:
        slices = 1
    rows = 128 // slices
    parts = count_parts(matrix, slices, rows) if is_shared else 1
    return Config(slices, rows, columns, parts, warps, stages, scale_weights=tokens > 16)


def choose_many(tokens: int) -> Config:
    """Tiles for more tokens."""
    return Config(1, 128, 128, warps=8, stages=2, scale_weights=True)


def choose_exact(matrix: QuantMatrix, is_shared: bool) -> Config:
    """Tiles for any number of tokens: they depend on nothing but the matrix."""
    parts = count_parts(matrix, 1, 64) if is_shared else 1
    return Config(1, 64, 32, parts, stages=4, scale_weights=True)


def count_parts(matrix: QuantMatrix, slices: int, rows: int) -> int:
    """Parts that make PROGRAMS programs of a product, each of at least two steps."""
    tiles = triton.cdiv(matrix.outputs, rows)
    steps = get_layout(matrix).count_cells(matrix.inputs) // slices
    return max(1, min(MAX_PARTS, PROGRAMS // tiles, steps // 2))
