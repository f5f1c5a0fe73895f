"""What the bytes of every weight format mean, in NumPy.

This is the definition the fast backends are checked against, so it is written to be read: one
function a format, each with a picture of its block. It must never be tuned at the cost of that.
Every format agrees bit for bit with the reference C code of GGUF, because the order of the
roundings is the same: scales are widened to float32 first, then multiplied, then offset.

`d` is a block's scale and `m` its minimum, both float16; `q` are the small integers. Multi-byte
values are little-endian. A nibble picture `lo|hi` names the low and the high four bits of a byte.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from twostroke.spec.quant import Format

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]


def dequantise(fmt: Format, data: U8, shape: tuple[int, ...]) -> F32:
    """Decode stored weights to float32.

    Args: fmt, the stored format; data (bytes,) uint8, the tensor's bytes; shape, the logical
    shape, whose last extent runs along the blocks.
    Returns: a new float32 array of `shape`.
    Raises: ValueError if a row does not fill whole blocks or `data` has another length.
    """
    block = fmt.block
    weights = int(np.prod(shape, dtype=np.int64))
    if shape and shape[-1] % block.weights:
        raise ValueError(f"a row of {shape[-1]} does not fill {fmt.value} blocks")
    if data.ndim != 1 or data.dtype != np.uint8 or data.size != fmt.get_bytes(weights):
        expected = fmt.get_bytes(weights)
        raise ValueError(f"{fmt.value} {shape} takes {expected} bytes, not {data.size}")
    blocks = np.ascontiguousarray(data).reshape(-1, block.bytes)
    return _DECODERS[fmt](blocks).reshape(shape)


def _f16(blocks: U8, start: int) -> F32:
    """The float16 at byte `start` of each block, as (blocks, 1) float32."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view(np.float16).astype(np.float32)


def _nibbles(packed: U8) -> U8:
    """(blocks, n) bytes to (blocks, 2n): all low nibbles first, then all high ones."""
    return np.concatenate([packed & 0x0F, packed >> 4], axis=1)


def _fifth_bits(packed: U8) -> U8:
    """(blocks, 4) bytes to (blocks, 32): bit i of the 32-bit word, moved to value 16."""
    return np.unpackbits(packed, axis=1, bitorder="little") << np.uint8(4)


def _decode_f32(blocks: U8) -> F32:
    """A weight is a float32."""
    return blocks.view(np.float32).copy()


def _decode_f16(blocks: U8) -> F32:
    """A weight is a float16."""
    return blocks.view(np.float16).astype(np.float32)


def _decode_bf16(blocks: U8) -> F32:
    """A weight is the upper half of a float32."""
    return (blocks.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _decode_q8_0(blocks: U8) -> F32:
    """w[i] = d * q[i], q signed.

    byte  0 1   2 ........ 33
          [d ]  [q0 ... q31 ]
    """
    return _f16(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)


def _decode_q4_0(blocks: U8) -> F32:
    """w[i] = d * (q[i] - 8).

    byte  0 1   2 ............... 17
          [d ]  [q0|q16 ... q15|q31]
    """
    quants = _nibbles(blocks[:, 2:]).astype(np.float32) - np.float32(8)
    return _f16(blocks, 0) * quants


def _decode_q4_1(blocks: U8) -> F32:
    """w[i] = d * q[i] + m.

    byte  0 1   2 3   4 ............... 19
          [d ]  [m ]  [q0|q16 ... q15|q31]
    """
    quants = _nibbles(blocks[:, 4:]).astype(np.float32)
    return _f16(blocks, 0) * quants + _f16(blocks, 2)


def _decode_q5_0(blocks: U8) -> F32:
    """w[i] = d * (q[i] - 16); bit i of h is the fifth bit of q[i].

    byte  0 1   2 .. 5   6 ............... 21
          [d ]  [h    ]  [q0|q16 ... q15|q31]
    """
    quants = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])
    return _f16(blocks, 0) * (quants.astype(np.float32) - np.float32(16))


def _decode_q5_1(blocks: U8) -> F32:
    """w[i] = d * q[i] + m; bit i of h is the fifth bit of q[i].

    byte  0 1   2 3   4 .. 7   8 ............... 23
          [d ]  [m ]  [h    ]  [q0|q16 ... q15|q31]
    """
    quants = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])
    return _f16(blocks, 0) * quants.astype(np.float32) + _f16(blocks, 2)


