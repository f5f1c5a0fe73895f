"""Products with quantised matrices, and their rows: the functions that launch the kernels.

`product` reads the weights once for up to FEW_ROWS tokens; `product_many` multiplies in the same
kernel while tokens are not too many, and else writes the weights out a piece at a time and leaves
the product to cuBLAS; `product_exact` gives every token the same bits whoever is beside it. All of
them can be captured in a graph: nothing is allocated and nothing waits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from twostroke.kernels.cuda.overlap import can_overlap, get_options
from twostroke.kernels.cuda.quantised_choice import (
    Config,
    choose_exact,
    choose_few,
    choose_many,
    is_fused,
)
from twostroke.kernels.cuda.quantised_kernel import multiply
from twostroke.kernels.cuda.quantised_layout import get_layout
from twostroke.kernels.cuda.quantised_rows import gather_rows, write_rows
from twostroke.kernels.cuda.types import PLAIN, Fused, QuantMatrix, Tensor

FEW_ROWS = 64
GATES = ("silu", "gelu_tanh")
# Rows of a program that writes weights out, and columns of one that gathers rows.
WRITE_ROWS = 64
GATHER_COLUMNS = 1024
GATHER_WARPS = 4
# Float32 values and counters of a Workspace: what the configurations of quantised_choice.py need.
WORK_VALUES = 1 << 22
WORK_COUNTERS = 1 << 12


@dataclass(frozen=True, slots=True, eq=False)
class Workspace:
    """Memory of programs that share the inputs of a product: one launch uses it at a time.

    partials (WORK_VALUES,) float32: sums of a part. counters (WORK_COUNTERS,) int32: parts done;
    zeros between launches.
    """

    partials: Tensor
    counters: Tensor

    def count_token_tiles(self, config: Config, outputs: int) -> int:
        """Tiles of tokens that one launch has room for."""
        tiles = triton.cdiv(outputs, config.rows)
        values = tiles * config.parts * config.rows * config.columns
        room = min(self.partials.numel() // values, self.counters.numel() // tiles)
        assert room > 0, f"the workspace is too small for {config}"
        return room


def make_workspace(device: torch.device) -> Workspace:
    """A workspace; about 16 MiB."""
    return Workspace(
        torch.empty(WORK_VALUES, dtype=torch.float32, device=device),
        torch.zeros(WORK_COUNTERS, dtype=torch.int32, device=device),
    )


def product(
    out: Tensor,
    x: Tensor,
    matrix: QuantMatrix,
    fused: Fused = PLAIN,
    work: Workspace | None = None,
    config: Config | None = None,
) -> None:
    """out = x @ matrix.T with all that `fused` asks for; for few tokens.

    x (T, inputs) float16 or bfloat16; out (T, outputs), half of that with a gate, in any float.
    Both may be columns of wider tensors. work: without it no two programs share the inputs of a
    product, which is slower where outputs are few. A norm cannot be asked for: each program would
    weigh the inputs again, which cost more than a launch of its own (docs/log.md).
    """
    config = config or choose_few(x.shape[0], matrix, work is not None)
    _launch(out, x, matrix, fused, work, config)


def product_many(
    out: Tensor,
    x: Tensor,
    matrix: QuantMatrix,
    bias: Tensor | None = None,
    scratch: Tensor | None = None,
    config: Config | None = None,
) -> None:
    """out = x @ matrix.T + bias, for many tokens.

    scratch: memory in the dtype of x for one row of weights or more, better for all or for some
    thousands; None: the weights are never written out.
    """
    if config is not None or scratch is None or out.dtype != x.dtype or is_fused(x.shape[0]):
        config = config or choose_many(x.shape[0])
        _launch(out, x, matrix, Fused(bias=bias), None, config)
        return
    step = min(matrix.outputs, scratch.numel() // matrix.inputs)
    assert step > 0, "the scratch holds no row"
    for begin in range(0, matrix.outputs, step):
        end = min(begin + step, matrix.outputs)
        values = scratch.view(-1)[: (end - begin) * matrix.inputs].view(-1, matrix.inputs)
        dequantise(values, matrix, begin)
        part = out[:, begin:end]
        if bias is None:
            torch.mm(x, values.t(), out=part)
        else:
            torch.addmm(bias[begin:end], x, values.t(), out=part)


def product_exact(
    out: Tensor,
    x: Tensor,
    matrix: QuantMatrix,
    bias: Tensor | None = None,
    work: Workspace | None = None,
    config: Config | None = None,
) -> None:
    """out = x @ matrix.T + bias: the bits of a token depend on neither the others nor their number.

    They do depend on whether there is a workspace, which must be the same for all.
    """
    config = config or choose_exact(matrix, work is not None)
    _launch(out, x, matrix, Fused(bias=bias), work, config)


def dequantise(out: Tensor, matrix: QuantMatrix, begin: int = 0) -> None:
    """out (rows, inputs) = rows `begin` … of the matrix; contiguous, float16 or bfloat16."""
    rows, inputs = out.shape
    layout = get_layout(matrix)
    assert inputs == matrix.inputs
    assert begin + rows <= matrix.outputs
    assert out.is_contiguous()
    grid = (triton.cdiv(rows, WRITE_ROWS), layout.count_cells(inputs))
    write_rows[grid](
        out,
        _get_tensors(matrix),
        (begin, begin + rows),
        LAYOUT=layout,
        ROWS=WRITE_ROWS,
        ASM=_is_compiled(),
    )


def embed(out: Tensor, tokens: Tensor, matrix: QuantMatrix, scale: float) -> None:
    """out (T, inputs) = rows of the matrix for tokens (T,) int32, times scale."""
    count, inputs = out.shape
    assert inputs == matrix.inputs
    if count == 0:
        return
    gather_rows[count, triton.cdiv(inputs, GATHER_COLUMNS)](
        (out, out.stride(0), tokens),
        _get_tensors(matrix),
        scale,
        LAYOUT=get_layout(matrix),
        BLOCK=GATHER_COLUMNS,
        **get_options(can_overlap(out.device), GATHER_WARPS),
    )


def _launch(
    out: Tensor,
    x: Tensor,
    matrix: QuantMatrix,
    fused: Fused,
    work: Workspace | None,
    config: Config,
) -> None:
    tokens, inputs = x.shape
    outputs = matrix.outputs
    width = outputs // 2 if fused.gate else outputs
    assert inputs == matrix.inputs
    assert out.shape == (tokens, width)
    assert x.stride(1) == 1
    assert out.stride(1) == 1
    assert fused.gate in ("", *GATES)
    assert fused.norm is None
    assert matrix.packed.numel() < 1 << 31, "the kernel counts words in 32 bits"
    tiles = config.get_tiles(matrix, fused.gate, _is_compiled())
    memory: tuple[Tensor | None, Tensor | None] = (None, None)
    step = tokens
    if config.parts > 1:
        assert work is not None, "parts of a product need a workspace"
        memory = (work.partials, work.counters)
        step = min(tokens, config.columns * work.count_token_tiles(config, outputs))
    for begin in range(0, tokens, max(step, 1)):
        part = slice(begin, min(begin + step, tokens))
        multiply[config.get_grid(part.stop - begin, outputs)](
            (out[part], x[part], out.stride(0), x.stride(0)),
            part.stop - begin,
            _get_tensors(matrix),
            _get_fused(fused, part),
            memory,
            TILES=tiles,
            num_warps=config.warps,
        )


def _get_tensors(matrix: QuantMatrix) -> tuple[Any, ...]:
    """A matrix as kernels take it."""
    return (matrix.packed, matrix.scales, matrix.minimums, matrix.outputs, matrix.inputs)


def _get_fused(fused: Fused, part: slice) -> tuple[Any, ...]:
    """What is fused, of these tokens, as the kernel takes it."""
    residual, stride = fused.residual, 0
    if residual is not None:
        assert residual.stride(1) == 1
        residual, stride = residual[part], residual.stride(0)
    return (fused.bias, residual, stride)


def _is_compiled() -> bool:
    """False in Triton's interpreter, which knows no inline assembly."""
    return not triton.knobs.runtime.interpret
