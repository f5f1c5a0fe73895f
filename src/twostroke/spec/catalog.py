"""Well-known models as ModelSpecs, so that planner and simulator need no file.

Owns published architectures, each from its authors' paper and configuration file; holds no weights
and says nothing of where they are. Every model is described as the GGUF reader would describe its
file: mistral and mixtral are of the llama family, llama's pairs are interleaved, gemma's norms have
their 1 added. Left out are models that a ModelSpec cannot describe: GPT-3 has learned positions,
norms with a mean and a bias, and a feed-forward layer without a gate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from twostroke.errors import InvalidParameter, UnknownModel
from twostroke.spec.model import (
    LayerSpec,
    Llama3Scaling,
    ModelSpec,
    RopeLayout,
    RopeSpec,
    TensorSpec,
)
from twostroke.spec.quant import Format


@dataclass(frozen=True, slots=True)
class _Sizes:
    """The numbers that a model's configuration file gives; `heads` are (queries', keys')."""

    layers: int
    width: int
    ffn_width: int
    heads: tuple[int, int]
    vocab_size: int
    context_tokens: int


_LLAMA_3_1_ROPE = RopeSpec(500_000.0, Llama3Scaling(8.0, 1.0, 4.0, 8192))


def _make_llama(name: str, sizes: _Sizes, layer: LayerSpec, tied_embeddings: bool) -> ModelSpec:
    num_heads, num_kv_heads = sizes.heads
    head_dim = sizes.width // num_heads
    return ModelSpec(
        family="llama",
        name=name,
        width=sizes.width,
        ffn_width=sizes.ffn_width,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=sizes.vocab_size,
        context_tokens=sizes.context_tokens,
        norm_eps=1e-5,
        attention_scale=head_dim**-0.5,
        rope_layout=RopeLayout.INTERLEAVED,
        layers=(layer,) * sizes.layers,
        tied_embeddings=tied_embeddings,
    )


def _make_smollm2(name: str, sizes: _Sizes, rope_base: float) -> ModelSpec:
    """SmolLM2 (Ben Allal et al. 2025)."""
    return _make_llama(name, sizes, LayerSpec(RopeSpec(rope_base)), True)


def _make_llama_2(name: str, sizes: _Sizes) -> ModelSpec:
    """Llama 2 (Touvron et al. 2023, table 1)."""
    return _make_llama(name, sizes, LayerSpec(RopeSpec(10_000.0)), False)


def _make_llama_3_1(name: str, sizes: _Sizes) -> ModelSpec:
    """Llama 3.1 (Grattafiori et al. 2024, table 3)."""
    return _make_llama(name, sizes, LayerSpec(_LLAMA_3_1_ROPE), False)


def _make_mistral(name: str) -> ModelSpec:
    """Mistral 7B as first released (Jiang et al. 2023, table 1), with its sliding window."""
    sizes = _Sizes(32, 4096, 14_336, (32, 8), 32_000, 32_768)
    return _make_llama(name, sizes, LayerSpec(RopeSpec(10_000.0), window=4096), False)


def _make_mixtral(name: str) -> ModelSpec:
    """Mixtral of eight experts (Jiang et al. 2024, table 1)."""
    sizes = _Sizes(32, 4096, 14_336, (32, 8), 32_000, 32_768)
    dense = _make_llama(name, sizes, LayerSpec(RopeSpec(1e6)), False)
    return replace(dense, num_experts=8, experts_per_token=2)


def _make_qwen_2_5(name: str) -> ModelSpec:
    """Qwen2.5 (Yang et al. 2024): q, k and v with biases, each head's halves rotated together."""
    sizes = _Sizes(28, 3584, 18_944, (28, 4), 152_064, 32_768)
    llama = _make_llama(name, sizes, LayerSpec(RopeSpec(1e6)), False)
    return replace(llama, family="qwen2", norm_eps=1e-6, rope_layout=RopeLayout.HALF, qkv_bias=True)


