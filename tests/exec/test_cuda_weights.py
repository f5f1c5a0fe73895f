"""Laws of loading weights for the GPU: the values are the file's, wherever they lie."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tiny_models import TINY_SPECS, make_tensors
from twostroke.errors import DeviceError, UnsupportedModel
from twostroke.exec.cuda_formats import get_device_bytes
from twostroke.exec.cuda_weights import (
    LoadTarget,
    choose_dtype,
    count_weight_bytes,
    load_weights,
)
from twostroke.kernels.cuda.repack import dequantise_rows
from twostroke.kernels.cuda.types import (
    DenseMatrix,
    MatrixPart,
    QuantMatrix,
    Tensor,
    Weights,
)
from twostroke.kernels.reference.dequant import dequantise
from twostroke.spec.model import ModelSpec, RopeLayout
from twostroke.spec.quant import Format
from twostroke.spec.shard import shard_spec
from twostroke.weights.tensor import HostTensor

# Rows of whole superblocks, which K-quants need.
WIDE = replace(
    TINY_SPECS["llama"], width=256, ffn_width=512, num_heads=8, num_kv_heads=2, head_dim=32
)
Tensors = dict[str, HostTensor]


def make_target(device: str, **changes: object) -> LoadTarget:
    """Everything, as float16, on one device."""
    return replace(LoadTarget(device, torch.float16), **changes)  # type: ignore[arg-type]


def read(tensors: Tensors, name: str) -> np.ndarray:
    """A stored tensor in float32."""
    tensor = tensors[name]
    return dequantise(tensor.spec.format, tensor.data, tensor.spec.shape)


def get_values(weights: Weights, name: str) -> np.ndarray:
    """A loaded matrix, or the part of one, in float32."""
    part = weights[name]
    assert isinstance(part, MatrixPart)
    if isinstance(part.matrix, DenseMatrix):
        return part.matrix.values[part.first : part.last].float().cpu().numpy()
    return dequantise_rows(part.matrix, part.first, part.last).cpu().numpy()


def get_vector(weights: Weights, name: str) -> np.ndarray:
    """A loaded vector."""
    values = weights[name]
    assert isinstance(values, Tensor)
    return values.float().cpu().numpy()


def unroll_pairs(values: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of heads from INTERLEAVED to HALF order, row by row."""
    wanted = np.empty_like(values)
    for start in range(0, len(values), head_dim):
        for index in range(head_dim // 2):
            wanted[start + index] = values[start + 2 * index]
            wanted[start + head_dim // 2 + index] = values[start + 2 * index + 1]
    return wanted


def as_half(tensors: Tensors, formats: dict[str, Format], spec: ModelSpec) -> Tensors:
    """The tensors with some matrices stored in other formats, of random bytes."""
    for short, format in formats.items():
        others = make_tensors(spec, format, seed=7)
        names = [name for name in tensors if name.rpartition(".")[2] == short]
        tensors |= {name: others[name] for name in names}
    return tensors


@pytest.mark.parametrize("family", list(TINY_SPECS))
def test_every_weight_of_every_family_has_the_values_of_the_file(family: str, device: str) -> None:
    spec = replace(TINY_SPECS[family], norm_offset=1.0)
    tensors = make_tensors(spec, Format.F32)
    weights = load_weights(spec, tensors, make_target(device))
    assert set(weights) == {each.name for each in spec.tensors()}
    for name, tensor in tensors.items():
        wanted, short = read(tensors, name), name.removesuffix(".bias").rpartition(".")[2]
        if short in ("q", "k", "q_norm", "k_norm") and spec.rope_layout is RopeLayout.INTERLEAVED:
            wanted = unroll_pairs(wanted, spec.head_dim)
        if len(tensor.spec.shape) == 2:
            np.testing.assert_array_equal(get_values(weights, name), wanted.astype(np.float16))
        elif name.endswith("norm"):
            np.testing.assert_array_equal(get_vector(weights, name), wanted + np.float32(1))
        else:
            np.testing.assert_array_equal(get_vector(weights, name), wanted.astype(np.float16))


@pytest.mark.parametrize("format", [each for each in Format if each.is_quantised])
def test_quantised_weights_keep_their_values(format: Format, device: str) -> None:
    tensors = make_tensors(WIDE, format)
    weights = load_weights(WIDE, tensors, make_target(device))
    for name in ("layers.0.o", "layers.1.down", "layers.0.up", "embed", "head"):
        part, wanted = weights[name], read(tensors, name)
        assert isinstance(part, MatrixPart)
        assert isinstance(part.matrix, QuantMatrix)
        # Scales are rounded to float16 once, here where the largest integer is 32.
        step = np.abs(wanted).max() * 2**-10
        np.testing.assert_allclose(get_values(weights, name), wanted, atol=step)
    wanted = unroll_pairs(read(tensors, "layers.0.k"), WIDE.head_dim)
    step = np.abs(wanted).max() * 2**-10
    np.testing.assert_allclose(get_values(weights, "layers.0.k"), wanted, atol=step)


def test_q_k_and_v_are_one_matrix_and_gate_and_up_another(device: str) -> None:
    weights = load_weights(WIDE, make_tensors(WIDE, Format.F16), make_target(device))
    for names in (("q", "k", "v"), ("gate", "up")):
        parts = [weights[f"layers.1.{name}"] for name in names]
        assert all(isinstance(part, MatrixPart) for part in parts)
        matrices = {id(part.matrix) for part in parts if isinstance(part, MatrixPart)}
        assert len(matrices) == 1
        ends = [(part.first, part.last) for part in parts if isinstance(part, MatrixPart)]
        assert [first for first, _ in ends] == [0, *(last for _, last in ends[:-1])]


@pytest.mark.parametrize("third", [Format.Q6_K, Format.Q8_0, Format.F32])
def test_parts_of_different_formats_keep_their_values_in_one(third: Format, device: str) -> None:
    tensors = as_half(make_tensors(WIDE, Format.Q4_K), {"v": third}, WIDE)
    apart = load_weights(WIDE, make_tensors(WIDE, Format.Q4_K), make_target(device))
    weights = load_weights(WIDE, tensors, make_target(device))
    joined, q = weights["layers.0.v"], weights["layers.0.q"]
    assert isinstance(joined, MatrixPart)
    assert isinstance(q, MatrixPart)
    assert joined.matrix is q.matrix
    rounding = 2**-11 if third is Format.F32 else 0  # of a sum that was exact, to float16
    for name in ("layers.0.q", "layers.0.k"):
        before = get_values(apart, name)
        np.testing.assert_allclose(get_values(weights, name), before, rtol=rounding, atol=1e-7)
    wanted = read(tensors, "layers.0.v")
    step = np.abs(wanted).max() * 2**-10
    np.testing.assert_allclose(get_values(weights, "layers.0.v"), wanted, atol=step)


def test_a_bias_is_as_long_as_its_matrix_and_zero_where_a_part_has_none(device: str) -> None:
    spec = TINY_SPECS["qwen2"]
    tensors = make_tensors(spec, Format.F16)
    del tensors["layers.0.k.bias"]
    weights = load_weights(spec, tensors, make_target(device))
    q, k = weights["layers.0.q"], weights["layers.0.k"]
    assert isinstance(q, MatrixPart)
    assert isinstance(k, MatrixPart)
    assert q.bias is k.bias
    assert q.bias is not None
    assert q.bias.shape == (q.matrix.outputs,)
    assert not q.bias[k.first : k.last].any()
    wanted = read(tensors, "layers.0.q.bias").astype(np.float16)
    np.testing.assert_array_equal(q.bias[: q.last].cpu().numpy(), wanted)


def test_a_tied_embedding_is_held_once(device: str) -> None:
    spec = TINY_SPECS["gemma3"]
    weights = load_weights(spec, make_tensors(spec, Format.F16), make_target(device))
    assert "head" not in weights
    assert count_weight_bytes(weights) == pytest.approx(get_device_bytes(spec), rel=0.01)


@pytest.mark.parametrize("quantise", ["", "int8", "int4"])
def test_weights_take_the_bytes_that_were_planned(quantise: str, device: str) -> None:
    odd = replace(WIDE, width=96, ffn_width=160)
    cases = [(WIDE, Format.F16), (WIDE, Format.Q4_K), (WIDE, Format.Q6_K), (odd, Format.Q4_1)]
    for sizes, format in cases:
        spec = replace(sizes, formats=tuple((each.name, format) for each in sizes.tensors()))
        tensors = make_tensors(spec, format)
        weights = load_weights(spec, tensors, make_target(device, quantise=quantise))
        assert count_weight_bytes(weights) == pytest.approx(
            get_device_bytes(spec, quantise), rel=0.02
        )


def test_floats_are_quantised_where_it_was_asked_but_the_head_keeps_eight_bits(
    device: str,
) -> None:
    tensors = make_tensors(WIDE, Format.F16)
    weights = load_weights(WIDE, tensors, make_target(device, quantise="int4"))
    for name, bits in (("layers.0.q", 4), ("layers.1.down", 4), ("head", 8), ("embed", 16)):
        part = weights[name]
        assert isinstance(part, MatrixPart)
        held = part.matrix.bits if isinstance(part.matrix, QuantMatrix) else 16
        assert held == bits
    wanted = read(tensors, "layers.1.down")
    error = np.abs(get_values(weights, "layers.1.down") - wanted).max()
    assert error <= np.abs(wanted).max() / 7  # half a step would be rounding; a step is 1/7


# ---- ranks and stages -------------------------------------------------------------------------

SHARED = replace(
    WIDE, qkv_bias=True, output_bias=True, ffn_bias=True, rope_layout=RopeLayout.INTERLEAVED
)


@pytest.mark.parametrize("format", [Format.F16, Format.Q8_0])
@pytest.mark.parametrize("world", [2, 4, 8])
def test_ranks_together_hold_the_model(world: int, format: Format, device: str) -> None:
    spec = SHARED
    tensors = make_tensors(spec, format)
    whole = load_weights(spec, tensors, make_target(device))
    ranks = [
        load_weights(spec, tensors, make_target(device, rank=rank, world=world))
        for rank in range(world)
    ]
    for short, axis in (("q", 0), ("gate", 0), ("up", 0), ("o", 1), ("down", 1)):
        name = f"layers.1.{short}"
        parts = [get_values(rank, name) for rank in ranks]
        np.testing.assert_array_equal(np.concatenate(parts, axis), get_values(whole, name))
    for short in ("q", "gate"):
        name = f"layers.0.{short}.bias"
        parts = [get_vector(rank, name) for rank in ranks]
        np.testing.assert_array_equal(np.concatenate(parts), get_vector(whole, name))
    for rank, weights in enumerate(ranks):
        shard = shard_spec(spec, rank, world)
        rows = shard.get_rows("k")
        for name in ("layers.0.k", "layers.0.v"):
            wanted = get_values(whole, name)[rows.start : rows.stop]
            np.testing.assert_array_equal(get_values(weights, name), wanted)
        assert ("layers.0.o.bias" in weights) == ("layers.0.down.bias" in weights) == (rank == 0)
        np.testing.assert_array_equal(get_values(weights, "embed"), get_values(whole, "embed"))


@pytest.mark.parametrize("tied", [False, True])
def test_parts_of_the_head_join_up_and_end_in_zeros(tied: bool, device: str) -> None:
    spec = replace(WIDE, tied_embeddings=tied)
    tensors = make_tensors(spec, Format.Q8_0)
    whole = load_weights(spec, tensors, make_target(device))
    wanted = get_values(whole, "embed" if tied else "head")
    for world in (2, 8):
        parts = [
            get_values(
                load_weights(spec, tensors, make_target(device, rank=rank, world=world)), "head"
            )
            for rank in range(world)
        ]
        assert len({len(part) for part in parts}) == 1
        joined = np.concatenate(parts)
        np.testing.assert_array_equal(joined[: spec.vocab_size], wanted)
        assert not joined[spec.vocab_size :].any()


def test_groups_are_never_cut_between_ranks(device: str) -> None:
    spec = replace(WIDE, ffn_width=256 * 3)
    tensors = make_tensors(spec, Format.Q4_K)
    load_weights(spec, tensors, make_target(device, rank=1, world=8))  # 96 columns: three groups
    spec = replace(WIDE, ffn_width=256)
    odd = replace(spec, num_heads=16, num_kv_heads=16, head_dim=16)
    with pytest.raises(DeviceError, match=r"layers\.0\.o cannot be divided over 16 devices"):
        load_weights(odd, make_tensors(odd, Format.Q4_K), make_target(device, rank=1, world=16))


def test_stages_hold_their_layers_counted_from_zero_and_the_ends_their_own(device: str) -> None:
    tensors = make_tensors(WIDE, Format.F16)
    whole = load_weights(WIDE, tensors, make_target(device))
    first = load_weights(WIDE, tensors, make_target(device, layers=range(1)))
    last = load_weights(WIDE, tensors, make_target(device, layers=range(1, 2)))
    assert ("embed" in first, "head" in first, "final_norm" in first) == (True, False, False)
    assert ("embed" in last, "head" in last, "final_norm" in last) == (False, True, True)
    np.testing.assert_array_equal(
        get_values(last, "layers.0.down"), get_values(whole, "layers.1.down")
    )
    assert not any(name.startswith("layers.1") for name in last)


def test_progress_ends_with_every_byte_of_the_file(device: str) -> None:
    tensors = make_tensors(WIDE, Format.F16)
    total = sum(tensor.data.nbytes for tensor in tensors.values())
    for world in (1, 2):
        heard: list[tuple[int, int]] = []
        target = make_target(device, world=world)
        load_weights(WIDE, tensors, target, lambda *now: heard.append(now))  # noqa: B023
        assert heard[-1] == (total, total)
        assert [done for done, _ in heard] == sorted(done for done, _ in heard)


def test_experts_are_refused_by_name(device: str) -> None:
    spec = replace(WIDE, num_experts=4, experts_per_token=2)
    with pytest.raises(UnsupportedModel, match="experts"):
        load_weights(spec, {}, make_target(device))


def test_the_type_of_activations_is_one_that_pytorch_has() -> None:
    assert choose_dtype(WIDE) is torch.bfloat16
    fitting = replace(WIDE, formats=tuple((each.name, Format.Q4_K) for each in WIDE.tensors()))
    assert choose_dtype(fitting) is torch.float16
