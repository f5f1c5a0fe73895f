"""How a recorded pass is joined and laid out: nothing that lives shares memory."""

from __future__ import annotations

import pytest
import torch

from tiny_models import TINY_SPECS
from twostroke.exec.cuda_record import record
from twostroke.kernels.cuda.calls import (
    AddNorm,
    Attend,
    Call,
    DeviceRope,
    Product,
    RopeWrite,
    Value,
    get_reads,
    get_writes,
)
from twostroke.kernels.cuda.program import Layout, Section, lay_out
from twostroke.kernels.cuda.recorder import Recording
from twostroke.kernels.cuda.types import DenseMatrix, MatrixPart, Weights
from twostroke.spec.model import ModelSpec


def make_weights(spec: ModelSpec) -> Weights:
    """Weights of the right shapes and no memory to speak of, q, k and v merged, gate and up too."""
    weights: Weights = {}
    shapes = {tensor.name: tensor.shape for tensor in spec.tensors()}
    for name, shape in shapes.items():
        if len(shape) == 1:
            weights[name] = torch.empty(shape, device="meta")
    for names in (["embed"], ["head"], ["q", "k", "v"], ["o"], ["gate", "up"], ["down"]):
        for prefix in ["", *(f"layers.{index}." for index in range(spec.num_layers))]:
            whole = [prefix + name for name in names if prefix + name in shapes]
            if not whole:
                continue
            rows = [shapes[name][0] for name in whole]
            matrix = DenseMatrix(torch.empty((sum(rows), shapes[whole[0]][1]), device="meta"))
            first = 0
            for name, count in zip(whole, rows, strict=True):
                bias = torch.empty(sum(rows), device="meta") if spec.qkv_bias else None
                weights[name] = MatrixPart(matrix, first, first + count, bias)
                first += count
    return weights


def record_tiny(family: str) -> Recording:
    spec = TINY_SPECS[family]
    table = torch.empty(1, device="meta")
    ropes = {layer.rope: DeviceRope(table, table) for layer in spec.layers}
    return record(spec, make_weights(spec), ropes)


def make_layout(family: str, few_rows: bool) -> Layout:
    return lay_out(record_tiny(family), few_rows)


def find_clashes(section: Section, given: set[Value]) -> list[str]:
    """Values that a call reads although something else was written over them, or nothing was."""
    owners: dict[int, Value] = {}
    problems = []
    for call in section.calls:
        for value in get_reads(call):
            if value in given:
                continue
            column = section.columns[value]
            start = column.place.start + column.first
            for at in range(start, start + column.width):
                if owners.get(at) != value:
                    problems.append(f"{call} reads {value} at {at}")
                    break
        for value in get_writes(call):
            if value in section.columns:
                column = section.columns[value]
                start = column.place.start + column.first
                owners |= dict.fromkeys(range(start, start + column.width), value)
    return problems


@pytest.mark.parametrize("few_rows", [True, False])
@pytest.mark.parametrize("family", list(TINY_SPECS))
def test_nothing_is_written_over_before_it_was_read(family: str, few_rows: bool) -> None:
    layout = make_layout(family, few_rows)
    assert find_clashes(layout.body, set()) == []
    assert find_clashes(layout.head, {layout.hidden}) == []


def count(calls: tuple[Call, ...], kind: type) -> int:
    return sum(isinstance(call, kind) for call in calls)


def test_a_decoding_layer_is_six_launches() -> None:
    spec = TINY_SPECS["llama"]
    calls = make_layout("llama", few_rows=True).body.calls
    assert len(calls) == 1 + 6 * spec.num_layers
    assert count(calls, Product) == 4 * spec.num_layers
    assert count(calls, RopeWrite) == count(calls, Attend) == spec.num_layers


def test_sums_and_norms_are_one_launch_where_rows_are_many() -> None:
    spec = TINY_SPECS["llama"]
    calls = make_layout("llama", few_rows=False).body.calls
    assert count(calls, AddNorm) == 2 * spec.num_layers - 1
    assert all(call.norm is None and not call.gate for call in calls if isinstance(call, Product))


def test_head_norms_are_part_of_the_rotation() -> None:
    calls = make_layout("qwen3", few_rows=True).body.calls
    ropes = [call for call in calls if isinstance(call, RopeWrite)]
    assert all(call.q_norm is not None and call.k_norm is not None for call in ropes)


@pytest.mark.parametrize("few_rows", [True, False])
def test_memory_does_not_grow_with_layers(few_rows: bool) -> None:
    spec = TINY_SPECS["llama"]
    widest = spec.width + 2 * spec.ffn_width + 64 * 3
    assert make_layout("llama", few_rows).body.arena <= 2 * widest + 1024
