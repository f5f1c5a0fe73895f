"""What every runner derives from a model's float tensors: norm weights, biases, rope tables."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from twostroke.exec.local import RunnerSizes
from twostroke.kernels.ops import F32, RopeTable
from twostroke.kernels.reference.dequant import dequantise
from twostroke.models.rope import make_rope_table
from twostroke.spec.model import ModelSpec, RopeSpec
from twostroke.weights.tensor import HostTensor


def to_float(spec: ModelSpec, tensor: HostTensor) -> F32:
    """A tensor as float32 in its logical shape, norm weights with the spec's offset added."""
    values: F32 = dequantise(tensor.spec.format, tensor.data, tensor.spec.shape)
    if spec.norm_offset and tensor.spec.name.endswith("norm"):
        values = values + np.float32(spec.norm_offset)
    return np.ascontiguousarray(values, np.float32)


def make_ropes(
    spec: ModelSpec, tensors: Mapping[str, HostTensor], sizes: RunnerSizes
) -> dict[RopeSpec, RopeTable]:
    """A table for each rope of the model, as long as its context or the pool allows."""
    positions = min(spec.context_tokens, sizes.num_blocks * sizes.block_tokens)
    stored = tensors.get("rope_factors")
    factors = None if stored is None else to_float(spec, stored).astype(np.float64)
    return {
        rope: make_rope_table(rope, spec.head_dim, positions, spec.rope_layout, factors)
        for rope in {layer.rope: None for layer in spec.layers}
    }
