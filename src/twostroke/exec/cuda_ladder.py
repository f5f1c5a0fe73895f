"""Which steps are captured as graphs, and which of them a step is padded to.

Owns the ladder of sizes. Steps that decode one token a row have rungs by rows, all in one graph up
to the logits. Steps with prompts have rungs by tokens, for prompts alone and for prompts beside
decodes; their graphs end with the last layer, because how many positions need logits does not
follow from the tokens. Padding is tokens and rows that write nothing and see nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from twostroke.exec.cuda_staging import StepCounts, get_decode_counts
from twostroke.kernels.ops import StepArrays

# Tiles beside those that a prompt of all the tokens has: each row's last one may be a small one.
SPARE_TILES = 16


@dataclass(frozen=True, slots=True)
class Ladder:
    """Sizes that are captured.

    rungs: rows of decoding steps, rising; token_rungs: tokens of steps with prompts, rising. rows:
    most of a step. table_blocks: width of block tables. tile_tokens: of attention's tiles.
    """

    rungs: tuple[int, ...]
    token_rungs: tuple[int, ...]
    rows: int
    table_blocks: int
    tile_tokens: int

    def list_counts(self) -> Iterator[StepCounts]:
        """Everything to capture, the largest first of each kind."""
        for tokens in reversed(self.token_rungs):
            yield self._get_counts(tokens, has_decodes=False)
            yield self._get_counts(tokens, has_decodes=True)
        for rows in reversed(self.rungs):
            yield get_decode_counts(rows, self.table_blocks)

    def try_find(self, arrays: StepArrays) -> StepCounts | None:
        """What a step is padded to, or None where nothing that was captured holds it."""
        tokens, rows = arrays.tokens.size, arrays.row_offsets.size - 1
        if tokens == rows == arrays.logit_rows.size:
            rung = next((rung for rung in self.rungs if rung >= tokens), 0)
            return get_decode_counts(rung, self.table_blocks) if rung else None
        rung = next((rung for rung in self.token_rungs if rung >= tokens), 0)
        if not rung or rows > self.rows:
            return None
        lengths = np.diff(arrays.row_offsets)
        counts = self._get_counts(rung, bool((lengths == 1).any()))
        tiles = int(np.sum(-(-lengths[lengths > 1] // self.tile_tokens)))
        return counts if tiles <= counts.tiles else None

    def _get_counts(self, tokens: int, has_decodes: bool) -> StepCounts:
        tiles = -(-tokens // self.tile_tokens) + SPARE_TILES
        # One row more than there can be is always padding: what decodes beyond the last one see.
        decodes = self.rows if has_decodes else 0
        return StepCounts(tokens, self.rows + 1, 0, decodes, tiles, self.table_blocks)


def make_rungs(rows: int) -> tuple[int, ...]:
    """Batch sizes to capture: 1, 2, 4, 8, then every 8 up to 64, then every 16, and `rows`."""
    wanted = [1, 2, 4, *range(8, 64, 8), *range(64, rows + 1, 16), rows]
    return tuple(sorted({rung for rung in wanted if rung <= rows}))


def make_token_rungs(tokens: int) -> tuple[int, ...]:
    """Tokens to capture steps with prompts for, so that at most a fifth is padding from 256 on."""
    wanted = [*range(32, 128, 32), *range(128, 512, 64), *range(512, 1024, 128)]
    wanted += [*range(1024, 2048, 256), *range(2048, tokens + 1, 1024), tokens]
    return tuple(sorted({rung for rung in wanted if rung <= tokens}))
