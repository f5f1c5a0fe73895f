"""`twostroke bench --replay FILE`: a recorded run through a fresh scheduler, plan by plan.

Owns what a recording says of its policies and how they are made again from it. Needs the model
only where a policy predicts step times, and then only its description.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from twostroke.cli.bench_table import describe_replayed, list_replayed
from twostroke.core.policy import Policies
from twostroke.engine.recording import Header
from twostroke.engine.recording_file import read_recording
from twostroke.errors import EngineError, InvalidParameter
from twostroke.plan.step_time import MeasuredCost, StepFit
from twostroke.policies.names import PolicyChoice, build_policies
from twostroke.sim.recorded import replay_recording
from twostroke.spec.kv import KvElement
from twostroke.spec.work import get_model_work
from twostroke.weights.catalog import resolve
from twostroke.weights.load import open_model


def replay_file(path: Path, as_json: bool) -> None:
    """Replay a recording and say what came of it.

    Raises InvalidParameter for a file that is no recording, and EngineError.
    """
    recording = read_recording(path)
    policies = build_recorded_policies(recording.header)
    replayed = replay_recording(recording, policies)
    for line in list_replayed(replayed):
        print(line)
    if as_json:
        print(json.dumps({"recording": str(path), **describe_replayed(replayed)}))
    if replayed.difference is not None:
        raise EngineError(f"{path}: input {replayed.difference.number} was answered otherwise")


def build_recorded_policies(header: Header) -> Policies:
    """The policies that a recording names, fresh. Raises InvalidParameter."""
    about = header.policies
    choice = _read_choice(about.get("choice", {}))
    cost = None
    if choice.pace == "target" or choice.order == "deadline" or header.config.host_blocks:
        cost = _build_cost(about)
    block_bytes = about.get("block_bytes", 0) if header.config.host_blocks else 0
    return build_policies(
        choice, step_tokens=header.config.step_tokens, block_bytes=block_bytes, cost=cost
    )


def _read_choice(plain: Any) -> PolicyChoice:
    known = {field.name: type(field.default) for field in fields(PolicyChoice)}
    if not isinstance(plain, Mapping):
        raise InvalidParameter("recording", "policies.choice must be an object")
    for name, value in plain.items():
        if name not in known or type(value) is not known[name]:
            raise InvalidParameter("recording", f"policies.choice: {name!r} cannot be {value!r}")
    return PolicyChoice(**plain)


def _build_cost(about: Mapping[str, Any]) -> MeasuredCost:
    model, element = about.get("model"), about.get("kv")
    known = [each.value for each in KvElement]
    if not isinstance(model, str) or element not in known or "fit" not in about:
        raise InvalidParameter(
            "recording", "its policies predict step times: it must name model, kv and fit"
        )
    with open_model(resolve(model)) as opened:
        work = get_model_work(opened.spec, KvElement(element))
    return MeasuredCost(work, StepFit.from_json(json.dumps(about["fit"])))
