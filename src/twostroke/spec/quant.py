"""Weight formats: how many weights a block holds, and in how many bytes.

The formats are those of GGUF files (blocks of quantised weights with their scales) and the plain
floating types. Only sizes and names live here; the bytes are decoded by the kernel backends
(`kernels/reference/dequant.py` states each layout in NumPy). All blocks run along a matrix row,
i.e. along the input dimension.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Format(enum.Enum):
    """A stored weight format; the value is its name in GGUF files and in our tables."""

    F32 = "F32"
    F16 = "F16"
    BF16 = "BF16"
    Q8_0 = "Q8_0"
    Q4_0 = "Q4_0"
    Q4_1 = "Q4_1"
    Q5_0 = "Q5_0"
    Q5_1 = "Q5_1"
    Q4_K = "Q4_K"
    Q5_K = "Q5_K"
    Q6_K = "Q6_K"

    @property
    def block(self) -> BlockShape:
        """Weights and bytes of one block of this format."""
        return _BLOCKS[self]

    @property
    def is_quantised(self) -> bool:
        """True when weights are small integers with shared scales."""
        return self.block.weights > 1

    def get_bytes(self, weights: int) -> int:
        """Bytes that `weights` weights take; `weights` must fill whole blocks (ValueError)."""
        shape = self.block
        if weights % shape.weights:
            raise ValueError(
                f"{weights} weights do not fill {self.value} blocks of {shape.weights}"
            )
        return weights // shape.weights * shape.bytes


@dataclass(frozen=True, slots=True)
class BlockShape:
    """One block: `weights` weights stored in `bytes` bytes."""

    weights: int
    bytes: int


_BLOCKS = {
    Format.F32: BlockShape(1, 4),
    Format.F16: BlockShape(1, 2),
    Format.BF16: BlockShape(1, 2),
    Format.Q8_0: BlockShape(32, 2 + 32),
    Format.Q4_0: BlockShape(32, 2 + 16),
    Format.Q4_1: BlockShape(32, 2 + 2 + 16),
    Format.Q5_0: BlockShape(32, 2 + 4 + 16),
    Format.Q5_1: BlockShape(32, 2 + 2 + 4 + 16),
    Format.Q4_K: BlockShape(256, 2 + 2 + 12 + 128),
    Format.Q5_K: BlockShape(256, 2 + 2 + 12 + 32 + 128),
    Format.Q6_K: BlockShape(256, 128 + 64 + 16 + 2),
}
