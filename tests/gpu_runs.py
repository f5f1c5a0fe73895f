"""Results of GPU benchmarks that were never run: made of plan's own predictions, to read back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from twostroke.bench.gpu.ceilings import Ceilings
from twostroke.bench.gpu.results import Run
from twostroke.bench.gpu.workloads import (
    MODELS,
    Cell,
    GpuModel,
    get_totals,
    list_cells,
    split_cells,
)
from twostroke.plan.roofline_cost import Overheads, RooflineCost
from twostroke.spec.device import get_known_device
from twostroke.spec.work import get_model_work

CARD = Ceilings("NVIDIA H100 80GB HBM3", 80_000_000_000, 3.0e12, 3.1e12, 800e12)


def describe_cell(model: str, cell: Cell) -> dict[str, Any]:
    """What a row about a step begins with."""
    return {
        "model": model,
        "cell": cell.name,
        "kind": cell.kind,
        "batch": cell.batch,
        "tokens": cell.tokens,
        "context": cell.context,
    }


def make_step(model: str, cell: Cell, seconds: float, exact: bool = False) -> dict[str, Any]:
    """A row of the section "steps"."""
    spread = {"lowest": seconds, "highest": seconds, "repeats": 5}
    return {**describe_cell(model, cell), "exact": exact, "seconds": seconds, **spread}


def make_run() -> Run:
    """A run with nothing in it."""
    return Run({"commit": "0000000"}, CARD)


def make_predicted_run(overheads: Overheads, models: Sequence[GpuModel] = MODELS) -> Run:
    """Every step of the models that fits an H100, taking what plan predicts with `overheads`."""
    run, device = make_run(), get_known_device("h100-sxm")
    for model in models:
        spec = model.get_spec()
        work = get_model_work(spec)
        cost = RooflineCost(spec, device, 1, overheads, work)
        cells, _ = split_cells(spec, list_cells(), CARD.memory_bytes)
        for cell in cells:
            seconds = cost.predict_ns(get_totals(work, cell.rows)) / 1e9
            run.add("steps", [make_step(model.name, cell, seconds)])
    return run
