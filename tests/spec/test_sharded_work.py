"""Laws of what ranks do and send: shares that sum to the whole, and messages counted by hand."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from twostroke.errors import InvalidParameter
from twostroke.spec.catalog import get_known_model
from twostroke.spec.kv import KvElement
from twostroke.spec.sharded_work import (
    Communication,
    Sharding,
    get_activation_bytes,
    get_communication,
    get_rank_weight_bytes,
    get_rank_work,
    get_ring_bytes,
)
from twostroke.spec.work import ModelWork, RowShape, StepShape, get_model_work

STEP = StepShape((RowShape(100, 20, 1), RowShape(1, 500, 1)))
NAMES = ("llama-2-70b", "mixtral-8x7b", "gemma3-270m", "mistral-7b")


def count(work: ModelWork) -> Counter[str]:
    return Counter({part.name: part.flops for part in work.get_step_work(STEP).parts})


@pytest.mark.parametrize("name", NAMES)
def test_one_rank_alone_does_the_whole_work(name: str) -> None:
    spec = get_known_model(name)
    assert get_rank_work(spec, Sharding()) == get_model_work(spec)
    assert get_rank_weight_bytes(spec, Sharding()) == spec.weight_bytes
    assert get_communication(spec, Sharding(), 100, 2) == Communication()


@pytest.mark.parametrize("name", ["llama-2-70b", "mixtral-8x7b", "mistral-7b"])
def test_tensor_ranks_divide_products_attention_and_keys(name: str) -> None:
    spec = get_known_model(name)
    whole, rank = get_model_work(spec), get_rank_work(spec, Sharding(tensor=4))
    all_ops, own_ops = count(whole), count(rank)
    for part in ("projections", "attention", "head"):
        assert own_ops[part] * 4 == all_ops[part]
    router = 2 * spec.num_experts * spec.width * spec.num_layers * STEP.new_tokens
    assert (own_ops["ffn"] - router) * 4 == all_ops["ffn"] - router
    work = whole.get_step_work(STEP)
    assert rank.get_step_work(STEP).kv_bytes_read * 4 == work.kv_bytes_read


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stages", [2, 3])
def test_stages_sum_to_the_whole(name: str, stages: int) -> None:
    spec = get_known_model(name)
    whole = count(get_model_work(spec))
    ranks = [get_rank_work(spec, Sharding(pipeline=stages), at) for at in range(stages)]
    summed = sum((count(each) for each in ranks), Counter())
    # Each stage's description ends with the final norm, which is counted for every token.
    final_norm = 4 * spec.width * STEP.new_tokens
    assert summed["elementwise"] - (stages - 1) * final_norm == whole["elementwise"]
    for part in ("projections", "attention", "ffn", "head"):
        assert summed[part] == whole[part]


def test_more_ranks_than_key_heads_hold_heads_several_times() -> None:
    spec = get_known_model("llama-2-70b")
    eight, sixteen = (get_rank_work(spec, Sharding(tensor=n)).kv_layer_bytes for n in (8, 16))
    assert eight == sixteen


def test_expert_ranks_hold_their_experts_and_compute_for_all_tokens() -> None:
    spec = get_known_model("mixtral-8x7b")
    whole, rank = get_model_work(spec), get_rank_work(spec, Sharding(expert=4))
    assert rank.expert_bytes * 4 == whole.expert_bytes
    # Four ranks with 25 tokens each pick what one would pick for 100.
    assert rank.get_expert_bytes(25) * 4 == pytest.approx(whole.get_expert_bytes(100), rel=1e-9)
    assert rank.matrix_ops == whole.matrix_ops


def test_a_sum_over_ranks_by_hand() -> None:
    # Llama-2-70B on 8 ranks, 10 tokens of 8,192 values of 2 bytes, twice in each of 80 layers.
    sent = get_communication(get_known_model("llama-2-70b"), Sharding(tensor=8), 10, 1)
    assert sent.sums == 80 * 2 * (2 * 7 / 8) * 10 * 8192 * 2
    assert sent.logits == 7 / 8 * 32_000 * 4
    assert (sent.stages, sent.experts) == (0, 0)
    assert get_ring_bytes(100, 2) == 100


def test_a_stage_sends_each_tokens_width_once() -> None:
    sent = get_communication(get_known_model("llama-2-70b"), Sharding(pipeline=4), 10, 1)
    assert sent == Communication(stages=10 * 8192 * 2)


def test_tokens_go_to_their_experts_and_back() -> None:
    # Two of eight experts, three quarters of them with others of four ranks, there and back.
    sent = get_communication(get_known_model("mixtral-8x7b"), Sharding(expert=4), 10, 1)
    assert sent == Communication(experts=32 * 2 * 10 * 2 * 4096 * 2 * 3 // 4)


def test_activations_in_8_bits_are_half_as_many_bytes() -> None:
    spec = get_known_model("mixtral-8x7b")
    sharding = Sharding(tensor=2, pipeline=2, expert=2)
    half, whole = (get_communication(spec, sharding, 16, 0, size) for size in (1, 2))
    assert half.bytes * 2 == whole.bytes
    assert get_activation_bytes(spec, 1) * 2 == get_activation_bytes(spec)


def test_activations_of_a_dense_layer_by_hand() -> None:
    spec = get_known_model("llama-2-7b")
    one = replace(spec, layers=spec.layers[:1])
    # In units of the width: norms 4, additions 6, around products 4; q, k, v: written 3, rotated
    # 2 * 2, read 3, attention's output written and read 2; gate, up and product 6 of 11,008.
    assert get_activation_bytes(one) == 2 * ((4 + 6 + 4 + 3 + 4 + 3 + 2) * 4096 + 6 * 11_008)


def test_quantised_weights_and_keys_shrink_what_a_rank_holds() -> None:
    plain, small = (get_known_model("llama-2-70b", each) for each in ("bf16", "q8_0"))
    sharding = Sharding(tensor=8)
    ratio = get_rank_weight_bytes(small, sharding) / get_rank_weight_bytes(plain, sharding)
    assert ratio == pytest.approx(34 / 64, rel=1e-3)
    f16, int8 = (
        get_rank_work(plain, sharding, 0, element).kv_layer_bytes
        for element in (KvElement.F16, KvElement.INT8)
    )
    assert int8 / f16 == (128 + 4) / 256


@pytest.mark.parametrize(
    ("sharding", "message"),
    [
        (Sharding(pipeline=99), "from 1 to the 32 layers"),
        (Sharding(expert=3), "can be shared by 1, 2, 4, 8, not 3"),
    ],
)
def test_what_cannot_be_shared_is_refused_with_what_can(sharding: Sharding, message: str) -> None:
    with pytest.raises(InvalidParameter, match=message):
        get_rank_work(get_known_model("mixtral-8x7b"), sharding)
