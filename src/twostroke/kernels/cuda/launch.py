"""From calls to launches: which kernel computes a call, for how many rows, exact or fast.

Owns that choice and nothing else. A launch is a function without arguments, bound to the memory it
reads and writes, so that running a pass is calling a list of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from twostroke.kernels.cuda import attention, dense, quantised, rope, rows
from twostroke.kernels.cuda.calls import (
    Add,
    AddNorm,
    AllReduce,
    Attend,
    Call,
    Embed,
    Gated,
    GatherLogits,
    Norm,
    Product,
    Rope,
    RopeWrite,
    TakeRows,
    Value,
    WriteKv,
)
from twostroke.kernels.cuda.collectives import Collectives
from twostroke.kernels.cuda.types import (
    DenseMatrix,
    Fused,
    KvLayer,
    StepTensors,
    Tensor,
)
from twostroke.kernels.reference.ops import get_rotated_dims

Views = dict[Value, Tensor]
Launch = Callable[[], None]

# Rows up to which a product streams its weights past all of them at once.
FEW_ROWS = 16
FEW_ROWS_QUANTISED = 64


@dataclass(frozen=True, slots=True, eq=False)
class Launches:
    """All that launches need beside a step and the values.

    kv: of each layer. shape: of the heads. attention_scratch, workspace, dequantised: memory of the
    kernels' own, the last for one quantised matrix in the dtype of the activations; both None where
    none is quantised. exact: a token's results must not depend on the other tokens of its step.
    """

    kv: Sequence[KvLayer]
    shape: rope.HeadShape
    attention_scratch: attention.AttentionScratch
    workspace: quantised.Workspace | None
    dequantised: Tensor | None
    exact: bool = False
    collectives: Collectives | None = None

    def bind(self, calls: Sequence[Call], at: Views, step: StepTensors) -> list[Launch]:
        """The launches of these calls for one step, with values at these places."""
        return [self._bind(call, at, step) for call in calls]

    def _bind(self, call: Call, at: Views, step: StepTensors) -> Launch:
        match call:
            case Product():
                return self._bind_product(call, at)
            case Attend() | RopeWrite():
                return self._bind_attention(call, at, step)
            case Norm():
                return partial(rows.rms_norm, at[call.out], at[call.x], call.weight, call.eps)
            case AddNorm(total=total, out=out, x=x, y=y):
                sums = (at[total], at[out], at[x], at[y])
                return partial(rows.add_rms_norm, *sums, call.weight, call.eps)
            case Add():
                return partial(rows.add, at[call.out], at[call.x], at[call.y])
            case Gated():
                both = _join_columns(at[call.gate], at[call.up])
                return partial(rows.gated, at[call.out], both, call.activation)
            case Embed():
                return self._bind_embed(call, at, step)
            case TakeRows():
                return partial(rows.take_rows, at[call.out], at[call.x], step.logit_rows)
            case AllReduce() | GatherLogits():
                return self._bind_exchange(call, at)
            case Rope() | WriteKv():
                raise AssertionError(f"{call} was not joined")

    def _bind_product(self, call: Product, at: Views) -> Launch:
        matrix, x = call.matrix, at[call.x]
        out = _join_columns(*(at[value] for value in call.outs))
        if self.exact:
            assert call.norm is None, "exact products take nothing in"
            if isinstance(matrix, DenseMatrix):
                return partial(dense.product_exact, out, x, matrix, call.bias)
            return partial(quantised.product_exact, out, x, matrix, call.bias, self.workspace)
        residual = None if call.residual is None else at[call.residual]
        fused = Fused(call.norm, call.eps, call.bias, call.gate, residual)
        is_plain = call.norm is None and not call.gate and residual is None
        if isinstance(matrix, DenseMatrix):
            # Beside PyTorch's library ours is faster for one row only, or where something is fused.
            if x.shape[0] == 1 or not is_plain:
                return partial(dense.product, out, x, matrix, fused)
            return partial(dense.product_many, out, x, matrix, call.bias)
        if x.shape[0] <= FEW_ROWS_QUANTISED:
            return partial(quantised.product, out, x, matrix, fused, self.workspace)
        assert is_plain, "many rows are multiplied alone"
        return partial(quantised.product_many, out, x, matrix, call.bias, self.dequantised)

    def _bind_attention(self, call: Attend | RopeWrite, at: Views, step: StepTensors) -> Launch:
        kv = self.kv[call.layer]
        if isinstance(call, RopeWrite):
            table = call.table
            heads = rope.HeadRope(
                self.shape, table.cos, table.sin, call.q_norm, call.k_norm, call.eps
            )
            qkv = _join_columns(*(at[value] for value in call.qkv))
            return partial(rope.rope_write, at[call.out], qkv, step, kv, heads)
        q = at[call.q].unflatten(1, (self.shape.heads, self.shape.head_dim))
        # Of 8-bit pools both q and keys come rotated: q . k = (H q) . (H k) / n (see rope.py).
        rotated = get_rotated_dims(self.shape.head_dim) if kv.key_scales is not None else 1
        look = attention.Look(call.scale / rotated, call.window, self.exact)
        return partial(attention.attend, at[call.out], q, kv, step, look, self.attention_scratch)

    def _bind_embed(self, call: Embed, at: Views, step: StepTensors) -> Launch:
        table = call.table.matrix
        family = rows if isinstance(table, DenseMatrix) else quantised
        return partial(family.embed, at[call.out], step.tokens, table, call.scale)

    def _bind_exchange(self, call: AllReduce | GatherLogits, at: Views) -> Launch:
        assert self.collectives is not None, "ranks were recorded and none are connected"
        if isinstance(call, AllReduce):
            return partial(self.collectives.all_reduce, at[call.x])
        return partial(self.collectives.gather_logits, at[call.out], at[call.x])


def _join_columns(*parts: Tensor) -> Tensor:
    """One view over values that lie side by side in one place (see program.py)."""
    first = parts[0]
    width = sum(part.shape[1] for part in parts)
    if len(parts) == 1:
        return first
    end = first.storage_offset()
    for part in parts:
        assert part.storage_offset() == end, "values that belong together lie apart"
        end += part.shape[1]
    return first.as_strided((first.shape[0], width), first.stride())
