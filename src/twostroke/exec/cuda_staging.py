"""A step's arrays on their way to the device: one pinned buffer, one copy, views on the other side.

Owns where each array lies in the buffer. The places follow from the counts alone, so that a graph
that was captured over the views of some counts reads what a later step of the same counts copies
there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twostroke.kernels.cuda.types import StepTensors, Tensor
from twostroke.kernels.ops import I32, StepArrays

# Every array begins where 16-byte loads may.
ALIGNMENT = 4


@dataclass(frozen=True, slots=True)
class StepCounts:
    """What a step's places follow from.

    tokens, rows, logits, decodes, tiles: lengths of its arrays. table_blocks: width of the tables.
    """

    tokens: int
    rows: int
    logits: int
    decodes: int
    tiles: int
    table_blocks: int

    def get_regions(self) -> list[tuple[str, int]]:
        """(name, int32 values) of each array, in order."""
        tokens, rows = self.tokens, self.rows
        return [
            ("tokens", tokens),
            ("positions", tokens),
            ("token_rows", tokens),
            ("sources", tokens),
            ("row_offsets", rows + 1),
            ("contexts", rows),
            ("logit_rows", self.logits),
            ("decode_rows", self.decodes),
            ("tiles", 2 * self.tiles),
            ("block_tables", rows * self.table_blocks),
        ]

    @property
    def size(self) -> int:
        """int32 values of the whole buffer."""
        return sum(-(-size // ALIGNMENT) * ALIGNMENT for _, size in self.get_regions())


@dataclass(frozen=True, slots=True)
class StagedView:
    """A step's tensors, and where its pending tokens come from: sources (T,), -1 where known."""

    step: StepTensors
    sources: Tensor


def get_decode_counts(rows: int, table_blocks: int) -> StepCounts:
    """Of a step of `rows` rows that decode one token each, all drawn from."""
    return StepCounts(rows, rows, rows, rows, 0, table_blocks)


def count_step(arrays: StepArrays, tile_tokens: int, table_blocks: int) -> StepCounts:
    """The counts of a step that is not padded."""
    counts = np.diff(arrays.row_offsets)
    decodes = int(np.count_nonzero(counts == 1))
    tiles = int(np.sum(-(-counts[counts > 1] // tile_tokens)))
    rows = counts.size
    return StepCounts(
        arrays.tokens.size, rows, arrays.logit_rows.size, decodes, tiles, table_blocks
    )


def split(buffer: Any, counts: StepCounts) -> dict[str, Any]:
    """The arrays of a buffer, NumPy or PyTorch, by name."""
    found, start = {}, 0
    for name, size in counts.get_regions():
        found[name] = buffer[start : start + size]
        start += -(-size // ALIGNMENT) * ALIGNMENT
    return found


def fill(
    buffer: NDArray[np.int32],
    counts: StepCounts,
    arrays: StepArrays,
    sources: I32 | None,
    tile_tokens: int,
) -> None:
    """Writes a step into a buffer laid out for `counts`, which may have more rows than it.

    A step laid out for no logits brings those of its rows another way. sources (T,): index among
    the last step's drawn tokens of each pending token, else -1; None where no token is pending.
    Rows beyond the step's are padding, which writes and sees nothing.
    """
    at = split(buffer, counts)
    tokens, rows, logits = arrays.tokens.size, arrays.row_offsets.size - 1, arrays.logit_rows.size
    lengths = np.diff(arrays.row_offsets)
    at["tokens"][:tokens] = arrays.tokens
    at["positions"][:tokens] = arrays.positions
    if tokens == rows:
        at["token_rows"][:tokens] = np.arange(tokens, dtype=np.int32)
    else:
        at["token_rows"][:tokens] = np.repeat(np.arange(rows, dtype=np.int32), lengths)
    at["sources"][:] = -1
    if sources is not None:
        at["sources"][:tokens] = sources
    at["row_offsets"][: rows + 1] = arrays.row_offsets
    at["contexts"][:rows] = arrays.positions[arrays.row_offsets[1:] - 1] + 1
    if counts.logits:
        at["logit_rows"][:logits] = arrays.logit_rows
    decodes = np.flatnonzero(lengths == 1)
    at["decode_rows"][: decodes.size] = decodes
    if tokens > rows:
        _fill_tiles(at["tiles"], lengths, tile_tokens)
    tables = at["block_tables"].reshape(counts.rows, counts.table_blocks)
    width = min(arrays.block_tables.shape[1], counts.table_blocks)
    tables[:rows, :width] = arrays.block_tables[:, :width]
    if counts.rows > rows:
        _pad(at, counts, (tokens, rows, logits, decodes.size))


def _fill_tiles(tiles: NDArray[np.int32], lengths: I32, tile_tokens: int) -> None:
    """(row, first token) of every tile, rows with the most tokens ahead in order of rows."""
    at = 0
    for row in np.flatnonzero(lengths > 1).tolist():
        firsts = np.arange(0, lengths[row], tile_tokens, dtype=np.int32)
        tiles[at : at + 2 * firsts.size : 2] = row
        tiles[at + 1 : at + 2 * firsts.size : 2] = firsts
        at += 2 * firsts.size
    tiles[at:] = -1


def _pad(
    at: dict[str, NDArray[np.int32]], counts: StepCounts, used: tuple[int, int, int, int]
) -> None:
    """Rows beyond the step's: decoding steps give each a token of its own, others none."""
    tokens, rows, logits, decodes = used
    at["tokens"][tokens:] = 0
    at["positions"][tokens:] = 0
    at["token_rows"][tokens:] = -1
    has_tokens = counts.tokens == counts.rows
    ends = np.arange(rows, counts.rows + 1, dtype=np.int32) if has_tokens else tokens
    at["row_offsets"][rows:] = ends
    at["contexts"][rows:] = 0
    at["logit_rows"][logits:] = np.arange(logits, counts.logits, dtype=np.int32)
    at["decode_rows"][decodes:] = (
        np.arange(decodes, counts.decodes, dtype=np.int32) if has_tokens else counts.rows - 1
    )


def view(buffer: Tensor, counts: StepCounts, tile_tokens: int, longest: int) -> StagedView:
    """The step's tensors in a device's buffer of these counts."""
    at = split(buffer, counts)
    step = StepTensors(
        tokens=at["tokens"],
        positions=at["positions"],
        token_rows=at["token_rows"],
        row_offsets=at["row_offsets"],
        contexts=at["contexts"],
        block_tables=at["block_tables"].view(counts.rows, counts.table_blocks),
        logit_rows=at["logit_rows"],
        decode_rows=at["decode_rows"],
        tiles=at["tiles"].view(counts.tiles, 2),
        tile_tokens=tile_tokens,
        longest=longest,
    )
    return StagedView(step, at["sources"])
