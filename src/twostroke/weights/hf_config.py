"""A ModelSpec from the config.json of a Hugging Face folder.

It owns what transformers' model types llama, mistral, qwen2, qwen3, gemma3_text and gemma3 (its
text half) mean, in the spellings of transformers 4 and 5. A key that is neither read, checked nor
on the list of harmless ones is refused by name, unless it is null: it may change the arithmetic.
Where a key is absent its class's own default holds, because transformers may leave such keys out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twostroke.errors import CorruptModel, UnsupportedModel
from twostroke.spec.model import LayerSpec, ModelSpec, RopeLayout
from twostroke.weights.hf_known_keys import GEMMA3_OUTER, HARMLESS, MUST_EQUAL, UNDERSTOOD
from twostroke.weights.hf_rope import read_ropes
from twostroke.weights.json_file import read_json
from twostroke.weights.json_values import JsonValues


@dataclass(frozen=True, slots=True)
class _Family:
    """What sets a model type apart: keys only it has, and defaults of keys it may leave out."""

    name: str
    keys: frozenset[str] = frozenset()
    defaults: dict[str, Any] = field(default_factory=dict)


_QWEN_KEYS = frozenset({"use_sliding_window", "max_window_layers", "sliding_window", "layer_types"})
_GEMMA3 = _Family(
    "gemma3",
    frozenset(
        {
            "attention_bias",
            "hidden_activation",
            "layer_types",
            "query_pre_attn_scalar",
            "rope_local_base_freq",
            "sliding_window",
            "sliding_window_pattern",
            "_sliding_window_pattern",
        }
    ),
    {
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_theta": 1e6,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
    },
)
_FAMILIES = {
    "llama": _Family("llama", frozenset({"attention_bias", "mlp_bias"})),
    "mistral": _Family(
        "mistral",
        frozenset({"sliding_window"}),
        {"sliding_window": 4096, "num_key_value_heads": 8},
    ),
    "qwen2": _Family("qwen2", _QWEN_KEYS),
    "qwen3": _Family("qwen3", _QWEN_KEYS | {"attention_bias"}, {"head_dim": 128}),
    "gemma3_text": _GEMMA3,
    "gemma3": _GEMMA3,
}
_MOST_LAYERS = 10_000  # far beyond any model; keeps a lying count from filling memory
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def read_config(folder: Path) -> ModelSpec:
    """Read config.json; formats are still unknown and the head is as `tie_word_embeddings` says.

    Raises: UnsupportedModel for a model type, key or value we do not implement, CorruptModel for
    a missing key or a value of the wrong kind, UnknownModel if there is no config.json.
    """
    path = folder / "config.json"
    values = read_json(path)
    model_type = values.get("model_type")
    family = _FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        known = ", ".join(_FAMILIES)
        raise UnsupportedModel(f"{path}: model_type is {model_type!r}; supported are {known}")
    prefix = ""
    if model_type == "gemma3":
        values, prefix = _take_text_config(path, values), "text_config."
    _check_keys(path, family, values)
    return _read_spec(JsonValues(path, {**family.defaults, **values}, prefix), family, folder)


def _take_text_config(path: Path, outer: dict[str, Any]) -> dict[str, Any]:
    """The language half of a multimodal gemma3 configuration."""
    text = outer.get("text_config")
    if not isinstance(text, dict) or text.get("model_type", "gemma3_text") != "gemma3_text":
        raise CorruptModel(f"{path}: key 'text_config' does not describe a gemma3_text model")
    for key, value in outer.items():
        if key not in GEMMA3_OUTER and key not in HARMLESS and value is not None:
            raise UnsupportedModel(f"{path}: key '{key}' is not understood")
    tied = outer.get("tie_word_embeddings")
    return text if tied is None else {"tie_word_embeddings": tied, **text}


def _check_keys(path: Path, family: _Family, values: dict[str, Any]) -> None:
    """Refuse keys that are not understood and values that switch on what is not supported."""
    known = UNDERSTOOD | HARMLESS | family.keys
    for key, value in values.items():
        if key in MUST_EQUAL:
            if value not in (None, MUST_EQUAL[key]):
                raise UnsupportedModel(f"{path}: key '{key}' is {value!r}, which is not supported")
        elif key not in known and value is not None:
            hint = "it may change the arithmetic"
            raise UnsupportedModel(f"{path}: key '{key}' is not understood; {hint}")


def _read_spec(config: JsonValues, family: _Family, folder: Path) -> ModelSpec:
    gemma = family is _GEMMA3
    width = config.get_size("hidden_size")
    num_heads = config.get_size("num_attention_heads")
    num_kv_heads = config.get_size("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        config.refuse("num_key_value_heads", f"does not divide {num_heads} heads")
    head_dim = config.get_size("head_dim", width // num_heads)
    if head_dim % 2:
        config.refuse("head_dim", f"{head_dim} is odd and cannot rotate")
    scale_width = config.get_positive("query_pre_attn_scalar", 256.0) if gemma else float(head_dim)
    # q, k and v of qwen2 always have a bias, and its o never; elsewhere one key rules all four.
    bias = config.get_flag("attention_bias", False)
    return ModelSpec(
        family=family.name,
        name=folder.resolve().name,
        width=width,
        ffn_width=config.get_size("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=config.get_size("vocab_size"),
        context_tokens=config.get_size("max_position_embeddings"),
        norm_eps=config.get_positive("rms_norm_eps"),
        attention_scale=1 / math.sqrt(scale_width),
        rope_layout=RopeLayout.HALF,
        layers=_read_layers(config, family),
        activation=_read_activation(config, gemma),
        norm_offset=1.0 if gemma else 0.0,
        embed_scale=math.sqrt(width) if gemma else 1.0,
        qkv_bias=bias or family.name == "qwen2",
        output_bias=bias,
        ffn_bias=config.get_flag("mlp_bias", False),
        qk_norm=family.name in ("qwen3", "gemma3"),
        post_norms=gemma,
        tied_embeddings=config.get_flag("tie_word_embeddings", False),
    )


def _read_activation(config: JsonValues, gemma: bool) -> str:
    """The FFN's activation; a family is only known with its own."""
    wanted = "gelu_pytorch_tanh" if gemma else "silu"
    for key in ("hidden_activation", "hidden_act"):
        name = config.get_text(key, wanted)
        if name != wanted:
            config.refuse_unsupported(key, f"is '{name}'; supported here is {wanted}")
    return _ACTIVATIONS[wanted]


