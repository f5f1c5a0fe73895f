"""What every runner derives from a model's float tensors: norm weights, biases, rope tables."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from twostroke.exec.local import RunnerSizes
from twostroke.kernels.ops import F32, I32, RopeTable
from twostroke.kernels.reference.dequant import dequantise
from twostroke.models.rope import F64, fill_rope_rows, get_frequencies, make_rope_table
from twostroke.spec.model import ModelSpec, RopeSpec
from twostroke.weights.tensor import HostTensor

ROPE_ROWS = 256


def to_float(spec: ModelSpec, tensor: HostTensor) -> F32:
    """A tensor as float32 in its logical shape, norm weights with the spec's offset added."""
    values: F32 = dequantise(tensor.spec.format, tensor.data, tensor.spec.shape)
    if spec.norm_offset and tensor.spec.name.endswith("norm"):
        values = values + np.float32(spec.norm_offset)
    return np.ascontiguousarray(values, np.float32)


class Ropes:
    """The rope tables of a model, one for each rope, as long as its context or the pool allows.

    Rows are computed when a step first needs their positions: a long context has tables of many
    megabytes, which would take longer to fill than all else at start.
    """

    def __init__(
        self, spec: ModelSpec, tensors: Mapping[str, HostTensor], sizes: RunnerSizes
    ) -> None:
        self._positions = min(spec.context_tokens, sizes.num_blocks * sizes.block_tokens)
        self._filled = 0
        stored = tensors.get("rope_factors")
        factors = None if stored is None else to_float(spec, stored).astype(np.float64)
        self.tables: dict[RopeSpec, RopeTable] = {}
        self._frequencies: dict[RopeSpec, F64] = {}
        for rope in {layer.rope: None for layer in spec.layers}:
            self.tables[rope] = make_rope_table(spec.head_dim, self._positions, spec.rope_layout)
            self._frequencies[rope] = get_frequencies(rope, spec.head_dim, factors)

    def fill(self, positions: I32) -> None:
        """Make sure the tables have the rows of these positions (T,), as far as tables go."""
        if (last := max(positions.tolist())) < self._filled:
            return
        end = min(last // ROPE_ROWS * ROPE_ROWS + ROPE_ROWS, self._positions)
        for rope, table in self.tables.items():
            # A few at a time, so that what is between stays in the cache.
            for first in range(self._filled, end, ROPE_ROWS):
                last = min(first + ROPE_ROWS, end)
                fill_rope_rows(table, self._frequencies[rope], first, last)
        self._filled = end
