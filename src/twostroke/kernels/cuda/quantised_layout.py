"""How a quantised matrix lies on the device, and how integers and scales get there and back.

Owns the layout that quantised_kernel.py reads; knows nothing of files.

    packed (blocks, outputs, 32) int16: 32 words of a row's block are its 32 * pieces inputs; piece
    j of word i is input 32 j + i of the block. 4 bits make 4 pieces, lowest first; 8 bits make 2.
    scales, minimums (pairs, outputs) int32: two float16, the even group's below the odd one's.

Blocks come first, so that a tile of outputs is one piece of memory, and stacking or slicing outputs
is slicing the middle axis. Pairs of scales are words that the device can copy by itself, as it
cannot a single float16. The smallest piece of a row that has whole blocks and whole pairs is a
cell; rows are filled up to whole cells, with scales of zero. Scales are float16 whatever the
activations are: bfloat16 would lose three bits of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from twostroke.kernels.cuda.types import QuantMatrix, Tensor

WORDS = 32
BITS = (4, 8)
GROUPS = (16, 32, 64, 128)


@dataclass(frozen=True, slots=True)
class Layout:
    """The kind of a quantised matrix: bits of an integer, inputs of a group, minimums or none."""

    bits: int
    group: int
    minimums: bool

    def __post_init__(self) -> None:
        if self.bits not in BITS or self.group not in GROUPS:
            raise ValueError(f"{self.bits} bits in groups of {self.group} have no kernel")

    @property
    def pieces(self) -> int:
        """Integers of a word."""
        return 16 // self.bits

    @property
    def block(self) -> int:
        """Inputs of a block."""
        return WORDS * self.pieces

    @property
    def unroll(self) -> int:
        """Blocks of a cell."""
        return max(1, 2 * self.group // self.block)

    @property
    def cell(self) -> int:
        """Inputs of a cell."""
        return self.block * self.unroll

    @property
    def pairs(self) -> int:
        """Pairs of scales of a row of a cell."""
        return self.cell // (2 * self.group)

    @property
    def zero(self) -> int:
        """The integer that stands for 0, or for the minimum where there are minimums."""
        return 8 if self.bits == 4 and not self.minimums else 0

    @property
    def offset(self) -> int:
        """What is added to an integer so that it is stored without a sign."""
        return 128 if self.bits == 8 else 0

    def count_cells(self, inputs: int) -> int:
        """Cells of a row."""
        return -(-inputs // self.cell)

    def get_bytes(self, outputs: int, inputs: int) -> int:
        """Bytes of a matrix."""
        scales = 4 * self.pairs * (2 if self.minimums else 1)
        return self.count_cells(inputs) * (2 * WORDS * self.unroll + scales) * outputs


def get_layout(matrix: QuantMatrix) -> Layout:
    """The matrix's kind."""
    return Layout(matrix.bits, matrix.group, matrix.minimums is not None)


@dataclass(frozen=True, slots=True, eq=False)
class Pieces:
    """Rows of a matrix before they are packed: integers (rows, inputs) int16 as types.py has them,
    scales and minimums (rows, inputs / group) float16, the last group perhaps not full."""

    integers: Tensor
    scales: Tensor
    minimums: Tensor | None


def allocate(layout: Layout, outputs: int, inputs: int, device: torch.device) -> QuantMatrix:
    """A matrix whose rows are yet to be packed."""
    cells = layout.count_cells(inputs)
    pairs = (cells * layout.pairs, outputs)
    return QuantMatrix(
        torch.empty(cells * layout.unroll, outputs, WORDS, dtype=torch.int16, device=device),
        torch.empty(pairs, dtype=torch.int32, device=device),
        torch.empty(pairs, dtype=torch.int32, device=device) if layout.minimums else None,
        layout.bits,
        layout.group,
        outputs,
        inputs,
    )


def pack_rows(matrix: QuantMatrix, begin: int, pieces: Pieces) -> None:
    """Put rows `begin` … of a matrix in their place."""
    layout = get_layout(matrix)
    rows, inputs = pieces.integers.shape
    assert inputs == matrix.inputs
    end = begin + rows
    blocks = matrix.packed.shape[0]
    padding = blocks * layout.block - inputs
    filled = torch.nn.functional.pad(pieces.integers, (0, padding), value=layout.zero)
    integers = (filled + layout.offset).view(rows, blocks, layout.pieces, WORDS)
    words = integers[:, :, 0].to(torch.int32)
    for piece in range(1, layout.pieces):
        words |= integers[:, :, piece].to(torch.int32) << (layout.bits * piece)
    matrix.packed[:, begin:end] = words.to(torch.int16).transpose(0, 1)
    matrix.scales[:, begin:end] = pair_scales(pieces.scales, matrix.scales.shape[0])
    if matrix.minimums is not None:
        assert pieces.minimums is not None
        matrix.minimums[:, begin:end] = pair_scales(pieces.minimums, matrix.minimums.shape[0])


def unpack_rows(matrix: QuantMatrix, begin: int, end: int) -> Pieces:
    """Rows `begin` … `end` - 1 as they were before they were packed."""
    layout = get_layout(matrix)
    words = matrix.packed[:, begin:end].to(torch.int32).transpose(0, 1)
    mask = (1 << layout.bits) - 1
    pieces = [words >> (layout.bits * piece) & mask for piece in range(layout.pieces)]
    integers = torch.stack(pieces, dim=2).reshape(end - begin, -1)[:, : matrix.inputs]
    groups = -(-matrix.inputs // layout.group)
    minimums = None
    if matrix.minimums is not None:
        minimums = unpair_scales(matrix.minimums[:, begin:end], groups)
    scales = unpair_scales(matrix.scales[:, begin:end], groups)
    return Pieces((integers - layout.offset).to(torch.int16), scales, minimums)


def pair_scales(scales: Tensor, pairs: int) -> Tensor:
    """(rows, groups) float16 to (pairs, rows) int32, zeros in groups there are none of."""
    filled = torch.nn.functional.pad(scales, (0, 2 * pairs - scales.shape[1]))
    return filled.contiguous().view(torch.int32).transpose(0, 1)


def unpair_scales(pairs: Tensor, groups: int) -> Tensor:
    """(pairs, rows) int32 to (rows, groups) float16."""
    # Flat in between: of a single pair the strides are not what a change of type asks for.
    words = pairs.transpose(0, 1).reshape(-1)
    return words.view(torch.float16).view(pairs.shape[1], -1)[:, :groups]
