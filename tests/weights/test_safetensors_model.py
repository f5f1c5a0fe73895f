"""Hugging Face folders of every family become the right ModelSpec, or are refused by name."""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model_files import (
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LAYERS,
    VOCAB,
    WIDTH,
    FolderRecipe,
    make_folder,
)
from twostroke.errors import CorruptModel, ModelError, UnknownModel, UnsupportedModel
from twostroke.spec.model import (
    LayerSpec,
    LinearScaling,
    Llama3Scaling,
    ModelSpec,
    RopeLayout,
    RopeSpec,
)
from twostroke.spec.quant import Format
from twostroke.weights.load import open_model

MODEL_TYPES = ["llama", "mistral", "qwen2", "qwen3", "gemma3_text"]
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LLAMA3_SCALING = Llama3Scaling(8.0, 1.0, 4.0, 64)


def read(recipe: FolderRecipe, folder: Path) -> ModelSpec:
    with open_model(recipe.write(folder / "m")) as model:
        return model.spec


def read_config(model_type: str, folder: Path, **config: Any) -> ModelSpec:
    recipe = make_folder(model_type)
    recipe.config |= config
    return read(recipe, folder)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_sizes_and_norms_of_every_family_are_read(model_type: str, tmp_path: Path) -> None:
    spec = read(make_folder(model_type), tmp_path)
    gemma = model_type == "gemma3_text"
    assert spec.family == ("gemma3" if gemma else model_type)
    assert (spec.width, spec.vocab_size, spec.num_layers) == (WIDTH, VOCAB, LAYERS)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim) == (HEADS, KV_HEADS, HEAD_DIM)
    assert spec.rope_layout is RopeLayout.HALF
    assert spec.norm_offset == (1.0 if gemma else 0.0)
    assert spec.embed_scale == pytest.approx(math.sqrt(WIDTH) if gemma else 1.0)
    assert spec.attention_scale == pytest.approx(1 / math.sqrt(64 if gemma else HEAD_DIM))
    assert spec.tied_embeddings is gemma
    assert spec.qkv_bias is (model_type == "qwen2")
    assert spec.qk_norm is (model_type in ("qwen3", "gemma3_text"))
    assert spec.post_norms is gemma
    assert not spec.output_bias


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("shards", [1, 3])
def test_summed_tensors_are_the_bytes_stored(model_type: str, shards: int, tmp_path: Path) -> None:
    recipe = make_folder(model_type)
    with open_model(recipe.write(tmp_path / "m", shards)) as model:
        assert model.spec.weight_bytes == sum(each.nbytes for each in recipe.tensors.values())
        assert model.unused_bytes == 0
        files = (tmp_path / "m").glob("*.safetensors")
        assert model.file_bytes == sum(path.stat().st_size for path in files)
        sources = {"embed": "model.embed_tokens", "layers.1.o": "model.layers.1.self_attn.o_proj"}
        for name, source in sources.items():
            stored = recipe.tensors[f"{source}.weight"]
            np.testing.assert_array_equal(
                model.tensors[name].data.view(np.float16), stored.reshape(-1)
            )


def test_gemmas_four_norms_are_told_apart(tmp_path: Path) -> None:
    recipe = make_folder("gemma3_text", np.float32)
    names = {
        "attn_norm": "input_layernorm",
        "post_attn_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffn_norm": "post_feedforward_layernorm",
    }
    for value, source in enumerate(names.values()):
        recipe.tensors[f"model.layers.0.{source}.weight"] = np.full(WIDTH, value, np.float32)
    with open_model(recipe.write(tmp_path / "m")) as model:
        for value, name in enumerate(names):
            assert set(model.tensors[f"layers.0.{name}"].data.view(np.float32)) == {value}
            assert model.tensors[f"layers.0.{name}"].spec.format is Format.F32


# ---- rope and windows ---------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_llama_3_scaling_is_read_in_the_old_spelling(key: str, tmp_path: Path) -> None:
    spec = read_config("llama", tmp_path, rope_scaling={key: "llama3", **LLAMA3})
    assert {layer.rope for layer in spec.layers} == {RopeSpec(500000.0, LLAMA3_SCALING)}


def test_llama_3_scaling_is_read_in_the_new_spelling(tmp_path: Path) -> None:
    nested = {"rope_type": "llama3", "rope_theta": 1000.0, **LLAMA3}
    spec = read_config("llama", tmp_path, rope_theta=None, rope_parameters=nested)
    assert {layer.rope for layer in spec.layers} == {RopeSpec(1000.0, LLAMA3_SCALING)}


