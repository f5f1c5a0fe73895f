"""How a stored weight format is held on a GPU: dense, or small integers in groups.

Owns which device format each file format becomes, and what a matrix of it takes; nothing here
computes, and PyTorch is not needed. Five- and six-bit formats are held as 8-bit integers: no value
changes, and no kernel of their own is needed. Matrices that are merged must share one format, so
the parts are brought to the least that holds all of them exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from twostroke.errors import UnsupportedModel
from twostroke.spec.kv import KvElement
from twostroke.spec.model import ModelSpec
from twostroke.spec.quant import Format

LEAST_HEAD_DIM, MOST_HEAD_DIM = 16, 256
# Weights that one scale is for where a model is quantised while it is loaded.
QUANTISED_GROUP = 32
# One below the other in one matrix, so that each is one product.
MERGED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}


@dataclass(frozen=True, slots=True)
class DeviceFormat:
    """A matrix on the device: `bits` a weight; 16 is dense, and has neither groups nor minimums.

    group: weights along the inputs that share a scale of two bytes and, with has_minimums, a
    minimum of two bytes.
    """

    bits: int
    group: int = 0
    has_minimums: bool = False

    @property
    def is_quantised(self) -> bool:
        """True where weights are small integers."""
        return self.bits < 16

    def get_bytes(self, outputs: int, inputs: int) -> int:
        """Bytes of a matrix (outputs, inputs), its rows filled up to whole cells of the layout
        (see kernels/cuda/quantised_layout.py)."""
        if not self.is_quantised:
            return 2 * outputs * inputs
        cell = max(32 * 16 // self.bits, 2 * self.group)
        weights = outputs * -(-inputs // cell) * cell
        each = 4 if self.has_minimums else 2
        return weights * self.bits // 8 + weights // self.group * each


DENSE = DeviceFormat(16)
_QUANTISED = {
    Format.Q4_0: DeviceFormat(4, 32),
    Format.Q4_1: DeviceFormat(4, 32, True),
    Format.Q4_K: DeviceFormat(4, 32, True),
    Format.Q5_0: DeviceFormat(8, 32),
    Format.Q5_1: DeviceFormat(8, 32, True),
    Format.Q5_K: DeviceFormat(8, 32, True),
    Format.Q6_K: DeviceFormat(8, 16),
    Format.Q8_0: DeviceFormat(8, 32),
}
# What `--weights` makes of a matrix of floats.
QUANTISED_WEIGHTS = {
    "int4": DeviceFormat(4, QUANTISED_GROUP),
    "int8": DeviceFormat(8, QUANTISED_GROUP),
}


def check_kernels(spec: ModelSpec) -> None:
    """Raises UnsupportedModel where no kernel has the model's head size."""
    if spec.head_dim % 16 or not LEAST_HEAD_DIM <= spec.head_dim <= MOST_HEAD_DIM:
        raise UnsupportedModel(
            f"{spec.name}: head size {spec.head_dim} has no kernels on a GPU, only multiples of 16 "
            f"from {LEAST_HEAD_DIM} to {MOST_HEAD_DIM}; use --device cpu"
        )


def get_device_format(stored: Format, quantise: str = "") -> DeviceFormat:
    """What a matrix of this format becomes; `quantise` is "int4" or "int8" for those of floats."""
    if stored in _QUANTISED:
        return _QUANTISED[stored]
    return QUANTISED_WEIGHTS[quantise] if quantise else DENSE


def join_formats(formats: Iterable[DeviceFormat]) -> DeviceFormat:
    """The least format that holds matrices of all these, one below the other, exactly.

    One dense part makes all of them dense: as integers its values would change.
    """
    each = list(formats)
    if any(not one.is_quantised for one in each):
        return DENSE
    return DeviceFormat(
        max(one.bits for one in each),
        min(one.group for one in each),
        any(one.has_minimums for one in each),
    )


def list_matrices(
    spec: ModelSpec, quantise: str = ""
) -> Iterator[tuple[str, DeviceFormat, int, int]]:
    """Every matrix as it is held: name (merged ones have their own), format, outputs, inputs."""
    tensors = {each.name: each for each in spec.tensors()}
    merged = {part: name for name, parts in MERGED.items() for part in parts}
    for name, tensor in tensors.items():
        prefix, _, short = name.rpartition(".")
        if len(tensor.shape) != 2:
            continue
        chosen = choose_quantising(spec, name, quantise)
        if short not in merged:
            yield name, get_device_format(tensor.format, chosen), *tensor.shape
            continue
        whole = merged[short]
        parts = [tensors[f"{prefix}.{each}"] for each in MERGED[whole]]
        if parts[0] is tensor:
            joined = join_formats(get_device_format(each.format, chosen) for each in parts)
            outputs = sum(each.shape[0] for each in parts)
            yield f"{prefix}.{whole}", joined, outputs, tensor.shape[1]


def choose_quantising(spec: ModelSpec, name: str, quantise: str) -> str:
    """What `quantise` means for the matrix called `name`: the same, "int8", or "" for nothing.

    The head keeps eight bits, because its errors are the logits' own, and so does an embedding that
    is the head too; any other embedding stays as it is: its rows are looked up, not read through.
    """
    if not quantise or (name == "embed" and not spec.tied_embeddings):
        return ""
    return "int8" if name in ("embed", "head") else quantise


def describe_held(spec: ModelSpec, quantise: str) -> ModelSpec:
    """The model as if it had been stored the way `quantise` makes it, for counting its work."""
    formats = dict(spec.formats)
    for tensor in spec.tensors():
        chosen = choose_quantising(spec, tensor.name, quantise)
        if chosen and len(tensor.shape) == 2 and not tensor.format.is_quantised:
            # The same integers and scales: 32 weights and their two bytes.
            formats[tensor.name] = Format.Q4_0 if chosen == "int4" else Format.Q8_0
    return replace(spec, formats=tuple(formats.items()))


def get_device_bytes(spec: ModelSpec, quantise: str = "", world: int = 1) -> int:
    """Bytes of all weights on the device; norms and biases are counted as float32.

    spec: of one rank's share where `world` ranks share the model (see spec/shard.py), of whose
    head it has one part.
    """
    matrices = sum(
        each.get_bytes(-(-outputs // world) if name == "head" else outputs, inputs)
        for name, each, outputs, inputs in list_matrices(spec, quantise)
    )
    vectors = sum(4 * each.num_weights for each in spec.tensors() if len(each.shape) == 1)
    return matrices + vectors


def choose_activations(spec: ModelSpec) -> tuple[KvElement, str]:
    """The type of activations, KvElement.F16 or BF16, and why.

    The wider range of bfloat16 is needed where the residual stream outgrows float16's 65,504, as
    Gemma's does (its norms behind attention and FFN mark the family); elsewhere float16 keeps three
    more bits, which scales of quantised weights, stored as float16, need to be exact.
    """
    if spec.post_norms:
        return KvElement.BF16, "the family's activations outgrow f16"
    counts: dict[Format, int] = {}
    for tensor in spec.tensors():
        if len(tensor.shape) == 2:
            counts[tensor.format] = counts.get(tensor.format, 0) + tensor.num_weights
    most = max(counts, key=lambda each: counts[each])
    if most in (Format.BF16, Format.F32):
        return KvElement.BF16, f"weights are stored as {most.value}"
    return KvElement.F16, f"weights are stored as {most.value}"
