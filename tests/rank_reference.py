"""Ranks that compute a tiny model's forward pass in NumPy, each its part of it.

What they exchange and how a model is divided are the real ones (collectives.py, spec/shard.py,
spec/ranks.py); only the arithmetic is the reference's, in float32, so that one rank and several
differ by nothing but the order of sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from tiny_models import TINY_SPECS, make_tensors
from twostroke.core.ports import ExecutorInfo, OnDone
from twostroke.core.types import PENDING, BlockId, Row, SequenceId, StepOutcome, StepPlan
from twostroke.exec.batch import build_step_arrays
from twostroke.exec.floats import Ropes, to_float
from twostroke.exec.local import RunnerSizes
from twostroke.exec.rank_wire import RankContext
from twostroke.exec.sampling import build_logit_layout, build_results
from twostroke.kernels.cuda.collectives import Collectives, connect
from twostroke.kernels.ops import F32, KVShape, StepArrays
from twostroke.kernels.reference import sampling
from twostroke.kernels.reference.ops import make_ops, view_kv
from twostroke.models.decoder import run_head, run_layers, run_stage
from twostroke.spec.kv import KvElement
from twostroke.spec.model import ModelSpec
from twostroke.spec.quant import Format
from twostroke.spec.ranks import cut_stage
from twostroke.spec.shard import Shard, shard_spec

# In 16 bits a sum's last bit could move a key by a whole rounding.
SIZES = RunnerSizes(
    threads=1,
    num_blocks=24,
    block_tokens=16,
    max_step_tokens=24,
    kv_element=KvElement.F32,
)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class ModelJob:
    """Which tiny model, with which random weights."""

    family: str
    seed: int


class ReferenceRank:
    """An Executor of one rank; answers within `start`."""

    def __init__(self, context: RankContext, job: ModelJob) -> None:
        place = self.place = context.place
        self.collectives = connect(place, CPU, context.store, context.timeout_s)
        stage = cut_stage(TINY_SPECS[job.family], place)
        shard = shard_spec(stage.spec, place.shard, place.layout.tensor)
        self.spec = spec = shard.spec
        tensors = make_tensors(TINY_SPECS[job.family], Format.F32, job.seed)
        self.weights = {
            name: cut(shard, name, to_float(spec, tensors[stage.get_whole_name(source)]))
            for name, source in list_weights(spec, stage.spec)
            if stage.holds(source)
        }
        pool = (spec.num_layers, SIZES.num_blocks, SIZES.block_tokens, spec.num_kv_heads)
        shape = KVShape(*pool, spec.head_dim, SIZES.kv_element)
        self.memory = np.zeros(shape.bytes, np.uint8)
        self.ropes = Ropes(spec, tensors, SIZES)
        self.ops = replace(
            make_ops(view_kv(self.memory, shape)),
            all_reduce=lambda x: add_up(self.collectives, x),
            logits=lambda x, weight: gather(self.collectives, x @ weight.T),
        )
        self.drawn = np.zeros(0, np.int32)
        self.drawers: list[SequenceId] = []

    def describe(self) -> ExecutorInfo:
        weights = sum(array.nbytes for array in self.weights.values())
        return ExecutorInfo(
            "cpu", "reference", 1, SIZES.num_blocks, SIZES.block_tokens, self.memory.nbytes,
            weights, SIZES.max_step_tokens,
        )  # fmt: skip

    def start(self, plan: StepPlan, on_done: OnDone) -> None:
        layout = build_logit_layout(plan)
        rows = self._resolve(plan.rows)
        step = build_step_arrays(replace(plan, rows=rows), layout.sampled)
        self.drawers = [row.sequence for row in rows if row.sampling is not None]
        self.drawn = np.zeros(len(self.drawers), np.int32)
        logits = self._run(step)
        if not self.place.is_sampling:
            on_done(StepOutcome(plan.step, (), 1))
            return
        drawn = []
        if layout.sampled.size:
            drawn = [sampling.sample(logits[:, : self.spec.vocab_size], layout.arrays)]
            self.drawn = drawn[0].tokens
        on_done(StepOutcome(plan.step, build_results(rows, drawn, []), 1))

    def read_kv(self, blocks: Sequence[BlockId]) -> bytes:
        return self._view_blocks()[:, list(blocks)].tobytes()

    def write_kv(self, handle: bytes, blocks: Sequence[BlockId]) -> None:
        view = self._view_blocks()
        shape = (view.shape[0], len(blocks), view.shape[2])
        view[:, list(blocks)] = np.frombuffer(handle, np.uint8).reshape(shape)

    def close(self) -> None:
        self.collectives.close()

    def _view_blocks(self) -> np.ndarray:
        return self.memory.reshape(2 * self.spec.num_layers, SIZES.num_blocks, -1)

    def _resolve(self, rows: tuple[Row, ...]) -> tuple[Row, ...]:
        """The rows with the tokens that the step before drew, where ranks know them."""
        if all(PENDING not in row.tokens for row in rows):
            return rows
        shared = torch.from_numpy(self.drawn.copy())
        self.collectives.share_tokens(shared)
        drawn = dict(zip(self.drawers, shared.tolist(), strict=True))
        return tuple(
            replace(row, tokens=(drawn[row.sequence],)) if row.tokens == (PENDING,) else row
            for row in rows
        )

    def _run(self, step: StepArrays) -> F32:
        """The stage's layers; the logits in the last."""
        self.ropes.fill(step.positions)
        parts = (self.spec, self.ops, self.weights, self.ropes.tables, step)
        if self.place.is_first_stage:
            hidden = run_layers(*parts)
        else:
            given = torch.empty(step.tokens.size, self.spec.width)
            self.collectives.receive_hidden(given)
            hidden = run_stage(*parts, given.numpy())
        if not self.place.is_last_stage:
            self.collectives.send_hidden(torch.from_numpy(np.ascontiguousarray(hidden)))
            return np.zeros((0, 0), np.float32)
        if not step.logit_rows.size:
            return np.zeros((0, 0), np.float32)
        logits: F32 = run_head(self.spec, self.ops, self.weights, step, hidden)
        return logits


