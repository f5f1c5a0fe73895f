"""Every weight format decodes to what the GGUF reference code says, bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize

from twostroke.kernels.reference.dequant import dequantise
from twostroke.spec.quant import Format

# Where the float16 scales of a block lie; random bits there would make NaN, which says nothing.
SCALES = {
    Format.F16: (0,),
    Format.Q8_0: (0,),
    Format.Q4_0: (0,),
    Format.Q4_1: (0, 2),
    Format.Q5_0: (0,),
    Format.Q5_1: (0, 2),
    Format.Q4_K: (0, 2),
    Format.Q5_K: (0, 2),
    Format.Q6_K: (208,),
}


def make_blocks(fmt: Format, blocks: int, seed: int) -> np.ndarray:
    """Random bytes whose scales are finite float16 values from subnormal to large."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (blocks, fmt.block.bytes), dtype=np.uint8)
    if fmt in (Format.F32, Format.BF16):
        values = rng.standard_normal(blocks) * 10.0 ** rng.integers(-30, 30, blocks)
        upper = values.astype(np.float32).view(np.uint8).reshape(blocks, 4)
        return upper[:, 4 - fmt.block.bytes :].reshape(-1).copy()
    for start in SCALES[fmt]:
        bits = rng.integers(0, 0x7C00, blocks).astype(np.uint16)
        bits |= (rng.integers(0, 2, blocks) << 15).astype(np.uint16)
        raw[:, start : start + 2] = bits.view(np.uint8).reshape(blocks, 2)
    return raw.reshape(-1)


@pytest.mark.parametrize("fmt", list(Format), ids=lambda fmt: fmt.value)
def test_random_bytes_decode_as_the_reference_code_decodes_them(fmt: Format) -> None:
    rows, blocks_per_row = 37, 3
    shape = (rows, blocks_per_row * fmt.block.weights)
    data = make_blocks(fmt, rows * blocks_per_row, seed=len(fmt.value))
    expected = dequantize(data, gguf.GGMLQuantizationType[fmt.value]).reshape(shape)
    ours = dequantise(fmt, data, shape)
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("fmt", list(Format), ids=lambda fmt: fmt.value)
def test_block_sizes_are_those_of_gguf(fmt: Format) -> None:
    weights, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[fmt.value]]
    assert (fmt.block.weights, fmt.block.bytes) == (weights, size)


def test_decoding_leaves_the_stored_bytes_alone() -> None:
    data = make_blocks(Format.F32, 8, seed=1)
    before = data.copy()
    dequantise(Format.F32, data, (8,))[:] = 0
    np.testing.assert_array_equal(data, before)


def test_a_row_that_splits_a_block_is_refused() -> None:
    data = np.zeros(Format.Q4_0.get_bytes(64), np.uint8)
    with pytest.raises(ValueError, match="does not fill Q4_0 blocks"):
        dequantise(Format.Q4_0, data, (4, 16))


def test_a_wrong_number_of_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="takes 34 bytes, not 33"):
        dequantise(Format.Q8_0, np.zeros(33, np.uint8), (32,))
