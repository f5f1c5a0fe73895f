"""Steps that are timed alone: real plans that go straight to an executor of this process.

Owns what a calibration and a probe of the machine's pace must do alike, or one could not be held
against the other: the plans, how often each is run, and when a time counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from twostroke.cli.settings import ResolvedSettings
from twostroke.core.ports import StepAnswer
from twostroke.core.types import Row, SamplingSpec, SequenceId, StepPlan
from twostroke.exec.local import LocalExecutor
from twostroke.spec.model import ModelSpec
from twostroke.spec.work import StepTotals, add_totals

# A step of few tokens is mostly reading weights; in service it follows a dozen of its like, which
# left the caches as it needs them: the tenth of one row takes two thirds of the first. So a step of
# at most so many tokens is run so often, and all but the first count.
_REPEATS = ((4, 10), (16, 5))
# Threads that wait for each other keep their cores busy, so a step's CPU time is its wall time on
# every thread, less where another process had the core meanwhile.
_LEAST_SHARE = 0.93
_TRIES = 3
_KV_BYTE = 0x2C  # as 16 or 32 bits a small ordinary number


@dataclass(frozen=True, slots=True)
class Cell:
    """A step to measure: rows as (new tokens, context before, drawn); kind, for reports."""

    kind: str
    rows: tuple[tuple[int, int, int], ...]
    is_fitted: bool = True


def fits(cell: Cell, spec: ModelSpec, settings: ResolvedSettings) -> bool:
    """Whether the model's context, the pool, the rows and the step budget allow the step."""
    lengths = [new + before for new, before, _ in cell.rows]
    return (
        max(lengths) <= spec.context_tokens
        and sum(-(-length // settings.block_tokens) for length in lengths) <= settings.num_blocks
        and len(cell.rows) <= settings.max_rows
        and sum(new for new, _, _ in cell.rows) <= settings.step_tokens
    )


def sum_cell(cell: Cell, get_row_totals: Callable[[int, int, int], StepTotals]) -> StepTotals:
    """The totals of its rows. get_row_totals: of (new tokens, context before, drawn)."""
    totals = StepTotals()
    for row in cell.rows:
        totals = add_totals(totals, get_row_totals(*row))
    return totals


def build_plan(cell: Cell, step: int, vocab_size: int, block_tokens: int) -> StepPlan:
    """The cell as a plan: made-up tokens, blocks of its own for every row."""
    rows, next_block = [], 0
    for index, (new, before, sampled) in enumerate(cell.rows):
        count = -(-(new + before) // block_tokens)
        rows.append(
            Row(
                sequence=SequenceId(f"calibration-{index}", 0),
                tokens=tuple((7919 * (index + at) + step) % vocab_size for at in range(new)),
                start=before,
                blocks=tuple(range(next_block, next_block + count)),
                sampling=SamplingSpec() if sampled else None,
            )
        )
        next_block += count
    return StepPlan(step, tuple(rows))


def fill_pool(executor: LocalExecutor) -> None:
    """Write to all of the KV pool, as an engine has that has served for a while.

    Memory that nobody wrote to yet is fetched page by page, inside the steps that first need it.
    """
    executor.runner.view_kv().fill(_KV_BYTE)


def get_order(count: int, turn: int) -> list[int]:
    """0 … count - 1 in an order that differs from turn to turn, the same in every process."""
    return sorted(
        range(count), key=lambda at: (2_654_435_761 * (at + 1) * (turn + 1)) % 4_294_967_291
    )


def time_step(executor: LocalExecutor, plan: StepPlan) -> int:
    """The time the executor says a plan took, in nanoseconds. Raises what it answers instead."""
    answers: list[StepAnswer] = []
    executor.start(plan, answers.append)
    executor.run_pending()
    [answer] = answers
    if isinstance(answer, Exception):
        raise answer
    return answer.duration_ns


def count_repeats(tokens: int) -> int:
    """How often a step of so many tokens is run in a row."""
    return next((repeats for most, repeats in _REPEATS if tokens <= most), 1)


def repeat_step(
    executor: LocalExecutor, plan: StepPlan, repeats: int, threads: int
) -> tuple[list[int], bool]:
    """Times of a step run `repeats` times, without the first of several, and whether other
    processes left it the cores.

    Where they did not it is run again; what stays disturbed counts where nothing else was seen.
    """
    times_ns, is_quiet = list[int](), False
    for _ in range(_TRIES):
        begin_ns, used_ns = time.perf_counter_ns(), time.process_time_ns()
        times_ns = [time_step(executor, plan) for _ in range(repeats)]
        used_ns = time.process_time_ns() - used_ns
        is_quiet = used_ns >= _LEAST_SHARE * threads * (time.perf_counter_ns() - begin_ns)
        if is_quiet:
            break
    return times_ns[1:] or times_ns, is_quiet