def list_weights(shard: ModelSpec, stage: ModelSpec) -> list[tuple[str, str]]:
    """(name in the shard, name in the stage): a head that was tied is the embedding there."""
    names = {tensor.name for tensor in stage.tensors()}
    return [
        (tensor.name, tensor.name if tensor.name in names else "embed")
        for tensor in shard.tensors()
    ]


def cut(shard: Shard, name: str, whole: F32) -> F32:
    """A rank's part of a weight or bias."""
    *_, short = name.removesuffix(".bias").split(".")
    rows: range | None = None
    if short in ("q", "k", "v", "gate", "up", "head"):
        rows = shard.get_rows(short)
        part = whole[rows.start : rows.stop]
        if short == "head":
            part = np.pad(part, ((0, shard.head_rows - len(rows)), (0, 0)))
        return np.ascontiguousarray(part)
    if short in ("o", "down"):
        if name.endswith(".bias"):
            return whole if shard.has_bias else np.zeros_like(whole)
        columns = shard.get_columns(short)
        return np.ascontiguousarray(whole[:, columns.start : columns.stop])
    return whole


def add_up(collectives: Collectives, x: F32) -> F32:
    """The sum over ranks."""
    total = torch.from_numpy(np.ascontiguousarray(x))
    collectives.all_reduce(total)
    return total.numpy()


def gather(collectives: Collectives, part: F32) -> F32:
    """The ranks' logits side by side."""
    out = torch.zeros(part.shape[0], part.shape[1] * collectives.place.layout.tensor)
    collectives.gather_logits(out, torch.from_numpy(np.ascontiguousarray(part)))
    return out.numpy()


def make_reference(context: RankContext, job: object) -> ReferenceRank:
    """The factory of these ranks."""
    assert isinstance(job, ModelJob)
    torch.set_num_threads(1)
    return ReferenceRank(context, job)
