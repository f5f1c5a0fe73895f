"""The GPU's paged attention against the NumPy reference, and against plain PyTorch's error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from kernels.attention_cases import (
    Case,
    Heads,
    Kind,
    Row,
    compute_exactly,
    compute_plainly,
    make_case,
    make_step,
)
from kernels.cuda_support import HALVES, assert_as_exact_as_plain, to_numpy
from twostroke.kernels.cuda import attention
from twostroke.kernels.cuda.attention_decode import DecodeConfig, decode
from twostroke.kernels.cuda.attention_prefill import PrefillConfig, prefill
from twostroke.kernels.cuda.attention_work import AttentionScratch

# Within a block, at its edges, over several.
DECODES = (Row(5), Row(63), Row(64), Row(200), Row(0))
# Chunks that begin and end within blocks; the last has more than one tile of queries.
CHUNKS = (Row(0, 66), Row(61, 3), Row(70, 130))
SMALL = PrefillConfig(64, 64, warps=4, stages=2)
GROUPS = (Heads(2, 2), Heads(6, 2, 80), Heads(5, 1, 32), Heads(4, 1, 128), Heads(2, 1, 256))


def attend(case: Case, exact: bool = False) -> torch.Tensor:
    """The result of the public call."""
    work = case.work
    look = replace(work.look, exact=exact)
    attention.attend(work.out, work.q, work.kv, work.step, look, case.make_scratch())
    return work.out


def check(case: Case) -> None:
    """The error's law for what was written to the case's output."""
    assert_as_exact_as_plain(case.work.out, compute_plainly(case), compute_exactly(case))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("heads", GROUPS)
def test_a_decode_is_as_exact_as_plain_code(heads: Heads, dtype: torch.dtype, device: str) -> None:
    case = make_case(DECODES, heads, Kind(dtype), device)
    decode(case.work, case.make_scratch(), DecodeConfig(2, 1, warps=4, stages=2))
    check(case)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("heads", GROUPS)
def test_a_prefill_is_as_exact_as_plain_code(heads: Heads, dtype: torch.dtype, device: str) -> None:
    case = make_case(CHUNKS, heads, Kind(dtype), device)
    prefill(case.work, SMALL)
    check(case)


@pytest.mark.parametrize("keys", [64, 128])
@pytest.mark.parametrize("rows", [64, 128])
def test_tiles_of_any_size_give_the_same_attention(rows: int, keys: int, device: str) -> None:
    case = make_case((Row(60, 150),), Heads(3, 1), Kind(), device)
    prefill(case.work, PrefillConfig(rows, keys, warps=8, stages=2))
    check(case)


@pytest.mark.parametrize("keys", [64, 128])
@pytest.mark.parametrize("dim", [64, 80])
def test_copies_of_whole_boxes_give_the_same_attention(dim: int, keys: int, device: str) -> None:
    case = make_case((Row(160, 150),), Heads(2, 2, dim), Kind(), device)
    prefill(case.work, PrefillConfig(64, keys, warps=4, stages=2, boxes=True))
    check(case)


@pytest.mark.parametrize("window", [1, 64, 100])
def test_a_window_hides_what_is_older(window: int, device: str) -> None:
    case = make_case((Row(200), Row(30), Row(150, 140)), Heads(4, 2), Kind(window=window), device)
    attend(case)
    check(case)


def test_blocks_older_than_the_window_are_not_read(device: str) -> None:
    case = make_case((Row(400), Row(384, 3)), Heads(2, 1), Kind(window=60), device)
    case.work.step.block_tables[:, :5] = 1 << 28
    attend(case)
    check(case)


@pytest.mark.parametrize("element", [torch.int8, torch.float8_e4m3fn, torch.float32])
def test_a_pool_of_other_elements_is_as_exact_as_plain_code(
    element: torch.dtype, device: str
) -> None:
    case = make_case((Row(100), Row(30, 70)), Heads(4, 2), Kind(element=element), device)
    attend(case)
    check(case)


@pytest.mark.parametrize("dtype", HALVES)
def test_extreme_scores_do_no_harm(dtype: torch.dtype, device: str) -> None:
    case = make_case((Row(150), Row(70, 70)), Heads(4, 2), Kind(dtype, q_scale=300.0), device)
    attend(case)
    check(case)


@pytest.mark.parametrize("runs", [1, 2, 3, 7])
def test_runs_of_any_number_give_the_same_attention(runs: int, device: str) -> None:
    case = make_case((Row(400), Row(20)), Heads(2, 1), Kind(), device)
    scratch = case.make_scratch()
    for _ in range(2):
        decode(case.work, scratch, DecodeConfig(runs, 1, warps=4, stages=2))
        check(case)
        assert not scratch.arrivals.any()


def test_a_launch_serves_contexts_that_grow(device: str) -> None:
    long = make_case((Row(300), Row(299)), Heads(2, 1), Kind(), device)
    contexts = long.work.step.contexts
    config = DecodeConfig(4, 1, warps=4, stages=2)
    scratch = long.make_scratch()
    for context in (1, 64, 65, 300):
        contexts[0] = context
        decode(long.work, scratch, config)
        keys, values = (kept[0][:context] for kept in (long.keys, long.values))
        rest = ([keys, long.keys[1]], [values, long.values[1]])
        long.work.step.positions[0] = context - 1
        check(replace(long, keys=rest[0], values=rest[1]))


@pytest.mark.parametrize("exact", [False, True])
def test_padding_rows_get_zeros(exact: bool, device: str) -> None:
    case = make_case((Row(70), Row(10)), Heads(2, 1), Kind(), device)
    case.work.step.contexts[1] = 0
    case.work.step.block_tables[1] = 1 << 20  # of an earlier step: nothing lies there
    out = attend(case, exact)
    assert to_numpy(out[0]).any()
    assert not to_numpy(out[1]).any()


def test_a_row_with_no_tokens_is_not_written(device: str) -> None:
    case = make_case((Row(70), Row(10)), Heads(2, 1), Kind(), device)
    case.work.step.contexts[1] = 0
    case.work.step.row_offsets[2] = 1
    out = attend(case)
    assert torch.isnan(out[1]).all()


def test_a_step_may_have_neither_tiles_nor_decodes(device: str) -> None:
    for rows in ((Row(3),), (Row(3, 2),)):
        attend(case := make_case(rows, Heads(2, 1), Kind(), device))
        check(case)


def test_the_runs_of_a_step_fit_the_scratch(device: str) -> None:
    case = make_case((Row(3),), Heads(2, 1), Kind(), device)
    for rows, places, longest in ((1, 8, 10_000), (7, 20, 10_000), (7, 7, 100), (3, 64, 200_000)):
        step = replace(
            case.work.step, decode_rows=torch.zeros(rows, dtype=torch.int32), longest=longest
        )
        scratch = AttentionScratch(torch.zeros(places, 2, 64), torch.zeros(0), torch.zeros(0), 132)
        config = attention.choose_decode(replace(case.work, step=step), scratch)
        assert 1 <= config.runs <= max(1, -(-longest // 64))
        assert rows * config.runs <= places


def test_what_scratch_takes_is_known_before(device: str) -> None:
    for sizes in ((1, 4, 64, 100), (300, 2, 16, 5000)):
        scratch = AttentionScratch.allocate(device, *sizes)
        assert scratch.bytes == attention.count_scratch_bytes(*sizes)


def compute_in_parts(case: Case, rows: Sequence[Row], places: int | None = None) -> torch.Tensor:
    """The tokens of a case's only row again, one step for each of these rows; results in order."""
    work, outs = case.work, []
    for row in rows:
        first = row.past - case.rows[0].past
        tokens = slice(first, first + row.tokens)
        tables = work.step.block_tables.cpu().numpy()
        step = replace(make_step((row,), tables, str(work.q.device)), longest=work.step.longest)
        out = torch.full_like(work.out[tokens], torch.nan)
        look = replace(work.look, exact=True)
        attention.attend(out, work.q[tokens], work.kv, step, look, case.make_scratch(places))
        outs.append(out)
    return torch.cat(outs)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("heads", [Heads(2, 2, 32), Heads(3, 1, 16)])
