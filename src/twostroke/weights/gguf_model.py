"""A ModelSpec, and tensors under their canonical names, from a GGUF file.

It owns what llama.cpp's architectures llama (Mistral's files say llama as well), qwen2, qwen3
and gemma3 mean. Every key under the architecture's own prefix is either understood here or
refused by name, because such keys change the arithmetic.

What GGUF has already done to the weights: q and k of the llama architecture are permuted so that
neighbours rotate together, and gemma's norm weights already have their 1 added.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from twostroke.errors import CorruptModel, UnsupportedModel
from twostroke.spec.model import (
    LayerSpec,
    LinearScaling,
    ModelSpec,
    RopeLayout,
    RopeScaling,
    RopeSpec,
    StoredFactors,
)
from twostroke.spec.vocabulary import Vocabulary
from twostroke.weights.binding import StoredTensor, bind_tensors
from twostroke.weights.gguf import GGUFFile, ValueType, read_gguf
from twostroke.weights.gguf_metadata import Metadata
from twostroke.weights.gguf_vocabulary import check_vocabulary, read_vocabulary
from twostroke.weights.mapping import FileIdentity
from twostroke.weights.tensor import HostTensor

# Keys under `<architecture>.` that are read or checked below, and those that change nothing.
_UNDERSTOOD = frozenset(
    {
        "context_length",
        "embedding_length",
        "block_count",
        "feed_forward_length",
        "vocab_size",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_rms_epsilon",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scaling.type",
        "rope.scaling.factor",
    }
)
_HARMLESS = frozenset(
    {
        "tensor_data_layout",  # says that llama's q and k are permuted, which they always are
        "rope.scaling.original_context_length",  # of use to yarn only
        "rope.scaling.finetuned",
    }
)
_OF_ARCHITECTURE = {
    "llama": frozenset({"attention.sliding_window"}),
    "qwen2": frozenset[str](),
    "qwen3": frozenset[str](),
    "gemma3": frozenset(
        {"attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa"}
    ),
}
# Keys that are fine as long as they switch nothing on.
_MUST_BE_ZERO = frozenset(
    {"expert_count", "expert_used_count", "attn_logit_softcapping", "final_logit_softcapping"}
)

_GEMMA3_27B_LAYERS = 62

_TOP = {
    "embed": "token_embd.weight",
    "final_norm": "output_norm.weight",
    "head": "output.weight",
    "rope_factors": "rope_freqs.weight",
}
_IN_LAYER = {
    "attn_norm": "attn_norm.weight",
    "q": "attn_q.weight",
    "k": "attn_k.weight",
    "v": "attn_v.weight",
    "o": "attn_output.weight",
    "q.bias": "attn_q.bias",
    "k.bias": "attn_k.bias",
    "v.bias": "attn_v.bias",
    "o.bias": "attn_output.bias",
    "q_norm": "attn_q_norm.weight",
    "k_norm": "attn_k_norm.weight",
    "post_attn_norm": "post_attention_norm.weight",
    "ffn_norm": "ffn_norm.weight",
    "gate": "ffn_gate.weight",
    "up": "ffn_up.weight",
    "down": "ffn_down.weight",
    "gate.bias": "ffn_gate.bias",
    "up.bias": "ffn_up.bias",
    "down.bias": "ffn_down.bias",
    "post_ffn_norm": "post_ffw_norm.weight",
}
_TOP_BY_SOURCE = {source: name for name, source in _TOP.items()}
_IN_LAYER_BY_SOURCE = {source: name for name, source in _IN_LAYER.items()}
_LAYER_NAME = re.compile(r"blk\.(0|[1-9][0-9]{0,6})\.(.+)")


@dataclass(frozen=True, slots=True, eq=False)
class GGUFModel:
    """A GGUF file understood: the model's facts, its tensors, and the file behind both."""

    file: GGUFFile
    spec: ModelSpec
    tensors: Mapping[str, HostTensor]

    @property
    def identities(self) -> tuple[FileIdentity, ...]:
        """The one file."""
        return (self.file.identity,)

    @property
    def file_bytes(self) -> int:
        """Size of the file."""
        return self.file.file_bytes

    @property
    def unused_bytes(self) -> int:
        """Tensor bytes the model has no use for: none, such files are refused."""
        return self.file.tensor_bytes - self.spec.weight_bytes

    def read_vocabulary(self) -> Vocabulary:
        """Build the vocabulary; see gguf_vocabulary."""
        return read_vocabulary(Metadata(self.file))