def test_linear_scaling_spares_gemmas_sliding_layers(tmp_path: Path) -> None:
    spec = read_config(
        "gemma3_text",
        tmp_path,
        sliding_window_pattern=2,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        rope_local_base_freq=2000.0,
    )
    assert spec.layers == (
        LayerSpec(RopeSpec(2000.0), window=16),
        LayerSpec(RopeSpec(500000.0, LinearScaling(8.0))),
    )


def test_gemmas_ropes_may_be_nested_by_kind_of_layer(tmp_path: Path) -> None:
    nested = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    types = ["full_attention", "sliding_attention"]
    spec = read_config(
        "gemma3_text", tmp_path, rope_theta=None, rope_parameters=nested, layer_types=types
    )
    assert spec.layers == (
        LayerSpec(RopeSpec(1e6, LinearScaling(8.0))),
        LayerSpec(RopeSpec(1e4), window=16),
    )


@pytest.mark.parametrize(
    ("model_type", "config", "windows"),
    [
        ("llama", {}, [None, None]),
        ("mistral", {}, [None, None]),
        ("mistral", {"sliding_window": 32}, [32, 32]),
        ("qwen2", {"sliding_window": 32, "use_sliding_window": False}, [None, None]),
        (
            "qwen2",
            {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 1},
            [None, 32],
        ),
        (
            "qwen3",
            {
                "sliding_window": 32,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            [32, None],
        ),
        ("gemma3_text", {"_sliding_window_pattern": 2}, [16, None]),
        ("gemma3_text", {}, [16, 16]),
    ],
)
def test_windows_are_on_the_layers_the_config_says(
    model_type: str, config: dict[str, Any], windows: list[int | None], tmp_path: Path
) -> None:
    spec = read_config(model_type, tmp_path, **config)
    assert [layer.window for layer in spec.layers] == windows


def test_mistrals_window_defaults_to_its_classes(tmp_path: Path) -> None:
    recipe = make_folder("mistral")
    del recipe.config["sliding_window"]
    assert {layer.window for layer in read(recipe, tmp_path).layers} == {4096}


# ---- tying, biases, towers ----------------------------------------------------------------------


def test_a_stored_copy_of_a_tied_head_is_counted_as_unused(tmp_path: Path) -> None:
    recipe = make_folder("gemma3_text")
    recipe.tensors["lm_head.weight"] = recipe.tensors["model.embed_tokens.weight"].copy()
    with open_model(recipe.write(tmp_path / "m")) as model:
        assert model.unused_bytes == recipe.tensors["lm_head.weight"].nbytes
        assert "head" not in model.tensors
        stored = sum(each.nbytes for each in recipe.tensors.values())
        assert model.spec.weight_bytes + model.unused_bytes == stored


def test_a_tied_head_of_another_shape_is_refused(tmp_path: Path) -> None:
    recipe = make_folder("gemma3_text")
    recipe.tensors["lm_head.weight"] = np.zeros((VOCAB + 1, WIDTH), np.float16)
    with pytest.raises(CorruptModel, match=r"'lm_head.weight' is \(41, 64\)"):
        read(recipe, tmp_path)


def test_an_untied_model_without_a_head_is_refused(tmp_path: Path) -> None:
    recipe = make_folder("llama")
    del recipe.tensors["lm_head.weight"]
    with pytest.raises(CorruptModel, match=r"'lm_head.weight' is missing"):
        read(recipe, tmp_path)


def test_biases_follow_the_config(tmp_path: Path) -> None:
    recipe = make_folder("llama")
    recipe.config |= {"attention_bias": True, "mlp_bias": True}
    for name in [name for name in recipe.tensors if "_proj.weight" in name]:
        rows = recipe.tensors[name].shape[0]
        recipe.tensors[name.replace(".weight", ".bias")] = np.zeros(rows, np.float16)
    spec = read(recipe, tmp_path)
    assert (spec.qkv_bias, spec.output_bias, spec.ffn_bias) == (True, True, True)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_half_of_a_multimodal_gemma3_is_read(prefix: str, tmp_path: Path) -> None:
    recipe = make_folder("gemma3_text")
    text = {key: each for key, each in recipe.config.items() if key != "architectures"}
    recipe.config = {
        "model_type": "gemma3",
        "text_config": text,
        "vision_config": {"hidden_size": 8},
        "mm_tokens_per_image": 256,
        "boi_token_index": 7,
        "eos_token_id": [2, 3],
    }
    recipe.tensors = {
        name.replace("model.", prefix, 1): each for name, each in recipe.tensors.items()
    }
    recipe.tensors["vision_tower.x.weight"] = np.zeros((8, 8), np.float16)
    recipe.tensors["multi_modal_projector.y"] = np.zeros((8, 8), np.float16)
    with open_model(recipe.write(tmp_path / "m")) as model:
        assert model.spec.family == "gemma3"
        assert model.unused_bytes == 2 * 8 * 8 * 2
        assert model.vocabulary.stop_tokens == {2, 3}


def test_old_rotary_buffers_are_counted_as_unused(tmp_path: Path) -> None:
    recipe = make_folder("llama")
    buffer = np.zeros(HEAD_DIM // 2, np.float32)
    recipe.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = buffer
    with open_model(recipe.write(tmp_path / "m")) as model:
        assert model.unused_bytes == buffer.nbytes


# ---- refusals -----------------------------------------------------------------------------------

UNSUPPORTED = [
    ("llama", {"logits_scaling": 8.0}, "'logits_scaling' is not understood"),
    ("llama", {"attention_multiplier": 0.1}, "'attention_multiplier'"),
    ("mistral", {"layer_types": ["full_attention"] * LAYERS}, "'layer_types'"),
    ("qwen2", {"attention_bias": True}, "'attention_bias'"),
    ("llama", {"hidden_act": "gelu"}, "'hidden_act' is 'gelu'"),
    ("llama", {"partial_rotary_factor": 0.5}, "'partial_rotary_factor' is 0.5"),
    ("llama", {"quantization_config": {"quant_method": "awq"}}, "'quantization_config'"),
    ("gemma3_text", {"final_logit_softcapping": 30.0}, "'final_logit_softcapping' is 30.0"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "'use_bidirectional_attention'"),
    ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type' is 'yarn'"),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "type' is 'dynamic'"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0, "beta": 1}}, "rope_scaling.beta"),
    ("qwen3", {"use_sliding_window": True, "layer_types": ["conv"] * LAYERS}, "'conv'"),
]


@pytest.mark.parametrize(("model_type", "config", "said"), UNSUPPORTED)
def test_what_is_not_understood_is_refused_by_key(
    model_type: str, config: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModel, match=said) as caught:
        read_config(model_type, tmp_path, **config)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize("model_type", ["mamba", None, 3, ["llama"]])
def test_another_model_type_is_refused_with_those_we_have(model_type: Any, tmp_path: Path) -> None:
    recipe = make_folder("llama")
    recipe.config["model_type"] = model_type
    with pytest.raises(UnsupportedModel, match=r"model_type is .* supported are llama, mistral"):
        read(recipe, tmp_path)


def test_an_unknown_key_that_is_null_changes_nothing(tmp_path: Path) -> None:
    spec = read_config("llama", tmp_path, some_new_thing=None, temperature=0.6, pretraining_tp=2)
    assert spec.family == "llama"


# What published models of each family carry beside what the recipes have.
PUBLISHED = {
    "llama": {
        "is_llama_config": True,
        "rope_interleaved": False,
        "transformers.js_config": {"dtype": "q4"},
        "pretraining_tp": 1,
        "mlp_bias": False,
        "attention_bias": False,
        "rope_scaling": None,
    },
    "mistral": {"attention_dropout": 0.0, "head_dim": None, "transformers_version": "4.42.0"},
    "qwen2": {"max_window_layers": 21, "use_sliding_window": False, "use_mrope": False},
    "qwen3": {"sliding_window": None, "max_window_layers": 28, "attention_bias": False},
    "gemma3_text": {
        "_sliding_window_pattern": 6,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": ["sliding_attention"] * LAYERS,
        "rope_local_base_freq": 10000.0,
        "use_bidirectional_attention": False,
    },
}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_what_published_models_carry_is_understood(model_type: str, tmp_path: Path) -> None:
    recipe = make_folder(model_type)
    recipe.config |= PUBLISHED[model_type]
    if model_type == "mistral":  # then the head size is the width over the heads
        recipe.config["num_attention_heads"] = WIDTH // HEAD_DIM
        recipe.config["num_key_value_heads"] = WIDTH // HEAD_DIM
        for name in [name for name in recipe.tensors if "self_attn" in name]:
            recipe.tensors[name] = np.zeros((WIDTH, WIDTH), np.float16)
    assert read(recipe, tmp_path).head_dim == HEAD_DIM


CONTRADICTIONS = [
    ({"hidden_size": None}, "'hidden_size' is missing"),
    ({"hidden_size": "wide"}, "'hidden_size' is 'wide'"),
    ({"num_hidden_layers": True}, "'num_hidden_layers' is True"),
    ({"num_hidden_layers": 10**12}, "'num_hidden_layers' is 1000000000000"),
    ({"num_hidden_layers": LAYERS + 1}, "'model.layers.2.input_layernorm.weight' is missing"),
    ({"num_hidden_layers": LAYERS - 1}, "'model.layers.1.[a-z_.]*' has no place"),
    ({"num_key_value_heads": 3}, "'num_key_value_heads' does not divide"),
    ({"head_dim": 31}, "'head_dim' 31 is odd"),
    ({"vocab_size": VOCAB - 1}, r"'(lm_head|model.embed_tokens).weight' is"),
    ({"rms_norm_eps": -1}, "'rms_norm_eps' is -1"),
    ({"rope_theta": 10**400}, "'rope_theta'"),
    ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "'rope_scaling.low_freq_factor'"),
    ({"rope_scaling": {}, "rope_parameters": {}}, "both given"),
    ({"rope_scaling": [1]}, "'rope_scaling' is"),
    ({"tie_word_embeddings": 1}, "'tie_word_embeddings' is 1"),
]


@pytest.mark.parametrize(("config", "said"), CONTRADICTIONS)
def test_a_value_that_contradicts_is_named(
    config: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises((CorruptModel, UnsupportedModel), match=said):
        read_config("llama", tmp_path, **config)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_no_value_of_any_key_escapes_as_another_error(model_type: str, tmp_path: Path) -> None:
    whole = make_folder(model_type)
    whole.config |= {**PUBLISHED[model_type], "rope_parameters": None, "layer_types": None}
    folder = whole.write(tmp_path / "m")
    for key in whole.config:
        for value in (-1, 0, 1.5, 10**30, math.nan, "x", [], [[]], {}, {"a": {}}, True, None):
            changed = {**whole.config, key: value}
            (folder / "config.json").write_text(json.dumps(changed))
            with contextlib.suppress(ModelError), open_model(folder) as model:
                assert model.spec.weight_bytes > 0
                assert model.vocabulary.bos != -1


def test_an_unknown_tensor_is_refused_by_name(tmp_path: Path) -> None:
    recipe = make_folder("llama")
    recipe.tensors["model.layers.0.mlp.experts.0.weight"] = np.zeros((4, 4), np.float16)
    with pytest.raises(UnsupportedModel, match=r"'model.layers.0.mlp.experts.0.weight'"):
        read(recipe, tmp_path)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_tensor_is_needed(model_type: str, tmp_path: Path) -> None:
    for name in make_folder(model_type).tensors:
        recipe = make_folder(model_type)
        del recipe.tensors[name]
        with pytest.raises(CorruptModel, match=f"'{name}' is missing"):
            read(recipe, tmp_path)


def test_pickled_weights_are_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UnsupportedModel, match=r"pytorch_model\.bin.*convert them"):
        open_model(folder)
    with pytest.raises(UnsupportedModel, match=r"pytorch_model\.bin.*convert them"):
        open_model(folder / "pytorch_model.bin")


def test_what_is_no_regular_file_is_refused_without_being_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(UnsupportedModel, match="neither a regular file nor a folder"):
        open_model(tmp_path / "pipe.gguf")


def test_a_closed_model_gives_nothing_out(tmp_path: Path) -> None:
    model = open_model(make_folder("llama").write(tmp_path / "m"))
    model.close()
    with pytest.raises(ModelError, match="has been closed"):
        _ = model.tensors


def test_folders_that_hold_no_model_say_what_they_lack(tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match="no such file or folder"):
        open_model(tmp_path / "nothing")
    with pytest.raises(UnknownModel, match=r"holds neither model\.safetensors"):
        open_model(tmp_path)
    folder = make_folder("llama").write(tmp_path / "m")
    with pytest.raises(UnsupportedModel, match="give the folder"):
        open_model(folder / "model.safetensors")
    (folder / "config.json").unlink()
    with pytest.raises(UnsupportedModel, match=r"no config\.json"):
        open_model(folder)
    (tmp_path / "x.gguf").write_bytes(b"")
    with pytest.raises(UnsupportedModel, match=r"give the file itself.*x\.gguf"):
        open_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model.embed_tokens.weight": "model-00002-of-00002.safetensors"}, "not where it says"),
        ({"extra": "model-00001-of-00002.safetensors"}, "'extra' is not in"),
        ({"extra": "missing.safetensors"}, r"'missing\.safetensors' is missing"),
        ({"extra": "../elsewhere.safetensors"}, "is said to be in"),
        ({"extra": 3}, "is said to be in 3"),
    ],
)
def test_an_index_that_lies_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder = make_folder("llama").write(tmp_path / "m", shards=2)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= change
    path.write_text(json.dumps(index))
    with pytest.raises(CorruptModel, match=said):
        open_model(folder)


def test_json_may_neither_repeat_a_key_nor_nest_without_end(tmp_path: Path) -> None:
    folder = make_folder("llama").write(tmp_path / "m")
    (folder / "config.json").write_text('{"model_type": "llama", "model_type": "gemma3"}')
    with pytest.raises(CorruptModel, match="'model_type' appears twice"):
        open_model(folder)
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(CorruptModel, match=r"config\.json: not valid JSON"):
        open_model(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(CorruptModel, match="a JSON object was expected"):
        open_model(folder)
