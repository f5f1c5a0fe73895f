"""Fits a StepFit to measured steps, by least squares of relative errors without negative costs.

Owns the choice of knots and the solver. Repeats of a step count as their mean, because in service a
step is as often slow as it was here; every step then weighs the same, short or long. The same
samples give the same fit.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from statistics import median

import numpy as np
from numpy.typing import NDArray

from twostroke.errors import InvalidParameter
from twostroke.plan.step_time import StepFit
from twostroke.spec.work import StepTotals

Matrix = NDArray[np.float64]
_TOLERANCE = 1e-10
# Steps of few tokens are computed in other ways, one of which may be slower than that for a few
# more: up to here a curve may fall.
_FEW = 16
_WILD = 2.5


def fit_steps(
    samples: Sequence[tuple[StepTotals, int]],
    copy_byte_ns: float,
    engine_ns: tuple[float, float] = (0.0, 0.0),
) -> StepFit:
    """The StepFit nearest to measured steps, given as (totals, duration in nanoseconds).

    engine_ns: what the engine takes around a step, and for each of its rows.
    Token knots are the sizes of steps of one kind, decoding rows only or one prompt row; drawn
    tokens have a knot at every number measured. Beyond _FEW neither curve falls.
    Raises InvalidParameter naming the steps that are missing when they do not tell all costs.
    """
    durations: dict[StepTotals, list[int]] = defaultdict(list)
    for totals, duration_ns in samples:
        durations[totals].append(duration_ns)
    steps = sorted(durations)
    _check_enough(steps)
    token_knots = tuple(sorted({step.tokens for step in steps if _is_of_one_kind(step)}))
    sampled_knots = tuple(sorted({0} | {step.sampled for step in steps}))
    times = np.array([get_usual_ns(durations[step]) for step in steps])
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
        token_ns=_build_curve(token_knots, costs[:tokens_end]),
        sampled_knots=sampled_knots,
        sampled_ns=_build_curve(sampled_knots, [0.0, *costs[tokens_end:sampled_end]]),
        row_ns=row_ns,
        decode_pair_ns=decode_pair_ns,
        prompt_pair_ns=prompt_pair_ns,
        prompt_key_ns=prompt_key_ns,
        copy_byte_ns=copy_byte_ns,
        engine_step_ns=engine_ns[0],
        engine_row_ns=engine_ns[1],
    )


def get_usual_ns(durations_ns: Sequence[int]) -> float:
    """The time of a step that was repeated: the mean of the repeats but wild ones.

    Wild is what takes over _WILD times the median: the machine was doing something else.
    """
    wild = _WILD * median(durations_ns)
    usual = [each for each in durations_ns if each <= wild]
    return sum(usual) / len(usual)


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
    yield from _get_curve(tokens, token_knots)
    yield from list(_get_curve(sampled, sampled_knots))[1:]  # nothing drawn takes no time
    yield rows
    yield decode_pairs
    yield pairs - decode_pairs
    yield keys - decode_keys


def _get_curve(where: Matrix, knots: Sequence[int]) -> Iterator[Matrix]:
    """A column for each knot: up to the bend the curve's value there, behind it a slope.

    The value at the bend goes on, and each slope counts from the knot before; the last goes on.
    """
    bend = _find_bend(knots)
    for at, knot in enumerate(knots):
        if at > bend:
            high = np.inf if at == len(knots) - 1 else knot
            yield np.clip(where, knots[at - 1], high) - knots[at - 1]
            continue
        share = np.ones(len(where))
        if at > 0:
            share = np.minimum(share, (where - knots[at - 1]) / (knot - knots[at - 1]))
        if at < bend:
            share = np.minimum(share, (knots[at + 1] - where) / (knots[at + 1] - knot))
        yield np.maximum(share, 0.0)


def _build_curve(knots: Sequence[int], costs: Sequence[float]) -> tuple[float, ...]:
    """The curve's values at its knots."""
    bend = _find_bend(knots)
    values = list(costs[: bend + 1])
    for at in range(bend + 1, len(knots)):
        values.append(values[-1] + costs[at] * (knots[at] - knots[at - 1]))
    return tuple(values)


def _find_bend(knots: Sequence[int]) -> int:
    """Place of the last knot up to which the curve may fall; never the last of all."""
    return max(0, min(bisect_right(knots, _FEW), len(knots) - 1) - 1)


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
