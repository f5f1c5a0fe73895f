"""Opens an executor on a GPU: device, memory, weights, buffers and graphs, in this order.

Owns that order. What cannot fit is refused before a weight is read; the KV pool takes what is
really free once they are loaded, less what buffers and graphs will need. When this returns
everything is allocated.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from twostroke.exec.cuda import CudaExecutor, CudaFacts
from twostroke.exec.cuda_device import Device, GpuDevice, HostDevice
from twostroke.exec.cuda_draw import DeviceDraws
from twostroke.exec.cuda_formats import check_kernels
from twostroke.exec.cuda_ladder import make_rungs, make_token_rungs
from twostroke.exec.cuda_memory import (
    CudaOptions,
    MemoryPlan,
    get_needs,
    get_savings,
    plan_memory,
)
from twostroke.exec.cuda_runner import CudaRunner, DeviceModel, RunnerLimits
from twostroke.exec.cuda_weights import (
    LoadTarget,
    OnLoaded,
    choose_dtype,
    count_weight_bytes,
    load_weights,
)
from twostroke.exec.rank_draws import NoDraws
from twostroke.kernels.cuda.pool import KvPool, PoolShape
from twostroke.kernels.cuda.types import BLOCK_TOKENS
from twostroke.spec.model import ModelSpec
from twostroke.weights.tensor import HostTensor

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class OpenedExecutor:
    """An executor that is ready, and the plan of its KV pool."""

    executor: CudaExecutor
    plan: MemoryPlan


def open_device(name: str) -> Device:
    """The device of this name; "cpu" stands in for a GPU. Raises DeviceError."""
    return HostDevice() if name == "cpu" else GpuDevice(torch.device(name).index or 0)


def open_executor(
    spec: ModelSpec,
    tensors: Mapping[str, HostTensor],
    options: CudaOptions,
    progress: OnLoaded = lambda done, total: None,
) -> OpenedExecutor:
    """Load a whole model onto one device and get everything ready for its first step.

    Raises: DeviceError for a device that cannot be used or that has too little memory,
    UnsupportedModel for a model that has no kernels here.
    """
    check_kernels(spec)
    device = open_device(options.device)
    needs, savings = get_needs(spec, options), get_savings(spec, options)
    plan_memory(*device.get_free(), needs, savings)
    dtype = choose_dtype(spec)
    with device.use():
        target = LoadTarget(device.name, dtype, quantise=options.quantise)
        weights = load_weights(spec, tensors, target, progress)
        device.synchronize()
    plan = plan_memory(*device.get_free(), replace(needs, weights=0), savings)
    model = DeviceModel(spec, weights, dtype, options.exact)
    return OpenedExecutor(assemble(model, options, device, plan.num_blocks), plan)


def assemble(
    model: DeviceModel, options: CudaOptions, device: Device, num_blocks: int
) -> CudaExecutor:
    """The executor over weights that are on the device, with a KV pool of so many blocks."""
    spec = model.spec
    shape = PoolShape(spec.num_layers, spec.num_kv_heads, spec.head_dim, options.kv_element)
    rows = min(options.max_rows, options.step_tokens)
    limits = RunnerLimits(
        tokens=options.step_tokens,
        rows=rows,
        logit_rows=rows,
        # A sequence that outgrows the pool is refused when it is submitted.
        context_tokens=min(options.context_tokens, num_blocks * BLOCK_TOKENS),
        rungs=make_rungs(rows),
        token_rungs=make_token_rungs(options.step_tokens),
    )
    with device.use():
        pool = KvPool(shape, num_blocks, device.name)
        runner = CudaRunner(model, pool, limits, device)
        draws: DeviceDraws | NoDraws = NoDraws()
        if model.place.is_sampling:
            draws = DeviceDraws(device, rows, spec.vocab_size)
        runner.capture()
        device.synchronize()
    free, total = device.get_free()
    _log.info("%s: %d of %d bytes are free", device.name, free, total)
    facts = CudaFacts(
        device=device.name,
        backend=_name(device),
        weight_bytes=count_weight_bytes(model.weights),
        host_blocks=options.host_bytes // shape.block_bytes,
    )
    return CudaExecutor(runner, draws, device, facts)


def _name(device: Device) -> str:
    """The backend as it is shown."""
    if device.name == "cpu":
        return "cuda (interpreted)"
    return f"cuda ({torch.cuda.get_device_name(device.name)})"
