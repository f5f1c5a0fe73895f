"""The GPU executor over a fake device: every plan is answered once, whatever the device does."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from twostroke.core.ports import StepAnswer
from twostroke.core.types import (
    PENDING,
    BlockCopy,
    BlockSwap,
    Row,
    SamplingSpec,
    SequenceId,
    StepOutcome,
    StepPlan,
)
from twostroke.errors import ExecutorLost
from twostroke.exec.cuda import CudaExecutor, CudaFacts
from twostroke.exec.cuda_device import HostDevice
from twostroke.exec.cuda_draw import DrawTicket
from twostroke.exec.cuda_runner import RunnerLimits
from twostroke.kernels.cuda.pool import KvPool, PoolShape
from twostroke.kernels.ops import I32, SamplingArrays, StepArrays
from twostroke.spec.kv import KvElement

WAIT_S = 20
BLOCKS = 6


class HeldEvent:
    """An event that passes when its device says so, or fails as a device does."""

    def __init__(self, device: HeldDevice) -> None:
        self._device = device

    def wait(self) -> None:
        assert self._device.gate.wait(WAIT_S), "nobody opened the gate"
        if self._device.error:
            raise RuntimeError(self._device.error)

    def has_passed(self) -> bool:
        return self._device.gate.is_set()

    def get_ns_since(self, earlier: object) -> int:
        return 1


class HeldDevice(HostDevice):
    """A device whose work is done when `gate` is set; `waited` counts waits between streams."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.error = ""
        self.waited = 0

    def record(self) -> Any:
        return HeldEvent(self)

    def wait_for(self, event: Any) -> None:
        self.waited += 1


class FakeRunner:
    """Notes what it is given; its logits choose the token after the last one of a row."""

    def __init__(self, device: HostDevice) -> None:
        self.limits = RunnerLimits(8, 4, 4, 256)
        self.pool = KvPool(PoolShape(1, 1, 16, KvElement.F16), BLOCKS, device.name)
        self.drawn = torch.zeros(8, dtype=torch.int32)
        self.sources: list[I32 | None] = []
        self.error: Exception | None = None

    def enqueue(self, arrays: StepArrays, sources: I32 | None = None) -> torch.Tensor:
        if self.error is not None:
            raise self.error
        self.sources.append(None if sources is None else sources.copy())
        return torch.zeros((arrays.logit_rows.size, 4))

    def enqueue_head(self, logit_rows: I32) -> torch.Tensor:
        return torch.zeros((logit_rows.size, 4))


class FakeDraws:
    """Draws token 1 for every row, or one token too few."""

    bytes = 0

    def __init__(self) -> None:
        self.missing = 0

    def draw(
        self, logits: torch.Tensor, arrays: SamplingArrays, tokens: torch.Tensor
    ) -> DrawTicket:
        return DrawTicket(torch.ones(arrays.top.size - self.missing, dtype=torch.int32), arrays.top)

    def score(self, logits: torch.Tensor, targets: I32, top: I32) -> DrawTicket:
        raise AssertionError("nothing is scored here")


class Scene:
    """An executor over the fakes, and the answers it gave."""

    def __init__(self) -> None:
        self.device = HeldDevice()
        self.runner, self.draws = FakeRunner(self.device), FakeDraws()
        facts = CudaFacts("fake", "fake", 0, host_blocks=2)
        fakes: Any = (self.runner, self.draws)
        self.executor = CudaExecutor(*fakes, self.device, facts)
        self.answers: queue.SimpleQueue[StepAnswer] = queue.SimpleQueue()

    def start(self, *plans: StepPlan) -> None:
        for plan in plans:
            self.executor.start(plan, self.answers.put)

    def take(self) -> StepAnswer:
        return self.answers.get(timeout=WAIT_S)


@pytest.fixture
def scene() -> Iterator[Scene]:
    made = Scene()
    yield made
    made.device.gate.set()
    made.executor.close()
    with contextlib.suppress(queue.Empty):
        raise AssertionError(f"answered once more: {made.answers.get_nowait()}")


def make_plan(step: int, token: int = 3, **moves: Any) -> StepPlan:
    """One row that decodes a token at position 5."""
    row = Row(SequenceId("r", 0), (token,), 5 + step, (0,), SamplingSpec())
    return StepPlan(step, (row,), **moves)


