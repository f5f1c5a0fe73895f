"""The CPU runner: packed weights, a KV pool, and the forward pass as one native program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twostroke.errors import UnsupportedModel
from twostroke.exec.floats import Ropes
from twostroke.exec.local import RUNNER_PARTS, Draws, RunnerInfo, RunnerSizes, get_kv_shape
from twostroke.exec.weights import load_weights
from twostroke.kernels.cpu.recorder import LANES, Recorder
from twostroke.kernels.cpu.weights import PackedMatrix, Vector
from twostroke.kernels.ops import F32, I32, Drawn, RopeTable, SamplingArrays, StepArrays
from twostroke.models.decoder import run_head, run_layers
from twostroke.spec.model import ModelSpec, RopeSpec
from twostroke.weights.packed import PackedFiles
from twostroke.weights.tensor import HostTensor

MAX_LOGIT_ROWS = 64
# By an op's name; all others are elementwise.
_PARTS_OF = {
    **dict.fromkeys(("q", "k", "v", "o"), "projections"),
    **dict.fromkeys(("attention", "merge", "write_kv"), "attention"),
    **dict.fromkeys(("gate", "up", "down", "gated"), "ffn"),
    "draw": "sampling",
}


class CpuRunner:
    """Computes steps with the native kernels (see exec.local.Runner).

    isa: picks the instruction set: "auto", or one by name, for tests. files: where packed weights
    are kept; without it they are packed into memory. memory: for the KV pool, `get_kv_shape` tells
    its bytes; without it the pool is the runner's own and starts as zeros.
    """

    def __init__(
        self,
        spec: ModelSpec,
        tensors: Mapping[str, HostTensor],
        sizes: RunnerSizes,
        isa: str = "auto",
        files: PackedFiles | None = None,
        memory: NDArray[np.uint8] | None = None,
    ) -> None:
        from twostroke._native import Program, ThreadPool, kernels_name

        if spec.head_dim % LANES:
            raise UnsupportedModel(
                f"{spec.name}: head size {spec.head_dim} is no multiple of {LANES}, which the "
                "native kernels need; use --backend reference"
            )
        assert sizes.block_tokens == LANES, sizes.block_tokens
        self._pool = ThreadPool(sizes.threads)
        kv = np.zeros(get_kv_shape(spec, sizes).bytes, np.uint8) if memory is None else memory
        self._blocks: NDArray[np.uint8] = kv.reshape(1, sizes.num_blocks, -1)
        weights = load_weights(self._pool, spec, tensors, files)
        kv_shape = (spec.num_layers, sizes.num_blocks, spec.num_kv_heads, spec.head_dim)
        self._program = Program(
            self._pool,
            isa,
            kv,
            kv_shape,
            sizes.kv_element.value,
            sizes.max_step_tokens,
            MAX_LOGIT_ROWS,
        )
        self._ropes = Ropes(spec, tensors, sizes)
        self._logits = record(spec, self._program, weights, self._ropes.tables)
        self._program.number_parts(number_parts([name for name, _ in self._program.take_times()]))
        self._backend = f"cpu ({kernels_name(isa)})"
        self._weight_bytes = sum(
            weight.bytes if isinstance(weight, PackedMatrix) else weight.values.nbytes
            for weight in weights.values()
        )

    def describe(self) -> RunnerInfo:
        """What this runner is."""
        return RunnerInfo(self._backend, self._pool.size, self._weight_bytes, MAX_LOGIT_ROWS)

    def run_layers(self, step: StepArrays) -> None:
        """Computes the step's layers and writes its KV."""
        self._ropes.fill(step.positions)
        self._program.run_body(step.tokens, step.positions, step.row_offsets, step.block_tables)

    def run_step(self, step: StepArrays, arrays: SamplingArrays) -> Drawn:
        """Computes the step's layers and draws from its logit rows, in one native call."""
        self._ropes.fill(step.positions)
        return Drawn(*self._program.run_step(step, self._logits, arrays))

    def get_logits(self, rows: I32) -> F32:
        """Logits (L, vocab) at these token indices of the last step; valid until the next call."""
        self._program.run_head(rows)
        logits: F32 = self._program.view(self._logits, len(rows))
        return logits

    def get_draws(self) -> Draws:
        """The native sampler."""
        from twostroke._native import sample, score

        pool = self._pool
        return Draws(
            lambda logits, arrays: Drawn(*sample(logits, arrays, pool)),
            lambda logits, targets, top: Drawn(*score(logits, targets, top, pool)),
        )

    def view_kv(self) -> NDArray[np.uint8]:
        """The pool as (1, blocks, bytes of a block over all layers)."""
        return self._blocks

    def take_times(self) -> list[tuple[str, int]]:
        """Nanoseconds each recorded op took since the last call, in order of the pass."""
        times: list[tuple[str, int]] = self._program.take_times()
        return times

    def take_part_ns(self) -> list[int]:
        """Nanoseconds of RUNNER_PARTS since the last call."""
        times: list[int] = self._program.take_part_times()
        return times


def number_parts(ops: Sequence[str]) -> list[int]:
    """For each op of a program by name, in order, the place of its part in RUNNER_PARTS.

    Taking the rows that need logits begins the head, whatever its ops are.
    """
    numbers, in_head = [], False
    for op in ops:
        in_head = in_head or op == "take_rows"
        part = _PARTS_OF.get(op.split("+")[0], "elementwise")
        if in_head and part != "sampling":
            part = "head"
        numbers.append(RUNNER_PARTS.index(part))
    return numbers


def record(
    spec: ModelSpec,
    program: Any,
    weights: Mapping[str, PackedMatrix | Vector],
    ropes: Mapping[RopeSpec, RopeTable],
) -> int:
    """Records the forward pass of `spec` into a native program; returns the logits' buffer id."""
    recorder = Recorder()
    ops = recorder.make_ops()
    no_step: Any = None  # a recorded pass takes its step when it runs
    hidden = run_layers(spec, ops, weights, ropes, no_step)
    recorder.start_head()
    (logits,) = recorder.build(program, [run_head(spec, ops, weights, no_step, hidden)])
    return logits
