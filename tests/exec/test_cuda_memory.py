"""Laws of dividing a GPU's memory; no GPU and no PyTorch needed but to compare with the kernels."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from tiny_models import TINY_SPECS, make_tensors
from twostroke.errors import DeviceError, UnsupportedModel
from twostroke.exec.cuda_formats import (
    DENSE,
    DeviceFormat,
    choose_activations,
    get_device_bytes,
    get_device_format,
    join_formats,
)
from twostroke.exec.cuda_memory import (
    BLOCK_TOKENS,
    CudaOptions,
    MemoryNeeds,
    Saving,
    get_needs,
    get_reserve,
    get_savings,
    plan_memory,
)
from twostroke.exec.rank_cuda import open_cuda_ranks
from twostroke.spec.catalog import get_known_model
from twostroke.spec.kv import KvElement
from twostroke.spec.model import ModelSpec
from twostroke.spec.quant import Format
from twostroke.spec.ranks import RankLayout

GIB = 2**30
TOTAL = 80 * GIB
OPTIONS = CudaOptions("cuda:0", KvElement.F16, 2048, 256, 4096)
NEEDS = MemoryNeeds(
    weights=14 * GIB,
    buffers=GIB,
    graphs=GIB // 8,
    block_bytes=32 * 2**20,
    least_tokens=2048,
    most_tokens=256 * 4096,
    beside_block=2**12,
)


def fill_formats(spec: ModelSpec, format: Format) -> ModelSpec:
    """The spec with every matrix stored in one format."""
    matrices = [each.name for each in spec.tensors() if len(each.shape) == 2]
    return replace(spec, formats=tuple((name, format) for name in matrices))


def test_the_parts_and_the_pool_never_exceed_what_is_free() -> None:
    for free in range(18 * GIB, TOTAL, 3 * GIB + 12_345):
        plan = plan_memory(free, TOTAL, NEEDS)
        used = NEEDS.weights + NEEDS.buffers + NEEDS.graphs + plan.kv_bytes
        used += plan.num_blocks * NEEDS.beside_block + get_reserve(TOTAL)
        assert used <= free
        assert used + NEEDS.block_bytes + NEEDS.beside_block > free
        assert plan.kv_bytes == plan.num_blocks * NEEDS.block_bytes


def test_a_pool_is_no_larger_than_it_can_be_used() -> None:
    few = replace(NEEDS, most_tokens=5000)
    plan = plan_memory(TOTAL, TOTAL, few)
    assert plan.num_blocks == -(-5000 // BLOCK_TOKENS)
    assert "longest" in plan.reason


def test_the_reason_names_every_part_that_was_taken() -> None:
    reason = plan_memory(70 * GIB, TOTAL, replace(NEEDS, weights=0)).reason
    assert "weights" not in reason
    for part in ("free", "buffers", "graphs", "kept free"):
        assert part in reason


def test_the_pool_asked_for_is_what_there_will_be_or_is_refused() -> None:
    plan = plan_memory(TOTAL, TOTAL, replace(NEEDS, asked=10 * GIB + 5))
    assert plan.kv_bytes == 10 * GIB
    with pytest.raises(DeviceError, match="KV pool asked for"):
        plan_memory(TOTAL, TOTAL, replace(NEEDS, asked=70 * GIB))


@pytest.mark.parametrize("free", [0, GIB, 15 * GIB + 77, 16 * GIB + 99_999])
def test_the_numbers_of_a_shortage_add_up(free: int) -> None:
    with pytest.raises(DeviceError) as caught:
        plan_memory(free, TOTAL, NEEDS)
    first = str(caught.value).splitlines()[0]
    numbers = [int(each.replace(",", "")) for each in re.findall(r"([\d,]+) MiB", first)]
    *parts, needed, room, total, missing = numbers
    assert len(parts) == 5
    assert sum(parts) == needed
    assert needed - room == missing > 0
    assert (room, total) == (free // 2**20, TOTAL // 2**20)


def test_what_helps_enough_comes_first_and_says_so() -> None:
    savings = [Saving("little", 2**20), Saving("none", 0), Saving("much", 90 * GIB)]
    savings.append(Saving("enough", 30 * GIB))
    with pytest.raises(DeviceError) as caught:
        plan_memory(GIB, TOTAL, NEEDS, savings)
    lines = str(caught.value).splitlines()[1:]
    assert [line.split()[0] for line in lines] == ["enough", "much", "little"]
    assert lines[1].endswith(": enough")
    assert lines[2].endswith("not enough alone")


def test_a_saving_that_is_called_enough_is_enough() -> None:
    spec = get_known_model("llama-2-13b")
    for total in (12 * GIB, 16 * GIB, 24 * GIB):
        options = replace(OPTIONS, step_tokens=8192)
        needs, savings = get_needs(spec, options), get_savings(spec, options)
        with pytest.raises(DeviceError) as caught:
            plan_memory(total, total, needs, savings)
        enough = [each for each in str(caught.value).splitlines() if each.endswith(": enough")]
        if any("--weights int4" in line for line in enough):
            plan_memory(total, total, get_needs(spec, replace(options, quantise="int4")))
        assert enough or total == 12 * GIB


def test_every_saving_saves() -> None:
    savings = get_savings(get_known_model("llama-2-7b"), replace(OPTIONS, kv_bytes=20 * GIB))
    assert all(saving.bytes > 0 for saving in savings)
    changes = " ".join(saving.change for saving in savings)
    for word in ("--weights int4", "--kv-memory", "--step-tokens", "--max-rows", "devices"):
        assert word in changes


def test_a_larger_step_needs_more_and_never_less() -> None:
    spec = get_known_model("llama-2-7b")
    base = get_needs(spec, OPTIONS).buffers
    for more in (
        replace(OPTIONS, step_tokens=4096),
        replace(OPTIONS, max_rows=512),
        replace(OPTIONS, context_tokens=32_768),
        replace(OPTIONS, quantise="int4"),
    ):
        assert get_needs(spec, more).buffers > base


def test_weights_of_floats_take_their_own_bytes_on_the_device() -> None:
    spec = fill_formats(get_known_model("llama-2-7b"), Format.F16)
    assert get_device_bytes(spec) == pytest.approx(spec.weight_bytes, rel=1e-3)
    quarter = get_device_bytes(spec, "int4") / spec.weight_bytes
    assert 0.25 < quarter < 0.33


@pytest.mark.parametrize("format", [each for each in Format if each.is_quantised])
def test_integers_keep_near_the_bytes_of_the_file(format: Format) -> None:
    spec = fill_formats(get_known_model("llama-2-7b"), format)
    held = get_device_bytes(spec) / spec.weight_bytes
    five_or_six_bits = format in (Format.Q5_0, Format.Q5_1, Format.Q5_K, Format.Q6_K)
    assert held <= (1.7 if five_or_six_bits else 1.15)


def test_merged_matrices_take_the_least_format_that_holds_all_parts() -> None:
    q4, q6 = get_device_format(Format.Q4_K), get_device_format(Format.Q6_K)
    assert join_formats([q4, q4]) == q4
    assert join_formats([q4, q4, q6]) == DeviceFormat(8, 16, True)
    assert join_formats([q4, DENSE]) == DENSE


def test_activations_follow_the_weights_but_where_they_would_outgrow_f16() -> None:
    plain, gemma = TINY_SPECS["llama"], TINY_SPECS["gemma3"]
    for format, element in (
        (Format.F16, KvElement.F16),
        (Format.BF16, KvElement.BF16),
        (Format.F32, KvElement.BF16),
        (Format.Q4_K, KvElement.F16),
    ):
        assert choose_activations(fill_formats(plain, format))[0] is element
        assert choose_activations(fill_formats(gemma, format))[0] is KvElement.BF16


def test_blocks_and_scratch_are_what_the_kernels_take() -> None:
    from twostroke.kernels.cuda import types
    from twostroke.kernels.cuda.attention_work import count_scratch_bytes

    assert types.BLOCK_TOKENS == BLOCK_TOKENS
    spec = get_known_model("llama-3.1-8b")
    for rows in (1, 16, 256, 1024):
        options = replace(OPTIONS, max_rows=rows, context_tokens=spec.context_tokens)
        scratch = count_scratch_bytes(rows, spec.num_heads, spec.head_dim, spec.context_tokens)
        assert get_needs(spec, options).buffers > scratch


@pytest.mark.parametrize("format", [Format.F32, Format.Q4_0])
@pytest.mark.parametrize("family", list(TINY_SPECS))
def test_what_an_executor_allocates_was_planned(family: str, format: Format) -> None:
    pytest.importorskip("torch")
    from twostroke.exec.cuda_open import open_executor

    tensors = make_tensors(TINY_SPECS[family], format)
    formats = tuple((name, each.spec.format) for name, each in tensors.items())
    spec = replace(TINY_SPECS[family], formats=formats)
    options = CudaOptions("cpu", KvElement.F16, 512, 32, 640, kv_bytes=2**22)
    executor = open_executor(spec, tensors, options).executor
    try:
        assert executor.work_bytes <= get_needs(spec, options).buffers
    finally:
        executor.close()


def test_ranks_refuse_a_head_size_before_a_process_is_started(tmp_path: Path) -> None:
    spec = replace(TINY_SPECS["llama"], head_dim=24)
    with pytest.raises(UnsupportedModel, match="head size 24"):
        open_cuda_ranks(spec, tmp_path, OPTIONS, RankLayout(2), ["cuda:0", "cuda:1"])