@pytest.mark.parametrize("window", [0, 990])
def test_exact_bits_do_not_depend_on_how_a_row_is_cut(
    heads: Heads, dtype: torch.dtype, window: int, device: str
) -> None:
    case = make_case((Row(1010, 40),), heads, Kind(dtype, window=window), device)
    attend(case, exact=True)
    check(case)
    whole = case.work.out.view(torch.int16)
    cuts = (
        [Row(1010, 1), Row(1011, 12), Row(1023, 1), Row(1024, 1), Row(1025, 25)],
        [Row(1010, 14), Row(1024, 26)],
    )
    for rows in cuts:
        assert torch.equal(compute_in_parts(case, rows).view(torch.int16), whole)


def test_exact_bits_do_not_depend_on_splitting(device: str) -> None:
    case = make_case((Row(1100, 1),), Heads(4, 2, 32), Kind(), device)
    one, several = (compute_in_parts(case, case.rows, places) for places in (1, 2))
    assert torch.equal(one.view(torch.int16), several.view(torch.int16))


def test_exact_bits_do_not_depend_on_other_rows(device: str) -> None:
    case = make_case((Row(20, 3), Row(90), Row(70, 2)), Heads(4, 2, 32), Kind(), device)
    attend(case, exact=True)
    check(case)
    work = case.work
    step = make_step(case.rows[1:2], work.step.block_tables[1:2].cpu().numpy(), device)
    out = torch.full_like(work.out[3:4], torch.nan)
    look = replace(work.look, exact=True)
    attention.attend(out, work.q[3:4], work.kv, step, look, case.make_scratch())
    assert torch.equal(out.view(torch.int16), work.out[3:4].view(torch.int16))
