"""Attention two ways over the same tensors: tiled with a running maximum, and with all its scores.

The tiled one is the engine's native kernel, run as a program of its own: it reads keys and values
from pages and keeps no score. The other writes the whole score matrix, masks it, takes the softmax
of its rows and multiplies, head by head in NumPy's BLAS: what a framework does without a fused
kernel. Both get the same float32 queries, keys and values; their results are compared.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from twostroke.kernels.cpu.recorder import Recorder
from twostroke.kernels.ops import F32, KVShape, StepArrays
from twostroke.spec.kv import KvElement
from twostroke.spec.model import ModelSpec

_BLOCK = 16
_SEED = 20


@dataclass(frozen=True, slots=True)
class AttentionTimes:
    """One length: seconds of one layer either way, bytes beside inputs and outputs, and the error.

    largest_error: of the materialised result against the tiled, relative to its largest value.
    """

    tokens: int
    tiled_s: float
    tiled_bytes: int
    materialised_s: float
    materialised_bytes: int
    largest_error: float


def measure_attention(
    spec: ModelSpec, tokens: int, threads: int, rounds: int = 5
) -> AttentionTimes:
    """A prompt of `tokens` tokens through one layer's attention, the median of interleaved runs."""
    rng = np.random.default_rng(_SEED)
    groups = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
    q, k, v = (
        rng.standard_normal((tokens, heads * spec.head_dim)).astype(np.float32) for heads in groups
    )
    tiled = _Tiled(spec, (q, k, v), threads)
    tiled_s, materialised_s = [], []
    mine, theirs = tiled.run()[1], attend_with_scores(spec, q, k, v)[0]
    for _ in range(rounds):
        tiled_s.append(tiled.run()[0])
        begin = time.perf_counter()
        _, scores_bytes = attend_with_scores(spec, q, k, v)
        materialised_s.append(time.perf_counter() - begin)
    error = float(np.abs(mine - theirs).max() / np.abs(mine).max())
    return AttentionTimes(
        tokens,
        float(np.median(tiled_s)),
        _get_tile_bytes(spec, threads),
        float(np.median(materialised_s)),
        scores_bytes,
        error,
    )


def attend_with_scores(spec: ModelSpec, q: F32, k: F32, v: F32) -> tuple[F32, int]:
    """softmax(q·kᵀ)·v with the scores of all heads in memory, and how many bytes those are.

    q (T, heads*head_dim), k and v (T, kv_heads*head_dim) → (T, heads*head_dim). The softmax is
    taken in place (Vaswani et al. 2017, eq. 1).
    """
    tokens = len(q)
    queries = q.reshape(tokens, spec.num_heads, spec.head_dim).transpose(1, 0, 2)
    shape = (tokens, spec.num_kv_heads, spec.head_dim)
    group = spec.num_heads // spec.num_kv_heads
    keys = np.repeat(k.reshape(shape).transpose(1, 2, 0), group, axis=0)
    values = np.repeat(v.reshape(shape).transpose(1, 0, 2), group, axis=0)
    scores = np.matmul(queries, keys)
    scores *= np.float32(spec.attention_scale)
    scores += np.triu(np.full((tokens, tokens), -np.inf, np.float32), 1)
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    out = np.matmul(scores, values).transpose(1, 0, 2).reshape(tokens, -1)
    return np.ascontiguousarray(out, np.float32), scores.nbytes


class _Tiled:
    """The native kernel as a program of one layer: keys and values written, then attended to."""

    def __init__(self, spec: ModelSpec, inputs: tuple[F32, F32, F32], threads: int) -> None:
        from twostroke._native import Program, ThreadPool

        tokens = len(inputs[0])
        blocks = -(-tokens // _BLOCK)
        shape = KVShape(1, blocks, _BLOCK, spec.num_kv_heads, spec.head_dim, KvElement.F32)
        self._memory = np.zeros(shape.bytes, np.uint8)
        self._pool = ThreadPool(threads)
        sizes = (1, blocks, spec.num_kv_heads, spec.head_dim)
        self._program = Program(self._pool, "auto", self._memory, sizes, "f32", tokens, 1)
        recorder = Recorder()
        ops = recorder.make_ops()
        no_step: Any = None
        slots = [recorder.new_input(values.shape[1]) for values in inputs]
        ops.write_kv(no_step, 0, slots[1], slots[2])
        result = ops.attention(no_step, 0, slots[0], spec.attention_scale, None)
        *ids, self._result = recorder.build(self._program, [*slots, result])
        for buffer, values in zip(ids, inputs, strict=True):
            self._program.view(buffer, tokens)[:] = values
        places = np.arange(tokens, dtype=np.int32)
        table = np.arange(blocks, dtype=np.int32).reshape(1, -1)
        nothing = np.zeros(0, np.int32)
        self._step = StepArrays(
            np.zeros(tokens, np.int32), places, np.array([0, tokens], np.int32), table, nothing
        )

    def run(self) -> tuple[float, F32]:
        """Seconds of one run, and its result (T, heads*head_dim)."""
        step = self._step
        begin = time.perf_counter()
        self._program.run_body(step.tokens, step.positions, step.row_offsets, step.block_tables)
        seconds = time.perf_counter() - begin
        return seconds, np.array(self._program.view(self._result, len(step.tokens)))


def _get_tile_bytes(spec: ModelSpec, threads: int) -> int:
    """What the tiled kernel keeps: for each thread a tile's accumulator, maximum and sum of every
    head of a group, and its scores of one block of keys."""
    group = spec.num_heads // spec.num_kv_heads
    return threads * group * _BLOCK * (spec.head_dim + 2 + _BLOCK) * 4