def read_gguf_model(path: Path) -> GGUFModel:
    """Read the facts and map the tensors of a GGUF model; no weight is touched.

    Raises: CorruptModel or UnsupportedModel, naming key or tensor.
    """
    file = read_gguf(path)
    metadata = Metadata(file)
    architecture = _check_architecture(metadata)
    _check_keys(metadata, architecture)
    stored = _name_tensors(file)
    spec = _read_spec(metadata, architecture, stored)
    check_vocabulary(metadata, spec.vocab_size)
    spec, tensors = bind_tensors(path, spec, stored, _get_source)
    assert spec.weight_bytes == file.tensor_bytes
    return GGUFModel(file, spec, tensors)


def _check_architecture(metadata: Metadata) -> str:
    kind = metadata.get_text("general.type", "model")
    if kind != "model":
        metadata.refuse_unsupported("general.type", f"is '{kind}': the file is not a whole model")
    if metadata.has("split.count") and metadata.get_size("split.count", least=0) > 1:
        hint = "merge the parts with llama-gguf-split --merge"
        metadata.refuse_unsupported("split.count", f"says the model is in several files; {hint}")
    architecture = metadata.get_text("general.architecture")
    if architecture not in _OF_ARCHITECTURE:
        known = ", ".join(_OF_ARCHITECTURE)
        problem = f"is '{architecture}'; supported are {known}"
        metadata.refuse_unsupported("general.architecture", problem)
    return architecture


def _check_keys(metadata: Metadata, architecture: str) -> None:
    """Refuse any key of the architecture that is not understood."""
    prefix = architecture + "."
    known = _UNDERSTOOD | _HARMLESS | _OF_ARCHITECTURE[architecture]
    for key, entry in metadata.file.entries.items():
        if not key.startswith(prefix) or key.removeprefix(prefix) in known:
            continue
        name = key.removeprefix(prefix)
        if name == "attention.causal" and entry.value is True:
            continue
        if name not in _MUST_BE_ZERO:
            metadata.refuse_unsupported(key, "is not understood; it may change the arithmetic")
        if entry.value != 0:
            metadata.refuse_unsupported(key, f"is {entry.value}, which is not supported")


def _name_tensors(file: GGUFFile) -> dict[str, StoredTensor]:
    """The file's tensors by canonical name; an unknown name is refused."""
    stored = {}
    for source, info in file.tensors.items():
        name = _TOP_BY_SOURCE.get(source)
        match = _LAYER_NAME.fullmatch(source)
        if match and match[2] in _IN_LAYER_BY_SOURCE:
            name = f"layers.{match[1]}.{_IN_LAYER_BY_SOURCE[match[2]]}"
        if name is None:
            hint = "it belongs to a model of another kind"
            raise UnsupportedModel(f"{file.path}: tensor '{source}' is not understood; {hint}")
        data = file.get_data(source)
        stored[name] = StoredTensor(source, info.shape, info.format, data, info.offset)
    return stored


def _get_source(name: str) -> str:
    """The GGUF name of a canonical tensor."""
    if name in _TOP:
        return _TOP[name]
    _, layer, rest = name.split(".", 2)
    return f"blk.{layer}.{_IN_LAYER[rest]}"


def _read_spec(metadata: Metadata, architecture: str, stored: dict[str, StoredTensor]) -> ModelSpec:
    """Everything but the formats."""
    key = f"{architecture}.{{}}".format
    gemma = architecture == "gemma3"
    width = metadata.get_size(key("embedding_length"))
    num_heads = metadata.get_size(key("attention.head_count"))
    num_kv_heads = metadata.get_size(key("attention.head_count_kv"), num_heads)
    head_dim = _read_head_dim(metadata, architecture, width, num_heads)
    if num_heads % num_kv_heads:
        problem = f"is {num_kv_heads}, which does not divide {num_heads} heads"
        metadata.refuse(key("attention.head_count_kv"), problem)
    layers = _read_layers(metadata, architecture, stored)
    scale_width = head_dim
    if gemma and len(layers) == _GEMMA3_27B_LAYERS:
        # The 27B model alone scales by width/heads (168) and not by its head size (128). GGUF
        # has no key for it; llama.cpp knows the model by its number of layers, and so do we.
        scale_width = width // num_heads
    return ModelSpec(
        family=architecture,
        name=metadata.get_text("general.name", metadata.file.path.stem),
        width=width,
        ffn_width=metadata.get_size(key("feed_forward_length")),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=_read_vocab_size(metadata, architecture, stored),
        context_tokens=metadata.get_size(key("context_length")),
        norm_eps=metadata.get_positive(key("attention.layer_norm_rms_epsilon")),
        attention_scale=1 / math.sqrt(scale_width),
        rope_layout=RopeLayout.INTERLEAVED if architecture == "llama" else RopeLayout.HALF,
        layers=layers,
        activation="gelu_tanh" if gemma else "silu",
        embed_scale=math.sqrt(width) if gemma else 1.0,
        qkv_bias="layers.0.q.bias" in stored or architecture == "qwen2",
        output_bias="layers.0.o.bias" in stored,
        ffn_bias="layers.0.down.bias" in stored,
        qk_norm=architecture in ("qwen3", "gemma3"),
        post_norms=gemma,
        tied_embeddings="head" not in stored,
        stored_rope_factors="rope_factors" in stored,
    )


