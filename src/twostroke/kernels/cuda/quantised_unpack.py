"""From packed integers to numbers: the few instructions a quantised weight costs.

A word is 16 bits and holds PIECES = 16 / BITS integers, which lie 32 inputs apart: a tile
(rows, 32) of words is PIECES tiles (rows, 32) of weights, piece j being inputs 32 j … 32 j + 31 of
its block. So a tile of words that a tensor core's operand layout was loaded with is unpacked where
it lies, two words to a register, and nothing moves between threads.

    word (8 bits)    [piece 1: 8 | piece 0: 8]          unsigned, 128 above the integer
    word (4 bits)    [piece 3: 4 | 2: 4 | 1: 4 | 0: 4]  unsigned

Converting integers is slow, so they are put into the significand of a float instead: 0x6400 | q is
1024 + q in float16, 0x4300 | q is 128 + q in bfloat16, and subtracting the constant is exact. The
interpreter knows no inline assembly; without ASM the same values are computed in float32.
"""

# ruff: noqa: N803, SIM300 (Triton constants are upper case)
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def merge_bits(words, MASK: tl.constexpr, FILL: tl.constexpr, DTYPE: tl.constexpr):
    """(words & MASK) ^ FILL of two words at a time, read as halves of DTYPE."""
    merged = tl.inline_asm_elementwise(
        f"lop3.b32 $0, $1, {MASK}, {FILL}, 0x6a;",
        "=r,r",
        [words],
        dtype=tl.int16,
        is_pure=True,
        pack=2,
    )
    return merged.to(DTYPE, bitcast=True)


@triton.jit
def shift_right(words, BITS: tl.constexpr):
    """Two words at a time as one of 32 bits: what enters a word from above is masked later."""
    return tl.inline_asm_elementwise(
        f"shr.u32 $0, $1, {BITS};", "=r,r", [words], dtype=tl.int16, is_pure=True, pack=2
    )


@triton.jit
def take_nibble(words, PIECE: tl.constexpr, ZERO: tl.constexpr, DTYPE: tl.constexpr):
    """Piece PIECE of words of four nibbles, less ZERO, in DTYPE."""
    if DTYPE == tl.bfloat16:
        moved = shift_right(words, 4 * PIECE) if PIECE > 0 else words
        result = merge_bits(moved, 0x000F000F, 0x43004300, DTYPE) - (128 + ZERO)
    else:
        moved = shift_right(words, 8) if PIECE >= 2 else words
        if PIECE % 2 == 0:
            result = merge_bits(moved, 0x000F000F, 0x64006400, DTYPE) - (1024 + ZERO)
        else:
            # The nibble stays where it is: 1024 + 16 q, of which a sixteenth is taken.
            merged = merge_bits(moved, 0x00F000F0, 0x64006400, DTYPE)
            sixteenth = tl.full(words.shape, 0.0625, DTYPE)
            result = tl.fma(merged, sixteenth, tl.full(words.shape, -(64 + ZERO), DTYPE))
    return result


@triton.jit
def take_byte(words, PIECE: tl.constexpr, DTYPE: tl.constexpr):
    """Piece PIECE of words of two bytes as the integer in -128 … 127 it stands for, in DTYPE."""
    moved = shift_right(words, 8) if PIECE == 1 else words
    if DTYPE == tl.bfloat16:
        # Eight bits do not fit beside the leading one, so the highest is a number of its own: in
        # place it turns 256 into 128.
        low = merge_bits(moved, 0x007F007F, 0x43004300, DTYPE)
        result = low - merge_bits(moved, 0x00800080, 0x43804380, DTYPE)
    else:
        result = merge_bits(moved, 0x00FF00FF, 0x64006400, DTYPE) - 1152
    return result


@triton.jit
def unpack(
    words,
    PIECE: tl.constexpr,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    DTYPE: tl.constexpr,
    ASM: tl.constexpr,
):
    """The integers of a piece, less ZERO: in DTYPE, or as the same values in float32.

    words: int16 of any shape. ZERO: 0 or 8 of 4 bits, 0 of 8 bits (whose offset of 128 is the
    layout's own). DTYPE: float16 or bfloat16.
    """
    if not ASM:
        offset: tl.constexpr = ZERO if BITS == 4 else 128
        integers = (words.to(tl.int32) >> (BITS * PIECE)) & ((1 << BITS) - 1)
        result = integers.to(tl.float32) - offset
    elif BITS == 4:
        result = take_nibble(words, PIECE, ZERO, DTYPE)
    else:
        result = take_byte(words, PIECE, DTYPE)
    return result


@triton.jit
def take_scale(pairs, HALF: tl.constexpr):
    """The lower (HALF 0) or upper float16 of 32-bit words, as float32."""
    return (
        ((pairs >> (16 * HALF)) & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    )


@triton.jit
def take_scales(pairs, AT: tl.constexpr, GROUP: tl.constexpr):
    """Scales, float32, of the piece of 32 inputs that begins AT inputs into its cell.

    pairs (rows,): 32-bit words of two float16, for two groups. Returns (rows, 1), or (rows, 32)
    where a piece has two groups.
    """
    if GROUP == 16:
        is_first = (tl.arange(0, 32) < 16)[None, :]
        scales = tl.where(is_first, take_half(pairs, 0)[:, None], take_half(pairs, 1)[:, None])
    else:
        scales = take_half(pairs, AT // GROUP % 2)[:, None]
    return scales


@triton.jit
def take_half(pairs, HALF: tl.constexpr):
    """The lower (HALF 0) or upper float16 of 32-bit words, as float32."""
    bits = (pairs >> 16) if HALF == 1 else pairs
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def scale_weights(left, scales, minimums, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """left * scales + minimums (None: 0), in DTYPE.

    left: integers from unpack. scales, minimums: float32 that float16 holds exactly. bfloat16 holds
    but eight bits of a scale, so it is multiplied with what is left of a scale as well.
    """
    factors = scales.to(DTYPE)
    rest = (scales - factors.to(tl.float32)).to(DTYPE)
    if ASM:
        factors, rest = tl.broadcast_to(factors, left.shape), tl.broadcast_to(rest, left.shape)
        if minimums is not None:
            weights = tl.fma(left, factors, tl.broadcast_to(minimums.to(DTYPE), left.shape))
        elif DTYPE == tl.bfloat16:
            weights = tl.fma(left, factors, left * rest)
        else:
            weights = left * factors
    else:
        added = left * rest.to(tl.float32) if minimums is None else minimums
        weights = round_to(left * factors.to(tl.float32) + round_to(added, DTYPE), DTYPE)
    return weights


@triton.jit
def round_to(values, DTYPE: tl.constexpr):
    """float32 values of DTYPE's precision: the interpreter computes with no other floats."""
    return values.to(DTYPE).to(tl.float32)
