"""Laws of opening a GPU: the pool is the one planned, and what does not fit is never read."""

from __future__ import annotations

import queue
from dataclasses import replace

import pytest

from tiny_models import TINY_SPECS, make_tensors
from twostroke.core.ports import StepAnswer
from twostroke.core.types import BlockSwap, Row, SamplingSpec, SequenceId, StepOutcome, StepPlan
from twostroke.errors import DeviceError, ExecutorLost, UnsupportedModel
from twostroke.exec import cuda_open
from twostroke.exec.cuda_device import HostDevice
from twostroke.exec.cuda_memory import BLOCK_TOKENS, CudaOptions
from twostroke.exec.cuda_open import open_executor
from twostroke.spec.kv import KvElement
from twostroke.spec.quant import Format

SPEC = TINY_SPECS["llama"]
OPTIONS = CudaOptions("cpu", KvElement.F16, 64, 4, SPEC.context_tokens)
ROW = Row(SequenceId("r", 0), (3, 4, 5), 0, (0,), SamplingSpec())


@pytest.mark.parametrize("element", [KvElement.F16, KvElement.INT8])
def test_the_pool_is_the_one_that_was_planned(element: KvElement, device: str) -> None:
    options = replace(OPTIONS, device=device, kv_element=element)
    heard: list[int] = []
    tensors = make_tensors(SPEC, Format.F16)
    opened = open_executor(SPEC, tensors, options, lambda done, total: heard.append(done))
    info = opened.executor.describe()
    opened.executor.close()
    assert (info.num_blocks, info.kv_bytes) == (opened.plan.num_blocks, opened.plan.kv_bytes)
    assert (info.block_tokens, info.max_step_tokens) == (BLOCK_TOKENS, 64)
    tokens = info.num_blocks * BLOCK_TOKENS
    assert info.kv_bytes == tokens * SPEC.get_kv_bytes_per_token(element)
    assert info.num_blocks == -(
        -4 * SPEC.context_tokens // BLOCK_TOKENS
    )  # every row at its longest
    assert heard


def test_host_memory_holds_the_blocks_that_fit_it(device: str) -> None:
    tensors = make_tensors(SPEC, Format.F16)
    block_bytes = BLOCK_TOKENS * SPEC.get_kv_bytes_per_token(OPTIONS.kv_element)
    options = replace(OPTIONS, device=device, host_bytes=3 * block_bytes - 1)
    executor = open_executor(SPEC, tensors, options).executor
    answers: queue.SimpleQueue[StepAnswer] = queue.SimpleQueue()
    executor.start(StepPlan(0, (ROW,)), answers.put)
    assert isinstance(answers.get(), StepOutcome)
    kept = executor.read_kv((0,))
    moves = (BlockSwap(0, 1),), (BlockSwap(1, 1),)
    executor.start(StepPlan(1, (replace(ROW, blocks=(2,)),), (), *moves), answers.put)
    assert isinstance(answers.get(), StepOutcome)
    assert executor.read_kv((1,)) == kept
    executor.start(StepPlan(2, (ROW,), (), (BlockSwap(0, 2),)), answers.put)
    assert isinstance(answers.get(), ExecutorLost)
    executor.close()


def test_what_does_not_fit_is_refused_before_a_weight_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda_open, "open_device", lambda name: HostDevice(2**28))

    def read(*unused: object) -> None:
        raise AssertionError

    with pytest.raises(DeviceError, match=r"MiB are missing"):
        open_executor(SPEC, make_tensors(SPEC, Format.F16), OPTIONS, read)


def test_a_head_size_without_kernels_is_refused_with_the_way_out() -> None:
    for size in (8, 24, 512):
        with pytest.raises(UnsupportedModel, match="--device cpu"):
            open_executor(replace(SPEC, head_dim=size), {}, OPTIONS)
