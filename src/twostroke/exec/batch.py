"""From StepPlans to the arrays a backend computes on.

`BatchBuilder` keeps the arrays of a step whose rows all decode one token, because the next step of
the same batch differs from it in little: tokens, positions, now and then a block. It must give what
a fresh builder would, and it owns the arrays: they hold until the next `build`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from twostroke.core.types import Row, StepPlan
from twostroke.exec.sampling import LogitLayout, build_logit_layout
from twostroke.kernels.ops import I32, SamplingArrays, StepArrays

# Block tables are made this much wider than they must be, so that few steps need new ones.
SPARE_BLOCKS = 8


@dataclass(frozen=True, slots=True)
class Batch:
    """One step as arrays.

    `step.logit_rows` are the positions that draw, as many as fit at once, and `first` is how they
    are drawn. is_whole: nothing else needs logits.
    """

    step: StepArrays
    layout: LogitLayout
    first: SamplingArrays
    is_whole: bool


class BatchBuilder:
    """Builds one step after the other; at most `max_logit_rows` positions draw at once."""

    def __init__(self, max_logit_rows: int) -> None:
        self._max_logit_rows = max_logit_rows
        self._rows: tuple[Row, ...] = ()  # of the kept batch; none when it cannot be continued
        self._batch: Batch | None = None

    def build(self, plan: StepPlan) -> Batch:
        """The arrays of a plan; those given before are no longer valid."""
        rows = plan.rows
        if self._batch is not None and _continues(rows, self._rows):
            batch = self._batch = _advance(self._batch, rows, self._rows)
        else:
            batch = self._build_anew(plan)
            self._batch = batch if batch.is_whole and _continues(rows, rows) else None
        self._rows = rows
        return batch

    def _build_anew(self, plan: StepPlan) -> Batch:
        layout = build_logit_layout(plan)
        limit = self._max_logit_rows
        step = build_step_arrays(plan, layout.sampled[:limit])
        is_whole = layout.sampled.size <= limit and not layout.scored.size
        return Batch(step, layout, layout.take_arrays(slice(0, limit)), is_whole)


def build_step_arrays(plan: StepPlan, logit_rows: I32) -> StepArrays:
    """The step's rows laid end to end (see kernels.ops.StepArrays).

    logit_rows (L,): indices into the step's tokens whose logits are wanted.
    """
    rows = plan.rows
    counts = np.fromiter((len(row.tokens) for row in rows), np.int32, len(rows))
    offsets = np.zeros(len(rows) + 1, np.int32)
    np.cumsum(counts, out=offsets[1:])
    tokens = np.fromiter(
        itertools.chain.from_iterable(row.tokens for row in rows), np.int32, int(offsets[-1])
    )
    starts = np.fromiter((row.start for row in rows), np.int32, len(rows))
    positions = np.arange(offsets[-1], dtype=np.int32)
    positions += np.repeat(starts - offsets[:-1], counts)
    return StepArrays(tokens, positions, offsets, _build_tables(rows), logit_rows)


def _build_tables(rows: Sequence[Row]) -> I32:
    width = max(len(row.blocks) for row in rows) + SPARE_BLOCKS
    tables = np.full((len(rows), width), -1, np.int32)
    for index, row in enumerate(rows):
        tables[index, : len(row.blocks)] = row.blocks
    return tables


def _continues(rows: Sequence[Row], kept: Sequence[Row]) -> bool:
    """Whether rows that each draw one token after one token go on where `kept` ones were.

    What must be the same is compared by identity, which is cheap and only ever too strict.
    """
    if len(rows) != len(kept):
        return False
    for row, last in zip(rows, kept, strict=True):
        if (
            row.sequence is not last.sequence
            or row.sampling is not last.sampling
            or row.sampling is None
            or len(row.tokens) != 1
            or row.drafts
            or row.history
            or row.scored
            or row.mask
        ):
            return False
    return True


def _advance(batch: Batch, rows: Sequence[Row], kept: Sequence[Row]) -> Batch:
    """The batch with the tokens, positions and blocks of `rows`, in the arrays of `kept` ones."""
    step, tables = batch.step, batch.step.block_tables
    tokens, positions, counter = step.tokens, step.positions, batch.first.counter
    for index, row in enumerate(rows):
        tokens[index] = row.tokens[0]
        positions[index] = row.start
        counter[index, 0] = row.start + 1
        if row.blocks is not kept[index].blocks:
            if len(row.blocks) > tables.shape[1]:
                tables = _build_tables(rows)
            tables[index] = -1
            tables[index, : len(row.blocks)] = row.blocks
    if tables is step.block_tables:
        return batch
    wider = StepArrays(tokens, positions, step.row_offsets, tables, step.logit_rows)
    return Batch(wider, batch.layout, batch.first, batch.is_whole)
