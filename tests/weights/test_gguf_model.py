"""GGUF files of every family become the right ModelSpec, or are refused by name."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import numpy as np
import pytest

from model_files import (
    ARRAY,
    BOOL,
    F32,
    FFN,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LAYERS,
    STR,
    U32,
    VOCAB,
    WIDTH,
    GGUFRecipe,
    add_sentencepiece,
    make_gguf,
)
from twostroke.errors import CorruptModel, ModelError, UnsupportedModel
from twostroke.spec.model import (
    LayerSpec,
    LinearScaling,
    ModelSpec,
    RopeLayout,
    RopeSpec,
    StoredFactors,
)
from twostroke.spec.quant import Format
from twostroke.weights.load import open_model

ARCHITECTURES = ["llama", "qwen2", "qwen3", "gemma3"]


def read(recipe: GGUFRecipe, folder: Path) -> ModelSpec:
    with open_model(recipe.write(folder / "model.gguf")) as model:
        return model.spec


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sizes_and_norms_of_every_family_are_read(architecture: str, tmp_path: Path) -> None:
    spec = read(make_gguf(architecture), tmp_path)
    assert spec.family == architecture
    assert spec.name == f"tiny {architecture}"
    assert (spec.width, spec.ffn_width, spec.vocab_size) == (WIDTH, FFN, VOCAB)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim) == (HEADS, KV_HEADS, HEAD_DIM)
    assert (spec.num_layers, spec.context_tokens) == (LAYERS, 128)
    assert spec.norm_eps == pytest.approx(1e-5)
    assert spec.norm_offset == 0.0
    assert spec.attention_scale == pytest.approx(1 / math.sqrt(HEAD_DIM))
    assert spec.tied_embeddings


def test_only_the_llama_architecture_rotates_neighbours(tmp_path: Path) -> None:
    layouts = {name: read(make_gguf(name), tmp_path).rope_layout for name in ARCHITECTURES}
    assert layouts.pop("llama") is RopeLayout.INTERLEAVED
    assert set(layouts.values()) == {RopeLayout.HALF}


def test_each_family_has_its_own_biases_and_norms(tmp_path: Path) -> None:
    facts = {}
    for name in ARCHITECTURES:
        spec = read(make_gguf(name), tmp_path)
        facts[name] = (spec.qkv_bias, spec.qk_norm, spec.post_norms, spec.activation)
    assert facts == {
        "llama": (False, False, False, "silu"),
        "qwen2": (True, False, False, "silu"),
        "qwen3": (False, True, False, "silu"),
        "gemma3": (False, True, True, "gelu_tanh"),
    }


def test_gemma3_slides_on_five_of_six_layers_with_a_base_of_their_own(tmp_path: Path) -> None:
    recipe = make_gguf("gemma3")
    layer = {name: each for name, each in recipe.tensors.items() if name.startswith("blk.0.")}
    for index in range(7):
        recipe.tensors |= {
            name.replace("blk.0", f"blk.{index}"): each for name, each in layer.items()
        }
    recipe.set("block_count", U32, 7)
    recipe.set("rope.scaling.type", STR, "linear")
    recipe.set("rope.scaling.factor", F32, 8.0)
    spec = read(recipe, tmp_path)
    local = LayerSpec(RopeSpec(10000.0), window=16)
    whole = LayerSpec(RopeSpec(500000.0, LinearScaling(8.0)))
    assert spec.layers == (local,) * 5 + (whole, local)
    assert spec.embed_scale == pytest.approx(math.sqrt(WIDTH))


def test_the_gemma3_of_62_layers_alone_scales_by_width_over_heads(tmp_path: Path) -> None:
    recipe = make_gguf("gemma3")
    layer = {name: each for name, each in recipe.tensors.items() if name.startswith("blk.0.")}
    for index in range(62):
        recipe.tensors |= {
            name.replace("blk.0", f"blk.{index}"): each for name, each in layer.items()
        }
    recipe.set("block_count", U32, 62)
    spec = read(recipe, tmp_path)
    assert spec.attention_scale == pytest.approx(1 / math.sqrt(WIDTH // HEADS))


def test_gemma3_obeys_the_pattern_and_local_base_a_file_gives(tmp_path: Path) -> None:
    recipe = make_gguf("gemma3")
    recipe.keys["gemma3.attention.sliding_window_pattern"] = (ARRAY, [False, True], BOOL)
    recipe.set("rope.freq_base_swa", F32, 5000.0)
    spec = read(recipe, tmp_path)
    assert spec.layers == (
        LayerSpec(RopeSpec(500000.0)),
        LayerSpec(RopeSpec(5000.0), window=16),
    )


def test_a_mistral_window_holds_for_every_layer(tmp_path: Path) -> None:
    recipe = make_gguf("llama")
    recipe.set("attention.sliding_window", U32, 32)
    assert {layer.window for layer in read(recipe, tmp_path).layers} == {32}


def test_stored_rope_factors_become_a_tensor_and_a_scaling(tmp_path: Path) -> None:
    recipe = make_gguf("llama")
    recipe.tensors["rope_freqs.weight"] = ((HEAD_DIM // 2,), Format.F32)
    spec = read(recipe, tmp_path)
    assert spec.stored_rope_factors
    assert {layer.rope.scaling for layer in spec.layers} == {StoredFactors()}
    assert any(tensor.name == "rope_factors" for tensor in spec.tensors())


def test_head_size_defaults_to_width_over_heads(tmp_path: Path) -> None:
    recipe = make_gguf("llama", head_dim=WIDTH // HEADS)
    del recipe.keys["llama.attention.key_length"], recipe.keys["llama.attention.value_length"]
    assert read(recipe, tmp_path).head_dim == WIDTH // HEADS


def test_an_output_matrix_makes_the_head_its_own(tmp_path: Path) -> None:
    recipe = make_gguf("llama")
    recipe.tensors["output.weight"] = ((VOCAB, WIDTH), Format.Q8_0)
    spec = read(recipe, tmp_path)
    assert not spec.tied_embeddings
    assert {t.name: t.format for t in spec.tensors()}["head"] is Format.Q8_0


@pytest.mark.parametrize("fmt", list(Format), ids=lambda fmt: fmt.value)
def test_summed_tensors_are_the_bytes_stored(fmt: Format, tmp_path: Path) -> None:
    recipe = make_gguf("llama", fmt, width=256, ffn=512, head_dim=64)
    path = recipe.write(tmp_path / "model.gguf")
    with open_model(path) as model:
        stored = sum(fmt.get_bytes(int(np.prod(shape))) for shape, fmt in recipe.tensors.values())
        assert model.spec.weight_bytes == stored
        assert sum(tensor.data.size for tensor in model.tensors.values()) == stored
        assert model.unused_bytes == 0
        assert model.file_bytes == path.stat().st_size
        assert model.tensors["layers.1.down"].spec.format is fmt


def test_tensors_are_read_only_views_in_forward_order(tmp_path: Path) -> None:
    with open_model(make_gguf("qwen2").write(tmp_path / "model.gguf")) as model:
        assert list(model.tensors) == [tensor.name for tensor in model.spec.tensors()]
        for name, tensor in model.tensors.items():
            assert tensor.spec.name == name
            assert not tensor.data.flags.writeable
            assert not tensor.data.flags.owndata


def test_a_tensor_outlives_the_model_it_came_from(tmp_path: Path) -> None:
    with open_model(make_gguf("llama").write(tmp_path / "model.gguf")) as model:
        kept = model.tensors["embed"]
        expected = kept.data.copy()
    np.testing.assert_array_equal(kept.data, expected)


# ---- refusals -----------------------------------------------------------------------------------

UNSUPPORTED_KEYS = [
    ("general.architecture", STR, "mamba"),
    ("general.type", STR, "adapter"),
    ("split.count", U32, 3),
    ("llama.attention.key_length_mla", U32, 8),
    ("llama.rope.scaling.type", STR, "yarn"),
    ("llama.rope.scaling.attn_factor", F32, 1.0),
    ("llama.rope.dimension_count", U32, HEAD_DIM // 2),
    ("llama.attention.value_length", U32, HEAD_DIM * 2),
    ("llama.attention.causal", BOOL, False),
    ("llama.expert_count", U32, 8),
    ("llama.final_logit_softcapping", F32, 30.0),
    ("tokenizer.ggml.model", STR, "bert"),
    ("tokenizer.ggml.shuffle", BOOL, True),
]


@pytest.mark.parametrize(("key", "kind", "value"), UNSUPPORTED_KEYS, ids=lambda each: str(each))
def test_what_is_not_understood_is_refused_by_key(
    key: str, kind: object, value: object, tmp_path: Path
) -> None:
    recipe = make_gguf("llama")
    recipe.keys[key] = (kind, value)
    if key == "general.architecture":
        del recipe.keys[key]
        recipe.architecture = str(value)
    with pytest.raises(UnsupportedModel, match=f"'{key}'") as caught:
        read(recipe, tmp_path)
    assert "model.gguf" in str(caught.value)


def test_experts_set_to_none_are_no_reason_to_refuse(tmp_path: Path) -> None:
    recipe = make_gguf("llama")
    recipe.set("expert_count", U32, 0)
    recipe.set("attention.causal", BOOL, True)
    assert read(recipe, tmp_path).num_layers == LAYERS


def test_a_value_for_each_layer_is_refused_by_key(tmp_path: Path) -> None:
    recipe = make_gguf("llama")
    recipe.keys["llama.feed_forward_length"] = (ARRAY, [FFN, FFN], U32)
    with pytest.raises(UnsupportedModel, match=r"'llama.feed_forward_length' is an array"):
        read(recipe, tmp_path)


REQUIRED = [
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "context_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
]


@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_key_is_named(name: str, tmp_path: Path) -> None:
    recipe = make_gguf("llama")
    del recipe.keys[f"llama.{name}"]
    with pytest.raises(CorruptModel, match=f"'llama.{name}' is missing"):
        read(recipe, tmp_path)


CORRUPT_VALUES = [
    ("block_count", U32, 2**32 - 1, "is 4294967295, not from 1 to"),
    ("block_count", U32, 200, "but the file has"),
    ("block_count", U32, LAYERS + 1, "tensor 'blk.2.attn_norm.weight' is missing"),
    ("block_count", U32, LAYERS - 1, "tensor 'blk.1.attn_norm.weight' has no place"),
    ("embedding_length", U32, 0, "'llama.embedding_length' is 0"),
    ("embedding_length", U32, WIDTH + 4, "tensor 'token_embd.weight' is"),
    ("embedding_length", STR, "wide", "'llama.embedding_length' is STRING"),
    ("feed_forward_length", U32, FFN + 1, "tensor 'blk.0.ffn_gate.weight' is"),
    ("attention.head_count_kv", U32, 3, "does not divide"),
    ("attention.head_count", U32, HEADS * 2, "tensor 'blk.0.attn_q.weight' is"),
    ("attention.layer_norm_rms_epsilon", F32, math.nan, "is nan"),
    ("attention.layer_norm_rms_epsilon", U32, 1, "is UINT32, not a float"),
    ("rope.freq_base", F32, math.inf, "is inf"),
    ("rope.freq_base", F32, -1.0, "is -1.0"),
    ("vocab_size", U32, VOCAB + 1, "'tokenizer.ggml.tokens' has 40 items"),
    ("context_length", U32, 2**31, "not from 1 to"),
]


@pytest.mark.parametrize(("name", "kind", "value", "said"), CORRUPT_VALUES)
def test_a_value_that_contradicts_is_named(
    name: str, kind: object, value: object, said: str, tmp_path: Path
) -> None:
    recipe = make_gguf("llama")
    recipe.set(name, kind, value)
    with pytest.raises((CorruptModel, UnsupportedModel), match=said):
        read(recipe, tmp_path)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_no_type_or_value_of_any_key_escapes_as_another_error(
    architecture: str, tmp_path: Path
) -> None:
    odd = [
        (U32, 0),
        (F32, math.nan),
        (BOOL, True),
        (STR, ""),
        (ARRAY, [1], U32),
        (ARRAY, [""], STR),
    ]
    for key in make_gguf(architecture).keys:
        for value in odd:
            recipe = make_gguf(architecture)
            recipe.keys[key] = value
            path = recipe.write(tmp_path / "model.gguf")
            with contextlib.suppress(ModelError), open_model(path) as model:
                assert len(model.vocabulary.tokens) == model.spec.vocab_size


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_tensor_is_needed(architecture: str, tmp_path: Path) -> None:
    for name in make_gguf(architecture).tensors:
        recipe = make_gguf(architecture)
        del recipe.tensors[name]
        with pytest.raises(CorruptModel, match="is missing"):
            read(recipe, tmp_path)


@pytest.mark.parametrize(
    "name", ["blk.0.ffn_gate_exps.weight", "v.blk.0.x", "blk.00.attn_q.weight"]
)
def test_an_unknown_tensor_is_refused_by_name(name: str, tmp_path: Path) -> None:
    recipe = make_gguf("llama")
    recipe.tensors[name] = ((WIDTH, WIDTH), Format.F32)
    with pytest.raises(UnsupportedModel, match=f"tensor '{name}'"):
        read(recipe, tmp_path)


def test_a_known_tensor_of_another_family_is_refused_by_name(tmp_path: Path) -> None:
    recipe = make_gguf("llama")
    recipe.tensors["blk.1.attn_q_norm.weight"] = ((HEAD_DIM,), Format.F32)
    with pytest.raises(UnsupportedModel, match=r"'blk.1.attn_q_norm.weight' has no place"):
        read(recipe, tmp_path)


def test_linear_scaling_beside_stored_factors_is_refused(tmp_path: Path) -> None:
    recipe = make_gguf("llama")
    recipe.tensors["rope_freqs.weight"] = ((HEAD_DIM // 2,), Format.F32)
    recipe.set("rope.scaling.factor", F32, 4.0)
    with pytest.raises(UnsupportedModel, match=r"rope.scaling.factor"):
        read(recipe, tmp_path)


def test_a_llama_file_may_have_a_sentencepiece_vocabulary(tmp_path: Path) -> None:
    recipe = make_gguf("llama")
    for key in [key for key in recipe.keys if key.startswith("tokenizer.")]:
        del recipe.keys[key]
    add_sentencepiece(recipe)
    assert read(recipe, tmp_path).vocab_size == VOCAB
