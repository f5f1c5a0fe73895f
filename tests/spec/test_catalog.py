"""The built-in models have the sizes that their makers publish, and those of the files we read."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest

from places import get_model_path
from twostroke.errors import InvalidParameter, UnknownModel
from twostroke.spec.catalog import get_known_model, list_known_models
from twostroke.spec.quant import Format
from twostroke.weights.load import open_model

# As counted by each model's published files.
WEIGHTS = {
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "gemma3-270m": 268_098_176,
    "qwen2.5-7b": 7_615_616_512,
    "mistral-7b": 7_241_732_096,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "mixtral-8x7b": 46_702_792_704,
}


def test_every_model_has_its_published_number_of_weights() -> None:
    assert {name: get_known_model(name).num_weights for name in list_known_models()} == WEIGHTS


def test_llama_3_1_405b_by_formula() -> None:
    width, ffn, layers, kv = 16_384, 53_248, 126, 8 * 128
    layer = 2 * width * width + 2 * width * kv + 3 * width * ffn + 2 * width
    assert 2 * 128_256 * width + layers * layer + width == WEIGHTS["llama-3.1-405b"]


@pytest.mark.parametrize(
    ("name", "tokens", "kv_bytes"),
    [
        ("llama-2-13b", 4096, 3_355_443_200),
        ("llama-2-70b", 4096, 1_342_177_280),
        ("llama-3.1-8b", 1, 131_072),
        ("mixtral-8x7b", 1, 131_072),
    ],
)
def test_keys_and_values_weigh_what_is_published(name: str, tokens: int, kv_bytes: int) -> None:
    assert get_known_model(name).get_kv_bytes_per_token() * tokens == kv_bytes


@pytest.mark.real_model
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_a_built_in_model_is_what_its_file_says(name: str) -> None:
    with open_model(get_model_path(name)) as model:
        spec = model.spec
    built_in = get_known_model(name)
    [stored_eps] = struct.unpack("f", struct.pack("f", built_in.norm_eps))  # as a file has it
    assert replace(spec, name=name, formats=()) == replace(
        built_in, norm_eps=stored_eps, formats=()
    )


@pytest.mark.parametrize(
    ("weight_format", "bits"), [("bf16", 16), ("f16", 16), ("q8_0", 8.5), ("q4_0", 4.5)]
)
def test_the_format_chosen_decides_the_bytes(weight_format: str, bits: float) -> None:
    spec = get_known_model("llama-2-7b", weight_format)
    vectors = sum(each.num_weights for each in spec.tensors() if len(each.shape) == 1)
    matrices = spec.num_weights - vectors
    assert spec.weight_bytes == matrices * bits / 8 + vectors * (2 if bits == 16 else 4)


def test_routers_and_vectors_stay_whole_when_matrices_are_quantised() -> None:
    spec = get_known_model("mixtral-8x7b", "Q4_0")
    whole = {each.name.split(".")[-1] for each in spec.tensors() if each.format is Format.F32}
    assert whole == {"attn_norm", "ffn_norm", "final_norm", "router"}


def test_an_unknown_model_is_refused_with_those_there_are() -> None:
    with pytest.raises(UnknownModel, match=r"'llama-9' .*there are smollm2-135m, .*mixtral-8x7b"):
        get_known_model("llama-9")


def test_an_unknown_format_is_refused_with_those_there_are() -> None:
    with pytest.raises(InvalidParameter, match=r"weight_format: 'q3' is unknown.*f32, f16, bf16"):
        get_known_model("llama-2-7b", "q3")


def test_a_format_that_does_not_fill_rows_is_refused() -> None:
    with pytest.raises(InvalidParameter, match=r"rows of 576 weights.*blocks of 256"):
        get_known_model("smollm2-135m", "q4_k")
