"""Loads, plans and outcomes as a scheduler would show them to a pace, in few words."""

from __future__ import annotations

from collections.abc import Iterable

from twostroke.core.policy import Load
from twostroke.core.types import (
    Request,
    Row,
    SamplingSpec,
    SequenceId,
    StepOutcome,
    StepPlan,
)


def make_request(id: str, prompt_tokens: int = 4, itl_ns: int = 0) -> Request:
    """A request with a prompt of so many tokens."""
    return Request(id, (1,) * prompt_tokens, 100, itl_ns=itl_ns)


def make_load(
    decodes: Iterable[int] = (),
    prefills: Iterable[int] = (),
    waiting: int = 0,
    oldest_ns: int = 0,
    free_blocks: int = 100,
    itl_ns: int = 0,
) -> Load:
    """A load of decodes and prefills at these positions, in a pool of 100 blocks."""
    return Load(
        [(position, make_request(f"d{position}", itl_ns=itl_ns)) for position in decodes],
        [(position, make_request(f"p{position}", position + 100)) for position in prefills],
        waiting,
        make_request("head") if waiting else None,
        oldest_ns,
        free_blocks,
        100,
    )


def make_plan(step: int, rows: Iterable[tuple[int, int]], iterations: int = 1) -> StepPlan:
    """A plan of (start, tokens) rows; those of one token draw."""
    return StepPlan(
        step,
        tuple(
            Row(
                SequenceId(f"r{index}", 0),
                (1,) * tokens,
                start,
                (),
                SamplingSpec() if tokens == 1 else None,
            )
            for index, (start, tokens) in enumerate(rows)
        ),
        iterations=iterations,
    )


def make_outcome(plan: StepPlan, duration_ns: int, each_ns: tuple[int, ...] = ()) -> StepOutcome:
    """The outcome of a plan that took so long; its results do not matter to a pace."""
    return StepOutcome(plan.step, (), duration_ns, each_ns)
