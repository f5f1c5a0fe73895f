"""Overheads fitted to half of the measured steps foretell the others."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gpu_runs import make_predicted_run, make_run
from twostroke.bench.gpu import fit as fitting
from twostroke.bench.gpu.fit import Predictor, find_device, fit, list_points, split
from twostroke.bench.gpu.workloads import MODELS, get_model
from twostroke.plan.roofline_cost import CAPTURED
from twostroke.spec.device import get_known_device

H100 = get_known_device("h100-sxm")
TRUE = replace(CAPTURED, memory_efficiency=0.84, matrix_efficiency=0.6, step_ns=150_000.0)


def test_plans_own_steps_are_predicted_exactly() -> None:
    points = list_points([make_predicted_run(TRUE)])
    errors = Predictor(H100).get_errors(points, TRUE)
    assert np.abs(errors).max() < 1e-6


def test_a_fit_finds_overheads_that_foretell_what_it_did_not_see(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = ("memory_efficiency", "matrix_efficiency", "step_ns")
    monkeypatch.setattr(fitting, "FITTED", names)
    found = fit(list_points([make_predicted_run(TRUE, MODELS[1:3])]), H100)
    assert found is not None
    assert found.get_median_error("prefill") < 0.01
    assert found.get_median_error("decode") < 0.01
    assert found.overheads[fitting.SIXTEEN_BITS].memory_efficiency == pytest.approx(0.84, rel=0.02)


def test_no_step_is_both_fitted_and_judged() -> None:
    points = list_points([make_predicted_run(TRUE)])
    fitted, judged = split(points)
    places = [{(p.model, p.cell) for p in half} for half in (fitted, judged)]
    assert not places[0] & places[1]
    assert len(fitted) + len(judged) == len(points)
    for half in (fitted, judged):
        assert {p.kind for p in half} == {"prefill", "decode"}


def test_too_few_steps_are_not_fitted() -> None:
    assert fit(list_points([make_run()]), H100) is None


def test_a_card_is_known_by_its_drivers_name() -> None:
    for card, name in (("NVIDIA H100 80GB HBM3", "h100-sxm"), ("NVIDIA H200", "h200")):
        device = find_device(card)
        assert device is not None
        assert device.name == name
    assert find_device("NVIDIA Unheard-of") is None


def test_weights_without_enough_steps_are_neither_fitted_nor_judged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fitting, "FITTED", ("memory_efficiency",))
    run = make_predicted_run(TRUE, [get_model("llama-3.1-8b")])
    four_bits = make_predicted_run(TRUE, [get_model("llama-3.1-8b-int4")])
    run.add("steps", four_bits.sections["steps"][:3])
    found = fit(list_points([run]), H100)
    assert found is not None
    assert set(found.overheads) == {fitting.SIXTEEN_BITS}
    assert {model for model, _ in found.judged} == {"llama-3.1-8b"}
