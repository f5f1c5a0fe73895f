"""Laws of the work formulas: published sizes by hand, and brute-force counting on small shapes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twostroke.spec.catalog import get_known_model
from twostroke.spec.device import DeviceSpec
from twostroke.spec.kv import KvElement
from twostroke.spec.model import LayerSpec, ModelSpec, RopeLayout, RopeSpec
from twostroke.spec.quant import Format
from twostroke.spec.work import (
    PARTS,
    RowShape,
    StepShape,
    StepTotals,
    add_totals,
    count_earlier_keys,
    count_pairs,
    get_floor_seconds,
    get_model_work,
    get_op_work,
    get_step_work,
    grow_totals,
)

ROPE = RopeSpec(10_000.0)

# Llama 2 7B (Touvron et al. 2023) with its head of its own, weights in bfloat16.
LLAMA_7B = ModelSpec(
    family="llama",
    name="llama-2-7b",
    width=4096,
    ffn_width=11_008,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    vocab_size=32_000,
    context_tokens=4096,
    norm_eps=1e-5,
    attention_scale=128**-0.5,
    rope_layout=RopeLayout.HALF,
    layers=(LayerSpec(ROPE),) * 32,
    tied_embeddings=False,
)
SMALL = replace(
    LLAMA_7B,
    width=64,
    ffn_width=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    vocab_size=512,
    layers=(LayerSpec(ROPE, 5), LayerSpec(ROPE), LayerSpec(ROPE, 5)),
    tied_embeddings=True,
    qkv_bias=True,
)

MIXTURE = replace(SMALL, num_experts=8, experts_per_token=2)


def make_step(*rows: tuple[int, int, int]) -> StepShape:
    return StepShape(tuple(RowShape(*row) for row in rows))


DECODE = make_step((1, 1000, 1))


def test_llama_2_7b_has_its_published_size() -> None:
    assert LLAMA_7B.num_weights == 6_738_415_616
    assert LLAMA_7B.get_kv_bytes_per_token() == 524_288


def test_a_decoded_token_costs_two_operations_a_weight() -> None:
    work = get_step_work(LLAMA_7B, DECODE)
    norms = (2 * 32 + 1) * 4096
    matrices = LLAMA_7B.num_weights - 32_000 * 4096 - norms
    products = sum(work.get_part(name).flops for name in ("projections", "ffn", "head"))
    assert products == 2 * matrices == 13_214_154_752


def test_attention_of_a_decoded_token_by_hand() -> None:
    # 32 layers, 32 heads, 1001 keys, q·k and p·v over 128 values, a multiply-add each.
    work = get_step_work(LLAMA_7B, DECODE)
    assert work.get_part("attention").flops == 32 * 32 * 1001 * 2 * 128 * 2
    assert work.kv_bytes_read == 1000 * 524_288
    assert work.kv_bytes_written == 524_288
    assert work.get_part("attention").bytes == 1001 * 524_288


def test_a_decode_reads_every_weight_once_but_one_row_of_the_embedding() -> None:
    work = get_step_work(LLAMA_7B, DECODE)
    weights = sum(part.bytes_read for part in work.parts) - work.kv_bytes_read
    assert weights == LLAMA_7B.weight_bytes - (32_000 - 1) * 4096 * 2


def test_more_rows_read_the_weights_no_more_often() -> None:
    one = get_step_work(LLAMA_7B, make_step((1, 0, 1)))
    many = get_step_work(LLAMA_7B, make_step(*[(1, 0, 1)] * 8))
    for name in ("elementwise", "projections", "ffn", "head"):
        assert many.get_part(name).bytes == one.get_part(name).bytes
        assert many.get_part(name).flops == 8 * one.get_part(name).flops


def test_a_tied_head_reads_the_whole_embedding() -> None:
    work = get_step_work(SMALL, DECODE)
    assert work.get_part("head").bytes == 512 * 64 * 2
    assert work.get_part("head").flops == 2 * 512 * 64
    assert work.get_part("embed").bytes == 64 * 2


def test_a_head_nobody_needs_costs_nothing() -> None:
    work = get_step_work(SMALL, make_step((7, 0, 0)))
    assert work.get_part("head").flops == work.get_part("head").bytes == 0


def test_an_empty_step_costs_nothing() -> None:
    work = get_step_work(SMALL, StepShape(()))
    assert work.flops == work.bytes == 0
    assert [part.name for part in work.parts] == list(PARTS)


def test_grouped_heads_shrink_keys_and_values_but_not_attention() -> None:
    whole = replace(LLAMA_7B, layers=LLAMA_7B.layers[:2])
    grouped = replace(whole, num_kv_heads=8)
    a, b = get_step_work(whole, DECODE), get_step_work(grouped, DECODE)
    assert a.kv_bytes_read == 4 * b.kv_bytes_read
    assert a.kv_bytes_written == 4 * b.kv_bytes_written
    assert a.get_part("attention").flops == b.get_part("attention").flops


def test_a_bias_costs_one_addition_an_output() -> None:
    plain = replace(SMALL, qkv_bias=False)
    difference = (
        get_step_work(SMALL, DECODE).get_part("projections").flops
        - get_step_work(plain, DECODE).get_part("projections").flops
    )
    assert difference == 3 * (4 + 2 + 2) * 32


def test_a_token_works_with_its_experts_only() -> None:
    dense, mixture = (
        get_step_work(spec, DECODE) for spec in (replace(SMALL, ffn_width=2 * 96), MIXTURE)
    )
    router = 3 * 8 * 64
    assert mixture.get_part("ffn").flops == dense.get_part("ffn").flops + 2 * router
    assert mixture.get_part("ffn").bytes == dense.get_part("ffn").bytes + 2 * router
    mixing = 3 * 2 * 2 * 64  # layers, experts, a product and a sum a value
    elementwise = dense.get_part("elementwise").flops + mixing
    assert mixture.get_part("elementwise").flops == elementwise


def test_experts_read_are_those_expected_to_be_picked() -> None:
    # Two of eight: a token misses a given expert with probability 3/4, so 8 * (1 - (3/4)^n).
    model = get_model_work(MIXTURE)
    one = 3 * 3 * 64 * 96 * 2  # one expert of each layer
    assert model.expert_bytes == 8 * one
    assert model.get_expert_bytes(0) == 0
    assert model.get_expert_bytes(1) == 2 * one
    assert model.get_expert_bytes(2) == 3.5 * one
    assert model.get_expert_bytes(3) == 4.625 * one
    assert model.get_expert_bytes(10_000) == 8 * one


def test_mixtral_computes_with_its_published_active_weights() -> None:
    # 12.9 billion of 46.7 (Jiang et al. 2024, table 1), embedding included.
    spec = get_known_model("mixtral-8x7b")
    work = get_step_work(spec, DECODE)
    products = sum(work.get_part(name).flops for name in ("projections", "ffn", "head"))
    norms = (2 * 32 + 1) * 4096
    assert products // 2 + spec.vocab_size * spec.width + norms == 12_879_925_248


def test_quantised_products_are_int8_and_weigh_what_is_stored() -> None:
    formats = {tensor.name: Format.Q4_1 for tensor in SMALL.tensors() if len(tensor.shape) == 2}
    spec = replace(SMALL, qkv_bias=False, formats=tuple(formats.items()))
    work = get_step_work(spec, DECODE)
    assert [kind for kind, _ in work.get_part("ffn").ops] == ["int8"]
    assert work.get_part("ffn").bytes == 3 * (3 * 64 * 96) // 32 * 20
    assert [kind for kind, _ in work.get_part("attention").ops] == ["fp32"]


def test_kv_bytes_follow_the_element() -> None:
    bytes_read = {
        element: get_step_work(SMALL, DECODE, element).kv_bytes_read for element in KvElement
    }
    half = bytes_read[KvElement.F16]
    assert bytes_read[KvElement.F32] == 2 * half
    # A byte a value, and a scale of four bytes for all values of a head.
    assert bytes_read[KvElement.INT8] * 2 * SMALL.head_dim == half * (SMALL.head_dim + 4)


def count_visible(position: int, window: int | None) -> set[int]:
    """Keys that the query at `position` sees, listed one by one."""
    return {key for key in range(position + 1) if window is None or key > position - window}


SIZES = {
    "new_tokens": st.integers(1, 30),
    "context_before": st.integers(0, 30),
    "window": st.none() | st.integers(1, 40),
}


@settings(deadline=None)
@given(**SIZES)
def test_pairs_are_those_counted_one_by_one(new_tokens, context_before, window) -> None:
    positions = range(context_before, context_before + new_tokens)
    expected = sum(len(count_visible(position, window)) for position in positions)
    assert count_pairs(new_tokens, context_before, window) == expected


@settings(deadline=None)
@given(**SIZES)
def test_earlier_keys_are_those_some_query_sees(new_tokens, context_before, window) -> None:
    positions = range(context_before, context_before + new_tokens)
    seen = set().union(*(count_visible(position, window) for position in positions))
    expected = len(seen & set(range(context_before)))
    assert count_earlier_keys(context_before, window) == expected


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_chunking_a_prompt_changes_no_operation(chunks: list[int]) -> None:
    model = get_model_work(SMALL)
    whole = model.get_step_work(make_step((sum(chunks), 0, 0)))
    ends = [sum(chunks[: at + 1]) for at in range(len(chunks))]
    parts = [
        model.get_step_work(make_step((count, end - count, 0)))
        for count, end in zip(chunks, ends, strict=True)
    ]
    assert sum(part.flops for part in parts) == whole.flops
    assert sum(part.kv_bytes_written for part in parts) == whole.kv_bytes_written


# ---- totals --------------------------------------------------------------------------------------

ROWS = st.tuples(st.integers(1, 9), st.integers(0, 20), st.integers(0, 1))


@settings(deadline=None)
@given(st.lists(ROWS, max_size=6))
def test_totals_hold_all_that_work_depends_on(rows: list[tuple[int, int, int]]) -> None:
    model = get_model_work(SMALL)
    totals = StepTotals()
    for row in rows:
        totals = add_totals(totals, model.get_row_totals(*row))
    assert model.get_totals_work(totals) == get_step_work(SMALL, make_step(*rows))


@settings(deadline=None)
@given(st.lists(ROWS, max_size=6))
def test_totals_are_sums_over_rows_and_layers(rows: list[tuple[int, int, int]]) -> None:
    def count(chosen: list[tuple[int, int, int]]) -> tuple[int, int]:
        cells = [(new, before, layer.window) for new, before, _ in chosen for layer in SMALL.layers]
        keys = sum(count_earlier_keys(before, window) for _, before, window in cells)
        return sum(count_pairs(*cell) for cell in cells), keys

    model = get_model_work(SMALL)
    totals = StepTotals(*map(sum, zip(*(model.get_row_totals(*row) for row in rows), strict=True)))
    expected = StepTotals(
        len(rows),
        sum(new for new, _, _ in rows),
        sum(sampled for _, _, sampled in rows),
        *count(rows),
        *count([row for row in rows if row[0] == 1]),
    )
    assert totals == expected


@given(st.integers(0, 30))
def test_a_decoding_row_grows_evenly_where_no_window_fills(context: int) -> None:
    model = get_model_work(LLAMA_7B)
    first, second = (model.get_row_totals(1, before, 1) for before in (context, context + 1))
    growth = StepTotals(*(b - a for a, b in zip(first, second, strict=True)))
    assert grow_totals(first, growth, 7) == model.get_row_totals(1, context + 7, 1)


# ---- floors --------------------------------------------------------------------------------------

DEVICE = DeviceSpec("two cores", 50e9, (("fp32", 500e9), ("int8", 2e12)), 2, 2**34)


def test_a_decode_is_bound_by_memory_and_a_prefill_by_compute() -> None:
    decode = get_floor_seconds(get_step_work(LLAMA_7B, DECODE), DEVICE)
    prefill = get_floor_seconds(get_step_work(LLAMA_7B, make_step((512, 0, 1))), DEVICE)
    assert decode.bound_by == "memory"
    assert decode.seconds == pytest.approx(get_step_work(LLAMA_7B, DECODE).bytes / 50e9, rel=0.01)
    assert prefill.bound_by == "compute"
    assert sum(part.seconds for part in prefill.parts) == pytest.approx(prefill.seconds)


def test_a_part_takes_the_longer_of_bytes_and_operations() -> None:
    work = get_step_work(LLAMA_7B, DECODE)
    for part, floor in zip(work.parts, get_floor_seconds(work, DEVICE).parts, strict=True):
        assert floor.seconds == max(part.bytes / 50e9, part.flops / 500e9)


def test_a_device_without_the_rate_is_refused_by_name() -> None:
    device = replace(DEVICE, rates=(("int8", 2e12),))
    with pytest.raises(ValueError, match=r"two cores has no rate for fp32 arithmetic.*int8"):
        get_floor_seconds(get_step_work(LLAMA_7B, DECODE), device)


def test_work_by_op_sums_to_the_work_of_the_step() -> None:
    for spec in (LLAMA_7B, SMALL, MIXTURE):
        for shape in (DECODE, make_step((7, 3, 1), (1, 40, 1))):
            work, ops = get_step_work(spec, shape), get_op_work(spec, shape)
            assert sum(op.flops for op in ops.values()) == work.flops
            norms = sum(work.get_part(name).bytes for name in ("embed", "elementwise"))
            assert sum(op.bytes for op in ops.values()) == work.bytes - norms
