"""The roofline's overheads hold on the half of the measurements that they were not fitted to."""

from __future__ import annotations

from places import SHARED
from twostroke.bench.fit_roofline import judge, read_steps
from twostroke.plan.roofline_cost import CAPTURED, EAGER

FOLDER = SHARED / "measurements"


def test_predicted_steps_are_as_near_as_is_said() -> None:
    errors = judge(FOLDER, EAGER)
    assert {name: tuple(round(100 * each) for each in pair) for name, pair in errors.items()} == {
        "products": (5, 15),
        "prefill": (5, 14),
        "decode": (2, 6),
    }


def test_repeats_and_answers_of_other_lengths_are_one_point() -> None:
    prefills, decodes = read_steps(FOLDER)
    assert len({(each.devices, each.rows, each.new_tokens) for each in prefills}) == len(prefills)
    assert len({(each.devices, each.rows, each.context) for each in decodes}) == len(decodes)


def test_an_engine_that_replays_kernels_is_quicker() -> None:
    assert CAPTURED.memory_efficiency == EAGER.memory_efficiency
    assert CAPTURED.step_ns < EAGER.step_ns