def _decode_scales_and_minimums(packed: U8) -> tuple[F32, F32]:
    """The eight 6-bit scales s and minimums t of a Q4_K or Q5_K block, each (blocks, 8).

    The first four of each lie in the low six bits of bytes 0-7; the last four have their low
    nibbles in bytes 8-11 and their two high bits in what is left of bytes 0-7.

    byte   0 .. 3          4 .. 7          8 .. 11
    bits  [s4-7:2|s0-3:6] [t4-7:2|t0-3:6] [t4-7:4|s4-7:4]      (high bits to the left)
    """
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([first & 0x3F, (third & 0x0F) | ((first >> 6) << 4)], axis=1)
    minimums = np.concatenate([second & 0x3F, (third >> 4) | ((second >> 6) << 4)], axis=1)
    return scales.astype(np.float32), minimums.astype(np.float32)


def _decode_k_quants(blocks: U8, quants: U8) -> F32:
    """w = (d * s) * q - (m * t) over eight groups of 32; quants is (blocks, 8, 32)."""
    scales, minimums = _decode_scales_and_minimums(blocks[:, 4:16])
    scale = (_f16(blocks, 0) * scales)[:, :, None]
    minimum = (_f16(blocks, 2) * minimums)[:, :, None]
    return (scale * quants.astype(np.float32) - minimum).reshape(len(blocks), 256)


def _decode_q4_k(blocks: U8) -> F32:
    """w = (d * s) * q - (m * t): 8 groups of 32 with their own 6-bit scale s and minimum t.

    byte  0 1   2 3   4 ...... 15   16 ............................ 143
          [d ]  [m ]  [s and t  ]   [4 runs of 32 bytes: group 2r|2r+1 ]
    """
    runs = blocks[:, 16:].reshape(-1, 4, 32)
    quants = np.stack([runs & 0x0F, runs >> 4], axis=2).reshape(-1, 8, 32)
    return _decode_k_quants(blocks, quants)


def _decode_q5_k(blocks: U8) -> F32:
    """As Q4_K; bit g of h[i] is the fifth bit of weight i of group g.

    byte  0 1   2 3   4 ...... 15   16 .... 47   48 ............................ 175
          [d ]  [m ]  [s and t  ]   [h0 .. h31]  [4 runs of 32 bytes: group 2r|2r+1 ]
    """
    runs = blocks[:, 48:].reshape(-1, 4, 32)
    low = np.stack([runs & 0x0F, runs >> 4], axis=2).reshape(-1, 8, 32)
    groups = np.arange(8, dtype=np.uint8)[None, :, None]
    high = (blocks[:, None, 16:48] >> groups) & 1
    return _decode_k_quants(blocks, low | (high << 4))


def _decode_q6_k(blocks: U8) -> F32:
    """w = (d * s) * (q - 32): 16 groups of 16, each with a signed 8-bit scale s.

    byte  0 ......... 127   128 ...... 191   192 .. 207   208 209
          [low nibbles  ]   [two high bits]  [s0 .. s15]  [d    ]

    The block is two halves of 128 weights, each four runs of 32. A half has 64 bytes of nibbles,
    [run 0|run 2] then [run 1|run 3], and 32 bytes of high bits: run r's two bits are bits 2r.
    """
    nibbles = blocks[:, :128].reshape(-1, 2, 64)
    low = np.concatenate([nibbles & 0x0F, nibbles >> 4], axis=2).reshape(-1, 2, 4, 32)
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8)[None, None, :, None]
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & 3
    quants: F32 = (low | (high << 4)).reshape(-1, 16, 16).astype(np.float32) - np.float32(32)
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32)
    scale = (_f16(blocks, 208) * scales)[:, :, None]
    return (scale * quants).reshape(len(blocks), 256)


_DECODERS: dict[Format, Callable[[U8], F32]] = {
    Format.F32: _decode_f32,
    Format.F16: _decode_f16,
    Format.BF16: _decode_bf16,
    Format.Q8_0: _decode_q8_0,
    Format.Q4_0: _decode_q4_0,
    Format.Q4_1: _decode_q4_1,
    Format.Q5_0: _decode_q5_0,
    Format.Q5_1: _decode_q5_1,
    Format.Q4_K: _decode_q4_k,
    Format.Q5_K: _decode_q5_k,
    Format.Q6_K: _decode_q6_k,
}
