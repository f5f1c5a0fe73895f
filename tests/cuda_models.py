"""Tiny models on the GPU's executor, on a CPU or a GPU, driven with two steps queued."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tiny_models import Run, note
from twostroke.core.ports import StepAnswer
from twostroke.core.scheduler import Scheduler
from twostroke.core.types import Accepted, Idle, Request, SchedulerConfig, StepOutcome
from twostroke.exec.cuda import CudaExecutor, CudaFacts
from twostroke.exec.cuda_device import Device, GpuDevice, HostDevice
from twostroke.exec.cuda_draw import DeviceDraws
from twostroke.exec.cuda_runner import CudaRunner, DeviceModel, RunnerLimits
from twostroke.exec.cuda_weights import LoadTarget, load_weights
from twostroke.kernels.cuda.pool import KvPool, PoolShape
from twostroke.kernels.cuda.types import BLOCK_TOKENS
from twostroke.spec.kv import KvElement
from twostroke.spec.model import ModelSpec

WAIT_S = 120


@dataclass(frozen=True, slots=True)
class Setup:
    """How a tiny model is run. in_flight: steps queued at once."""

    num_blocks: int = 64
    step_tokens: int = 256
    max_rows: int = 16
    rungs: tuple[int, ...] = (1, 2, 4, 8, 16)
    token_rungs: tuple[int, ...] = (32, 64)
    dtype: torch.dtype = torch.float16
    element: KvElement = KvElement.F16
    exact: bool = False
    host_blocks: int = 0
    in_flight: int = 2
    capture: bool = True


def make_device(name: str) -> Device:
    """The device of the tests' `device` fixture."""
    return GpuDevice() if name == "cuda" else HostDevice()


def make_executor(spec: ModelSpec, tensors: dict, setup: Setup, device: Device) -> CudaExecutor:
    """An executor over these tensors."""
    with device.use():
        weights = load_weights(spec, tensors, LoadTarget(device.name, setup.dtype))
        shape = PoolShape(spec.num_layers, spec.num_kv_heads, spec.head_dim, setup.element)
        pool = KvPool(shape, setup.num_blocks, device.name)
        limits = RunnerLimits(
            setup.step_tokens,
            setup.max_rows,
            setup.max_rows,
            min(spec.context_tokens, setup.num_blocks * BLOCK_TOKENS),
            setup.rungs,
            setup.token_rungs,
        )
        model = DeviceModel(spec, weights, setup.dtype, setup.exact)
        runner = CudaRunner(model, pool, limits, device)
        if setup.capture:
            runner.capture()
        draws = DeviceDraws(device, limits.logit_rows, spec.vocab_size)
    facts = CudaFacts(device.name, "cuda", 0, setup.host_blocks)
    return CudaExecutor(runner, draws, device, facts)


def make_cuda_config(spec: ModelSpec, setup: Setup) -> SchedulerConfig:
    """A scheduler's configuration for this setup."""
    return SchedulerConfig(
        num_blocks=setup.num_blocks,
        block_tokens=BLOCK_TOKENS,
        step_tokens=setup.step_tokens,
        max_rows=setup.max_rows,
        context_tokens=min(spec.context_tokens, setup.num_blocks * BLOCK_TOKENS),
        vocab_size=spec.vocab_size,
        host_blocks=setup.host_blocks,
        plans_ahead=setup.in_flight > 1,
    )


def run_cuda(
    executor: CudaExecutor, requests: Sequence[Request], config: SchedulerConfig, in_flight: int = 2
) -> Run:
    """Runs requests to their ends with the real scheduler, so many steps queued at once."""
    scheduler, run = Scheduler(config), Run()
    answers: queue.SimpleQueue[StepAnswer] = queue.SimpleQueue()
    for request in requests:
        answer = scheduler.submit(request, 0)
        assert isinstance(answer, Accepted), answer
    waiting = 0
    while True:
        while waiting < in_flight:
            plan = scheduler.plan(run.steps)
            if isinstance(plan, Idle):
                break
            executor.start(plan, answers.put)
            waiting += 1
            run.steps += 1
            run.largest_step = max(run.largest_step, plan.num_tokens)
        if not waiting:
            return run
        outcome = answers.get(timeout=WAIT_S)
        assert isinstance(outcome, StepOutcome), outcome
        waiting -= 1
        note(run, scheduler.commit(outcome, run.steps))
