"""Laws of batch building: arrays that are kept from step to step are what fresh ones would be."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tiny_models import TINY_SPECS, make_tensors
from twostroke.core.types import Row, SamplingSpec, SequenceId, StepPlan
from twostroke.exec.batch import SPARE_BLOCKS, Batch, BatchBuilder
from twostroke.exec.cpu import CpuRunner
from twostroke.exec.local import RunnerSizes
from twostroke.kernels.ops import SamplingArrays
from twostroke.spec.quant import Format

SIZES = RunnerSizes(threads=2, num_blocks=64, block_tokens=16, max_step_tokens=512)
BLOCK_TOKENS = 4
SPECS = (
    SamplingSpec(),
    SamplingSpec(temperature=0.7, top_k=5, seed=3, logit_bias=((2, 1.5),)),
    SamplingSpec(temperature=1.0, repetition_penalty=1.2, seed=9, logprobs=2),
)


class Sequences:
    """A changing set of sequences that are mostly decoded, as a scheduler would."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.live: list[tuple[SequenceId, SamplingSpec, int, tuple[int, ...]]] = []
        self.next_id = 0

    def plan(self, step: int) -> StepPlan:
        chooser = self.random
        if not self.live or chooser.random() < 0.1:
            spec = chooser.choice(SPECS)
            self.live.append((SequenceId(f"r{self.next_id}", 0), spec, 0, ()))
            self.next_id += 1
        if len(self.live) > 1 and chooser.random() < 0.1:
            self.live.pop(chooser.randrange(len(self.live)))
        return StepPlan(step, tuple(self._advance(index) for index in range(len(self.live))))

    def _advance(self, index: int) -> Row:
        sequence, spec, start, blocks = self.live[index]
        count = self.random.randint(2, 9) if start == 0 else 1
        tokens = tuple(self.random.randrange(50) for _ in range(count))
        missing = -(-(start + count) // BLOCK_TOKENS) - len(blocks)
        if missing:
            blocks += tuple(self.random.randrange(99) for _ in range(missing))
        elif self.random.random() < 0.1:  # a copy of a shared block takes its place
            blocks = (*blocks[:-1], 99)
        self.live[index] = (sequence, spec, start + count, blocks)
        history = tuple(range(start + count)) if spec.needs_history else ()
        scored = tokens[1:] if start == 0 and index % 2 else ()
        return Row(sequence, tokens, start, blocks, spec, history, scored=scored)


def assert_same(kept: Batch, fresh: Batch) -> None:
    for name in ("tokens", "positions", "row_offsets", "logit_rows"):
        assert np.array_equal(getattr(kept.step, name), getattr(fresh.step, name)), name
    width = fresh.step.block_tables.shape[1] - SPARE_BLOCKS
    assert np.array_equal(kept.step.block_tables[:, :width], fresh.step.block_tables[:, :width])
    assert (kept.step.block_tables[:, width:] == -1).all()
    for name in SamplingArrays.__slots__:
        for of in ("first", "layout"):
            arrays = [getattr(one, of) for one in (kept, fresh)]
            arrays = [getattr(one, "arrays", one) for one in arrays]
            assert np.array_equal(getattr(arrays[0], name), getattr(arrays[1], name)), (of, name)
    assert np.array_equal(kept.layout.sampled, fresh.layout.sampled)
    assert np.array_equal(kept.layout.scored, fresh.layout.scored)
    assert kept.is_whole == fresh.is_whole


@pytest.mark.parametrize("max_logit_rows", [2, 64])
@pytest.mark.parametrize("seed", range(8))
def test_kept_arrays_are_what_fresh_ones_would_be(seed: int, max_logit_rows: int) -> None:
    sequences, builder = Sequences(seed), BatchBuilder(max_logit_rows)
    for step in range(150):
        plan = sequences.plan(step)
        assert_same(builder.build(plan), BatchBuilder(max_logit_rows).build(plan))


def test_a_decode_that_goes_on_makes_no_new_arrays() -> None:
    builder, sequence, spec, blocks = BatchBuilder(64), SequenceId("r", 0), SamplingSpec(), (1, 2)
    plans = [StepPlan(at, (Row(sequence, (at,), at, blocks, spec),)) for at in range(16, 20)]
    batches = [builder.build(plan) for plan in plans]
    assert all(batch is batches[0] for batch in batches)
    assert batches[0].step.positions.tolist() == [19]


def test_one_native_call_gives_what_its_parts_give() -> None:
    spec = TINY_SPECS["llama"]
    tensors = make_tensors(spec, Format.Q4_0)
    rows = tuple(
        Row(
            SequenceId(f"r{index}", 0),
            tuple((7 * index + at) % spec.vocab_size for at in range(1 + 5 * index)),
            0,
            tuple(range(4 * index, 4 * index + 2)),
            sampling,
            history=(1, 2, 3) if sampling.needs_history else (),
        )
        for index, sampling in enumerate(SPECS)
    )
    batch = BatchBuilder(64).build(StepPlan(0, rows))
    whole = CpuRunner(spec, tensors, SIZES)
    drawn = whole.run_step(batch.step, batch.first)
    parts = CpuRunner(spec, tensors, SIZES)
    parts.run_layers(batch.step)
    logits = parts.get_logits(batch.step.logit_rows)
    expected = parts.get_draws().sample(logits, batch.first)
    for name in ("tokens", "logprobs", "top_tokens", "top_logprobs"):
        assert np.array_equal(
            getattr(drawn, name), getattr(expected, name), equal_nan=name != "tokens"
        )
    assert np.array_equal(whole.view_kv(), parts.view_kv())


def test_a_step_that_draws_nothing_computes_its_layers() -> None:
    spec = TINY_SPECS["llama"]
    runner = CpuRunner(spec, make_tensors(spec, Format.Q4_0), SIZES)
    before = runner.view_kv().copy()
    batch = BatchBuilder(64).build(StepPlan(0, (Row(SequenceId("r", 0), (1, 2), 0, (0,), None),)))
    assert runner.run_step(batch.step, batch.first).tokens.size == 0
    assert not np.array_equal(runner.view_kv(), before)