def _read_head_dim(metadata: Metadata, architecture: str, width: int, num_heads: int) -> int:
    """Head size, the same for queries, keys, values and rotation."""
    prefix = f"{architecture}.attention."
    if not metadata.has(prefix + "key_length") and width % num_heads:
        metadata.refuse(prefix + "head_count", f"is {num_heads}, which does not divide {width}")
    head_dim = metadata.get_size(prefix + "key_length", width // num_heads)
    same = (prefix + "value_length", f"{architecture}.rope.dimension_count")
    for key in same:
        if metadata.get_size(key, head_dim) != head_dim:
            problem = f"differs from the head size {head_dim}, which is not supported"
            metadata.refuse_unsupported(key, problem)
    if head_dim % 2:
        raise CorruptModel(f"{metadata.file.path}: an odd head size of {head_dim} cannot rotate")
    return head_dim


def _read_vocab_size(metadata: Metadata, architecture: str, stored: dict[str, StoredTensor]) -> int:
    """Rows of the embedding table, which the key, where there is one, must confirm."""
    key = f"{architecture}.vocab_size"
    rows = stored["embed"].shape[0] if "embed" in stored else None
    return metadata.get_size(key, rows) if rows is not None else metadata.get_size(key)


def _read_layers(
    metadata: Metadata, architecture: str, stored: dict[str, StoredTensor]
) -> tuple[LayerSpec, ...]:
    """Window and rope of every layer."""
    count_key = f"{architecture}.block_count"
    count = metadata.get_size(count_key)
    if count > len(stored):
        metadata.refuse(count_key, f"is {count}, but the file has {len(stored)} tensors")
    base = metadata.get_positive(f"{architecture}.rope.freq_base", 10000.0)
    scaling = _read_scaling(metadata, architecture, "rope_factors" in stored)
    whole = RopeSpec(base, scaling)
    window_key = f"{architecture}.attention.sliding_window"
    window = metadata.get_size(window_key, 0, least=0)
    if not window:
        return (LayerSpec(whole),) * count
    if architecture != "gemma3":
        return (LayerSpec(whole, window),) * count
    # Sliding layers rotate by their own base and are never scaled (Gemma 3 report, §2).
    local = LayerSpec(RopeSpec(metadata.get_positive("gemma3.rope.freq_base_swa", 1e4)), window)
    sliding = _read_sliding(metadata, count)
    return tuple(local if slides else LayerSpec(whole) for slides in sliding)


def _read_sliding(metadata: Metadata, count: int) -> list[bool]:
    """Which of gemma3's layers slide: all but every 6th, or as the file's pattern says."""
    key = "gemma3.attention.sliding_window_pattern"
    if metadata.has(key) and metadata.file.entries[key].type is ValueType.ARRAY:
        return [bool(each) for each in metadata.get_numbers(key, count, ValueType.BOOL)]
    period = metadata.get_size(key, 6)
    return [(index + 1) % period != 0 for index in range(count)]


def _read_scaling(metadata: Metadata, architecture: str, stored_factors: bool) -> RopeScaling:
    """Rope scaling: none, linear, or the factors the file stores."""
    prefix = f"{architecture}.rope.scaling."
    kind = metadata.get_text(prefix + "type", "linear")
    if kind not in ("none", "linear"):
        problem = f"is '{kind}'; supported are none, linear and stored factors"
        metadata.refuse_unsupported(prefix + "type", problem)
    factor = metadata.get_positive(prefix + "factor", 1.0)
    linear = kind == "linear" and factor != 1.0
    if linear and stored_factors:
        problem = "is set although the file stores 'rope_freqs.weight', which scales already"
        metadata.refuse_unsupported(prefix + "factor", problem)
    if stored_factors:
        return StoredFactors()
    return LinearScaling(factor) if linear else None
