"""The reference runner: NumPy, float32 weights, one step at a time."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from twostroke.exec.floats import Ropes, to_float
from twostroke.exec.local import Draws, RunnerInfo, RunnerSizes, get_kv_shape
from twostroke.kernels.ops import F32, I32, Drawn, SamplingArrays, StepArrays
from twostroke.kernels.reference import sampling
from twostroke.kernels.reference.ops import make_ops, view_kv
from twostroke.models.decoder import run_head, run_layers
from twostroke.spec.model import ModelSpec
from twostroke.weights.tensor import HostTensor

MAX_LOGIT_ROWS = 64


class ReferenceRunner:
    """Computes steps with the reference op table (see exec.local.Runner)."""

    def __init__(
        self, spec: ModelSpec, tensors: Mapping[str, HostTensor], sizes: RunnerSizes
    ) -> None:
        self._spec = spec
        shape = get_kv_shape(spec, sizes)
        memory = np.zeros(shape.bytes, np.uint8)
        self._kv_bytes = memory.reshape(2 * spec.num_layers, sizes.num_blocks, -1)
        self._ops = make_ops(view_kv(memory, shape))
        self._weights = {name: to_float(spec, tensor) for name, tensor in tensors.items()}
        self._ropes = Ropes(spec, tensors, sizes)
        self._step: StepArrays | None = None
        self._hidden: F32 | None = None

    def describe(self) -> RunnerInfo:
        """What this runner is."""
        size = sum(array.nbytes for array in self._weights.values())
        return RunnerInfo("reference", 1, size, MAX_LOGIT_ROWS)

    def run_layers(self, step: StepArrays) -> None:
        """Computes the step's layers and writes its KV."""
        self._ropes.fill(step.positions)
        self._step = step
        self._hidden = run_layers(self._spec, self._ops, self._weights, self._ropes.tables, step)

    def run_step(self, step: StepArrays, arrays: SamplingArrays) -> Drawn:
        """Computes the step's layers and draws from its logit rows."""
        self.run_layers(step)
        return sampling.sample(self.get_logits(step.logit_rows), arrays)

    def get_logits(self, rows: I32) -> F32:
        """Logits (L, vocab) at these token indices of the last step."""
        assert self._step is not None
        step = StepArrays(
            self._step.tokens,
            self._step.positions,
            self._step.row_offsets,
            self._step.block_tables,
            rows,
        )
        logits: F32 = run_head(self._spec, self._ops, self._weights, step, self._hidden)
        return logits

    def get_draws(self) -> Draws:
        """The reference sampler."""
        return Draws(sampling.sample, sampling.score)

    def view_kv(self) -> NDArray[np.uint8]:
        """The pool as (2 * layers, blocks, bytes of a block's K or V)."""
        return self._kv_bytes
