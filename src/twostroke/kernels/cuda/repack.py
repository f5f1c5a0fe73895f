"""Matrices as the device holds them, from stored bytes or from floats; joined, permuted, sharded.

The work is done where the matrix will live: stored bytes are uploaded as they are, some rows at a
time, and taken apart there, so that beside the result only a bounded piece is ever in memory. The
integers of stored formats are kept; only scales are multiplied out, in float32, and rounded to
float16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from twostroke.kernels.cuda.quantised_formats import DECODERS, LAYOUTS
from twostroke.kernels.cuda.quantised_layout import (
    Layout,
    Pieces,
    allocate,
    get_layout,
    pack_rows,
    pair_scales,
    unpack_rows,
)
from twostroke.kernels.cuda.types import DenseMatrix, Matrix, QuantMatrix, Tensor
from twostroke.spec.quant import Format

# Weights that are taken apart at a time: some ten bytes of memory each while it lasts.
CHUNK_WEIGHTS = 1 << 24

_FLOATS = {Format.F32: torch.float32, Format.F16: torch.float16, Format.BF16: torch.bfloat16}


def get_quant_bytes(fmt: Format, shape: tuple[int, int]) -> int:
    """Bytes of a stored matrix (outputs, inputs) once repacked; of floats, in 16 bits."""
    if fmt in _FLOATS:
        return 2 * shape[0] * shape[1]
    return LAYOUTS[fmt].get_bytes(*shape)


def repack(
    fmt: Format,
    data: NDArray[np.uint8],
    shape: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
) -> Matrix:
    """The matrix of a stored tensor.

    Args: data (bytes,) uint8, the tensor's bytes; shape (outputs, inputs); dtype, of the
    activations, in which floating formats are kept.
    Raises: ValueError if rows do not fill whole blocks or data has another length.
    """
    outputs, inputs = shape
    block = fmt.block
    if inputs % block.weights or data.size != fmt.get_bytes(outputs * inputs):
        raise ValueError(f"{data.size} bytes are no {fmt.value} matrix of shape {shape}")
    stored = data.reshape(outputs, inputs // block.weights * block.bytes)
    if fmt in _FLOATS:
        values = torch.empty(outputs, inputs, dtype=dtype, device=device)
        for begin, end in _chunk(outputs, inputs):
            values[begin:end] = _upload(stored[begin:end], device).view(_FLOATS[fmt])
        return DenseMatrix(values)
    matrix = allocate(LAYOUTS[fmt], outputs, inputs, device)
    for begin, end in _chunk(outputs, inputs):
        blocks = _upload(stored[begin:end], device).unflatten(1, (-1, block.bytes))
        pack_rows(matrix, begin, DECODERS[fmt](blocks))
    return matrix


def quantise_groups(values: Tensor, bits: int, group: int = 128) -> QuantMatrix:
    """Weights (outputs, inputs) rounded to the nearest step of their group, symmetric about 0.

    A group's largest weight is 7 (4 bits) or 127 (8 bits) steps.
    """
    outputs, inputs = values.shape
    layout = Layout(bits, group, minimums=False)
    matrix = allocate(layout, outputs, inputs, values.device)
    last = 7 if bits == 4 else 127
    for begin, end in _chunk(outputs, inputs):
        rows = torch.nn.functional.pad(values[begin:end].float(), (0, -inputs % group))
        groups = rows.unflatten(1, (-1, group))
        scales = (groups.abs().amax(dim=2) / last).to(torch.float16)
        # A scale that float16 rounds to 0 stands for zeros, whatever they are divided by.
        steps = torch.where(scales == 0, 1.0, scales.float())[:, :, None]
        integers = torch.round(groups / steps).clamp_(-last, last) + layout.zero
        integers = integers.flatten(1)[:, :inputs].to(torch.int16)
        pack_rows(matrix, begin, Pieces(integers, scales, None))
    return matrix


def make_random(
    shape: tuple[int, int], bits: int, group: int, device: torch.device, seed: int
) -> QuantMatrix:
    """A synthetic matrix (outputs, inputs) of weights whose variance is about 1 / inputs."""
    outputs, inputs = shape
    generator = torch.Generator(device).manual_seed(seed)
    matrix = allocate(Layout(bits, group, minimums=False), outputs, inputs, device)
    matrix.packed.random_(-(1 << 15), 1 << 15, generator=generator)
    # Integers spread evenly over 2^bits values have a deviation of 2^bits / sqrt(12).
    middle = (12 / inputs) ** 0.5 / (1 << bits)
    groups = -(-inputs // group)
    for begin, end in _chunk(outputs, groups):
        spread = torch.rand(end - begin, groups, generator=generator, device=device)
        scales = (middle * (0.75 + 0.5 * spread)).to(torch.float16)
        matrix.scales[:, begin:end] = pair_scales(scales, matrix.scales.shape[0])
    return matrix


def dequantise_rows(matrix: QuantMatrix, begin: int, end: int) -> Tensor:
    """Rows `begin` … `end` - 1, float32, in plain PyTorch: what kernels are checked against."""
    pieces = unpack_rows(matrix, begin, end)
    layout = get_layout(matrix)

    def spread(scales: Tensor) -> Tensor:
        return scales.float().repeat_interleave(layout.group, dim=1)[:, : matrix.inputs]

    values = (pieces.integers - layout.zero).float() * spread(pieces.scales)
    return values if pieces.minimums is None else values + spread(pieces.minimums)


def stack(matrices: Sequence[Matrix]) -> Matrix:
    """One matrix of all outputs, in order.

    Quantised matrices of different kinds become the widest of them: the weights stay what they are.
    Raises: ValueError if inputs differ, or some are quantised and some are not.
    """
    if len({matrix.inputs for matrix in matrices}) != 1:
        raise ValueError("matrices of different inputs cannot be stacked")
    dense = [matrix.values for matrix in matrices if isinstance(matrix, DenseMatrix)]
    quantised = [matrix for matrix in matrices if isinstance(matrix, QuantMatrix)]
    if not quantised:
        return DenseMatrix(torch.cat(dense))
    if dense:
        raise ValueError("floating and quantised matrices cannot be stacked")
    layouts = [get_layout(matrix) for matrix in quantised]
    widest = Layout(
        max(layout.bits for layout in layouts),
        min(layout.group for layout in layouts),
        any(layout.minimums for layout in layouts),
    )
    alike = [_convert(matrix, widest) for matrix in quantised]
    minimums = [matrix.minimums for matrix in alike if matrix.minimums is not None]
    return QuantMatrix(
        torch.cat([matrix.packed for matrix in alike], dim=1),
        torch.cat([matrix.scales for matrix in alike], dim=1),
        torch.cat(minimums, dim=1) if minimums else None,
        widest.bits,
        widest.group,
        sum(matrix.outputs for matrix in alike),
        alike[0].inputs,
    )


def permute_rows(matrix: Matrix, order: Tensor) -> Matrix:
    """The matrix whose row i is row order[i] of this one; order (outputs,) int64 on its device."""
    if isinstance(matrix, DenseMatrix):
        return DenseMatrix(matrix.values[order])
    return _map_rows(matrix, lambda each: each[:, order])


def shard_rows(matrix: Matrix, begin: int, end: int) -> Matrix:
    """Outputs `begin` … `end` - 1, in memory of their own."""
    if isinstance(matrix, DenseMatrix):
        return DenseMatrix(matrix.values[begin:end].clone())
    return _map_rows(
        matrix, lambda each: each[:, begin:end].clone(memory_format=torch.contiguous_format)
    )


def shard_columns(matrix: Matrix, begin: int, end: int) -> Matrix:
    """Inputs `begin` … `end` - 1, in memory of their own.

    Raises: ValueError if either is within a group.
    """
    if isinstance(matrix, DenseMatrix):
        return DenseMatrix(matrix.values[:, begin:end].contiguous())
    layout = get_layout(matrix)
    if begin % layout.group or (end % layout.group and end != matrix.inputs):
        raise ValueError(f"inputs {begin} to {end} are no whole groups of {layout.group}")
    shard = allocate(layout, matrix.outputs, end - begin, matrix.packed.device)
    groups = slice(begin // layout.group, -(-end // layout.group))
    for first, last in _chunk(matrix.outputs, matrix.inputs):
        pieces = unpack_rows(matrix, first, last)
        minimums = None if pieces.minimums is None else pieces.minimums[:, groups]
        integers = pieces.integers[:, begin:end]
        pack_rows(shard, first, Pieces(integers, pieces.scales[:, groups], minimums))
    return shard


def _convert(matrix: QuantMatrix, layout: Layout) -> QuantMatrix:
    """The same weights in a layout of no fewer bits, no wider groups, and no fewer minimums."""
    old = get_layout(matrix)
    if old == layout:
        return matrix
    wider = allocate(layout, matrix.outputs, matrix.inputs, matrix.packed.device)
    groups = -(-matrix.inputs // layout.group)
    for begin, end in _chunk(matrix.outputs, matrix.inputs):
        pieces = unpack_rows(matrix, begin, end)
        # Of 8 bits the integers take the zero in; of 4 bits only minimums can.
        shift = old.zero if layout.bits == 8 else 0
        minimums = None
        if layout.minimums:
            minimums = pieces.minimums
            if minimums is None:
                minimums = -(old.zero - shift) * pieces.scales
            minimums = _repeat(minimums, old.group // layout.group, groups)
        scales = _repeat(pieces.scales, old.group // layout.group, groups)
        pack_rows(wider, begin, Pieces(pieces.integers - shift, scales, minimums))
    return wider


def _repeat(scales: Tensor, times: int, groups: int) -> Tensor:
    """Scales (rows, fewer groups) of groups that are `times` as narrow, (rows, groups)."""
    return scales.repeat_interleave(times, dim=1)[:, :groups]


def _map_rows(matrix: QuantMatrix, change: Callable[[Tensor], Tensor]) -> QuantMatrix:
    """The matrix with the middle axis of each tensor changed."""
    packed = change(matrix.packed)
    return QuantMatrix(
        packed,
        change(matrix.scales),
        None if matrix.minimums is None else change(matrix.minimums),
        matrix.bits,
        matrix.group,
        packed.shape[1],
        matrix.inputs,
    )


def _chunk(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Bounds of pieces of the rows, of CHUNK_WEIGHTS or a row."""
    step = max(1, CHUNK_WEIGHTS // max(columns, 1))
    for begin in range(0, rows, step):
        yield begin, min(begin + step, rows)


def _upload(stored: NDArray[np.uint8], device: torch.device) -> Tensor:
    """A copy on the device; through a copy on the host, as files may be mapped read-only."""
    return torch.from_numpy(np.array(stored)).to(device)
