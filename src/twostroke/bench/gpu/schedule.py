"""The order of a run and how many seconds each part of it may take. Touches no device.

A model is made once and visited by every section that needs it. Seconds are allowances: a section
that has spent its own leaves the rest of its steps out and says so, so that one slow part does not
take the time of all that follow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

CEILINGS, ATTENTION = "ceilings", "attention"
STEPS, PEERS, EXACT, GAP, SERVED = "steps", "peers", "exact", "gap", "served"
PER_MODEL = (STEPS, PEERS, EXACT, GAP, SERVED)
ALL = (CEILINGS, ATTENTION, *PER_MODEL)

# Seconds of each section, in the order visited: of the card, and for the models that it visits.
# They sum to less than eight minutes; compiling kernels and making weights are inside.
CARD_SECONDS = {CEILINGS: 6.0, ATTENTION: 30.0}
MODEL_SECONDS: dict[str, dict[str, float]] = {
    "llama-2-7b": {STEPS: 50.0, PEERS: 55.0, EXACT: 25.0},
    "llama-2-13b": {STEPS: 30.0},
    "llama-3.1-8b": {STEPS: 35.0, GAP: 15.0, SERVED: 80.0, PEERS: 45.0},
    "llama-3.1-8b-int4": {STEPS: 30.0},
    "llama-2-70b-int4": {STEPS: 35.0},
    "gpt-3-stand-in-int4": {STEPS: 30.0},
    "tiny": {STEPS: 60.0, PEERS: 60.0, EXACT: 60.0, GAP: 60.0, SERVED: 60.0},
    "tiny-int4": {STEPS: 60.0},
}


@dataclass(frozen=True, slots=True)
class Choice:
    """What was asked for: sections, models, seconds in all, the fake device, a trace's file."""

    sections: Sequence[str]
    models: Sequence[str]
    budget_s: float
    is_fake: bool = False
    trace: Path | None = None


@dataclass(frozen=True, slots=True)
class Visit:
    """A section on a model, or on the card alone where `model` is empty, and its seconds."""

    section: str
    model: str
    seconds: float


def plan_visits(choice: Choice) -> list[Visit]:
    """All visits in order: the card first, then model by model."""
    visits = [Visit(CEILINGS, "", CARD_SECONDS[CEILINGS])]
    if ATTENTION in choice.sections:
        visits.append(Visit(ATTENTION, "", CARD_SECONDS[ATTENTION]))
    for model in choice.models:
        visits += [
            Visit(section, model, seconds)
            for section, seconds in MODEL_SECONDS[model].items()
            if section in choice.sections
        ]
    return visits


def describe_plan(visits: Sequence[Visit], budget_s: float) -> Iterator[str]:
    """The plan in lines for people, with the sum of the seconds."""
    total = sum(visit.seconds for visit in visits)
    yield f"plan: {total:.0f} s at most of a budget of {budget_s:.0f} s"
    for visit in visits:
        where = f"{visit.section} {visit.model}".rstrip()
        yield f"  {where}: {visit.seconds:.0f} s"
