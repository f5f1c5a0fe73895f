"""Logits as the sampling kernels see them: without NaN, and ordered and weighed by integers.

Owns what the kernels must agree on: the order (falling value, ties by rising id) as one 64-bit
integer, and how a row's candidates are weighed. Weights are sums of integers, so that no result
depends on the order in which they are added.

A row's values are cut into bins of equal width below its largest value, the last of which holds all
that is lighter than the others reach. A bin's weights are counted in units of 2^-(SHIFT + e), where
2^-e is about the largest of them: as fine for unlikely tokens as for likely ones.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from twostroke.kernels.cuda.types import Tensor

BINS = tl.constexpr(2048)
FAR = tl.constexpr(2047)  # the last bin
# 2^19 tokens of one bin, each 2^43 units at most, stay below 2^63.
SHIFT = tl.constexpr(43)
MAX_VOCAB = 2**19
LEAST_KEY = tl.constexpr(-(2**31))
LARGEST_KEY = tl.constexpr(2**31 - 1)
LEAST_PACKED = tl.constexpr(-(2**63))
LARGEST_PACKED = tl.constexpr(2**63 - 1)
# Stands for infinity where differences are taken: above all float32, and minus itself it is 0.
HUGE = tl.constexpr(2.0**130)
# Candidates of a smaller weight than exp of this are never drawn: it is near float64's least.
LOWEST_EXPONENT = tl.constexpr(-700.0)
FACTS = tl.constexpr(8)


class RowFacts(NamedTuple):
    """A row's scale, float64 scalars.

    largest: its largest value. inverse: 1 / temperature; 0 where nothing is drawn. per_value: bins
    per unit of value. lightest: how far below `largest` a value is at the end of the last bin but
    one, negative. per_bin: by how many binary orders weights fall from one bin to the next.
    """

    largest: Tensor
    inverse: Tensor
    per_value: Tensor
    lightest: Tensor
    per_bin: Tensor


@triton.jit
def clean(x):
    """x with -inf for NaN and 0 for -0."""
    x = tl.where(x == x, x, float("-inf"))
    return tl.where(x == 0, 0.0, x)


@triton.jit
def get_key(x):
    """int32 that order as clean float32 x do."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def get_value(key):
    """The float32 of a key."""
    bits = tl.where(key < 0, key ^ 0x7FFFFFFF, key)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def pack_candidate(key, token):
    """int64 that are larger for a larger value, and for a smaller id where values are equal."""
    return (key.to(tl.int64) << 32) | (0x7FFFFFFF - token).to(tl.int64)


@triton.jit
def get_token(packed):
    """The id of a packed candidate."""
    return 0x7FFFFFFF - (packed & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def get_packed_value(packed):
    """The float32 of a packed candidate."""
    return get_value((packed >> 32).to(tl.int32))


@triton.jit
def get_power(exponent):
    """2^exponent as float64, exactly, for normal numbers."""
    return ((exponent + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True)


@triton.jit
def widen(x):
    """Clean float32 as float64, with HUGE for infinity so that differences are finite."""
    return tl.minimum(tl.maximum(x.to(tl.float64), -HUGE), HUGE)


@triton.jit
def load_facts(facts):
    """RowFacts from a row of them."""
    return RowFacts(
        tl.load(facts),
        tl.load(facts + 1),
        tl.load(facts + 2),
        tl.load(facts + 3),
        tl.load(facts + 4),
    )


@triton.jit
def find_bin(shifted, facts):
    """Bin of values that are `shifted` (float64, at most 0) from the largest."""
    near = tl.minimum(-shifted * facts.per_value, FAR - 1.0).to(tl.int32)
    return tl.where(shifted >= facts.lightest, near, FAR)


@triton.jit
def get_exponent(place, facts):
    """SHIFT + e of a bin: its units are 2^-(SHIFT + e)."""
    return (place.to(tl.float64) * facts.per_bin).to(tl.int32) + SHIFT


@triton.jit
def is_live(shifted, facts):
    """Whether values can be drawn at all."""
    return shifted * facts.inverse > LOWEST_EXPONENT


@triton.jit
def get_units(shifted, place, facts):
    """Weights exp(shifted / temperature) in units of bin `place`, int64."""
    weight = tl.exp(shifted * facts.inverse)
    return (weight * get_power(get_exponent(place, facts)) + 0.5).to(tl.int64)
