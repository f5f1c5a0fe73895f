"""A ModelSpec, and tensors under their canonical names, from a Hugging Face folder.

It reads config.json beside model.safetensors, or beside an index that names several shards. Only
safetensors are read: pickled weights are refused, because reading them can run code.

Tensors the model does not need are few, named here, and counted as unused: an `lm_head.weight`
beside tied embeddings (transformers ties them on loading, so the copy is dead), rotary
frequencies saved as buffers, and the vision half of a multimodal gemma3.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twostroke.errors import CorruptModel, UnknownModel, UnsupportedModel
from twostroke.spec.model import ModelSpec
from twostroke.spec.vocabulary import Vocabulary
from twostroke.weights.binding import StoredTensor, bind_tensors
from twostroke.weights.hf_config import read_config
from twostroke.weights.hf_vocabulary import read_vocabulary
from twostroke.weights.json_file import read_json
from twostroke.weights.mapping import FileIdentity
from twostroke.weights.safetensors_file import read_safetensors
from twostroke.weights.tensor import HostTensor

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"

_TOP = {
    "embed": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
}
_IN_LAYER = {
    "attn_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "q.bias": "self_attn.q_proj.bias",
    "k.bias": "self_attn.k_proj.bias",
    "v.bias": "self_attn.v_proj.bias",
    "o.bias": "self_attn.o_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
    "gate.bias": "mlp.gate_proj.bias",
    "up.bias": "mlp.up_proj.bias",
    "down.bias": "mlp.down_proj.bias",
}
# gemma3 norms on both sides, and gives the name the others use for the FFN's norm to another one.
_IN_LAYER_WITH_POST_NORMS = {
    **_IN_LAYER,
    "post_attn_norm": "post_attention_layernorm.weight",
    "ffn_norm": "pre_feedforward_layernorm.weight",
    "post_ffn_norm": "post_feedforward_layernorm.weight",
}
_LAYER_NAME = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,6})\.(.+)")
# Where multimodal gemma3 files keep their language half: transformers 4's way, then 5's.
_TEXT_PREFIXES = (("language_model.", ""), ("model.language_model.", "model."))
_VISION = ("vision_tower.", "multi_modal_projector.")
_ROTARY_BUFFER = re.compile(r"model\.(layers\.[0-9]+\.self_attn\.)?rotary_emb\.inv_freq")


@dataclass(frozen=True, slots=True, eq=False)
class SafetensorsModel:
    """A folder understood. unused_bytes: of stored tensors that the model does not need.

    identities: the weight files.
    """

    folder: Path
    spec: ModelSpec
    tensors: Mapping[str, HostTensor]
    identities: tuple[FileIdentity, ...]
    unused_bytes: int

    @property
    def file_bytes(self) -> int:
        """Size of the weight files."""
        return sum(file.size for file in self.identities)

    def read_vocabulary(self) -> Vocabulary:
        """Build the vocabulary; see hf_vocabulary."""
        return read_vocabulary(self.folder, self.spec.vocab_size)


def read_safetensors_model(folder: Path) -> SafetensorsModel:
    """Read the facts and map the tensors of a Hugging Face folder; no weight is touched.

    Raises: UnknownModel, CorruptModel or UnsupportedModel, naming file and key or tensor.
    """
    _check_folder(folder)
    spec = read_config(folder)
    found, identities = _read_tensors(folder)
    stored: dict[str, StoredTensor] = {}
    unused_bytes = 0
    for source, tensor in found.items():
        if _is_unused(source, spec):
            unused_bytes += tensor.data.size
            continue
        name = _get_canonical(source, spec)
        if name is None:
            raise UnsupportedModel(f"{folder}: tensor '{source}' is not understood")
        if name in stored:
            raise CorruptModel(f"{folder}: '{source}' and '{stored[name].source}' are the same")
        stored[name] = tensor
    unused_bytes += _drop_tied_head(folder, spec, stored)
    spec, tensors = bind_tensors(folder, spec, stored, lambda name: _get_source(name, spec))
    return SafetensorsModel(folder, spec, tensors, identities, unused_bytes)


def _check_folder(folder: Path) -> None:
    """Say what is wrong with a folder that holds no safetensors model."""
    has_weights = (folder / _SINGLE).exists() or (folder / _INDEX).exists()
    if has_weights and (folder / "config.json").exists():
        return
    if has_weights:
        raise UnsupportedModel(f"{folder}: there is no config.json beside the weights")
    names = sorted(each.name for each in folder.iterdir())
    for name in names:
        if name.endswith(".gguf"):
            raise UnsupportedModel(f"{folder}: a folder; give the file itself, {folder / name}")
    for name in names:
        if name.endswith((".bin", ".pt", ".pth")):
            hint = "pickled weights can run code when read; convert them to safetensors"
            raise UnsupportedModel(f"{folder / name}: {hint}")
    raise UnknownModel(f"{folder}: holds neither {_SINGLE} nor {_INDEX}")


def _read_tensors(
    folder: Path,
) -> tuple[dict[str, StoredTensor], tuple[FileIdentity, ...]]:
    """All tensors of the folder by their names there, and the files."""
    if (folder / _SINGLE).exists():
        file = read_safetensors(folder / _SINGLE)
        return file.tensors, (file.identity,)
    index = folder / _INDEX
    where = _read_weight_map(index)
    found: dict[str, StoredTensor] = {}
    identities: list[FileIdentity] = []
    for shard in sorted(set(where.values())):
        if not (folder / shard).is_file():
            raise CorruptModel(f"{folder}: shard '{shard}' is missing; {_INDEX} names it")
        file = read_safetensors(folder / shard)
        for name in file.tensors:
            if where.get(name) != shard:
                raise CorruptModel(f"{index}: tensor '{name}' is in {shard}, not where it says")
        found |= file.tensors
        identities.append(file.identity)
    for name, shard in where.items():
        if name not in found:
            raise CorruptModel(f"{index}: tensor '{name}' is not in {shard}")
    return found, tuple(identities)


def _read_weight_map(index: Path) -> dict[str, str]:
    """Which shard, a file name without a path, holds each tensor."""
    weight_map: Any = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptModel(f"{index}: key 'weight_map' is missing or no object")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CorruptModel(f"{index}: tensor '{name}' is said to be in {shard!r}")
    return weight_map


def _strip_prefix(source: str, spec: ModelSpec) -> str:
    """The name a tensor has in a model of text only."""
    if spec.family == "gemma3":
        for prefix, replacement in _TEXT_PREFIXES:
            if source.startswith(prefix):
                return replacement + source.removeprefix(prefix)
    return source


def _is_unused(source: str, spec: ModelSpec) -> bool:
    vision = spec.family == "gemma3" and source.removeprefix("model.").startswith(_VISION)
    return vision or _ROTARY_BUFFER.fullmatch(_strip_prefix(source, spec)) is not None


def _get_canonical(source: str, spec: ModelSpec) -> str | None:
    """The canonical name of a stored tensor, or None if it means nothing."""
    plain = _strip_prefix(source, spec)
    for name, each in _TOP.items():
        if each == plain:
            return name
    match = _LAYER_NAME.fullmatch(plain)
    if match:
        table = _IN_LAYER_WITH_POST_NORMS if spec.post_norms else _IN_LAYER
        for name, each in table.items():
            if each == match[2]:
                return f"layers.{match[1]}.{name}"
    return None


def _get_source(name: str, spec: ModelSpec) -> str:
    """The name a canonical tensor has in a folder of text only."""
    if name in _TOP:
        return _TOP[name]
    _, layer, rest = name.split(".", 2)
    table = _IN_LAYER_WITH_POST_NORMS if spec.post_norms else _IN_LAYER
    return f"model.layers.{layer}.{table[rest]}"


def _drop_tied_head(folder: Path, spec: ModelSpec, stored: dict[str, StoredTensor]) -> int:
    """Take out a stored head that a tied model never uses; returns its bytes."""
    if not spec.tied_embeddings or "head" not in stored:
        return 0
    head = stored.pop("head")
    if "embed" in stored and head.shape != stored["embed"].shape:
        problem = f"is {head.shape}, not {stored['embed'].shape} as the embeddings it is tied to"
        raise CorruptModel(f"{folder}: tensor '{head.source}' {problem}")
    return head.data.size
