"""Laws of what each rank of a model holds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from twostroke.errors import DeviceError
from twostroke.spec.model import LayerSpec, ModelSpec, RopeLayout, RopeSpec
from twostroke.spec.quant import Format
from twostroke.spec.shard import Shard, shard_spec, take_layers

WORLDS = [1, 2, 4, 8]
GROUPED = ModelSpec(
    family="llama",
    name="grouped",
    width=256,
    ffn_width=480,
    num_heads=16,
    num_kv_heads=4,
    head_dim=16,
    vocab_size=211,
    context_tokens=128,
    norm_eps=1e-5,
    attention_scale=0.25,
    rope_layout=RopeLayout.HALF,
    layers=(LayerSpec(RopeSpec(10_000.0)),) * 2,
)
SPECS = [GROUPED, replace(GROUPED, num_kv_heads=1), replace(GROUPED, num_kv_heads=16)]


def make_shards(spec: ModelSpec, world: int) -> list[Shard]:
    """Every rank's part."""
    return [shard_spec(spec, rank, world) for rank in range(world)]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("world", WORLDS)
def test_ranks_hold_every_head_column_and_word_once_and_in_order(
    spec: ModelSpec, world: int
) -> None:
    shards = make_shards(spec, world)
    assert [each for shard in shards for each in shard.heads] == list(range(spec.num_heads))
    assert [each for shard in shards for each in shard.ffn] == list(range(spec.ffn_width))
    assert [each for shard in shards for each in shard.vocab] == list(range(spec.vocab_size))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("world", WORLDS)
def test_every_query_head_finds_its_kv_head_on_its_rank(spec: ModelSpec, world: int) -> None:
    group = spec.num_heads // spec.num_kv_heads
    for shard in make_shards(spec, world):
        own_group = shard.spec.num_heads // shard.spec.num_kv_heads
        for index, head in enumerate(shard.heads):
            assert shard.kv_heads[index // own_group] == head // group


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("world", WORLDS)
def test_kv_heads_are_held_no_more_often_than_they_must(spec: ModelSpec, world: int) -> None:
    held = [each for shard in make_shards(spec, world) for each in shard.kv_heads]
    assert len(held) == max(world, spec.num_kv_heads)
    assert set(held) == set(range(spec.num_kv_heads))


@pytest.mark.parametrize("world", WORLDS)
def test_weights_of_all_ranks_sum_to_the_model(world: int) -> None:
    spec = replace(GROUPED, num_kv_heads=16, tied_embeddings=False)
    shards = make_shards(spec, world)

    def count(spec: ModelSpec, *kinds: str) -> int:
        tensors = spec.tensors()
        return sum(each.num_weights for each in tensors if each.name.rpartition(".")[2] in kinds)

    divided = ("q", "k", "v", "o", "gate", "up", "down")
    assert sum(count(each.spec, *divided) for each in shards) == count(spec, *divided)
    for shard in shards:
        for name in ("attn_norm", "final_norm", "embed"):
            assert count(shard.spec, name) == count(spec, name)


@pytest.mark.parametrize("world", WORLDS)
def test_parts_of_the_head_are_equally_long_and_padded_at_the_end_only(world: int) -> None:
    shards = make_shards(GROUPED, world)
    assert len({shard.head_rows for shard in shards}) == 1
    for shard in shards:
        start = min(shard.rank * shard.head_rows, GROUPED.vocab_size)
        assert shard.vocab.start == start
        assert len(shard.vocab) <= shard.head_rows


def test_one_rank_holds_the_model_as_it_is() -> None:
    shard = shard_spec(GROUPED, 0, 1)
    assert shard.spec == GROUPED
    assert shard.head_rows == GROUPED.vocab_size
    assert shard.has_bias


def test_only_one_rank_adds_the_bias_of_a_sum() -> None:
    assert [shard.has_bias for shard in make_shards(GROUPED, 4)] == [True, False, False, False]


def test_a_divided_head_is_no_longer_the_embedding_but_stored_like_it() -> None:
    shard = shard_spec(replace(GROUPED, formats=(("embed", Format.Q8_0),)), 0, 2)
    assert not shard.spec.tied_embeddings
    assert dict(shard.spec.formats)["head"] is Format.Q8_0


def test_a_stages_layers_are_counted_from_zero_and_keep_what_they_are() -> None:
    windows = tuple(replace(GROUPED.layers[0], window=size) for size in (1, 2, 3, 4))
    formats = tuple((f"layers.{index}.q", list(Format)[index]) for index in range(4))
    spec = replace(GROUPED, layers=windows, formats=(*formats, ("embed", Format.F16)))
    stage = take_layers(spec, range(1, 3))
    assert [layer.window for layer in stage.layers] == [2, 3]
    kept = {name: spec for name, spec in stage.formats if name.startswith("layers.")}
    assert kept == {"layers.0.q": list(Format)[1], "layers.1.q": list(Format)[2]}
    assert dict(stage.formats)["embed"] is Format.F16
    assert take_layers(spec, range(4)) == spec


@pytest.mark.parametrize(
    ("spec", "world", "what"),
    [
        (GROUPED, 3, "query heads"),
        (replace(GROUPED, ffn_width=500), 8, "FFN"),
        (replace(GROUPED, num_heads=12, num_kv_heads=3), 2, "KV heads"),
    ],
)
def test_what_cannot_be_shared_is_refused_by_name(spec: ModelSpec, world: int, what: str) -> None:
    with pytest.raises(DeviceError, match=what) as caught:
        shard_spec(spec, 0, world)
    assert "shared by 1, " in str(caught.value)