def test_steps_are_answered_in_the_order_they_were_queued(scene: Scene) -> None:
    scene.start(make_plan(0), make_plan(1, PENDING))
    assert scene.answers.empty()
    scene.device.gate.set()
    answers = [scene.take(), scene.take()]
    assert [one.step for one in answers if isinstance(one, StepOutcome)] == [0, 1]


def test_a_pending_token_is_taken_from_the_step_before(scene: Scene) -> None:
    scene.device.gate.set()
    scene.start(make_plan(0), make_plan(1, PENDING))
    known, pending = scene.runner.sources
    assert known is None
    assert np.array_equal(pending, [0])
    assert [type(scene.take()) for _ in range(2)] == [StepOutcome, StepOutcome]


def test_a_device_that_fails_loses_all_that_is_queued_and_what_comes_later(scene: Scene) -> None:
    scene.device.error = "an illegal memory access"
    scene.start(make_plan(0), make_plan(1, PENDING))
    scene.device.gate.set()
    lost = [scene.take(), scene.take()]
    scene.start(make_plan(2))
    lost.append(scene.take())
    assert all(isinstance(one, ExecutorLost) for one in lost)
    assert "illegal memory access" in str(lost[0])


def test_a_plan_that_cannot_be_queued_loses_those_before_it(scene: Scene) -> None:
    scene.start(make_plan(0))
    scene.runner.error = torch.OutOfMemoryError("no memory is left")
    scene.start(make_plan(1, PENDING))
    lost = [scene.take(), scene.take()]
    assert all(isinstance(one, ExecutorLost) and "no memory" in str(one) for one in lost)


def test_a_pending_token_that_nobody_drew_loses_the_executor(scene: Scene) -> None:
    scene.start(make_plan(0, PENDING))
    assert isinstance(scene.take(), ExecutorLost)


def test_an_answer_that_cannot_be_built_is_a_loss_and_no_hang(scene: Scene) -> None:
    scene.draws.missing = 1
    scene.device.gate.set()
    scene.start(make_plan(0))
    assert isinstance(scene.take(), ExecutorLost)


def test_closing_answers_what_is_still_queued(scene: Scene) -> None:
    scene.start(make_plan(0), make_plan(1, PENDING))
    closing = threading.Thread(target=scene.executor.close)
    closing.start()
    lost = [scene.take(), scene.take()]
    scene.device.gate.set()
    closing.join(WAIT_S)
    assert not closing.is_alive()
    assert all(isinstance(one, ExecutorLost) and "closed" in str(one) for one in lost)


def test_blocks_move_out_then_in_then_within_the_pool(scene: Scene) -> None:
    memory = scene.runner.pool.memory
    memory[:] = torch.arange(BLOCKS, dtype=torch.uint8)[:, None]
    scene.device.gate.set()
    scene.start(make_plan(0, swaps_out=(BlockSwap(4, 0),)))
    memory[4] = 9
    copies = (BlockCopy(2, 3),)
    scene.start(make_plan(1, swaps_in=(BlockSwap(2, 0),), copies=copies))
    assert [type(scene.take()) for _ in range(2)] == [StepOutcome, StepOutcome]
    assert memory[:, 0].tolist() == [0, 1, 4, 4, 9, 5]


def test_a_step_waits_for_moves_of_its_own_blocks_only(scene: Scene) -> None:
    scene.start(make_plan(0, swaps_out=(BlockSwap(4, 0),)))
    assert scene.device.waited == 0
    scene.start(make_plan(1, swaps_out=(BlockSwap(0, 1),)))
    assert scene.device.waited == 1
    scene.device.gate.set()
    assert [type(scene.take()) for _ in range(2)] == [StepOutcome, StepOutcome]


def test_keys_and_values_come_back_as_they_were_read(scene: Scene) -> None:
    memory = scene.runner.pool.memory
    memory[:] = torch.randint(0, 256, memory.shape, dtype=torch.uint8)
    kept = memory.clone()
    handle = scene.executor.read_kv((3, 1))
    memory[[0, 2]] = 0
    scene.executor.write_kv(handle, (0, 2))
    assert torch.equal(memory[[0, 2]], kept[[3, 1]])
