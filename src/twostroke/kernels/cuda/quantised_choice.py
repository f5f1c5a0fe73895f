"""Which tiles a product with a quantised matrix is computed with.

Tables of what was fastest; no launch and no device. A configuration never changes what is computed,
but for the order of sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton

from twostroke.kernels.cuda.quantised_kernel import Tiles
from twostroke.kernels.cuda.quantised_layout import Layout
from twostroke.kernels.cuda.types import QuantMatrix

# Programs that a product is cut into if it can be: some for every processor of a large device.
PROGRAMS = 400
# Tokens up to which many rows are multiplied without writing the weights out first.
FUSED_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Config:
    """Tiles of a product (see quantised_kernel.py), its warps, and cells asked for ahead."""

    slices: int
    rows: int
    columns: int
    parts: int = 1
    warps: int = 4
    stages: int = 4
    scale_weights: bool = False
    prefetch: int = 0

    def get_grid(self, tokens: int, outputs: int) -> tuple[int, int, int]:
        """Programs: token tiles, row tiles, parts."""
        return (triton.cdiv(tokens, self.columns), triton.cdiv(outputs, self.rows), self.parts)

    def get_tiles(self, layout: Layout, inputs: int, gate: str, asm: bool, overlap: bool) -> Tiles:
        """The constants of the kernel."""
        return Tiles(
            layout=layout,
            gate=gate,
            even=inputs % (layout.cell * self.slices) == 0,
            slices=self.slices,
            rows=self.rows,
            columns=self.columns,
            parts=self.parts,
            stages=self.stages,
            # Minimums and groups that end within a piece are only known to weights.
            scale_weights=self.scale_weights or layout.minimums or layout.group < 32,
            prefetch=self.prefetch if overlap else 0,
            asm=asm,
            overlap=overlap,
        )


def is_fused(tokens: int) -> bool:
    """Whether many rows are multiplied in the kernel rather than by cuBLAS."""
    return tokens <= FUSED_TOKENS


def choose_few(tokens: int, matrix: QuantMatrix, gated: bool, shared: bool) -> Config:
    """Tiles for 1 to 64 tokens. shared: there is memory for parts."""
    stages = 3 if matrix.bits * matrix.group >= 512 else 4
    if tokens == 1:
        if matrix.outputs > 16384:
            return Config(slices=4, rows=32, columns=2, stages=stages)
        return Config(slices=8, rows=16, columns=1, stages=stages)
    columns = max(2, triton.next_power_of_2(tokens))
    if columns <= 8:
        slices = 16 // columns if columns > 2 else 4
        config = Config(slices, 128 // slices, columns, stages=stages)
    elif columns <= 16:
        config = Config(1, 128, columns, stages=stages)
    else:
        config = Config(1, 128, columns, stages=3, scale_weights=True)
    return config


def choose_many(tokens: int) -> Config:
    """Tiles for more."""
    columns = 64 if tokens <= 64 else 128
    return Config(1, 128, columns, warps=8, stages=3, scale_weights=True)


def choose_exact(matrix: QuantMatrix, shared: bool) -> Config:
    """Tiles for any number of tokens: they depend on nothing but the matrix."""
    return Config(1, 64, 32, stages=4, scale_weights=True)
