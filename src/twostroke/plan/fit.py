"""Fits a StepFit to measured steps, by least squares of relative errors without negative costs.

Owns the choice of knots and the solver. Repeats of a step count as the mean of their faster half,
because noise only ever adds time; every step then weighs the same, short or long. The same samples
give the same fit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from twostroke.errors import InvalidParameter
from twostroke.plan.step_time import StepFit
from twostroke.spec.work import StepTotals

Matrix = NDArray[np.float64]
_TOLERANCE = 1e-10


def fit_steps(samples: Sequence[tuple[StepTotals, int]], copy_byte_ns: float) -> StepFit:
    """The StepFit nearest to measured steps, given as (totals, duration in nanoseconds).

    Token knots are the sizes of steps of one kind, decoding rows only or one prompt row; drawn
    tokens have a knot at every number measured.
    Raises InvalidParameter naming the steps that are missing when they do not tell all costs.
    """
    durations: dict[StepTotals, list[int]] = defaultdict(list)
    for totals, duration_ns in samples:
        durations[totals].append(duration_ns)
    steps = sorted(durations)
    _check_enough(steps)
    token_knots = tuple(sorted({step.tokens for step in steps if _is_of_one_kind(step)}))
    sampled_knots = tuple(sorted({0} | {step.sampled for step in steps}))
    times = np.array([get_quiet_ns(durations[step]) for step in steps])
    columns = list(_get_columns(steps, token_knots, sampled_knots))
    # Columns of like size keep the solver's tolerance meaningful.
    design = np.stack(columns, axis=1) / times[:, None]
    scales = np.linalg.norm(design, axis=0)
    scales[scales == 0] = 1.0
    costs = (solve_non_negative(design / scales, np.ones(len(steps))) / scales).tolist()
    tokens_end = len(token_knots)
    sampled_end = tokens_end + len(sampled_knots) - 1
    row_ns, decode_pair_ns, prompt_pair_ns, prompt_key_ns = costs[sampled_end:]
    return StepFit(
        token_knots=token_knots,
        token_ns=_sum_ramps(token_knots, costs[0], costs[1:tokens_end]),
        sampled_knots=sampled_knots,
        sampled_ns=_sum_ramps(sampled_knots, 0.0, costs[tokens_end:sampled_end]),
        row_ns=row_ns,
        decode_pair_ns=decode_pair_ns,
        prompt_pair_ns=prompt_pair_ns,
        prompt_key_ns=prompt_key_ns,
        copy_byte_ns=copy_byte_ns,
    )


def get_quiet_ns(durations_ns: Sequence[int]) -> float:
    """The time of a step that was repeated: the mean of the faster half, which noise spares."""
    half = sorted(durations_ns)[: (len(durations_ns) + 1) // 2]
    return sum(half) / len(half)


def solve_non_negative(design: Matrix, target: Matrix) -> Matrix:
    """x >= 0 (n,) with the least |design @ x - target|; design (m, n), target (m,).

    The active set method of Lawson & Hanson (1974, chapter 23): costs join the set of positive
    ones by their gradient, and leave it where the solution over the set would make them negative.
    """
    count = design.shape[1]
    solution = np.zeros(count)
    positive = np.zeros(count, bool)
    for _ in range(3 * count):
        gradient = design.T @ (target - design @ solution)
        gradient[positive] = -np.inf
        best = int(np.argmax(gradient))
        if gradient[best] <= _TOLERANCE:
            break
        positive[best] = True
        while True:
            wanted = np.zeros(count)
            wanted[positive] = np.linalg.lstsq(design[:, positive], target, rcond=None)[0]
            falling = positive & (wanted <= 0)
            if not falling.any():
                break
            # As far towards `wanted` as nothing turns negative.
            drop = solution[falling] - wanted[falling]
            share = float(np.min(solution[falling] / np.where(drop > 0, drop, 1.0)))
            solution = solution + min(share, 1.0) * (wanted - solution)
            positive &= solution > _TOLERANCE
            solution[~positive] = 0.0
        solution = wanted
    return solution


def _get_columns(
    steps: Sequence[StepTotals], token_knots: Sequence[int], sampled_knots: Sequence[int]
) -> Iterator[Matrix]:
    """What each cost is multiplied by, step by step: (steps,) for each cost in StepFit's order."""
    table = np.array(steps, np.float64)
    rows, tokens, sampled, pairs, keys, decode_pairs, decode_keys = table.T
    yield np.ones(len(steps))
    yield from _get_ramps(tokens, token_knots)
    yield from _get_ramps(sampled, sampled_knots)
    yield rows
    yield decode_pairs
    yield pairs - decode_pairs
    yield keys - decode_keys


def _get_ramps(where: Matrix, knots: Sequence[int]) -> Iterator[Matrix]:
    """For each stretch between knots, how much of it lies below `where`; the last goes on."""
    for at in range(len(knots) - 1):
        last = at == len(knots) - 2
        high = np.inf if last else knots[at + 1]
        yield np.clip(where, knots[at], high) - knots[at]


def _sum_ramps(knots: Sequence[int], first: float, slopes: Sequence[float]) -> tuple[float, ...]:
    values = [first]
    for at, slope in enumerate(slopes):
        values.append(values[-1] + slope * (knots[at + 1] - knots[at]))
    return tuple(values)


def _is_of_one_kind(step: StepTotals) -> bool:
    return step.rows in (1, step.tokens)


def _check_enough(steps: Sequence[StepTotals]) -> None:
    """Refuse samples that leave some cost open."""
    decodes = [step for step in steps if step.rows == step.tokens and step.sampled]
    prompts = [step for step in steps if step.rows == 1 and step.tokens > 1]
    found: dict[str, set[int]] = {
        "decoding rows at two numbers of rows": {step.rows for step in decodes},
        "decoding rows at two contexts": {step.decode_pairs // step.rows for step in decodes},
        "one prompt row of two lengths": {step.tokens for step in prompts},
        "one prompt row at two contexts": {step.keys for step in prompts},
        "steps that draw nothing and steps that draw": {step.sampled > 0 for step in steps},
    }
    missing = [what for what, different in found.items() if len(different) < 2]
    if missing:
        raise InvalidParameter("samples", f"are too few: there must be {'; '.join(missing)}")
