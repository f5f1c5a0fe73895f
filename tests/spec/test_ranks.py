"""Ranks' numbers and the layers of pipeline stages."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from tiny_models import TINY_SPECS
from twostroke.errors import DeviceError
from twostroke.spec.model import LayerSpec, ModelSpec, RopeSpec
from twostroke.spec.quant import Format
from twostroke.spec.ranks import WHOLE, RankLayout, RankPlace, cut_stage, split_layers


def make_deep(layers: int, **changes: object) -> ModelSpec:
    return replace(TINY_SPECS["llama"], layers=(LayerSpec(RopeSpec(10000.0)),) * layers, **changes)


def count_stage_bytes(spec: ModelSpec, layers: range, stages: tuple[range, ...]) -> int:
    total = 0
    for tensor in spec.tensors():
        name = tensor.name.split(".")
        if name[0] == "layers":
            total += tensor.bytes if int(name[1]) in layers else 0
        elif name[0] == "embed":
            total += tensor.bytes if layers == stages[0] else 0
            total += tensor.bytes if layers == stages[-1] and spec.tied_embeddings else 0
        else:
            total += tensor.bytes if layers == stages[-1] else 0
    return total


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("stages", [1, 2, 3, 5])
def test_stages_cover_all_layers_in_order(stages: int, tied: bool) -> None:
    spec = make_deep(7, tied_embeddings=tied)
    split = split_layers(spec, stages)
    assert len(split) == stages
    assert all(split)
    assert [layer for part in split for layer in part] == list(range(7))


@pytest.mark.parametrize("vocab", [8, 211, 4000])
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_no_other_split_has_a_smaller_largest_stage(stages: int, vocab: int) -> None:
    wide = tuple((f"layers.{layer}.down", Format.F32) for layer in (1, 2, 6))
    spec = make_deep(8, vocab_size=vocab, formats=wide)

    def get_largest(ends: tuple[int, ...]) -> int:
        split = tuple(map(range, (0, *ends), (*ends, 8)))
        return max(count_stage_bytes(spec, part, split) for part in split)

    best = min(map(get_largest, itertools.combinations(range(1, 8), stages - 1)))
    split = split_layers(spec, stages)
    assert max(count_stage_bytes(spec, part, split) for part in split) == best


def test_more_stages_than_layers_are_refused_by_name() -> None:
    with pytest.raises(DeviceError, match="tiny-llama has 2 layers"):
        split_layers(TINY_SPECS["llama"], 3)


def test_a_rank_is_a_shard_of_a_stage() -> None:
    layout = RankLayout(tensor=2, stages=3)
    places = [RankPlace(rank, layout) for rank in range(layout.world)]
    assert [layout.get_rank(place.stage, place.shard) for place in places] == list(range(6))
    assert [place.rank for place in places if place.is_sampling] == [4]
    assert [place.rank for place in places if place.is_first_stage] == [0, 1]
    assert layout.token_ranks == (0, 1, 4)
    assert RankLayout(tensor=3).token_ranks == (0, 1, 2)


@pytest.mark.parametrize("tied", [False, True])
def test_stages_hold_every_tensor_of_the_model_in_its_format(tied: bool) -> None:
    formats = (("layers.4.q", Format.Q4_0), ("embed", Format.F32), ("layers.0.o", Format.F16))
    spec = make_deep(5, tied_embeddings=tied, formats=formats)
    layout = RankLayout(tensor=2, stages=3)
    whole = {tensor.name: tensor for tensor in spec.tensors()}
    held: list[str] = []
    for stage in range(layout.stages):
        own = cut_stage(spec, RankPlace(layout.get_rank(stage, 1), layout))
        for tensor in own.spec.tensors():
            if own.holds(tensor.name):
                name = own.get_whole_name(tensor.name)
                assert replace(tensor, name=name) == whole[name]
                held.append(name)
    assert sorted(held) == sorted([*whole, "embed"] if tied else whole)


def test_a_stage_of_one_is_the_model() -> None:
    spec = make_deep(3)
    stage = cut_stage(spec, WHOLE)
    assert stage.spec is spec
    assert all(stage.holds(tensor.name) for tensor in spec.tensors())
