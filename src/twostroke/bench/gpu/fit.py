"""Fits plan's overheads to measured steps of our engine, and says how well plan foretells the rest.

Of the steps, sorted, every second is fitted and the others judge. Prefills and decodes weigh the
same. Weights of 16 and of 4 bits are multiplied by different kernels, so each has overheads of its
own. The device is the one of plan's own files, with the data sheet's numbers, because that is what
somebody who plans has; the overheads take in how far the card stays behind them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from twostroke.bench.fit_roofline import Vector, get_loss, search
from twostroke.bench.gpu.results import Run, list_rows
from twostroke.bench.gpu.workloads import DECODE, PREFILL, get_model, get_totals
from twostroke.plan.roofline_cost import CAPTURED, OURS, Overheads, RooflineCost
from twostroke.spec.device import DeviceSpec, get_known_device
from twostroke.spec.work import StepTotals

SIXTEEN_BITS, FOUR_BITS = "16-bit weights", "4-bit weights"

# The overheads that plan uses for this engine, by the weights it multiplies.
OVERHEADS: Mapping[str, Overheads] = {SIXTEEN_BITS: OURS, FOUR_BITS: CAPTURED}

FITTED = (
    "memory_efficiency",
    "matrix_efficiency",
    "attention_efficiency",
    "kernel_ns",
    "step_ns",
    "sampled_ns",
    "prompt_ns",
)
LEAST_POINTS = 4  # of each kind, so that two are fitted and two judge


@dataclass(frozen=True, slots=True)
class Point:
    """One measured step. weights: a name of OVERHEADS."""

    model: str
    cell: str
    kind: str
    weights: str
    totals: StepTotals
    time_ns: float


@dataclass(frozen=True, slots=True)
class Fit:
    """Fitted overheads by weights; relative errors of judged points by kind, and their names."""

    overheads: Mapping[str, Overheads]
    errors: Mapping[str, Vector]
    judged: frozenset[tuple[str, str]]

    def get_median_error(self, kind: str) -> float:
        """Median absolute error of a kind's judged steps."""
        return float(np.median(np.abs(self.errors[kind])))

    def describe(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "overheads": {weights: asdict(each) for weights, each in self.overheads.items()},
            "median_error": {kind: self.get_median_error(kind) for kind in self.errors},
            "judged": {kind: len(errors) for kind, errors in self.errors.items()},
        }


def find_device(card: str) -> DeviceSpec | None:
    """Plan's own description of a card by the name that its driver gives; None for others."""
    for word, name in (("H100 PCIe", "h100-pcie"), ("H100", "h100-sxm"), ("H200", "h200")):
        if word in card:
            return get_known_device(name)
    return get_known_device("h100-sxm") if card == "fake" else None


def list_points(runs: Sequence[Run]) -> list[Point]:
    """Measured steps of the runs, exact ones left out, sorted."""
    points = []
    for _, row in list_rows(runs, "steps"):
        if row["exact"]:
            continue
        model = get_model(row["model"])
        rows = ((row["tokens"], row["context"] - row["tokens"]),) * row["batch"]
        totals = get_totals(model.get_work(), rows)
        weights = FOUR_BITS if model.is_int4 else SIXTEEN_BITS
        time_ns = row["seconds"] * 1e9
        points.append(Point(model.name, row["cell"], row["kind"], weights, totals, time_ns))
    return sorted(points, key=lambda point: (point.kind, point.model, point.totals))


class Predictor:
    """Predicts points on one device."""

    def __init__(self, device: DeviceSpec) -> None:
        self._device = device

    def predict_ns(self, point: Point, overheads: Overheads) -> int:
        """Time of a step as plan has it."""
        return self._get_cost(point.model, overheads).predict_ns(point.totals)

    def get_errors(self, points: Sequence[Point], overheads: Overheads) -> Vector:
        """Relative errors (points,)."""
        costs = {model: self._get_cost(model, overheads) for model in {p.model for p in points}}
        return np.array(
            [costs[p.model].predict_ns(p.totals) / p.time_ns - 1 for p in points], np.float64
        )

    def _get_cost(self, model: str, overheads: Overheads) -> RooflineCost:
        own = get_model(model)
        return RooflineCost(own.get_spec(), self._device, 1, overheads, own.get_work())


def split(points: Sequence[Point]) -> tuple[list[Point], list[Point]]:
    """Points to fit and points to judge by: every second of each kind."""
    fitted, judged = [], []
    for kind in (PREFILL, DECODE):
        own = [point for point in points if point.kind == kind]
        fitted += own[::2]
        judged += own[1::2]
    return fitted, judged


def fit(points: Sequence[Point], device: DeviceSpec) -> Fit | None:
    """Overheads fitted to half the points and judged by the others.

    Weights of which there are too few prefills or decodes are neither fitted nor judged; None where
    no weights are left.
    """
    predictor = Predictor(device)
    overheads: dict[str, Overheads] = {}
    errors: dict[str, list[Vector]] = {PREFILL: [], DECODE: []}
    judges: list[Point] = []
    for weights in OVERHEADS:
        own = [point for point in points if point.weights == weights]
        counts = [sum(point.kind == kind for point in own) for kind in (PREFILL, DECODE)]
        if min(counts) < LEAST_POINTS:
            continue
        fitted, judged = split(own)
        overheads[weights] = _fit_group(predictor, weights, fitted)
        for kind, found in errors.items():
            chosen = [point for point in judged if point.kind == kind]
            found.append(predictor.get_errors(chosen, overheads[weights]))
        judges += judged
    if not overheads:
        return None
    joined = {kind: np.concatenate(found) for kind, found in errors.items()}
    return Fit(overheads, joined, frozenset((p.model, p.cell) for p in judges))


def _fit_group(predictor: Predictor, weights: str, points: Sequence[Point]) -> Overheads:
    """The overheads nearest to these points, which share one kind of weights."""
    by_kind = [[p for p in points if p.kind == kind] for kind in (PREFILL, DECODE)]

    def get_total_loss(overheads: Overheads) -> float:
        return sum(get_loss(predictor.get_errors(own, overheads)) for own in by_kind)

    # The search moves logarithms, so that nothing may begin at zero.
    start = OVERHEADS[weights]
    times = {name: max(1.0, getattr(start, name)) for name in FITTED if name.endswith("_ns")}
    return search(replace(start, **times), FITTED, get_total_loss)
