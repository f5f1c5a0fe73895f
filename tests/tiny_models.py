"""Tiny random models of every shape the forward pass knows, and a driver to run them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from twostroke.core.ports import StepAnswer
from twostroke.core.scheduler import Scheduler
from twostroke.core.types import (
    Accepted,
    Idle,
    Preempted,
    Request,
    SchedulerConfig,
    SequenceEnded,
    SequenceId,
    StepOutcome,
    TokenLogprob,
    TokensEmitted,
)
from twostroke.exec.local import LocalExecutor, Runner, RunnerSizes
from twostroke.spec.model import (
    LayerSpec,
    LinearScaling,
    Llama3Scaling,
    ModelSpec,
    RopeLayout,
    RopeSpec,
)
from twostroke.spec.quant import Format
from twostroke.weights.tensor import HostTensor
from weight_bytes import random_matrix_bytes

VOCAB = 211

_LLAMA = ModelSpec(
    family="llama",
    name="tiny-llama",
    width=96,
    ffn_width=160,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=VOCAB,
    context_tokens=640,
    norm_eps=1e-5,
    attention_scale=0.25,
    rope_layout=RopeLayout.INTERLEAVED,
    layers=(LayerSpec(RopeSpec(10000.0, Llama3Scaling(8.0, 1.0, 4.0, 128))),) * 2,
    tied_embeddings=False,
)
TINY_SPECS = {
    "llama": _LLAMA,
    "qwen2": replace(
        _LLAMA, family="qwen2", name="tiny-qwen2", qkv_bias=True, rope_layout=RopeLayout.HALF
    ),
    "qwen3": replace(
        _LLAMA, family="qwen3", name="tiny-qwen3", qk_norm=True, rope_layout=RopeLayout.HALF
    ),
    "gemma3": replace(
        _LLAMA,
        family="gemma3",
        name="tiny-gemma3",
        qk_norm=True,
        post_norms=True,
        activation="gelu_tanh",
        embed_scale=96**0.5,
        tied_embeddings=True,
        rope_layout=RopeLayout.HALF,
        layers=(
            LayerSpec(RopeSpec(10000.0), window=40),
            LayerSpec(RopeSpec(1e6, LinearScaling(8.0))),
        ),
    ),
}


def make_tensors(spec: ModelSpec, format: Format, seed: int = 0) -> dict[str, HostTensor]:
    """Random weights of ordinary size: norms near 1, matrices that keep activations near 1."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for tensor in spec.tensors():
        stored = replace(tensor, format=format if len(tensor.shape) == 2 else Format.F32)
        if len(tensor.shape) == 2 and format.is_quantised:
            data = random_matrix_bytes(format, (tensor.shape[0], tensor.shape[1]), rng)
        else:
            spread = tensor.shape[-1] ** -0.5 if len(tensor.shape) == 2 else 0.1
            values = rng.standard_normal(tensor.shape).astype(np.float32) * np.float32(spread)
            if len(tensor.shape) == 1 and "bias" not in tensor.name:
                values += 1
            stored = replace(stored, format=Format.F32)
            data = values.view(np.uint8).reshape(-1)
        data.flags.writeable = False
        tensors[tensor.name] = HostTensor(stored, data)
    return tensors


@dataclass(slots=True)
class Answer:
    """What one sequence produced."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_scored: tuple[TokenLogprob, ...] = ()
    ending: object = None


@dataclass(slots=True)
class Run:
    """All answers by sequence, and what happened on the way."""

    answers: dict[SequenceId, Answer] = field(default_factory=dict)
    preemptions: int = 0
    steps: int = 0
    largest_step: int = 0


def run_requests(
    runner: Runner, sizes: RunnerSizes, requests: Sequence[Request], config: SchedulerConfig
) -> Run:
    """Runs requests to their ends with the real scheduler over this runner."""
    scheduler = Scheduler(config)
    executor = LocalExecutor(runner, sizes)
    run = Run()
    try:
        for request in requests:
            answer = scheduler.submit(request, 0)
            assert isinstance(answer, Accepted), answer
        while not isinstance(plan := scheduler.plan(run.steps), Idle):
            answers: list[StepAnswer] = []
            executor.start(plan, answers.append)
            executor.run_pending()
            outcome = answers[0]
            assert isinstance(outcome, StepOutcome), outcome
            run.steps += 1
            run.largest_step = max(run.largest_step, plan.num_tokens)
            note(run, scheduler.commit(outcome, run.steps))
        assert plan.waiting == 0
        assert plan.in_flight == 0
    finally:
        executor.close()
    return run


def note(run: Run, updates: Iterable[object]) -> None:
    """Adds what a commit reported to a run."""
    for update in updates:
        if isinstance(update, Preempted):
            run.preemptions += 1
        elif isinstance(update, TokensEmitted):
            answer = run.answers.setdefault(update.sequence, Answer())
            answer.tokens += update.tokens
            answer.logprobs += update.logprobs
            answer.prompt_scored += update.prompt_scored
        elif isinstance(update, SequenceEnded):
            run.answers.setdefault(update.sequence, Answer()).ending = update.ending


def make_config(
    spec: ModelSpec, sizes: RunnerSizes, step_tokens: int | None = None
) -> SchedulerConfig:
    """A scheduler configuration for this model and runner."""
    return SchedulerConfig(
        num_blocks=sizes.num_blocks,
        block_tokens=sizes.block_tokens,
        step_tokens=step_tokens or sizes.max_step_tokens,
        max_rows=64,
        context_tokens=spec.context_tokens,
        vocab_size=spec.vocab_size,
    )
