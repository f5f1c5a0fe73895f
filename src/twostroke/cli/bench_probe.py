"""How long this machine takes now for steps that it was calibrated with.

A shared machine is faster or slower than it was, by a fifth within minutes, and nothing that is
predicted from an older calibration can know. So a few of its steps are timed again before a run and
after it. Only steps are timed that no run has a part in: what is predicted stays a prediction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from twostroke.cli.settings import ResolvedSettings
from twostroke.cli.timed_steps import (
    Cell,
    build_plan,
    count_repeats,
    fits,
    get_order,
    repeat_step,
    sum_cell,
)
from twostroke.exec.local import LocalExecutor
from twostroke.plan.step_time import MeasuredCost, Pace
from twostroke.spec.model import ModelSpec

# Of both strokes, each as calibrated: rows as (new tokens, context before, drawn).
_CELLS = (
    Cell("decode", ((1, 256, 1),)),
    Cell("decode", ((1, 256, 1),) * 4),
    Cell("decode", ((1, 256, 1),) * 8),
    Cell("decode", ((1, 256, 1),) * 16),
    Cell("prefill", ((64, 0, 0),)),
    Cell("prefill", ((128, 0, 1),)),
    Cell("prefill", ((256, 0, 0),)),
    Cell("mixed", (*((1, 256, 1),) * 8, (120, 0, 0))),
)
_ROUNDS = 5


def probe(
    executor: LocalExecutor, cost: MeasuredCost, spec: ModelSpec, settings: ResolvedSettings
) -> Pace:
    """How many times the calibrated time steps take: mean ratios of several, in about 3 s.

    Writes to blocks of the executor's pool. 1.0 where no step of a kind fits.
    """
    cells = [cell for cell in _CELLS if fits(cell, spec, settings)]
    plans = [
        build_plan(cell, step, spec.vocab_size, settings.block_tokens)
        for step, cell in enumerate(cells)
    ]
    totals = [sum_cell(cell, cost.get_row_totals) for cell in cells]
    times_ns: list[list[int]] = [[] for _ in cells]
    for turn in range(_ROUNDS):
        for at in get_order(len(plans), turn):
            repeats = count_repeats(totals[at].tokens)
            found_ns, _ = repeat_step(executor, plans[at], repeats, settings.threads)
            times_ns[at] += found_ns
    ratios: dict[bool, list[float]] = {True: [], False: []}
    for cell, own, found_ns in zip(cells, totals, times_ns, strict=True):
        ratio = median(found_ns) / cost.predict_ns(own)
        ratios[cell.kind == "decode"].append(ratio)
    return Pace(average(ratios[True]), average(ratios[False]))


def average(ratios: Sequence[float]) -> float:
    """The geometric mean; 1.0 of none."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else 1.0


def average_paces(one: Pace, other: Pace) -> Pace:
    """The pace between two."""
    decode = average((one.decode, other.decode))
    return Pace(decode, average((one.prefill, other.prefill)))
