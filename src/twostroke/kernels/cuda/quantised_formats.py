"""Stored formats taken apart on the device: integers, scales and minimums, not yet multiplied.

Every function takes the bytes of some rows, (rows, blocks, bytes of a block) uint8, and returns
their Pieces. The pictures of the blocks are in kernels/reference/dequant.py, whose names these use.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from twostroke.kernels.cuda.quantised_layout import Layout, Pieces
from twostroke.kernels.cuda.types import Tensor
from twostroke.spec.quant import Format


def _half(blocks: Tensor, start: int) -> Tensor:
    """The float16 at byte `start` of each block, (rows, blocks)."""
    return blocks[:, :, start : start + 2].contiguous().view(torch.float16)[:, :, 0]


def _nibbles(packed: Tensor) -> Tensor:
    """All low nibbles of the last axis, then all high ones."""
    return torch.cat([packed & 0x0F, packed >> 4], dim=-1)


def _shift(packed: Tensor, shifts: list[int]) -> Tensor:
    """The bytes moved right by each of the shifts, on a new axis before the last."""
    return (
        packed[..., None, :]
        >> torch.tensor(shifts, dtype=torch.uint8, device=packed.device)[:, None]
    )


def _fifth_bits(packed: Tensor) -> Tensor:
    """(rows, blocks, 4) bytes to (rows, blocks, 32): bit i of the word, moved to value 16."""
    bits = _shift(packed, list(range(8))).transpose(-1, -2) & 1
    return bits.flatten(-2) << 4


def _join(integers: Tensor, zero: int, scales: Tensor, minimums: Tensor | None = None) -> Pieces:
    """Pieces of integers of any shape (rows, …), less zero, and scales and minimums likewise."""
    return Pieces(
        integers.flatten(1).to(torch.int16) - zero,
        scales.flatten(1).to(torch.float16),
        None if minimums is None else minimums.flatten(1).to(torch.float16),
    )


def _decode_q8_0(blocks: Tensor) -> Pieces:
    return _join(blocks[:, :, 2:].contiguous().view(torch.int8), 0, _half(blocks, 0))


def _decode_q4_0(blocks: Tensor) -> Pieces:
    return _join(_nibbles(blocks[:, :, 2:]), 0, _half(blocks, 0))


def _decode_q4_1(blocks: Tensor) -> Pieces:
    return _join(_nibbles(blocks[:, :, 4:]), 0, _half(blocks, 0), _half(blocks, 2))


def _decode_q5_0(blocks: Tensor) -> Pieces:
    quants = _nibbles(blocks[:, :, 6:]) | _fifth_bits(blocks[:, :, 2:6])
    return _join(quants, 16, _half(blocks, 0))


def _decode_q5_1(blocks: Tensor) -> Pieces:
    quants = _nibbles(blocks[:, :, 8:]) | _fifth_bits(blocks[:, :, 4:8])
    return _join(quants, 0, _half(blocks, 0), _half(blocks, 2))


def _decode_k_quants(blocks: Tensor, quants: Tensor) -> Pieces:
    """Pieces of a Q4_K or Q5_K: w = (d * s) * q - (m * t)."""
    first, second, third = (blocks[:, :, start : start + 4] for start in (4, 8, 12))
    scales = torch.cat([first & 0x3F, (third & 0x0F) | ((first >> 6) << 4)], dim=2)
    minimums = torch.cat([second & 0x3F, (third >> 4) | ((second >> 6) << 4)], dim=2)
    scale = _half(blocks, 0).float()[:, :, None] * scales.float()
    minimum = _half(blocks, 2).float()[:, :, None] * minimums.float()
    return _join(quants, 0, scale, -minimum)


def _decode_q4_k(blocks: Tensor) -> Pieces:
    return _decode_k_quants(blocks, _shift_nibbles(blocks[:, :, 16:]))


def _decode_q5_k(blocks: Tensor) -> Pieces:
    high = _shift(blocks[:, :, 16:48], list(range(8))) & 1
    return _decode_k_quants(blocks, _shift_nibbles(blocks[:, :, 48:]) | (high << 4))


def _shift_nibbles(packed: Tensor) -> Tensor:
    """(rows, blocks, 128) bytes, four runs of 32, to (rows, blocks, 8, 32)."""
    runs = packed.unflatten(2, (4, 32))
    return (_shift(runs, [0, 4]) & 0x0F).flatten(2, 3)


def _decode_q6_k(blocks: Tensor) -> Pieces:
    nibbles = blocks[:, :, :128].unflatten(2, (2, 64))
    low = _nibbles(nibbles).unflatten(3, (4, 32))
    high = _shift(blocks[:, :, 128:192].unflatten(2, (2, 32)), [0, 2, 4, 6]) & 3
    scales = blocks[:, :, 192:208].contiguous().view(torch.int8).float()
    return _join(low | (high << 4), 32, _half(blocks, 208).float()[:, :, None] * scales)


LAYOUTS = {
    Format.Q8_0: Layout(8, 32, minimums=False),
    Format.Q4_0: Layout(4, 32, minimums=False),
    Format.Q4_1: Layout(4, 32, minimums=True),
    Format.Q5_0: Layout(8, 32, minimums=False),
    Format.Q5_1: Layout(8, 32, minimums=True),
    Format.Q4_K: Layout(4, 32, minimums=True),
    Format.Q5_K: Layout(8, 32, minimums=True),
    Format.Q6_K: Layout(8, 16, minimums=False),
}

DECODERS: dict[Format, Callable[[Tensor], Pieces]] = {
    Format.Q8_0: _decode_q8_0,
    Format.Q4_0: _decode_q4_0,
    Format.Q4_1: _decode_q4_1,
    Format.Q5_0: _decode_q5_0,
    Format.Q5_1: _decode_q5_1,
    Format.Q4_K: _decode_q4_k,
    Format.Q5_K: _decode_q5_k,
    Format.Q6_K: _decode_q6_k,
}
