"""ModelSpec counts what real models are known to have."""

from __future__ import annotations

from dataclasses import replace

import pytest

from twostroke.spec.kv import KvElement
from twostroke.spec.model import LayerSpec, ModelSpec, RopeLayout, RopeSpec, ShardAxis
from twostroke.spec.quant import Format

TINY = ModelSpec(
    family="llama",
    name="tiny",
    width=64,
    ffn_width=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    vocab_size=40,
    context_tokens=128,
    norm_eps=1e-5,
    attention_scale=32**-0.5,
    rope_layout=RopeLayout.HALF,
    layers=(LayerSpec(RopeSpec(1e4)),) * 2,
)
EVERYTHING = replace(
    TINY,
    qkv_bias=True,
    output_bias=True,
    ffn_bias=True,
    qk_norm=True,
    post_norms=True,
    tied_embeddings=False,
    stored_rope_factors=True,
)


def make(sizes: tuple[int, int, int, int, int, int, int], **facts: bool) -> ModelSpec:
    """A spec from layers, width, ffn, heads, kv heads, head size, vocabulary."""
    layers, width, ffn, heads, kv_heads, head_dim, vocab = sizes
    return replace(
        TINY,
        layers=TINY.layers[:1] * layers,
        width=width,
        ffn_width=ffn,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        **facts,
    )


@pytest.mark.parametrize(
    ("spec", "weights"),
    [
        (make((30, 576, 1536, 9, 3, 64, 49152)), 134_515_008),  # SmolLM2-135M
        (
            make((32, 4096, 14336, 32, 8, 128, 128256), tied_embeddings=False),
            8_030_261_248,  # Llama-3.1-8B
        ),
        (
            make((32, 4096, 14336, 32, 8, 128, 32000), tied_embeddings=False),
            7_241_732_096,  # Mistral-7B-v0.1
        ),
        (make((24, 896, 4864, 14, 2, 64, 151936), qkv_bias=True), 494_032_768),  # Qwen2.5-0.5B
        (make((28, 1024, 3072, 16, 8, 128, 151936), qk_norm=True), 596_049_920),  # Qwen3-0.6B
        (
            make((18, 640, 2048, 4, 1, 256, 262144), qk_norm=True, post_norms=True),
            268_098_176,  # Gemma-3-270M
        ),
    ],
)
def test_weights_are_counted_as_the_models_makers_count_them(spec: ModelSpec, weights: int) -> None:
    assert spec.num_weights == weights


def test_no_two_tensors_share_a_name() -> None:
    names = [tensor.name for tensor in EVERYTHING.tensors()]
    assert len(set(names)) == len(names)


def test_each_fact_adds_the_tensors_it_names() -> None:
    plain = {tensor.name for tensor in TINY.tensors()}
    added = {
        "qkv_bias": {f"layers.{layer}.{part}.bias" for layer in (0, 1) for part in "qkv"},
        "output_bias": {"layers.0.o.bias", "layers.1.o.bias"},
        "ffn_bias": {
            f"layers.{layer}.{part}.bias" for layer in (0, 1) for part in ("gate", "up", "down")
        },
        "qk_norm": {f"layers.{layer}.{part}_norm" for layer in (0, 1) for part in "qk"},
        "post_norms": {
            f"layers.{layer}.post_{part}_norm" for layer in (0, 1) for part in ("attn", "ffn")
        },
        "stored_rope_factors": {"rope_factors"},
    }
    for fact, names in added.items():
        changed = {tensor.name for tensor in replace(TINY, **{fact: True}).tensors()}
        assert changed - plain == names
    untied = {tensor.name for tensor in replace(TINY, tied_embeddings=False).tensors()}
    assert untied - plain == {"head"}


def test_experts_take_the_place_of_the_one_ffn() -> None:
    names = {tensor.name for tensor in TINY.tensors()}
    mixture = replace(TINY, num_experts=3, experts_per_token=2, ffn_bias=True)
    dense = {f"layers.{layer}.{part}" for layer in (0, 1) for part in ("gate", "up", "down")}
    experts = {
        name.replace(part, f"experts.{expert}.{part}{suffix}")
        for name in dense
        for part in [name.split(".")[-1]]
        for expert in range(3)
        for suffix in ("", ".bias")
    }
    routers = {"layers.0.router", "layers.1.router"}
    assert {tensor.name for tensor in mixture.tensors()} == names - dense | experts | routers
    shapes = {tensor.name: tensor.shape for tensor in mixture.tensors()}
    assert shapes["layers.1.router"] == (3, 64)
    assert shapes["layers.1.experts.2.down"] == (64, 96)


def test_tensors_come_in_forward_order() -> None:
    names = [tensor.name for tensor in EVERYTHING.tensors()]
    assert names[0] == "embed"
    assert names[-2:] == ["final_norm", "head"]
    layers = [name.split(".")[1] for name in names if name.startswith("layers.")]
    assert layers == sorted(layers)


def test_formats_decide_the_bytes_and_absent_ones_are_bfloat16() -> None:
    spec = replace(TINY, formats=(("embed", Format.Q8_0),))
    by_name = {tensor.name: tensor for tensor in spec.tensors()}
    assert by_name["embed"].bytes == 40 * 64 // 32 * 34
    assert by_name["layers.0.q"].bytes == 2 * 4 * 32 * 64
    assert spec.weight_bytes == sum(tensor.bytes for tensor in by_name.values())
    assert spec.num_weights == TINY.num_weights


def test_a_column_shard_divides_outputs_and_a_row_shard_inputs() -> None:
    axes = {tensor.name: tensor.shard for tensor in EVERYTHING.tensors()}
    for part in ("q", "k", "v", "gate", "up", "q.bias", "gate.bias"):
        assert axes[f"layers.0.{part}"] is ShardAxis.COLUMN
    for part in ("o", "down"):
        assert axes[f"layers.0.{part}"] is ShardAxis.ROW
        # Added once, after the partial sums: no rank may hold a share of it.
        assert axes[f"layers.0.{part}.bias"] is ShardAxis.NONE
    assert axes["layers.0.attn_norm"] is ShardAxis.NONE
    assert axes["embed"] is axes["head"] is ShardAxis.COLUMN


def test_kv_bytes_count_keys_and_values_of_every_layer() -> None:
    assert TINY.get_kv_bytes_per_token() == 2 * 2 * (2 * 32) * 2
    assert TINY.get_kv_bytes_per_token(KvElement.F32) == 2 * TINY.get_kv_bytes_per_token()
    assert TINY.get_kv_bytes_per_token(KvElement.INT8) == 2 * 2 * 2 * (32 + 4)
