"""Which StepCost an engine gets: this machine's calibration where one is stored, else a roofline.

Owns where calibrations lie. One is good for the model's shapes and formats, the backend with its
instruction set, the number of threads and the KV format; whatever else changes a step's time (a
newer build, a hotter machine) is found by calibrating again, and corrected while an engine runs.
"""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

from twostroke.cli.settings import ResolvedSettings
from twostroke.errors import InvalidParameter
from twostroke.plan.roofline_cost import Overheads, RooflineCost
from twostroke.plan.step_time import MeasuredCost, StepFit
from twostroke.spec.cost import StepCost
from twostroke.spec.model import ModelSpec
from twostroke.spec.work import ModelWork, get_model_work
from twostroke.weights.catalog import get_cache_dir

# What the native kernels reach of the limits that cli/limits.py measures, from `twostroke
# calibrate` of both catalog models on two cores: good for a first guess, within half either way.
CPU = Overheads(
    memory_efficiency=0.8,
    matrix_efficiency=0.6,
    attention_efficiency=0.8,
    link_efficiency=1.0,
    kernel_ns=2_000.0,
    link_ns=0.0,
    layer_host_ns=0.0,
    step_ns=100_000.0,
    sampled_ns=5_000.0,
    prompt_ns=10_000.0,
)


def find_step_cost(spec: ModelSpec, settings: ResolvedSettings) -> StepCost:
    """The cost of a model's steps with these settings on this machine.

    From a stored calibration where there is one that can be read; else from limits measured now,
    which takes a third of a second.
    """
    path = get_calibration_path(spec, settings)
    try:
        return MeasuredCost(get_settings_work(spec, settings), StepFit.from_json(path.read_text()))
    except FileNotFoundError:
        pass
    except (OSError, UnicodeDecodeError, InvalidParameter) as error:
        hint = "`twostroke calibrate` writes it anew"
        logging.getLogger(__name__).warning("%s: %s; %s", path, error, hint)
    return build_limits_cost(spec, settings)


def build_limits_cost(spec: ModelSpec, settings: ResolvedSettings) -> RooflineCost:
    """A roofline over this machine's limits, measured now."""
    from twostroke.cli.limits import measure_device

    device = measure_device(settings.threads)
    return RooflineCost(spec, device, 1, CPU, get_settings_work(spec, settings))


def get_settings_work(spec: ModelSpec, settings: ResolvedSettings) -> ModelWork:
    """The model's counts with the KV format of the settings."""
    return get_model_work(spec, settings.kv_element)


def get_calibration_path(spec: ModelSpec, settings: ResolvedSettings) -> Path:
    """Where the calibration of a model with these settings lies, if there is one."""
    backend = settings.backend
    if backend == "cpu":
        from twostroke._native import kernels_name

        backend += " " + kernels_name("auto")
    kv_format = settings.kv_element.value
    facts = repr((spec, backend, settings.threads, kv_format))
    name = hashlib.sha256(facts.encode()).hexdigest()[:24]
    return get_cache_dir() / "calibration" / f"{name}.json"


def store_fit(path: Path, fit: StepFit) -> None:
    """Write a calibration, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    try:
        partial.write_text(fit.to_json(), encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
