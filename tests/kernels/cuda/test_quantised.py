"""Products with quantised matrices against float64, for every kind of matrix and of product."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from twostroke.kernels.cuda import quantised, repack
from twostroke.kernels.cuda.quantised_choice import Config, choose_few
from twostroke.kernels.cuda.quantised_layout import GROUPS
from twostroke.kernels.cuda.types import PLAIN, DenseMatrix, Fused, QuantMatrix
from twostroke.kernels.reference.dequant import dequantise
from twostroke.spec.quant import Format

Tensor = torch.Tensor
HALVES = (torch.float16, torch.bfloat16)
STORED = tuple(fmt for fmt in Format if fmt.is_quantised)
# Bytes at which a block's float16 scales begin.
SCALES = {
    Format.Q4_1: (0, 2),
    Format.Q5_1: (0, 2),
    Format.Q4_K: (0, 2),
    Format.Q5_K: (0, 2),
    Format.Q6_K: (208,),
}
# Bits and group.
KINDS = [(4, 32), (4, 128), (8, 32), (8, 128), (4, 64), (8, 16)]


def make_stored(fmt: Format, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Random bytes of a tensor whose scales are about 0.01."""
    block = fmt.block
    blocks = rng.integers(0, 256, (shape[0] * shape[1] // block.weights, block.bytes), np.uint8)
    for start in SCALES.get(fmt, (0,)):
        scales = rng.normal(0, 0.01, (len(blocks), 1)).astype(np.float16)
        blocks[:, start : start + 2] = scales.view(np.uint8)
    return blocks.reshape(-1)


def make_matrix(shape: tuple[int, int], kind: tuple[int, int], device: str) -> QuantMatrix:
    """A random matrix of bits and group."""
    generator = torch.Generator().manual_seed(sum(shape) + sum(kind))
    values = torch.randn(shape, generator=generator) * shape[1] ** -0.5
    return repack.quantise_groups(values.to(device), *kind)


def get_weights(matrix: QuantMatrix) -> Tensor:
    """All its weights, float32."""
    return repack.dequantise_rows(matrix, 0, matrix.outputs)


def multiply_plainly(x: Tensor, weights: Tensor, fused: Fused) -> Tensor:
    """What a product computes, in the dtype of x."""
    y = x @ weights.to(x.dtype).T
    if fused.bias is not None:
        y = y + fused.bias.to(x.dtype)
    if fused.gate:
        gate, up = y.chunk(2, dim=1)
        functional = torch.nn.functional
        if fused.gate == "silu":
            y = functional.silu(gate) * up
        else:
            y = functional.gelu(gate, approximate="tanh") * up
    return y if fused.residual is None else y + fused.residual.to(x.dtype)


def check(out: Tensor, x: Tensor, matrix: QuantMatrix, fused: Fused = PLAIN) -> None:
    """The error, in the mean square and at most, is no more than twice that of plain PyTorch.

    Few outputs may be lucky in PyTorch; rounding the true result once is always good enough.
    """
    weights = get_weights(matrix)
    true = multiply_plainly(x.double(), weights.double(), fused)
    plain = multiply_plainly(x, weights, fused).double()
    ours, theirs, rounded = (
        (each.double() - true).abs() for each in (out, plain, true.to(x.dtype))
    )
    assert torch.isfinite(out).all()
    for measure in (Tensor.max, lambda errors: errors.square().mean().sqrt()):
        assert measure(ours) <= max(2 * measure(theirs), measure(rounded))


def make_inputs(tokens: int, inputs: int, dtype: torch.dtype, device: str) -> Tensor:
    """Random activations, with a few that are much larger than the others."""
    x = torch.randn(tokens, inputs)
    x[:, ::97] *= 20
    return x.to(device, dtype)


def poison(tokens: int, width: int, dtype: torch.dtype, device: str) -> Tensor:
    """An output that nothing was written to."""
    return torch.full((tokens, width), float("nan"), dtype=dtype, device=device)


@pytest.mark.parametrize("fmt", STORED, ids=lambda fmt: fmt.value)
def test_repacking_keeps_every_weight(fmt: Format, device: str) -> None:
    shape = (5, 768)
    data = make_stored(fmt, shape, np.random.default_rng(torch.initial_seed()))
    matrix = repack.repack(fmt, data, shape, torch.device(device), torch.float16)
    assert isinstance(matrix, QuantMatrix)
    true = torch.from_numpy(dequantise(fmt, data, shape)).to(device)
    # Scales and minimums that are products are rounded to float16: 11 bits.
    assert (get_weights(matrix) - true).abs().max() <= true.abs().max() * 2.0**-11
    assert matrix.bytes == repack.get_quant_bytes(fmt, shape)
    if "K" not in fmt.value:
        assert torch.equal(get_weights(matrix), true)


def test_repacking_in_chunks_is_repacking_at_once(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = (7, 512)
    data = make_stored(Format.Q4_K, shape, np.random.default_rng(1))
    place = (shape, torch.device(device), torch.float16)
    at_once = repack.repack(Format.Q4_K, data, *place)
    monkeypatch.setattr(repack, "CHUNK_WEIGHTS", 1024)
    chunked = repack.repack(Format.Q4_K, data, *place)
    assert isinstance(at_once, QuantMatrix)
    assert isinstance(chunked, QuantMatrix)
    assert torch.equal(at_once.packed, chunked.packed)
    assert torch.equal(at_once.scales, chunked.scales)


@pytest.mark.parametrize("fmt", [Format.F32, Format.F16, Format.BF16], ids=lambda fmt: fmt.value)
def test_floats_become_a_dense_matrix(fmt: Format, device: str) -> None:
    rng = np.random.default_rng(torch.initial_seed())
    data = rng.normal(0, 1, 6 * 40).astype(np.float32).view(np.uint8)
    data = data[: fmt.get_bytes(6 * 40)] if fmt is not Format.BF16 else data.reshape(-1, 4)[:, 2:]
    data = np.ascontiguousarray(data).reshape(-1)
    if fmt is Format.F16:
        data = rng.normal(0, 1, 6 * 40).astype(np.float16).view(np.uint8)
    matrix = repack.repack(fmt, data, (6, 40), torch.device(device), torch.bfloat16)
    assert isinstance(matrix, DenseMatrix)
    true = torch.from_numpy(dequantise(fmt, data, (6, 40))).to(device, torch.bfloat16)
    assert torch.equal(matrix.values, true)


@pytest.mark.parametrize(("bits", "bound"), [(4, 1 / 14), (8, 1 / 254)])
def test_rounding_to_groups_is_within_half_a_step(bits: int, bound: float, device: str) -> None:
    values = torch.randn(9, 200, device=device)
    values[3] = 0
    matrix = repack.quantise_groups(values, bits, 64)
    padded = torch.nn.functional.pad(values, (0, 56)).view(9, 4, 64)
    largest = padded.abs().amax(2).repeat_interleave(64, dim=1)[:, :200]
    # Half a step, and the scale's own rounding.
    assert ((get_weights(matrix) - values).abs() <= largest * (bound + 2.0**-11)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_random_weights_have_the_variance_of_a_layer(kind: tuple[int, int], device: str) -> None:
    matrix = repack.make_random((64, 1024), *kind, torch.device(device), 3)
    deviation = get_weights(matrix).std() * 1024**0.5
    assert 0.9 < deviation < 1.15


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", HALVES)
def test_one_token_times_every_kind(kind: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    # Sums whose last step is not full.
    matrix = make_matrix((72, 1280), kind, device)
    x, out = make_inputs(1, 1280, dtype, device), poison(1, 72, dtype, device)
    quantised.product(out, x, matrix)
    check(out, x, matrix)


@pytest.mark.parametrize("fmt", [Format.Q4_1, Format.Q4_K, Format.Q5_1, Format.Q6_K])
@pytest.mark.parametrize("dtype", HALVES)
def test_products_with_minimums_and_narrow_groups(
    fmt: Format, dtype: torch.dtype, device: str
) -> None:
    shape = (40, 512)
    data = make_stored(fmt, shape, np.random.default_rng(torch.initial_seed()))
    matrix = repack.repack(fmt, data, shape, torch.device(device), dtype)
    assert isinstance(matrix, QuantMatrix)
    x, out = make_inputs(3, 512, dtype, device), poison(3, 40, dtype, device)
    quantised.product(out, x, matrix)
    check(out, x, matrix)


@pytest.mark.parametrize("tokens", [2, 3, 5, 9, 17, 33, 64])
def test_few_tokens_of_every_tile(tokens: int, device: str) -> None:
    dtype = HALVES[tokens % 2]
    matrix = make_matrix((136, 416), (4, 32), device)
    x, out = make_inputs(tokens, 416, dtype, device), poison(tokens, 136, dtype, device)
    quantised.product(out, x, matrix)
    check(out, x, matrix)


@pytest.mark.parametrize("tokens", [1, 4, 20])
@pytest.mark.parametrize(("gate", "parts"), [("", 3), ("silu", 1), ("gelu_tanh", 2)])
def test_what_is_fused_is_computed(tokens: int, gate: str, parts: int, device: str) -> None:
    dtype = torch.float16 if tokens > 1 else torch.bfloat16
    matrix = make_matrix((96, 512), (4, 32), device)
    width = 48 if gate else 96
    fused = Fused(
        bias=torch.randn(96, device=device).to(dtype),
        gate=gate,
    )
    work = quantised.make_workspace(torch.device(device))
    config = replace(choose_few(tokens, matrix, False), parts=parts)
    # A gate makes one output far larger than the others, so the largest error is that of one
    # rounding: PyTorch's must be taken over several rows too.
    calls = max(1, 8 // tokens)
    x = make_inputs(calls * tokens, 512, dtype, device)
    residual = torch.randn(calls * tokens, width, device=device).to(dtype)
    out = poison(calls * tokens, width, dtype, device)
    for first in range(0, calls * tokens, tokens):
        rows = slice(first, first + tokens)
        part = replace(fused, residual=residual[rows])
        quantised.product(out[rows], x[rows], matrix, part, work, config)
    check(out, x, matrix, replace(fused, residual=residual))
    assert not work.counters.any()


def test_the_residual_may_be_the_output(device: str) -> None:
    matrix = make_matrix((64, 256), (4, 32), device)
    x, residual = (make_inputs(2, size, torch.float16, device) for size in (256, 64))
    out = residual.clone()
    quantised.product(out, x, matrix, Fused(residual=out))
    check(out, x, matrix, Fused(residual=residual))


def test_tensors_may_be_columns_of_wider_ones(device: str) -> None:
    matrix = make_matrix((48, 256), (8, 32), device)
    wide, space = make_inputs(3, 300, torch.float16, device), poison(3, 100, torch.float16, device)
    x, out = wide[:, 16:272], space[:, 32:80]
    quantised.product(out, x, matrix)
    check(out, x.contiguous(), matrix)
    assert space[:, :32].isnan().all()
    assert space[:, 80:].isnan().all()


def test_logits_are_float32(device: str) -> None:
    matrix = make_matrix((70, 256), (4, 128), device)
    x, out = make_inputs(1, 256, torch.bfloat16, device), poison(1, 70, torch.float32, device)
    quantised.product(out, x, matrix)
    true = x.double() @ get_weights(matrix).double().T
    assert (out.double() - true).abs().max() <= 1e-5 * true.abs().max()


@pytest.mark.parametrize("kind", [(4, 32), (8, 16)])
@pytest.mark.parametrize("tokens", [70, 260])
@pytest.mark.parametrize("has_scratch", [False, True])
def test_many_tokens(kind: tuple[int, int], tokens: int, has_scratch: bool, device: str) -> None:
    dtype = HALVES[tokens == 70]
    matrix = make_matrix((72, 320), kind, device)
    bias = torch.randn(72, device=device).to(dtype)
    # A scratch for some of the rows: the last piece is smaller than the others.
    scratch = torch.empty(31 * 320, dtype=dtype, device=device) if has_scratch else None
    x, out = make_inputs(tokens, 320, dtype, device), poison(tokens, 72, dtype, device)
    quantised.product_many(out, x, matrix, bias, scratch)
    check(out, x, matrix, Fused(bias=bias))


@pytest.mark.parametrize("shared", [False, True])
def test_exact_bits_do_not_depend_on_the_other_tokens(shared: bool, device: str) -> None:
    matrix = make_matrix((72, 256), (4, 32), device)
    work = quantised.make_workspace(torch.device(device)) if shared else None
    x = make_inputs(40, 256, torch.float16, device)
    together = poison(40, 72, torch.float16, device)
    quantised.product_exact(together, x, matrix, None, work)
    check(together, x, matrix)
    for rows in (slice(0, 1), slice(7, 8), slice(30, 37)):
        alone = poison(rows.stop - rows.start, 72, torch.float16, device)
        quantised.product_exact(alone, x[rows], matrix, None, work)
        assert torch.equal(alone, together[rows])


def test_a_small_workspace_takes_the_tokens_in_turns(device: str) -> None:
    matrix = make_matrix((64, 256), (4, 32), device)
    x = make_inputs(37, 256, torch.float16, device)
    work = quantised.make_workspace(torch.device(device))
    config = Config(1, 64, 16, parts=2)
    small = quantised.Workspace(work.partials[: 2 * 64 * 16], work.counters)
    outs = [poison(37, 64, torch.float16, device) for _ in range(2)]
    fused = Fused(residual=make_inputs(37, 64, torch.float16, device))
    quantised.product(outs[0], x, matrix, fused, work, config)
    quantised.product(outs[1], x, matrix, fused, small, config)
    check(outs[0], x, matrix, fused)
    assert torch.equal(outs[0], outs[1])


def test_parts_add_up_the_same_every_time(device: str) -> None:
    matrix = make_matrix((64, 1024), (4, 32), device)
    x = make_inputs(9, 1024, torch.float16, device)
    work = quantised.make_workspace(torch.device(device))
    outs = [poison(9, 64, torch.float16, device) for _ in range(3)]
    for out in outs:
        quantised.product(out, x, matrix, PLAIN, work, Config(1, 64, 16, parts=4))
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("fmt", STORED, ids=lambda fmt: fmt.value)
@pytest.mark.parametrize("dtype", HALVES)
def test_rows_written_out_are_the_weights_rounded_once(
    fmt: Format, dtype: torch.dtype, device: str
) -> None:
    shape = (70, 256)
    data = make_stored(fmt, shape, np.random.default_rng(torch.initial_seed()))
    matrix = repack.repack(fmt, data, shape, torch.device(device), dtype)
    assert isinstance(matrix, QuantMatrix)
    out = poison(60, 256, dtype, device)
    quantised.dequantise(out, matrix, 7)
    assert torch.equal(out, get_weights(matrix)[7:67].to(dtype))


@pytest.mark.parametrize("fmt", [Format.Q4_0, Format.Q4_K, Format.Q6_K], ids=lambda fmt: fmt.value)
def test_embedding_takes_rows(fmt: Format, device: str) -> None:
    shape = (50, 1280)
    data = make_stored(fmt, shape, np.random.default_rng(torch.initial_seed()))
    matrix = repack.repack(fmt, data, shape, torch.device(device), torch.float16)
    assert isinstance(matrix, QuantMatrix)
    tokens = torch.tensor([49, 0, 7, 7], dtype=torch.int32, device=device)
    out = poison(4, 1280, torch.float16, device)
    quantised.embed(out, tokens, matrix, 3.0)
    assert torch.equal(out, (get_weights(matrix)[tokens.long()] * 3.0).to(torch.float16))


@pytest.mark.parametrize("group", GROUPS)
def test_shards_of_columns_are_columns(group: int, device: str) -> None:
    matrix = make_matrix((12, 640), (4, group), device)
    begin, end = (group * (640 // group // 3), 640 - group * (640 // group // 3))
    shard = repack.shard_columns(matrix, begin, end)
    assert isinstance(shard, QuantMatrix)
    assert torch.equal(get_weights(shard), get_weights(matrix)[:, begin:end])
    with pytest.raises(ValueError, match="whole groups"):
        repack.shard_columns(matrix, 8, 640)


def test_rows_are_sharded_and_permuted(device: str) -> None:
    matrix = make_matrix((12, 256), (8, 32), device)
    shard = repack.shard_rows(matrix, 3, 9)
    order = torch.randperm(12).to(device)
    permuted = repack.permute_rows(matrix, order)
    assert isinstance(shard, QuantMatrix)
    assert isinstance(permuted, QuantMatrix)
    assert torch.equal(get_weights(shard), get_weights(matrix)[3:9])
    assert torch.equal(get_weights(permuted), get_weights(matrix)[order])
    assert shard.outputs == 6


@pytest.mark.parametrize(
    "formats",
    [
        (Format.Q4_0, Format.Q4_0),
        (Format.Q4_K, Format.Q6_K),
        (Format.Q4_0, Format.Q4_1),
        (Format.Q4_0, Format.Q5_1, Format.Q8_0),
    ],
)
def test_stacking_keeps_the_weights(formats: tuple[Format, ...], device: str) -> None:
    shape = (6, 512)
    matrices = []
    for fmt in formats:
        data = make_stored(fmt, shape, np.random.default_rng(torch.initial_seed()))
        matrices.append(repack.repack(fmt, data, shape, torch.device(device), torch.float16))
    stacked = repack.stack(matrices)
    assert isinstance(stacked, QuantMatrix)
    parts = [get_weights(each) for each in matrices if isinstance(each, QuantMatrix)]
    assert torch.equal(get_weights(stacked), torch.cat(parts))
    assert stacked.outputs == 6 * len(formats)


def test_dense_and_quantised_matrices_do_not_stack(device: str) -> None:
    dense = DenseMatrix(torch.zeros(4, 256, device=device))
    with pytest.raises(ValueError, match="cannot be stacked"):
        repack.stack([dense, make_matrix((4, 256), (4, 32), device)])
    both = repack.stack([dense, dense])
    assert isinstance(both, DenseMatrix)
    assert both.outputs == 8
