"""Records a model's forward pass for the GPU, with the rotary tables it reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from twostroke.kernels.cuda.calls import DeviceRope
from twostroke.kernels.cuda.recorder import Recorder, Recording
from twostroke.kernels.cuda.types import Tensor, Weights
from twostroke.models.decoder import run_head, run_layers, run_stage
from twostroke.models.rope import get_frequencies
from twostroke.spec.model import ModelSpec, RopeSpec
from twostroke.spec.ranks import WHOLE, RankPlace


def record(
    spec: ModelSpec,
    weights: Weights,
    ropes: Mapping[RopeSpec, DeviceRope],
    place: RankPlace = WHOLE,
) -> Recording:
    """The forward pass of `spec`, a model's or a rank's share of it, as calls."""
    recorder = Recorder(place.layout.tensor)
    ops = recorder.make_ops()
    tables: Any = ropes
    step: Any = None  # a recorded pass takes its step when it is bound
    if place.is_first_stage:
        hidden = run_layers(spec, ops, weights, tables, step)
    else:
        hidden = run_stage(spec, ops, weights, tables, step, recorder.new_input(spec.width))
    recorder.start_head(hidden)
    if place.is_last_stage:
        run_head(spec, ops, weights, step, hidden)
    return recorder.recording


def make_ropes(
    spec: ModelSpec, weights: Weights, context_tokens: int, device: str
) -> dict[RopeSpec, DeviceRope]:
    """cos and sin of every position, one table a rope; computed in float64, rounded once."""
    stored = weights.get("rope_factors")
    factors = stored.double().cpu().numpy() if isinstance(stored, Tensor) else None
    positions = torch.arange(context_tokens, dtype=torch.float64, device=device)
    tables = {}
    for rope in {layer.rope: None for layer in spec.layers}:
        frequencies = torch.from_numpy(get_frequencies(rope, spec.head_dim, factors)).to(device)
        angles = positions[:, None] * frequencies
        tables[rope] = DeviceRope(angles.cos().float(), angles.sin().float())
    return tables