def _make_gemma_3_270m(name: str) -> ModelSpec:
    """Gemma 3 (Gemma Team 2025, §2): every sixth layer sees all, the others a window."""
    sliding, whole = LayerSpec(RopeSpec(10_000.0), 512), LayerSpec(RopeSpec(1e6))
    return ModelSpec(
        family="gemma3",
        name=name,
        width=640,
        ffn_width=2048,
        num_heads=4,
        num_kv_heads=1,
        head_dim=256,
        vocab_size=262_144,
        context_tokens=32_768,
        norm_eps=1e-6,
        attention_scale=256**-0.5,
        rope_layout=RopeLayout.HALF,
        layers=((sliding,) * 5 + (whole,)) * 3,
        activation="gelu_tanh",
        embed_scale=math.sqrt(640),
        qk_norm=True,
        post_norms=True,
    )


def _make_specs() -> Mapping[str, ModelSpec]:
    made = (
        _make_smollm2("smollm2-135m", _Sizes(30, 576, 1536, (9, 3), 49_152, 8192), 100_000.0),
        _make_smollm2("smollm2-360m", _Sizes(32, 960, 2560, (15, 5), 49_152, 8192), 100_000.0),
        _make_smollm2("smollm2-1.7b", _Sizes(24, 2048, 8192, (32, 32), 49_152, 8192), 130_000.0),
        _make_gemma_3_270m("gemma3-270m"),
        _make_qwen_2_5("qwen2.5-7b"),
        _make_mistral("mistral-7b"),
        _make_llama_2("llama-2-7b", _Sizes(32, 4096, 11_008, (32, 32), 32_000, 4096)),
        _make_llama_2("llama-2-13b", _Sizes(40, 5120, 13_824, (40, 40), 32_000, 4096)),
        _make_llama_2("llama-2-70b", _Sizes(80, 8192, 28_672, (64, 8), 32_000, 4096)),
        _make_llama_3_1("llama-3.1-8b", _Sizes(32, 4096, 14_336, (32, 8), 128_256, 131_072)),
        _make_llama_3_1("llama-3.1-70b", _Sizes(80, 8192, 28_672, (64, 8), 128_256, 131_072)),
        _make_llama_3_1("llama-3.1-405b", _Sizes(126, 16_384, 53_248, (128, 8), 128_256, 131_072)),
        _make_mixtral("mixtral-8x7b"),
    )
    return {spec.name: spec for spec in made}


def list_known_models() -> tuple[str, ...]:
    """Names that `get_known_model` takes."""
    return tuple(_make_specs())


def get_known_model(name: str, weight_format: str = "bf16") -> ModelSpec:
    """A built-in description by name, all matrices stored in `weight_format`.

    weight_format: a Format's name in any case, such as "bf16" or "q4_0". With a quantised one the
    embedding and head are quantised too, and vectors and routers are float32, as files have them.
    Raises: UnknownModel listing what there is; InvalidParameter for a format that is unknown or
    whose blocks do not fill the model's rows.
    """
    specs = _make_specs()
    if name not in specs:
        raise UnknownModel(
            f"{name!r} is no built-in model description; there are {', '.join(specs)}"
        )
    return set_weight_format(specs[name], weight_format)


def set_weight_format(spec: ModelSpec, weight_format: str) -> ModelSpec:
    """`spec` with all matrices in one format; see `get_known_model`."""
    chosen = parse_format(weight_format)

    def choose(tensor: TensorSpec) -> Format:
        if not chosen.is_quantised:
            return chosen
        if len(tensor.shape) == 1 or tensor.name.endswith(".router"):
            return Format.F32
        if tensor.shape[1] % chosen.block.weights:
            problem = f"{tensor.name} of {spec.name} has rows of {tensor.shape[1]} weights, which"
            hint = f"do not fill {chosen.value} blocks of {chosen.block.weights}"
            raise InvalidParameter("weight_format", f"{problem} {hint}; take q8_0 or q4_0")
        return chosen

    formats = tuple((tensor.name, choose(tensor)) for tensor in spec.tensors())
    return replace(spec, formats=formats)


def parse_format(name: str) -> Format:
    """A Format by its name in any case; InvalidParameter lists those there are."""
    for each in Format:
        if each.value.lower() == name.lower():
            return each
    known = ", ".join(each.value.lower() for each in Format)
    raise InvalidParameter("weight_format", f"{name!r} is unknown; there are {known}")
