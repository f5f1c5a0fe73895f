"""This machine as a device to plan for: the model's own file, its settings, and what steps cost.

Owns how `--device this` is read by `roofline` and `plan`: the CPU's settings as `serve` would
choose them, the calibration where one is stored, else limits that are measured now.
"""

from __future__ import annotations

from twostroke.cli.machine import read_machine
from twostroke.cli.options import MachineOptions
from twostroke.cli.settings import (
    EngineSettings,
    ResolvedSettings,
    get_machine_settings,
    keep_on_cpu,
    resolve_settings,
)
from twostroke.cli.step_cost import find_step_cost
from twostroke.errors import InvalidParameter
from twostroke.plan.step_time import MeasuredCost
from twostroke.spec.cost import StepCost
from twostroke.spec.model import ModelSpec
from twostroke.weights.catalog import resolve
from twostroke.weights.load import open_model


def open_this(
    model: str | None, kv: str | None, max_rows: int | None = None
) -> tuple[ModelSpec, ResolvedSettings, StepCost, str]:
    """A model on this machine: its description, settings, cost, and where that comes from.

    max_rows: None as `serve` chooses. Raises TwostrokeError.
    """
    if model is None:
        raise InvalidParameter("model", "give one with --model; `twostroke models` lists them")
    machine = get_machine_settings(keep_on_cpu(MachineOptions(kv=kv)))
    settings = EngineSettings(model=model, max_rows=max_rows, **machine)
    with open_model(resolve(model)) as opened:
        spec = opened.spec
    resolved = resolve_settings(settings, spec, read_machine())
    cost = find_step_cost(spec, resolved)
    source = "limits measured now; `twostroke calibrate` would tell it better"
    if isinstance(cost, MeasuredCost):
        source = "its calibration"
    return spec, resolved, cost, source
