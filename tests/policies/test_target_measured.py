"""The correction of the pace over steps that a real engine ran, as a recording has them.

measured_steps.json: every step of decodes with a prompt, in order, of 100 requests of the Azure
conversation trace (lengths times 0.125) that SmolLM2-135M Q4_1 served on two cores: rows as (start,
tokens), the executor's nanoseconds, and those from its plan to its commit.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest

from policy_loads import make_outcome, make_plan
from twostroke.cli.step_cost import CPU
from twostroke.core.types import StepPlan
from twostroke.plan.roofline_cost import RooflineCost
from twostroke.policies.target import ONE, TargetPace
from twostroke.spec.catalog import get_known_model
from twostroke.spec.device import DeviceSpec

STEPS = Path(__file__).with_name("measured_steps.json")
FIRST = 5  # before that the window holds too little


def read_steps() -> Iterator[tuple[StepPlan, int]]:
    """Plans and what they took."""
    for number, (rows, duration_ns, _) in enumerate(json.loads(STEPS.read_text())):
        yield make_plan(number, rows), duration_ns


def make_pace(bandwidth: float = 15e9) -> TargetPace:
    """A pace that goes by limits, as where nobody has calibrated, and not by this machine's."""
    device = DeviceSpec(
        name="cpu",
        memory_bandwidth=bandwidth,
        rates=(("int8", 500e9), ("fp32", 100e9)),
        threads=2,
        memory_bytes=2**34,
    )
    return TargetPace(RooflineCost(get_known_model("smollm2-135m", "q4_1"), device, 1, CPU), 512)


def test_what_was_measured_brings_predictions_nearer() -> None:
    pace, plain, corrected = make_pace(), [], []
    for number, (plan, measured_ns) in enumerate(read_steps()):
        predicted_ns = pace.cost.predict_ns(pace._sum_rows(plan.rows))
        if number >= FIRST:
            ratio = median(pace._mixed._ratios) / ONE
            plain.append(abs(predicted_ns / measured_ns - 1))
            corrected.append(abs(predicted_ns * ratio / measured_ns - 1))
        pace.note_step(plan, make_outcome(plan, measured_ns))
    assert median(corrected) < 0.7 * median(plain)
    assert median(corrected) < 0.2


@pytest.mark.parametrize("bandwidth", [5e9, 15e9, 60e9])
def test_most_steps_keep_the_time_that_the_pace_believes_they_keep(bandwidth: float) -> None:
    pace, kept = make_pace(bandwidth), []
    for number, (plan, measured_ns) in enumerate(read_steps()):
        predicted_ns = pace.cost.predict_ns(pace._sum_rows(plan.rows))
        if number >= FIRST:
            # A target that allows exactly this step.
            itl_ns = predicted_ns * pace._mixed.upper // ONE
            assert pace.get_limit_ns(itl_ns + 1) >= predicted_ns - 1
            kept.append(measured_ns <= itl_ns)
        pace.note_step(plan, make_outcome(plan, measured_ns))
    assert sum(kept) >= 0.8 * len(kept)


def test_a_machine_that_turns_slow_is_followed_within_a_window() -> None:
    pace = make_pace()
    steps = list(read_steps())
    for plan, measured_ns in steps[:20]:
        pace.note_step(plan, make_outcome(plan, measured_ns))
    before = pace._mixed.upper
    for plan, measured_ns in steps[:15]:
        pace.note_step(plan, make_outcome(plan, 2 * measured_ns))
    assert 1.5 * before < pace._mixed.upper < 3 * before
