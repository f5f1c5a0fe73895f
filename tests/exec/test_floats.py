"""Rope tables that grow: the same rows whatever was asked for first."""

from __future__ import annotations

import numpy as np
import pytest

from tiny_models import TINY_SPECS, make_tensors
from twostroke.exec.floats import ROPE_ROWS, Ropes
from twostroke.exec.local import RunnerSizes
from twostroke.spec.quant import Format

SIZES = RunnerSizes(threads=1, num_blocks=64, block_tokens=16, max_step_tokens=512)


def make_ropes(family: str) -> Ropes:
    """Tables of a tiny model of 640 positions, nothing filled in."""
    spec = TINY_SPECS[family]
    return Ropes(spec, make_tensors(spec, Format.F32), SIZES)


def as_positions(*positions: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    """Positions of a step."""
    return np.array(positions, np.int32)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_rows_are_the_same_whether_they_come_at_once_or_bit_by_bit(family: str) -> None:
    whole, grown = make_ropes(family), make_ropes(family)
    whole.fill(as_positions(639))
    for last in (0, 5, ROPE_ROWS - 1, ROPE_ROWS, 300, 639):
        grown.fill(as_positions(3, last, 1))
    for rope, table in whole.tables.items():
        assert np.array_equal(table.cos, grown.tables[rope].cos)
        assert np.array_equal(table.sin, grown.tables[rope].sin)


def test_every_position_turns_by_its_own_angle() -> None:
    ropes = make_ropes("qwen2")
    ropes.fill(as_positions(639))
    for table in ropes.tables.values():
        turns = np.unwrap(np.arctan2(table.sin[:, 0].astype(float), table.cos[:, 0]))
        assert np.allclose(np.diff(turns), turns[1], atol=1e-5)


def test_a_position_beyond_the_tables_fills_them_and_no_more() -> None:
    ropes = make_ropes("llama")
    ropes.fill(as_positions(10**6))
    for table in ropes.tables.values():
        assert table.cos.shape[0] == 640
        assert np.isfinite(table.cos).all()
        assert (np.abs(table.cos) <= 1).all()
