"""Formats know how many bytes weights take."""

from __future__ import annotations

import pytest

from twostroke.spec.quant import Format


@pytest.mark.parametrize("fmt", list(Format), ids=lambda fmt: fmt.value)
def test_bytes_grow_by_whole_blocks(fmt: Format) -> None:
    block = fmt.block
    assert fmt.get_bytes(0) == 0
    assert fmt.get_bytes(7 * block.weights) == 7 * block.bytes
    if block.weights > 1:
        with pytest.raises(ValueError, match="do not fill"):
            fmt.get_bytes(7 * block.weights + 1)


def test_only_blocks_of_several_weights_are_quantised() -> None:
    plain = {fmt for fmt in Format if not fmt.is_quantised}
    assert plain == {Format.F32, Format.F16, Format.BF16}


@pytest.mark.parametrize(
    ("fmt", "bits"),
    [
        (Format.F32, 32.0),
        (Format.F16, 16.0),
        (Format.BF16, 16.0),
        (Format.Q8_0, 8.5),
        (Format.Q4_0, 4.5),
        (Format.Q4_1, 5.0),
        (Format.Q5_0, 5.5),
        (Format.Q5_1, 6.0),
        (Format.Q4_K, 4.5),
        (Format.Q5_K, 5.5),
        (Format.Q6_K, 6.5625),
    ],
)
def test_bits_per_weight_are_those_the_formats_are_known_for(fmt: Format, bits: float) -> None:
    assert 8 * fmt.block.bytes / fmt.block.weights == bits