def _read_layers(config: JsonValues, family: _Family) -> tuple[LayerSpec, ...]:
    """Window and rope of every layer."""
    count = config.get_size("num_hidden_layers", most=_MOST_LAYERS)
    full_rope, sliding_rope = read_ropes(config, sliding_has_own=family is _GEMMA3)
    sliding = _read_sliding(config, family, count)
    window = None
    if any(sliding):
        window = config.get_size("sliding_window")
    full, local = LayerSpec(full_rope), LayerSpec(sliding_rope, window)
    return tuple(local if slides else full for slides in sliding)


def _read_sliding(config: JsonValues, family: _Family, count: int) -> list[bool]:
    """Which layers see a window only."""
    if family.name in ("qwen2", "qwen3") and not config.get_flag("use_sliding_window", False):
        return [False] * count
    if config.has("layer_types"):
        return _read_layer_types(config, count)
    if family.name == "mistral":
        return [config.has("sliding_window")] * count
    if family.name in ("qwen2", "qwen3"):
        first = config.get_size("max_window_layers", 28, least=0)
        return [config.has("sliding_window") and index >= first for index in range(count)]
    if family is _GEMMA3:
        old, new = "sliding_window_pattern", "_sliding_window_pattern"
        period = config.get_size(new if config.has(new) else old, 6)
        return [(index + 1) % period != 0 for index in range(count)]
    return [False] * count


def _read_layer_types(config: JsonValues, count: int) -> list[bool]:
    names = {"full_attention": False, "sliding_attention": True}
    types = config.get_list("layer_types")
    if len(types) != count:
        config.refuse("layer_types", f"has {len(types)} items for {count} layers")
    for each in types:
        if not isinstance(each, str) or each not in names:
            config.refuse_unsupported("layer_types", f"has {each!r}; known are {', '.join(names)}")
    return [names[each] for each in types]
