"""A model on several GPUs: what each rank's process opens, and how the group is started.

Owns what a rank does differently from a GPU of its own: it loads its share, agrees with the others
on the KV pool's size, and passes drawn tokens on where the next step needs them before the host
has heard of them. The group's side needs no PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from twostroke.core.ports import ExecutorInfo, OnDone
from twostroke.core.types import PENDING, BlockId, StepPlan
from twostroke.errors import DeviceError
from twostroke.exec.cuda_formats import check_kernels
from twostroke.exec.cuda_memory import CudaOptions, MemoryPlan, get_needs, plan_memory
from twostroke.exec.rank_wire import RankContext
from twostroke.exec.ranks import RankGroup, RankSetup
from twostroke.spec.model import ModelSpec
from twostroke.spec.ranks import RankLayout, cut_stage
from twostroke.spec.shard import shard_spec
from twostroke.weights.tensor import HostTensor

if TYPE_CHECKING:
    from twostroke.exec.cuda import CudaExecutor
    from twostroke.exec.cuda_device import Device
    from twostroke.kernels.cuda.collectives import Collectives


@dataclass(frozen=True, slots=True)
class CudaRankJob:
    """What every rank opens: the model, and on its own device of `devices` what options say."""

    path: Path
    options: CudaOptions
    devices: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class OpenedRanks:
    """A group that is ready, and the plan of its KV pool."""

    executor: RankGroup
    plan: MemoryPlan


def open_cuda_ranks(
    spec: ModelSpec, path: Path, options: CudaOptions, layout: RankLayout, devices: Sequence[str]
) -> OpenedRanks:
    """The model at `path` on several GPUs, one a rank, ready for its first step.

    spec: of the model. options: their device counts for nothing, and their kv_bytes is of all ranks
    together. devices: as PyTorch names them, in the order of the ranks.
    Raises: DeviceError where the model cannot be divided so, or naming the rank that cannot have
    its device or memory; UnsupportedModel for a model that has no kernels here; ModelError where a
    rank cannot read the model.
    """
    check_kernels(spec)
    if len(devices) != layout.world:
        raise DeviceError(
            f"{layout.tensor} x {layout.stages} ranks need {layout.world} devices, "
            f"and there are {len(devices)}"
        )
    for shard in range(layout.tensor):
        shard_spec(spec, shard, layout.tensor)
    asked = options.kv_bytes
    share = replace(
        options,
        world=layout.tensor,
        kv_bytes=None if asked is None else asked // layout.world,
    )
    job = CudaRankJob(path, share, tuple(devices))
    group = RankGroup(RankSetup(make_cuda_rank, job, layout))
    info = group.describe()
    reason = f"what every one of {layout.world} devices has room for"
    if asked is not None:
        reason = f"as asked, over {layout.world} devices"
    return OpenedRanks(group, MemoryPlan(info.num_blocks, info.kv_bytes, reason))


def make_cuda_rank(context: RankContext, job: object) -> RankExecutor:
    """The factory of a rank: its executor over its share of the job's model."""
    import torch

    from twostroke.exec.cuda_open import open_device
    from twostroke.kernels.cuda.collectives import connect
    from twostroke.weights.load import open_model

    assert isinstance(job, CudaRankJob)
    place, options = context.place, job.options
    device = open_device(job.devices[place.rank])  # refuses one that is not there, by name
    where = torch.device(device.name)
    ranks = connect(place, where, context.store, context.timeout_s, options.exact)
    with open_model(job.path) as model:
        return open_share(model.spec, model.tensors, options, device, ranks)


def open_share(
    spec: ModelSpec,
    tensors: Mapping[str, HostTensor],
    options: CudaOptions,
    device: Device,
    ranks: Collectives,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> RankExecutor:
    """Load a rank's share of the whole model `spec` onto its device; all ranks do so at once.

    Raises: DeviceError where the model cannot be divided so or the device has too little memory.
    """
    import torch

    from twostroke.exec.cuda_open import assemble
    from twostroke.exec.cuda_runner import DeviceModel
    from twostroke.exec.cuda_weights import LoadTarget, choose_dtype, load_weights

    place = ranks.place
    stage = cut_stage(spec, place)
    share = shard_spec(stage.spec, place.shard, place.layout.tensor).spec
    needs = get_needs(share, options)
    plan_memory(*device.get_free(), needs)
    # Of the whole model: every stage must hand on what the next one takes.
    dtype = choose_dtype(spec)
    with device.use():
        target = LoadTarget(
            device.name, dtype, place.shard, place.layout.tensor, stage.layers, options.quantise
        )
        weights = load_weights(spec, tensors, target, progress)
        device.synchronize()
    plan = plan_memory(*device.get_free(), replace(needs, weights=0))
    blocks = ranks.get_least(plan.num_blocks, torch.device(device.name))
    model = DeviceModel(share, weights, dtype, options.exact, place, ranks)
    return RankExecutor(assemble(model, options, device, blocks), device, ranks)


class RankExecutor:
    """A rank's executor: one device's, which exchanges with those of the other ranks.

    A step with pending tokens begins with passing on what the step before drew. It is not done
    behind every step: the first stage would then wait for the last before it could begin another.
    """

    def __init__(self, executor: CudaExecutor, device: Device, ranks: Collectives) -> None:
        self._executor, self._device, self._ranks = executor, device, ranks

    def describe(self) -> ExecutorInfo:
        """What this rank's device offers."""
        return self._executor.describe()

    def start(self, plan: StepPlan, on_done: OnDone) -> None:
        """See CudaExecutor; only the rank that draws answers with results that mean anything."""
        if any(row.tokens[0] == PENDING for row in plan.rows):
            with self._device.use():
                self._ranks.share_tokens(self._executor.runner.drawn)
        self._executor.start(plan, on_done)

    def read_kv(self, blocks: Sequence[BlockId]) -> bytes:
        """The bytes of this rank's part of these blocks; no step may be running."""
        return self._executor.read_kv(blocks)

    def write_kv(self, handle: bytes, blocks: Sequence[BlockId]) -> None:
        """Puts bytes from `read_kv` into `blocks`; no step may be running."""
        self._executor.write_kv(handle, blocks)

    def close(self) -> None:
        """Ends it, and its part in the exchanges."""
        self._executor.close()
        self._ranks.close()
