"""From a StepPlan to the arrays a backend computes on."""

from __future__ import annotations

import itertools

import numpy as np

from twostroke.core.types import StepPlan
from twostroke.kernels.ops import I32, StepArrays


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
    tables = np.full((len(rows), max(len(row.blocks) for row in rows)), -1, np.int32)
    for index, row in enumerate(rows):
        tables[index, : len(row.blocks)] = row.blocks
    return StepArrays(tokens, positions, offsets, tables, logit_rows)
