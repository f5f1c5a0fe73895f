"""Our engine as the benchmark drives it: one place that knows how a CUDA engine is put together.

Every section asks for launches of single steps (`prepare`) or for the executor itself, with real
StepPlans: real block tables over scattered blocks, greedy draws on the device. The KV pool is
filled with random numbers once, because attention over zeros may run faster than over data.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from twostroke.bench.gpu.synthetic import SyntheticWeights
from twostroke.bench.gpu.timing import Launch
from twostroke.bench.gpu.workloads import BLOCK_TOKENS, MAX_STEP_TOKENS, SEED, GpuModel
from twostroke.core.types import Row, SamplingSpec, SequenceId, StepPlan
from twostroke.exec.batch import BatchBuilder
from twostroke.exec.cuda import CudaExecutor, CudaFacts
from twostroke.exec.cuda_device import Device, GpuDevice, HostDevice
from twostroke.exec.cuda_draw import DeviceDraws
from twostroke.exec.cuda_runner import CudaRunner, DeviceModel, RunnerLimits
from twostroke.kernels.cuda.pool import KvPool, PoolShape
from twostroke.spec.kv import KvElement


@dataclass(frozen=True, slots=True)
class EngineSizes:
    """What an engine is made for.

    rungs, token_rungs: rows of decodes, and tokens of steps with prompts, that are captured as
    graphs.
    """

    num_blocks: int
    max_rows: int
    context_tokens: int
    rungs: tuple[int, ...] = ()
    token_rungs: tuple[int, ...] = ()
    max_step_tokens: int = MAX_STEP_TOKENS
    exact: bool = False


class GpuEngine:
    """An engine that is ready: its executor for whole runs, and single steps to launch."""

    def __init__(
        self, model: GpuModel, source: SyntheticWeights, device: torch.device, sizes: EngineSizes
    ) -> None:
        spec = model.get_spec()
        self._device: Device = (
            GpuDevice(device.index or 0) if device.type == "cuda" else HostDevice()
        )
        name = self._device.name
        element = KvElement.BF16 if source.dtype is torch.bfloat16 else KvElement.F16
        shape = PoolShape(spec.num_layers, spec.num_kv_heads, spec.head_dim, element)
        with self._device.use():
            pool = KvPool(shape, sizes.num_blocks, name)
            # The pool is all of one type but for scales, which 16-bit elements have none of.
            self.kv_memory = pool.memory.view(-1).view(source.dtype)
            fill_with_noise(self.kv_memory)
            limits = RunnerLimits(
                sizes.max_step_tokens,
                sizes.max_rows,
                sizes.max_rows,
                sizes.context_tokens,
                sizes.rungs,
                sizes.token_rungs,
            )
            shown = DeviceModel(spec, source.weights, source.dtype, sizes.exact)
            self._runner = CudaRunner(shown, pool, limits, self._device)
            self._draws = DeviceDraws(self._device, sizes.max_rows, spec.vocab_size)
            self._runner.capture()
        facts = CudaFacts(name, "cuda", source.matrix_bytes)
        self.executor = CudaExecutor(self._runner, self._draws, self._device, facts)
        self._max_rows = sizes.max_rows

    def use(self) -> contextlib.AbstractContextManager[None]:
        """Within it, work and events go to the stream that the engine's steps run on."""
        return self._device.use()

    def prepare(self, plan: StepPlan) -> Launch:
        """All device work of one step, upload and draws included, to launch again and again.

        Launched within `use`; gives logits (rows, vocab) float32, which the next step overwrites.
        """
        # A builder of its own: another's next step would write into this one's arrays.
        batch = BatchBuilder(self._max_rows).build(plan)
        drawn = batch.step.logit_rows.size

        def launch() -> torch.Tensor:
            logits = self._runner.enqueue(batch.step)
            self._draws.draw(logits, batch.first, self._runner.drawn[:drawn])
            return logits

        return launch

    def close(self) -> None:
        """End the executor and its thread."""
        self.executor.close()


def make_plan(
    rows: Sequence[tuple[int, int]], num_blocks: int, vocab_size: int, step: int = 0
) -> StepPlan:
    """A step of (new tokens, context before) rows, each drawing one token greedily.

    Blocks are scattered over the pool as after much use, the same ones every time.
    """
    draw = random.Random(SEED)
    free = list(range(num_blocks))
    draw.shuffle(free)
    made = []
    for index, (new_tokens, before) in enumerate(rows):
        count = -(-(before + new_tokens) // BLOCK_TOKENS)
        assert count <= len(free), "the pool is smaller than the step"
        blocks, free = tuple(free[:count]), free[count:]
        tokens = tuple(draw.randrange(vocab_size) for _ in range(new_tokens))
        made.append(Row(SequenceId(f"row-{index}", 0), tokens, before, blocks, SamplingSpec()))
    return StepPlan(step, tuple(made))


def fill_with_noise(memory: torch.Tensor) -> None:
    """Put random numbers of the size of real keys and values into a KV pool."""
    generator = torch.Generator(device=memory.device)
    generator.manual_seed(SEED)
    memory.normal_(0.0, 1.0, generator=generator)
