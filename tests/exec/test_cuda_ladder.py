"""What steps are padded to: a rung holds the step, and the rest of it writes and sees nothing."""

from __future__ import annotations

import numpy as np
import pytest

from twostroke.exec.cuda_ladder import Ladder, make_rungs, make_token_rungs
from twostroke.exec.cuda_runner import RunnerLimits
from twostroke.exec.cuda_staging import StepCounts, count_step, fill, split
from twostroke.kernels.ops import I32, StepArrays

TILE = 128
LIMITS = RunnerLimits(512, 16, 16, 131_072)
LADDER = Ladder(make_rungs(16), make_token_rungs(512), 16, LIMITS.table_blocks, TILE)


def make_arrays(lengths: list[int], rng: np.random.Generator) -> StepArrays:
    """Rows of these lengths at random starts; each row's last token has logits."""
    offsets = np.cumsum([0, *lengths]).astype(np.int32)
    starts = rng.integers(0, 5000, len(lengths))
    pairs = zip(starts, lengths, strict=True)
    positions = np.concatenate([np.arange(at, at + count) for at, count in pairs])
    tables = rng.integers(0, 1000, (len(lengths), 90)).astype(np.int32)
    tokens = rng.integers(0, 100, offsets[-1]).astype(np.int32)
    return StepArrays(tokens, positions.astype(np.int32), offsets, tables, offsets[1:] - 1)


def draw_lengths(rng: np.random.Generator) -> list[int]:
    """Rows that one step may have: decodes, prompts, or both."""
    decodes, prompts = int(rng.integers(0, 13)), int(rng.integers(0, 4))
    lengths = [1] * decodes + [int(rng.integers(2, 120)) for _ in range(prompts)]
    return lengths or [1]


def stage(arrays: StepArrays, counts: StepCounts, sources: I32 | None) -> dict[str, I32]:
    buffer = np.full(counts.size, 77, np.int32)  # what an earlier step left
    fill(buffer, counts, arrays, sources, TILE)
    at: dict[str, I32] = split(buffer, counts)
    return at


@pytest.mark.parametrize("seed", range(40))
def test_a_rung_holds_the_step_and_nothing_else(seed: int) -> None:
    rng = np.random.default_rng(seed)
    arrays = make_arrays(draw_lengths(rng), rng)
    counts = LADDER.try_find(arrays)
    assert counts is not None
    at = stage(arrays, counts, None)
    tokens, rows = arrays.tokens.size, arrays.row_offsets.size - 1
    lengths = np.diff(arrays.row_offsets)
    assert np.array_equal(at["tokens"][:tokens], arrays.tokens)
    assert np.array_equal(at["positions"][:tokens], arrays.positions)
    assert np.array_equal(at["row_offsets"][: rows + 1], arrays.row_offsets)
    assert np.array_equal(at["token_rows"][:tokens], np.repeat(np.arange(rows), lengths))
    assert (at["token_rows"][tokens:] == -1).all()
    assert (at["contexts"][rows:] == 0).all()
    tables = at["block_tables"].reshape(counts.rows, -1)
    assert np.array_equal(tables[:rows, :90], arrays.block_tables)


@pytest.mark.parametrize("seed", range(40))
def test_every_token_is_decoded_or_in_one_tile(seed: int) -> None:
    rng = np.random.default_rng(seed)
    arrays = make_arrays(draw_lengths(rng), rng)
    rung = LADDER.try_find(arrays)
    assert rung is not None
    for counts in (rung, count_step(arrays, TILE, LIMITS.table_blocks)):
        at = stage(arrays, counts, None)
        offsets, lengths = at["row_offsets"], np.diff(arrays.row_offsets)
        decodes = at["decode_rows"].tolist()
        seen = [int(offsets[row]) for row in decodes if at["contexts"][row]]
        for row, first in at["tiles"].reshape(-1, 2).tolist():
            if row >= 0:
                last = min(first + TILE, int(lengths[row]))
                seen += range(offsets[row] + first, offsets[row] + last)
        assert sorted(seen) == list(range(arrays.tokens.size))


def test_pending_tokens_are_named_and_padding_is_none() -> None:
    rng = np.random.default_rng(5)
    arrays = make_arrays([1, 1, 1], rng)
    counts = LADDER.try_find(arrays)
    assert counts is not None
    at = stage(arrays, counts, np.array([2, -1, 0], np.int32))
    assert at["sources"].tolist() == [2, -1, 0, -1]


def test_no_rung_is_larger_than_the_buffer() -> None:
    # A long context makes tables wide beside steps that are small.
    assert all(counts.size <= LIMITS.get_buffer_size() for counts in LADDER.list_counts())


def test_a_step_with_too_many_rows_or_tiles_is_launched_call_by_call() -> None:
    rng = np.random.default_rng(6)
    assert LADDER.try_find(make_arrays([2] * 17, rng)) is None
    many_tiles = Ladder((1,), (64,), 64, 16, TILE)
    assert many_tiles.try_find(make_arrays([2] * 20, rng)) is None


def test_padding_is_at_most_a_fifth_from_256_tokens_on() -> None:
    rungs = make_token_rungs(8192)
    for tokens in range(256, 2049):
        rung = next(each for each in rungs if each >= tokens)
        assert rung - tokens <= rung / 5
